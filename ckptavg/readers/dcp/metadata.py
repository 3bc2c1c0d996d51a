"""Parser of torch.distributed.checkpoint's ``.metadata``; runs nothing, whereas ``dcp.load`` would unpickle it.

The file is one pickled ``Metadata``: shape, dtype and parts of every tensor; file and byte range of every part; and the
path of every name in the nested state dict.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Final, NoReturn, TypeAlias

from ckptavg.errors import InputError
from ckptavg.readers import ITEM_SIZE, MAX_RANK, Refused, naturals
from ckptavg.readers.dcp.box import Box, untiled
from ckptavg.readers.pickle.object_tree import MAX_DEPTH
from ckptavg.readers.pickle.torch_objects import DTYPES, MAKERS, first
from ckptavg.readers.pickle.unpickler import Global, Maker, PickleError, load

MAX_PARTS: Final = 1 << 16  # per tensor
MAX_FILE_NAME: Final = 255
# a chunk costs about 7 kB of the budget and a large cluster saves 100,000s of them; a small file gets a small budget
_BUDGET: Final = 4 << 30
_BUDGET_A_BYTE: Final = 64  # per byte of the file; files of torch 2.13 need 42 to 48
_BUDGET_OF_ANY: Final = 64 << 20
_Refuse: TypeAlias = Callable[..., NoReturn]


@dataclass(frozen=True, slots=True)
class Stored:
    """Location of a part of a tensor or of an object: ``size`` bytes of ``file`` from ``start`` on.

    Attributes:
        offsets: position of the part in the tensor; None for an object.
        transformed: transformation of its bytes, such as compression; ``""`` if there is none.
    """

    file: str
    start: int
    size: int
    offsets: tuple[int, ...] | None
    transformed: str


@dataclass(frozen=True, slots=True)
class Part:
    """A non-empty part of a tensor; ``first`` and ``last`` are indices of its outermost elements in the whole."""

    box: Box
    stored: Stored
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """A tensor and the parts that tile it, sorted by their first elements."""

    dtype: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Metadata:
    """Contents of ``.metadata``.

    Attributes:
        values: name → the tensor, the reason why it is not supported, or None for an object that is not a tensor.
        paths: name → its path in the nested state dict; empty if the state dict was saved without nesting.
        stored: file → its parts and objects, in order.
    """

    values: Mapping[str, SavedTensor | Refused | None]
    paths: Mapping[str, tuple[str, ...]]
    stored: Mapping[str, Sequence[Stored]]


def parse(data: bytes, path: Path) -> Metadata:
    """Parse ``data``, the content of ``path``.

    Raises:
        InputError: if it is damaged; the message has ``path`` and, if known, the tensor.
    """
    try:
        root = load(data, _MAKERS, _persistent, min(_BUDGET, _BUDGET_OF_ANY + _BUDGET_A_BYTE * len(data)))
    except PickleError as error:
        raise InputError(str(error), path=path) from error
    described, listed, paths = _fields(root, "Metadata", "state_dict_metadata", "storage_data", "planner_data")
    if type(described) is not dict or type(listed) is not dict or not all(type(name) is str for name in described):
        raise InputError("is not the metadata of torch.distributed.checkpoint", path=path)

    def refuse(what: str, name: str | None = None) -> NoReturn:
        raise InputError(what, path=path, tensor=None if name is None else name[:100] or '""')

    stored = _stored(listed, refuse)
    for name in stored:
        if name not in described:
            refuse("is stored, but not described", name)
    values = {name: _value(name, value, stored.get(name, []), refuse) for name, value in described.items()}
    ordered = sorted((place for places in stored.values() for place in places), key=attrgetter("file", "start", "size"))
    by_file = {file: list(places) for file, places in groupby(ordered, key=attrgetter("file"))}
    return Metadata(values, _paths(paths, values, refuse), by_file)


class _Instance:
    """Stand-in for an object of one of the metadata's classes: its class name and state; compares by identity."""

    __slots__ = ("kind", "state")

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.state: object = None

    def set_state(self, state: object) -> None:
        """Set the fields: a dict by name, or a tuple for classes with a ``__getstate__`` of their own."""
        self.state = state[1] if type(state) is tuple and len(state) == 2 and state[0] is None else state


def _stored(listed: dict[object, object], refuse: _Refuse) -> dict[str, list[Stored]]:
    """Convert ``dict[MetadataIndex, _StorageInfo]``: name → locations of its parts, or of its object."""
    result: dict[str, list[Stored]] = {}
    for index, info in listed.items():
        name, offset = _fields(index, "MetadataIndex", "fqn", "offset")
        offsets = naturals(offset)
        if type(name) is not str or (offset is not None and offsets is None):
            refuse("stores something without a name")
        file, *span, transforms = _fields(
            info, "_StorageInfo", "relative_path", "offset", "length", "transform_descriptors"
        )
        span = naturals(span, list)
        if type(file) is not str or span is None:
            refuse("has no storage location", name)
        if Path(file).name != file or file in ("", ".", "..") or len(file) > MAX_FILE_NAME or not file.isprintable():
            refuse(f"is stored in {file[:100]!r}, which is not a bare file name", name)
        names = [text[:40] for text in transforms if type(text) is str] if isinstance(transforms, list | tuple) else []
        transformed = (", ".join(names[:4]) or "unknown") if transforms else ""
        result.setdefault(name, []).append(Stored(file, span[0], span[1], offsets, transformed))
    return result


