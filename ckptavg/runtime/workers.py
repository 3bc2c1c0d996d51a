"""Workers started by ``torchrun`` for one run; all communication between ranks goes through this module.

Every worker runs the whole program with the same settings and seed. Measurements are split over the ranks and combined
here, so that all ranks continue with the same numbers and take the same decisions. Only rank 0 prints, writes the
journal and renames the output. A single process is the only worker of its run and never communicates.
"""

import json
import os
import re
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final, TypeVar

from ckptavg.errors import CkptavgError, InterruptedRunError, TaskError, UsageError
from ckptavg.runtime.signals import Interruption

if TYPE_CHECKING:
    from torch import Tensor

_T = TypeVar("_T")
_U = TypeVar("_U")
TIMEOUT: Final = 1800.0  # seconds, torch's default for gloo
_GRACE: Final = 2.0  # seconds to wait for the error of a failed worker before a lost connection is reported
_FAILED: Final = "ckptavg/failed"
_BROKEN: Final = re.compile(r"/gloo/|NCCL")
# variables that torchrun sets for its workers; child processes must not inherit them
_TORCHRUN: Final = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|GROUP_WORLD_SIZE|ROLE_NAME|MASTER_\w+|TORCHELASTIC_\w+"
)


@dataclass(frozen=True, kw_only=True)
class Workers:
    """This process's rank in the run, and its collective operations.

    All ranks must call every communicating method, in the same order.
    """

    rank: int = 0
    world_size: int = 1  # number of ranks
    local_world_size: int = 1  # number of ranks on this machine
    gpu: int | None = None  # index of this rank's GPU on its machine
    timeout: float = TIMEOUT  # seconds to wait for the other ranks
    _store: Any = field(default=None, repr=False, compare=False)

    @property
    def is_rank_zero(self) -> bool:
        """True on rank 0, the only rank that prints and writes the journal."""
        return self.rank == 0

    def on_rank_zero(self, work: Callable[[], _T]) -> _T | None:
        """Run ``work`` on rank 0; return its result there, None elsewhere, or raise its `CkptavgError` on all ranks."""
        result, error = None, None
        try:
            result = work() if self.is_rank_zero else None
        except CkptavgError as caught:
            error = caught
        if (error := self.broadcast(error)) is not None:
            raise error
        return result

    def broadcast(self, value: _T) -> _T:
        """Return the ``value`` of rank 0 on every rank."""
        if self.world_size == 1:
            return value
        values = [value]
        with self._distributed() as distributed:
            distributed.broadcast_object_list(values, src=0)
        return values[0]

    def gather(self, value: _T) -> list[_T]:
        """Return the ``value`` of every rank, in rank order."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        with self._distributed() as distributed:
            distributed.all_gather_object(values, value)
        return values

    def map_parallel(self, keys: Sequence[_T], work: Callable[[_T], _U]) -> Iterator[tuple[_T, _U]]:
        """Yield each key with its result of ``work``, in order; `world_size` keys at a time, one per rank."""
        for start in range(0, len(keys), self.world_size):
            chunk = keys[start : start + self.world_size]
            results = self.gather(work(chunk[self.rank]) if self.rank < len(chunk) else None)
            yield from ((key, result) for key, result in zip(chunk, results, strict=False) if result is not None)

    def sum(self, tensor: "Tensor") -> "Tensor":
        """Sum ``tensor`` over all ranks in place and return it; identical on all ranks, asynchronous on a GPU."""
        if self.world_size > 1:
            with self._distributed() as distributed:
                distributed.all_reduce(tensor)
        return tensor

    def check_equal(self, what: str, value: object, hint: str) -> None:
        """Raise TaskError unless ``repr(value)`` is the same on all ranks; ``what`` names it in the message."""
        texts = self.gather(repr(value))
        odd = next((rank for rank, text in enumerate(texts) if text != texts[0]), None)
        if odd is not None:
            raise TaskError(f"the {what} of worker {odd} differ from those of worker 0", hint=hint)

    def environment(self) -> dict[str, str]:
        """Return the environment for a child process: without torchrun's variables, and only this rank's GPU."""
        if self.world_size == 1:
            return dict(os.environ)
        environment = {name: value for name, value in os.environ.items() if not _TORCHRUN.fullmatch(name)}
        if self.gpu is not None:
            visible = environment.get("CUDA_VISIBLE_DEVICES", "")
            environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[self.gpu] if visible else str(self.gpu)
        return environment

    def failure(self, error: BaseException) -> BaseException:
        """Return the cause of the failure, if known: ``error`` itself, or the error that ended another rank.

        The first rank to call this prints the error; the output of the others is suppressed.
        """
        if _is_broken(error):
            error = self._lost_rank_error()
        shown = error if isinstance(error, CkptavgError) else None
        if isinstance(error, KeyboardInterrupt | Interruption):
            shown = InterruptedRunError("interrupted; nothing was written")
        own = json.dumps([self.rank, shown.exit_code if shown else 1, str(shown or error), shown and shown.hint])
        try:
            first = self._store.compare_set(_FAILED, "", own).decode()
        except RuntimeError:  # the process that holds the store has exited too
            first = own
        if first == own:
            sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # pyright: ignore[reportAttributeAccessIssue]
        else:
            silence()
        return error

    @contextmanager
    def _distributed(self) -> Generator[ModuleType]:
        """Yield torch.distributed; if a connection breaks, raise the error that ended another rank."""
        from torch import distributed

        try:
            yield distributed
        except RuntimeError as error:
            if _is_broken(error):
                raise self._lost_rank_error() from error
            raise

    def _lost_rank_error(self) -> CkptavgError:
        """Return the error that a failed rank recorded in the store, or one for a lost connection."""
        deadline = time.monotonic() + _GRACE
        while time.monotonic() < deadline:
            try:
                if self._store.check([_FAILED]):
                    _, code, text, hint = json.loads(self._store.get(_FAILED))
                    kinds = {kind.exit_code: kind for kind in CkptavgError.__subclasses__()}
                    return kinds.get(code, CkptavgError)(text, hint=hint)
            except RuntimeError:
                break
            time.sleep(0.05)
        message = f"another worker exited, or did not respond for {self.timeout:g} s; nothing was written"
        return InterruptedRunError(message, hint="run the same command to resume")


ALONE: Final = Workers()


def rank() -> int:
    """Return this process's rank under ``torchrun``; 0 without it."""
    return int(os.environ["RANK"]) if _world_size() > 1 else 0


