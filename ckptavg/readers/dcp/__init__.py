"""Checkpoints of torch.distributed.checkpoint: ``.metadata`` and its ``.distcp`` files, one or more per rank.

Each part of each tensor is a small ``torch.save`` file inside a ``.distcp`` file; it is opened on first access.
"""

import os
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from threading import Lock
from typing import Any, Final

from ckptavg.errors import InputError, printable
from ckptavg.filesystem.regular_file import FilePart, RegularFile
from ckptavg.filesystem.strict_json import read_json
from ckptavg.readers import ITEM_SIZE, FolderFormat, Node, Reader, Refused, StoredTensor, entries
from ckptavg.readers.dcp.box import Box
from ckptavg.readers.dcp.metadata import Metadata, SavedTensor, Stored, parse
from ckptavg.readers.pickle.object_tree import object_tree
from ckptavg.readers.pickle.unpickler import PickleError
from ckptavg.readers.torch_zip import open_torch

MAX_METADATA: Final = 256 << 20
METADATA: Final = ".metadata"
RECORD: Final = "ckptavg.json"  # metadata in directories that ckptavg wrote

_OPENED: Final = 8  # number of tensors
_LARGE: Final = 1 << 16  # runs of at least this many bytes are read one by one
_ALONE: Final = "tensor"
_AVERAGE: Final = re.compile(r"(model_)?ema(_[a-z]+)?|[a-z]+_ema")


class _Parts:
    """The parts of a checkpoint's tensors, in open files; the parts of the last `_OPENED` tensors stay parsed."""

    def __init__(self, metadata: Metadata, files: Mapping[str, RegularFile]) -> None:
        self._tensors = {name: value for name, value in metadata.values.items() if isinstance(value, SavedTensor)}
        self._files = files
        self._parsed: OrderedDict[str, dict[Stored, tuple[Reader, StoredTensor]]] = OrderedDict()
        self._lock = Lock()

    def read_into(self, tensor: StoredTensor, start: int, out: memoryview) -> None:
        """See `ckptavg.readers.Reader`."""
        stop = start + len(out) // ITEM_SIZE[tensor.dtype]
        assert start >= 0 and stop <= tensor.numel
        for box, place in self._tensors[tensor.record].parts:
            if box.last >= start and box.first < stop and (begin := box.before(start)) < (end := box.before(stop)):
                try:
                    reader, part = self._part(tensor, box, place)
                    _copy(reader, part, box, begin, end, start, out)
                except InputError as error:
                    path = self._files[place.file].path
                    what = str(error).removeprefix(f"{printable(str(path))}: ")
                    raise InputError(what, path=path, tensor=tensor.record, hint=error.hint) from error

    def _part(self, tensor: StoredTensor, box: Box, place: Stored) -> tuple[Reader, StoredTensor]:
        """Return the ``torch.save`` file of a part and its tensor."""
        with self._lock:
            parts = self._parsed.setdefault(tensor.record, {})
            self._parsed.move_to_end(tensor.record)
            while len(self._parsed) > _OPENED:
                self._parsed.popitem(last=False)
            if place in parts:
                return parts[place]
            file = self._files[place.file]
            reader = open_torch(FilePart(file, place.start, place.size), alone=_ALONE)
            part = reader.tree[_ALONE]
            if not isinstance(part, StoredTensor):
                what = part.reason if isinstance(part, Refused) else "holds something other than a tensor"
                raise InputError(what, path=file.path)
            if (part.dtype, part.shape) != (tensor.dtype, box.sizes):
                listed = f"{METADATA} has {tensor.dtype} {list(box.sizes)}"
                raise InputError(f"holds {part.dtype} {list(part.shape)}, but {listed}", path=file.path)
            parts[place] = reader, part
            return reader, part


def _copy(reader: Reader, part: StoredTensor, box: Box, begin: int, end: int, start: int, out: memoryview) -> None:
    """Copy elements ``begin`` to ``end`` of a part into ``out``, whose first element is the tensor's ``start``."""
    size = ITEM_SIZE[part.dtype]
    apart = box.run * size >= _LARGE or box.run >= end - begin
    block = memoryview(b"" if apart else bytearray((end - begin) * size))
    if not apart:
        reader.read_into(part, begin, block)
    for whole, own, count in box.runs(begin, end):
        target = out[(whole - start) * size :][: count * size]
        if apart:
            reader.read_into(part, own, target)
        else:
            target[:] = block[(own - begin) * size :][: count * size]


def _record(path: Path) -> Mapping[str, str]:
    if not path.is_file():
        return {}
    record = read_json(path)
    if not isinstance(record, dict) or not all(isinstance(text, str) for text in record.values()):
        raise InputError("is not what ckptavg wrote", path=path)
    return record


