"""Number of examples of property tests: in CI always the same ones; EXAMPLES=N draws new ones and N times as many.

``EXAMPLES=30 pytest tests/readers tests/hostile`` takes a night.
"""

from __future__ import annotations

import functools
import math
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

TIMES = float(os.environ.get("EXAMPLES", "1"))
TRIED: Counter[str] = Counter()


def kept(name: str, factory: pytest.TempPathFactory) -> Path:
    """Return a new directory; with FIXTURES set, a directory below it that may already be filled."""
    if "FIXTURES" not in os.environ:
        return factory.mktemp(name)
    folder = Path(os.environ["FIXTURES"]) / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def examples(count: int) -> Callable[[Any], Any]:
    """Decorator above ``@given``: try that many examples, and count them under "property tests" in pytest's summary."""

    def decorate(test: Any) -> Any:
        inner = test.hypothesis.inner_test

        @functools.wraps(inner)
        def counted(*args: Any, **kwargs: Any) -> Any:
            TRIED["examples"] += 1
            return inner(*args, **kwargs)

        test.hypothesis.inner_test = counted
        return settings(
            max_examples=math.ceil(count * TIMES), derandomize=TIMES <= 1, database=None, deadline=None,
            suppress_health_check=[*HealthCheck],
        )(test)  # fmt: skip

    return decorate
