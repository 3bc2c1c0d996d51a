"""Digest of the data section of a safetensors file: all bytes behind its header, which records it.

It is computed while the file is written, so that a large output is not read again, and with it the file can be checked
without its sources. The header is not part of it, since it is written last.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from ckptavg.filesystem.digest import Algorithm, Hasher, hasher, of_bytes
from ckptavg.runtime import signals
from ckptavg.runtime.threads import processors

KEY: Final = "ckptavg.data_digest"
"""The entry of the metadata."""
_CHUNK: Final = 4 << 20  # bytes that are read at once; two such buffers are in use, and fit the cache
_LARGE: Final = 64 << 20  # bytes that are worth starting threads for
Fill = Callable[[int, memoryview], None]


class DataDigest:
    """Digest of ``size`` bytes that are written in any order, as they are when it is finished.

    Bytes that arrive in order are hashed as they arrive. What comes after the first gap is read at the end, and all is
    if a hashed byte is replaced.
    """

    def __init__(self, algorithm: Algorithm, size: int) -> None:
        self.algorithm: Algorithm = algorithm
        self._size = size
        self._hasher = hasher(algorithm)
        self._done = 0  # bytes hashed, from the first one on

    @property
    def unread(self) -> int:
        """The number of bytes that `finish` reads."""
        return self._size - (self._done if 2 * self._done >= self._size else 0)

    def update(self, offset: int, data: memoryview | bytes) -> None:
        """Take notice of bytes that were written at ``offset``."""
        if offset == self._done:
            self._hasher.update(data)
            self._done += len(data)
        elif offset < self._done and data:
            self._hasher, self._done = hasher(self.algorithm), 0

    def finish(self, fill: Fill) -> str:
        """Return the digest; ``fill(offset, out)`` fills ``out`` with written bytes."""
        if self.unread == self._size:  # few bytes are hashed already: all of them again, in several threads
            return digest_of(fill, self._size, self.algorithm)
        _read(self._hasher, fill, self._done, self._size)
        self._done = self._size
        return f"{self.algorithm}:{self._hasher.hexdigest()}"


def digest_of(fill: Fill, size: int, algorithm: Algorithm) -> str:
    """Return the digest of ``size`` bytes, which ``fill(offset, out)`` reads; BLAKE3 uses all processors."""
    hashed = hasher(algorithm, processors() if size >= _LARGE else 1)
    _read(hashed, fill, 0, size)
    return f"{algorithm}:{hashed.hexdigest()}"


def of_files(digests: Mapping[str, str], algorithm: Algorithm) -> str:
    """Return the digest of several files: of the lines ``DIGEST  NAME``, sorted by name."""
    return of_bytes("".join(f"{text}  {name}\n" for name, text in sorted(digests.items())).encode(), algorithm)


def _read(hashed: Hasher, fill: Fill, start: int, stop: int) -> None:
    """Add the bytes from ``start`` to ``stop``: while one part is hashed, another thread reads the next one."""
    buffers = [memoryview(bytearray(min(_CHUNK, max(0, stop - start)))) for _ in range(2)]

    def read(at: int) -> memoryview:
        part = buffers[(at - start) // _CHUNK % 2][: stop - at]
        fill(at, part)
        return part

    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(read, start) if start < stop else None
        for at in range(start, stop, _CHUNK):
            signals.check()
            assert following is not None
            part = following.result()
            following = pool.submit(read, at + _CHUNK) if at + _CHUNK < stop else None
            hashed.update(part)
