"""Contract of every format. ``sample_NAME.py`` beside this file writes a file of format NAME by another library."""

from __future__ import annotations

import json
import os
import runpy
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from torch_archives import expected, read, values

from ckptavg.errors import InputError
from ckptavg.filesystem.regular_file import RegularFile
from ckptavg.readers import HEAD_SIZE, ITEM_SIZE, Reader, StoredTensor, formats, open_reader, suffixes

HERE = Path(__file__).parent
NAMES = [one.name for one in formats()]


def sample(name: str, folder: Path) -> tuple[Path, Mapping[str, torch.Tensor]]:
    """Write a file of format ``name``; return its path and the tensors in it."""
    source = HERE / f"sample_{name}.py"
    assert source.exists(), f"tests/readers/{source.name} is missing; CONTRIBUTING.md shows what it has to define"
    return runpy.run_path(str(source))["sample"](folder)


def tensors(reader: Reader) -> list[StoredTensor]:
    return [node for node in reader.tree.values() if isinstance(node, StoredTensor)]


def read_in_tiles(reader: Reader, tensor: StoredTensor, tile: int, *, backwards: bool) -> bytes:
    item = ITEM_SIZE[tensor.dtype]
    out = bytearray(tensor.nbytes)
    starts = range(0, tensor.numel, tile)
    for start in reversed(starts) if backwards else starts:
        reader.read_into(tensor, start, memoryview(out)[start * item : min(start + tile, tensor.numel) * item])
    return bytes(out)


def read_or_refused(path: Path) -> object | None:
    """Return everything in the file, or None if it is refused by an InputError of one line with the file's path."""
    try:
        return read(path)
    except InputError as error:
        assert str(error).startswith(str(path.parent)) and "\n" not in str(error)
        return None


def json_values(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of every JSON value, including nested ones."""
    text = data.decode("latin1")
    for start in range(len(text)):
        try:
            yield start, json.JSONDecoder().raw_decode(text, start)[1]
        except ValueError:
            continue


def places(data: bytes) -> list[int]:
    """Return every position but those between two equal bytes, such as those in padding."""
    return [i for i in range(len(data)) if data[i - 1 : i + 2] != data[i : i + 1] * 3]


def test_names_are_distinct_and_suffixes_start_with_a_dot():
    assert len(set(NAMES)) == len(NAMES)
    assert all(suffix.startswith(".") for suffix in suffixes())


@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_claimed_by_its_format_alone(tmp_path: Path, name: str):
    path, _ = sample(name, tmp_path)
    head = path.read_bytes()[:HEAD_SIZE]
    assert [one.name for one in formats() if one.claims(head)] == [name]
    for size in range(len(head)):
        assert {one.name for one in formats() if one.claims(head[:size])} <= {name}, size
    assert path.name.endswith(suffixes())


def test_text_is_claimed_by_no_format():
    assert not any(one.claims(text) for one in formats() for text in (b"", b"text", b"\n\n", b"# a comment\n" * 9))


@pytest.mark.parametrize("name", NAMES)
def test_tensors_are_those_that_were_saved(tmp_path: Path, name: str):
    path, state = sample(name, tmp_path)
    reader = open_reader(path)
    assert values(reader) == expected(state)
    assert reader.path == path and reader.files[0].path == path
    for _ in range(2):
        reader.close()


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("tile", [1, 2, 5])
@pytest.mark.parametrize("name", NAMES)
def test_tiles_are_parts_of_the_whole(tmp_path: Path, name: str, tile: int, backwards: bool):
    path, _ = sample(name, tmp_path)
    reader = open_reader(path)
    for tensor in tensors(reader):
        tiled = read_in_tiles(reader, tensor, tile, backwards=backwards)
        assert (tensor.dtype, tensor.shape, tiled) == values(reader, tensor)
    reader.close()


@pytest.mark.parametrize("name", NAMES)
def test_every_truncation_is_refused(tmp_path: Path, name: str):
    path, _ = sample(name, tmp_path)
    data = path.read_bytes()
    for size in places(data):
        path.write_bytes(data[:size])
        assert read_or_refused(path) is None, size


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_file_is_refused_by_the_format_itself_too(tmp_path: Path, name: str):
    (format_,) = (one for one in formats() if one.name == name)
    (tmp_path / "empty").touch()
    with RegularFile(tmp_path / "empty") as file, pytest.raises(InputError):
        format_.open(file)


@pytest.mark.parametrize("name", NAMES)
def test_a_changed_byte_is_read_or_refused(tmp_path: Path, name: str):
    path, _ = sample(name, tmp_path)
    data = path.read_bytes()
    for position in places(data):
        changed = bytearray(data)
        changed[position] ^= (0x01, 0x80, 0xFF)[position % 3]
        path.write_bytes(changed)
        read_or_refused(path)


@pytest.mark.parametrize("name", NAMES)
def test_json_of_another_type_is_read_or_refused(tmp_path: Path, name: str):
    """For example ``[]`` where a header has ``{...}``; formats without JSON have few bytes that look like it."""
    path, _ = sample(name, tmp_path)
    data = path.read_bytes()
    for start, stop in json_values(data):
        for other in (b"0", b"-1", b"[]", b"{}", b'""', b"1.5", b"null", b"true", b"[[]]", b"[-1]", b'["a"]'):
            if len(other) <= stop - start:
                path.write_bytes(data[:start] + other.ljust(stop - start) + data[stop:])
                read_or_refused(path)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_shrinks_after_opening_is_refused(tmp_path: Path, name: str):
    path, _ = sample(name, tmp_path)
    reader = open_reader(path)
    for file in reader.files:
        os.truncate(file.path, 8)
    with pytest.raises(InputError, match="truncated"):
        values(reader)
    reader.close()
