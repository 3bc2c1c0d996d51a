"""Basins as `ckptavg inspect --basin` finds them, for tests of it."""

from pathlib import Path
from typing import Any

import ckptavg
from ckptavg.report.basin import Basins


def basins(*paths: Path, **options: Any) -> Basins:
    found = ckptavg.inspect(list(paths), basin=True, **options).basin
    assert found is not None
    return found


def barriers(found: Basins) -> list[tuple[int, int]]:
    return [midpoint.steps for midpoint in found.midpoints if midpoint.separates]


def numbers(found: Basins) -> list[int | None]:
    return [candidate.basin for candidate in found.candidates]
