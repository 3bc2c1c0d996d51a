"""Measurements are made once, charged on every request, and stored compactly; a new kind is one codec."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptavg.coefficients import Coefficients
from ckptavg.context import Run
from ckptavg.cost import CostMeter
from ckptavg.errors import TaskError
from ckptavg.journal import Journal
from ckptavg.objective.codecs import ScoreCodec
from ckptavg.objective.remembered import Remembered
from ckptavg.score import PerExample, Score

CPU = torch.device("cpu")


class Norms:
    """A kind of measurement that the package does not have."""

    def name(self, key: int) -> str:
        return f"norm {key}"

    def encode(self, key: int, value: float) -> Any:
        return None if value < 0 else value.hex()

    def decode(self, key: int, record: Any) -> float:
        return float.fromhex(record)


def opened(tmp_path: Path, *, resume: bool = True) -> Journal:
    journal = Journal(tmp_path / "out", resume=resume, keep=True)
    journal.begin({"run": 1})
    return journal


def test_a_new_kind_of_measurement_is_one_codec(tmp_path: Path):
    measured: list[int] = []

    def find(norms: Remembered[int, float], key: int, value: float) -> float:
        return norms.find(key, lambda: measured.append(key) or value)

    with opened(tmp_path) as journal:
        norms = Remembered(Norms(), Run(device=CPU, journal=journal), CostMeter())
        assert [find(norms, 1, 0.1 + 0.2), find(norms, 1, 9.0), find(norms, 2, -1.0)] == [0.1 + 0.2, 0.1 + 0.2, -1.0]
    with opened(tmp_path) as journal:
        norms = Remembered(Norms(), Run(device=CPU, journal=journal), CostMeter())
        assert find(norms, 1, 9.0) == 0.1 + 0.2 and norms.known(1) and not norms.known(2)
        assert find(norms, 2, -1.0) == -1.0  # could not be recorded
    assert measured == [1, 2, 2]


def test_every_search_is_charged_once_for_a_measurement_that_another_one_made():
    meter = CostMeter()
    norms = Remembered(Norms(), Run(device=CPU), meter)

    def measure() -> float:
        meter.count("forward", 10)
        return 1.0

    for _ in range(3):
        meter.restart()
        assert norms.find(5, measure) == norms.find(5, measure) == 1.0
        assert meter["forward_examples"] == 10


def score(seed: int, examples: int, order: int = 7) -> Score:
    """Return a score as a float32 model with a metric gives it."""
    draws = torch.Generator().manual_seed(seed)
    values_U = 1 / torch.randint(1, 12, (examples,), generator=draws).float()
    losses_U = torch.randn(examples, generator=draws).exp().double()
    each = PerExample(values_U=values_U.double(), examples_U=torch.ones(examples, dtype=torch.float64), order=order)
    loss = float(losses_U.mean())
    return Score(
        value=float(each.values_U.mean()), loss=loss, metric=0.1, examples=examples, per_example=each, loss_noise=0.3
    )


@pytest.mark.parametrize("has_metric", [True, False])
def test_scores_come_back_to_the_last_bit_and_take_little_room(tmp_path: Path, has_metric: bool):
    """53 MB became at most 8: 1,300 scores of 1,304 examples are what a comparison of 300 candidates records."""
    count, examples = 65, 1304
    codec = ScoreCodec(None)
    keys = [(Coefficients.uniform([i], count), "val", True) for i in range(count)]
    scores = [score(i, examples) for i in range(count)]
    if not has_metric:
        draws = torch.Generator().manual_seed(0)
        for one in scores:
            one.per_example.values_U.copy_(-torch.randn(examples, generator=draws).exp())
    with opened(tmp_path, resume=False) as journal:
        known = Remembered(codec, Run(device=CPU, journal=journal), CostMeter())
        for key, one in zip(keys, scores, strict=True):
            known.keep(key, one)
    path = tmp_path / "out.ckptavg" / "journal.jsonl"
    assert path.stat().st_size / count <= 8_000_000 / 1300
    assert all(isinstance(json.loads(line.partition(b" ")[2]), dict) for line in path.read_bytes().splitlines())
    with opened(tmp_path) as journal:
        known = Remembered(codec, Run(device=CPU, journal=journal), CostMeter())
        for key, one in zip(keys, scores, strict=True):
            back = known.find(key, lambda: pytest.fail("was measured again"))
            assert back == one and back.loss_noise == one.loss_noise
            for name in ("values_U", "examples_U"):
                assert torch.equal(getattr(back.per_example, name), getattr(one.per_example, name))
        with pytest.raises(TaskError, match="the data are not those that the interrupted run scored on"):
            known.keep((Coefficients.uniform([0, 1], count), "val", True), score(0, examples, order=8))
