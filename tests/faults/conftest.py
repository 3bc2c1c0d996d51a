"""The server of runs, and the counts printed at the end."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from tallies import tallied

from faults import job
from faults.warm import Warm

ALWAYS = ("kills", "resumes", "lost or partial outputs", "evaluations repeated", "acknowledged records lost")


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    with Warm(tmp_path_factory.mktemp("said")) as server:
        yield server


@pytest.fixture(scope="session")
def ckpts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the candidates of `faults.job`."""
    folder = tmp_path_factory.mktemp("job") / "ckpts"
    job.train(folder)
    for path in folder.iterdir():  # otherwise a warning would mention how many seconds ago they were written
        os.utime(path, (0, 0))
    return folder


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Counter[str]:
    """Counts for the summary."""
    found = tallied(request.config, "faults")
    found.update(dict.fromkeys(ALWAYS, 0))
    return found
