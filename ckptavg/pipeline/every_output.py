"""Write the average of every strategy of a comparison to a directory, for ``--write-all``."""

import os
import re
import shutil
from collections.abc import Generator, Iterable, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from ckptavg.coefficients import Coefficients
from ckptavg.errors import OutputError, OutputExistsError, UsageError
from ckptavg.filesystem.regular_file import is_folder
from ckptavg.objective import Strategy
from ckptavg.options import Options
from ckptavg.output.destination import check_parent
from ckptavg.output.hugging_face_folder import created_folder
from ckptavg.pipeline.preflight import check_output, check_sources
from ckptavg.pipeline.session import Session
from ckptavg.pipeline.writing import WrittenOutput, write_output

_HINT = "--force replaces it; or choose another --write-all"


def plan(folder: Path | None, names: Iterable[str], this: Session) -> Mapping[str, Options]:
    """Return name → the options that write a strategy's average into ``folder``; empty if that is None.

    Raises:
        CkptavgError: if one of the files cannot be written, exists already, or would be written twice, or if ``folder``
            lies in the output or among the candidates.
    """
    if folder is None:
        return {}
    suffix = "" if this.options.format == "dcp" else ".safetensors"
    options = {
        name: replace(this.options, output=folder / f"{file_name(name)}{suffix}", max_shard_size=None) for name in names
    }
    output, whole = this.options.destination[0].resolve(), folder.resolve()
    if output in (whole, *whole.parents):
        raise UsageError(f"--write-all {folder} is -o, or in it", hint="choose another --write-all")
    if any(file.path.parent.resolve() == whole for found in this.checkpoints for file in found.reader.files):
        raise OutputError("has candidates in it", path=folder, hint="choose another --write-all")
    taken = {output: "-o"}
    for name, own in options.items():
        path = own.destination[0].resolve()
        if path in taken:
            hint = "choose another --write-all, or leave one of them out"
            raise UsageError(f"{taken[path]} and {name} would both be written to {own.output}", hint=hint)
        taken[path] = name
    this.run.workers.on_rank_zero(lambda: _check(folder, options))
    for own in options.values():
        check_sources(this.found, own)
    return options


def _check(folder: Path, options: Mapping[str, Options]) -> None:
    if not is_folder(folder):
        if os.path.lexists(folder):
            raise OutputError("is not a directory", path=folder, hint="choose another --write-all")
        check_parent(folder)
        return
    for own in options.values():
        try:
            check_output(own)
        except OutputExistsError as error:
            error.hint = _HINT
            raise


@contextmanager
def written(
    this: Session, folder: Path | None, averages: Mapping[str, tuple[Coefficients, Strategy, Options]]
) -> Generator[Mapping[str, WrittenOutput]]:
    """Write each average into ``folder`` and yield name → file; new files are removed again if the body fails."""
    leads = this.run.workers.is_rank_zero
    with created_folder(folder if leads else None), ExitStack() as undo:
        files: dict[str, WrittenOutput] = {}
        for name, (coefficients, strategy, options) in averages.items():
            path = options.destination[0]
            is_new = leads and not os.path.lexists(path)
            files[name] = write_output(replace(this, options=options), coefficients, strategy)
            if is_new:
                undo.callback(_remove, path)
        yield files
        undo.pop_all()


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):
        path.unlink(missing_ok=True)


def file_name(spec: str) -> str:
    """Return a strategy's spec as a name for any file system and shell: ``sewa:k=8`` is ``sewa-k=8``."""
    return re.sub(r"[^\w.=+-]+", "-", spec)
