"""Small JSON files beside checkpoints: their content is as little to be trusted as theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from ckptavg.errors import InputError
from ckptavg.readers.regular_file import RegularFile
from ckptavg.readers.safetensors import strict_json

MAX_SIZE: Final = 64 << 20


def read_json(path: Path) -> Any:
    """What the file at ``path`` says.

    Raises:
        InputError: naming the file, if it is no regular file of at most `MAX_SIZE` bytes, or not strict JSON.
    """
    with RegularFile(path) as file:
        try:
            if file.size > MAX_SIZE:
                raise ValueError(f"{file.size} bytes, more than {MAX_SIZE}")
            return strict_json(file.read(0, file.size).decode())
        except (ValueError, RecursionError) as error:
            raise InputError(f"is not valid JSON: {error}", path=path) from error
