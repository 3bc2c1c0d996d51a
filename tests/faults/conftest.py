"""The server of runs, and the counts that are printed at the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from faults import job
from faults.warm import Warm

COUNTS = pytest.StashKey[Counter[str]]()
ALWAYS = ("kills", "resumes", "lost or partial outputs", "evaluations repeated", "acknowledged records lost")


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    with Warm(tmp_path_factory.mktemp("said")) as server:
        yield server


@pytest.fixture(scope="session")
def ckpts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The candidates of `faults.job`."""
    folder = tmp_path_factory.mktemp("job") / "ckpts"
    job.train(folder)
    return folder


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Counter[str]:
    """Counts to print."""
    return request.config.stash.setdefault(COUNTS, Counter())


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print what was done to runs and what came of it."""
    found = config.stash.get(COUNTS, Counter[str]())
    if found:
        terminalreporter.section("faults")
        names = dict.fromkeys([*ALWAYS, *found])
        terminalreporter.line(", ".join(f"{name} {found[name]}" for name in names))
