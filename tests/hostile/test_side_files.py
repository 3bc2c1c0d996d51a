"""Damaged text files beside checkpoints: read or refused in one line, with no other outcome."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from conftest import Run
from hypothesis import given
from hypothesis import strategies as st
from properties import examples
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ckptavg.errors import CkptavgError, InputError
from ckptavg.pipeline.verification import verify
from hostile import side_files


@pytest.mark.parametrize("kind", side_files.seeds())
def test_damaged_side_files_are_read_or_refused(kind: str, tmp_path: Path, tally: dict[str, int]) -> None:
    files, _ = side_files.seeds()[kind]
    assert not isinstance(side_files.read(files, tmp_path / "ckpts"), CkptavgError)

    @examples(100)
    @given(st.integers(0, 2**64))
    def check(seed: int) -> None:
        tally["side files"] = tally.get("side files", 0) + 1
        side_files.read(side_files.damaged(kind, random.Random(seed)), tmp_path / "ckpts")

    check()


@pytest.fixture
def output(run: Run, tmp_path: Path) -> Path:
    (tmp_path / "ckpts").mkdir()
    for step in (1, 2):
        save_file(
            {"w": torch.full((4,), float(step)), "b": torch.zeros(2)}, tmp_path / "ckpts" / f"s-{step}.safetensors"
        )
    assert run("swa", "ckpts", "-o", "out.safetensors").returncode == 0
    return tmp_path / "out.safetensors"


def test_metadata_of_an_output_is_not_trusted(output: Path, tally: dict[str, int]) -> None:
    """`verify` rebuilds by metadata that may have been forged."""
    with safe_open(output, "pt") as stored:
        metadata = stored.metadata()
    state = load_file(output)
    assert verify(output, output.parent / "ckpts").agree == ["b", "w"]
    record = json.loads(metadata["ckptavg"])
    outcomes: set[str] = set()

    @examples(100)
    @given(st.integers(0, 2**64))
    def check(seed: int) -> None:
        tally["side files"] = tally.get("side files", 0) + 1
        changed = side_files.with_odd_value(record, random.Random(seed))
        try:
            save_file(state, output, {**metadata, "ckptavg": json.dumps(changed)})
            verify(output, output.parent / "ckpts")
            outcomes.add("rebuilt")
        except InputError as error:
            assert str(error).isprintable()
            outcomes.add("refused")

    check()
    assert outcomes == {"rebuilt", "refused"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sources": []}, "is damaged"), ({"sources": 5}, "is damaged"), ({"sources": None}, "is damaged"),
        ({"groups": [["x"]]}, "groups must be one for all tensors"), ({"groups": []}, "is damaged"),
        ({"dtype": "int8"}, "is damaged"), ({"dtype": "complex64"}, "is damaged"), ({"adapter": "x"}, "is damaged"),
        ({"rank": 0}, "is damaged"), ({"schema": 3}, "of another version"), ({"recomputed": [1]}, "is damaged"),
    ],
    ids=str,
)  # fmt: skip
def test_metadata_that_cannot_be_is_refused(output: Path, change: dict[str, object], message: str) -> None:
    with safe_open(output, "pt") as stored:
        metadata = stored.metadata()
    record = {**json.loads(metadata["ckptavg"]), **change}
    save_file(load_file(output), output, {**metadata, "ckptavg": json.dumps(record)})
    with pytest.raises(InputError, match=message):
        verify(output, output.parent / "ckpts")


def test_a_source_is_no_path(output: Path) -> None:
    """A source's files are searched for only under --sources."""
    with safe_open(output, "pt") as stored:
        metadata = stored.metadata()
    record = json.loads(metadata["ckptavg"])
    for name, part in (("../s-1.safetensors", "../ckpts/s-1.safetensors"), ("/", "x"), ("..", "x"), ("", "x")):
        source = {**record["sources"][0], "name": name, "digests": {part: f"sha256:{'0' * 64}"}}
        text = json.dumps({**record, "sources": [source]})
        save_file(load_file(output), output, {**metadata, "ckptavg": text})
        with pytest.raises(InputError, match="is damaged"):
            verify(output, output.parent / "ckpts")
