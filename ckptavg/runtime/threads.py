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
import sys
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Final

from ckptavg.runtime import cgroups

# long enough that threads still spin when the next operation begins: with 0 (OMP_WAIT_POLICY=PASSIVE) or 1,000
# iterations they sleep by then, and small networks are slower even on an idle machine
_SPINS: Final = 10_000
# each of these sets how threads of libgomp or libiomp (Intel's and LLVM's) wait
_WAITING: Final = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
# each of these sets the number of torch's threads
_COUNTS: Final = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def affinity() -> int:
    """Return the number of processors in this process's affinity mask; all of the machine where masks do not exist."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def quota(proc: Path = cgroups.PROC) -> float | None:
    """Return the CPU quota of this process's control group in processors, such as 1.5; None without a quota.

    The quota is the minimum of the limits of the group and its ancestors, as far as they are mounted: ``cpu.max`` in
    version 2, ``cpu.cfs_quota_us`` / ``cpu.cfs_period_us`` in version 1. A limit that cannot be read is ignored.
    """
    return min((limit for folder in cgroups.groups("cpu", proc) if (limit := _limit(folder)) is not None), default=None)


def processors(proc: Path = cgroups.PROC) -> int:
    """Return the number of threads to compute with: `affinity`, or `quota` rounded to an integer if that is less.

    A half is rounded up: with 1.5 processors two threads took 0.7 × the time of one for matrix products, and 1.1 × for
    training steps of a small network, whose parallel regions wait for throttled threads.
    """
    limit = quota(proc)
    return affinity() if limit is None else min(affinity(), max(1, math.floor(limit + 0.5)))


def count(environment: Mapping[str, str] = os.environ) -> int:
    """Return the number of threads of an average: torch's, or what it would have, and at most `processors`."""
    if torch := sys.modules.get("torch"):
        return min(torch.get_num_threads(), processors())
    asked = next((environment[name] for name in _COUNTS if environment.get(name, "").isdecimal()), "")
    return max(1, min(int(asked), processors())) if asked else processors()


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


def _limit(folder: Path) -> float | None:
    """Return the limit of one control group in processors, None if it is unlimited."""
    limit, period = [*cgroups.read(folder / "cpu.max").split(), "", ""][:2]
    if not limit:
        limit, period = cgroups.read(folder / "cpu.cfs_quota_us"), cgroups.read(folder / "cpu.cfs_period_us")
    if not (limit.strip().isdecimal() and period.strip().isdecimal()):  # "max" in version 2, -1 in version 1
        return None
    return int(limit) / int(period) if int(period) else None
