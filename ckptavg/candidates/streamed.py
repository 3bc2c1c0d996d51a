"""Candidates kept off the device: rows in host memory or in their files, streamed through two buffers.

Shape suffixes: N = candidates, R = selected rows, D = elements of one dtype, C = columns of a piece.
"""

import ctypes
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeAlias

import torch
from torch import Tensor

from ckptavg.candidates import plan
from ckptavg.candidates.flat import Flat
from ckptavg.candidates.loading import READERS, read_columns
from ckptavg.candidates.products import Products
from ckptavg.candidates.running_sum import RunningSum
from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.runtime.threads import processors

Piece: TypeAlias = "tuple[_Lane, Tensor, slice]"  # lane, its rows [R, C] in host memory, columns


class Streamed:
    """The matrix [N, D] with at most two pieces on the device; see `ckptavg.candidates.Matrix`.

    While one piece is processed, threads read the next into the other buffer. On CUDA, buffers are pinned and a side
    stream overlaps copies with compute; the host waits for a copy only before reusing its buffer.

    Args:
        in_files: read rows from the checkpoint files in every pass, by ``pread``, because a memory map raises SIGBUS if
            a file shrinks; otherwise they are kept in host memory.
    """

    mean_D: Tensor | None = None
    squared_errors = torch.zeros(2)
    products: Products | None = None

    def __init__(self, checkpoints: Sequence[Checkpoint], flat: Flat, *, in_files: bool) -> None:
        n, size = len(checkpoints), len(flat.weights_D)
        dtype, device = flat.weights_D.dtype, flat.weights_D.device
        self._checkpoints = checkpoints
        self._slots = flat.slots
        self._size = size
        self._rows_ND = None if in_files else torch.empty(n, size, dtype=dtype)
        self._sum = RunningSum(n, size, flat.slots)
        side = torch.cuda.Stream(device) if device.type == "cuda" else None
        numel = n * plan.columns(n, size, dtype.itemsize)
        self._lanes = [_Lane(numel, dtype, device, side) for _ in range(2)]
        self.nbytes = sum(lane.host.nbytes for lane in self._lanes)
        # on one processor too, readers mostly wait for the disk
        readers = READERS if in_files else min(READERS, processors())
        self._pool = ThreadPoolExecutor(readers, thread_name_prefix="candidates")

    def encode(self, i: int, row_D: Tensor) -> None:
        """See `Matrix.encode`."""
        self._sum.observe([row_D], slice(0, len(row_D)))
        if self._rows_ND is not None:
            self._rows_ND[i] = row_D

    def column_blocks(self, start: int, stop: int) -> Iterator[tuple[Tensor, slice]]:
        """See `Matrix.column_blocks`."""
        for lane, host_NC, part in self._read(range(len(self._checkpoints)), start, stop):
            piece_NC = lane.on_device(host_NC)
            yield (piece_NC if piece_NC.itemsize >= 4 else piece_NC.to(torch.float32)), part
            lane.mark_used()

    def row_blocks(self, rows: Sequence[int]) -> Iterator[tuple[Tensor, slice]]:
        """See `Matrix.row_blocks`; on the host."""
        return (piece[1:] for piece in self._read(rows, 0, self._size))

    def average(self, chosen: Sequence[int], out_D: Tensor) -> None:
        """Write the mean of the rows ``chosen`` to ``out_D``; see `RunningSum`."""
        self._sum.mean(chosen, self.row_blocks, out_D)

    def _read(self, rows: Sequence[int], start: int, stop: int) -> Iterator[Piece]:
        """Yield the pieces of some rows, each while the next one is read into the other lane."""
        width = len(self._lanes[0].host) // max(1, len(rows))
        started: deque[tuple[Piece, list[Future[None]]]] = deque()
        try:
            for k, begin in enumerate(range(start, stop + width, width)):
                if begin < stop:
                    lane, part = self._lanes[k % 2], slice(begin, min(begin + width, stop))
                    lane.wait_until_copied()
                    length = part.stop - begin
                    piece_RC = lane.host[: len(rows) * length].view(len(rows), length)
                    fills = [
                        self._pool.submit(self._fill, i, begin, out_C) for i, out_C in zip(rows, piece_RC, strict=True)
                    ]
                    started.append(((lane, piece_RC, part), fills))
                if k > 0:
                    piece, fills = started[0]
                    for fill in fills:
                        fill.result()
                    yield piece
                    started.popleft()
            for checkpoint in self._checkpoints if self._rows_ND is None else ():
                checkpoint.check_unchanged()
        finally:
            wait([fill for _, fills in started for fill in fills])  # an abandoned pass must not write into the next

    def _fill(self, i: int, start: int, out_C: Tensor) -> None:
        """Copy columns of row ``i`` from ``start`` into ``out_C`` on the host; called from several threads."""
        if self._rows_ND is None:
            read_columns(self._slots, self._checkpoints[i].tensors, self._checkpoints[i].read_into, start, out_C)
        else:  # not copy_, which would use torch's intra-op threads
            ctypes.memmove(out_C.data_ptr(), self._rows_ND[i, start:].data_ptr(), out_C.nbytes)


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
