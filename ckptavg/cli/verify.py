"""``ckptavg verify``: check that a file is the average its metadata describes."""

from pathlib import Path
from typing import Annotated, Final

import typer

from ckptavg.cli.command import command_line, takes
from ckptavg.cli.options import NO_REPORT, named
from ckptavg.declaration import MAIN, Help, Option
from ckptavg.errors import InputError, counted

_FILE: Final = named("file", Annotated[Path, typer.Argument(help="An output of ckptavg.", readable=False)])
_SOURCES: Final = Option("sources", Path, None, Help(MAIN, "Directory that contains the source checkpoints."))


@takes(_SOURCES, *NO_REPORT, argument=_FILE)
def command(file: Path, sources: Path | None, json: bool, quiet: bool, verbose: bool) -> None:
    """Check the bytes: by their digest, and by the average of the sources in its metadata."""
    from ckptavg.cli.terminal import Screen
    from ckptavg.pipeline.verification import verify
    from ckptavg.report.as_json import to_json

    verified = verify(file, sources)
    if json:
        print(to_json(verified, command_line()))
    if differ := verified.differ:
        what = f"{counted(len(differ), 'tensor')} not equal to the average of the sources"
        raise InputError(what, path=file, tensor=differ[0])
    if damaged := verified.damaged:
        what = "the data are damaged: their digest is not the recorded one"
        raise InputError(what, path=file if len(damaged) == 1 and damaged[0] == file.name else file.parent / damaged[0])
    Screen(quiet=quiet).print(verified)
    if not json:
        print(file)
