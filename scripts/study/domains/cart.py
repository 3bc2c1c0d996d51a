"""Gymnasium's cart and pole: starts, expert, returns and demonstrations, for many episodes at once.

Shape suffixes: B = episodes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final, TypeAlias

import gymnasium
import torch
from torch import Tensor

START: Final = torch.tensor([1.5, 1.0, 0.15, 1.0])  # half-widths of the box of starts
EXPERT: Final = torch.tensor([0.3, 0.6, 5.0, 1.5])
Policy: TypeAlias = Callable[[Tensor], Tensor]
"""From states [B, 4] (the cart's place and speed, the pole's angle and its rate) to pushes [B], 1 to the right."""


def starts(count: int, random: torch.Generator) -> Tensor:
    """Return [count, 4] starts, uniform in a box far wider than Gymnasium's, where even the expert sometimes fails."""
    return (2 * torch.rand(count, 4, generator=random) - 1) * START


def expert(state_B4: Tensor) -> Tensor:
    """Return 1 where a linear controller pushes to the right."""
    return (state_B4 @ EXPERT > 0).float()


def returns(policy: Policy, state_B4: Tensor, limit: int) -> Tensor:
    """Return [B], the return of each episode under a policy: the number of steps it lasts, at most ``limit``."""
    return torch.stack([alive_B for _, _, alive_B in _episodes(policy, state_B4, limit)]).float().sum(dim=0)


def demonstrations(count: int, limit: int, noise: float, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return states [·, 4] and labels [·] of ``count`` expert episodes, with a fraction ``noise`` of random pushes."""

    def noisy(state_B4: Tensor) -> Tensor:
        random_B = (torch.rand(count, generator=random) < 0.5).float()
        return torch.where(torch.rand(count, generator=random) < noise, random_B, expert(state_B4))

    seen = [(states[alive], pushes[alive]) for states, pushes, alive in _episodes(noisy, starts(count, random), limit)]
    states, pushes = zip(*seen, strict=True)
    return torch.cat(states), torch.cat(pushes).long()


def _episodes(policy: Policy, state_B4: Tensor, limit: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield states, pushes and a mask of the running episodes, step by step until all have ended."""
    env: Any = gymnasium.make_vec("CartPole-v1", len(state_B4), vectorization_mode="vector_entry_point").unwrapped
    env.reset(seed=0)
    env.state = state_B4.T.double().numpy()
    alive_B = torch.ones(len(state_B4), dtype=torch.bool)
    for _ in range(limit):
        push_B = policy(state_B4)
        yield state_B4, push_B, alive_B
        observed, _, terminated, _, _ = env.step(push_B.long().numpy())
        state_B4 = torch.from_numpy(observed)
        alive_B = alive_B & ~torch.from_numpy(terminated)
        if not alive_B.any():
            return
