"""Map between safetensors' dtype names and torch's dtypes."""

from collections.abc import Iterable, Mapping
from functools import reduce
from typing import Final

import torch

from ckptavg.readers import FLOATING, StoredTensor

TORCH: Final[Mapping[str, torch.dtype]] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
    "C64": torch.complex64, "C128": torch.complex128,
}  # fmt: skip
NAMES: Final[Mapping[str, str]] = {str(dtype).removeprefix("torch."): name for name, dtype in TORCH.items()}


def common(dtypes: Iterable[str]) -> str:
    """Return the narrowest dtype that holds the values of all ``dtypes``, which are floating-point or equal."""
    first, *others = set(dtypes)
    return (
        NAMES[str(reduce(torch.promote_types, map(TORCH.__getitem__, others), TORCH[first]))[6:]] if others else first
    )


def dtype_names(specs: Iterable[StoredTensor]) -> str:
    """Return the floating-point and complex dtypes of tensors as config.json spells them: ``bfloat16, float32``."""
    dtypes = {spec.in_file[0] for spec in specs if spec.dtype in FLOATING}
    return ", ".join(sorted(str(TORCH[dtype]).removeprefix("torch.") for dtype in dtypes))
