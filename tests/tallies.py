"""Counts of all workers, printed under a heading at the end: number of attempts and their outcomes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import properties
import pytest

_TALLIES = pytest.StashKey[dict[str, Counter[str]]]()


def tallied(config: pytest.Config, heading: str) -> Counter[str]:
    """Return the counts under ``heading``, to add to."""
    return config.stash.setdefault(_TALLIES, {}).setdefault(heading, Counter())


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Send the counts of a pytest-xdist worker to the controller."""
    if properties.TRIED:
        tallied(session.config, "property tests").update(properties.TRIED)
    told: Any = getattr(session.config, "workeroutput", None)
    if told is not None:
        told["tallies"] = {heading: dict(counts) for heading, counts in session.config.stash.get(_TALLIES, {}).items()}


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Add the counts received from a worker."""
    for heading, counts in getattr(node, "workeroutput", {}).get("tallies", {}).items():
        for name, count in counts.items():  # keep counts that are 0 as well
            tallied(node.config, heading)[name] += count


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the counts."""
    for heading, counts in config.stash.get(_TALLIES, {}).items():
        terminalreporter.section(heading)
        terminalreporter.line(", ".join(f"{name} {count}" for name, count in counts.items()))
