"""The strict safetensors header: content that the library accepts although the format forbids it is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import examples
from safetensors import SafetensorError
from safetensors.torch import load, save, save_file

from ckptavg.errors import InputError
from ckptavg.filesystem.regular_file import RegularFile
from ckptavg.readers import ITEM_SIZE, StoredTensor, open_reader, safetensors

A = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
B = {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}


def built(header: Any, data: bytes = bytes(16)) -> bytes:
    text = header if isinstance(header, str) else json.dumps(header)
    encoded = text.encode("utf-8", "surrogatepass")
    return len(encoded).to_bytes(8, "little") + encoded + data


def refused(path: Path, content: bytes, message: str) -> None:
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        open_reader(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (f'{{"a": {json.dumps(A)}, "a": {json.dumps(B)}}}', "key 'a' occurs twice"),
        ({"a": A, "b": {**B, "data_offsets": [4, 12]}}, "b: overlaps another tensor"),
        ({"a": A, "b": A}, "b: overlaps another tensor"),
        ({"a": {**A, "data_offsets": [8, 16]}}, "a: leaves a gap after byte 0"),
        ({"a": A, "b": {**B, "data_offsets": [16, 24]}}, "b: leaves a gap after byte 8"),
        ({"a": {**A, "data_offsets": [8, 0]}}, "a: data_offsets must be two integers, begin <= end"),
        ({"a": {**A, "data_offsets": [-8, 0]}}, "a: data_offsets must be"),
        ({"a": {**A, "data_offsets": [0.0, 8]}}, "a: data_offsets must be"),
        ({"a": {**A, "data_offsets": [0, 8, 8]}}, "a: data_offsets must be"),
        ({"a": A, "b": {**B, "shape": [100], "data_offsets": [8, 408]}}, "file is truncated: 16 bytes of tensors"),
        ({"a": A}, "8 bytes follow the last tensor"),
        ({"a": {**A, "shape": [3]}}, "a: F32 .3. takes 12 bytes, but data_offsets span 8"),
        ({"a": {**A, "shape": [-2]}}, "a: shape must be"),
        ({"a": {**A, "shape": ["2"]}}, "a: shape must be"),
        ({"a": {**A, "shape": [True]}}, "a: shape must be"),
        ({"a": {**A, "shape": [2**63, 0]}}, "a: shape must be"),
        ({"a": {**A, "shape": [1] * 65}}, "a: shape must be a list of at most 64"),
        ({"a": {**A, "dtype": "F6"}}, "a: dtype 'F6' is not supported; supported are F64"),
        ({"a": {**A, "dtype": 3}}, "a: dtype 3 is not supported"),
        ({"a": {**A, "dtype": []}}, r"a: dtype \[\] is not supported"),
        ({"a": {**A, "more": 1}}, "a: its header entry must have exactly"),
        ({"a": {"dtype": "F32"}}, "a: its header entry must have exactly"),
        ({"a": 3}, "a: its header entry must have exactly"),
        ({"": A}, "a tensor's name must have 1 to 4096 characters"),
        ({"a\n": A}, "a tensor's name must have"),
        ({"x" * 5000: A}, "a tensor's name must have"),
        ({"__metadata__": {"a": 1}}, "__metadata__ must map strings to strings"),
        ({"__metadata__": []}, "__metadata__ must map strings to strings"),
        ('{"a": NaN}', "NaN is not allowed"),
        ('{"a": 1', "header is not valid JSON"),
        ('{"a":' * 50_000, "header is not valid JSON"),
        ('{"a": ' + "9" * 5000 + "}", "header is not valid JSON"),
        ('{"\ud800": 1}', "header is not valid JSON"),
    ],
)  # fmt: skip
def test_a_header_that_breaks_the_format_is_refused(tmp_path: Path, header: Any, message: str):
    refused(tmp_path / "x.safetensors", built(header), message)


@pytest.mark.parametrize("length", [2**63, 2**63 - 1, 2**64 - 1, 100_000_001, (16 << 20) + 1])
def test_a_huge_header_length_is_refused_without_reading_it(tmp_path: Path, length: int):
    content = length.to_bytes(8, "little") + b"{" + bytes(100)
    refused(tmp_path / "x.safetensors", content, f"header length {length} is larger than")


def test_a_leading_space_is_refused(tmp_path: Path):
    refused(tmp_path / "x.safetensors", built(" {}", b""), "not a checkpoint in a known format")


def test_every_truncation_is_refused(tmp_path: Path):
    whole = save({"a": torch.ones(3), "b": torch.ones(2, 2)})
    for length in range(len(whole)):
        refused(tmp_path / "x.safetensors", whole[:length], "truncated|empty|known format")


def test_every_bit_flip_of_the_header_is_refused_or_read_as_the_library_reads_it(tmp_path: Path):
    """A flip can give another valid header; it is then detected by comparison with the other checkpoints."""
    whole = save({"a": torch.arange(3.0), "b": torch.ones(2, 2)})
    header = 8 + int.from_bytes(whole[:8], "little")
    for bit in range(8 * header):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        path = tmp_path / "x.safetensors"
        path.write_bytes(content)
        try:
            reader = open_reader(path)
        except InputError:
            continue
        loaded = load(bytes(content))
        found = {name: (t.dtype, t.shape) for name, t in reader.tree.items() if isinstance(t, StoredTensor)}
        names = {torch.float32: "F32", torch.int32: "I32", torch.uint32: "U32"}
        assert found == {name: (names[t.dtype], tuple(t.shape)) for name, t in loaded.items()}
        reader.close()


HEADERS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["F32", "BF16", "I8"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.text(max_size=5) | st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__"]), inner, max_size=4
        )
    ),
)


@examples(250)
@given(HEADERS | st.dictionaries(st.text(max_size=3), HEADERS, max_size=3), st.binary(max_size=24))
def test_any_header_is_refused_in_one_line_or_accepted_as_the_library_accepts_it(
    tmp_path_factory: pytest.TempPathFactory, header: Any, data: bytes
):
    content = built(header, data)
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(content)
    try:
        open_reader(path).close()
    except InputError as error:
        assert "\n" not in str(error)
        return
    try:
        load(content)
    except SafetensorError as error:
        raise AssertionError(f"accepted {content!r}") from error


def test_slices_are_the_elements_in_order(tmp_path: Path):
    whole = torch.arange(24, dtype=torch.int32).view(2, 3, 4)
    save_file({"w": whole, "other": torch.ones(5)}, tmp_path / "x.safetensors")
    reader = open_reader(tmp_path / "x.safetensors")
    tensor = reader.tree["w"]
    assert isinstance(tensor, StoredTensor) and (tensor.shape, tensor.numel) == ((2, 3, 4), 24)
    for start, stop in ((0, 24), (5, 9), (23, 24)):
        out = bytearray(ITEM_SIZE["I32"] * (stop - start))
        reader.read_into(tensor, start, memoryview(out))
        assert torch.frombuffer(out, dtype=torch.int32).tolist() == list(range(start, stop))


def test_more_tensors_than_any_model_has_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(safetensors, "MAX_TENSORS", 1)
    refused(tmp_path / "x", built({"a": A, "b": B}), "2 tensors, more than 1")


def test_a_header_that_is_no_object_is_refused_also_where_nobody_has_looked_at_it(tmp_path: Path):
    (tmp_path / "x").write_bytes(built("[]"))
    with RegularFile(tmp_path / "x") as file, pytest.raises(InputError, match="x: header is not a JSON object"):
        safetensors.READER.open(file)
