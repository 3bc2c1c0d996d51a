"""A safetensors file that is written whole or not at all.

It is built beside its destination under a temporary name, its full size reserved before the first byte, and given its
name only when complete and on the disk: a reader sees the old file or the whole new one. The header is written last, so
that it can tell what was only found out meanwhile.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, NoReturn, Self

from ckptavg.errors import OutputError, OutputExistsError
from ckptavg.readers import ITEM_SIZE, StoredTensor

_CHUNK: Final = 1 << 20
_NO_LINK: Final = (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS)  # file systems without hard links


class SafetensorsFile:
    """An output under construction; a context manager that leaves nothing behind unless `commit` was called.

    Attributes:
        size: of the file, in bytes.
        sha256: of the file, once committed.
    """

    def __init__(
        self, path: Path, specs: Mapping[str, StoredTensor], metadata: Mapping[str, str], *, force: bool = False
    ) -> None:
        """Reserve the space.

        Args:
            path: the destination; its directory must exist.
            specs: name → dtype and shape.
            metadata: the header's ``__metadata__``, as it is at `commit`: values may change until then, not their
                length.
            force: replace an existing file.
        Raises:
            OutputExistsError: if the destination exists and ``force`` is not given.
            OutputError: if it cannot be written, or there is not enough space.
        """
        preflight(path, force)
        self.path = path
        self.sha256 = ""
        self._force = force
        self._specs = specs
        self._metadata = metadata
        _, self._offsets, self.size = _layout(specs, metadata)
        self._missing = sum(spec.nbytes for spec in specs.values())
        self._written: set[tuple[str, int, int]] = set()
        self._temporary = path.parent / f".{path.name}.{os.getpid()}.ckptavg-tmp"
        self._fd = -1
        try:
            self._fd = os.open(self._temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            _reserve(self._fd, self.size)
        except OSError as error:
            self.close()
            _refuse(path, error, self.size)
        except BaseException:
            self.close()
            raise

    def write(self, name: str, offset: int, data: memoryview | bytes) -> None:
        """Write bytes of a tensor, in any order; a range written before may be written again as a whole.

        Args:
            name: the tensor.
            offset: the first byte, within the tensor.
            data: its elements, little-endian.
        """
        if not 0 <= offset <= offset + len(data) <= self._specs[name].nbytes:
            raise AssertionError(f"{name}: {len(data)} bytes at {offset} do not fit {self._specs[name]}")
        try:
            self._pwrite(memoryview(data), self._offsets[name] + offset)
        except OSError as error:
            _refuse(self.path, error, self.size)
        if (part := (name, offset, len(data))) not in self._written:
            self._written.add(part)
            self._missing -= len(data)

    def read_into(self, name: str, start: int, out: memoryview) -> None:
        """Fill ``out`` with the elements from number ``start`` on of a tensor that has been written."""
        position = self._offsets[name] + start * ITEM_SIZE[self._specs[name].dtype]
        done = 0
        while done < len(out):
            done += os.preadv(self._fd, [out[done:]], position + done)

    def commit(self) -> None:
        """Write the header, flush the file to the disk and give it its name.

        Raises:
            OutputExistsError: if the destination has come to exist meanwhile and ``force`` was not given.
            OutputError: if the disk refuses.
        """
        if self._missing:
            raise AssertionError(f"{self._missing} bytes were not written")
        header, offsets, size = _layout(self._specs, self._metadata)
        if (offsets, size) != (self._offsets, self.size):
            raise AssertionError("the metadata has changed its length")
        try:
            self._pwrite(memoryview(header), 0)
            with ThreadPoolExecutor(1) as pool:
                flushed = pool.submit(os.fsync, self._fd)  # the disk writes while the processor hashes
                self.sha256 = self._digest()
                flushed.result()
            if os.fstat(self._fd).st_size != self.size:
                raise OutputError("another program changed the file while it was written", path=self.path)
            self._publish()
            folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except FileExistsError as error:
            raise _exists(self.path) from error
        except OSError as error:
            _refuse(self.path, error, self.size)

    def close(self) -> None:
        """Remove the temporary file, if it is still there."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _publish(self) -> None:
        if self._force:
            if self.path.exists():
                os.fchmod(self._fd, stat.S_IMODE(self.path.stat().st_mode))
            os.replace(self._temporary, self.path)  # noqa: PTH105  # one spelling for all three calls
            return
        try:
            os.link(self._temporary, self.path)  # unlike rename, refuses an existing name atomically
        except OSError as error:
            if error.errno not in _NO_LINK:
                raise
            if os.path.lexists(self.path):
                raise FileExistsError from error
            os.rename(self._temporary, self.path)  # noqa: PTH104

    def _pwrite(self, data: memoryview, position: int) -> None:
        done = 0
        while done < len(data):
            done += os.pwrite(self._fd, data[done:], position + done)

    def _digest(self) -> str:
        digest = hashlib.sha256()
        buffer = memoryview(bytearray(_CHUNK))
        position = 0
        while count := os.preadv(self._fd, [buffer], position):
            digest.update(buffer[:count])
            position += count
        return digest.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a small file, whole or not at all; an existing one is replaced.

    Raises:
        OutputError: if it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.ckptavg-tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OutputError(f"cannot be written: {error.strerror}", path=path) from error


def preflight(path: Path, force: bool) -> None:
    """Refuse a destination that cannot be written, before hours of work for it.

    Raises:
        OutputExistsError: if it exists and ``force`` is not given.
        OutputError: if its directory does not exist or is not writable, or it is itself a directory.
    """
    if os.path.isdir(path):  # noqa: PTH112  # False where it cannot be looked at
        raise OutputError("is a directory", path=path)
    if os.path.lexists(path) and not force:
        raise _exists(path)
    try:
        folder = stat.S_ISDIR(path.parent.stat().st_mode)
    except FileNotFoundError as error:
        raise OutputError("no such directory", path=path.parent, hint=f"mkdir -p '{path.parent}'") from error
    except (OSError, ValueError) as error:
        raise OutputError(os.strerror(getattr(error, "errno", 0) or errno.EINVAL).lower(), path=path.parent) from error
    if not folder:
        raise OutputError("is no directory", path=path.parent)
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise OutputError("permission denied", path=path.parent)


def _exists(path: Path) -> OutputExistsError:
    return OutputExistsError("exists already", path=path, hint="replace it with --force, or choose another -o")


def _layout(specs: Mapping[str, StoredTensor], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int], int]:
    """The header's bytes, where each tensor starts in the file, and the file's size.

    Tensors lie by falling element size and then by name, so each is aligned; so does the safetensors library.
    """
    entries: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    starts: dict[str, int] = {}
    end = 0
    for name in sorted(specs, key=lambda name: (-ITEM_SIZE[specs[name].dtype], name)):
        spec = specs[name]
        starts[name], end = end, end + spec.nbytes
        entries[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [starts[name], end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    data = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: data + start for name, start in starts.items()}, data + end


def _reserve(fd: int, size: int) -> None:
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise
        os.ftruncate(fd, size)  # this file system cannot reserve


def _refuse(path: Path, error: OSError, size: int) -> NoReturn:
    what = os.strerror(error.errno or 0).lower()
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        space = os.statvfs(path.parent)
        what = f"{what}: {size:,} bytes are needed, {space.f_bavail * space.f_frsize:,} are free"
    raise OutputError(f"cannot be written: {what}", path=path) from error
