"""On-disk formats. One file a format; the file system is the registry: a module that ends in ``READER = ...`` is one.

A reader reads headers when it is made and tensors only when asked, and never imports, calls or maps anything a file
names. It knows nothing of training: which part of its tree is the model is `ckptavg.checkpoints.state_dict`'s question.
"""

from __future__ import annotations

import gc
import importlib
import math
import os
import pkgutil
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final, Protocol, TypeAlias

from ckptavg.errors import InputError
from ckptavg.filesystem.regular_file import RegularFile, is_folder

# bytes an element, by the names safetensors gives the dtypes; sub-byte and complex types are refused by the readers
ITEM_SIZE: Final[Mapping[str, int]] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1, "C64": 8, "C128": 16,
}  # fmt: skip
HEAD_SIZE: Final = 4096


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor as it lies in a file; two names with equal values share their memory and are tied.

    Attributes:
        dtype: safetensors' name of the dtype, a key of `ITEM_SIZE`.
        shape: the dimensions.
        record: which run of bytes it lies in (a shard of safetensors, a storage of a torch file).
        offset: where in the record its first element lies, in bytes.
        stride: the strides in elements, or None for C order without gaps.
    """

    dtype: str
    shape: tuple[int, ...]
    record: str
    offset: int
    stride: tuple[int, ...] | None = None

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The number of bytes of its elements in C order."""
        return self.numel * ITEM_SIZE[self.dtype]


@dataclass(frozen=True, slots=True)
class Refused:
    """A tensor that cannot be read, such as a sparse one, and why; an error only where it is wanted."""

    reason: str


Node: TypeAlias = "StoredTensor | Refused | Mapping[str, Node] | Sequence[Node] | str | int | float | bool | None"


class Reader(Protocol):
    """An open file of one format, of which only the headers have been read.

    Attributes:
        path: the file that was opened.
        format: the name of its format.
        tree: what is in it: tensors' descriptions, containers, numbers and strings. A mapping's keys are strings;
            whatever else the file held is None.
        metadata: safetensors' ``__metadata__``; empty for formats without one.
        files: every file that belongs to it, `path` first.
        notes: what the user should know about the file.
    """

    @property
    def path(self) -> Path: ...  # noqa: D102
    @property
    def format(self) -> str: ...  # noqa: D102
    @property
    def tree(self) -> Mapping[str, Node]: ...  # noqa: D102
    @property
    def metadata(self) -> Mapping[str, str]: ...  # noqa: D102
    @property
    def files(self) -> Sequence[RegularFile]: ...  # noqa: D102
    @property
    def notes(self) -> tuple[str, ...]: ...  # noqa: D102

    def read_into(self, tensor: StoredTensor, start: int, out: memoryview) -> None:
        """Fill ``out`` with the elements of ``tensor`` from number ``start`` on, in C order, little-endian.

        Args:
            tensor: a leaf of `tree`.
            start: the first element, counted in C order.
            out: contiguous bytes, a multiple of the element size, within the tensor.
        Raises:
            InputError: if the file is shorter than its header says, or a checksum does not match.
        """
        ...

    def close(self) -> None:
        """Close the files; harmless when repeated."""
        ...


class Format(Protocol):
    """What a module of this package registers as ``READER``."""

    name: str

    def claims(self, head: bytes) -> bool:
        """Whether a file starting with ``head`` (up to `HEAD_SIZE` bytes) is of this format; at most one says yes."""
        ...

    def open(self, file: RegularFile) -> Reader:
        """Read the headers of ``file``, which the reader then owns.

        Raises:
            InputError: naming the file, and the tensor where there is one.
        """
        ...


class FolderFormat(Protocol):
    """What a module of this package registers as ``FOLDER``: a checkpoint of many files that belong together."""

    name: str

    def claims(self, names: frozenset[str]) -> bool:
        """Whether a directory with these entries is of this format; at most one says yes."""
        ...

    def open(self, folder: Path) -> Reader:
        """Read the headers of what is in ``folder``; the reader's ``path`` is the folder.

        Raises:
            InputError: naming the file, and the tensor where there is one.
        """
        ...


@cache
def formats() -> tuple[Format, ...]:
    """Every registered format, in the order of the module names."""
    modules = (importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__))
    return tuple(module.READER for module in modules if hasattr(module, "READER"))


@cache
def folder_formats() -> tuple[FolderFormat, ...]:
    """Every registered format of directories, in the order of the module names."""
    modules = (importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__))
    return tuple(module.FOLDER for module in modules if hasattr(module, "FOLDER"))


def entries(folder: Path) -> frozenset[str]:
    """The names in ``folder``.

    Raises:
        InputError: if it cannot be listed.
    """
    try:
        return frozenset(entry.name for entry in os.scandir(folder))
    except OSError as error:
        raise InputError(os.strerror(error.errno or 0).lower(), path=folder) from error


def claim_folder(names: frozenset[str]) -> FolderFormat | None:
    """The one format that a directory with these entries is of, or None."""
    return next((candidate for candidate in folder_formats() if candidate.claims(names)), None)


def claim(file: RegularFile) -> Format | None:
    """The one format that ``file`` is of by its first bytes, or None."""
    head = file.read(0, min(HEAD_SIZE, file.size))
    return next((candidate for candidate in formats() if candidate.claims(head)), None)


def open_reader(path: Path) -> Reader:
    """Open ``path`` with the format its first bytes claim, or as a directory with the one its entries claim.

    Raises:
        InputError: if it is no regular file and no such directory, no format claims it, or its headers are bad.
    """
    folder = claim_folder(entries(path)) if is_folder(path) else None
    if folder is not None:
        with _nothing_collected():
            return folder.open(path)
    file = RegularFile(path)
    try:
        found = claim(file)
        if found is None:
            raise InputError(unknown(file.read(0, min(HEAD_SIZE, file.size))), path=path)
        with _nothing_collected():
            return found.open(file)
    except BaseException:
        file.close()
        raise


@contextmanager
def _nothing_collected() -> Generator[None]:
    """No garbage collection meanwhile: headers become containers by the million, and none of them is garbage."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def unknown(head: bytes) -> str:
    """What to say of a file that starts with ``head`` and that no format claims."""
    if not head:
        return "file is empty (0 bytes)"
    if len(head) < 9:
        return f"file is truncated: {len(head)} bytes present, too few for any format (still being written?)"
    for magic, what in (
        (b"version https://git-lfs", "is a Git LFS pointer, not the file itself; run `git lfs pull`"),
        (b"<", "is a web page or XML, not a checkpoint; was the download refused?"),
        (b"\x89HDF", "is an HDF5 file (Keras), which is not read"),
        (b"\x80", "is a pickle with no zip around it (torch < 1.6, or no checkpoint); save it again with torch ≥ 1.6"),
        (b"\x1f\x8b", "is a gzip archive; unpack it first"),
    ):  # fmt: skip
        if head.lstrip().startswith(magic):
            return what
    if b"ustar" in head[257:263]:
        return "is a tar archive (torch < 0.4 or NeMo); unpack it or save it again with torch ≥ 1.6"
    return f"is not a checkpoint in a known format (it starts with {head[:8].hex(' ')})"
