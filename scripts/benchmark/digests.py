"""Measure digests of 1 GB, in memory and in a file in the page cache: python scripts/benchmark/digests.py

Each figure is the best of several rounds, in which the digests alternate. XXH3, which is not cryptographic, is measured
for comparison if xxhash is installed. A file is read into a buffer of 1 MiB, as ckptavg reads, or with all threads as
ckptavg checks the data of an output: 4 MiB, of which another thread reads the next.
"""

import argparse
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ckptavg.filesystem.digest import hasher
from ckptavg.filesystem.regular_file import RegularFile
from ckptavg.output.data_digest import digest_of
from ckptavg.runtime.threads import processors

PART = 1 << 20


def hashers() -> Mapping[str, Callable[[], Any]]:
    """Return name → constructor of a hasher."""
    found: dict[str, Callable[[], Any]] = {
        "SHA-256": lambda: hasher("sha256"),
        "BLAKE3, one thread": lambda: hasher("blake3"),
        f"BLAKE3, {processors()} threads": lambda: hasher("blake3", processors()),
    }
    if find_spec("xxhash"):
        import xxhash

        found["XXH3"] = xxhash.xxh3_128
    return found


def from_memory(made: Any, data: memoryview, part: int) -> None:
    """Hash bytes in memory."""
    for start in range(0, len(data), part):
        made.update(data[start : start + part])
    made.hexdigest()


def from_file(made: Any, file: RegularFile) -> None:
    """Hash a file through one buffer."""
    buffer = memoryview(bytearray(PART))
    for start in range(0, file.size, PART):
        part = buffer[: file.size - start]
        file.fill(start, part)
        made.update(part)
    made.hexdigest()


def measured(work: Callable[[], object], size: int) -> tuple[float, float]:
    """Return (seconds, CPU seconds) for each GB."""
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    work()
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds / size * 1e9, used / size * 1e9


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    size = options.megabytes * 10**6
    data = memoryview(os.urandom(size))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        path.write_bytes(data)
        with RegularFile(path) as file:
            works: dict[tuple[str, str], Callable[[], object]] = {}
            for name, make in hashers().items():
                threads = name.endswith("threads")
                part = 4 * PART if threads else PART
                works[name, "memory"] = lambda make=make, part=part: from_memory(make(), data, part)
                works[name, "page cache"] = lambda make=make: from_file(make(), file)
                if threads:
                    works[name, "page cache"] = partial(digest_of, file.fill, size, "blake3")
            times: dict[tuple[str, str], list[tuple[float, float]]] = {key: [] for key in works}
            for _ in range(options.rounds):
                for key, work in works.items():
                    times[key].append(measured(work, size))
    print(f"{'':20}  {'from':10}  {'GB/s':>5}  CPU s/GB")
    for (name, place), pairs in times.items():
        seconds, used = (min(column) for column in zip(*pairs, strict=True))
        print(f"{name:20}  {place:10}  {1 / seconds:5.2f}  {used:8.3f}")


if __name__ == "__main__":
    main()
