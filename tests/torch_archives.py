"""Torch files for the readers' tests: built by hand, so that every byte can be wrong, and read back completely."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ckptavg.readers import Node, Reader, Refused, StoredTensor, open_reader

TORCH_DTYPE = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "C64": torch.complex64, "C128": torch.complex128,
}  # fmt: skip


@dataclass
class Entry:
    """One record of a zip archive; ``central`` and ``local`` replace fields of its two headers."""

    name: str
    data: bytes = b""
    central: Mapping[str, int] = field(default_factory=dict)
    local: Mapping[str, int | bytes] = field(default_factory=dict)
    extra: bytes = b""


def zip_bytes(entries: Iterable[Entry], *, before: bytes = b"", after: bytes = b"", **end: int) -> bytes:
    """Return a minimal zip archive; ``end`` replaces fields of its end record."""
    body, directory, count = before, b"", 0
    for entry in entries:
        name = entry.name.encode("utf-8", "surrogatepass")
        fields = {"flags": 0, "method": 0, "crc": zlib.crc32(entry.data), "stored": len(entry.data)}
        fields |= {"size": len(entry.data), "offset": len(body), "name_length": len(name), "disk": 0}
        fields |= {"signature": 0x02014B50} | entry.central
        shown = {**fields, "name": name, "signature": b"PK\3\4"} | entry.local
        directory += struct.pack(
            "<L6H3L5H2L", fields["signature"], 0, 0, fields["flags"], fields["method"], 0, 0, fields["crc"],
            fields["stored"], fields["size"], fields["name_length"], len(entry.extra), 0, fields["disk"], 0, 0,
            fields["offset"],
        ) + name + entry.extra  # fmt: skip
        body += struct.pack(
            "<4s5H3L2H", shown["signature"], 0, shown["flags"], shown["method"], 0, 0, shown["crc"], shown["stored"],
            shown["size"], len(shown["name"]), 0,
        ) + shown["name"] + entry.data  # fmt: skip
        count += 1
    values = {"disk": 0, "here": count, "count": count, "size": len(directory), "offset": len(body), "comment": 0} | end
    tail = struct.pack(
        "<4s4H2LH", b"PK\5\6", values["disk"], 0, values["here"], values["count"], values["size"], values["offset"],
        values["comment"],
    )  # fmt: skip
    return body + directory + tail + after


def archive(path: Path, pickle: bytes, records: Mapping[str, bytes] | None = None, **extra: bytes) -> Path:
    """Return a torch file with this ``data.pkl`` and these storages."""
    entries = [Entry("archive/data.pkl", pickle)]
    entries += [Entry(f"archive/data/{key}", data) for key, data in (records or {}).items()]
    entries += [Entry(f"archive/{name}", data) for name, data in ({"version": b"3\n"} | extra).items()]
    path.write_bytes(zip_bytes(entries))
    return path


def values(reader: Reader, node: Node | None = None) -> object:
    """Return ``node``, or the whole tree, with every tensor read: (dtype, shape, bytes)."""
    node = reader.tree if node is None else node
    if isinstance(node, StoredTensor):
        content = bytearray(node.nbytes)
        reader.read_into(node, 0, memoryview(content))
        return node.dtype, node.shape, bytes(content)
    if isinstance(node, Refused):
        return f"refused: {node.reason}"
    if isinstance(node, Mapping):
        return {name: None if child is None else values(reader, child) for name, child in node.items()}
    if isinstance(node, list | tuple):
        return [None if child is None else values(reader, child) for child in node]
    return node


def read(path: Path) -> object:
    """Read everything in the file."""
    reader = open_reader(path)
    try:
        return values(reader)
    finally:
        reader.close()


def expected(value: object) -> object:
    """Return the expected result of `read` for the result of ``torch.load``."""
    if isinstance(value, torch.Tensor):
        plain = value.detach().clone(memory_format=torch.contiguous_format).flatten()
        dtype = next(name for name, dtype in TORCH_DTYPE.items() if dtype == value.dtype)
        return dtype, tuple(value.shape), bytes(plain.view(torch.uint8).numpy()) if plain.numel() else b""
    if isinstance(value, Mapping):
        return {key if isinstance(key, str) else repr(key): expected(child) for key, child in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [expected(child) for child in value]
    return value if type(value) in (str, int, float, bool) else None
