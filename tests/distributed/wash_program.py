"""Carry out WASH's and PAPA's steps on every rank, and write what each rank has before and after."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

import torch
import wash
from member import DIGITS, Member, join

DIMENSION = 5000
DEFAULTS = {
    "task": DIGITS, "own_start": False, "seed": 0, "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "alpha": 0.99,
    "shuffle_momentum": True, "p": 0.5, "rule": "wash", "steps": 1,
}  # fmt: skip
TRAININGS = {
    "none, 5 steps": {"rule": "none", "steps": 5},
    "p = 0, 5 steps": {"p": 0.0, "steps": 5},
    "none": {"rule": "none"},
    "shuffled": {},
    "weights only": {"shuffle_momentum": False},
}


def main(folder: Path) -> None:
    rank, members, device = join()
    random = torch.Generator().manual_seed(1 + rank)
    weights_D = torch.randn(DIMENSION, generator=random)
    before_SD = torch.stack([weights_D, 2 * weights_D])  # so that the momentum tells where it came from
    after_SD = before_SD.clone()
    drawn = wash.draw(torch.linspace(1, 0, DIMENSION), members, torch.Generator().manual_seed(0))
    wash.exchange(after_SD, *drawn, rank)
    pulled_D = weights_D.clone()
    wash.pull(pulled_D, 0.25)
    trained = {}
    for name, options in TRAININGS.items():
        settings = Namespace(**DEFAULTS | options)
        member = Member(settings, rank, device)
        wash.train(settings, member, rank, members)
        trained[name] = member.state_2D
    stored = {"before": before_SD, "after": after_SD, "drawn": drawn, "pulled": pulled_D, "trained": trained}
    torch.save(stored, folder / f"{rank}.pt")


main(Path(sys.argv[1]))