@contextmanager
def joined(device: str, timeout: float) -> Generator[Workers]:
    """Join the process group of ``torchrun`` for the duration of the context; after an error only one rank prints it.

    Args:
        timeout: seconds after which a rank that does not respond counts as lost.
    Raises:
        UsageError: if there are more workers than GPUs on this machine.
        InterruptedRunError: if the workers cannot connect, or one of them exits early.
    """
    if _world_size() == 1:
        yield ALONE
        return
    import torch
    from torch import distributed
    from torch.distributed.rendezvous import rendezvous

    backend, gpu = "cpu:gloo", None
    if device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()):
        backend, gpu = "cpu:gloo,cuda:nccl", int(os.environ["LOCAL_RANK"])
        if gpu >= (count := torch.cuda.device_count()):
            hint = f"use torchrun --nproc-per-node {count}, or --device cpu" if count else "use --device cpu"
            raise UsageError(f"no GPU for local rank {gpu}: this machine has {count}", hint=hint)
        torch.cuda.set_device(gpu)
    delta = timedelta(seconds=timeout)
    try:
        store, rank, world_size = next(rendezvous("env://", timeout=delta))
        distributed.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=delta)
    except RuntimeError as error:
        message = f"the workers could not connect: {str(error).splitlines()[0]}"
        raise InterruptedRunError(message, hint="check torchrun's --rdzv-endpoint and --nnodes") from error
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    workers = Workers(rank=rank, world_size=world_size, local_world_size=local, gpu=gpu, timeout=timeout, _store=store)
    try:
        yield workers
    except BaseException as error:
        cause = workers.failure(error)
        if cause is not error:
            raise cause from error
        raise
    distributed.destroy_process_group()


def silence() -> None:
    """Discard everything printed to stdout and stderr from now on."""
    sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115  # open until the process exits


def interleave(parts: Sequence[Sequence[_T]]) -> list[_T]:
    """Merge per-rank parts of a sequence, of which each rank took every ``world_size``-th item, in its order."""
    longest = max(map(len, parts))
    return [part[i] for i in range(longest) for part in parts if i < len(part)]


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def _is_broken(error: BaseException | None) -> bool:
    """Return whether ``error`` is, or was caused by, a broken connection between ranks."""
    while error is not None and not isinstance(error, InterruptedRunError):
        distributed = type(error).__module__.startswith("torch") and type(error).__name__.startswith("Dist")
        if isinstance(error, RuntimeError) and (distributed or _BROKEN.search(str(error))):
            return True
        error = error.__cause__
    return False
