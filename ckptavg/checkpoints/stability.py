"""Wait until checkpoints of a running job are complete, and warn about files that changed recently."""

import math
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, TypeAlias

from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.checkpoints.components import LeftOut
from ckptavg.checkpoints.listing import list_checkpoints
from ckptavg.checkpoints.window import Window
from ckptavg.filesystem.regular_file import is_folder
from ckptavg.runtime import signals
from ckptavg.runtime.progress import Watch

SETTLED: Final = 60.0  # seconds without a change after which a file counts as complete
_LOOK_EVERY: Final = 1.0  # seconds

Files: TypeAlias = dict[Path, tuple[int, int, int]]
"""File → (inode, size, ctime in ns)."""


def wait(paths: Sequence[Path], window: Window, seconds: float, watch: Watch | None) -> None:
    """Block until no file of a candidate has changed, appeared or vanished for ``seconds``.

    Files that are left out as unfinished count too. Only the initial time since the last change comes from the files
    (their ctime, which cannot be set); later changes are observed, so a wrong clock can only delay the return.
    ``paths`` are those of `ckptavg.checkpoints.discover.discover`; the globs of ``window`` select the names that count.
    """
    seen, unfinished = _state(paths, window)
    seen |= unfinished
    quiet_since = time.monotonic() - min(seconds, min(map(_age, seen.values()), default=seconds))
    while (quiet := time.monotonic() - quiet_since) < seconds:
        signals.check()
        if watch:
            watch("waiting for the job to stop saving", int(quiet), math.ceil(seconds), {})
        time.sleep(min(_LOOK_EVERY, seconds - quiet))
        now, unfinished = _state(paths, window)
        if (now := now | unfinished) != seen:
            seen, quiet_since = now, time.monotonic()


class Settling:
    """Checkpoints in ``paths``, each with the files that it had at the last `look`, and whether these are complete.

    Args:
        paths: see `wait`.
        window: see `wait`.
        seconds: time without a change after which a checkpoint is complete, unless its format's mark of that is absent.
    """

    def __init__(self, paths: Sequence[Path], window: Window, seconds: float) -> None:
        self._paths = paths
        self._window = window
        self._seconds = seconds
        self._since: dict[Path, float] = {}  # when it was first seen with its present files
        self._looked = False
        self._unfinished: dict[Path, Files] = {}
        self.files: dict[Path, Files] = {}

    def look(self) -> None:
        """List the checkpoints; those of the first look may have been complete for long, by their files' ctime."""
        before, now = self.files, time.monotonic()
        found, self._unfinished = _state(self._paths, self._window)
        self.files = found | self._unfinished
        since = {path: self._since.get(path, now) for path, files in self.files.items() if before.get(path) == files}
        aged = {path: now - _age(files) for path, files in self.files.items()} if not self._looked else {}
        self._looked = True
        self._since = {path: since.get(path, aged.get(path, now)) for path in self.files}

    @property
    def settled(self) -> dict[Path, Files]:
        """The complete ones."""
        return {path: files for path, files in self.files.items() if path not in self._unfinished and self._rests(path)}

    @property
    def changing(self) -> bool:
        """True if one has changed lately, complete or not."""
        return not all(map(self._rests, self.files))

    def _rests(self, path: Path) -> bool:
        return time.monotonic() - self._since[path] >= self._seconds


def _age(files: Files) -> float:
    """Return the seconds since the last change of a checkpoint; 0 if it is in the future."""
    return max(0.0, time.time() - max((changed for _, _, changed in files.values()), default=0) / 1e9)


def warnings(checkpoints: Sequence[Checkpoint]) -> tuple[str, ...]:
    """Return a warning if a candidate changed within the last `SETTLED` seconds."""
    ages = ((time.time() - file.changed, one.path) for one in checkpoints for file in one.reader.files)
    age, path = min(ages, default=(SETTLED, Path()))
    if not 0 <= age < SETTLED:
        return ()
    return (f"{path} changed {age:.0f} s ago: if a job is still saving, --wait-stable {SETTLED:.0f} waits for it",)


def _state(paths: Sequence[Path], window: Window) -> tuple[dict[Path, Files], dict[Path, Files]]:
    """Return the files of each checkpoint, and those of each that is left out as unfinished."""
    wanted: list[Path] = []
    left_out: list[LeftOut] = []
    for order, path in enumerate(paths):
        places = list_checkpoints(path, order, left_out, window).places
        wanted += [place.path for place in places if window.admits(place.name)]
    unfinished = [one.path for one in left_out if one.kind == "warning" and window.admits(one.path.name)]
    return _files(wanted), _files(unfinished)


def _files(places: Sequence[Path]) -> dict[Path, Files]:
    """Return the files of each place that has some."""
    state: dict[Path, Files] = {}
    for place in places:
        inside = [Path(folder) / name for folder, _, names in os.walk(place) for name in names]
        for file in inside if is_folder(place) else [place]:
            with suppress(OSError):  # gone meanwhile, or not to be opened either
                status = file.stat()
                state.setdefault(place, {})[file] = (status.st_ino, status.st_size, status.st_ctime_ns)
    return state
