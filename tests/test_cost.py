"""Every account is charged as if it had started with an empty cache."""

from __future__ import annotations

import pytest

from ckptavg.cost import SECONDS, CostMeter


def scored(meter: CostMeter, key: str, cached: set[str]) -> None:
    if key in cached:
        meter.charge(key)
        return
    cached.add(key)
    with meter.pricing(key):
        meter.count("forward", 10)
        meter.count("forward", 5)


def test_a_cached_score_is_charged_once_per_account():
    meter, cached = CostMeter(), set[str]()
    meter.count("forward", 1)
    for _ in range(3):
        meter.restart()
        for key in ("a", "b", "a", "a"):
            scored(meter, key, cached)
        assert meter["forward_batches"] == 4 and meter["forward_examples"] == 30 and meter["backward_batches"] == 0


def test_seconds_are_charged_like_batches(monkeypatch: pytest.MonkeyPatch):
    now = 100.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    meter = CostMeter()
    with meter.pricing("a"):
        now += 7
    assert meter[SECONDS] == 7
    meter.restart()
    now += 1
    meter.charge("a")
    assert meter[SECONDS] == 8
