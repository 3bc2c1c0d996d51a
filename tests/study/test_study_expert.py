"""Behaviour cloning of scripted experts: episodes, demonstrations and returns."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from study.domains import domain, expert

pytestmark = pytest.mark.skipif(importlib.util.find_spec("Box2D") is None, reason="Box2D is not installed")


def _silent(actions: Any, _: np.random.Generator) -> Any:
    return actions


def _clean(name: str) -> expert.Body:
    return replace(expert.BODIES[name], noisy=_silent)


def _advice(_: Any, experts: Any) -> Any:
    return np.stack([one.action() for one in experts])


@pytest.mark.parametrize(("name", "made"), [("lander", "LunarLander-v3"), ("walker", "BipedalWalker-v3")])
def test_returns_are_those_of_one_environment_alone(name: str, made: str):
    body, seeds = replace(_clean(name), limit=120), [5, 6, 7, 8]
    alone: list[float] = []
    body.make()  # imports Box2D without its warnings
    for seed in seeds:
        env: Any = gymnasium.make(made, max_episode_steps=120)  # Box2D repeats itself only in a new world
        state, _ = env.reset(seed=seed)
        control, over, total = body.expert(env.unwrapped), False, 0.0
        while not over:
            control.see(state)
            state, reward, ended, cut, _ = env.step(control.action())
            over, total = ended or cut, total + float(reward)
        alone.append(total)
    returns = expert.played(body, seeds, _advice)[2]
    assert returns.tolist() == pytest.approx(alone) and len(set(alone)) == 4


def test_an_episode_that_ended_is_not_played_further():
    def idle(seen: Any, _: Any) -> Any:
        return np.zeros(len(seen), dtype=int)

    body = expert.BODIES["lander"]
    seen, actions, returns = expert.played(body, [1, 2, 3], idle)
    alone = [expert.played(body, [seed], idle) for seed in (1, 2, 3)]
    assert len(seen) == len(actions) == sum(len(each) for each, _, _ in alone) < 3 * 200
    assert returns.tolist() == [float(total[0]) for _, _, total in alone]


def test_the_pilot_lands_and_three_in_ten_of_its_actions_are_random():
    body, seeds = replace(expert.BODIES["lander"], limit=400), list(range(8))
    assert expert.played(_clean("lander"), seeds, _advice)[2].mean() > 200
    random = np.random.default_rng(0)
    advice: list[Any] = []

    def noisy(seen: Any, experts: Any) -> Any:
        advice.append(_advice(seen, experts))
        return body.noisy(advice[-1], random)

    _, actions, _ = expert.played(body, seeds, noisy)
    # one in four random actions is the expert's: 1 − 0.3 + 0.3/4, ± 4 standard deviations of a thousand steps
    assert (actions == np.concatenate(advice)).mean() == pytest.approx(0.775, abs=0.053)


def test_the_walker_is_seen_with_the_phase_of_its_stride_and_its_actions_tremble():
    body, random = replace(expert.BODIES["walker"], limit=100), np.random.default_rng(0)
    advice: list[Any] = []

    def noisy(seen: Any, experts: Any) -> Any:
        advice.append(_advice(seen, experts))
        return body.noisy(advice[-1], random)

    seen, actions, _ = expert.played(body, [1, 2, 3, 4], noisy)
    phases = seen[:, 24:30]
    assert (phases.sum(axis=1) == 1).all() and (phases.sum(axis=0) > 0).sum() >= 4
    within = np.abs(np.concatenate(advice)) < 0.7  # not cut off at 1
    trembled = (actions - np.concatenate(advice))[within]
    assert trembled.std() == pytest.approx(expert.TREMOR, rel=0.1) and np.abs(actions).max() <= 1


@pytest.mark.parametrize("name", expert.DOMAIN)
def test_a_job_repeats_itself_and_its_parts_differ(name: str, monkeypatch: pytest.MonkeyPatch):
    small = replace(expert.BODIES[name], demonstrations=(3, 2, 2), limit=40, episodes=3)
    monkeypatch.setattr(expert, "BODIES", {name: small})
    expert.demonstrated.cache_clear()
    job = domain(name).job(0, None)
    first = [next(iter(part)) for part in (job.val, job.test)]
    torch.manual_seed(0)
    network = job.model()
    assert job.figure is not None
    figure = job.figure(network)
    losses = job.loss(network, first[0])
    assert losses.shape == (len(first[0][0]),) and losses.isfinite().all()
    expert.demonstrated.cache_clear()
    again = domain(name).job(0, None)
    for part, batch in zip((again.val, again.test), first, strict=True):
        assert all(map(torch.equal, next(iter(part)), batch))
    assert again.figure is not None and again.figure(network) == figure
    other = domain(name).job(1, None)
    assert other.figure is not None and other.figure(network) != figure
    states = [{tuple(row.tolist()) for row in batch[0]} for batch in first]
    assert not states[0] & states[1]
    expert.demonstrated.cache_clear()


def test_missing_packages_are_said(monkeypatch: pytest.MonkeyPatch):
    def missing(_: str) -> None:
        raise ModuleNotFoundError("No module named 'pygame'")

    job = domain("lander").job
    monkeypatch.setattr(expert.importlib, "import_module", missing)
    expert.demonstrated.cache_clear()
    with pytest.raises(ValueError, match=r"^lunar_lander: needs box2d [^\n]* No module named 'pygame'$"):
        job(0, None)
