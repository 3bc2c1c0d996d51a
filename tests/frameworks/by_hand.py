"""Averages as a careful user would compute them: float64, rounded once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def averaged_by_hand(states: Sequence[dict[str, Any]], row: Sequence[float] | None = None) -> dict[str, Tensor]:
    """Σ_i c_i w_i of the floating-point tensors (uniform by default), the others from the last state."""
    c = row or [1 / len(states)] * len(states)
    return {
        name: sum((a * state[name].double() for a, state in zip(c, states, strict=True)), torch.zeros(())).to(t.dtype)
        if t.is_floating_point()
        else t
        for name, t in states[-1].items()
        if isinstance(t, Tensor)
    }
