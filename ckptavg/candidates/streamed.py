"""Candidates that do not lie on the device: rows in the host's memory or in their files, streamed through two buffers.

Shape suffixes: N = candidates, R = some of them, D = elements of one dtype, C = columns of a piece.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import pairwise
from typing import Final, Protocol

import torch
from torch import Tensor

from ckptavg.candidates.flat import Slot, overlapping, present, read
from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.runtime.threads import processors

BUFFER: Final = 32 << 20  # bytes of all rows that are on their way at a time, twice
LEAST: Final = 1 << 12  # columns of a piece, however many rows there are
_READERS: Final = 4  # rows that are read at a time: more requests do not make a disk faster, nor threads the memory


class Rows(Protocol):
    """Where N rows of D elements lie while they are not needed."""

    @property
    def nbytes(self) -> int:
        """What they take in the host's memory."""
        ...

    @property
    def readers(self) -> int:
        """How many rows are filled at a time."""
        ...

    def row(self, i: int) -> Tensor:
        """[D], where to put row ``i`` when it is loaded."""
        ...

    def fill(self, i: int, start: int, out_C: Tensor) -> None:
        """Copy the columns of row ``i`` from ``start`` on into ``out_C``, on the host; called from several threads."""
        ...

    def finished(self) -> None:
        """A pass over the columns has ended."""
        ...


class HostRows:
    """Rows in the host's memory."""

    def __init__(self, n: int, size: int, dtype: torch.dtype) -> None:
        self._rows_ND = torch.empty(n, size, dtype=dtype)
        self.readers = min(_READERS, processors())

    @property
    def nbytes(self) -> int:
        """See `Rows.nbytes`."""
        return self._rows_ND.nbytes

    def row(self, i: int) -> Tensor:
        """See `Rows.row`."""
        return self._rows_ND[i]

    def fill(self, i: int, start: int, out_C: Tensor) -> None:
        """See `Rows.fill`."""
        # not copy_, which would share it among threads of its own
        ctypes.memmove(out_C.data_ptr(), self._rows_ND[i, start:].data_ptr(), out_C.nbytes)

    def finished(self) -> None:
        """See `Rows.finished`."""


class FileRows:
    """Rows in the checkpoints themselves, read again by ``pread`` each time: a map would die of a file that shrinks.

    Args:
        checkpoints: the N candidates, open.
        slots: where the tensors lie in a row.
        weights_D: [D], what a row is loaded into to be looked at once; the model's own, which are worth nothing yet.
    """

    nbytes = 0
    readers = _READERS  # on one processor too: they wait for the disk

    def __init__(self, checkpoints: Sequence[Checkpoint], slots: Sequence[Slot], weights_D: Tensor) -> None:
        self._checkpoints = checkpoints
        self._slots = slots
        self._weights_D = weights_D

    def row(self, i: int) -> Tensor:
        """See `Rows.row`: the same place for all."""
        return self._weights_D

    def fill(self, i: int, start: int, out_C: Tensor) -> None:
        """See `Rows.fill`."""
        checkpoint = self._checkpoints[i]
        for k, begin, end in overlapping(self._slots, start, start + len(out_C)):
            slot = self._slots[k]
            name = present(slot.names, checkpoint.tensors)
            out = out_C[begin - start : end - start]
            read(checkpoint.spec(name), name, checkpoint.read_into, out, slot.first + begin - slot.start)

    def finished(self) -> None:
        """See `Rows.finished`: what was read was no file that is being written."""
        for checkpoint in self._checkpoints:
            checkpoint.check_unchanged()


