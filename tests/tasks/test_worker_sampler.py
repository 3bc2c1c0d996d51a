"""Rank batches: interleaved over ranks, they equal the pass of a single process, whatever the loader draws."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from ckptavg.runtime.seeds import reseed
from ckptavg.tasks.python_file import PythonTask
from ckptavg.tasks.worker_sampler import rank_loader, without_distributed_sampler

SEED = 5


class Noisy(Dataset):
    """Dataset whose examples are drawn at random on every read."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> torch.Tensor:
        return torch.tensor([float(i), float(torch.rand(()))])


def single_process_pass(loader: DataLoader) -> list[Any]:
    """Read a loader as `ckptavg.batches.loader` does: the generators are reseeded before each batch."""
    source = iter_lazily(loader)

    def read(number: int) -> Any:
        reseed(SEED, number)
        return next(source, None)

    return [batch.tolist() for batch in itertools.takewhile(lambda one: one is not None, map(read, itertools.count()))]


def iter_lazily(loader: DataLoader) -> Iterator[Any]:
    yield from loader


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 30), st.integers(1, 7), st.integers(1, 4), st.booleans(), st.booleans())
def test_the_batches_of_all_ranks_form_the_pass(count: int, size: int, world: int, shuffle: bool, drop_last: bool):
    def loader() -> DataLoader:
        return DataLoader(Noisy(count), batch_size=size, shuffle=shuffle, drop_last=drop_last)

    whole = single_process_pass(loader())
    taken: list[list[Any]] = []
    for rank in range(world):
        reseed(SEED, 0)
        found = rank_loader(loader(), rank, world)
        assert found is not None
        own, sizes = found
        taken.append([(batch.tolist(), sizes.popleft()) for batch in own])
    turns = list(zip(*taken, strict=True))  # every rank has a batch in every turn
    assert all(sizes == turn[0][1] for turn in turns for _, sizes in turn)
    together = [batch for turn in turns for batch, _ in turn[: len(turn[0][1])]]
    assert together == whole and [len(batch) for batch in whole] == [size for turn in turns for size in turn[0][1]]


def test_an_iterable_dataset_has_no_rank_loader():
    class Stream(IterableDataset):
        def __iter__(self) -> Iterator[torch.Tensor]:
            yield torch.zeros(())

    assert rank_loader(DataLoader(Stream()), 0, 2) is None and rank_loader([1, 2], 0, 2) is None


def test_a_distributed_sampler_is_replaced_by_one_over_everything():
    dataset = Noisy(10)
    parts = [
        DataLoader(dataset, batch_size=2, sampler=DistributedSampler(dataset, 2, rank, shuffle=True, seed=4))
        for rank in range(2)
    ]
    seen = [sorted(int(row[0]) for batch in without_distributed_sampler(part) for row in batch) for part in parts]
    assert seen == [list(range(10))] * 2
    plain = DataLoader(dataset, batch_size=2)
    assert without_distributed_sampler(plain) is plain


@pytest.mark.parametrize("workers", [0, 1])
def test_a_task_file_provides_rank_batches(tmp_path: Path, workers: int):
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "def model(): ...\n"
        "def loss(model, batch): ...\n"
        "def val_dataloader():\n"
        f"    return torch.utils.data.DataLoader(torch.arange(10.), batch_size=3, num_workers={workers})\n"
    )
    task = PythonTask(str(tmp_path / "mine.py"))
    for _ in range(2):  # a second pass starts from the first batch
        found = task.turns("val", 1, 3)
        assert found is not None
        assert [(batch.tolist(), sizes) for batch, sizes in found] == [([3, 4, 5], [3, 3, 3]), ([9], [1])]
