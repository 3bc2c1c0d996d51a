"""The readers compared with the libraries that write the formats: equal results, and no file accepted by ours alone."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import examples
from torch_archives import TORCH_DTYPE, expected, read

from ckptavg.errors import InputError
from hostile import mutants
from hostile.case import container, entries, values
from hostile.side_files import with_odd_value

DTYPES = [dtype for name, dtype in TORCH_DTYPE.items() if not name.startswith("F8")]
names = st.text(st.characters(blacklist_categories=("Cc", "Cs"), max_codepoint=0xFFFF), min_size=1, max_size=12)
shapes = st.lists(st.integers(0, 4), max_size=4)


@st.composite
def tensors(draw: Any) -> torch.Tensor:
    shape, dtype = draw(shapes), draw(st.sampled_from(DTYPES))
    count = int(torch.Size(shape).numel())
    most, draws = 2 if dtype == torch.bool else 256, torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    raw = torch.randint(0, most, (count * dtype.itemsize,), generator=draws, dtype=torch.uint8)
    tensor = raw.view(dtype).view(shape) if count else torch.empty(shape, dtype=dtype)
    return tensor.transpose(0, -1) if len(shape) > 1 and draw(st.booleans()) else tensor


@examples(80)
@given(st.dictionaries(names, tensors(), min_size=1, max_size=5), st.sampled_from([2, 4, 5]))
def test_torch_files_are_read_as_torch_reads_them(tmp_path: Path, state: dict[str, Any], protocol: int) -> None:
    content = {"state": state, "step": 3, "nested": [{"x": list(state.values())[:1]}, (1.5, None, True, "text")]}
    torch.save(content, tmp_path / "file.pt", pickle_protocol=protocol)
    found: Any = read(tmp_path / "file.pt")
    loaded = torch.load(tmp_path / "file.pt", weights_only=False)
    assert found == expected(loaded)


@examples(80)
@given(st.dictionaries(names.filter(lambda name: name != "__metadata__"), tensors(), min_size=1, max_size=5))
def test_safetensors_files_are_read_as_the_library_reads_them(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    plain = {name: tensor.contiguous().clone() for name, tensor in state.items() if tensor.dtype != torch.complex128}
    safetensors.torch.save_file(plain, tmp_path / "file.safetensors")
    assert read(tmp_path / "file.safetensors") == expected(safetensors.torch.load_file(tmp_path / "file.safetensors"))


@pytest.mark.parametrize("by_value", [True, False])
def test_a_damaged_safetensors_file_that_is_read_is_one_for_the_library_too(
    tmp_path: Path, by_value: bool, tally: dict[str, int]
) -> None:
    """Compare the tensors as well; the library may be less strict, never stricter."""
    header, _ = entries()
    path = tmp_path / "step-3.safetensors"

    @examples(80)
    @given(st.integers(0, 2**64))
    def check(seed: int) -> None:
        tally["mutants"] = tally.get("mutants", 0) + 1
        rng = random.Random(seed)
        if by_value:
            data = container(json.dumps(with_odd_value(header, rng), ensure_ascii=True).encode(), values(8))
        else:
            data = next(iter(mutants.damaged("safetensors", rng).values()))
        path.write_bytes(data)
        try:
            found = read(path)
        except InputError:
            return
        assert found == expected(safetensors.torch.load(data))

    check()
