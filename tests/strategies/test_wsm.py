"""WSM against the figures of its definition and against a training with a decayed learning rate."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import ckptavg
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


@pytest.mark.parametrize(
    ("rates", "says"), [((3e-4, 3e-4), False), ((3e-4, 1e-4), True), ((1e-4, 3e-4), False), ((), False)]
)
def test_a_learning_rate_that_fell_by_the_trainers_log_is_said(tmp_path: Path, rates: tuple[float, ...], says: bool):
    for step in (10, 20):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        save_file({"w": torch.full((2,), float(step))}, folder / "model.safetensors")
        (folder / "config.json").write_text("{}")
        log = [{"step": s, "learning_rate": rate} for s, rate in zip((10, 15), rates, strict=False) if s <= step]
        state = {"global_step": step, "log_history": [*log, {"step": step, "loss": 1.0}, {"learning_rate": "x"}]}
        (folder / "trainer_state.json").write_text(json.dumps(state))
    for strategy in ("wsm", "swa"):
        warnings = ckptavg.run(tmp_path, strategy, output=tmp_path / strategy).warnings
        fell = "the learning rate fell from 0.0003 at step 10 to 0.0001 at step 20, and wsm decays it a second time"
        assert any(fell in warning for warning in warnings) == (says and strategy == "wsm")
    done = ckptavg.compare(tmp_path, "swa,wsm", score_cmd="echo 1 #", output=tmp_path / "x")
    noted = [row.name for row in done.strategies if any(fell in note for note in row.notes)]
    assert done.winner == "last" and noted == ["wsm"] * says