def _check_file(file: RegularFile, stored: Sequence[Stored], metadata: RegularFile) -> None:
    """Raise InputError unless ``file`` is of the same save as ``.metadata`` and has exactly the parts ``stored``."""
    if metadata.identity[2] < file.identity[2]:  # by time of modification: .metadata is written last
        what = f"is older than {file.path.name}: a later save into this directory was interrupted or is still running"
        hint = f"if the directory was copied without its times, run: touch {metadata.path}"
        raise InputError(what, path=metadata.path, hint=hint)
    end = 0
    for entry in stored:
        if entry.start != end:
            what = f"has a gap at byte {end}" if entry.start > end else f"stores two things at byte {entry.start}"
            raise InputError(f"{what}, by {METADATA}", path=file.path)
        end += entry.size
    if file.size < end:
        what = f"file is truncated: {file.size} bytes present, but {METADATA} requires {end} (still being written?)"
        raise InputError(what, path=file.path)
    if file.size > end:
        raise InputError(f"has {file.size} bytes, but {METADATA} requires {end}", path=file.path)


def _tree(metadata: Metadata) -> Mapping[str, Node]:
    """Return the nested state dict; refuse equal paths of two names, and a path that leads into a tensor."""
    root: dict[str, Any] = {}
    paths = _without_averages(metadata.paths or _guessed(metadata.values))
    for name, value in metadata.values.items():
        *outer, last = paths[name]
        node = root
        for part in outer:
            node = node.setdefault(part, {})
            if type(node) is not dict:
                raise PickleError(f"{name[:100]}: is inside something that is not a mapping")
        if last in node:
            raise PickleError(f"{name[:100]}: has the same place in the state dict as another")
        node[last] = StoredTensor(value.dtype, value.shape, name, 0) if isinstance(value, SavedTensor) else value
    return object_tree(root)[0]


def _guessed(values: Mapping[str, object]) -> dict[str, tuple[str, ...]]:
    """Guess paths for a state dict saved flat: split off the optimizer and, if all other names have it, ``model.``."""
    parts = {name: (name.partition(".")[0], name.partition(".")[2]) for name in values}
    apart = {name for name, (head, rest) in parts.items() if rest and head in ("optim", "optimizer")}
    others = [name for name, value in values.items() if name not in apart and value is not None]
    if apart and all(name.startswith("model.") and len(name) > len("model.") for name in others):
        apart.update(others)
    return {name: parts[name] if name in apart else (name,) for name in values}


def _without_averages(paths: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Split off averages saved flat beside their weights: ``ema.NAME`` beside ``NAME`` or ``model.NAME``."""
    flat = {name: name.partition(".")[::2] for name, path in paths.items() if len(path) == 1}
    rests: dict[str, set[str]] = {"": set(flat)}
    for head, rest in flat.values():
        rests.setdefault(head, set()).add(rest)
    apart: set[str] = set()
    for average in filter(_AVERAGE.fullmatch, rests):
        others = [head for head in ("", "model", "module") if rests[average] <= rests.get(head, set())]
        apart.update((average, *others[:1]) if others else ())
    return paths | {name: parts for name, parts in flat.items() if parts[0] in apart and parts[0]}


def _claims(names: frozenset[str]) -> bool:
    """Return True if the metadata exists, or a rank's file without it, which an interrupted save leaves."""
    return METADATA in names or any(name.endswith(".distcp") for name in names)


def _open(folder: Path) -> Reader:
    names = entries(folder)
    if METADATA not in names:
        what = f"has no {METADATA}, which is written last: the save was interrupted or is still running"
        if any(name.startswith("__") and name.endswith(METADATA) for name in names):
            what = f"each rank saved its own {METADATA} (use_collectives=False), which is not supported"
        raise InputError(what, path=folder)
    record = _record(folder / RECORD)
    with ExitStack() as on_error:
        file = on_error.enter_context(RegularFile(folder / METADATA))
        if file.size > MAX_METADATA:
            raise InputError(f"has {file.size} bytes, more than {MAX_METADATA}", path=file.path)
        try:
            parsed = parse(file.read(0, file.size))
            tree = _tree(parsed)
        except PickleError as error:
            raise InputError(str(error), path=file.path) from error
        files: dict[str, RegularFile] = {}
        for name, stored in parsed.stored.items():
            if not os.path.lexists(folder / name):
                what = f"is missing, but {METADATA} names it"
                raise InputError(what, path=folder / name, hint="copy the whole directory")
            files[name] = on_error.enter_context(RegularFile(folder / name))
            _check_file(files[name], stored, file)
        on_error.pop_all()
    read_into, every = _Parts(parsed, files).read_into, (file, *files.values())
    return Reader(path=folder, format="dcp", tree=tree, files=every, read_into=read_into, metadata=record)


FOLDER: Final = FolderFormat(_claims, _open)
