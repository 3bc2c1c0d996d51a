"""Number of processors available to this process, and the OpenMP settings that follow from it.

A container's CPU quota is not an affinity mask: OpenMP and torch count every processor of the machine and start as many
threads, which are then throttled for a part of each period. In addition, a libgomp thread that waits for another one
spins for 300,000 iterations, 16 ms on the machine of docs/benchmarks.md, before it sleeps. On a busy machine the other
thread may be queued for that same processor, so that a parallel region of microseconds takes milliseconds.

Both are controlled by environment variables that are read once, when torch is loaded, so `configure` must run before
that. Variables set by the user, or by a launcher such as ``torchrun``, are kept.

References:
    libgomp manual, GOMP_SPINCOUNT, OMP_WAIT_POLICY and OMP_NUM_THREADS; `scripts/benchmark/busy.py`.
"""

import math
import os
import re
import sys
from collections.abc import Iterator, MutableMapping
from pathlib import Path, PurePosixPath
from typing import Final

# long enough that threads still spin when the next operation begins: with 0 (OMP_WAIT_POLICY=PASSIVE) or 1,000
# iterations they sleep by then, and small networks are slower even on an idle machine
_SPINS: Final = 10_000
# each of these sets how threads of libgomp or libiomp (Intel's and LLVM's) wait
_WAITING: Final = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
# each of these sets the number of torch's threads
_COUNTS: Final = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_PROC: Final = Path("/proc/self")
_ESCAPE: Final = re.compile(r"\\([0-7]{3})")  # mountinfo writes a space in a path as \040


def affinity() -> int:
    """Return the number of processors in this process's affinity mask; all of the machine where masks do not exist."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def quota(proc: Path = _PROC) -> float | None:
    """Return the CPU quota of this process's control group in processors, such as 1.5; None without a quota.

    The quota is the minimum of the limits of the group and its ancestors, as far as they are mounted: ``cpu.max`` in
    version 2, ``cpu.cfs_quota_us`` / ``cpu.cfs_period_us`` in version 1. A limit that cannot be read is ignored.
    """
    return min((limit for folder in _groups(proc) if (limit := _limit(folder)) is not None), default=None)


def processors(proc: Path = _PROC) -> int:
    """Return the number of threads to compute with: `affinity`, or `quota` rounded to an integer if that is less.

    A half is rounded up. Two threads took 0.7 × the time of one for matrix products with 1.5 processors, and 0.9 × with
    1.2; for training steps of a small network, whose parallel regions wait for threads throttled until the next period,
    1.1 × with either (docs/benchmarks.md).
    """
    limit = quota(proc)
    return affinity() if limit is None else min(affinity(), max(1, math.floor(limit + 0.5)))


def configure(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set OpenMP's variables for this process and its children, unless they are set already; see the module docstring.

    The number of threads is set only if it is less than the size of the affinity mask, OpenMP's default. Nothing is
    changed if torch is loaded already, because it has read the variables by then. libiomp, where it replaces libgomp,
    is left at its defaults: KMP_BLOCKTIME and OMP_WAIT_POLICY made no difference there beyond noise.
    """
    if "torch" in sys.modules:
        return
    if not any(name in environment for name in _WAITING):
        environment["GOMP_SPINCOUNT"] = str(_SPINS)
    if not any(name in environment for name in _COUNTS) and (threads := processors()) < affinity():
        environment["OMP_NUM_THREADS"] = str(threads)  # torch's MKL still uses at most one per core


def _groups(proc: Path) -> Iterator[Path]:
    """Yield the directories of this process's control groups with a CPU controller, each with its ancestors.

    They end at the mount point, which stands for a group of another namespace.
    """
    paths: dict[str, str] = {}  # controller → group; version 2 has the controller ""
    for line in _read(proc / "cgroup").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        paths |= dict.fromkeys(controllers.split(","), path)
    for line in _read(proc / "mountinfo").splitlines():
        fields, _, rest = line.partition(" - ")
        mount = [_ESCAPE.sub(lambda octal: chr(int(octal[1], 8)), field) for field in fields.split()]
        kind = rest.split()
        if len(mount) < 5 or len(kind) < 3 or kind[0] not in ("cgroup", "cgroup2"):
            continue
        controller = "" if kind[0] == "cgroup2" else "cpu"
        if controller in paths and (not controller or controller in kind[2].split(",")):
            mounted, root, group = Path(mount[4]), mount[3], PurePosixPath(paths[controller])
            inside = group.is_relative_to(root) and ".." not in group.parts
            below = group.relative_to(root) if inside else PurePosixPath()
            yield from (mounted / part for part in (below, *below.parents))


def _limit(folder: Path) -> float | None:
    """Return the limit of one control group in processors, None if it is unlimited."""
    limit, period = [*_read(folder / "cpu.max").split(), "", ""][:2]
    if not limit:
        limit, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
    if not (limit.strip().isdecimal() and period.strip().isdecimal()):  # "max" in version 2, -1 in version 1
        return None
    return int(limit) / int(period) if int(period) else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape")
    except (OSError, ValueError):
        return ""
