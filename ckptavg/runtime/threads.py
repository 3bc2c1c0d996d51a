"""The processors this process may use, and the settings of OpenMP that follow from them.

A container's CPU quota is no mask of processors: OpenMP and torch count every processor of the machine and start as
many threads, which are then stopped for a part of each period. And a thread of libgomp that waits for another one
spins for 300,000 turns, 16 ms on the machine of docs/benchmarks.md, before it sleeps. Beside other programs the awaited
thread may be waiting for that very processor, so that a parallel region of microseconds takes milliseconds.

Both are decided by variables of the environment that are read once, when torch is loaded, so `settle` comes before
that. Nothing is changed where the user has decided, or a launcher such as ``torchrun``.

References:
    libgomp's manual, GOMP_SPINCOUNT, OMP_WAIT_POLICY and OMP_NUM_THREADS; `scripts/benchmark/busy.py`.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Iterator, MutableMapping
from pathlib import Path, PurePosixPath
from typing import Final

# long enough that threads still spin when the next operation begins: with 0 (OMP_WAIT_POLICY=PASSIVE) or 1,000 turns
# they sleep by then, and small networks are slower on an idle machine too
_SPINS: Final = 10_000
# of libgomp and of libiomp (Intel's and LLVM's): each of them decides how threads wait
_WAITING: Final = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
# each of them decides how many threads torch takes
_COUNTS: Final = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_PROC: Final = Path("/proc/self")


def affinity() -> int:
    """The number of processors in this process's affinity mask; all of the machine's where there are no masks."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def quota(proc: Path = _PROC) -> float | None:
    """The CPU quota of this process's control group in processors, such as 1.5; None where there is none.

    It is the least of the group's own limit and those of its ancestors, as far as they are mounted: ``cpu.max`` in
    version 2, ``cpu.cfs_quota_us`` by ``cpu.cfs_period_us`` in version 1. A limit that cannot be read is none.

    Args:
        proc: the directory of the process in ``/proc``.
    """
    limits = [limit for folder in _groups(proc) if (limit := _limit(folder)) is not None]
    return min(limits, default=None)


def processors(proc: Path = _PROC) -> int:
    """The number of threads that compute at a time: `affinity`, or the `quota` to the nearest integer if that is less.

    A half is rounded up. Two threads took 0.7 × the time of one for products of matrices with 1.5 processors, and 0.9 ×
    with 1.2; for training steps of a small network, whose parallel regions wait for threads that are stopped until the
    next period, 1.1 × with either (docs/benchmarks.md).

    Args:
        proc: as in `quota`.
    """
    limit = quota(proc)
    return affinity() if limit is None else min(affinity(), max(1, math.floor(limit + 0.5)))


def settle(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set OpenMP's variables for this process and those it starts, where nobody has set them; see the module.

    The number of threads is set only where it is less than the affinity mask has, which OpenMP knows of itself.
    Nothing is changed if torch is loaded already, for it would not read them any more. With libiomp in the place of
    libgomp threads wait as ever: KMP_BLOCKTIME and OMP_WAIT_POLICY made no difference there beyond noise.
    """
    if "torch" in sys.modules:
        return
    if not any(name in environment for name in _WAITING):
        environment["GOMP_SPINCOUNT"] = str(_SPINS)
    if not any(name in environment for name in _COUNTS) and (threads := processors()) < affinity():
        environment["OMP_NUM_THREADS"] = str(threads)  # torch's MKL takes no more than there are cores all the same


def _groups(proc: Path) -> Iterator[Path]:
    """The directories of this process's control groups with a CPU controller, each with its ancestors."""
    own: dict[str, str] = {}  # by controller; version 2 has the name ""
    for line in _read(proc / "cgroup").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        own |= dict.fromkeys(controllers.split(","), path)
    for line in _read(proc / "mountinfo").splitlines():
        fields, _, rest = line.partition(" - ")
        mount, kind = fields.split(), rest.split()
        if len(mount) < 5 or len(kind) < 3 or kind[0] not in ("cgroup", "cgroup2"):
            continue
        controller = "" if kind[0] == "cgroup2" else "cpu"
        if controller in own and (not controller or controller in kind[2].split(",")):
            yield from _upwards(Path(_unescaped(mount[4])), _unescaped(mount[3]), own[controller])


def _upwards(mounted: Path, root: str, path: str) -> Iterator[Path]:
    """The directory of group ``path`` and all above it, down from where group ``root`` is mounted.

    The one it is mounted at stands for a group that is not below ``root``, being of another namespace.
    """
    group = PurePosixPath(path)
    below = group.relative_to(root) if group.is_relative_to(root) and ".." not in group.parts else PurePosixPath()
    folder = mounted / below
    yield folder
    for _ in below.parts:
        folder = folder.parent
        yield folder


def _limit(folder: Path) -> float | None:
    """The processors that one control group may use, None for any number."""
    used, period = [*_read(folder / "cpu.max").split(), "", ""][:2]
    if not used:
        used, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
    if not (used.strip().isdecimal() and period.strip().isdecimal()):  # "max" in version 2, -1 in version 1
        return None
    return int(used) / int(period) if int(period) else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape")
    except (OSError, ValueError):
        return ""


def _unescaped(text: str) -> str:
    """A path of mountinfo, in which spaces are ``\\040``."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)
