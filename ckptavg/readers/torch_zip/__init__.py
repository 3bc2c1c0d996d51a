"""Files of ``torch.save`` since torch 1.6 (.pt, .pth, .ckpt, .bin), read without running anything in them.

A zip archive of records: ``data.pkl`` describes the objects; ``data/0``, ``data/1``, ... are the storages.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from ckptavg.errors import InputError
from ckptavg.filesystem.regular_file import FilePart, RegularFile
from ckptavg.readers import ITEM_SIZE, Format, NotACheckpointError, Reader, StoredTensor
from ckptavg.readers.pickle.object_tree import object_tree
from ckptavg.readers.pickle.torch_objects import MAKERS, storage
from ckptavg.readers.pickle.unpickler import PickleError, load
from ckptavg.readers.torch_zip.checked_records import CheckedRecord
from ckptavg.readers.torch_zip.strided import gather
from ckptavg.readers.torch_zip.zip_directory import Entry, central_directory, locate, start_of

MAX_PICKLE: Final = 64 << 20
MAX_VERSION: Final = 10  # of the archive; torch 2.13 writes 3
_LISTED: Final = 6  # maximum number of classes in a note


def open_torch(file: RegularFile, *, alone: str | None = None) -> Reader:
    """Open a torch file; ``alone`` is the name in the tree for the content of a file that is one tensor."""
    entries, end = central_directory(file)
    prefix = _prefix(file, entries)
    starts = locate(file, entries, end)
    unchecked = not any(entry.crc for entry in entries)
    records: dict[str, CheckedRecord] = {}
    for entry in entries:
        name = entry.name.removeprefix(prefix)
        records[name] = CheckedRecord(file, name, starts[entry.name], entry.size, entry.crc, unchecked)
    _check_version(file.path, records)
    data, sizes = records["data.pkl"], {name: record.size for name, record in records.items()}
    if data.size > MAX_PICKLE:
        raise InputError(f"data.pkl has {data.size} bytes, more than {MAX_PICKLE}", path=file.path)
    try:
        value = load(data.read(), MAKERS, lambda key: storage(key, sizes))
        tree, left_out = object_tree(value if alone is None else {alone: value})
    except PickleError as error:
        raise InputError(f"data.pkl {error}", path=file.path) from error
    notes = ["was saved without checksums, so damage to its tensors is undetectable"] if unchecked else []
    if left_out:
        listed = ", ".join(name[:100] for name in left_out[:_LISTED]) + (", ..." if len(left_out) > _LISTED else "")
        notes.append(f"left out objects of the classes {listed}")

    def read_into(tensor: StoredTensor, start: int, out: memoryview) -> None:
        first = start * ITEM_SIZE[tensor.dtype]
        assert start >= 0 and first + len(out) <= tensor.nbytes
        if not len(out):
            return
        record = records[tensor.record]
        if tensor.stride is None:
            record.read_into(tensor.offset + first, out, stop=tensor.offset + tensor.nbytes)
            return
        record.check()
        gather(tensor, start, out, lambda at, block: record.read_into(at, block, stop=0))

    return Reader(path=file.path, format="torch", tree=tree, files=(file,), read_into=read_into, notes=tuple(notes))


def open_inside(file: RegularFile, start: int, size: int, name: str) -> Reader:
    """Open the torch file ``name`` that an archive holds uncompressed in ``size`` bytes from ``start`` on."""
    reader = open_torch(FilePart(file, start, size))
    return replace(reader, files=(file,), notes=(f"read {name[:100]} in it", *reader.notes))


def _open(file: RegularFile) -> Reader:
    """Open a torch file, or the only one inside a zip archive, such as Stable-Baselines3's ``policy.pth``."""
    entries, end = central_directory(file)
    if not entries or any(entry.name.endswith("/data.pkl") or "/code/" in entry.name for entry in entries):
        return open_torch(file)
    inside = [entry for entry in entries if entry.name.endswith(READER.suffixes) and "optim" not in entry.name]
    policies = [entry for entry in inside if entry.name.rpartition("/")[2] == "policy.pth"]
    if len(chosen := policies or inside) != 1:
        names = ", ".join(entry.name[:100] for entry in chosen[:_LISTED])
        what = f" of {len(chosen)} checkpoints, {names}; unpack it" if chosen else ", but not of torch.save"
        raise NotACheckpointError(f"is a zip archive{what}", file.path)
    (entry,) = chosen
    if entry.method != 0:
        folder = shlex.quote(file.path.stem)
        hint = f"python -m zipfile -e {shlex.quote(str(file.path))} {folder}  # then name {folder}/{entry.name}"
        raise InputError(f"{entry.name} in it is compressed", path=file.path, hint=hint)
    return open_inside(file, start_of(file, entry, end), entry.size, entry.name)


def _check_version(path: Path, records: Mapping[str, CheckedRecord]) -> None:
    texts = {"byteorder": b"little", "version": b"3"}  # if there is no such record; torch < 2.1 wrote no byte order
    for name in texts:
        if record := records.get(name):
            if record.size > 16:
                raise InputError(f"record {name} has {record.size} bytes, far too many", path=path)
            texts[name] = record.read()
    order, version = texts["byteorder"], texts["version"].strip()
    if order != b"little":
        raise InputError(f"byte order {order!r} is not supported, only little", path=path)
    if not version.isdigit() or not 1 <= int(version) <= MAX_VERSION:
        raise InputError(f"archive version {version!r} is not supported, only 1 to {MAX_VERSION}", path=path)


def _prefix(file: RegularFile, entries: Sequence[Entry]) -> str:
    names = [entry.name for entry in entries]
    prefix = names[0].partition("/")[0] + "/" if names else ""
    inside = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
    if "constants.pkl" in inside or any(name.startswith("code/") for name in inside):
        raise InputError(
            "is a TorchScript file; save its state_dict: torch.save(torch.jit.load(FILE).state_dict(), NEW)",
            path=file.path,
        )
    if len(prefix) < 2 or "data.pkl" not in inside:
        raise NotACheckpointError("is a zip archive, but not of torch.save", file.path)
    if (outside := next((name for name in names if not name.startswith(prefix)), None)) is not None:
        raise InputError(f"zip directory lists {outside}, which is outside of {prefix}", path=file.path)
    return prefix


def _claims(head: bytes) -> bool:
    """Return True for the signature of a zip's first record; `open_torch` checks whether it is torch's."""
    return head.startswith(b"PK\x03\x04")


READER: Final = Format("torch", (".pt", ".pth", ".pth.tar", ".ckpt", ".bin"), _claims, _open)
