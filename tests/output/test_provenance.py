"""The SHA-256 of a source, computed from bytes that are read for other purposes."""

from __future__ import annotations

import hashlib
import json
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import TASK, Run
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ckptavg.filesystem.sha256 import Hash, hash_while_reading
from ckptavg.readers import RegularFile

CONTENT = random.Random(0).randbytes(3_000_000)
PARTS = [(start, min(300_007, len(CONTENT) - start)) for start in range(1_000, len(CONTENT), 300_007)]


class Counted(RegularFile):
    """A file that counts the bytes read from disk."""

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
def test_the_sha256_does_not_depend_on_the_order_of_reads(file: Counted, order: str):
    parts = {
        "forward": PARTS,
        "backward": PARTS[::-1],
        "shuffled": random.Random(1).sample(PARTS, len(PARTS)),
        "twice": PARTS + PARTS,
        "with gaps": PARTS[::3],
        "nothing": [],
    }[order]
    with file, hash_while_reading([file], threads=2) as digest:
        for part in parts:
            read(file, part)
        assert digest(file) == hashlib.sha256(CONTENT).hexdigest()
    assert file.listener is None


def test_reading_forward_reads_nothing_twice(file: Counted):
    with file, hash_while_reading([file], threads=1) as digest:
        for part in PARTS:
            read(file, part)
        digest(file)
    assert file.count == len(CONTENT)


def test_threads_may_read_concurrently(file: Counted):
    for _ in range(20):
        with hash_while_reading([file], threads=2) as digest, ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda part: read(file, part), PARTS))
            assert digest(file) == hashlib.sha256(CONTENT).hexdigest()
    file.close()


def test_without_other_reads_it_reads_the_file(file: Counted):
    with file:
        assert Hash(file).hexdigest() == hashlib.sha256(CONTENT).hexdigest()


def test_without_digests_no_source_is_read_twice_and_verify_still_compares_every_byte(run: Run, tmp_path: Path):
    for step in (1, 2, 3):
        save_file({"w": torch.full((4,), float(step))}, tmp_path / f"s-{step}.safetensors")
    assert run("swa", ".", "-o", "with.safetensors").returncode == 0
    assert run("swa", ".", "--no-digests", "-o", "without.safetensors").returncode == 0
    assert load_file(tmp_path / "without.safetensors")["w"].tolist() == [2.0] * 4
    with safe_open(tmp_path / "without.safetensors", "pt") as stored:
        record = json.loads(stored.metadata()["ckptavg"])
    assert [source["sha256"] for source in record["sources"]] == [{f"s-{step}.safetensors": ""} for step in (1, 2, 3)]
    for name in ("with.safetensors", "without.safetensors"):
        assert run("verify", name, "--sources", ".").returncode == 0
    save_file({"w": torch.full((4,), 9.0)}, tmp_path / "s-3.safetensors")
    done = run("verify", "with.safetensors", "--sources", ".")
    assert done.returncode == 3 and "its SHA-256 differs" in done.stderr
    done = run("verify", "without.safetensors", "--sources", ".")
    assert done.returncode == 3 and "w: 1 tensor not equal to the average of the sources" in done.stderr


def test_a_search_without_digests(run: Run, digits: Path, tmp_path: Path):
    done = run("soup", digits, "--last", 3, "--task", TASK, "--no-digests", "--no-baselines")
    assert done.returncode == 0, done.stderr
    assert run("verify", "averaged.safetensors", "--sources", digits).returncode == 0
