"""Which checkpoints become candidates, as the options want it: waited for, compared with sums, read to the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ckptavg import settling, soundness
from ckptavg.checkpoint import Checkpoint
from ckptavg.discover import Found, discover
from ckptavg.manifest import Manifest
from ckptavg.options import Options

if TYPE_CHECKING:
    from ckptavg.evaluator import Watch


def admitted(paths: Sequence[Path], options: Options, watch: Watch | None = None) -> Found:
    """The candidates under ``paths``, open.

    With ``skip_bad`` all of them are read to their ends before any of them is used, so that what is bad is not found
    out when others have been chosen already.

    Raises:
        InputError: if there are none, or one is bad and not to be skipped.
    """
    if options.wait_stable is not None:
        settling.wait(paths, options.window, options.wait_stable, watch)
    manifest, checked = Manifest(), 0

    def check(checkpoint: Checkpoint) -> None:
        nonlocal checked
        manifest.check(checkpoint)
        if options.skip_bad:
            soundness.check(checkpoint)
            checked += 1
            if watch:
                watch("checking candidates", checked, checked, {})

    found = discover(
        paths, options.window, options.key, bad="skip" if options.skip_bad else "refuse", check=check,
        allow_nonfinite=options.allow_nonfinite,
    )  # fmt: skip
    doubts = () if options.wait_stable is not None else settling.doubts(found.checkpoints)
    return replace(found, warnings=(*found.warnings, *manifest.doubts, *doubts))
