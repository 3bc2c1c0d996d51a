"""A DataLoader that loads only this rank's batches: every ``world``-th."""

import itertools
from collections import deque
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, Sampler

from ckptavg.runtime.seeds import reseed

_SETTINGS: Final = (
    "num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context", "generator",
    "prefetch_factor", "persistent_workers",
)  # fmt: skip


class RankBatchSampler(Sampler[list[int]]):
    """Every ``world``-th batch of another batch sampler, starting with number ``rank``.

    In an incomplete last turn, ranks without a batch of their own get the last batch again. Random generators are
    reseeded before every batch but the first of the pass, exactly as a single process does before that batch.
    """

    def __init__(self, batches: Any, rank: int, world: int) -> None:
        self._batches = batches
        self._rank = rank
        self._world = world
        self.sizes: deque[list[int]] = deque()  # batch sizes of all ranks, for each turn that was drawn

    def __iter__(self) -> Iterator[list[int]]:
        batches, seed = iter(self._batches), torch.initial_seed()
        self.sizes.clear()
        for start in itertools.count(0, self._world):
            turn = [list(batch) for batch in itertools.islice(batches, self._world)]
            if not turn:
                return
            self.sizes.append([len(batch) for batch in turn])
            own = min(self._rank, len(turn) - 1)
            if start + own:
                reseed(seed, start + own)
            yield turn[own]


def rank_loader(loader: Any, rank: int, world: int) -> tuple[DataLoader[Any], deque[list[int]]] | None:
    """Return a loader of this rank's batches and its sizes; None unless it is a DataLoader of an indexed dataset."""
    if type(loader) is not DataLoader or loader.batch_sampler is None or isinstance(loader.dataset, IterableDataset):
        return None
    turns = RankBatchSampler(loader.batch_sampler, rank, world)
    return _with_batch_sampler(loader, turns), turns.sizes


def without_distributed_sampler(loader: Any) -> Any:
    """Replace a DistributedSampler by one over all data: ckptavg divides the batches among ranks itself."""
    if (
        type(loader) is not DataLoader
        or loader.batch_size is None
        or not isinstance(loader.sampler, DistributedSampler)
    ):
        return loader
    sampler = loader.sampler
    all_data: DistributedSampler[Any] = DistributedSampler(
        sampler.dataset, 1, 0, shuffle=sampler.shuffle, seed=sampler.seed, drop_last=sampler.drop_last
    )
    return _with_batch_sampler(loader, BatchSampler(all_data, loader.batch_size, loader.drop_last))


def _with_batch_sampler(loader: DataLoader[Any], batches: Any) -> DataLoader[Any]:
    settings: dict[str, Any] = {name: getattr(loader, name) for name in _SETTINGS}
    return DataLoader(loader.dataset, batch_sampler=batches, **settings)
