"""Cost of safety: averages with and without digests, checksums, fsync and the checks for changed files.

    cost.py --candidates 10 --megabytes 256 --rounds 5

Rounds alternate; medians of wall-clock and CPU seconds are printed as JSON, with the memory that an average adds to
its process's own, and the time to open files of 100,000 tensors; with ``--table`` the cost alone, as a table. "Without"
is `digests="none"`, and replaces, in this process, the CRC-32 of torch's records, fsync and `check_unchanged`; all
other code is the same. ``--cold`` evicts the candidates from the page cache before each average, as after a
long training. On a shared machine, CPU time is the relevant figure.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing import Process
from pathlib import Path
from unittest.mock import patch

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
MOST = {False: 60, True: 10}  # percent of wall-clock time: from the page cache, and from the disk
sys.path[:0] = [str(ROOT), str(ROOT / "scripts" / "benchmark")]

from processes import evict, target  # noqa: E402

import ckptavg  # noqa: E402
from ckptavg.filesystem import regular_file  # noqa: E402
from ckptavg.readers import open_reader  # noqa: E402
from ckptavg.readers.torch_zip import checked_records  # noqa: E402


def read_unchecked(self: checked_records.CheckedRecord, start: int, out: memoryview, *, stop: int) -> None:
    self.file.read_into(self.start + start, out)


@contextmanager
def careless() -> Iterator[None]:
    """Disable the measured safety features."""
    with ExitStack() as stack:
        for owner, name, put in (
            (os, "fsync", lambda fd: None),
            (checked_records.CheckedRecord, "read_into", read_unchecked),
            (regular_file.RegularFile, "check_unchanged", lambda self: None),
        ):
            stack.enter_context(patch.object(owner, name, put))
        yield


def make(folder: Path, candidates: int, megabytes: int, kind: str) -> None:
    """Write checkpoints of tensors of 16 MB."""
    folder.mkdir()
    draws = torch.Generator().manual_seed(0)
    for step in range(1, candidates + 1):
        count = max(1, megabytes // 16)
        state = {f"layer.{i}.weight": torch.randn(2048, 2048, generator=draws) for i in range(count)}
        if kind == "safetensors":
            save_file(state, folder / f"step-{step}.safetensors")
        else:
            torch.save(state, folder / f"step-{step}.pt")


def opened(folder: Path, tensors: int) -> dict[str, float]:
    """Return the seconds to open a file of ``tensors`` tensors of two numbers, by format."""
    state = {f"layer.{i}.weight": torch.zeros(2) for i in range(tensors)}
    save_file(state, folder / "many.safetensors")
    torch.save(state, folder / "many.pt")
    found: dict[str, float] = {}
    for path in (folder / "many.safetensors", folder / "many.pt"):
        began = time.monotonic()
        open_reader(path).close()
        found[f"open_{tensors}_tensors{path.suffix}"] = round(time.monotonic() - began, 2)
    return found


def peak() -> int:
    """Return the peak memory of this process in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def measured(folder: Path, output: Path, cold: bool, **options: object) -> tuple[float, float]:
    """Return the (wall-clock, CPU) seconds of an average."""
    os.sync()
    evict(list(folder.iterdir()) if cold else [])
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
    ckptavg.swa(folder, output=output, force=True, **options)
    seconds, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_SELF)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, default=10)
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kind", choices=("safetensors", "torch"), default="safetensors")
    parser.add_argument("--cold", action="store_true", help="read from the disk")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--folder", type=Path, default=None, help="for the files; a temporary one by default")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        ckpts, output = Path(folder) / "ckpts", Path(folder) / "out.safetensors"
        maker = Process(target=make, args=(ckpts, options.candidates, options.megabytes, options.kind))
        maker.start()  # in a separate process, so that its memory is not counted in ours
        maker.join()
        before = peak()
        measured(ckpts, output, options.cold)
        beyond = peak() - before
        safe, bare = list[tuple[float, float]](), list[tuple[float, float]]()
        for _ in range(options.rounds):
            safe.append(measured(ckpts, output, options.cold))
            with careless():
                bare.append(measured(ckpts, output, options.cold, digests="none"))
        many = {} if options.table else opened(Path(folder), 100_000)
    found: dict[str, float] = {
        f"{name}_{kind}": round(statistics.median(one[i] for one in times), 3)
        for i, name in enumerate(("wall", "processor"))
        for kind, times in (("safe", safe), ("bare", bare))
    }
    for name in ("wall", "processor"):
        found[f"{name}_cost_percent"] = round(100 * (found[f"{name}_safe"] / found[f"{name}_bare"] - 1), 1)
    if options.table:
        where = f"{options.candidates} × {options.megabytes} MiB, {'cold' if options.cold else 'warm'}"
        print(f"{where:26} {'safe':>8} {'bare':>8} {'cost':>8}")
        for name, label in (("wall", "wall-clock s"), ("processor", "CPU s")):
            print(f"{label:26} {found[f'{name}_safe']:8.2f} {found[f'{name}_bare']:8.2f} "
                  f"{found[f'{name}_cost_percent']:6.1f} %")  # fmt: skip
        target(f"cost of safety, {where}", found["wall_cost_percent"], MOST[options.cold], "%", 0)
        return 0
    found |= {"rounds": options.rounds, "cold": options.cold, "threads": torch.get_num_threads()}
    found |= {"memory_mb": beyond, "model_mb": options.megabytes, **many}
    print(json.dumps(found, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
