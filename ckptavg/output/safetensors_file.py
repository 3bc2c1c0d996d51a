"""Write a safetensors file atomically: a reader sees either the old file or the complete new one.

The full size is reserved before the first write. The header is written last, because some of its values, such as
digests, are only computed in the meantime; that of the data themselves is `ckptavg.output.data_digest`.
"""

import errno
import json
import os
import stat
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, Self

from ckptavg.errors import OutputError
from ckptavg.filesystem.atomic import Temporary, flush_folder, os_message, output_errors
from ckptavg.filesystem.digest import PLACEHOLDER, Algorithm
from ckptavg.output.data_digest import KEY, DataDigest, digest_of
from ckptavg.output.destination import exists_error, preflight
from ckptavg.readers import ITEM_SIZE, StoredTensor
from ckptavg.runtime.workers import ALONE, Workers

_CHANGED: Final = "another program changed the file while it was written"
_NO_LINK: Final = (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS)  # file systems without hard links


class SafetensorsFile:
    """An output under construction; a context manager that leaves nothing behind unless `publish` was called."""

    def __init__(
        self, path: Path, specs: Mapping[str, StoredTensor], metadata: Mapping[str, str], *, force: bool = False,
        workers: Workers = ALONE, digests: Algorithm | None = None,
    ) -> None:  # fmt: skip
        """Reserve the space.

        Args:
            path: the destination; its directory must exist.
            specs: name → dtype and shape.
            metadata: the header's ``__metadata__``, or placeholders of the same length for that given to `publish`.
            force: replace an existing file.
            workers: the ranks that write it together, each its own ranges; this constructor, `barrier` and `finalize`
                must be called by all of them.
            digests: algorithm of the digest of the data, an entry of its own beside the metadata; None for no entry.
        Raises:
            OutputExistsError: if the destination exists and ``force`` is not given.
            OutputError: if it cannot be written, or there is not enough space.
        """
        self.path = path
        self.data_digest = ""  # once published: digest of the data behind the header
        self.sha256 = ""  # once published: SHA-256 of the whole file, if that is the algorithm of ``digests``
        self.published: tuple[Path, os.stat_result] | None = None  # as it was before others could see it
        self._workers = workers
        self._force = force
        self._specs = specs
        self._metadata = dict(metadata)
        own = {KEY: PLACEHOLDER} if digests else {}
        self._header, self._offsets, self.size = _layout(specs, {**metadata, **own})  # the size is in bytes
        self._missing = sum(spec.nbytes for spec in specs.values())
        self._digest = DataDigest(digests, self._missing) if digests else None
        self._written: set[tuple[str, int, int]] = set()
        shared = workers.broadcast(workers.on_rank_zero(self._create))
        if shared and not workers.is_rank_zero:
            self._join(shared)

    def write(self, name: str, offset: int, data: memoryview | bytes) -> None:
        """Write little-endian elements at a byte offset of a tensor, in any order; a range may be written again."""
        if not 0 <= offset <= offset + len(data) <= self._specs[name].nbytes:
            raise AssertionError(f"{name}: {len(data)} bytes at {offset} do not fit {self._specs[name]}")
        with output_errors(self.path, self.size):
            self._file.write(data, self._offsets[name] + offset)
        if self._digest:
            self._digest.update(self._offsets[name] + offset - len(self._header), data)
        if self._missing and (part := (name, offset, len(data))) not in self._written:
            self._written.add(part)
            self._missing -= len(data)

    def read_into(self, name: str, start: int, out: memoryview) -> None:
        """Fill ``out`` with elements of a written tensor, from index ``start``."""
        self._fill(self._offsets[name] + start * ITEM_SIZE[self._specs[name].dtype], out)

    def barrier(self) -> None:
        """Wait until all ranks have written their ranges, after which every rank can read the whole file.

        On a network file system, other machines see only flushed data, and a file as it was when they opened it.
        """
        if self._workers.world_size == 1:
            return
        total = sum(spec.nbytes for spec in self._specs.values())
        with output_errors(self.path, self.size):
            os.fsync(self._file.fd)
        self._missing = total - sum(total - missing for missing in self._workers.gather(self._missing))
        if not self._workers.is_rank_zero:
            self._missing = total  # rank 0 has what this rank wrote
            self.close()
            self._join(self._file.path)

    def commit(self) -> None:
        """Publish the file and flush its directory; see `ckptavg.filesystem.atomic.flush_folder`."""
        self.publish()
        flush_folder(self.path)

    def publish(self, metadata: Mapping[str, str] | None = None) -> None:
        """Write the header, flush the file to disk and rename it; called by rank 0 only.

        Args:
            metadata: the final metadata, as long as the constructor's; None if it has not changed.
        Raises:
            OutputExistsError: if the destination was created in the meantime and ``force`` was not given.
            OutputError: if writing fails.
        """
        with output_errors(self.path, self.size), ThreadPoolExecutor(1) as pool:
            file = self._file
            reads = self._digest is not None and self._digest.unread > 0
            flushes = [pool.submit(os.fsync, file.fd)] if reads else []  # the disk writes while the processor hashes
            self._complete(metadata)
            flushes.append(pool.submit(os.fsync, file.fd))
            self.sha256 = self._sha256()
            for flushed in flushes:
                flushed.result()
            if os.fstat(file.fd).st_size != self.size:
                raise OutputError(_CHANGED, path=self.path)
            self._rename(file)

    def finalize(self, metadata: Mapping[str, str] | None = None) -> None:
        """Complete the file under its temporary name, with its digests on every rank; called by all ranks."""

        def digests() -> tuple[str, str]:
            with output_errors(self.path, self.size):
                self._complete(metadata)
                return self.data_digest, self._sha256()

        self.data_digest, self.sha256 = self._workers.broadcast(self._workers.on_rank_zero(digests)) or ("", "")

    def close(self) -> None:
        """Remove the temporary file if it still exists."""
        self._file.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _create(self) -> Path:
        preflight(self.path, self._force)
        with output_errors(self.path, self.size):
            self._file = Temporary(self.path)
            try:
                _reserve(self._file.fd, self.size)
            except BaseException:
                self.close()
                raise
        return self._file.path

    def _join(self, path: Path) -> None:
        """Open the temporary file created by rank 0."""
        try:
            self._file = Temporary.joined(path)
        except OSError as error:
            message = f"cannot be opened by rank {self._workers.rank}: {os_message(error)}"
            hint = "the output must be on a file system that all machines share"
            raise OutputError(message, path=path, hint=hint) from error

    def _complete(self, metadata: Mapping[str, str] | None) -> None:
        """Finish the digest of the data and write the header."""
        if self._missing:
            raise AssertionError(f"{self._missing} bytes were not written")
        entry: dict[str, str] = {}
        if self._digest:
            self.data_digest = self._digest.finish(lambda offset, out: self._fill(len(self._header) + offset, out))
            entry[KEY] = self.data_digest
        header = _layout(self._specs, {**(self._metadata if metadata is None else metadata), **entry})[0]
        if len(header) != len(self._header):
            raise AssertionError("the metadata has changed its length")
        self._file.write(header, 0)

    def _sha256(self) -> str:
        """Return the SHA-256 of the whole file, as sha256sum prints it; empty unless it was asked for."""
        if not self._digest or self._digest.algorithm != "sha256":
            return ""
        return digest_of(self._fill, self.size, "sha256").partition(":")[2]

    def _fill(self, position: int, out: memoryview) -> None:
        """Fill ``out`` with bytes of the file from ``position`` on."""
        done = 0
        while done < len(out):
            with output_errors(self.path, self.size):
                count = os.preadv(self._file.fd, [out[done:]], position + done)
            if not count:
                raise OutputError(_CHANGED, path=self.path)
            done += count

    def _rename(self, file: Temporary) -> None:
        if self._force and self.path.exists():
            os.fchmod(file.fd, stat.S_IMODE(self.path.stat().st_mode))
        self.published = self.path, os.fstat(file.fd)
        if self._force:
            os.replace(file.path, self.path)  # noqa: PTH105  # same style as the other two calls
            return
        try:
            os.link(file.path, self.path)  # unlike rename, refuses an existing name atomically
        except OSError as error:
            if isinstance(error, FileExistsError) or os.path.lexists(self.path):
                raise exists_error(self.path) from error
            if error.errno not in _NO_LINK:
                raise
            os.rename(file.path, self.path)  # noqa: PTH104


def file_order(specs: Mapping[str, StoredTensor]) -> list[str]:
    """Return the names of tensors in the order of their bytes in the file.

    It is by decreasing element size, then by name, as the safetensors library has it, so that each tensor is aligned.
    """
    return sorted(specs, key=lambda name: (-ITEM_SIZE[specs[name].in_file[0]], name))


def _layout(specs: Mapping[str, StoredTensor], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int], int]:
    """Return the header's bytes, the offset of each tensor in the file, and the file's size."""
    entries: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    starts: dict[str, int] = {}
    end = 0
    for name in file_order(specs):
        dtype, shape = specs[name].in_file
        starts[name], end = end, end + specs[name].nbytes
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [starts[name], end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    data = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: data + start for name, start in starts.items()}, data + end


def _reserve(fd: int, size: int) -> None:
    try:
        os.posix_fallocate(fd, 0, size)
    except (OSError, AttributeError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise
        os.ftruncate(fd, size)  # the file system or operating system cannot reserve space
