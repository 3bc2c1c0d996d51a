"""Strict parser of zip directories that accepts only archives in the form of ``torch.save``.

Archives that two parsers read differently can deceive scanners, so anything ambiguous (a repeated name, overlapping
records, bytes after the end, two different sizes) is refused.
"""

import struct
from collections import Counter
from collections.abc import Sequence
from operator import attrgetter
from typing import Final, NamedTuple, NoReturn

from ckptavg.errors import InputError
from ckptavg.filesystem.regular_file import RegularFile

MAX_ENTRIES: Final = 1 << 18
MAX_DIRECTORY: Final = 128 << 20

_END: Final = struct.Struct("<4s4H2LH")
_END64: Final = struct.Struct("<4sQ2H2L4Q")
_LOCATOR: Final = struct.Struct("<4sLQL")
_CENTRAL: Final = struct.Struct("<4s6H3L5H2L")
_LOCAL: Final = struct.Struct("<4s5H3L2H")
_DESCRIPTOR, _UTF8 = 1 << 3, 1 << 11
_ENCRYPTED: Final = 1 | 1 << 6 | 1 << 13
_MANY: Final = {2: 0xFFFF, 4: 0xFFFFFFFF}  # value of a field of 2 or 4 bytes if the true value is in the zip64 part


class Entry(NamedTuple):
    """Entry of a record in the central directory."""

    name: str
    flags: int
    method: int
    crc: int
    stored: int
    size: int
    offset: int


def central_directory(file: RegularFile) -> tuple[Sequence[Entry], int]:
    """Return the entries of the central directory at the end of ``file``, and its offset.

    Raises:
        InputError: if the file is truncated, has bytes after its end, or the directory is damaged.
    """
    count, length, begin = _end(file)
    if count > MAX_ENTRIES or length > MAX_DIRECTORY:
        raise InputError(f"zip directory of {count} entries in {length} bytes is too large", path=file.path)
    data = file.read(begin, length)
    entries: list[Entry] = []
    position = 0
    for _ in range(count):
        name_at = position + _CENTRAL.size
        if name_at > length:
            _damaged(file, "is cut off")
        header = _CENTRAL.unpack_from(data, position)
        signature, _, _, flags, method, _, _, crc, stored, size, *lengths, disk, _, _, offset = header
        extra_at = name_at + lengths[0]
        comment_at = extra_at + lengths[1]
        position = comment_at + lengths[2]
        if signature != b"PK\x01\x02" or position > length or disk != 0:
            _damaged(file, "has a bad entry")
        try:
            name = data[name_at:extra_at].decode("utf-8")
        except UnicodeDecodeError:
            _damaged(file, "has a name that is not UTF-8")
        if "\0" in name:
            _damaged(file, "has a name with a NUL in it")
        if 0xFFFFFFFF in (stored, size, offset):
            size, stored, offset = _zip64(file, data[extra_at:comment_at], (size, stored, offset))
        entries.append(Entry(name, flags, method, crc, stored, size, offset))
    if position != length:
        _damaged(file, f"has {length - position} bytes after its {count} entries")
    for name, times in Counter(entry.name for entry in entries).items():
        if times > 1:
            _damaged(file, f"lists {name} twice")
    return entries, begin


def locate(file: RegularFile, entries: Sequence[Entry], end: int) -> dict[str, int]:
    """Return record name → offset of its bytes, after comparing every local header with its entry.

    No record may exceed the offset ``end``.

    Raises:
        InputError: if a record is compressed, encrypted, out of range or overlapping, or its two headers differ.
    """
    starts: dict[str, int] = {}
    free = 0
    for entry in sorted(entries, key=attrgetter("offset")):
        if entry.offset < free:
            _damaged(file, f"places {entry.name} over another record")
        starts[entry.name] = start_of(file, entry, end)
        free = starts[entry.name] + entry.size
    if entries and min(entry.offset for entry in entries) != 0:
        raise InputError("has bytes before its first record, unlike files of torch.save", path=file.path)
    return starts


