"""A model in several files equals the union of its files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch_archives import expected, values

from ckptavg.errors import InputError
from ckptavg.readers import open_reader
from ckptavg.readers.shard_index import READER

STATE = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.bfloat16), "c": torch.tensor(3)}


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """Write two safetensors files and one torch file, a mix that is unusual but not forbidden."""
    save_file({"a": STATE["a"]}, tmp_path / "1.safetensors", {"format": "pt"})
    save_file({"b": STATE["b"]}, tmp_path / "2.safetensors")
    torch.save({"c": STATE["c"]}, tmp_path / "3.bin")
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"c": "3.bin", "b": "2.safetensors", "a": "1.safetensors"}}))
    return path


def test_tensors_come_from_their_files(index: Path) -> None:
    reader = open_reader(index)
    assert values(reader) == expected(STATE) and list(reader.tree) == ["c", "b", "a"]
    assert reader.path == index and reader.format == "safetensors, 3 shards" and reader.metadata == {"format": "pt"}
    assert [file.path.name for file in reader.files] == [index.name, "1.safetensors", "2.safetensors", "3.bin"]
    assert reader.notes == ()
    out = bytearray(8)
    reader.read_into(reader.tree["a"], 2, memoryview(out))  # type: ignore[arg-type]
    assert torch.frombuffer(out, dtype=torch.float32).tolist() == [2, 3]
    reader.close()
    for file in reader.files:
        with pytest.raises(InputError, match="bad file descriptor"):
            file.read(0, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": "3.bin"}, "a: the index places it in 3.bin, which does not have it"),
        ({"c": None}, "c: is in 3.bin, but the index does not place it there"),
        ({"a": "2.safetensors"}, "a: the index places it in 2.safetensors, which does not have it"),
        ({"c": "gone.bin"}, "shard gone.bin is missing"),
        ({"c": "../x/3.bin"}, "shard '../x/3.bin' is not a bare file name"),
        ({"c": "model.safetensors.index.json"}, "shard model.safetensors.index.json is itself an index"),
        ({"c": 3}, "weight_map must map tensor names to file names"),
    ],
)
def test_an_index_that_contradicts_its_files_is_refused_by_name(index: Path, change: dict[str, object], message: str):
    known = json.loads(index.read_text())["weight_map"] | change
    if None in known.values():
        torch.save({"c": STATE["c"], "d": STATE["c"]}, index.parent / "3.bin")
        known["d"] = known.pop("c") or "3.bin"
    index.write_text(json.dumps({"weight_map": known}))
    with pytest.raises(InputError) as caught:
        open_reader(index)
    assert str(caught.value) == f"{index}: {message}"
    assert caught.value.hint == ("copy the whole directory" if "missing" in message else None)


def test_json_text_is_claimed() -> None:
    assert READER.claims(b'{"w"') and READER.claims(b'  \n{"')
    assert not any(map(READER.claims, (b"[{", b"", b"{\0", b"{" + bytes(14))))
    assert READER.claims(b"{" + b" " * 15 + b"\0")
