"""Results of the recipes: lines of JSON, and the study's section on them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Final

from study.interval import Interval
from study.tables import NONE, table

NAME: Final = "recipes.jsonl"


@dataclass(frozen=True, kw_only=True)
class Result:
    """One average by a recipe.

    Attributes:
        part: table of the result.
        label: row of the result, or column.
        setting: values of the row where the label is a column.
        seed: seed of data, initial weights and orders.
        figures: name → test figure, a share for accuracy and F1.
        how: command, without paths and seed.
        cpu_seconds: CPU time of the training and of what its average took.
        machine: versions and processors.
    """

    part: str
    label: str
    seed: int
    figures: Mapping[str, float]
    how: str
    cpu_seconds: float
    machine: str
    setting: Sequence[str] = ()

    @property
    def cell(self) -> tuple[str, ...]:
        """Return the key under which a result is measured only once."""
        return self.part, self.label, str(self.seed), *self.setting


def append(path: Path, result: Result) -> None:
    """Append one line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(result), ensure_ascii=False) + "\n")


def read(path: Path) -> list[Result]:
    """Return the results of a file, in order; none if it does not exist."""
    stored = [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []
    return [replace(result, setting=tuple(result.setting)) for result in (Result(**each) for each in stored)]


WASH: Final = (
    "Three members on 6,000 images of Fashion-MNIST for 460 steps (10 epochs), from equal initial weights, each in its "
    "own order of the data; test accuracy in percent, means over {seeds} seeds. *Average* is the file that "
    "`ckptavg swa` writes, *members* the mean of their accuracies, *ensemble* the accuracy of their mean "
    "probabilities. p = 0.001 and α = 0.99 are for trainings of hundreds of epochs; beside them a stronger setting of "
    "each for this short one. Δ is paired by seed, with a 95 % t-interval, bold where it excludes zero."
)
IMWA: Final = (
    "The images and classes of [Fashion-MNIST, 1:100](#images-fashion-mnist-1100); M = 4 models of T = 460 steps; test "
    "macro-F1 in percent, means over {seeds} seeds. Every row costs M·T steps. *Members* are the models of the last "
    "episode: those of E = 1 are single trainings of T steps."
)
ACOWA: Final = (
    "SpamAssassin's mails as in [Sharded linear models](#sharded-linear-models), cut into p shards; test accuracy in "
    "percent ± its standard deviation over {seeds} seeds (and the mean number of nonzero weights). *Full L1* is one "
    "fit to all training mails, *naive mean* the uniform average of the shards' models. OWA and ACOWA end with "
    "`ckptavg twa --constraint linear --ridge auto` on a tenth of the training mails. Bold is the best of the three "
    "averages."
)


def section(results: Sequence[Result]) -> list[str]:
    """Return the parts of the study's section on the recipes; none without results."""
    if not results:
        return []
    machines = "; ".join(dict.fromkeys(result.machine for result in results))
    minutes = sum(result.cpu_seconds for result in results) / 60
    parts = [
        "## Ways of training whose end is an average",
        "    ./scripts/study/run.sh recipes",
        "The rest of this page averages the checkpoints of a training as it is; here the training is made for the "
        f"average, by the commands of [recipes.md](recipes.md). {minutes:.0f} minutes of CPU time; {machines}; one "
        f"thread per process. Raw results: `{NAME}` beside those of the strategies.",
    ]
    for title, text, make in (("WASH", WASH, _accuracy), ("IMWA", IMWA, _macro_f1), ("ACOWA", ACOWA, _shards)):
        if of_part := [result for result in results if result.part == title]:
            seeds = len({result.seed for result in of_part})
            parts += [f"### {title}", text.format(seeds=seeds), make(of_part)]
    return parts


def _accuracy(results: Sequence[Result]) -> str:
    return _members(results, "accuracy")


def _macro_f1(results: Sequence[Result]) -> str:
    return _members(results, "macro-F1")


def _members(results: Sequence[Result], figure: str) -> str:
    """Return the table of averages, members and ensembles, with differences paired by seed."""
    labels = list(dict.fromkeys(result.label for result in results))

    def of(label: str, which: str) -> dict[int, float]:
        rows = sorted((result for result in results if result.label == label), key=lambda result: result.seed)
        return {row.seed: 100 * row.figures[f"{figure} {which}"] for row in rows}

    def difference(left: Mapping[int, float], right: Mapping[int, float]) -> str:
        return format(Interval.of([left[seed] - right[seed] for seed in left if seed in right]), ".1f")

    head = ["", "average", "members", "ensemble", f"Δ average from *{labels[0]}*", "Δ average from ensemble"]
    rows = [
        [
            label,
            *(f"{fmean(of(label, which).values()):.1f}" for which in ("average", "members", "ensemble")),
            NONE if label == labels[0] else difference(of(label, "average"), of(labels[0], "average")),
            difference(of(label, "average"), of(label, "ensemble")),
        ]
        for label in labels
    ]
    return table(head, rows)


def _shards(results: Sequence[Result]) -> str:
    """Return the table of accuracies and nonzeros by number of shards and strength of the penalty."""
    names = list(dict.fromkeys(result.label for result in results))
    settings = sorted({tuple(result.setting) for result in results}, key=lambda s: (int(s[0]), -float(s[1])))
    rows: list[list[str]] = []
    for setting in settings:
        figures = {
            name: [one.figures for one in results if one.label == name and tuple(one.setting) == setting]
            for name in names
        }
        means = {name: fmean(each["accuracy"] for each in figures[name]) for name in names}
        best = max(means[name] for name in names[1:])
        cells = [_cell(figures[name], bold=name != names[0] and means[name] == best) for name in names]
        rows.append([*setting, *cells])
    return table(["p", "λ", *names], rows)


def _cell(figures: Sequence[Mapping[str, float]], *, bold: bool) -> str:
    accuracies = [100 * each["accuracy"] for each in figures]
    mean = f"{fmean(accuracies):.1f}"
    spread = f" ± {stdev(accuracies):.1f}" if len(accuracies) > 1 else ""
    return f"{f'**{mean}**' if bold else mean}{spread} ({fmean(each['nonzeros'] for each in figures):,.0f})"
