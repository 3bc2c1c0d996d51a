"""The digest of an output's data is that of its bytes, in whatever order they are written."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import examples

from ckptavg.filesystem.digest import Algorithm, of_bytes
from ckptavg.output import data_digest
from ckptavg.output.data_digest import DataDigest, digest_of


class Written:
    """A file in memory, of whose bytes those that are read are counted."""

    def __init__(self, size: int, algorithm: Algorithm = "blake3") -> None:
        self.data = bytearray(size)
        self.read = 0
        self.digest = DataDigest(algorithm, size)

    def write(self, offset: int, data: bytes) -> None:
        self.data[offset : offset + len(data)] = data
        self.digest.update(offset, data)

    def fill(self, offset: int, out: memoryview) -> None:
        assert offset + len(out) <= len(self.data)
        out[:] = self.data[offset : offset + len(out)]
        self.read += len(out)

    def finish(self) -> str:
        return self.digest.finish(self.fill)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a few bytes be several chunks, and many enough for threads."""
    monkeypatch.setattr(data_digest, "_CHUNK", 7)
    monkeypatch.setattr(data_digest, "_LARGE", 30)


@examples(200)
@given(st.integers(0, 60), st.lists(st.tuples(st.integers(0, 59), st.binary(max_size=30)), max_size=12))
def test_any_order_of_writes_gives_the_digest_of_what_is_there(size: int, writes: list[tuple[int, bytes]]):
    """Gaps, overlaps and replaced bytes too; a second call gives it again."""
    for algorithm in ("blake3", "sha256"):
        file = Written(size, algorithm)
        for offset, data in writes:
            file.write(min(offset, size), data[: max(0, size - offset)])
        assert file.finish() == of_bytes(bytes(file.data), algorithm) == file.finish()


def test_bytes_in_order_are_not_read():
    file = Written(50)
    for start in range(0, 50, 10):
        file.write(start, bytes([start]) * 10)
    assert file.digest.unread == 0 and file.finish() == of_bytes(bytes(file.data), "blake3") and file.read == 0


def test_only_bytes_that_came_before_their_turn_are_read():
    file = Written(50)
    for start in (0, 10, 20, 40, 30):
        file.write(start, bytes([start]) * 10)
    assert file.digest.unread == 10 and file.finish() == of_bytes(bytes(file.data), "blake3") and file.read == 10


def test_all_bytes_are_read_if_a_hashed_one_is_replaced():
    file = Written(50)
    file.write(0, b"1" * 50)
    file.write(20, b"2")
    assert file.digest.unread == 50 and file.finish() == of_bytes(bytes(file.data), "blake3") and file.read == 50


def test_nothing_is_written_to_an_empty_file():
    assert Written(0).finish() == of_bytes(b"", "blake3")


def test_the_number_of_threads_changes_no_digest(monkeypatch: pytest.MonkeyPatch):
    data = random.Random(0).randbytes(3_000_001)
    monkeypatch.setattr(data_digest, "_CHUNK", 1 << 20)
    for threads in (1, 2, 5):
        monkeypatch.setattr(data_digest, "processors", lambda threads=threads: threads)

        def fill(offset: int, out: memoryview) -> None:
            out[:] = data[offset : offset + len(out)]

        assert digest_of(fill, len(data), "blake3") == of_bytes(data, "blake3")


def test_an_error_of_a_read_is_raised():
    def fill(offset: int, out: memoryview) -> None:
        raise OSError(offset)

    with pytest.raises(OSError, match="0"):
        digest_of(fill, 20, "blake3")
