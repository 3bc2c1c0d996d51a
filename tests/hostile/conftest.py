"""Every case is run once, by workers, before the first test that asks; the counts are printed at the end."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hostile.corpus import corpus
from hostile.jail import counts, run_all

COUNTS = pytest.StashKey[dict[str, int]]()


@pytest.fixture(scope="session")
def base() -> Iterator[Path]:
    """A directory that every user may enter: some cases are run as nobody."""
    folder = Path(tempfile.mkdtemp(prefix="ckptavg-hostile-"))
    folder.chmod(0o711)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def answers(request: pytest.FixtureRequest, base: Path) -> dict[str, dict[str, Any]]:
    """Case → what came of it, for those that were asked for."""
    asked = [one for one in request.session.items if isinstance(one, pytest.Function) and "answers" in one.fixturenames]
    cases = [corpus()[str(one.callspec.params["name"])] for one in asked]
    found = run_all(cases, base)
    request.config.stash.setdefault(COUNTS, {}).update(counts(cases, found))
    return found


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> dict[str, int]:
    """Further counts to print."""
    return request.config.stash.setdefault(COUNTS, {})


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print what was tried and what came of it."""
    found = config.stash.get(COUNTS, {})
    if found:
        terminalreporter.section("hostile inputs")
        terminalreporter.line(", ".join(f"{name} {count}" for name, count in found.items()))
