"""Sparse tensors of ``torch.save`` are read as the dense ones that they stand for, in every layout."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ckptavg.errors import InputError
from ckptavg.readers import ITEM_SIZE, StoredTensor, as_real, open_reader


def _dense(dtype: torch.dtype = torch.float32) -> Tensor:
    draws = torch.Generator().manual_seed(0)
    values, stored = torch.randn(6, 4, generator=draws), torch.rand(6, 4, generator=draws) < 0.4
    return torch.where(stored, values, 0.0).to(dtype)


def _uncoalesced() -> Tensor:
    return torch.sparse_coo_tensor(torch.tensor([[2, 0, 2], [1, 3, 1]]), torch.tensor([1.0, 2.0, 4.0]), (3, 4))


_TENSORS: dict[str, Callable[[], Tensor]] = {
    "coo": lambda: _dense().to_sparse(), "csr": lambda: _dense().to_sparse_csr(),
    "csc": lambda: _dense().to_sparse_csc(), "bsr": lambda: _dense().to_sparse_bsr((3, 2)),
    "bsc": lambda: _dense().to_sparse_bsc((2, 4)),
    "hybrid": lambda: _dense().to_sparse(1), "one dimension": lambda: _dense()[0].to_sparse(),
    "uncoalesced": _uncoalesced, "nothing stored": lambda: torch.zeros(3, 4).to_sparse(),
    "bfloat16": lambda: _dense(torch.bfloat16).to_sparse(), "int64": lambda: (_dense() * 9).long().to_sparse(),
    "bool": lambda: (_dense() > 0).to_sparse(), "complex": lambda: (_dense() * (1 + 2j)).to_sparse(),
    "empty": lambda: torch.zeros(0, 4).to_sparse(), "int32 indices": lambda: torch.sparse_csr_tensor(
        torch.tensor([0, 1, 1], dtype=torch.int32), torch.tensor([1], dtype=torch.int32), torch.ones(1), (2, 3)),
}  # fmt: skip


def _saved(path: Path, make: Callable[[], Tensor]) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, that these layouts are in beta
        tensor = make()
        torch.save({"adj": tensor, "w": torch.ones(2)}, path)
        return tensor.to_dense()


@pytest.mark.parametrize("name", _TENSORS)
def test_any_range_of_elements_is_that_of_the_dense_tensor(tmp_path: Path, name: str) -> None:
    dense = _saved(tmp_path / "x.pt", _TENSORS[name])
    reader = open_reader(tmp_path / "x.pt")
    node = reader.tree["adj"]
    assert isinstance(node, StoredTensor) and node.shape == tuple(dense.shape)
    tensor, expected = as_real(node), bytes(dense.contiguous().view(-1).view(torch.uint8).numpy())
    size = ITEM_SIZE[tensor.dtype]
    for start in range(tensor.numel + 1):
        for stop in range(start, tensor.numel + 1):
            out = bytearray((stop - start) * size)
            reader.read_into(tensor, start, memoryview(out))
            assert out == expected[start * size : stop * size]
    reader.close()


@pytest.mark.parametrize("index", [4, -1])
def test_an_index_outside_of_the_shape_is_refused(tmp_path: Path, index: int) -> None:
    bad = torch.sparse_coo_tensor(torch.tensor([[index], [0]]), torch.ones(1), (3, 4), check_invariants=False)
    torch.save({"adj": bad}, tmp_path / "x.pt")
    reader = open_reader(tmp_path / "x.pt")
    node = reader.tree["adj"]
    assert isinstance(node, StoredTensor)
    with pytest.raises(InputError, match="is sparse and damaged"):
        reader.read_into(node, 0, memoryview(bytearray(node.nbytes)))
    reader.close()
