"""On-disk formats, one module each; a module that ends in ``READER = ...`` or ``FOLDER = ...`` is registered.

A reader reads headers when it is opened and tensors on request. It never imports, calls or maps anything that a file
names. Finding the model in its tree is the job of `ckptavg.checkpoints.state_dict`.
"""

import gc
import importlib
import math
import os
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Final, TypeAlias

from ckptavg.errors import InputError
from ckptavg.filesystem.regular_file import RegularFile, is_folder

# bytes per element, by safetensors' dtype names; readers refuse dtypes of less than a byte
ITEM_SIZE: Final[Mapping[str, int]] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1, "C64": 8, "C128": 16,
}  # fmt: skip
FLOATING: Final = ("F64", "F32", "F16", "BF16")
HEAD_SIZE: Final = 4096
MAX_RANK: Final = 64
_SEPARATOR: Final = "\0"  # between a part and a record of it; no file name contains it


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Location and type of one tensor in a file; names with equal descriptions share memory (tied weights)."""

    dtype: str  # safetensors' name, a key of `ITEM_SIZE`
    shape: tuple[int, ...]
    record: str  # the run of bytes that holds it (a safetensors shard, a storage of a torch file)
    offset: int  # byte offset of its first element in the record
    stride: tuple[int, ...] | None = None  # in elements; None for C order without gaps
    sparse: "SparseParts | None" = None  # the tensors that it is made of; reading gives the dense one it stands for
    is_complex: bool = False  # whether the last dimension has the real and the imaginary part; see `as_real`

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes of its elements in C order."""
        return self.numel * ITEM_SIZE[self.dtype]

    @property
    def in_file(self) -> tuple[str, tuple[int, ...]]:
        """Dtype and shape in a file."""
        return (_COMPLEX[self.dtype], self.shape[:-1]) if self.is_complex else (self.dtype, self.shape)


@dataclass(frozen=True, slots=True)
class SparseParts:
    """The tensors of a sparse tensor, in torch's order, and its layout, such as ``torch.sparse_coo``."""

    layout: str
    indices: tuple[StoredTensor, ...]
    values: StoredTensor

    @property
    def conversion(self) -> str:
        """The call that makes a dense tensor one of this layout."""
        kind, inner = self.layout.rpartition("_")[2], self.values.shape[1:]
        if kind == "coo":
            return f"to_sparse({self.indices[0].shape[0] if inner else ''})"
        return f"to_sparse_{kind}({tuple(inner[:2]) if kind in ('bsr', 'bsc') else ''})"


_COMPLEX: Final = {"F32": "C64", "F64": "C128"}


def as_real(tensor: StoredTensor) -> StoredTensor:
    """Return a complex tensor as a real one with a last dimension of 2, as torch.view_as_real; others as they are."""
    for real, dtype in _COMPLEX.items():
        if tensor.dtype == dtype:
            stride = tensor.stride and (*(2 * step for step in tensor.stride), 1)
            return replace(tensor, dtype=real, shape=(*tensor.shape, 2), stride=stride, is_complex=True)
    return tensor


@dataclass(frozen=True, slots=True)
class Refused:
    """A tensor that cannot be read, such as a sparse one, with the reason; an error only if the model contains it."""

    reason: str


class NotACheckpointError(InputError):
    """File of a known kind that holds no checkpoint; ``reason`` continues a sentence that starts with its name."""

    def __init__(self, reason: str, path: Path, *, hint: str | None = None) -> None:
        super().__init__(reason, path=path, hint=hint)
        self.reason = reason


class ModuleState(dict[str, "Node"]):
    """State dict of a pickled ``nn.Module``; ``name`` is the dotted name of its class."""

    def __init__(self, name: str, tensors: Mapping[str, "Node"]) -> None:
        super().__init__(tensors)
        self.name = name


Node: TypeAlias = "StoredTensor | Refused | Mapping[str, Node] | Sequence[Node] | str | int | float | bool | None"


def naturals(value: Any, kind: type = tuple, most: int = MAX_RANK) -> tuple[int, ...] | None:
    """Return ``value`` as a tuple if it is a ``kind`` of up to ``most`` integers from 0 to 2^63 - 1, otherwise None."""
    if type(value) is kind and len(value) <= most and all(type(item) is int and 0 <= item < 2**63 for item in value):
        return tuple(value)
    return None


@dataclass(frozen=True, kw_only=True, eq=False)
class Reader:
    """An open file of one format; only its headers have been read.

    Attributes:
        tree: its contents: tensor descriptions, containers, numbers and strings. The keys of mappings are strings;
            objects of any other type are None.
        read_into: ``(tensor, start, out)`` fills ``out``, contiguous bytes, with the elements of ``tensor``, a leaf of
            `tree`, from index ``start`` on, in C order, little-endian; ``out`` is a multiple of the element size and
            within the tensor, or, if `flat`, goes on in the tensors that follow it in the file. Raises InputError if
            the file is shorter than its header requires, or a checksum does not match.
    """

    path: Path  # the file or directory that was opened
    format: str
    tree: Mapping[str, Node]
    files: Sequence[RegularFile]  # every file that belongs to it; closed with the reader
    read_into: Callable[[StoredTensor, int, memoryview], None]
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])  # safetensors' ``__metadata__``
    notes: tuple[str, ...] = ()  # remarks about the file for the user
    flat: bool = False  # whether tensors without a stride are bytes of one file, from their offset on

    @property
    def named_files(self) -> Mapping[str, RegularFile]:
        """Its files by their paths relative to the directory that was opened, or that the opened file is in."""
        folder = self.path if is_folder(self.path) else self.path.parent
        return {file.path.relative_to(folder).as_posix(): file for file in self.files}

    def close(self) -> None:
        """Close the files; safe to call twice."""
        for file in self.files:
            file.close()


