"""Commands measured as whole processes, in alternating rounds, and the targets that figures are compared with."""

import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple


class Used(NamedTuple):
    """Wall-clock seconds, CPU seconds, peak memory in MB, and GB that came from the disk."""

    seconds: float
    processor: float
    peak: float
    read: float


Runs = Mapping[str, Sequence[Used]]


def measure(command: str, environment: Mapping[str, str] | None = None, folder: Path | None = None) -> Used:
    """Run ``command`` with bash; if its output is two numbers, they replace the measured seconds.

    The peak is that of the largest process, pages of mapped files included.

    Raises:
        SystemExit: if it fails, with the end of its stderr.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        start = time.perf_counter()
        running = subprocess.Popen(["/bin/bash", "-c", command], stdout=out, stderr=err, env=environment, cwd=folder)
        _, status, usage = os.wait4(running.pid, 0)
        seconds = time.perf_counter() - start
        running.returncode = os.waitstatus_to_exitcode(status)
        if running.returncode:
            err.seek(0)
            raise SystemExit(f"failed with {running.returncode}: {command}\n{err.read()[-500:]}")
        out.seek(0)
        printed = out.read(1000).split()
    timed = [float(word) for word in printed] if len(printed) == 2 else [seconds, usage.ru_utime + usage.ru_stime]
    return Used(timed[0], timed[1], usage.ru_maxrss / 1000, usage.ru_inblock * 512 / 1e9)


def alternate(commands: Mapping[str, str], rounds: Mapping[str, int], before: Callable[[], object]) -> Runs:
    """Run each command ``rounds`` times, in turns, each after ``before``, with no unwritten pages left over."""
    runs: dict[str, list[Used]] = {name: [] for name in commands}
    for number in range(max(rounds.values())):
        for name, command in commands.items():
            if number < rounds[name]:
                os.sync()
                before()
                runs[name].append(measure(command))
    return runs


def middle(runs: Sequence[Used]) -> Used:
    """Return the median of each figure."""
    return Used(*map(statistics.median, zip(*runs, strict=True)))


def ratio(runs: Runs, name: str, base: str) -> float:
    """Return the median ratio of wall-clock seconds, over the rounds in which both ran."""
    return statistics.median(a.seconds / b.seconds for a, b in zip(runs[name], runs[base], strict=False))


def evict(paths: Sequence[Path]) -> None:
    """Remove the pages of ``paths`` from the page cache, so that the next reads come from the disk."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def target(what: str, value: float, most: float, unit: str, digits: int = 2) -> None:
    """Print a line that page.py moves to the table of targets: what, at most, reached."""
    reached = f"{value:.{digits}f} {unit}"
    print(
        f"target | {what} | ≤ {most:.{digits}f} {unit} | {reached if value <= most else f'**{reached}**'}", flush=True
    )
