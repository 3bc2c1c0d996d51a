"""Mixtures of few of many candidates, and means that differ from the last one in few, read those rows alone."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from stored import stored
from torch import Tensor, nn

from ckptavg.candidates import Candidates, loading, packed, plan, products
from ckptavg.candidates.dense import Dense
from ckptavg.candidates.packed import Packed
from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.errors import InputError

N = 40


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "INLINE", 7)
    monkeypatch.setitem(packed._DECODED, "cpu", 320)
    monkeypatch.setattr(plan, "BUFFER", 1)
    monkeypatch.setattr(plan, "LEAST", 16)


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 11), nn.BatchNorm1d(11), nn.Linear(11, 3)).to(dtype)


def states(dtype: torch.dtype = torch.float32, n: int = N) -> list[dict[str, Tensor]]:
    draws = torch.Generator().manual_seed(0)
    return [
        {
            name: (torch.rand(t.shape, generator=draws) + 0.5).to(t.dtype)
            for name, t in network(dtype).state_dict().items()
        }
        for _ in range(n)
    ]


def ignore(stage: str, done: int, total: int) -> None:
    """Progress callback that does nothing."""


def weights(one: Candidates) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in one.model.state_dict().items() if tensor.is_floating_point()}


def recorded(one: Candidates, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list to which the rows that are read from now on are added."""
    read: list[int] = []
    for kind in (Dense, Packed):

        def column_blocks(self: Any, *arguments: Any, real: Any = kind.column_blocks) -> Any:
            read.extend(range(N) if len(arguments) == 2 else ())
            return real(self, *arguments)

        def row_blocks(self: Any, rows: Sequence[int], *, real: Any = kind.row_blocks) -> Any:
            read.extend(rows)
            return real(self, rows)

        monkeypatch.setattr(kind, "column_blocks", column_blocks)
        monkeypatch.setattr(kind, "row_blocks", row_blocks)
    return read


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("bits", [32, 8, 4])
def test_a_mixture_reads_only_rows_with_a_coefficient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, layerwise: bool, bits: int
):
    one = Candidates(network(dtype), stored(tmp_path, states(dtype)), ignore, bits=bits, group_size=16)
    groups = one.blocks(None) if layerwise else (("",),)
    c_GN = torch.zeros(len(groups), N, dtype=torch.float64)
    for g in range(len(groups)):
        c_GN[g, 3 + g], c_GN[g, 37] = 1.5, -0.5
    chosen = c_GN.any(dim=0).nonzero()[:, 0].tolist()
    read = recorded(one, monkeypatch)
    one.materialize(c_GN, groups)
    assert read == chosen
    few = weights(one)
    many_GN = c_GN + 1e-300  # every row is used, and adds nothing
    one.materialize(many_GN / many_GN.sum(dim=1, keepdim=True), groups)
    assert len(read) == len(chosen) + N
    # rounding of sums of terms below 3 in float32, and of the weights to their dtype
    close = 8 * 3 * max(torch.finfo(dtype).eps, 2**-52 if dtype == torch.float64 and bits == 32 else 2**-23)
    for name, expected in weights(one).items():
        torch.testing.assert_close(few[name], expected, rtol=0, atol=close)


def test_a_mixture_of_nothing_is_zero(tmp_path: Path):
    one = Candidates(network(), stored(tmp_path, states()), ignore)
    one.materialize(torch.zeros(N))  # coefficients of any sum, for a linear model
    assert all(not tensor.any() for tensor in weights(one).values())


@pytest.mark.parametrize("bits", [32, 8])
def test_a_single_candidate_is_itself_to_the_last_bit(tmp_path: Path, bits: int):
    saved = states()
    one = Candidates(network(), stored(tmp_path, saved), ignore, bits=bits, group_size=16)
    one.materialize(torch.eye(N)[7])
    if bits == 32:
        assert all(torch.equal(tensor, saved[7][name]) for name, tensor in weights(one).items())
    before = weights(one)
    one.materialize(torch.eye(N, dtype=torch.float64)[7] + 1e-300)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(one).items())


