"""Parser of torch.distributed.checkpoint's ``.metadata``; runs nothing, whereas ``dcp.load`` would unpickle it.

The file is one pickled ``Metadata``: shape, dtype and parts of every tensor; file and byte range of every part; and the
path of every name in the nested state dict.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Final, NoReturn

from ckptavg.readers import ITEM_SIZE, MAX_RANK, Refused, naturals
from ckptavg.readers.dcp.box import Box, untiled
from ckptavg.readers.pickle.object_tree import MAX_DEPTH
from ckptavg.readers.pickle.torch_objects import DTYPES, MAKERS, first
from ckptavg.readers.pickle.unpickler import Global, Maker, PickleError, load

MAX_PARTS: Final = 1 << 16  # per tensor
# a chunk costs about 7 kB of the budget and a large cluster saves 100,000s of them; a small file gets a small budget
_BUDGET: Final = 4 << 30
_BUDGET_A_BYTE: Final = 64  # per byte of the file; files of torch 2.13 need 42 to 48
_BUDGET_OF_ANY: Final = 64 << 20


@dataclass(frozen=True, slots=True)
class Stored:
    """Location of a part of a tensor or of an object: ``size`` bytes of ``file`` from ``start`` on."""

    file: str
    start: int
    size: int
    offsets: tuple[int, ...] | None  # position of the part in the tensor; None for an object
    transformed: str  # transformation of the bytes, such as compression, or ""


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """A tensor and the parts that tile it: those that are not empty, sorted by their first elements."""

    dtype: str
    shape: tuple[int, ...]
    parts: Sequence[tuple[Box, Stored]]


@dataclass(frozen=True, slots=True)
class Metadata:
    """Contents of ``.metadata``."""

    values: Mapping[str, SavedTensor | Refused | None]  # by name; None for an object that is not a tensor
    paths: dict[str, tuple[str, ...]]  # name → its path in the state dict; empty if that was saved without nesting
    stored: Mapping[str, Sequence[Stored]]  # file → its parts and objects, in order


def parse(data: bytes) -> Metadata:
    """Parse the content of ``.metadata``; raise PickleError, with the tensor if known, if it is damaged."""
    root = load(data, _MAKERS, _persistent, min(_BUDGET, _BUDGET_OF_ANY + _BUDGET_A_BYTE * len(data)))
    described, listed, paths = _fields(root, "Metadata", "state_dict_metadata", "storage_data", "planner_data")
    if type(described) is not dict or type(listed) is not dict or not all(type(name) is str for name in described):
        raise PickleError("is not the metadata of torch.distributed.checkpoint")
    stored = _stored(listed)
    for name in stored:
        if name not in described:
            _refuse(name, "is stored, but not described")
    values = {name: _value(name, value, stored.get(name, [])) for name, value in described.items()}
    ordered = sorted((place for places in stored.values() for place in places), key=attrgetter("file", "start", "size"))
    by_file = {file: list(places) for file, places in groupby(ordered, key=attrgetter("file"))}
    return Metadata(values, _paths(paths, values), by_file)


@dataclass(slots=True, eq=False)
class _Instance:
    """Stand-in for an object of one of the metadata's classes: its class name and state; compares by identity."""

    kind: str
    state: object = None

    def set_state(self, state: object) -> None:
        """Set the fields: a dict by name, or a tuple for classes with a ``__getstate__`` of their own."""
        self.state = state[1] if type(state) is tuple and len(state) == 2 and state[0] is None else state


def _stored(listed: dict[object, object]) -> dict[str, list[Stored]]:
    """Convert ``dict[MetadataIndex, _StorageInfo]``: name → locations of its parts, or of its object."""
    result: dict[str, list[Stored]] = {}
    for index, info in listed.items():
        name, offset = _fields(index, "MetadataIndex", "fqn", "offset")
        offsets = naturals(offset)
        if type(name) is not str or (offset is not None and offsets is None):
            raise PickleError("stores something without a name")
        keys = "relative_path", "offset", "length", "transform_descriptors"
        file, start, size, transforms = _fields(info, "_StorageInfo", *keys)
        span = naturals((start, size))
        if type(file) is not str or span is None:
            _refuse(name, "has no storage location")
        if Path(file).name != file or file in ("", ".", "..") or len(file) > 255 or not file.isprintable():
            _refuse(name, f"is stored in {file[:100]!r}, which is not a bare file name")
        names = [text[:40] for text in transforms if type(text) is str] if isinstance(transforms, list | tuple) else []
        transformed = (", ".join(names[:4]) or "unknown") if transforms else ""
        result.setdefault(name, []).append(Stored(file, span[0], span[1], offsets, transformed))
    return result


