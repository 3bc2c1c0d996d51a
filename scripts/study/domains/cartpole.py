"""Behaviour cloning: balance a pole on a cart by imitating a scripted expert with noisy actions."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from study.domains import cart
from study.job import Batches, Domain, Job, cross_entropy

NOISE, STEPS, EPISODES = 0.65, 50, 50
LIMIT = 500  # steps of a scored episode


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=1e-2)


def mean_return(starts: Tensor, model: nn.Module) -> float:
    device = next(model.parameters()).device

    def policy(states: Tensor) -> Tensor:
        return model(states.to(device)).argmax(dim=-1).to("cpu", torch.float32)

    with torch.no_grad():
        return float(cart.returns(policy, starts, LIMIT).mean())


def job(seed: int, _: Path | None) -> Job:
    random = torch.Generator().manual_seed(seed)
    train, val, test = (cart.demonstrations(count, STEPS, NOISE, random) for count in (15, 40, 40))
    return Job(
        model=model,
        loss=cross_entropy,
        train=Batches(*train, size=32, shuffle=True),
        val=Batches(*val, size=100),
        test=Batches(*test, size=100),
        optimizer=optimizer,
        figure=partial(mean_return, cart.starts(EPISODES, random)),
    )


DOMAIN = Domain(
    title="Behaviour cloning: cart and pole",
    about=(
        "15 short episodes of a scripted expert, two thirds of whose actions are random; a network of two hidden "
        "layers, Adam. Strategies see only the loss on held-out expert data; the test figure is the mean return (at "
        "most 500) of 50 episodes from unseen initial states."
    ),
    figure="mean return",
    every=40,
    job=job,
)
