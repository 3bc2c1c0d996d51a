"""Behaviour cloning on D4RL's files: HDF5, or NPZ with the same names; needs a GPU in practice.

Shape suffixes: B = steps, S = state dimensions, A = action dimensions.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from study.job import Batches, Domain, Job

NEEDED: Final = ("observations", "actions")
ENDS: Final = ("terminals", "timeouts")
VAL, TEST = 0.05, 0.05  # fraction of the episodes
WIDTH: Final = 256


def read(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Read the arrays of one file.

    Raises:
        ValueError: if it is neither kind, cannot be read here, or lacks states or actions.
    """
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in (*NEEDED, *ENDS) if name in file}
    elif path.suffix in (".hdf5", ".h5"):
        try:
            import h5py
        except ImportError as error:
            raise ValueError(f"{path}: needs the package h5py (pip install h5py), or the same data as .npz") from error
        with h5py.File(path, "r") as file:
            found = {name: np.asarray(file[name]) for name in (*NEEDED, *ENDS) if name in file}
    else:
        raise ValueError(f"{path}: is neither .hdf5 nor .npz")
    missing = [name for name in NEEDED if name not in found]
    if missing:
        raise ValueError(f"{path}: has no {' and no '.join(missing)}")
    if len({len(array) for array in found.values()}) != 1:
        raise ValueError(f"{path}: its arrays differ in length")
    return found


def episodes(found: dict[str, np.ndarray[Any, Any]]) -> Tensor:
    """Return [B], the episode number of each step."""
    ends_B = np.zeros(len(found["actions"]), dtype=bool)
    for name in ENDS:
        if name in found:
            ends_B |= found[name].reshape(-1).astype(bool)
    return torch.from_numpy(np.concatenate([[0], np.cumsum(ends_B)[:-1]]))


def model(states: int, actions: int) -> nn.Module:
    hidden = [nn.Linear(states, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(WIDTH, actions), nn.Tanh())


def loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
    state_BS, action_BA = batch
    return (model(state_BS) - action_BA).square().mean(dim=1)


def job(seed: int, data: Path | None) -> Job:
    assert data is not None, "run.py has checked it"
    found = read(data)
    state_BS, action_BA = (torch.from_numpy(found[name]).float() for name in NEEDED)
    episode_B = episodes(found)
    count = int(episode_B[-1]) + 1
    if count < 3:
        raise ValueError(f"{data}: has {count} episodes; training, validation and test need one each")
    held, tested = (max(1, round(share * count)) for share in (VAL, TEST))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    kinds = order.split([count - held - tested, held, tested])
    parts = [torch.isin(episode_B, kind).nonzero().flatten() for kind in kinds]
    mean_S, spread_S = state_BS[parts[0]].mean(dim=0), state_BS[parts[0]].std(dim=0) + 1e-3
    state_BS = (state_BS - mean_S) / spread_S
    train, val, test = ((state_BS[part], action_BA[part]) for part in parts)
    return Job(
        model=partial(model, state_BS.shape[1], action_BA.shape[1]),
        loss=loss,
        train=Batches(*train, size=min(256, len(train[0])), shuffle=True),
        val=Batches(*val, size=1000),
        test=Batches(*test, size=1000),
        optimizer=lambda model: torch.optim.Adam(model.parameters(), lr=1e-3),
    )


DOMAIN = Domain(
    title="Behaviour cloning: D4RL",
    about=(
        "States and actions of a D4RL file, split by episode; a network of two hidden layers, Adam. There is no "
        "simulator here: the test figure is the negated loss on held-out episodes, not a return."
    ),
    figure="− test loss, squared",
    every=2000,
    job=job,
    needs_data=True,
)