class Streamed:
    """The matrix [N, D] of which only two pieces are on the device; see `ckptavg.candidates.Matrix`.

    While one piece is worked on, threads read the next into the other buffer. On CUDA buffers are pinned, and a stream
    of its own copies them to the device beside the work there; the host waits for a copy only where it would overwrite
    what is being copied.
    """

    mean_D = None
    squared_errors = torch.zeros(2)

    def __init__(self, rows: Rows, n: int, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.rows = rows
        self._n = n
        self._columns = columns(n, size, dtype.itemsize)
        side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._lanes = [_Lane(n * self._columns, dtype, device, side) for _ in range(2)]
        self._pool = ThreadPoolExecutor(rows.readers, thread_name_prefix="candidates")

    @property
    def nbytes(self) -> int:
        """See `Matrix.nbytes`: the buffers."""
        return sum(lane.nbytes for lane in self._lanes)

    def row(self, i: int) -> Tensor:
        """See `Matrix.row`."""
        return self.rows.row(i)

    def encode(self, i: int) -> None:
        """See `Matrix.encode`; it is where it will be read from already."""

    def column_blocks(self, start: int, stop: int) -> Iterator[tuple[Tensor, slice]]:
        """See `Matrix.column_blocks`."""
        for lane, host_NC, part in self._read(range(self._n), start, stop):
            piece_NC = lane.on_device(host_NC)
            yield (piece_NC if piece_NC.itemsize >= 4 else piece_NC.to(torch.float32)), part
            lane.was_used()

    def on_host(self, rows: Sequence[int], start: int, stop: int) -> Iterator[tuple[Tensor, slice]]:
        """([R, C], columns) of some rows as they are, on the host; valid until the next piece."""
        for _, host_RC, part in self._read(rows, start, stop):
            yield host_RC, part

    def _read(self, rows: Sequence[int], start: int, stop: int) -> Iterator[tuple[_Lane, Tensor, slice]]:
        """Each piece, while the next one is being read."""
        width = len(self._lanes[0].host) // max(1, len(rows))
        edges = [*range(start, stop, width), stop]
        parts = [slice(*edge) for edge in pairwise(edges)]
        pending: list[Future[None]] = []
        ahead = self._start(0, parts, rows, pending)
        try:
            for k, part in enumerate(parts):
                piece_RC, reading = ahead
                ahead = self._start(k + 1, parts, rows, pending)
                for one in reading:
                    one.result()
                yield self._lanes[k % 2], piece_RC, part
            self.rows.finished()
        finally:
            wait(pending)  # or a pass that was given up would write into the buffers of the next

    def _start(
        self, k: int, parts: Sequence[slice], rows: Sequence[int], pending: list[Future[None]]
    ) -> tuple[Tensor, list[Future[None]]]:
        """Begin to read piece ``k``, where there is one, into the buffer that the piece before last was in."""
        lane = self._lanes[k % 2]
        if k >= len(parts):
            return lane.host, []
        lane.wait_until_copied()
        start, width = parts[k].start, parts[k].stop - parts[k].start
        piece_RC = lane.host[: len(rows) * width].view(len(rows), width)
        reading = [self._pool.submit(self.rows.fill, i, start, out_C) for i, out_C in zip(rows, piece_RC, strict=True)]
        pending[:] = [one for one in pending if not one.done()] + reading
        return piece_RC, reading


def columns(n: int, size: int, itemsize: int) -> int:
    """How many columns of N rows are on their way at a time."""
    return max(1, min(size, max(LEAST, BUFFER // (n * itemsize))))


class _Lane:
    """A buffer on the host, and one on the device where that is another."""

    def __init__(self, numel: int, dtype: torch.dtype, device: torch.device, side: torch.cuda.Stream | None) -> None:
        self.host = torch.empty(numel, dtype=dtype, pin_memory=side is not None)
        self._there = None if device.type == "cpu" else torch.empty(numel, dtype=dtype, device=device)
        self._device = device
        self._side = side
        self._copied = torch.cuda.Event() if side else None
        self._used = torch.cuda.Event() if side else None
        self.was_used()  # by whatever had this memory before

    @property
    def nbytes(self) -> int:
        return self.host.nbytes

    def on_device(self, host: Tensor) -> Tensor:
        """What lies in the host's buffer, where the work is done."""
        if self._there is None:
            return host
        there = self._there[: host.numel()].view(host.shape)
        if self._side is None or self._copied is None or self._used is None:
            return there.copy_(host)
        self._side.wait_event(self._used)
        with torch.cuda.stream(self._side):
            there.copy_(host, non_blocking=True)
        self._copied.record(self._side)
        torch.cuda.current_stream(self._device).wait_event(self._copied)
        return there

    def was_used(self) -> None:
        """The work on the present piece has been given to the device."""
        if self._used is not None:
            self._used.record(torch.cuda.current_stream(self._device))

    def wait_until_copied(self) -> None:
        """Until the host's buffer may be written to."""
        if self._copied is not None:
            self._copied.synchronize()
