"""A loader of which one worker reads only what is its own: every so-manyth batch, without loading the others'."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, Sampler

from ckptavg.runtime.seeds import reseed


class RankBatchSampler(Sampler[list[int]]):
    """Of another sampler's batches every ``world``-th from number ``rank`` on.

    At the end, where some workers have a batch and others have none, these get the last one too. Before each but the
    pass's first batch random numbers begin anew, as they do where a single process comes to that batch.

    Attributes:
        sizes: of the batches of all workers, for each turn that was drawn.
    """

    def __init__(self, batches: Any, rank: int, world: int) -> None:
        self._batches = batches
        self._rank = rank
        self._world = world
        self.sizes: deque[list[int]] = deque()

    def __iter__(self) -> Iterator[list[int]]:
        batches, seed = iter(self._batches), torch.initial_seed()
        self.sizes.clear()
        for start in itertools.count(0, self._world):
            turn = [list(batch) for batch in itertools.islice(batches, self._world)]
            if not turn:
                return
            self.sizes.append([len(batch) for batch in turn])
            mine = min(self._rank, len(turn) - 1)
            if start + mine:
                reseed(seed, start + mine)
            yield turn[mine]

    def __len__(self) -> int:
        return -(-len(self._batches) // self._world)


def rank_loader(loader: Any, rank: int, world: int) -> tuple[DataLoader[Any], deque[list[int]]] | None:
    """A loader of the worker's turns, and their sizes as they are drawn; None where ``loader`` has no indices."""
    if type(loader) is not DataLoader or loader.batch_sampler is None or isinstance(loader.dataset, IterableDataset):
        return None
    turns = RankBatchSampler(loader.batch_sampler, rank, world)
    return _like(loader, turns), turns.sizes


def without_distributed_sampler(loader: Any) -> Any:
    """``loader``, over all data where a DistributedSampler would give one worker a part: they are divided here."""
    if type(loader) is not DataLoader or loader.batch_size is None:
        return loader
    sampler = loader.sampler
    if not isinstance(sampler, DistributedSampler):
        return loader
    whole: DistributedSampler[Any] = DistributedSampler(
        sampler.dataset, 1, 0, shuffle=sampler.shuffle, seed=sampler.seed, drop_last=sampler.drop_last
    )
    return _like(loader, BatchSampler(whole, loader.batch_size, loader.drop_last))


def _like(loader: DataLoader[Any], batches: Any) -> DataLoader[Any]:
    """The same loader with another batch sampler."""
    return DataLoader(
        loader.dataset,
        batch_sampler=batches,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )
