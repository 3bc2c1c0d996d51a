"""The real data that `get_data.sh` has fetched."""

from __future__ import annotations

from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent.parent / "build" / "data"


def fetched(name: str) -> Path:
    """Return the folder of a data set.

    Raises:
        ValueError: if it was not fetched.
    """
    if not (ROOT / name).is_dir():
        raise ValueError(f"{ROOT / name}: is missing; run ./scripts/study/get_data.sh")
    return ROOT / name
