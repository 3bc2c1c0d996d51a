"""Behaviour cloning of Gymnasium's scripted experts, whose actions are noisy: a lunar lander, and a walker on two legs.

Shape suffixes: B = episodes, R = running episodes, S = what a policy sees, A = actions.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, Protocol, TypeAlias

import numpy as np
import torch
from gymnasium.error import DependencyNotInstalled
from numpy.typing import NDArray
from torch import Tensor, nn

from study.job import Batches, Domain, Job, cross_entropy

CHANCE: Final = 0.3  # of a random action of the lander
TREMOR: Final = 0.05  # standard deviation of the noise of the walker's actions, which are in [-1, 1]
Array: TypeAlias = NDArray[Any]


class Expert(Protocol):
    """Controller of one episode."""

    def see(self, state: Array) -> Array:
        """Take in the next state and return what a policy sees: the state, and the expert's memory if it has one."""
        ...

    def action(self) -> Any:
        """Return the expert's action in that state."""
        ...


Act: TypeAlias = Callable[[Array, Sequence[Expert]], Array]
"""From what is seen [R, S], and the experts of these episodes, to actions [R] or [R, A]."""


@dataclass(frozen=True, kw_only=True)
class Body:
    """What is controlled.

    Attributes:
        make: makes an environment.
        expert: makes the expert of an episode in an environment.
        noisy: adds noise to actions.
        chosen: from a network's outputs [R, ·] to actions.
        loss: one value per example.
        sizes: of the network's layers, S first.
        rate: of learning.
        batch: examples of a training batch.
        demonstrations: episodes of the expert to train on, to validate and to test on.
        limit: steps of an episode at most.
        episodes: episodes whose mean return is the test figure.
    """

    make: Callable[[], Any]
    expert: Callable[[Any], Expert]
    noisy: Callable[[Array, np.random.Generator], Array]
    chosen: Callable[[Tensor], Tensor]
    loss: Callable[[nn.Module, Any], Tensor]
    sizes: tuple[int, ...]
    rate: float
    batch: int
    demonstrations: tuple[int, int, int]
    limit: int
    episodes: int


def played(body: Body, seeds: Sequence[int], act: Act) -> tuple[Array, Array, Array]:
    """Play the episodes that start from ``seeds``, all at once; return what was seen, the actions, and returns [B]."""
    envs = [body.make() for _ in seeds]
    experts = [body.expert(env) for env in envs]
    states = [env.reset(seed=seed)[0] for env, seed in zip(envs, seeds, strict=True)]
    running, returns_B = list(range(len(seeds))), np.zeros(len(seeds))
    seen: list[Array] = []
    done: list[Array] = []
    for _ in range(body.limit):
        seen.append(np.stack([experts[i].see(states[i]) for i in running]))
        done.append(act(seen[-1], [experts[i] for i in running]))
        ended: set[int] = set()
        for i, action in zip(running, done[-1], strict=True):
            states[i], reward, over, _, _ = envs[i].step(action)
            returns_B[i] += reward
            if over:
                ended.add(i)
        running = [i for i in running if i not in ended]
        if not running:
            break
    return np.concatenate(seen), np.concatenate(done), returns_B


def mean_return(body: Body, seeds: Sequence[int], model: nn.Module) -> float:
    device = next(model.parameters()).device

    def act(seen_RS: Array, _: Sequence[Expert]) -> Array:
        return body.chosen(model(torch.from_numpy(seen_RS).to(device))).cpu().numpy()

    with torch.no_grad():
        return float(played(body, seeds, act)[2].mean())


@lru_cache(maxsize=1)
def demonstrated(name: str, seed: int) -> tuple[list[tuple[Tensor, Tensor]], list[int]]:
    """Return what is seen and done in the episodes to train, validate and test on, and the seeds of those to play."""
    body, random = BODIES[name], np.random.default_rng(seed)

    def act(_: Array, experts: Sequence[Expert]) -> Array:
        return body.noisy(np.stack([expert.action() for expert in experts]), random)

    parts: list[tuple[Tensor, Tensor]] = []
    for count in body.demonstrations:
        seen, done, _ = played(body, random.integers(2**31, size=count).tolist(), act)
        parts.append((torch.from_numpy(seen), torch.from_numpy(done)))
    return parts, random.integers(2**31, size=body.episodes).tolist()


def model(sizes: Sequence[int]) -> nn.Module:
    layers = [nn.Linear(before, after) for before, after in pairwise(sizes)]
    return nn.Sequential(*(part for layer in layers[:-1] for part in (layer, nn.Tanh())), layers[-1])


def likelihood(model: nn.Module, batch: list[Tensor]) -> Tensor:
    """Return the negative log-likelihood of each example's actions under the walker's noise, but for a constant."""
    seen, actions = batch
    return ((model(seen) - actions) / TREMOR).square().sum(dim=-1) / 2


def optimizer(rate: float, model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=rate)


