"""Candidates kept off the device: rows in host memory or in their files, streamed through two buffers.

Shape suffixes: N = candidates, R = selected rows, D = elements of one dtype, C = columns of a piece.
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

BUFFER: Final = 32 << 20  # bytes per piece over all rows; there are two buffers of this size
LEAST: Final = 1 << 12  # minimum columns per piece, regardless of the number of rows
_READERS: Final = 4  # rows read in parallel; more do not increase disk or memory throughput


class Rows(Protocol):
    """Storage of N rows of D elements off the device."""

    @property
    def nbytes(self) -> int:
        """Size of the rows in host memory, in bytes."""
        ...

    @property
    def readers(self) -> int:
        """Number of rows filled in parallel."""
        ...

    def row(self, i: int) -> Tensor:
        """Return the [D] buffer that row ``i`` is loaded into."""
        ...

    def fill(self, i: int, start: int, out_C: Tensor) -> None:
        """Copy columns of row ``i`` from ``start`` into ``out_C`` on the host; called from several threads."""
        ...

    def finished(self) -> None:
        """Called at the end of a pass over the columns."""
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
        # not copy_, which would use torch's intra-op threads
        ctypes.memmove(out_C.data_ptr(), self._rows_ND[i, start:].data_ptr(), out_C.nbytes)

    def finished(self) -> None:
        """See `Rows.finished`."""


class FileRows:
    """Rows in the checkpoint files, read by ``pread`` in every pass: a memory map raises SIGBUS if a file shrinks.

    Args:
        checkpoints: the N candidates, open.
        slots: position of each tensor in a row.
        weights_D: [D], buffer for checking each row once at load time: the model's weights, not yet in use.
    """

    nbytes = 0
    readers = _READERS  # on one processor too: readers mostly wait for the disk

    def __init__(self, checkpoints: Sequence[Checkpoint], slots: Sequence[Slot], weights_D: Tensor) -> None:
        self._checkpoints = checkpoints
        self._slots = slots
        self._weights_D = weights_D

    def row(self, i: int) -> Tensor:
        """See `Rows.row`; one buffer for all rows."""
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
        """See `Rows.finished`; raises InputError if a file changed during the pass."""
        for checkpoint in self._checkpoints:
            checkpoint.check_unchanged()


class Streamed:
    """The matrix [N, D] with at most two pieces on the device; see `ckptavg.candidates.Matrix`.

    While one piece is processed, threads read the next into the other buffer. On CUDA, buffers are pinned and a side
    stream overlaps copies with compute; the host waits for a copy only before reusing its buffer.
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
        """See `Matrix.nbytes`; the size of the buffers."""
        return sum(lane.nbytes for lane in self._lanes)

    def row(self, i: int) -> Tensor:
        """See `Matrix.row`."""
        return self.rows.row(i)

    def encode(self, i: int) -> None:
        """See `Matrix.encode`; rows are stored as loaded."""

    def column_blocks(self, start: int, stop: int) -> Iterator[tuple[Tensor, slice]]:
        """See `Matrix.column_blocks`."""
        for lane, host_NC, part in self._read(range(self._n), start, stop):
            piece_NC = lane.on_device(host_NC)
            yield (piece_NC if piece_NC.itemsize >= 4 else piece_NC.to(torch.float32)), part
            lane.mark_used()

    def on_host(self, rows: Sequence[int], start: int, stop: int) -> Iterator[tuple[Tensor, slice]]:
        """Yield ([R, C], columns) of selected rows, on the host and in their dtype; valid until the next piece."""
        for _, host_RC, part in self._read(rows, start, stop):
            yield host_RC, part

    def _read(self, rows: Sequence[int], start: int, stop: int) -> Iterator[tuple[_Lane, Tensor, slice]]:
        """Yield (lane, host buffer, columns) of each piece while the next one is being read."""
        width = len(self._lanes[0].host) // max(1, len(rows))
        edges = [*range(start, stop, width), stop]
        parts = [slice(*edge) for edge in pairwise(edges)]
        pending: list[Future[None]] = []
        ahead = self._start(0, parts, rows, pending)
        try:
            for k, part in enumerate(parts):
                piece_RC, reading = ahead
                ahead = self._start(k + 1, parts, rows, pending)
                for future in reading:
                    future.result()
                yield self._lanes[k % 2], piece_RC, part
            self.rows.finished()
        finally:
            wait(pending)  # otherwise an abandoned pass would write into the buffers of the next

    def _start(
        self, k: int, parts: Sequence[slice], rows: Sequence[int], pending: list[Future[None]]
    ) -> tuple[Tensor, list[Future[None]]]:
        """Start reading piece ``k``, if it exists, into the buffer of piece ``k - 2``."""
        lane = self._lanes[k % 2]
        if k >= len(parts):
            return lane.host, []
        lane.wait_until_copied()
        start, width = parts[k].start, parts[k].stop - parts[k].start
        piece_RC = lane.host[: len(rows) * width].view(len(rows), width)
        reading = [self._pool.submit(self.rows.fill, i, start, out_C) for i, out_C in zip(rows, piece_RC, strict=True)]
        pending[:] = [future for future in pending if not future.done()] + reading
        return piece_RC, reading


def columns(n: int, size: int, itemsize: int) -> int:
    """Return the number of columns per piece of N rows."""
    return max(1, min(size, max(LEAST, BUFFER // (n * itemsize))))


class _Lane:
    """A host buffer and, for a non-CPU device, its counterpart on the device."""

    def __init__(self, numel: int, dtype: torch.dtype, device: torch.device, side: torch.cuda.Stream | None) -> None:
        self.host = torch.empty(numel, dtype=dtype, pin_memory=side is not None)
        self._staged = None if device.type == "cpu" else torch.empty(numel, dtype=dtype, device=device)
        self._device = device
        self._side = side
        self._copied = torch.cuda.Event() if side else None
        self._used = torch.cuda.Event() if side else None
        self.mark_used()  # by earlier work on the same memory

    @property
    def nbytes(self) -> int:
        return self.host.nbytes

    def on_device(self, host: Tensor) -> Tensor:
        """Return the host buffer's contents on the device."""
        if self._staged is None:
            return host
        staged = self._staged[: host.numel()].view(host.shape)
        if self._side is None or self._copied is None or self._used is None:
            return staged.copy_(host)
        self._side.wait_event(self._used)
        with torch.cuda.stream(self._side):
            staged.copy_(host, non_blocking=True)
        self._copied.record(self._side)
        torch.cuda.current_stream(self._device).wait_event(self._copied)
        return staged

    def mark_used(self) -> None:
        """Record that all work on the current piece has been queued on the device."""
        if self._used is not None:
            self._used.record(torch.cuda.current_stream(self._device))

    def wait_until_copied(self) -> None:
        """Block until the host buffer may be overwritten."""
        if self._copied is not None:
            self._copied.synchronize()
