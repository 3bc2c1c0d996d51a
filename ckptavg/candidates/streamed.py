"""Candidates kept off the device: rows in host memory or in their files, streamed through two buffers.

Shape suffixes: N = candidates, R = selected rows, D = elements of one dtype, C = columns of a piece.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Final

import torch
from torch import Tensor

from ckptavg.candidates.flat import Slot
from ckptavg.candidates.loading import read_columns
from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.runtime.threads import processors

BUFFER: Final = 32 << 20  # bytes per piece over all rows; there are two buffers of this size
LEAST: Final = 1 << 12  # minimum columns per piece, regardless of the number of rows
_READERS: Final = 4  # rows read in parallel; more do not increase disk or memory throughput


class HostRows:
    """N rows of D elements in the host's memory, in the dtype of ``example_D``."""

    def __init__(self, n: int, example_D: Tensor) -> None:
        self._rows_ND = torch.empty(n, len(example_D), dtype=example_D.dtype)
        self.readers = min(_READERS, processors())  # number of rows filled in parallel

    def store(self, i: int, row_D: Tensor) -> None:
        """Keep row ``i``."""
        self._rows_ND[i] = row_D

    def fill(self, i: int, start: int, out_C: Tensor) -> None:
        """Copy columns of row ``i`` from ``start`` into ``out_C`` on the host; called from several threads."""
        # not copy_, which would use torch's intra-op threads
        ctypes.memmove(out_C.data_ptr(), self._rows_ND[i, start:].data_ptr(), out_C.nbytes)

    def check_unchanged(self) -> None:
        """Do nothing: only files can change."""


class FileRows:
    """N rows in the checkpoint files, read by ``pread`` in every pass: a memory map raises SIGBUS if a file shrinks.

    Args:
        checkpoints: the N candidates, open.
        slots: position of each tensor in a row.
    """

    readers = _READERS  # on one processor too: readers mostly wait for the disk

    def __init__(self, checkpoints: Sequence[Checkpoint], slots: Sequence[Slot]) -> None:
        self._checkpoints = checkpoints
        self._slots = slots

    def store(self, i: int, row_D: Tensor) -> None:
        """Do nothing: row ``i`` is in its file."""

    def fill(self, i: int, start: int, out_C: Tensor) -> None:
        """See `HostRows.fill`."""
        read_columns(self._slots, self._checkpoints[i].tensors, self._checkpoints[i].read_into, start, out_C)

    def check_unchanged(self) -> None:
        """Raise InputError if a file changed since it was opened."""
        for checkpoint in self._checkpoints:
            checkpoint.check_unchanged()


class Streamed:
    """The matrix [N, D] with at most two pieces on the device of ``example_D``; see `ckptavg.candidates.matrix.Matrix`.

    While one piece is processed, threads read the next into the other buffer. On CUDA, buffers are pinned and a side
    stream overlaps copies with compute; the host waits for a copy only before reusing its buffer.
    """

    mean_D: Tensor | None = None
    squared_errors = torch.zeros(2)

    def __init__(self, rows: HostRows | FileRows, n: int, example_D: Tensor) -> None:
        self.rows = rows
        self.n = n
        device, dtype = example_D.device, example_D.dtype
        side = torch.cuda.Stream(device) if device.type == "cuda" else None
        numel = n * columns(n, len(example_D), dtype.itemsize)
        self._lanes = [_Lane(numel, dtype, device, side) for _ in range(2)]
        self.nbytes = sum(lane.host.nbytes for lane in self._lanes)
        self._pool = ThreadPoolExecutor(rows.readers, thread_name_prefix="candidates")

    def encode(self, i: int, row_D: Tensor) -> None:
        """See `Matrix.encode`."""
        self.rows.store(i, row_D)

    def column_blocks(self, start: int, stop: int) -> Iterator[tuple[Tensor, slice]]:
        """See `Matrix.column_blocks`."""
        for lane, host_NC, part in self._read(range(self.n), start, stop):
            piece_NC = lane.on_device(host_NC)
            yield (piece_NC if piece_NC.itemsize >= 4 else piece_NC.to(torch.float32)), part
            lane.mark_used()

    def on_host(self, rows: Sequence[int], start: int, stop: int) -> Iterator[tuple[Tensor, slice]]:
        """Yield ([R, C], columns) of selected rows, on the host and in their dtype; valid until the next piece."""
        for _, host_RC, part in self._read(rows, start, stop):
            yield host_RC, part

    def _read(self, rows: Sequence[int], start: int, stop: int) -> Iterator[tuple[_Lane, Tensor, slice]]:
        """Yield (lane, host buffer, columns) of each piece while the next one is being read into the other lane."""
        width = len(self._lanes[0].host) // max(1, len(rows))
        started: deque[tuple[_Lane, Tensor, slice, list[Future[None]]]] = deque()
        try:
            for k, begin in enumerate(range(start, stop + width, width)):
                if begin < stop:
                    lane, part = self._lanes[k % 2], slice(begin, min(begin + width, stop))
                    lane.wait_until_copied()
                    length = part.stop - begin
                    piece_RC = lane.host[: len(rows) * length].view(len(rows), length)
                    fills = [
                        self._pool.submit(self.rows.fill, i, begin, out_C)
                        for i, out_C in zip(rows, piece_RC, strict=True)
                    ]
                    started.append((lane, piece_RC, part, fills))
                if k > 0:
                    lane, piece_RC, part, fills = started[0]
                    for fill in fills:
                        fill.result()
                    yield lane, piece_RC, part
                    started.popleft()
            self.rows.check_unchanged()
        finally:
            wait([fill for *_, fills in started for fill in fills])  # an abandoned pass must not write into the next


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
        self._copied, self._used = (torch.cuda.Event(), torch.cuda.Event()) if side else (None, None)
        self.mark_used()  # by earlier work on the same memory

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