def flat_reader(
    file: RegularFile, format: str, tree: Mapping[str, Node], metadata: Mapping[str, str] | None = None, data: int = 0
) -> Reader:
    """Return the reader of a file whose tensors lie in C order without gaps; offset 0 is the file's byte ``data``."""

    def read_into(tensor: StoredTensor, start: int, out: memoryview) -> None:
        file.read_into(data + tensor.offset + start * ITEM_SIZE[tensor.dtype], out)

    return Reader(
        path=file.path, format=format, tree=tree, files=(file,), read_into=read_into, metadata=metadata or {}, flat=True
    )  # fmt: skip


def within(part: str, tensor: StoredTensor) -> StoredTensor:
    """Return a tensor of the reader ``part`` as one of the reader that joins several; see `joined`."""
    return replace(tensor, record=f"{part}{_SEPARATOR}{tensor.record}")


def joined(readers: Mapping[str, Reader]) -> Callable[[StoredTensor, int, memoryview], None]:
    """Return the `Reader.read_into` of tensors that `within` gave, by the names of their readers."""

    def read_into(tensor: StoredTensor, start: int, out: memoryview) -> None:
        part, record = tensor.record.split(_SEPARATOR, 1)
        readers[part].read_into(replace(tensor, record=record), start, out)

    return read_into


@dataclass(frozen=True)
class Format:
    """A format of single files, registered by a module of this package as ``READER``.

    Attributes:
        suffixes: endings of file names that mark a checkpoint, such as ``.pt``; files with other names are recognized
            by their first bytes.
        claims: whether a file that starts with these bytes (up to `HEAD_SIZE`) has this format; at most one format
            claims any file.
        open: reads the headers of a file, which the reader owns from then on; raises InputError with the file and, if
            known, the tensor, if it is damaged.
    """

    name: str  # in the output of `ckptavg inspect`
    suffixes: tuple[str, ...]
    claims: Callable[[bytes], bool]
    open: Callable[[RegularFile], Reader]


@dataclass(frozen=True)
class FolderFormat:
    """A format of directories whose files form one checkpoint, registered by a module as ``FOLDER``."""

    claims: Callable[[frozenset[str]], bool]  # whether a directory with these entries has it; at most one format does
    open: Callable[[Path], Reader]  # as in `Format`


@cache
def _registered(name: str) -> tuple[Any, ...]:
    """Return the value of ``name`` in each module of this package that has it, in the order of the module names."""
    modules = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    return tuple(getattr(module, name) for module in modules if hasattr(module, name))


def formats() -> tuple[Format, ...]:
    """Return every registered format of single files."""
    return _registered("READER")


def suffixes() -> tuple[str, ...]:
    """Return the file name endings of all formats."""
    return tuple(suffix for candidate in formats() for suffix in candidate.suffixes)


def entries(folder: Path) -> frozenset[str]:
    """Return the names in ``folder``; raise InputError if it cannot be listed."""
    try:
        return frozenset(entry.name for entry in os.scandir(folder))
    except OSError as error:
        raise InputError(os.strerror(error.errno or 0).lower(), path=folder) from error


def claim_folder(names: frozenset[str]) -> FolderFormat | None:
    """Return the format that claims a directory with these entries, or None."""
    return next((candidate for candidate in _registered("FOLDER") if candidate.claims(names)), None)


def claim(file: RegularFile) -> Format | None:
    """Return the format that claims ``file`` by its first bytes, or None."""
    head = file.read(0, min(HEAD_SIZE, file.size))
    return next((candidate for candidate in formats() if candidate.claims(head)), None)


def open_reader(path: Path) -> Reader:
    """Open ``path`` with the format that claims its first bytes or, for a directory, its entries.

    Raises:
        InputError: if it is neither a regular file nor such a directory, no format claims it, or its headers are bad.
    """
    collects = gc.isenabled()
    gc.disable()  # a header becomes up to a million containers, and none of them is garbage
    try:
        if is_folder(path) and (folder_format := claim_folder(entries(path))):
            return folder_format.open(path)
        with ExitStack() as on_error:
            file = on_error.enter_context(RegularFile(path))
            if not (file_format := claim(file)):
                raise InputError(_unknown(file.read(0, min(HEAD_SIZE, file.size))), path=path)
            reader = file_format.open(file)
            on_error.pop_all()
            return reader
    finally:
        if collects:
            gc.enable()


def foreign_kind(head: bytes) -> str | None:
    """Describe a file that starts with ``head`` and has a kind that is known, but not read; None for any other."""
    for magic, what in (
        (b"version https://git-lfs", "is a Git LFS pointer, not the file itself; run `git lfs pull`"),
        (b"<", "is a web page or XML, not a checkpoint; was the download refused?"),
        (b"\x89HDF", "is an HDF5 file (Keras), which is not supported"),
        (b"\x80", "is a pickle with no zip around it (torch < 1.6, or no checkpoint); save it again with torch ≥ 1.6"),
        (b"GGUF", "is a GGUF file (llama.cpp), whose weights are quantised; average the checkpoints it was made from"),
        (b"\x1f\x8b", "is a gzip archive; unpack it first: gzip -dc < FILE > NEW_FILE"),
    ):  # fmt: skip
        if head.lstrip().startswith(magic):
            return what
    return None


def _unknown(head: bytes) -> str:
    """Describe a file that starts with ``head`` and that no format claims."""
    if not head:
        return "file is empty (0 bytes)"
    if len(head) < 9:
        return f"file is truncated: {len(head)} bytes present, too few for any format (still being written?)"
    return foreign_kind(head) or f"is not a checkpoint in a known format (it starts with {head[:8].hex(' ')})"
