"""The cart and the pole: dynamics, expert and returns, many episodes at once.

Shape suffixes: B = episodes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

GRAVITY, CART, POLE, HALF_LENGTH, FORCE, SECONDS = 9.8, 1.0, 0.1, 0.5, 10.0, 0.02
EDGE, TILT = 2.4, 12 * torch.pi / 180  # m and rad, beyond which an episode is over
START: Final = torch.tensor([1.5, 1.0, 0.15, 1.0])  # the half-widths of where episodes start
EXPERT: Final = torch.tensor([0.3, 0.6, 5.0, 1.5])


def step(state_B4: Tensor, push_B: Tensor) -> Tensor:
    """The next state, 0.02 s later by Euler's method; push is 1 to the right, 0 to the left.

    A state is the cart's place and speed, and the pole's angle and its rate.

    References:
        Barto, Sutton and Anderson 1983, Neuronlike adaptive elements that can solve difficult learning control
        problems, IEEE Transactions on Systems, Man, and Cybernetics 13, the appendix; here without its friction.
    """
    _, v, angle, rate = state_B4.unbind(-1)
    mass, sin, cos = CART + POLE, angle.sin(), angle.cos()
    force = FORCE * (2 * push_B - 1)
    pushed = (force + POLE * HALF_LENGTH * rate.square() * sin) / mass
    spin = (GRAVITY * sin - cos * pushed) / (HALF_LENGTH * (4 / 3 - POLE * cos.square() / mass))
    speed_up = pushed - POLE * HALF_LENGTH * spin * cos / mass
    return state_B4 + SECONDS * torch.stack([v, speed_up, rate, spin], dim=-1)


def fallen(state_B4: Tensor) -> Tensor:
    return (state_B4[..., 0].abs() > EDGE) | (state_B4[..., 2].abs() > TILT)


def starts(count: int, random: torch.Generator) -> Tensor:
    """[count, 4], uniform in a box far wider than the usual one, from which even the expert does not always save it."""
    return (2 * torch.rand(count, 4, generator=random) - 1) * START


def expert(state_B4: Tensor) -> Tensor:
    """1 where a linear controller pushes to the right."""
    return (state_B4 @ EXPERT > 0).float()


def returns(policy: Callable[[Tensor], Tensor], state_B4: Tensor, limit: int) -> Tensor:
    """[B], how many steps each episode lasts under a policy from states to pushes, at most ``limit``."""
    alive_B = ~fallen(state_B4)
    lasted_B = torch.zeros(len(state_B4))
    for _ in range(limit):
        if not alive_B.any():
            break
        state_B4 = step(state_B4, policy(state_B4))
        alive_B = alive_B & ~fallen(state_B4)
        lasted_B += alive_B
    return lasted_B


def demonstrations(count: int, limit: int, noise: float, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """States [·, 4] and labels [·] of ``count`` episodes of the expert, with a share ``noise`` of random pushes."""
    state_B4 = starts(count, random)
    alive_B = torch.ones(count, dtype=torch.bool)
    states: list[Tensor] = []
    pushes: list[Tensor] = []
    for _ in range(limit):
        random_B = (torch.rand(count, generator=random) < 0.5).float()
        push_B = torch.where(torch.rand(count, generator=random) < noise, random_B, expert(state_B4))
        states.append(state_B4[alive_B])
        pushes.append(push_B[alive_B])
        state_B4 = step(state_B4, push_B)
        alive_B = alive_B & ~fallen(state_B4)
    return torch.cat(states), torch.cat(pushes).long()
