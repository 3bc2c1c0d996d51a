"""Rate of cold reads by number in flight, block size and read-ahead: python scripts/benchmark/reads.py build/benchmark

Files are read as an average reads its candidates: a block of one file after a block of the other, each thread with one
read in flight. O_DIRECT shows what the disk can do; buffered reads, whose pages were evicted first, what a program gets
of it: without advice, with POSIX_FADV_SEQUENTIAL (twice the kernel's read-ahead), with POSIX_FADV_RANDOM (none), and
with POSIX_FADV_WILLNEED for what lies `AHEAD` of each block. "read" is what came from the disk, of what was to be read.
"""

import argparse
import mmap
import os
import resource
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import NamedTuple

from processes import evict

AHEAD = 8 << 20  # bytes
ADVICE = {
    "direct": None,
    "buffered": os.POSIX_FADV_NORMAL,
    "sequential": os.POSIX_FADV_SEQUENTIAL,
    "willneed": os.POSIX_FADV_NORMAL,
    "random": os.POSIX_FADV_RANDOM,
}


class Rate(NamedTuple):
    """Gigabytes and CPU seconds: per second, per gigabyte, and the share of the bytes that came from the disk."""

    gigabytes: float
    processor: float
    read: float


def measured(paths: Sequence[Path], how: str, depth: int, block: int) -> Rate:
    """Read all of ``paths``, of equal size, in ``depth`` threads."""
    evict(paths)
    flags = os.O_RDONLY | (os.O_DIRECT if how == "direct" else 0)
    files = [os.open(path, flags) for path in paths]
    size, advice = paths[0].stat().st_size, ADVICE[how]
    for fd in files if advice is not None else ():
        os.posix_fadvise(fd, 0, 0, advice)
    blocks: SimpleQueue[tuple[int, int]] = SimpleQueue()
    for offset, fd in product(range(0, size, block), files):
        blocks.put((fd, offset))

    def read_all() -> None:
        with mmap.mmap(-1, block) as buffer:  # aligned to pages, as O_DIRECT demands
            while True:
                try:
                    fd, offset = blocks.get_nowait()
                except Empty:
                    return
                if how == "willneed":
                    first = 0 if offset == 0 else offset + AHEAD
                    os.posix_fadvise(fd, first, offset + AHEAD + block - first, os.POSIX_FADV_WILLNEED)
                assert os.preadv(fd, [buffer], offset) == min(block, size - offset)

    before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    with ThreadPoolExecutor(depth) as pool:
        for done in [pool.submit(read_all) for _ in range(depth)]:
            done.result()
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    for fd in files:
        os.close(fd)
    total = size * len(files)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Rate(total / seconds / 1e9, used / total * 1e9, (after.ru_inblock - before.ru_inblock) * 512 / total)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for the files, on the disk to be measured")
    parser.add_argument("--files", type=int, default=8)
    parser.add_argument("--megabytes", type=int, default=128, help="of each file")
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--blocks", type=float, nargs="+", default=[0.25, 1, 4], help="in MiB")
    parser.add_argument("--how", nargs="+", choices=ADVICE, default=list(ADVICE))
    parser.add_argument("--rounds", type=int, default=1, help="the best is printed")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        paths = [Path(name) / str(i) for i in range(options.files)]
        for path in paths:
            with path.open("wb") as file:
                for _ in range(options.megabytes):
                    file.write(os.urandom(1 << 20))
        print(f"{options.files} files of {options.megabytes} MiB")
        print(f"{'GB/s (CPU s/GB)':10} {'MiB':>5}" + "".join(f"{depth:>13}" for depth in options.depths) + "   read")
        for how, megabytes in product(options.how, options.blocks):
            rates: list[Rate] = []
            for depth in options.depths:
                runs = [measured(paths, how, depth, int(megabytes * 2**20)) for _ in range(options.rounds)]
                rates.append(max(runs))
            figures = "".join(f"{rate.gigabytes:6.2f} ({rate.processor:4.2f})" for rate in rates)
            print(f"{how:15} {megabytes:5} {figures}  {min(rate.read for rate in rates):4.0%}", flush=True)


if __name__ == "__main__":
    main()
