"""Counts that are printed at the end under a heading: what was tried and what came of it, by all workers together."""

from __future__ import annotations

from collections import Counter
from typing import Any

import properties
import pytest

_TALLIES = pytest.StashKey[dict[str, Counter[str]]]()


def tallied(config: pytest.Config, heading: str) -> Counter[str]:
    """The counts under ``heading``, to add to."""
    return config.stash.setdefault(_TALLIES, {}).setdefault(heading, Counter())


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of pytest-xdist tells the one who prints."""
    if properties.TRIED:
        tallied(session.config, "property tests").update(properties.TRIED)
    told: Any = getattr(session.config, "workeroutput", None)
    if told is not None:
        told["tallies"] = {heading: dict(counts) for heading, counts in session.config.stash.get(_TALLIES, {}).items()}


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """What a worker has told."""
    for heading, counts in getattr(node, "workeroutput", {}).get("tallies", {}).items():
        for name, count in counts.items():  # also those that are 0
            tallied(node.config, heading)[name] += count


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print them."""
    for heading, counts in config.stash.get(_TALLIES, {}).items():
        terminalreporter.section(heading)
        terminalreporter.line(", ".join(f"{name} {count}" for name, count in counts.items()))
