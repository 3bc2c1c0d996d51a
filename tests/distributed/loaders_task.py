"""The MLP's task with unusual loaders: one with its own DistributedSampler, one of an IterableDataset."""

from __future__ import annotations

import os
from collections.abc import Iterator

from jobs.mlp import *  # noqa: F403
from jobs.mlp import train_dataloader as _train
from jobs.mlp import val_dataloader as _val
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        dataset = _val().dataset
        yield from (dataset[i] for i in range(101))


def val_dataloader() -> DataLoader:
    return DataLoader(Stream(), batch_size=20)


def train_dataloader() -> DataLoader:
    dataset = _train().dataset
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    sampler = DistributedSampler(dataset, num_replicas=world, rank=rank, shuffle=True, seed=3)
    return DataLoader(dataset, batch_size=32, sampler=sampler)
