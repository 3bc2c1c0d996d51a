"""Measure the recipes, ways of training whose end is an average: ``./scripts/study/run.sh recipes``.

Each training is a command of docs/recipes.md on the study's data. Results are lines of JSON, of which `study.report`
makes a section; those that are there are not measured again.
"""

from __future__ import annotations

import argparse
import itertools
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from recipes import acowa
from safetensors.torch import load_file
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor, nn

from study import report
from study.cell import machine
from study.domains import fashion
from study.domains.mails import mails
from study.job import SCRIPTS, Job
from study.recipe_results import NAME, Result, append, read
from study.run import RESULTS

SEEDS, SEEDS_ACOWA = 5, 3
STEPS, IMAGES = 460, 6000
MODELS = 4  # of IMWA
JOBS: Final = {
    "WASH": partial(fashion.job, data=None, sample=IMAGES),
    "IMWA": partial(fashion.job, data=None, sample=60_000, imbalance=fashion.IMBALANCE, held=0.2),
}
PARTS: Final = ("WASH", "IMWA", "ACOWA")
SHARDS, PENALTIES = (16, 64), (1e-2, 3e-3, 1e-3, 1e-4)
TASK: Final = '''"""The task of one training of the study's recipes."""

import sys

sys.path.insert(0, {scripts!r})
from study.recipes import JOBS

job = JOBS[{part!r}]({seed})
model = job.model


def forward(model, batch):
    return model(batch[0])


def loss(output, batch):
    return job.loss(lambda *_: output, batch)


def metric(output, batch):
    return job.metric(lambda *_: output, batch)


def train_dataloader():
    return job.sample


def val_dataloader():
    return job.val


def test_dataloader():
    return job.test
'''


@dataclass(frozen=True, kw_only=True)
class Training:
    """One row of a table: the recipe, its processes and its options."""

    part: str
    label: str
    processes: int
    options: str


def _imwa(label: str, models: int, episodes: int, steps: int = STEPS) -> Training:
    options = f"--models {models} --episodes {episodes} --steps {steps}"
    return Training(part="IMWA", label=label, processes=min(2, models), options=options)


def _wash(label: str, options: str) -> Training:
    return Training(part="WASH", label=label, processes=3, options=f"{options} --steps {STEPS}")


TRAININGS: Final = (
    _imwa("MWA (E = 1)", MODELS, 1),
    _imwa("IMWA, E = 4", MODELS, 4),
    _imwa("IMWA, E = 23", MODELS, 23),
    _imwa("one training of M·T steps", 1, 1, MODELS * STEPS),
    _wash("independent", "--rule none"),
    _wash("WASH, p = 0.001", "--rule wash"),
    _wash("WASH, p = 0.05", "--rule wash --p 0.05"),
    _wash("PAPA, α = 0.99", "--rule papa"),
    _wash("PAPA, α = 0.9", "--rule papa --alpha 0.9"),
)