def subsets() -> list[list[int]]:
    """Return subsets of which each differs from the last one by one candidate, but for some that share little."""
    draw = random.Random(0)
    order = draw.sample(range(N), N)
    grown = [sorted(order[:k]) for k in range(1, N)]
    swapped = [sorted({*range(35), i} - {i - 5}) for i in range(35, N)]
    return [subset for subset in [*grown, *swapped, *reversed(grown)] if len(subset) > plan.FEW_ROWS]


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_mean_of_many_reads_the_difference_and_has_the_same_bits_whatever_came_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: int, dtype: torch.dtype
):
    saved = states(dtype)
    files = stored(tmp_path, saved)
    one, fresh, unkept = (Candidates(network(dtype), files, ignore, bits=bits, group_size=16) for _ in range(3))
    rows: list[dict[str, Tensor]] = []
    for i in range(N):
        one.materialize(torch.eye(N, dtype=torch.float64)[i])
        rows.append(weights(one))
    assert one.average(subsets()[0])
    before = frozenset(subsets()[0])
    read = recorded(one, monkeypatch)
    for subset in subsets()[1:]:
        read.clear()
        assert one.average(subset)
        assert len(read) == min(len(before ^ {*subset}), len(subset))
        before = frozenset(subset)
        found = weights(one)
        assert fresh.average(subset)
        fresh._sums.clear()
        with monkeypatch.context() as patch:
            patch.setattr(plan, "free_memory", lambda device: 0)
            assert unkept.average(subset)
        for other in (fresh, unkept):
            assert all(torch.equal(tensor, found[name]) for name, tensor in weights(other).items())
        for name, tensor in found.items():
            for at, got in enumerate(tensor.flatten().tolist()):
                exact = sum((Fraction(rows[i][name].flatten()[at].item()) for i in subset), Fraction()) / len(subset)
                if bits == 32:  # one rounding, plus that of the terms, all below 2
                    bound = exact * Fraction(torch.finfo(dtype).eps / 2) + Fraction(2 * N, 2**49)
                else:  # rows are rounded once more as differences from the mean
                    bound = exact * Fraction(2 * torch.finfo(dtype).eps) + Fraction(2, 2**22)
                assert abs(Fraction(got) - exact) <= bound


def test_few_candidates_and_all_of_them_keep_no_running_sum(tmp_path: Path):
    one = Candidates(network(), stored(tmp_path, states()), ignore)
    for chosen in ([3], list(range(plan.FEW_ROWS)), list(range(N))):
        assert not one.average(chosen)
    assert not one._sums


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_are_read_in_parallel_into_the_matrix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype):
    """Two reads are in progress at once: each waits for the other."""
    saved, real = states(n=6), Checkpoint.read_into
    together, threads = threading.Barrier(2, timeout=60), set[int]()

    def read_into(self: Checkpoint, name: str, start: int, out: memoryview) -> None:
        if name == "0.weight" and self.step in (1, 2):
            together.wait()
        threads.add(threading.get_ident())
        real(self, name, start, out)

    files = stored(tmp_path, saved)
    monkeypatch.setattr(loading, "processors", lambda: 2)
    monkeypatch.setattr(Checkpoint, "read_into", read_into)
    one = Candidates(network(dtype), files, ignore)
    for i, state in enumerate(saved):
        one.materialize(torch.eye(6)[i])
        assert all(torch.equal(tensor, state[name].to(dtype)) for name, tensor in weights(one).items())


def test_the_first_bad_candidate_in_order_is_named_whichever_is_read_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    saved, real = states(n=6), loading.read_row
    for i in (2, 4):
        saved[i]["0.bias"][3] = torch.nan
    files, later = stored(tmp_path, saved), threading.Event()

    def read_row(checkpoint: Checkpoint, *rest: Any) -> Tensor:
        if checkpoint is files[2]:
            later.wait(60)
        try:
            return real(checkpoint, *rest)
        finally:
            if checkpoint is files[4]:
                later.set()

    monkeypatch.setattr(loading, "processors", lambda: 2)
    monkeypatch.setattr(loading, "read_row", read_row)
    with pytest.raises(InputError) as caught:
        Candidates(network(), files, ignore)
    assert str(files[2].path) in str(caught.value) and "0.bias" in str(caught.value)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("reading")]


def test_values_of_every_length_are_converted_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loading, "INLINE", 3)
    monkeypatch.setattr(loading, "_CHUNK", 4 * 7)
    saved = states(n=3)
    one = Candidates(network(torch.float64), stored(tmp_path, saved), ignore)
    for i in range(3):
        one.materialize(torch.eye(3, dtype=torch.float64)[i])
        assert all(torch.equal(tensor, saved[i][name].double()) for name, tensor in weights(one).items())
