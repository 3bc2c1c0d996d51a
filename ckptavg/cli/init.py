"""``ckptavg init``: write a commented task file, or a script for ``--score-cmd``, to fill in."""

import os
import shlex
from pathlib import Path
from typing import Annotated, Final

import typer

from ckptavg.errors import OutputExistsError, UsageError

_FOLDER: Final = Path(__file__).parents[1] / "tasks" / "templates"
TEMPLATE: Final = _FOLDER / "task.py"
_EDIT: Final = "ill in the lines marked EDIT, then:\n  "
_TEXTS: Final = "Texts need no task file:\n  ckptavg sewa ./run --k 5 --val val.jsonl -o averaged/\n"
# option → its template, and what to do with the file, which is called FILE
_CHOICES: Final = {
    "": ("task", "Fill in model(), loss() and the loaders, then:\n  ckptavg sewa ./ckpts --k 5 --task FILE"),
    "--hf": ("hugging_face", f"{_TEXTS}Else f{_EDIT}ckptavg sewa ./run --k 5 --task FILE -o averaged/"),
    "--peft": ("peft", f"{_TEXTS}Else f{_EDIT}ckptavg sewa ./run --k 5 --task FILE -o averaged/"),
    "--lightning": ("lightning", f"F{_EDIT}ckptavg sewa ./ckpts --k 5 --task FILE"),
    "--score-cmd": ("score_command", f"F{_EDIT}ckptavg soup ./ckpts --score-cmd COMMAND"),
}


def command(
    path: Annotated[
        Path | None,
        typer.Argument(help="File to write; default task.py, or eval.py with --score-cmd.", readable=False),
    ] = None,
    hf: Annotated[bool, typer.Option("--hf", help="For a model of transformers' Trainer.")] = False,
    peft: Annotated[bool, typer.Option("--peft", help="For an adapter of PEFT.")] = False,
    lightning: Annotated[bool, typer.Option("--lightning", help="For a Lightning module.")] = False,
    # not `score_cmd`, which a configuration file may set to a command
    script: Annotated[bool, typer.Option("--score-cmd", help="A script that prints the score of a file.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Write a commented task file to fill in."""
    from rich.text import Text

    from ckptavg.cli.terminal import Screen
    from ckptavg.filesystem.atomic import write_text

    chosen = [name for name, on in zip([*_CHOICES][1:], (hf, peft, lightning, script), strict=True) if on]
    if len(chosen) > 1:
        raise UsageError(f"{' and '.join(chosen)} are two templates", hint="write one file for each")
    path = path or Path("eval.py" if script else "task.py")
    if os.path.lexists(path) and not force:
        raise OutputExistsError("exists already", path=path, hint="--force replaces it")
    template, text = _CHOICES["".join(chosen)]
    write_text(path, (_FOLDER / f"{template}.py").read_text(encoding="utf-8"))
    if path == Path("task.py"):
        text = text.replace(" --task FILE", "")  # found without
    name = shlex.quote(str(path))
    text = text.replace("FILE", name).replace("COMMAND", shlex.quote(f"python {name} {{}}"))
    Screen().print(Text(text, no_wrap=True, overflow="ignore"))  # a command is copied
    print(path)
