"""Run every case once, in workers, before the first test that uses it; print the counts at the end."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tallies import tallied

from hostile.corpus import corpus
from hostile.jail import counts, run_all

HEADING = "hostile inputs"


@pytest.fixture(scope="session")
def base() -> Iterator[Path]:
    """A directory that every user may enter: some cases run as nobody."""
    folder = Path(tempfile.mkdtemp(prefix="ckptavg-hostile-"))
    folder.chmod(0o711)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def answers(request: pytest.FixtureRequest, base: Path) -> dict[str, dict[str, Any]]:
    """Case → result, for the requested cases."""
    asked = [one for one in request.session.items if isinstance(one, pytest.Function) and "answers" in one.fixturenames]
    cases = [corpus()[str(one.callspec.params["name"])] for one in asked]
    found = run_all(cases, base)
    tallied(request.config, HEADING).update(counts(cases, found))
    return found


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Counter[str]:
    """Further counts for the summary."""
    return tallied(request.config, HEADING)