def _value(name: str, value: object, stored: Sequence[Stored], refuse: _Refuse) -> SavedTensor | Refused | None:
    if isinstance(value, _Instance) and value.kind == "BytesStorageMetadata":
        if len(stored) != 1 or stored[0].offsets is not None:
            refuse(f"is one object, but {len(stored)} parts of it are stored", name)
        return None
    size, chunks, properties = _fields(value, "TensorStorageMetadata", "size", "chunks", "properties")
    shape = naturals(size)
    if shape is None or math.prod(shape) >= 2**63:
        refuse(f"shape must be up to {MAX_RANK} integers from 0 to 2^63 - 1", name)
    if type(chunks) is not list or len(chunks) > MAX_PARTS:
        refuse(f"its parts must be a list of up to {MAX_PARTS}", name)
    parts = _parts(name, shape, chunks, stored, refuse)
    dtype = _dtype(properties)
    if isinstance(dtype, Refused):
        return dtype
    transformed = next((part.stored.transformed for part in parts if part.stored.transformed), None)
    if transformed:
        return Refused(f"is stored with a transformation ({transformed}), which is not supported; save it without")
    if any(part.stored.size <= part.box.numel * ITEM_SIZE[dtype] for part in parts):
        refuse("is not stored by torch.save: SerializationFormat.SAFETENSORS is not supported, only TORCH_SAVE", name)
    return SavedTensor(dtype, shape, parts)


def _parts(
    name: str, shape: tuple[int, ...], chunks: list[object], stored: Sequence[Stored], refuse: _Refuse
) -> tuple[Part, ...]:
    """Return the parts sorted by their offsets, which also sorts them by their first elements."""
    boxes: list[Box] = []
    for chunk in chunks:
        offsets, sizes = map(naturals, _fields(chunk, "ChunkStorageMetadata", "offsets", "sizes"))
        if offsets is None or sizes is None or not len(offsets) == len(sizes) == len(shape):
            refuse(f"offsets and sizes of its parts must be {len(shape)} integers from 0 to 2^63 - 1", name)
        boxes.append(Box(shape, offsets, sizes))
    if wrong := untiled(boxes, shape):
        refuse(wrong, name)
    boxes.sort(key=lambda box: box.offsets)
    places = sorted(((place.offsets, place) for place in stored if place.offsets is not None), key=lambda pair: pair[0])
    if len(places) != len(stored) or [box.offsets for box in boxes] != [offsets for offsets, _ in places]:
        refuse("its parts differ from those that are stored", name)
    return tuple(
        Part(box, place, box.first, box.last) for box, (_, place) in zip(boxes, places, strict=True) if box.numel
    )


def _dtype(properties: object) -> str | Refused:
    """Return the dtype of a ``TensorProperties``: (dtype, layout, requires_grad, memory format, pinned)."""
    state = properties.state if isinstance(properties, _Instance) else None
    if type(state) is not tuple or len(state) < 2 or not isinstance(state[0], Global):
        return Refused("has no dtype")
    if state[0].name not in DTYPES:
        return Refused(f"dtype {state[0].name} is not supported")
    if (state[1].name if isinstance(state[1], Global) else state[1]) != "torch.strided":
        return Refused("is not a plain dense tensor")
    return DTYPES[state[0].name]


def _paths(data: object, names: Mapping[str, object], refuse: _Refuse) -> dict[str, tuple[str, ...]]:
    """Return name → path from the planner's data; empty if it has none."""
    if not data:
        return {}
    if type(data) is not dict:
        refuse("has planner data that are not a mapping from names to paths")
    result: dict[str, tuple[str, ...]] = {}
    for name in names:
        path = data.get(name, (name,))
        proper = type(path) is tuple and 0 < len(path) <= MAX_DEPTH
        if not proper or not all(type(part) in (str, int) for part in path):
            refuse(f"its place in the state dict must be a path of 1 to {MAX_DEPTH} names", name)
        result[name] = tuple(str(part) for part in path)
    return result


def _fields(value: object, kind: str, *names: str) -> list[object]:
    """Return fields of an object of class ``kind``: None if the class differs or the field is missing."""
    state = value.state if isinstance(value, _Instance) and value.kind == kind else None
    return [state.get(name) if type(state) is dict else None for name in names]


def _kind(name: str) -> Maker:
    return lambda _: _Instance(name)


def _persistent(_: object) -> NoReturn:
    raise PickleError("is damaged: it has a persistent id")


_CLASSES: Final = (
    "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
    "TensorProperties",
)  # fmt: skip
_MAKERS: Final[Mapping[str, Maker]] = {
    **{f"torch.distributed.checkpoint.metadata.{name}": _kind(name) for name in _CLASSES},
    "torch.distributed._shard.sharded_tensor.metadata.TensorProperties": _kind("TensorProperties"),  # torch < 2.4
    "torch.distributed.checkpoint.filesystem._StorageInfo": _kind("_StorageInfo"),
    "torch.serialization._get_layout": first,
    **{name: MAKERS[name] for name in ("torch.Size", "collections.OrderedDict", "collections.defaultdict")},
}
