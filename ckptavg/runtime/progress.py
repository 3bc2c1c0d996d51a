"""The progress callback that every long stage calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping

Watch = Callable[[str, int, int, Mapping[str, float]], None]
"""Progress callback ``(stage, done, total, metrics)``; ``total == 0`` prints a one-line message."""
