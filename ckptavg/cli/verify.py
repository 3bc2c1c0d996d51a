"""``ckptavg verify``: is a file the average it says it is?"""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated

import typer

from ckptavg.cli.options import Json, Quiet, Verbose
from ckptavg.errors import InputError


def command(
    file: Annotated[Path, typer.Argument(help="An output of ckptavg.", readable=False)],
    sources: Annotated[Path, typer.Option(help="The directory its sources lie under.", readable=False)] = Path(),
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Recompute the average from the sources its metadata names, and compare bytes."""
    from ckptavg.cli.terminal import Screen
    from ckptavg.pipeline.verification import verify

    found = verify(file, sources)
    if json:
        lists = {"agree": list(found.agree), "differ": list(found.differ), "unchecked": list(found.unchecked)}
        print(json_module.dumps({"path": str(file), **lists}, indent=2))
    if found.differ:
        raise InputError(
            f"{len(found.differ)} tensors are not the average of the sources", path=file, tensor=found.differ[0]
        )
    recomputed = f"; {len(found.unchecked)} were recomputed from data and cannot be checked" if found.unchecked else ""
    Screen(quiet=quiet).print(
        f"{len(found.agree)} tensors agree byte for byte with the average of the sources{recomputed}"
    )
    if not json:
        print(file)
