"""A ``.safetensors`` file, its header checked strictly: the library accepts duplicate keys and unknown fields."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NoReturn

from ckptavg.errors import InputError
from ckptavg.filesystem.regular_file import RegularFile
from ckptavg.filesystem.strict_json import strict_json
from ckptavg.readers import ITEM_SIZE, MAX_RANK, Format, Reader, StoredTensor, flat_reader, naturals
from ckptavg.readers.pickle.object_tree import MAX_NAME, is_proper

MAX_HEADER: Final = 16 << 20
MAX_TENSORS: Final = 1_000_000


def _claims(head: bytes) -> bool:
    """Return True for eight bytes of length and an opening brace (JSON has no NULs; a small length has)."""
    return head[8:9] == b"{" and (head[:1] != b"{" or 0 in head[:8])


def _open(file: RegularFile) -> Reader:
    size = int.from_bytes(file.read(0, 8), "little")
    data = 8 + size  # the byte at which the tensors begin
    if size > MAX_HEADER:
        raise InputError(f"header length {size} is larger than the {MAX_HEADER} bytes allowed", path=file.path)
    if data > file.size:
        needed = f"the header alone needs {data} (still being written?)"
        raise InputError(f"file is truncated: {file.size} bytes present, {needed}", path=file.path)
    try:
        header: Any = strict_json(file.read(8, size).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"header is not valid JSON: {error}", path=file.path) from error
    if not isinstance(header, dict):
        raise InputError("header is not a JSON object", path=file.path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InputError("__metadata__ must map strings to strings", path=file.path)
    if len(header) > MAX_TENSORS:
        raise InputError(f"{len(header)} tensors, more than {MAX_TENSORS}", path=file.path)
    tensors = {name: _tensor(file.path, name, field) for name, field in header.items()}
    _check_tiling(file, data, tensors)
    return flat_reader(file, READER.name, tensors, metadata, data)


def _tensor(path: Path, name: str, field: Any) -> StoredTensor:
    def refuse(what: str) -> NoReturn:
        raise InputError(what, path=path, tensor=name[:100] or '""')

    if not is_proper(name):
        refuse(f"a tensor's name must have 1 to {MAX_NAME} characters and no control characters")
    if not isinstance(field, dict) or set(field) != {"dtype", "shape", "data_offsets"}:
        refuse("its header entry must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = field["dtype"], naturals(field["shape"], list), naturals(field["data_offsets"], list)
    if not isinstance(dtype, str) or dtype not in ITEM_SIZE:
        refuse(f"dtype {repr(dtype)[:40]} is not supported; supported are {', '.join(ITEM_SIZE)}")
    if shape is None:
        refuse(f"shape must be a list of at most {MAX_RANK} integers from 0 to 2^63 - 1")
    if offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        refuse("data_offsets must be two integers, begin <= end")
    tensor = StoredTensor(dtype, shape, "", offsets[0])
    if (size := tensor.nbytes) != offsets[1] - offsets[0]:
        refuse(f"{dtype} {list(shape)} takes {size} bytes, but data_offsets span {offsets[1] - offsets[0]}")
    return tensor


def _check_tiling(file: RegularFile, data: int, tensors: Mapping[str, StoredTensor]) -> None:
    """Raise InputError unless the tensors fill the data exactly: no gap, no overlap, nothing after."""
    end = 0
    for begin, size, name in sorted((tensor.offset, tensor.nbytes, name) for name, tensor in tensors.items()):
        if begin != end:
            what = "overlaps another tensor" if begin < end else f"leaves a gap after byte {end}"
            raise InputError(what, path=file.path, tensor=name)
        end += size
    present = file.size - data
    if present < end:
        needed = f"the header needs {end} (still being written?)"
        raise InputError(f"file is truncated: {present} bytes of tensors present, {needed}", path=file.path)
    if present > end:
        raise InputError(f"{present - end} bytes follow the last tensor", path=file.path)


READER: Final = Format("safetensors", (".safetensors",), _claims, _open)