def _end(file: RegularFile) -> tuple[int, int, int]:
    """Return the number of entries and the central directory's size and offset, from the archive's end records."""
    at = file.size - _END.size
    tail = file.read(at, _END.size) if at >= 0 else b""
    if tail[:4] != b"PK\x05\x06" or tail[-2:] != b"\0\0":
        _no_end(file)
    _, disk, first_disk, *fields, _ = _END.unpack(tail)
    directory_end = at
    locator_at = at - _LOCATOR.size
    locator = file.read(locator_at, _LOCATOR.size) if locator_at >= 0 else b""
    if locator[:4] == b"PK\x06\x07":
        _, disk64, directory_end, disks = _LOCATOR.unpack(locator)
        if directory_end + _END64.size != locator_at:
            _damaged(file, "does not end at the offset in its zip64 locator")
        signature, length, _, _, disk_a, disk_b, *fields64 = _END64.unpack(file.read(directory_end, _END64.size))
        if signature != b"PK\x06\x06" or length != _END64.size - 12 or disk64 or disks > 1 or disk_a or disk_b:
            _damaged(file, "has a bad zip64 end")
        for width, short, true in zip((2, 2, 4, 4), fields, fields64, strict=True):
            if short not in (true, _MANY[width]):
                _damaged(file, "has two end records that disagree")
        fields = fields64
    here, count, size, offset = fields
    if disk or first_disk or here != count:
        raise InputError("is one part of a zip archive in several", path=file.path)
    if offset + size != directory_end:
        _damaged(file, f"takes bytes {offset} to {offset + size}, but should end at {directory_end}")
    return count, size, offset


def _no_end(file: RegularFile) -> NoReturn:
    window = min(file.size, _END.size + 0xFFFF)  # bytes of the longest comment
    end_at = file.read(file.size - window, window).rfind(b"PK\x05\x06")
    trailing = window - end_at - _END.size
    if end_at >= 0 and trailing >= 0:
        raise InputError(f"{trailing} bytes follow the end of the zip archive", path=file.path)
    missing = "the directory that ends a zip archive (still being written?)"
    raise InputError(f"file is truncated: {file.size} bytes present, but not {missing}", path=file.path)


def _zip64(file: RegularFile, extra: bytes, fields: tuple[int, int, int]) -> tuple[int, int, int]:
    """Replace the 0xFFFFFFFF in ``fields``, in order, by the 8-byte numbers of the zip64 extra field."""
    kind, body = 0, b""
    while len(extra) >= 4 and kind != 1:
        kind, length = struct.unpack_from("<2H", extra)
        body, extra = extra[4 : 4 + length], extra[4 + length :]
    numbers = [int.from_bytes(body[i : i + 8], "little") for i in range(0, len(body) - 7, 8)] if kind == 1 else []
    if len(numbers) < fields.count(0xFFFFFFFF):
        _damaged(file, "lacks a size of more than 4 GiB")
    first, second, third = (numbers.pop(0) if field == 0xFFFFFFFF else field for field in fields)
    return first, second, third


def start_of(file: RegularFile, entry: Entry, end: int) -> int:
    """Return the offset of the bytes of ``entry``, after comparing its local header with it; as `locate`."""
    if entry.flags & _ENCRYPTED:
        raise InputError(f"record {entry.name} is encrypted", path=file.path)
    if entry.method != 0:
        raise InputError(f"record {entry.name} is compressed, unlike those of torch.save", path=file.path)
    if entry.flags & ~(_DESCRIPTOR | _UTF8) or entry.stored != entry.size:
        _damaged(file, f"has an entry for {entry.name} that contradicts itself")
    name = entry.name.encode("utf-8")
    if entry.offset + _LOCAL.size + len(name) > end:
        _damaged(file, f"places {entry.name} beyond the end of the records")
    header = file.read(entry.offset, _LOCAL.size + len(name))
    signature, _, flags, method, _, _, crc, stored, size, name_length, extra_length = _LOCAL.unpack_from(header)
    late = entry.flags & _DESCRIPTOR  # the local header may leave out CRC and sizes, which then follow the bytes
    if not (
        signature == b"PK\x03\x04"
        and (flags, method) == (entry.flags, entry.method)
        and (crc == entry.crc or (late and crc == 0))
        and all(number in (entry.size, 0xFFFFFFFF) or (late and number == 0) for number in (stored, size))
        and name_length == len(name)
        and header[_LOCAL.size :] == name
    ):
        _damaged(file, f"and the header of record {entry.name} do not agree")
    if (start := entry.offset + len(header) + extra_length) + entry.size > end:
        _damaged(file, f"places {entry.name} beyond the end of the records")
    return start


def _damaged(file: RegularFile, what: str) -> NoReturn:
    raise InputError(f"zip directory {what}: the file is damaged", path=file.path)
