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
from typing import Final, Self

from ckptavg.errors import OutputError
from ckptavg.filesystem.atomic import Temporary, flush_folder, os_message, raise_output_error
from ckptavg.output.destination import exists_error, preflight
from ckptavg.readers import ITEM_SIZE, StoredTensor
from ckptavg.runtime import signals
from ckptavg.runtime.workers import ALONE, Workers

_CHUNK: Final = 1 << 20
_NO_LINK: Final = (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS)  # file systems without hard links


class SafetensorsFile:
    """An output under construction; a context manager that leaves nothing behind unless `commit` was called.

    Attributes:
        size: of the file, in bytes.
        sha256: of the file, once committed.
    """

    def __init__(
        self, path: Path, specs: Mapping[str, StoredTensor], metadata: Mapping[str, str], *, force: bool = False,
        workers: Workers = ALONE,
    ) -> None:  # fmt: skip
        """Reserve the space.

        Args:
            path: the destination; its directory must exist.
            specs: name → dtype and shape.
            metadata: the header's ``__metadata__``, as it is at `commit`: values may change until then, not their
                length.
            force: replace an existing file.
            workers: who write it together, each its own ranges; `settle`, `seal` and this are called by all.
        Raises:
            OutputExistsError: if the destination exists and ``force`` is not given.
            OutputError: if it cannot be written, or there is not enough space.
        """
        self.path = path
        self.sha256 = ""
        self._workers = workers
        self._force = force
        self._specs = specs
        self._metadata = metadata
        _, self._offsets, self.size = _layout(specs, metadata)
        self._missing = sum(spec.nbytes for spec in specs.values())
        self._written: set[tuple[str, int, int]] = set()
        self._file: Temporary | None = None
        shared = workers.broadcast(workers.on_rank_zero(self._create))
        if shared and not workers.is_rank_zero:
            self._file = self._joined(shared)

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
            self._open.write(data, self._offsets[name] + offset)
        except OSError as error:
            raise_output_error(self.path, error, self.size)
        if self._missing and (part := (name, offset, len(data))) not in self._written:
            self._written.add(part)
            self._missing -= len(data)

    def read_into(self, name: str, start: int, out: memoryview) -> None:
        """Fill ``out`` with the elements from number ``start`` on of a tensor that has been written."""
        position = self._offsets[name] + start * ITEM_SIZE[self._specs[name].dtype]
        done = 0
        while done < len(out):
            try:
                count = os.preadv(self._open.fd, [out[done:]], position + done)
            except OSError as error:
                raise_output_error(self.path, error, self.size)
            if not count:
                raise _changed_error(self.path)
            done += count

    def barrier(self) -> None:
        """Wait until all workers have written what they have to, which each of them can read then.

        On a network file system others see what was flushed, and a file as it was when they opened it.
        """
        if self._workers.world_size == 1:
            return
        whole = sum(spec.nbytes for spec in self._specs.values())
        try:
            os.fsync(self._open.fd)
        except OSError as error:
            raise_output_error(self.path, error, self.size)
        self._missing = whole - sum(whole - missing for missing in self._workers.gather(self._missing))
        if not self._workers.is_rank_zero:
            path = self._open.path
            self.close()
            self._file = self._joined(path)

    def commit(self) -> None:
        """`publish`, and flush the name to the disk too: it survives a power cut.

        Raises:
            OutputError: if that cannot be done; the file is there and whole.
        """
        self.publish()
        flush_folder(self.path)

    def publish(self) -> None:
        """Write the header, flush the file to the disk and give it its name; of several workers the first one does it.

        Raises:
            OutputExistsError: if the destination has come to exist meanwhile and ``force`` was not given.
            OutputError: if the disk refuses.
        """
        file = self._finished()
        try:
            with ThreadPoolExecutor(1) as pool:
                flushed = pool.submit(os.fsync, file.fd)  # the disk writes while the processor hashes
                self.sha256 = _digest(file.fd)
                flushed.result()
            if os.fstat(file.fd).st_size != self.size:
                raise _changed_error(self.path)
            self._publish(file)
        except FileExistsError as error:
            raise exists_error(self.path) from error
        except OSError as error:
            raise_output_error(self.path, error, self.size)

    def finalize(self) -> str:
        """Finish the file without a name: the SHA-256 that it would have; called by all workers."""

        def digest() -> str:
            file = self._finished()
            try:
                return _digest(file.fd)
            except OSError as error:
                raise_output_error(self.path, error, self.size)

        return self._workers.broadcast(self._workers.on_rank_zero(digest)) or ""

    def _finished(self) -> Temporary:
        """The file with its header."""
        if self._missing:
            raise AssertionError(f"{self._missing} bytes were not written")
        header, offsets, size = _layout(self._specs, self._metadata)
        if (offsets, size) != (self._offsets, self.size):
            raise AssertionError("the metadata has changed its length")
        try:
            self._open.write(header, 0)
        except OSError as error:
            raise_output_error(self.path, error, self.size)
        return self._open

    def close(self) -> None:
        """Remove the temporary file, if it is still there."""
        if self._file is not None:
            file, self._file = self._file, None
            file.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _open(self) -> Temporary:
        assert self._file is not None, "it is closed"
        return self._file

    def _create(self) -> Path:
        preflight(self.path, self._force)
        try:
            self._file = Temporary(self.path)
            _reserve(self._file.fd, self.size)
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise_output_error(self.path, error, self.size)
            raise
        return self._file.path

    def _joined(self, path: Path) -> Temporary:
        """What the first worker has made."""
        try:
            return Temporary.joined(path)
        except OSError as error:
            what = f"cannot be opened by worker {self._workers.rank}: {os_message(error)}"
            hint = "the output must lie on a file system that all machines share"
            raise OutputError(what, path=path, hint=hint) from error

    def _publish(self, file: Temporary) -> None:
        if self._force:
            if self.path.exists():
                os.fchmod(file.fd, stat.S_IMODE(self.path.stat().st_mode))
            os.replace(file.path, self.path)  # noqa: PTH105  # one spelling for all three calls
            return
        try:
            os.link(file.path, self.path)  # unlike rename, refuses an existing name atomically
        except OSError as error:
            if error.errno not in _NO_LINK:
                raise
            if os.path.lexists(self.path):
                raise FileExistsError from error
            os.rename(file.path, self.path)  # noqa: PTH104


def _changed_error(path: Path) -> OutputError:
    return OutputError("another program changed the file while it was written", path=path)


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


def _digest(fd: int) -> str:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_CHUNK))
    position = 0
    while count := os.preadv(fd, [buffer], position):
        signals.check()
        digest.update(buffer[:count])
        position += count
    return digest.hexdigest()


def _reserve(fd: int, size: int) -> None:
    try:
        os.posix_fallocate(fd, 0, size)
    except (OSError, AttributeError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise
        os.ftruncate(fd, size)  # this file system, or this system, cannot reserve
