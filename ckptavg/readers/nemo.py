"""NeMo's ``.nemo`` archives: a tar with ``model_weights.ckpt``, a file of ``torch.save``, which is read in place."""

import re
from typing import Final, NamedTuple, NoReturn

from ckptavg.errors import InputError
from ckptavg.filesystem.regular_file import RegularFile
from ckptavg.readers import Format, NotACheckpointError, Reader
from ckptavg.readers.torch_zip import open_inside

MAX_MEMBERS: Final = 10_000
MAX_EXTENSION: Final = 1 << 16  # bytes of a member's further attributes
_WEIGHTS: Final = "model_weights.ckpt"
_BLOCK: Final = 512
_RECORD: Final = 20 * _BLOCK  # an archive is padded to a multiple of it
_SIZE: Final = re.compile(rb"[0-9]+ size=([0-9]{1,18})\n")


class _Member(NamedTuple):
    name: str
    kind: bytes
    start: int
    size: int

    @property
    def after(self) -> int:
        """Offset of the next header."""
        return self.start + -(-self.size // _BLOCK) * _BLOCK


def _claims(head: bytes) -> bool:
    """Return True for POSIX's and GNU's tar."""
    return head[257:262] == b"ustar"


def _open(file: RegularFile) -> Reader:
    if file.size % _RECORD or not file.size:
        what = f"{file.size} bytes present, not a multiple of {_RECORD} (still being written?)"
        raise InputError(f"file is truncated: {what}", path=file.path)
    members = [member for member in _members(file) if member.name.removeprefix("./") == _WEIGHTS]
    if not members:
        what = f"is a tar archive without {_WEIGHTS} (torch < 0.4, or no checkpoint)"
        raise NotACheckpointError(f"{what}; unpack it, or save it again with torch ≥ 1.6", file.path)
    if len(members) > 1 or members[0].kind not in b"0\0":
        _damaged(file, f"has {len(members)} entries of {_WEIGHTS}, not one file")
    return open_inside(file, members[0].start, members[0].size, _WEIGHTS)


def _members(file: RegularFile) -> list[_Member]:
    members: list[_Member] = []
    position, extended = 0, None
    while (header := file.read(position, _BLOCK)).strip(b"\0"):
        member = _member(file, position, header, extended)
        extended = None
        if member.kind in b"xg":  # attributes of the next member, or of all; the size, if it has more than 8 GiB
            if member.size > MAX_EXTENSION:
                _damaged(file, f"has attributes of {member.size} bytes at byte {position}")
            if member.kind == b"x" and (size := _SIZE.search(file.read(member.start, member.size))):
                extended = int(size[1])
        else:
            members.append(member)
        if len(members) > MAX_MEMBERS:
            _damaged(file, f"has more than {MAX_MEMBERS} entries")
        if (position := member.after) + _BLOCK > file.size:
            _damaged(file, f"places {member.name} beyond its end")
    if file.size - position > _RECORD or file.read(position, file.size - position).strip(b"\0"):
        _damaged(file, f"has entries after its end at byte {position}")
    return members


def _member(file: RegularFile, position: int, header: bytes, size: int | None) -> _Member:
    name, stored, checksum = header[:100], header[124:136].strip(b" \0"), header[148:156].strip(b" \0")
    unsigned = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    if not re.fullmatch(rb"[0-7]+", checksum) or int(checksum, 8) != unsigned or not re.fullmatch(rb"[0-7]+", stored):
        _damaged(file, f"has a damaged entry at byte {position}")
    text = name.rstrip(b"\0").decode("utf-8", "backslashreplace")
    return _Member(text, header[156:157], position + _BLOCK, int(stored, 8) if size is None else size)


def _damaged(file: RegularFile, what: str) -> NoReturn:
    raise InputError(f"tar archive {what}: the file is damaged", path=file.path)


READER: Final = Format("nemo", (".nemo",), _claims, _open)
