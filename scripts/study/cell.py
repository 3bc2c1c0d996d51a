"""Measure one cell of the study: train, run all strategies, score all subsets, repeat on the first 60 %."""

from __future__ import annotations

import math
import os
import platform
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Final

import torch

import ckptavg
from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.checkpoints.discover import discover
from ckptavg.checkpoints.window import Window
from ckptavg.coefficients import Coefficients
from ckptavg.context import Run
from ckptavg.errors import UsageError
from ckptavg.objective.mixture import Mixture
from ckptavg.report.result import StrategyResult
from ckptavg.tasks.python_file import PythonTask
from study.domains import domain
from study.job import Job, write_task
from study.plan import Plan, Schedule, available, digest
from study.record import Record, Row
from study.subsets import Subsets, drawn, enumerated, figure, row_of
from study.training import train

PICK: Final = "compare's pick"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A training and all of its measurements."""

    domain: str
    seed: int
    schedule: Schedule
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

    def mixture(self, checkpoints: Sequence[Checkpoint]) -> Mixture:
        """Open the objective of these candidates."""
        return Mixture(PythonTask(str(self.task)), checkpoints, Run(device=self.device, seed=self.seed))


def measure(cell: Cell, plan: Plan) -> Record:
    """Measure one training for the study."""
    started = time.process_time()
    specs = [*plan.strategies.values(), *plan.sweep.values()]
    with tempfile.TemporaryDirectory(prefix="ckptavg-study-") as root:
        trained, seconds = _train(cell, plan, Path(root))
        contestants = _contest(trained, available(specs), Window(last=plan.last))
        early_window = Window(stop=plan.early * trained.every, last=plan.last)
        early = _contest(trained, available(list(plan.early_strategies.values())), early_window)
        with discover([trained.folder], Window(last=plan.last)) as found:
            mixture = trained.mixture(found.checkpoints)
            subsets = enumerated(mixture, plan.k)
            rows = _rows(mixture, trained.job, contestants, plan.strategies, subsets, plan.k)
            sweep = [
                replace(_row(mixture, trained.job, kind, spec, contestants[spec]), used=k)
                for (kind, k), spec in plan.sweep.items()
            ]
            random = [
                row_of(mixture, trained.job, "", "", Coefficients.uniform(subset, plan.last))
                for subset in drawn(subsets, plan.random, cell.seed)
            ]
            singles = [
                row_of(mixture, trained.job, "", "", Coefficients.uniform([i], plan.last)) for i in range(plan.last)
            ]
            rows.append(replace(_row(mixture, trained.job, PICK, "of all of these", contestants[PICK]), seconds=None))
            rows += [_mean(f"random {plan.k}", random), _best(mixture, trained.job, subsets, plan)]
        with discover([trained.folder], early_window) as found:
            early_rows = _rows(trained.mixture(found.checkpoints), trained.job, early, plan.early_strategies)
    return Record(
        digest=digest(plan, cell.data),
        plan=plan.name,
        machine=machine(trained.device),
        domain=cell.domain,
        seed=cell.seed,
        schedule=cell.schedule,
        n=plan.last,
        k=plan.k,
        subsets=math.comb(plan.last, plan.k),
        epochs=plan.checkpoints * trained.every / len(trained.job.train),  # pyright: ignore[reportArgumentType]
        seconds=seconds,
        rows=rows,
        sweep=sweep,
        early=early_rows,
        points=[(row.val_loss, row.figure) for row in (*singles, *random)],
        skipped=[spec for spec in dict.fromkeys(specs) if spec not in contestants],
        cpu_seconds=time.process_time() - started,
    )


def machine(device: torch.device) -> str:
    """Describe the environment that a result depends on."""
    versions = f"ckptavg {version('ckptavg')}, torch {torch.__version__}, Python {platform.python_version()}"
    chip = f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
    return f"{versions}, {platform.system()} on {platform.machine()} with {os.cpu_count()} processors{chip}"


def _train(cell: Cell, plan: Plan, root: Path) -> tuple[Trained, float]:
    kind = domain(cell.domain)
    try:
        job = kind.job(cell.seed, cell.data)
    except (ValueError, OSError) as error:  # data of the user's
        raise UsageError(str(error)) from error
    trained = Trained(
        job=job,
        folder=root / "ckpts",
        task=root / "study_task.py",
        seed=cell.seed,
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        every=max(1, round(plan.every * kind.every)),
    )
    write_task(trained.task, cell.domain, cell.seed, cell.data)
    started = time.perf_counter()
    train(
        trained.job,
        trained.folder,
        steps=plan.checkpoints * trained.every,
        every=trained.every,
        schedule=cell.schedule,
        seed=cell.seed,
        device=trained.device,
    )
    return trained, time.perf_counter() - started


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


def _rows(
    mixture: Mixture,
    job: Job,
    contestants: Mapping[str, StrategyResult],
    strategies: Mapping[str, str],
    subsets: Subsets | None = None,
    k: int = 0,
) -> list[Row]:
    rows = [
        _row(mixture, job, label, spec, contestants[spec]) for label, spec in strategies.items() if spec in contestants
    ]
    return rows if subsets is None else [replace(row, rank=subsets.rank(row.coefficients, k)) for row in rows]


def _row(mixture: Mixture, job: Job, label: str, spec: str, contestant: StrategyResult) -> Row:
    row = tuple(c for c in contestant.coefficients if isinstance(c, float))
    assert len(row) == mixture.n, "no strategy of the study is layer-wise"
    val, test = contestant.scores["val"], contestant.scores["test"]
    assert val.loss is not None and test.loss is not None
    return Row(
        label=label,
        spec=spec,
        used=contestant.used,
        val_loss=val.loss,
        test_loss=test.loss,
        figure=test.value if job.figure is None else figure(mixture, job, Coefficients((row,))),
        epochs=contestant.cost.epochs,
        seconds=contestant.cost.seconds,
        coefficients=row,
    )


def _mean(label: str, rows: Sequence[Row]) -> Row:
    """Return the row of a random choice."""
    return Row(
        label=label,
        spec=f"the mean over {len(rows)} random subsets",
        used=rows[0].used,
        val_loss=fmean(row.val_loss for row in rows),
        test_loss=fmean(row.test_loss for row in rows),
        figure=fmean(row.figure for row in rows),
    )


def _best(mixture: Mixture, job: Job, subsets: Subsets, plan: Plan) -> Row:
    """Return the row of the best choice by validation loss."""
    best = min(subsets.losses, key=subsets.losses.__getitem__)
    row = row_of(mixture, job, "best subset", "all subsets scored", Coefficients.uniform(best, plan.last))
    return replace(row, rank=1, epochs=subsets.epochs, seconds=subsets.seconds)
