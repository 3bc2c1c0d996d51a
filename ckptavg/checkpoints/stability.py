"""Wait until a running job has stopped writing checkpoints, and warn about files that changed recently."""

import math
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.checkpoints.components import LeftOut
from ckptavg.checkpoints.listing import list_checkpoints
from ckptavg.checkpoints.window import Window
from ckptavg.filesystem.regular_file import is_folder
from ckptavg.runtime import signals
from ckptavg.runtime.progress import Watch

SETTLED: Final = 60.0  # seconds without a change after which a file counts as complete
_LOOK_EVERY: Final = 1.0  # seconds


def wait(paths: Sequence[Path], window: Window, seconds: float, watch: Watch | None) -> None:
    """Block until no file of a candidate has changed, appeared or vanished for ``seconds``.

    Files that are left out as unfinished count too. Only the initial time since the last change comes from the files
    (their ctime, which cannot be set); later changes are observed, so a wrong clock can only delay the return.
    ``paths`` are those of `ckptavg.checkpoints.discover.discover`; the globs of ``window`` select the names that count.
    """
    seen = _state(paths, window)
    newest = max((changed for _, _, changed in seen.values()), default=0) / 1e9
    quiet_since = time.monotonic() - min(seconds, max(0.0, time.time() - newest))
    while (quiet := time.monotonic() - quiet_since) < seconds:
        signals.check()
        if watch:
            watch("waiting for the job to stop saving", int(quiet), math.ceil(seconds), {})
        time.sleep(min(_LOOK_EVERY, seconds - quiet))
        if (now := _state(paths, window)) != seen:
            seen, quiet_since = now, time.monotonic()


def warnings(checkpoints: Sequence[Checkpoint]) -> tuple[str, ...]:
    """Return a warning if a candidate changed within the last `SETTLED` seconds."""
    ages = ((time.time() - file.changed, one.path) for one in checkpoints for file in one.reader.files)
    age, path = min(ages, default=(SETTLED, Path()))
    if not 0 <= age < SETTLED:
        return ()
    return (f"{path} changed {age:.0f} s ago: if a job is still saving, --wait-stable {SETTLED:.0f} waits for it",)


def _state(paths: Sequence[Path], window: Window) -> dict[Path, tuple[int, int, int]]:
    """File → (inode, size, ctime in ns)."""
    found: dict[Path, tuple[int, int, int]] = {}
    left_out: list[LeftOut] = []
    for order, path in enumerate(paths):
        places = list_checkpoints(path, order, left_out, window).places
        wanted = [place.path for place in places if window.admits(place.name)]
        wanted += [one.path for one in left_out if one.kind == "warning" and window.admits(one.path.name)]
        inside = (Path(folder) / name for place in wanted for folder, _, names in os.walk(place) for name in names)
        for file in (*(place for place in wanted if not is_folder(place)), *inside):
            with suppress(OSError):  # gone meanwhile, or not to be opened either
                status = file.stat()
                found[file] = (status.st_ino, status.st_size, status.st_ctime_ns)
    return found
