"""``ckptavg verify``: check that a file is the average its metadata describes."""

import json as json_module
from pathlib import Path
from typing import Annotated, Final

import typer

from ckptavg.cli.command import takes
from ckptavg.cli.options import NO_REPORT, named
from ckptavg.declaration import MAIN, Help, Option
from ckptavg.errors import InputError, counted

_FILE: Final = named("file", Annotated[Path, typer.Argument(help="An output of ckptavg.", readable=False)])
_SOURCES: Final = Option("sources", Path, Path(), Help(MAIN, "Directory that contains the source checkpoints."))


@takes(_SOURCES, *NO_REPORT, argument=_FILE)
def command(file: Path, sources: Path, json: bool, quiet: bool, verbose: bool) -> None:
    """Recompute the average from the sources in its metadata and compare the bytes."""
    from ckptavg.cli.terminal import Screen
    from ckptavg.pipeline.verification import verify

    verified = verify(file, sources)
    if json:
        print(json_module.dumps({"path": str(file), **vars(verified)}, indent=2))
    if differ := verified.differ:
        what = f"{counted(len(differ), 'tensor')} not equal to the average of the sources"
        raise InputError(what, path=file, tensor=differ[0])
    screen, unchecked = Screen(quiet=quiet), len(verified.unchecked)
    recomputed = f"; {unchecked} were recomputed from data and cannot be checked" if unchecked else ""
    agree = counted(len(verified.agree), "tensor")
    screen.print(f"{agree} equal to the average of the sources, byte for byte{recomputed}")
    if absent := len(verified.without_digest):
        screen.print(f"no digest of {counted(absent, 'source')}: recognised by name, step and content alone")
    if verified.own_strategy is not None:
        screen.print(f"{verified.own_strategy} is no strategy of ckptavg, so its settings were not checked")
    if not json:
        print(file)
