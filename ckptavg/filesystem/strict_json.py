"""Read small JSON files that accompany checkpoints; their content is untrusted."""

import json
from pathlib import Path
from typing import Any, Final, NoReturn

from ckptavg.errors import InputError
from ckptavg.filesystem.regular_file import RegularFile

MAX_SIZE: Final = 64 << 20


def read_json(path: Path) -> Any:
    """Parse a JSON file; raises InputError if it is not regular, larger than `MAX_SIZE` or not strict JSON."""
    with RegularFile(path) as file:
        try:
            if file.size > MAX_SIZE:
                raise ValueError(f"{file.size} bytes, more than {MAX_SIZE}")
            return strict_json(file.read(0, file.size).decode())
        except (ValueError, RecursionError) as error:
            raise InputError(f"is not valid JSON: {error}", path=path) from error


def strict_json(text: str) -> Any:
    """Parse JSON, rejecting duplicate keys, NaN and Infinity, which Python's parser accepts.

    Raises ValueError if it is not strict JSON, or RecursionError if it is nested too deep.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise ValueError(f"key {key!r} occurs twice")
            result[key] = value
        return result

    def constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not allowed")

    return json.loads(text, object_pairs_hook=unique, parse_constant=constant)