class Ensemble(nn.Module):
    """The mean of the members' class probabilities."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([member(images).softmax(dim=1) for member in self.members]).mean(dim=0)


def trained(training: Training, seed: int) -> Result:
    """Run one training and measure its average, its members and their ensemble on the test images."""
    script = f"scripts/recipes/{training.part.lower()}.py"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as folder:
        task, out = Path(folder) / "task.py", Path(folder) / "out"
        task.write_text(TASK.format(scripts=str(SCRIPTS), part=training.part, seed=seed), encoding="utf-8")
        words = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={training.processes}", script]
        words += [*training.options.split(), "--seed", str(seed), "--task", str(task), "--out", str(out)]
        paths = os.pathsep.join([str(SCRIPTS), str(SCRIPTS.parent)])
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, *words], cwd=SCRIPTS.parent, env=environment, check=True, capture_output=True)
        figures = _figures(JOBS[training.part](seed), out)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Result(
        part=training.part,
        label=training.label,
        seed=seed,
        figures=figures,
        how=f"{script} {training.options}",
        cpu_seconds=after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        machine=machine(torch.device("cpu")),
    )


def _figures(job: Job, out: Path) -> dict[str, float]:
    def restored(path: Path) -> nn.Module:
        model = job.model()
        model.load_state_dict(load_file(path))
        return model.eval()

    last = max(out.glob("episode-*/"), key=lambda folder: int(folder.name.partition("-")[2]), default=out)
    members = [restored(path) for path in sorted(last.glob("*/step-*.safetensors"))]
    measure = partial(fashion.macro_f1, job.test)
    of_members = [measure(member) for member in members]
    measured = {"average": measure(restored(out / "averaged.safetensors")), "ensemble": measure(Ensemble(members))}
    measured["members"] = {name: sum(each[name] for each in of_members) / len(members) for name in of_members[0]}
    return {f"{name} {which}": value for which, values in measured.items() for name, value in values.items()}


def sharded(seed: int, shards: int, penalty: float) -> Iterator[Result]:
    """Measure the naive mean, OWA and ACOWA of the models of shards of SpamAssassin's mails, and one fit to all."""
    texts, y_B = _mails()
    groups, sample, test = acowa.split(len(y_B), shards, seed)
    terms = TfidfVectorizer(min_df=2).fit([texts[i] for i in np.concatenate(groups)])
    points = acowa.Points(terms.transform(texts), y_B, np.ones(len(y_B)))
    parts = [points.at(rows) for rows in groups]

    def result(label: str, started: float, w_D: Any) -> Result:
        right = np.sign(points.x_BD[test] @ w_D) == y_B[test]
        figures = {"accuracy": float(np.mean(right)), "nonzeros": float(np.count_nonzero(w_D))}
        return Result(
            part="ACOWA",
            label=label,
            setting=(str(shards), f"{penalty:g}"),
            seed=seed,
            figures=figures,
            how=f"scripts/recipes/acowa.py on SpamAssassin: {shards} shards, λ = {penalty:g}",
            cpu_seconds=time.process_time() - started,
            machine=machine(torch.device("cpu")),
        )

    def combined(models_PD: Any) -> Any:
        used_D = np.flatnonzero(models_PD.any(axis=0))  # the other weights stay zero
        some, rest = (points.at(rows)._replace(x_BD=points.x_BD[rows][:, used_D]) for rows in (sample, test))
        with tempfile.TemporaryDirectory() as folder:
            acowa.combine(models_PD[:, used_D], some, rest, Path(folder))
            w_D = np.zeros(models_PD.shape[1])
            w_D[used_D] = load_file(Path(folder) / "averaged.safetensors")["weight"].numpy()[0]
        return w_D

    started = time.process_time()
    yield result("full L1", started, acowa.owa([points.at(np.concatenate(groups))], penalty)[0])
    started = time.process_time()
    alone_PD = acowa.owa(parts, penalty)
    yield result("naive mean", started, alone_PD.mean(axis=0))
    yield result("OWA", started, combined(alone_PD))
    started = time.process_time()
    yield result("ACOWA", started, combined(acowa.acowa(parts, penalty)))


@cache
def _mails() -> tuple[list[str], Any]:
    groups, texts = zip(*mails(), strict=True)
    return list(texts), np.where([group.startswith("spam") for group in groups], 1, -1)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="run.sh recipes", description=__doc__)
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated tables (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("build/study/full"), help="directory (%(default)s)")
    options = parser.parse_args(arguments)
    path, parts = options.out / NAME, options.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"no part {min(unknown)}: choose from {', '.join(PARTS)}")
    options.out.mkdir(parents=True, exist_ok=True)
    done = {result.cell for result in read(path)}
    for seed, training in itertools.product(range(SEEDS), TRAININGS):
        if training.part in parts and (training.part, training.label, str(seed)) not in done:
            keep(path, [trained(training, seed)])
    for seed, shards, penalty in itertools.product(range(SEEDS_ACOWA), SHARDS, PENALTIES):
        if "ACOWA" in parts and ("ACOWA", "ACOWA", str(seed), str(shards), f"{penalty:g}") not in done:
            keep(path, list(sharded(seed, shards, penalty)))
    report.write(options.out / RESULTS, options.out)
    print(options.out / report.NAME)


def keep(path: Path, results: Sequence[Result]) -> None:
    """Append results to a file, and print them."""
    for result in results:
        append(path, result)
        figures = ", ".join(f"{name} {value:.4g}" for name, value in result.figures.items())
        where = " ".join((*result.setting, f"seed {result.seed}"))
        print(f"{result.part}, {result.label}, {where}: {figures}; {result.cpu_seconds:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
