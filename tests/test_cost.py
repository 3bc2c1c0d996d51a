"""Every account is charged as if nothing had been remembered from before it."""

from __future__ import annotations

import pytest

from ckptavg.cost import SECONDS, CostMeter


def scored(meter: CostMeter, key: str, known: set[str]) -> None:
    if key in known:
        meter.charge(key)
        return
    known.add(key)
    with meter.pricing(key):
        meter.count("forward", 10)
        meter.count("forward", 5)


def test_what_is_remembered_costs_the_first_time_in_an_account():
    meter, known = CostMeter(), set[str]()
    meter.count("forward", 1)
    for _ in range(3):
        meter.restart()
        for key in ("a", "b", "a", "a"):
            scored(meter, key, known)
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
