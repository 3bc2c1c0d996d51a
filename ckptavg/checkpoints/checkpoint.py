"""One candidate as everything after discovery sees it: a step, a state dict's names and shapes, and bytes on demand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ckptavg.errors import InputError, excluding, printable
from ckptavg.filesystem.regular_file import is_folder
from ckptavg.readers import Reader, StoredTensor


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """An open checkpoint of which only headers have been read.

    Attributes:
        path: what the user calls it: the file, or the directory that holds the model's files.
        name: its path below the directory it was found in; how the output's metadata names it.
        step: the training step, the unit being that of ``step_from``.
        step_from: where the step was found, such as ``global_step`` or ``name``.
        run: which of the given directories it comes from, from 0.
        format: the reader's name.
        key: the sub-dictionary the model lies under, ``""`` for the whole file.
        tensors: state-dict name → tensor, by name; a wrapper's prefix such as ``module.`` is gone.
        reader: reads them.
        notes: what the user should know about how it was read.
        allow_nonfinite: whether its weights may be NaN or infinite; otherwise whoever reads them refuses that.
    """

    path: Path
    name: str
    step: int
    step_from: str
    run: int = 0
    format: str
    key: str
    tensors: Mapping[str, StoredTensor]
    reader: Reader = field(repr=False)
    notes: tuple[str, ...] = ()
    allow_nonfinite: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The state dict's names, sorted."""
        return tuple(sorted(self.tensors))

    @property
    def folder(self) -> Path:
        """Where its config and its other companions lie."""
        return self.path if is_folder(self.path) else self.path.parent

    def spec(self, name: str) -> StoredTensor:
        """Shape and dtype of a tensor."""
        return self.tensors[name]

    def read_into(self, name: str, start: int, out: memoryview) -> None:
        """Fill ``out`` with the elements of tensor ``name`` from number ``start`` on; see `Reader.read_into`.

        Raises:
            InputError: as the reader does, with the tensor's name and a hint; or if a BOOL is neither 0 nor 1.
        """
        try:
            self.reader.read_into(self.tensors[name], start, out)
        except InputError as error:
            raise self._explained(error, name) from error
        if self.tensors[name].dtype == "BOOL" and (other := bytes(out).lstrip(b"\0\1")):
            at = start + len(out) - len(other)
            what = f"element {at} is the byte {other[0]}, neither 0 nor 1 as a BOOL must be"
            raise InputError(what, path=self.path, tensor=name, hint=self.hint)

    @property
    def excluding(self) -> str:
        """The option that leaves it out."""
        return excluding(self.name.partition("/")[0])

    @property
    def hint(self) -> str:
        """What can be done about it where it is bad."""
        return f"leave it out with {self.excluding}, or all bad ones with --skip-bad"

    def _explained(self, error: InputError, name: str) -> InputError:
        """``error`` with the tensor's name behind the file's, where neither names it yet, and with a hint."""
        what, hint = str(error), error.hint or self.hint
        for path in (printable(str(file.path)) for file in self.reader.files):
            if what.startswith(f"{path}: ") and printable(name) not in what:
                return InputError(what.removeprefix(f"{path}: "), path=path, tensor=name, hint=hint)
        error.hint = printable(hint)
        return error

    def check_unchanged(self) -> None:
        """Raise InputError if one of its files changed since it was opened."""
        for file in self.reader.files:
            file.check_unchanged()

    @property
    def numel(self) -> int:
        """The number of elements of its tensors, tied ones counted once."""
        return sum(tensor.numel for tensor in set(self.tensors.values()))

    @property
    def size(self) -> int:
        """The bytes of its files."""
        return sum(file.size for file in self.reader.files)
