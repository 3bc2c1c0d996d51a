"""The SHA-256 of a source, found from what is read of it anyway."""

from __future__ import annotations

import hashlib
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ckptavg.provenance import Hash, hashing
from ckptavg.readers import RegularFile

CONTENT = random.Random(0).randbytes(3_000_000)
PARTS = [(start, min(300_007, len(CONTENT) - start)) for start in range(1_000, len(CONTENT), 300_007)]


class Counted(RegularFile):
    """A file that counts the bytes that come from it."""

    count = 0

    def fill(self, offset: int, out: memoryview) -> None:
        super().fill(offset, out)
        self.count += len(out)


@pytest.fixture
def file(tmp_path: Path) -> Counted:
    (tmp_path / "file").write_bytes(CONTENT)
    return Counted(tmp_path / "file")


def read(file: RegularFile, part: tuple[int, int]) -> None:
    start, size = part
    file.read_into(start, memoryview(bytearray(size)))


@pytest.mark.parametrize("order", ["forward", "backward", "shuffled", "twice", "with gaps", "nothing"])
def test_any_order_of_reading_gives_the_sha256(file: Counted, order: str):
    parts = {
        "forward": PARTS,
        "backward": PARTS[::-1],
        "shuffled": random.Random(1).sample(PARTS, len(PARTS)),
        "twice": PARTS + PARTS,
        "with gaps": PARTS[::3],
        "nothing": [],
    }[order]
    with file, hashing([file], threads=2) as digest:
        for part in parts:
            read(file, part)
        assert digest(file) == hashlib.sha256(CONTENT).hexdigest()
    assert file.listener is None


def test_reading_forward_reads_nothing_twice(file: Counted):
    with file, hashing([file], threads=1) as digest:
        for part in PARTS:
            read(file, part)
        digest(file)
    assert file.count == len(CONTENT)


def test_threads_may_read_at_once(file: Counted):
    for _ in range(20):
        with hashing([file], threads=2) as digest, ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda part: read(file, part), PARTS))
            assert digest(file) == hashlib.sha256(CONTENT).hexdigest()
    file.close()


def test_alone_it_reads_the_file(file: Counted):
    with file:
        assert Hash(file).hexdigest() == hashlib.sha256(CONTENT).hexdigest()
