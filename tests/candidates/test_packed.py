"""The packed matrix against a literal unpacking, and against the dense matrix of the unpacked values."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stored import stored
from torch import Tensor, nn

from ckptavg.candidates import Candidates
from ckptavg.candidates.packed import Packed, fit

BITS = (1, 2, 4, 8, 16)


def encoded(rows_ND: Tensor, bits: int, group: int) -> Packed:
    matrix = Packed(len(rows_ND), rows_ND[0], bits=bits, group=group)
    matrix.mean_D.copy_(rows_ND.double().mean(dim=0))
    for i, row_D in enumerate(rows_ND):
        matrix.encode(i, row_D)
    return matrix


def lost_share(matrix: Packed) -> float:
    """Return ‖d̂ − d‖/‖d‖ over all rows."""
    error, norm = matrix.squared_errors.tolist()
    return (error / norm) ** 0.5


def unpacked(matrix: Packed, bits: int, group: int, size: int) -> Tensor:
    """Decode [N, D] element by element as zero + scale·code, following the documented layout."""
    words, scale, zero = matrix._words_NP, matrix._scale_NH, matrix._zero_NH
    columns = words.shape[1]
    result = torch.empty(len(words), size)
    for i in range(len(words)):
        for d in range(size):
            field, word = divmod(d, columns)
            code = (int(words[i, word]) >> (bits * field)) & (2**bits - 1) if bits < 16 else int(words[i, word])
            result[i, d] = zero[i, d // group] + scale[i, d // group] * code
    return result


def decoded(matrix: Packed, start: int, stop: int) -> Tensor:
    parts: list[Tensor] = []
    at = start
    for piece, columns in matrix.column_blocks(start, stop):
        assert columns.start == at and piece.dtype == torch.float32 and piece.shape[1] == columns.stop - at
        parts.append(piece.clone())  # valid until the next piece only
        at = columns.stop
    assert at == stop
    return torch.cat(parts, dim=1)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(BITS),
    st.integers(1, 3),
    st.integers(1, 90),
    st.sampled_from([1, 3, 8, 128]),
    st.sampled_from([7, 64, 10**6]),
    st.data(),
)
def test_any_run_of_columns_decodes_to_the_packed_values(
    bits: int, n: int, size: int, group: int, at_once: int, data: st.DataObject
):
    rows = torch.randn(n, size, generator=torch.Generator().manual_seed(size))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ckptavg.candidates.packed._DECODED", {"cpu": at_once})
        patch.setattr("ckptavg.candidates.packed._ENCODED", at_once)
        matrix = encoded(rows, bits, group)
        expected = unpacked(matrix, bits, group, size)
        start = data.draw(st.integers(0, size - 1))
        stop = data.draw(st.integers(start + 1, size))
        found = decoded(matrix, start, stop)
    largest = matrix._zero_NH.abs().max() + matrix._scale_NH.max() * 2**bits  # a product and a sum, each rounded
    torch.testing.assert_close(found, expected[:, start:stop], rtol=0, atol=float(largest) * 2**-22)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [8, 128])
def test_rounding_is_to_the_nearest_level_and_error_matches(bits: int, group: int):
    rows = torch.randn(3, 1000, generator=torch.Generator().manual_seed(bits))
    matrix = encoded(rows, bits, group)
    d = rows - rows.mean(dim=0)
    lost = decoded(matrix, 0, 1000) - d
    if bits >= 8:  # nothing is clipped
        scale = matrix._scale_NH.repeat_interleave(group, dim=1)[:, :1000]
        assert (lost.abs() <= scale / 2 * (1 + 1e-3) + 1e-6).all()
    assert lost_share(matrix) == pytest.approx(float(lost.norm() / d.norm()), rel=1e-3, abs=1e-6)


def test_more_bits_and_smaller_groups_reduce_the_error():
    rows = torch.randn(4, 4096, generator=torch.Generator().manual_seed(0))
    assert [lost_share(encoded(rows, bits, 128)) for bits in BITS] == sorted(
        (lost_share(encoded(rows, bits, 128)) for bits in BITS), reverse=True
    )
    for bits in (1, 2, 4):
        assert lost_share(encoded(rows, bits, 16)) < lost_share(encoded(rows, bits, 128))
    assert lost_share(encoded(rows, 4, 128)) < 0.1 and lost_share(encoded(rows, 8, 128)) < 0.007


@settings(deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([2, 4, 16]), st.sampled_from([1.0, 5.0]))
def test_fitting_a_grid_never_increases_the_error(seed: int, levels: int, tails: float):
    draws = torch.Generator().manual_seed(seed)
    d = torch.randn(4, 64, generator=draws, dtype=torch.float64).sinh() ** tails

    def lost(rounds: int) -> Tensor:
        codes, scale, zero = fit(d, levels, rounds)
        assert ((codes == codes.round()) & (codes >= 0) & (codes < levels)).all() and (scale > 0).all()
        return (zero.unsqueeze(1) + scale.unsqueeze(1) * codes - d).square().sum(dim=1)

    errors = [lost(rounds) for rounds in (0, 1, 4, 8)]
    assert all((b <= a * (1 + 1e-9) + 1e-12).all() for a, b in itertools.pairwise(errors))


@pytest.mark.parametrize("bits", BITS)
def test_equal_values_are_represented_exactly(bits: int):
    rows = torch.tensor([[1.0] * 10, [3.0] * 10])
    assert torch.equal(decoded(encoded(rows, bits, 4), 0, 10), torch.tensor([[-1.0] * 10, [1.0] * 10]))


@pytest.mark.parametrize(("bits", "bytes_"), [(1, 0.1875), (2, 0.3125), (4, 0.5625), (8, 1.0625), (16, 2.0625)])
def test_bytes_per_element_are_its_bits_and_its_share_of_the_scale(bits: int, bytes_: float):
    matrix = Packed(3, torch.empty(128 * 8 * 5), bits=bits, group=128)
    assert matrix.nbytes == 3 * 128 * 8 * 5 * bytes_


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.first = nn.Linear(9, 7).to(dtype)
        self.norm = nn.BatchNorm1d(7).to(dtype)
        self.second = nn.Linear(7, 5).to(dtype)


def both(folder: Path, bits: int, dtype: torch.dtype) -> tuple[Candidates, Candidates]:
    """Return quantized candidates, and dense candidates with the same decoded values."""
    states: list[dict[str, Tensor]] = []
    for seed in range(4):
        draws = torch.Generator().manual_seed(seed)
        states.append(
            {
                name: (1 + torch.randn(tensor.shape, generator=draws)).to(tensor.dtype)
                for name, tensor in Net(dtype).state_dict().items()
            }
        )
    packed = Candidates(Net(dtype), stored(folder / "a", states), lambda *_: None, bits=bits, group_size=16)
    for i in range(4):
        packed.materialize(torch.eye(4, dtype=torch.float64)[i])
        states[i] |= {n: t.clone() for n, t in packed.model.state_dict().items() if t.is_floating_point()}
    return packed, Candidates(Net(dtype), stored(folder / "b", states), lambda *_: None)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layerwise", [False, True])
def test_materialize_and_pullback_match_the_unpacked_candidates(
    tmp_path: Path, bits: int, dtype: torch.dtype, layerwise: bool
):
    packed, dense = both(tmp_path, bits, dtype)
    groups = dense.blocks(None if layerwise else 10**9)
    draws = torch.Generator().manual_seed(7)
    c = torch.softmax(torch.randn(len(groups), 4, generator=draws, dtype=torch.float64), dim=1)
    # the packed matrix sums in float32; bfloat16 rounds the mixture and the rows of the dense matrix
    near = {"rtol": 2**-6, "atol": 2**-6} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    for each in (packed, dense):
        each.materialize(c, groups)
        each.zero_gradient()
        gradient_draws = torch.Generator().manual_seed(8)
        for parameter in each.model.parameters():
            assert parameter.grad is not None
            parameter.grad.copy_(torch.randn(parameter.shape, generator=gradient_draws))
    for name, tensor in packed.model.state_dict().items():
        torch.testing.assert_close(tensor, dense.model.state_dict()[name], **near)
    coarse = dtype == torch.bfloat16
    torch.testing.assert_close(
        packed.pullback(groups).double(), dense.pullback(groups).double(), rtol=0, atol=1.0 if coarse else 1e-3
    )
    torch.testing.assert_close(
        packed.distances(groups).double(), dense.distances(groups).double(), rtol=0.03 if coarse else 1e-4, atol=1e-5
    )


def test_the_full_matrix_is_never_decoded_at_once(tmp_path: Path):
    """Only one decoded piece is kept, much smaller than N·D floats."""
    size = 200_000
    states = [{"weight": torch.randn(size // 100, 100, generator=torch.Generator().manual_seed(i))} for i in range(8)]
    packed = Candidates(nn.Linear(100, size // 100, bias=False), stored(tmp_path, states), lambda *_: None, bits=4)
    ((_, matrix),) = packed._blocks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ckptavg.candidates.packed._DECODED", {"cpu": 1 << 14})
        packed.materialize(torch.full((8,), 1 / 8))
        packed.pullback()
    assert isinstance(matrix, Packed) and matrix._workspace is not None
    assert sum(buffer.nbytes for buffer in matrix._workspace) <= 5 * (1 << 14) and packed.nbytes < 0.57 * 8 * size
