"""Makers for the globals in a ``torch.save`` pickle: tensor descriptions, plain containers, NumPy's numbers.

Nothing here refuses a file. An unsupported tensor becomes `Refused`, which is an error only if the model contains it.
"""

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Final

from ckptavg.readers import ITEM_SIZE, MAX_RANK, Refused, StoredTensor, naturals
from ckptavg.readers.pickle.unpickler import Global, Inert, Maker, PickleError

_STORAGES: Final[Mapping[str, str]] = {
    "torch.DoubleStorage": "F64", "torch.FloatStorage": "F32", "torch.HalfStorage": "F16",
    "torch.BFloat16Storage": "BF16", "torch.LongStorage": "I64", "torch.IntStorage": "I32", "torch.ShortStorage": "I16",
    "torch.CharStorage": "I8", "torch.ByteStorage": "U8", "torch.BoolStorage": "BOOL",
    "torch.ComplexFloatStorage": "C64", "torch.ComplexDoubleStorage": "C128",
    "torch.storage.UntypedStorage": "U8", "torch.UntypedStorage": "U8",
}  # fmt: skip
DTYPES: Final[Mapping[str, str]] = {
    "torch.float64": "F64", "torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16",
    "torch.int64": "I64", "torch.int32": "I32", "torch.int16": "I16", "torch.int8": "I8",
    "torch.uint64": "U64", "torch.uint32": "U32", "torch.uint16": "U16", "torch.uint8": "U8", "torch.bool": "BOOL",
    "torch.float8_e4m3fn": "F8_E4M3", "torch.float8_e5m2": "F8_E5M2", "torch.float8_e8m0fnu": "F8_E8M0",
    "torch.float8_e4m3fnuz": "F8_E4M3FNUZ", "torch.float8_e5m2fnuz": "F8_E5M2FNUZ",
    "torch.complex64": "C64", "torch.complex128": "C128",
}  # fmt: skip
_PLAIN: Final = ("torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.Parameter", "torch.nn.parameter.Buffer")
_WHOLE: Final = ("Shard", "_StridedShard", "Replicate")  # placements whose values are those of the tensor
_MERGE: Final = (
    "a file of torch.save holds one rank's part of it; merge the ranks first (verl: python -m verl.model_merger merge "
    "--backend fsdp --local_dir DIR --target_dir NEW), or save with torch.distributed.checkpoint, which is read"
)
_BUILTINS: Final = ("builtins", "__builtin__")
_ZERO_STAGE: Final = "deepspeed.runtime.zero.config.ZeroStageEnum"
_ZERO_STAGES: Final[Mapping[object, int]] = {"disabled": 0, "optimizer_states": 1, "gradients": 2, "weights": 3}
_NUMPY: Final[Mapping[str, str]] = {
    "f8": "d", "f4": "f", "f2": "e", "b1": "?",
    "i8": "q", "i4": "i", "i2": "h", "i1": "b", "u8": "Q", "u4": "I", "u2": "H", "u1": "B",
}  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Storage:
    """The ``size`` bytes of ``record`` that tensors are views of."""

    dtype: str  # of the elements, unless a tensor has a dtype of its own
    record: str
    size: int
    refusal: str  # the reason why it is not supported, or ""


@dataclass(slots=True, eq=False)
class _NumpyDtype:
    """A NumPy dtype; ``letter`` and ``format`` are those of the module struct, ``""`` if not of plain numbers."""

    letter: str
    format: str = ""

    def set_state(self, state: object) -> None:
        """Set the byte order from BUILD's argument: (version, order, ...)."""
        order = state[1] if type(state) is tuple and len(state) > 1 else None
        order = "<" if order == "|" else order
        self.format = f"{order}{self.letter}" if order in ("<", ">") and self.letter else ""


def storage(persistent_id: Any, sizes: Mapping[str, int]) -> Storage:
    """Return the storage of the id ("storage", class, key, location, number of elements).

    Args:
        sizes: record → its size in bytes.
    Raises:
        PickleError: if it is not the id of a storage.
    """
    is_id = type(persistent_id) is tuple and len(persistent_id) == 5 and persistent_id[0] == "storage"
    _, cls, key, location, numel = persistent_id if is_id else (None,) * 5
    if not isinstance(cls, Global) or type(key) is not str or type(numel) is not int:
        raise PickleError("is damaged: a persistent id is not a storage's")
    record = f"data/{key[:100]}"
    size = sizes.get(record, 0)
    dtype = _STORAGES.get(cls.name, "")
    refusal = ""
    if not dtype:
        refusal = f"its storage is a {cls.name}, which is not supported"
    elif location == "meta":
        refusal = "is a meta tensor, which has no values"
    elif record not in sizes:
        refusal = f"its record {record} is missing"
    elif numel * ITEM_SIZE[dtype] != size:
        refusal = f"needs {numel} elements of {dtype}, but record {record} has {size} bytes"
    return Storage(dtype, record, size, refusal)


