"""WSM against the figures of its definition and against a training with a decayed learning rate."""

from __future__ import annotations

import math

import pytest

from ckptavg.strategies.swa import SWA
from ckptavg.strategies.wsm import WSM


@pytest.mark.parametrize(
    ("decay", "n", "expected"),
    [
        ("sqrt", 5, [0.447, 0.185, 0.142, 0.120, 0.106]),
        ("sqrt", 12, [0.289, 0.120, 0.092, 0.077, 0.068, 0.062, 0.057, 0.053, 0.050, 0.047, 0.045, 0.043]),
        ("cosine", 5, [0.095, 0.250, 0.309, 0.250, 0.095]),
    ],
)
def test_the_coefficients_are_those_published(decay: str, n: int, expected: list[float]):
    (row,) = WSM(decay=decay).coefficients(n).values
    assert [round(c, 3) for c in row] == expected


def test_the_linear_decay_is_the_plain_mean_to_the_last_bit():
    assert all(WSM(decay="linear").coefficients(n) == SWA().coefficients(n) for n in range(1, 300))


@pytest.mark.parametrize("decay", ["sqrt", "cosine"])
def test_the_average_is_where_updates_of_decayed_size_would_have_led(decay: str):
    """θ_0 + Σ_i w_i (θ_i − θ_{i−1}), w_i = f(i/n), for updates of whole numbers."""
    updates = [3, -1, 4, 1, -5, 9, 2]
    n = len(updates) + 1
    weights = [1 - math.sqrt(i / n) if decay == "sqrt" else (1 + math.cos(math.pi * i / n)) / 2 for i in range(1, n)]
    candidates = [sum(updates[:i]) for i in range(n)]
    (row,) = WSM(decay=decay).coefficients(n).values
    average = math.fsum(c * w for c, w in zip(row, candidates, strict=True))
    assert average == pytest.approx(math.fsum(w * u for w, u in zip(weights, updates, strict=True)), abs=1e-13)
