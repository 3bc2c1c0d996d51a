"""Safetensors' dtype names and those of torch and config.json."""

from collections.abc import Iterable, Mapping
from typing import Final

from ckptavg.readers import FLOATING, StoredTensor

NAMES: Final[Mapping[str, str]] = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8",
    "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
    "complex64": "C64", "complex128": "C128",
}  # fmt: skip
_NAMES: Final = {dtype: name for name, dtype in NAMES.items()}


def dtype_name(dtype: str) -> str:
    """Return torch's name of a dtype, such as ``bfloat16``."""
    return _NAMES[dtype]


def common(dtypes: Iterable[str]) -> str:
    """Return the narrowest dtype that holds the values of all ``dtypes``, which are floating-point or equal."""
    different = set(dtypes)
    if len(different) == 1:
        return different.pop()
    return "F64" if "F64" in different else "F32"  # of float16 and bfloat16 too


def dtype_names(specs: Iterable[StoredTensor]) -> str:
    """Return the floating-point and complex dtypes of tensors as config.json spells them: ``bfloat16, float32``."""
    return ", ".join(sorted({_NAMES[spec.in_file[0]] for spec in specs if spec.dtype in FLOATING}))