def _tensor(arguments: tuple[object, ...]) -> StoredTensor | Refused:
    """``torch._utils._rebuild_tensor``: (storage, offset, shape, stride)."""
    if len(arguments) < 4 or not isinstance(arguments[0], Storage):
        return Refused("is made from something that is not a storage")
    return _view(arguments[0], arguments[0].dtype, *arguments[1:4])


def _tensor_v2(arguments: tuple[object, ...]) -> StoredTensor | Refused:
    """``torch._utils._rebuild_tensor_v2``: (storage, offset, shape, stride, requires_grad, hooks[, metadata])."""
    if len(arguments) not in (6, 7):
        return Refused(f"is described by {len(arguments)} values, not 6 or 7")
    return _refuse_bits(arguments[6:]) or _tensor(arguments)


def _tensor_v3(arguments: tuple[object, ...]) -> StoredTensor | Refused:
    """``torch._utils._rebuild_tensor_v3``: as v2, but (..., hooks, dtype[, metadata]) over bytes without a type."""
    if len(arguments) not in (7, 8) or not isinstance(arguments[0], Storage):
        return Refused("is made from something that is not a storage")
    dtype = arguments[6].name if isinstance(arguments[6], Global) else "no dtype"
    if dtype not in DTYPES:
        return Refused(f"dtype {dtype} is not supported")
    return _refuse_bits(arguments[7:]) or _view(arguments[0], DTYPES[dtype], *arguments[1:4])


def _refuse_bits(metadata: tuple[object, ...]) -> Refused | None:
    flags = first(metadata)
    if not flags:
        return None
    names = ", ".join(str(name)[:20] for name in list(flags)[:4]) if isinstance(flags, dict) else type(flags).__name__
    return Refused(f"has the bits {names} set; save it after resolve_conj() and resolve_neg()")


def _view(source: Storage, dtype: str, offset: object, shape: object, stride: object) -> StoredTensor | Refused:
    """Return the tensor that starts ``offset`` elements into ``source``; ``stride`` is in elements."""
    if source.refusal:
        return Refused(source.refusal)
    sizes, steps, at = naturals(shape), naturals(stride), naturals((offset,))
    if sizes is None or steps is None or at is None or len(sizes) != len(steps):
        return Refused(f"shape and stride must be up to {MAX_RANK} integers from 0 to 2^63 - 1")
    if 0 in sizes:
        return StoredTensor(dtype, sizes, source.record, 0)
    size, span = ITEM_SIZE[dtype], 1
    dimensions = [(n, step) for n, step in zip(sizes, steps, strict=True) if n > 1]
    for n, step in sorted(dimensions, key=itemgetter(1)):
        if step < span:
            return Refused(f"shape {list(sizes)} with stride {list(steps)} uses some elements more than once")
        span += (n - 1) * step
    if (needed := (at[0] + span) * size) > source.size:
        what = f"shape {list(sizes)} with stride {list(steps)} from element {offset}"
        return Refused(f"{what} needs {needed} bytes, but record {source.record} has {source.size}")
    is_dense, expected = True, 1
    for n, step in reversed(dimensions):
        is_dense = is_dense and step == expected
        expected *= n
    strided = None if is_dense else tuple(1 if n == 1 else step for n, step in zip(sizes, steps, strict=True))
    return StoredTensor(dtype, sizes, source.record, at[0] * size, strided)


def _parameter(arguments: tuple[object, ...]) -> StoredTensor | Refused:
    """``torch._utils._rebuild_parameter`` and ``..._with_state``: (tensor, requires_grad, hooks[, state])."""
    if arguments and isinstance(arguments[0], StoredTensor | Refused):
        return arguments[0]
    return Refused("is a parameter around something that is not a tensor")


def _from_type(arguments: tuple[object, ...]) -> StoredTensor | Refused:
    """Rebuild a tensor from the arguments of ``_rebuild_from_type_v2``: (function, type, arguments, state)."""
    if len(arguments) != 4:
        return Refused(f"is described by {len(arguments)} values, not 4")
    function, cls, inner, state = arguments
    if isinstance(cls, Global) and cls.name.startswith("torch.distributed.") and cls.name.endswith(".DTensor"):
        return _distributed(inner, state)
    if not isinstance(cls, Global) or cls.name not in _PLAIN:
        return Refused(f"is a {cls.name if isinstance(cls, Global) else 'tensor of no class'}, not a plain tensor")
    maker = _TENSORS.get(function.name) if isinstance(function, Global) else None
    if maker is None or type(inner) is not tuple:
        return Refused("is not made like a plain dense tensor")
    return maker(inner)


