"""Products taken from rows as they are stored equal those taken piece by piece: on a GPU only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ckptavg.candidates.dense import Dense
from ckptavg.candidates.packed import Packed
from ckptavg.candidates.products import kernels

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
N = 7
CUDA = torch.device("cuda")


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32, torch.float64, 16, 8, 4, 1], ids=str)
@pytest.mark.parametrize("size", [1, 4096, 100_003])
def test_products_are_those_taken_piece_by_piece(kind: Any, size: int):
    """From the first column, from within a group, and over the ends of blocks and fields."""
    torch.manual_seed(0)
    dtype = kind if isinstance(kind, torch.dtype) else torch.float32
    rows_ND = torch.randn(N, size, device=CUDA).to(dtype)
    matrix: Any = Dense(N, rows_ND[0]) if isinstance(kind, torch.dtype) else Packed(N, rows_ND[0], bits=kind, group=100)
    for i, row_D in enumerate(rows_ND):
        matrix.encode(i, row_D.clone())
    decoded_ND = torch.cat([piece_NC.double() for piece_NC, _ in matrix.column_blocks(0, size)], dim=1)
    c_N, g_D = torch.randn(N, device=CUDA, dtype=torch.float64), torch.randn(size, device=CUDA).to(dtype)
    eps = torch.finfo(dtype).eps
    assert matrix.products is not None
    for start, stop in {(0, size), (size // 3, size), (size // 3, size - size // 4)}:
        out_D = torch.full((size,), 99.0, device=CUDA, dtype=dtype)
        matrix.products.mix(c_N, out_D, start, stop)
        expected_D: Tensor = c_N @ decoded_ND
        torch.testing.assert_close(out_D[start:stop].double(), expected_D[start:stop], rtol=eps, atol=20 * N * eps)
        assert (out_D[:start] == 99).all() and (out_D[stop:] == 99).all()
        found_N = matrix.products.dot(g_D, start, stop)
        expected_N = decoded_ND[:, start:stop] @ g_D[start:stop].double()
        scale = decoded_ND[:, start:stop].abs() @ g_D[start:stop].double().abs() + 1e-9
        assert float(((found_N - expected_N).abs() / scale).max()) < (1e-5 if dtype != torch.float64 else 1e-14)


def test_triton_compiles_here():
    assert kernels(CUDA) is not None
