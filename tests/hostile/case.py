"""One hostile input: how to build it, and the expected output of the command line."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GOOD = {"weight": ("F32", [2, 3]), "bias": ("F32", [2])}  # steps of the checkpoints beside the hostile one
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "BOOL": 1, "U8": 1, "C64": 8, "F8_E4M3": 1}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A hostile input beside two good checkpoints, or alone.

    Attributes:
        id: identifier of the case.
        build: writes it into the directory of checkpoints.
        at: path below that directory that the error line must name.
        message: pattern that the error must match, or the whole output if the input is read or left out.
        code: exit code of ``ckptavg swa``.
        inspect: exit code of ``ckptavg inspect``, which reads headers only and goes on after a bad file.
        options: further options of ``swa``.
        alone: whether no good checkpoints are beside it.
        tree: whether the input is a directory.
        nobody: whether to run as an unprivileged user who owns no files.
        payload: whether the input contains code.
        quick: whether only ``inspect`` is run, for inputs that are slow to average.
    """

    id: str
    build: Callable[[Path], object]
    at: str = ""
    message: str = ""
    code: int = 3
    inspect: int = 3
    options: tuple[str, ...] = ()
    alone: bool = False
    tree: bool = False
    nobody: bool = False
    payload: bool = False
    quick: bool = False


def file(id: str, content: bytes | Callable[[], bytes], message: str, *, name: str = "", **more: Any) -> Case:
    """A hostile file ``step-3...``; ``name`` is its suffix or its whole name."""
    name = name or {"safetensors": ".safetensors"}.get(id.partition("/")[0], ".pt")
    name = f"step-3{name}" if name.startswith(".") else name

    def build(folder: Path) -> None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content())

    return Case(id=id, build=build, at=name, message=message, **more)


def tree(id: str, files: Mapping[str, bytes] | Callable[[], Mapping[str, bytes]], message: str, **more: Any) -> Case:
    """A hostile directory ``step-3``."""
    folder_name = more.pop("name", "step-3")

    def build(folder: Path) -> None:
        write(folder / folder_name, files if isinstance(files, Mapping) else files())

    return Case(id=id, build=build, at=f"{folder_name}/{more.pop('at', '')}".rstrip("/"), message=message, tree=True,
                **more)  # fmt: skip


def write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write a directory; ``.metadata`` last, like a save does."""
    folder.mkdir()
    for name in sorted(files, key=lambda name: name == ".metadata"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(files[name])


def container(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    """Return a safetensors file with this header: JSON text as it is, any other object dumped as JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entries(spec: Mapping[str, tuple[str, list[Any]]] = GOOD) -> tuple[dict[str, Any], int]:
    """Return the header of tensors stored back to back, and their concatenated bytes."""
    header: dict[str, Any] = {}
    end = 0
    for name, (dtype, shape) in spec.items():
        size = SIZES.get(dtype, 1)
        for n in shape:
            size *= n
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    return header, end


def values(count: int, seed: int = 0) -> bytes:
    """Return distinct float32 numbers."""
    return struct.pack(f"<{count}f", *(0.5 + 0.25 * i + seed for i in range(count)))


def plain(seed: int = 3) -> bytes:
    """Write a good checkpoint."""
    header, _ = entries()
    return container(header, values(8, seed))