def _value(name: str, value: object, stored: Sequence[Stored]) -> SavedTensor | Refused | None:
    if isinstance(value, _Instance) and value.kind == "BytesStorageMetadata":
        if len(stored) != 1 or stored[0].offsets is not None:
            _refuse(name, f"is one object, but {len(stored)} parts of it are stored")
        return None
    size, chunks, properties = _fields(value, "TensorStorageMetadata", "size", "chunks", "properties")
    shape = naturals(size)
    if shape is None or math.prod(shape) >= 2**63:
        _refuse(name, f"shape must be up to {MAX_RANK} integers from 0 to 2^63 - 1")
    if type(chunks) is not list or len(chunks) > MAX_PARTS:
        _refuse(name, f"its parts must be a list of up to {MAX_PARTS}")
    parts = _parts(name, shape, chunks, stored)
    dtype = _dtype(properties)
    if isinstance(dtype, Refused):
        return dtype
    if transformed := next((place.transformed for _, place in parts if place.transformed), None):
        return Refused(f"is stored with a transformation ({transformed}), which is not supported; save it without")
    if any(place.size <= box.numel * ITEM_SIZE[dtype] for box, place in parts):
        _refuse(name, "is not stored by torch.save: SerializationFormat.SAFETENSORS is not supported, only TORCH_SAVE")
    return SavedTensor(dtype, shape, parts)


def _parts(
    name: str, shape: tuple[int, ...], chunks: list[object], stored: Sequence[Stored]
) -> list[tuple[Box, Stored]]:
    """Return the parts sorted by their offsets, which also sorts them by their first elements."""
    boxes: list[Box] = []
    for chunk in chunks:
        offsets, sizes = map(naturals, _fields(chunk, "ChunkStorageMetadata", "offsets", "sizes"))
        if offsets is None or sizes is None or not len(offsets) == len(sizes) == len(shape):
            _refuse(name, f"offsets and sizes of its parts must be {len(shape)} integers from 0 to 2^63 - 1")
        boxes.append(Box(shape, offsets, sizes))
    if wrong := untiled(boxes, shape):
        _refuse(name, wrong)
    boxes.sort(key=lambda box: box.offsets)
    places = sorted((place for place in stored if place.offsets is not None), key=attrgetter("offsets"))
    if len(places) != len(stored) or [box.offsets for box in boxes] != [place.offsets for place in places]:
        _refuse(name, "its parts differ from those that are stored")
    return [(box, place) for box, place in zip(boxes, places, strict=True) if box.numel]


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


def _paths(data: object, names: Mapping[str, object]) -> dict[str, tuple[str, ...]]:
    """Return name → path from the planner's data; empty if it has none."""
    if not data:
        return {}
    if type(data) is not dict:
        raise PickleError("has planner data that are not a mapping from names to paths")
    result: dict[str, tuple[str, ...]] = {}
    for name in names:
        path = data.get(name, (name,))
        if type(path) is not tuple or not 0 < len(path) <= MAX_DEPTH or not {type(part) for part in path} <= {str, int}:
            _refuse(name, f"its place in the state dict must be a path of 1 to {MAX_DEPTH} names")
        result[name] = tuple(str(part) for part in path)
    return result


def _fields(value: object, kind: str, *names: str) -> list[object]:
    """Return fields of an object of class ``kind``: None if the class differs or the field is missing."""
    state = value.state if isinstance(value, _Instance) and value.kind == kind else None
    return [state.get(name) if type(state) is dict else None for name in names]


def _refuse(name: str, what: str) -> NoReturn:
    raise PickleError((name[:100] or '""') + f": {what}")


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
