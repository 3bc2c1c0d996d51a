"""Damaged files of every format: no crash, no unclassified error, no altered tensor undetected."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import examples

from ckptavg.errors import InputError
from hostile import mutants, torch_cases

KINDS = ("safetensors", "torch", "index", "dcp", "zero")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mutants") / "step-3"


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_refused_or_harmless(kind: str, folder: Path, tally: dict[str, int]) -> None:
    @examples(200)
    @given(st.integers(0, 2**64))
    def check(seed: int) -> None:
        tally["mutants"] = tally.get("mutants", 0) + 1
        found = mutants.verdict(kind, mutants.damaged(kind, random.Random(seed)), folder)
        assert kind not in mutants.CHECKED or found != "altered"

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_cut_anywhere_is_refused(kind: str, folder: Path, tally: dict[str, int]) -> None:
    for name, data in mutants.seeds()[kind].items():
        for length in range(0, len(data), 1 if len(data) < 1000 else 7):
            tally["mutants"] = tally.get("mutants", 0) + 1
            assert mutants.verdict(kind, {**mutants.seeds()[kind], name: data[:length]}, folder) == "refused"


def test_no_bit_of_a_torch_file_can_be_flipped_unseen(folder: Path, tally: dict[str, int]) -> None:
    (name, data), = mutants.seeds()["torch"].items()  # fmt: skip
    for bit in range(8 * len(data)):
        raw = bytearray(data)
        raw[bit // 8] ^= 1 << bit % 8
        tally["mutants"] = tally.get("mutants", 0) + 1
        assert mutants.verdict("torch", {name: bytes(raw)}, folder) != "altered"


def test_random_pickles_are_read_or_refused(folder: Path, tally: dict[str, int]) -> None:
    @examples(200)
    @given(st.integers(0, 2**64))
    def check(seed: int) -> None:
        tally["pickles"] = tally.get("pickles", 0) + 1
        mutants.read("torch", {"step-3.pt": torch_cases.archive(mutants.program(random.Random(seed)))}, folder)

    check()


@examples(200)
@given(st.binary(max_size=400))
def test_any_bytes_are_read_or_refused(folder: Path, data: bytes) -> None:
    for prefix in (b"", b"PK\3\4", len(data).to_bytes(8, "little") + b"{", b'{"weight_map":'):
        assert isinstance(mutants.read("torch", {"step-3.pt": prefix + data}, folder), InputError)
