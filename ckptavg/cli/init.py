"""``ckptavg init``: write a commented task file that runs unchanged."""

import os
from pathlib import Path
from typing import Annotated, Final

import typer

from ckptavg.errors import OutputExistsError

TEMPLATE: Final = Path(__file__).parents[1] / "tasks" / "template.py"


def command(
    path: Annotated[Path, typer.Argument(help="File to write.", readable=False)] = Path("task.py"),
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Write a commented task file to fill in."""
    from ckptavg.cli.terminal import Screen, write_text

    if os.path.lexists(path) and not force:
        raise OutputExistsError("exists already", path=path, hint="--force replaces it")
    write_text(path, TEMPLATE.read_text(encoding="utf-8"))
    Screen().print("Fill in model(), loss() and the loaders, then: ckptavg sewa ./ckpts --k 5")
    print(path)
