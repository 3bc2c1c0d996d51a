"""Measure one cell of the study: train, run all strategies, score all subsets, repeat on the first 60 %."""

from __future__ import annotations

import math
import os
import platform
import tempfile
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any, Final

import torch

import ckptavg
from ckptavg.checkpoints.discover import discover
from ckptavg.checkpoints.window import Window
from ckptavg.coefficients import Coefficients
from ckptavg.context import Run
from ckptavg.errors import UsageError
from ckptavg.objective.mixture import Mixture
from ckptavg.report.result import StrategyResult
from ckptavg.tasks.batch import to_device
from ckptavg.tasks.python_file import PythonTask
from study.domains import domain
from study.job import Job, Training, write_task
from study.plan import Plan, available, digest
from study.record import Record, Row
from study.subsets import Subsets, drawn, enumerated, figures, row_of, shape, split
from study.training import train

PICK: Final = "compare's pick"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A training and all of its measurements."""

    domain: str
    seed: int
    schedule: str
    data: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A job that has been trained."""

    job: Job
    folder: Path
    task: Path
    seed: int
    device: torch.device
    every: int
    peers: Mapping[str, Path]
    seconds: float

    @property
    def share(self) -> float:
        """Return the share of the training data that strategies see: the size of their epoch."""
        return 1.0 if self.job.sample is None else _examples(self.job.sample) / _examples(self.job.train)

    @contextmanager
    def mixture(self, window: Window) -> Generator[Mixture]:
        """Open the objective of the candidates in a window."""
        with discover([self.folder], window) as found:
            yield Mixture(PythonTask(str(self.task)), found.checkpoints, Run(device=self.device, seed=self.seed))


def measure(cell: Cell, whole: Plan) -> Record:
    """Measure one training for the study."""
    started = _cpu_seconds()
    plan = whole.of(cell.domain)
    specs = [*plan.strategies.values(), *plan.sweep.values()]
    with tempfile.TemporaryDirectory(prefix="ckptavg-study-") as root:
        trained = train_cell(cell, plan, Path(root))
        window = Window(last=plan.last)
        contestants = _contest(trained, available(specs), window)
        with trained.mixture(window) as mixture:
            subsets = enumerated(mixture, plan.k) if plan.exhaustive else None
            rows = [
                _row(mixture, trained, label, spec, contestants[spec])
                for label, spec in plan.strategies.items()
                if spec in contestants
            ]
            sweep = [
                replace(_row(mixture, trained, kind, spec, contestants[spec]), used=k)
                for (kind, k), spec in plan.sweep.items()
            ]
            uniform = partial(Coefficients.uniform, n=mixture.n)
            subset = drawn(mixture.n, plan.k, plan.random, cell.seed)
            single = [[i] for i in range(0, mixture.n, math.ceil(mixture.n / plan.singles))]
            random, singles = (
                [row_of(mixture, trained.job, "", "", uniform(each)) for each in chosen] for chosen in (subset, single)
            )
            pick = _row(mixture, trained, PICK, "of all of these", contestants[PICK])
            rows += [replace(pick, seconds=None), _mean("random", random)]
            if subsets is not None:
                rows = [replace(row, rank=subsets.rank(row.chosen)) for row in rows]
                rows.append(_best(mixture, trained.job, subsets))
        rows += [_peer(trained, label, path) for label, path in trained.peers.items()]
        early = _early(trained, plan)
    return Record(
        digest=digest(cell.domain, plan, cell.data),
        plan=plan.name,
        machine=machine(trained.device),
        domain=cell.domain,
        seed=cell.seed,
        schedule=cell.schedule,
        n=mixture.n,
        k=plan.k,
        subsets=math.comb(mixture.n, plan.k),
        epochs=plan.checkpoints * trained.every / len(trained.job.train),  # pyright: ignore[reportArgumentType]
        seconds=trained.seconds,
        rows=rows,
        sweep=sweep,
        early=early,
        points=[(row.val_loss, row.figure) for row in (*singles, *random)],
        skipped=[spec for spec in dict.fromkeys(specs) if spec not in contestants],
        cpu_seconds=_cpu_seconds() - started,
    )


def machine(device: torch.device) -> str:
    """Describe the environment that a result depends on."""
    versions = f"ckptavg {version('ckptavg')}, torch {torch.__version__}, Python {platform.python_version()}"
    chip = f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
    return f"{versions}, {platform.system()} on {platform.machine()} with {os.cpu_count()} processors{chip}"


