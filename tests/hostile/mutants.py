"""Valid files and directories of every format, damaged at random, and the permitted outcomes of reading them."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from torch_archives import values

from ckptavg.errors import InputError
from ckptavg.readers import open_reader
from hostile import opcodes as op
from hostile import sharded_cases, torch_cases, tree_cases
from hostile.case import plain, write

CHECKED = ("torch", "dcp")  # formats whose checksums detect every altered tensor
Files = Mapping[str, bytes]


@cache
def seeds() -> dict[str, Files]:
    """Return format → the files of a small valid checkpoint; the first name, or the directory, is opened."""
    zero = sharded_cases.zeros()
    return {
        "safetensors": {"step-3.safetensors": plain()},
        "torch": {"step-3.pt": torch_cases.state()},
        "index": tree_cases.sharded(),
        "dcp": {name: sharded_cases.saved()[name] for name in sorted(sharded_cases.saved())},
        "zero": {name: zero[name] for name in sorted(zero)},
    }


def opened(kind: str, folder: Path) -> Path:
    """Return the path that is opened for a checkpoint in ``folder``."""
    name = {"safetensors": "step-3.safetensors", "torch": "step-3.pt", "index": tree_cases.INDEX}.get(kind)
    return folder / name if name else folder


def put(kind: str, files: Files, folder: Path) -> Path:
    """Write a checkpoint; all files get equal times, so that the order of writing has no effect."""
    path = opened(kind, folder)
    if len(files) == 1 and folder.is_dir():
        path.write_bytes(next(iter(files.values())))
        return path
    shutil.rmtree(folder, ignore_errors=True)
    write(folder, files)
    for one in folder.iterdir():
        os.utime(one, ns=(0, 0))
    return path


def read(kind: str, files: Files, folder: Path) -> Any:
    """Read everything in a checkpoint, or return the InputError that refuses it.

    Raises:
        AssertionError: if the error is not one line that begins with a file of the checkpoint.
    """
    try:
        reader = open_reader(put(kind, files, folder))
        try:
            return values(reader)
        finally:
            reader.close()
    except InputError as error:
        text = str(error)
        if not text.startswith(str(folder)) or "\n" in text or not text.isprintable() or len(text) > 1500:
            raise AssertionError(f"not one line about a file: {text!r}") from error
        return error


@cache
def truth(kind: str, folder: Path) -> Any:
    """Return the content of the undamaged checkpoint."""
    found = read(kind, seeds()[kind], folder)
    assert not isinstance(found, InputError), found
    return found


def verdict(kind: str, files: Files, folder: Path) -> str:
    """Return ``refused``, ``same``, ``renamed`` or ``altered``; raise anything but an InputError."""
    expected = truth(kind, folder)
    found = read(kind, files, folder)
    if isinstance(found, InputError):
        return "refused"
    if found == expected:
        return "same"
    if kind == "dcp":  # .metadata has no checksum, so a name may change; the tensors have checksums, so they may not
        return "altered" if tensors(found) - tensors(expected) else "renamed"
    return "altered"


def tensors(found: Any) -> set[Any]:
    """Return all tensors in the result of `read`."""
    if isinstance(found, tuple):
        return {found}
    inner = found.values() if isinstance(found, Mapping) else found if isinstance(found, list) else ()
    return {one for child in inner for one in tensors(child)}


def flip(data: bytes, rng: random.Random) -> bytes:
    """Flip one to eight bits."""
    raw = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    return bytes(raw)


def cut(data: bytes, rng: random.Random) -> bytes:
    """Keep only the beginning."""
    return data[: rng.randrange(len(data))]


def drop(data: bytes, rng: random.Random) -> bytes:
    """Drop a run of bytes."""
    at = rng.randrange(len(data))
    return data[:at] + data[at + rng.randrange(1, 64) :]


def double(data: bytes, rng: random.Random) -> bytes:
    """Duplicate a run of bytes."""
    at = rng.randrange(len(data))
    end = at + rng.randrange(1, 64)
    return data[:end] + data[at:]


def splice(data: bytes, rng: random.Random) -> bytes:
    """Copy a run of bytes from elsewhere in the file."""
    size = rng.randrange(1, 64)
    at, other = rng.randrange(len(data)), rng.randrange(len(data))
    run = data[other : other + size]
    return data[:at] + run + data[at + len(run) :]


def overwrite(data: bytes, rng: random.Random) -> bytes:
    """Overwrite bytes with boundary values where there may be numbers."""
    number = rng.choice((0, 1, 0x7F, 0xFF, 0xFFFF, 2**31, 2**32 - 1, 2**63, 2**64 - 1))
    run = number.to_bytes(8, "little")[: rng.choice((1, 2, 4, 8))]
    at = rng.randrange(len(data))
    return data[:at] + run + data[at + len(run) :]


DAMAGES: tuple[Callable[[bytes, random.Random], bytes], ...] = (flip, cut, drop, double, splice, overwrite)


def damaged(kind: str, rng: random.Random) -> Files:
    """Return a checkpoint with one file damaged, once or twice."""
    files = dict(seeds()[kind])
    name = rng.choice(sorted(files))
    for _ in range(rng.choice((1, 1, 2))):
        if files[name]:
            files[name] = rng.choice(DAMAGES)(files[name], rng)
    return files


def program(rng: random.Random) -> bytes:
    """Return a random pickle, of opcodes that often fit each other."""
    atoms = (
        lambda: op.text(rng.choice(("weight", "storage", "cpu", "0", "1", "", "__setstate__"))),
        lambda: op.number(rng.choice((0, 1, 2, 6, 24, -1, 2**31, 2**62, 2**63, 2**200))),
        lambda: op.name(rng.choice((*op.CALLS, "torch._utils._rebuild_tensor_v2", "torch.FloatStorage", "torch.Size",
                                    "collections.OrderedDict", "numpy.core.multiarray.scalar", "numpy.dtype",
                                    "torch._utils._rebuild_parameter", "torch._tensor._rebuild_from_type_v2"))),
        lambda: rng.choice(tuple(op.good().values())),
        lambda: op.storage(rng.choice("012"), rng.choice((0, 2, 6, 2**40))),
        lambda: rng.choice((b"N", b"\x88", b"\x89", b"]", b")", b"}", b"(", b"K\x07", b"C\x02ab", b"G" + bytes(8))),
        lambda: rng.choice((b"q\0", b"h\0", b"\x94", b"h\x01", b"j\1\0\0\0", b"2", b"0", b"1")),
        lambda: rng.choice((b"R", b"R", b"\x81", b"\x92", b"b", b"o", b"Q", b"\x93", b"ios\nsystem\n")),
        lambda: rng.choice((b"a", b"e", b"s", b"u", b"t", b"l", b"d", b"\x85", b"\x86", b"\x87", b"\x8f", b"\x90")),
        lambda: bytes([rng.randrange(256)]),
    )  # fmt: skip
    body = b"".join(rng.choice(atoms)() for _ in range(rng.randrange(1, 40)))
    if rng.random() < 0.3:
        body = op.mapping({**op.good(), "x": body})
    return op.program(body, rng.choice((2, 4, 5)))
