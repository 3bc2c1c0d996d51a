"""Checkpoint: the training step, the state dict's names and shapes, and access to the bytes of its tensors."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ckptavg.errors import InputError, excluding, printable
from ckptavg.filesystem.regular_file import is_file, is_folder
from ckptavg.readers import ITEM_SIZE, Reader, StoredTensor

if TYPE_CHECKING:
    from ckptavg.checkpoints.derived import Derived

_CHUNK: Final = 1 << 20  # bytes


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """An open checkpoint; only its headers have been read."""

    path: Path  # shown to the user: the file, or the directory that holds the model's files
    name: str  # its path relative to the directory it was found in; the output's metadata contains this name
    step: int = 0
    step_from: str = ""  # the source of the step, such as ``global_step`` or ``name``
    steps: Mapping[str, int] = field(default_factory=dict[str, int])  # every step that it has, by source
    run: int = 0  # index of its run: of the given directory, or of that in which given checkpoints lie
    key: str  # the sub-dictionary that holds the model, ``""`` for the whole file
    tensors: Mapping[str, StoredTensor]  # by state-dict name; a wrapper's prefix such as ``module.`` is removed
    reader: Reader = field(repr=False)
    notes: tuple[str, ...] = ()  # remarks for the user about how the file was read
    allow_nonfinite: bool = False  # whether NaN and infinite weights are accepted; otherwise reading them is an error
    kept: frozenset[str] = frozenset()  # tensors that are not averaged, but taken from the last selected candidate
    derived: Derived | None = None  # those among them that are functions of others, if these are looked for

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the state dict, sorted."""
        return tuple(sorted(self.tensors))

    @property
    def folder(self) -> Path:
        """Directory of its config and other side files: the innermost one around its weights that has a config.

        A model of sentence-transformers has its modules' directories in it.
        """
        outer, weights = self.path if is_folder(self.path) else self.path.parent, self.reader.path
        around = [place for place in (weights, *weights.parents) if place.is_relative_to(outer) and is_folder(place)]
        configs = ("modules.json",), ("config.json", "adapter_config.json")
        return next((place for names in configs for place in around if _has_any(place, names)), outer)

    def spec(self, name: str) -> StoredTensor:
        """Shape and dtype of a tensor."""
        return self.tensors[name]

    def read_into(self, name: str, start: int, out: memoryview) -> None:
        """Fill ``out`` with the elements of tensor ``name`` from index ``start`` on; see `Reader.read_into`.

        Raises:
            InputError: if the reader does, with the tensor's name and a hint added; or if a BOOL is neither 0 nor 1.
        """
        try:
            self.reader.read_into(self.tensors[name], start, out)
        except InputError as error:
            what = str(error)
            error.hint = printable(error.hint or self.hint)
            for path in (printable(str(file.path)) for file in self.reader.files):  # the tensor goes after the file
                if what.startswith(f"{path}: ") and printable(name) not in what:
                    what = what.removeprefix(f"{path}: ")
                    raise InputError(what, path=path, tensor=name, hint=error.hint) from error
            raise
        if self.tensors[name].dtype == "BOOL" and (rest := bytes(out).lstrip(b"\0\1")):
            what = f"element {start + len(out) - len(rest)} is the byte {rest[0]}, neither 0 nor 1 as a BOOL must be"
            raise InputError(what, path=self.path, tensor=name, hint=self.hint)

    def read(self, name: str) -> bytearray:
        """Return all elements of a tensor; errors are those of `read_into`."""
        data = bytearray(self.spec(name).nbytes)
        self.read_into(name, 0, memoryview(data))
        return data

    @property
    def entry(self) -> str:
        """Its name without the file in a directory, which globs match."""
        inside = self.path != self.reader.path
        return self.name.removesuffix(f"/{self.reader.path.name}") if inside else self.name

    @property
    def excluding(self) -> str:
        """Command-line option that leaves it out."""
        return excluding(self.entry)

    @property
    def hint(self) -> str:
        """Hint for an error message about this checkpoint."""
        return f"leave it out with {self.excluding}, or all bad ones with --skip-bad"

    def check_unchanged(self) -> None:
        """Raise InputError if one of its files changed since it was opened."""
        for file in self.reader.files:
            file.check_unchanged()

    @property
    def numel(self) -> int:
        """Number of elements of its tensors; tied tensors and complex elements count once."""
        return sum(math.prod(tensor.in_file[1]) for tensor in set(self.tensors.values()))

    @property
    def size(self) -> int:
        """Total size of its files in bytes."""
        return sum(file.size for file in self.reader.files)


def _has_any(folder: Path, names: Sequence[str]) -> bool:
    return any(is_file(folder / name) for name in names)


def shortest_names(paths: Sequence[Path], lengths: Sequence[int] = ()) -> list[str]:
    """Return the last parts of each path, as many as tell the paths apart, and at least ``lengths`` (one)."""
    absolute = [Path(os.path.abspath(path)) for path in paths]  # noqa: PTH100  # links stay
    for more in range(max((len(path.parts) for path in absolute), default=0) + 1):
        lasts = [path.parts[-(n + more) :] for path, n in zip(absolute, lengths or [1] * len(paths), strict=True)]
        if len(set(lasts)) == len(set(absolute)):
            return [str(Path(*parts)) for parts in lasts]
    return []


def chunks(
    spec: StoredTensor, name: str, read_into: Callable[[str, int, memoryview], None]
) -> Iterator[tuple[int, bytearray]]:
    """Yield (index of the first element, bytes) of a tensor in order; each chunk is valid until the next."""
    item, chunk = ITEM_SIZE[spec.dtype], bytearray()
    for start in range(0, spec.numel, _CHUNK // item):
        size = min(_CHUNK, spec.nbytes - start * item)
        chunk = chunk if len(chunk) == size else bytearray(size)
        read_into(name, start, memoryview(chunk))
        yield start, chunk
