"""``ckptavg verify``: check that a file is the average its metadata describes."""

import json as json_module
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ckptavg.cli.command import command as as_command
from ckptavg.cli.options import NO_REPORT, named
from ckptavg.declaration import MAIN, Help, declared
from ckptavg.errors import InputError


@dataclass(frozen=True, kw_only=True)
class _Settings:
    sources: Annotated[Path, Help(MAIN, "Directory that contains the source checkpoints.")] = Path()


def _run(file: Path, sources: Path, json: bool, quiet: bool, verbose: bool) -> None:
    from ckptavg.cli.terminal import Screen
    from ckptavg.pipeline.verification import verify

    verified = verify(file, sources)
    if json:
        print(json_module.dumps({"path": str(file), **vars(verified)}, indent=2))
    if differ := verified.differ:
        raise InputError(f"{len(differ)} tensors are not the average of the sources", path=file, tensor=differ[0])
    unchecked = len(verified.unchecked)
    recomputed = f"; {unchecked} were recomputed from data and cannot be checked" if unchecked else ""
    agree = f"{len(verified.agree)} tensors agree byte for byte with the average of the sources"
    Screen(quiet=quiet).print(agree + recomputed)
    if not json:
        print(file)


command = as_command(
    _run,
    "verify",
    "Recompute the average from the sources in its metadata and compare the bytes.",
    [*declared(_Settings), *NO_REPORT],
    argument=named("file", Annotated[Path, typer.Argument(help="An output of ckptavg.", readable=False)]),
)