def job(name: str, seed: int, _: Path | None) -> Job:
    body = BODIES[name]
    (train, val, test), seeds = demonstrated(name, seed)
    return Job(
        model=partial(model, body.sizes),
        loss=body.loss,
        train=Batches(*train, size=body.batch, shuffle=True),
        val=Batches(*val, size=500),
        test=Batches(*test, size=500),
        optimizer=partial(optimizer, body.rate),
        figure=partial(mean_return, body, seeds),
    )


def _box2d(name: str) -> Any:
    """Import a module of Gymnasium's environments that need Box2D."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # SWIG's; Box2D crashes where they are errors
            return importlib.import_module(f"gymnasium.envs.box2d.{name}")
    except (ImportError, DependencyNotInstalled) as error:
        raise ValueError(f"{name}: needs box2d and pygame-ce (pip install 'ckptavg[study]'): {error}") from error


class Pilot:
    """Gymnasium's heuristic for the lunar lander."""

    def __init__(self, env: Any) -> None:
        self._env = env
        self._heuristic = _box2d("lunar_lander").heuristic
        self._state: Array = np.zeros(8)

    def see(self, state: Array) -> Array:
        self._state = state
        return state

    def action(self) -> int:
        return self._heuristic(self._env, self._state)


class Strider:
    """Gymnasium's heuristic for the bipedal walker; it counts the phases of a stride, which the policy sees too."""

    def __init__(self, _: Any) -> None:
        self._heuristic = _box2d("bipedal_walker").BipedalWalkerHeuristics()
        self._action: Array = np.zeros(4)

    def see(self, state: Array) -> Array:
        self._action = self._heuristic.step_heuristic(state)
        memory = np.zeros(7, dtype=np.float32)
        memory[3 * self._heuristic.moving_leg + self._heuristic.state - 1] = 1
        memory[6] = self._heuristic.supporting_knee_angle
        return np.concatenate([state, memory])

    def action(self) -> Array:
        return self._action


def _random_engines(actions_R: Array, random: np.random.Generator) -> Array:
    """Replace a share CHANCE of the actions by random ones."""
    count = len(actions_R)
    return np.where(random.random(count) < CHANCE, random.integers(4, size=count), actions_R)


def _shaky(actions_RA: Array, random: np.random.Generator) -> Array:
    """Add normal noise of standard deviation TREMOR."""
    return np.clip(actions_RA + TREMOR * random.standard_normal(actions_RA.shape), -1, 1).astype(np.float32)


BODIES: Final[Mapping[str, Body]] = {
    "lander": Body(
        make=lambda: _box2d("lunar_lander").LunarLander(),
        expert=Pilot,
        noisy=_random_engines,
        chosen=lambda logits: logits.argmax(dim=-1),
        loss=cross_entropy,
        sizes=(8, 64, 64, 4),
        rate=1e-2,
        batch=64,
        demonstrations=(100, 30, 40),
        limit=1000,
        episodes=100,
    ),
    "walker": Body(
        make=lambda: _box2d("bipedal_walker").BipedalWalker(),
        expert=Strider,
        noisy=_shaky,
        chosen=lambda actions: actions.clamp(-1, 1),
        loss=likelihood,
        sizes=(31, 64, 64, 4),
        rate=5e-3,
        batch=128,
        demonstrations=(50, 25, 25),
        limit=400,
        episodes=50,
    ),
}

SIZES: Final = {
    "checkpoints": 80,
    "last": 40,
    "k": 10,
    "ks": (5, 10, 20),
    "random": 5,
    "singles": 8,
    "exhaustive": False,
    "variants": False,
    "with_early": False,
}

DOMAIN: Final = {
    "lander": Domain(
        title="Behaviour cloning: lunar lander",
        area="Behaviour cloning",
        about=(
            "100 episodes of Gymnasium's scripted expert for LunarLander-v3, three in ten of whose actions are "
            "random; a network of two hidden layers, Adam, 6,000 steps, whose rate was chosen on seed 0. Strategies "
            "see only the loss on held-out demonstrations; the test figure is the mean return of 100 episodes from "
            "unseen initial states (that of the expert without noise is 265, and 200 counts as solved)."
        ),
        figure="mean return",
        every=75,
        job=partial(job, "lander"),
        sizes=SIZES,
    ),
    "walker": Domain(
        title="Behaviour cloning: walker",
        area="Behaviour cloning",
        about=(
            "50 episodes of at most 400 steps of Gymnasium's scripted expert for BipedalWalker-v3, with noise in its "
            "four continuous actions, of which it falls in many; policies see the state and the phase of the expert's "
            "stride. A network of two hidden layers, squared error, Adam, 6,000 steps. The test figure is the mean "
            "return of 50 episodes of at most 400 steps from unseen initial states and terrains."
        ),
        figure="mean return",
        every=75,
        job=partial(job, "walker"),
        sizes={**SIZES, "random": 3, "singles": 5},
    ),
}
