"""The digest of a source, computed from bytes that are read for other purposes."""

from __future__ import annotations

import hashlib
import json
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from conftest import TASK, Run
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ckptavg.filesystem.digest import Algorithm, digest, hash_while_reading, of_bytes
from ckptavg.readers import RegularFile

CONTENT = random.Random(0).randbytes(3_000_000)
EXPECTED: dict[Algorithm, str] = {
    "blake3": f"blake3:{blake3(CONTENT).hexdigest()}", "sha256": f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"
}  # fmt: skip
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
@pytest.mark.parametrize("algorithm", EXPECTED)
def test_the_digest_does_not_depend_on_the_order_of_reads(file: Counted, order: str, algorithm: Algorithm):
    parts = {
        "forward": PARTS,
        "backward": PARTS[::-1],
        "shuffled": random.Random(1).sample(PARTS, len(PARTS)),
        "twice": PARTS + PARTS,
        "with gaps": PARTS[::3],
        "nothing": [],
    }[order]
    with file, hash_while_reading({file: algorithm}, threads=2) as digest:
        for part in parts:
            read(file, part)
        assert digest(file) == EXPECTED[algorithm]
    assert file.listener is None and file.digests == {algorithm: EXPECTED[algorithm]}


def test_reading_forward_reads_nothing_twice(file: Counted):
    with file, hash_while_reading({file: "blake3"}, threads=1) as digest:
        for part in PARTS:
            read(file, part)
        digest(file)
    assert file.count == len(CONTENT)


def test_threads_may_read_concurrently(file: Counted):
    for _ in range(20):
        with hash_while_reading({file: "blake3"}, threads=2) as digest, ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda part: read(file, part), PARTS))
            assert digest(file) == EXPECTED["blake3"]
        file.digests.clear()
    file.close()


def test_without_other_reads_it_reads_the_file(file: Counted):
    with file:
        assert {name: digest(file, name) for name in EXPECTED} == EXPECTED == file.digests


def test_files_may_have_digests_of_several_algorithms_and_known_ones_are_not_computed_again(
    file: Counted, tmp_path: Path
):
    (tmp_path / "other").write_bytes(CONTENT)
    with file, Counted(tmp_path / "other") as other, Counted(tmp_path / "other") as known:
        known.digests["sha256"] = "known"
        with hash_while_reading({file: "blake3", other: "sha256", known: "sha256"}, threads=2) as digest:
            found = [digest(one) for one in (file, other, known)]
    assert found == [EXPECTED["blake3"], EXPECTED["sha256"], "known"] and known.count == 0


def test_blake3_is_that_of_its_test_vectors():
    """The official vectors: inputs are 0, 1, … 250, 0, 1, …; lengths 0, 1, 1024 (a chunk) and 102400."""
    data = bytes(i % 251 for i in range(102_400))
    digests = {
        0: "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262",
        1: "2d3adedff11b61f14c886e35afa036736dcd87a74d27b5c1510225d0f592e213",
        1024: "42214739f095a406f3fc83deb889744ac00df831c10daa55189b5d121c855af7",
        102_400: "bc3e3d41a1146b069abffad3c0d44860cf664390afce4d9661f7902e7943e085",
    }
    assert {size: of_bytes(data[:size], "blake3") for size in digests} == {k: f"blake3:{v}" for k, v in digests.items()}


def test_without_digests_no_source_is_read_twice_and_verify_still_compares_every_byte(run: Run, tmp_path: Path):
    for step in (1, 2, 3):
        save_file({"w": torch.full((4,), float(step))}, tmp_path / f"s-{step}.safetensors")
    assert run("swa", ".", "-o", "with.safetensors").returncode == 0
    assert run("swa", ".", "--digests", "none", "-o", "without.safetensors").returncode == 0
    assert load_file(tmp_path / "without.safetensors")["w"].tolist() == [2.0] * 4
    with safe_open(tmp_path / "without.safetensors", "pt") as stored:
        record = json.loads(stored.metadata()["ckptavg"])
    assert [source["digests"] for source in record["sources"]] == [{f"s-{step}.safetensors": ""} for step in (1, 2, 3)]
    for name in ("with.safetensors", "without.safetensors"):
        assert run("verify", name, "--sources", ".").returncode == 0
    save_file({"w": torch.full((4,), 9.0)}, tmp_path / "s-3.safetensors")
    done = run("verify", "with.safetensors", "--sources", ".")
    assert done.returncode == 3 and "its BLAKE3 differs" in done.stderr
    done = run("verify", "without.safetensors", "--sources", ".")
    assert done.returncode == 3 and "w: 1 tensor not equal to the average of the sources" in done.stderr


def test_a_search_without_digests(run: Run, digits: Path, tmp_path: Path):
    done = run("soup", digits, "--last", 3, "--task", TASK, "--digests", "none", "--no-baselines")
    assert done.returncode == 0, done.stderr
    assert run("verify", "averaged.safetensors", "--sources", digits).returncode == 0