def train_cell(cell: Cell, plan: Plan, root: Path) -> Trained:
    """Train the job of a cell into ``root``, and write its task file there."""
    kind = domain(cell.domain)
    try:
        job = kind.job(cell.seed, cell.data)
    except (ValueError, OSError) as error:  # data that are missing, or the user's
        raise UsageError(str(error)) from error
    every = max(1, round(plan.every * kind.every))
    training = Training(
        folder=root / "ckpts",
        steps=plan.checkpoints * every,
        every=every,
        schedule=cell.schedule,
        seed=cell.seed,
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
    )
    write_task(root / "study_task.py", cell.domain, cell.seed, cell.data)
    started = time.perf_counter()
    peers = {}
    if job.run is None:
        train(job, training)
    else:
        peers = job.run(training)
    return Trained(
        job=job,
        folder=training.folder,
        task=root / "study_task.py",
        seed=cell.seed,
        device=training.device,
        every=every,
        peers=peers,
        seconds=time.perf_counter() - started,
    )


def _contest(trained: Trained, specs: Sequence[str], window: Window) -> dict[str, StrategyResult]:
    """Return specification → the result of ckptavg."""
    comparison = ckptavg.compare(
        trained.folder,
        strategies=specs,
        task=trained.task,
        output=trained.folder.parent / "winner.safetensors",
        force=True,
        seed=trained.seed,
        device=str(trained.device),
        last=window.last,
        stop=window.stop,
    )
    found = {contestant.name: contestant for contestant in comparison.strategies}
    return found | {PICK: found[comparison.winner]}


def _early(trained: Trained, plan: Plan) -> list[Row]:
    """Return the strategies on the first 60 % of a training."""
    if not plan.early_strategies:
        return []
    window = Window(stop=plan.early * trained.every, last=plan.last)
    found = _contest(trained, available(list(plan.early_strategies.values())), window)
    with trained.mixture(window) as mixture:
        return [
            _row(mixture, trained, label, spec, found[spec])
            for label, spec in plan.early_strategies.items()
            if spec in found
        ]


def _row(mixture: Mixture, trained: Trained, label: str, spec: str, contestant: StrategyResult) -> Row:
    row = tuple(c for c in contestant.coefficients if isinstance(c, float))
    assert len(row) == mixture.n, "no strategy of the study is layer-wise"
    coefficients = Coefficients((row,), linear=contestant.settings.get("constraint") == "linear")
    val, test = contestant.scores["val"], contestant.scores["test"]
    assert val.loss is not None and test.loss is not None
    job = trained.job
    figure, also = (test.value, {}) if job.figure is None else figures(mixture, job, coefficients)
    epochs = contestant.cost.epochs
    return Row(
        label=label,
        spec=spec,
        val_loss=val.loss,
        test_loss=test.loss,
        figure=figure,
        also=also,
        epochs=None if epochs is None else epochs * trained.share,
        seconds=contestant.cost.seconds,
        **shape(coefficients),
    )


def _peer(trained: Trained, label: str, path: Path) -> Row:
    """Return the row of an average that another tool made during the training."""
    job = trained.job
    model = job.model().to(trained.device).eval()
    model.load_state_dict(torch.load(path, map_location=trained.device))
    with torch.no_grad():
        val, test = (
            float(torch.cat([job.loss(model, to_device(batch, trained.device)) for batch in part]).double().mean())
            for part in (job.val, job.test)
        )
    assert job.figure is not None, "a domain with averages of other tools has a figure"
    figure, also = split(job.figure(model))
    spec = "of another tool"
    return Row(label=label, spec=spec, used=None, val_loss=val, test_loss=test, figure=figure, also=also)


def _mean(label: str, rows: Sequence[Row]) -> Row:
    """Return the row of a random choice."""
    return Row(
        label=label,
        spec=f"the mean over {len(rows)} random subsets",
        used=rows[0].used,
        val_loss=fmean(row.val_loss for row in rows),
        test_loss=fmean(row.test_loss for row in rows),
        figure=fmean(row.figure for row in rows),
        also={name: fmean(row.also[name] for row in rows) for name in rows[0].also},
    )


def _best(mixture: Mixture, job: Job, subsets: Subsets) -> Row:
    """Return the row of the best choice by validation loss."""
    best = min(subsets.losses, key=subsets.losses.__getitem__)
    row = row_of(mixture, job, "best subset", "all subsets scored", Coefficients.uniform(best, mixture.n))
    return replace(row, rank=1, epochs=subsets.epochs, seconds=subsets.seconds)


def _cpu_seconds() -> float:
    """Return the processor time of this process and of its children that have ended: some train a job."""
    return sum(os.times()[:4])


def _examples(batches: Any) -> int:
    return len(batches.dataset)
