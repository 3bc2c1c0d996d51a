"""Maker of the sparse tensors in a ``torch.save`` pickle."""

import math
from collections.abc import Mapping
from typing import Final

from ckptavg.readers import Refused, SparseParts, StoredTensor, naturals

_LAYOUTS: Final[Mapping[str, int]] = {  # sparse layout → number of its tensors of indices
    "torch.sparse_coo": 1, "torch.sparse_csr": 2, "torch.sparse_csc": 2, "torch.sparse_bsr": 2, "torch.sparse_bsc": 2,
}  # fmt: skip


def sparse(arguments: tuple[object, ...]) -> StoredTensor | Refused:
    """``torch._utils._rebuild_sparse_tensor``: (layout, (one or two tensors of indices, values, shape, ...))."""
    layout, parts = arguments if len(arguments) == 2 else (None, None)
    count = _LAYOUTS.get(layout, 0) if type(layout) is str else 0
    if not count or type(parts) is not tuple or len(parts) < count + 2:
        return Refused("is sparse, in a layout that is not supported; save it after to_dense()")
    tensors, size = parts[: count + 1], parts[count + 1]
    shape = naturals(tuple(size)) if isinstance(size, list | tuple) else None
    if wrong := next((part for part in tensors if not isinstance(part, StoredTensor)), None):
        return wrong if isinstance(wrong, Refused) else Refused("is sparse, of parts that are no tensors")
    *indices, values = [part for part in tensors if isinstance(part, StoredTensor)]
    if shape is None or math.prod(shape) >= 2**58 or not {part.dtype for part in indices} <= {"I64", "I32"}:
        return Refused("is sparse, with a shape or indices that no tensor has")
    parts_of_it = SparseParts(str(layout), tuple(indices), values)
    return StoredTensor(values.dtype, shape, values.record, values.offset, sparse=parts_of_it)
