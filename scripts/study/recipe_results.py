"""Results of the recipes: lines of JSON, and the study's section on them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

NAME: Final = "recipes.jsonl"


@dataclass(frozen=True, kw_only=True)
class Result:
    """One training by a recipe.

    Attributes:
        part: table of the result.
        label: row of the result.
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


def append(path: Path, result: Result) -> None:
    """Append one line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(result), ensure_ascii=False) + "\n")


def read(path: Path) -> list[Result]:
    """Return the results of a file, in order; none if it does not exist."""
    return [Result(**json.loads(line)) for line in path.read_text("utf-8").splitlines()] if path.exists() else []