def _distributed(arguments: object, state: object) -> StoredTensor | Refused:
    """Return a DTensor that is whole on the rank that saved it, such as one of a single rank.

    Args:
        arguments: (class, dtype, shape, ...).
        state: (attributes, slots) with the rank's part and the placements.
    """
    slots = state[1] if type(state) is tuple and len(state) == 2 else state
    attributes: Mapping[object, object] = slots if type(slots) is dict else {}
    part, spec = attributes.get("_local_tensor"), attributes.get("_spec")
    placements = spec.attributes.get("placements") if isinstance(spec, Inert) and spec.attributes else None
    kinds = [one.name if isinstance(one, Inert) else "" for one in placements] if type(placements) is tuple else []
    is_whole = bool(kinds) and all(kind.rpartition(".")[2] in _WHOLE for kind in kinds)
    shape = arguments[2] if type(arguments) is tuple and len(arguments) > 2 else None
    if is_whole and isinstance(part, StoredTensor) and part.shape == naturals(shape):
        return part
    return part if isinstance(part, Refused) else Refused(f"is a DTensor: {_MERGE}")


def _sharded(_: tuple[object, ...]) -> Refused:
    return Refused(f"is a ShardedTensor: {_MERGE}")


def first(arguments: tuple[object, ...]) -> object:
    """Return the only argument."""
    return arguments[0] if arguments else None


def _new(*kinds: type) -> Maker:
    """Return a maker of its argument, if that is of one of ``kinds``, and else of an empty container of the first."""
    return lambda arguments: arguments[0] if arguments and type(arguments[0]) in kinds else kinds[0]()


def _numpy_dtype(arguments: tuple[object, ...]) -> object:
    code = first(arguments)
    return _NumpyDtype(_NUMPY.get(code, "")) if type(code) is str else Inert("numpy.dtype", called=True)


def _numpy_scalar(arguments: tuple[object, ...]) -> object:
    dtype, raw = arguments if len(arguments) == 2 else (None, None)
    kind = dtype.format if isinstance(dtype, _NumpyDtype) else ""
    if kind and type(raw) is bytes and len(raw) == struct.calcsize(kind):
        return struct.unpack(kind, raw)[0]
    return Inert("numpy.generic", called=True)


def _encode(arguments: tuple[object, ...]) -> object:
    """``_codecs.encode(text, "latin1")``, protocol 2's form of bytes; kept only if short enough for a number."""
    text = first(arguments)
    if type(text) is str and len(text) <= 16 and all(ord(char) < 256 for char in text):
        return text.encode("latin1")
    return Inert("bytes", called=False)


def _member(arguments: tuple[object, ...]) -> object:
    """``getattr(class, name)``, a member of an enumeration as pickled by Python 3.11.0 to 3.11.3."""
    owner, name = arguments if len(arguments) == 2 else (None, None)
    if isinstance(owner, Global) and owner.name == _ZERO_STAGE and type(name) is str and name in _ZERO_STAGES:
        return _ZERO_STAGES[name]
    return Inert(owner.name if isinstance(owner, Global) else "getattr", called=True)


def _instance(arguments: tuple[object, ...]) -> object:
    """``copyreg._reconstructor(class, base, state)``, protocol 2's form of some objects."""
    cls = first(arguments)
    return Inert(cls.name if isinstance(cls, Global) else "object", called=False)


def _graph_module(arguments: tuple[object, ...]) -> object:
    """``torch.fx.graph_module.reduce_graph_module``: (attributes, imports of the generated code)."""
    module = Inert("torch.fx.GraphModule", called=False)
    module.set_state(first(arguments))
    return module


def _compiled(arguments: tuple[object, ...]) -> object:
    """``torch.compile``'s wrapper: (module, settings)."""
    module = Inert("torch._dynamo.OptimizedModule", called=False)
    module.set_state({"_parameters": {}, "_buffers": {}, "_modules": {"_orig_mod": first(arguments)}})
    return module


_TENSORS: Final[Mapping[str, Callable[[tuple[object, ...]], StoredTensor | Refused]]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor_v2,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
}
MAKERS: Final[Mapping[str, Maker]] = {
    **_TENSORS,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch.Size": _new(list, tuple),
    **dict.fromkeys(("collections.OrderedDict", "collections.defaultdict", "collections.Counter"), _new(dict)),
    **{f"{module}.{name}": _new(list, tuple) for module in _BUILTINS for name in ("set", "frozenset")},
    **{f"{module}.getattr": _member for module in _BUILTINS},
    "_codecs.encode": _encode,
    "torch.distributed._shard.sharded_tensor.api.ShardedTensor": _sharded,
    **dict.fromkeys(("copyreg._reconstructor", "copyreg.__newobj__"), _instance),
    "torch.fx.graph_module.reduce_graph_module": _graph_module,
    "torch._dynamo.eval_frame.OptimizedModule": _compiled,
    _ZERO_STAGE: first,  # its number
    "numpy.dtype": _numpy_dtype,
    **dict.fromkeys(("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"), _numpy_scalar),
}
