"""The workers that ``torchrun`` started for one run, and the one module by which they communicate.

Every worker runs the whole program with the same settings and the same seed. What is measured is measured in parts and
put together here, so that all go on with the same numbers and take the same decisions. The first one alone speaks,
keeps the journal and gives the output its name. A single process is a worker that has nobody to ask.
"""

from __future__ import annotations

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
from typing import TYPE_CHECKING, Any, Final, TypeVar

from ckptavg.errors import CkptavgError, InterruptedRunError, TaskError, UsageError
from ckptavg.runtime.signals import Interruption

if TYPE_CHECKING:
    from torch import Tensor

_T = TypeVar("_T")
_U = TypeVar("_U")
TIMEOUT: Final = 1800.0  # seconds, as torch's for gloo
_GRACE: Final = 2.0  # seconds in which a worker that failed says so, before its silence is what is reported
_FAILED: Final = "ckptavg/failed"
_BROKEN: Final = re.compile(r"/gloo/|NCCL")
# what torchrun tells its processes, and what none of their children should take for their own
_TORCHRUN: Final = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|GROUP_WORLD_SIZE|ROLE_NAME|MASTER_\w+|TORCHELASTIC_\w+"
)


@dataclass(frozen=True, kw_only=True)
class Workers:
    """One of the processes of a run, and its way to the others.

    All methods that communicate are called by all workers, in the same order.

    Attributes:
        rank: its number, from 0.
        world: how many there are.
        local: how many of them share its machine.
        gpu: the number of its GPU on that machine; None if it has none.
        patience: seconds that it waits for the others.
    """

    rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    gpu: int | None = None
    timeout: float = TIMEOUT
    _store: Any = field(default=None, repr=False, compare=False)

    @property
    def is_rank_zero(self) -> bool:
        """Whether it is the one that speaks and writes."""
        return self.rank == 0

    def on_rank_zero(self, work: Callable[[], _T]) -> _T | None:
        """What ``work`` gives, which the first worker alone does; None for the others, who wait until it is done.

        A `CkptavgError` that it raises is raised by all.
        """
        result, error = None, None
        if self.is_rank_zero:
            try:
                result = work()
            except CkptavgError as problem:
                if self.world_size == 1:
                    raise
                error = problem
        error = self.broadcast(error)
        if error is not None:
            raise error
        return result

    def broadcast(self, value: _T) -> _T:
        """The first worker's ``value``."""
        if self.world_size == 1:
            return value
        import torch
        from torch import distributed

        values = [value]
        with self._translate_broken_connection():
            distributed.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]

    def gather(self, value: _T) -> list[_T]:
        """Every worker's ``value``, by rank."""
        if self.world_size == 1:
            return [value]
        from torch import distributed

        values: list[Any] = [None] * self.world_size
        with self._translate_broken_connection():
            distributed.all_gather_object(values, value)
        return values

    def map_parallel(self, keys: Sequence[_T], work: Callable[[_T], _U]) -> Iterator[tuple[_T, _U]]:
        """Every key with what ``work`` gives for it, in order; as many at a time as there are workers."""
        for start in range(0, len(keys), self.world_size):
            turn = keys[start : start + self.world_size]
            found = self.gather(work(turn[self.rank]) if self.rank < len(turn) else None)
            yield from ((key, one) for key, one in zip(turn, found, strict=False) if one is not None)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of every worker's ``tensor``, which becomes it; equal on all, and not waited for on a GPU."""
        if self.world_size > 1:
            from torch import distributed

            with self._translate_broken_connection():
                distributed.all_reduce(tensor)
        return tensor

    def check_equal(self, what: str, value: object, hint: str) -> None:
        """Raise TaskError unless all have the same ``value``, told by its text."""
        texts = self.gather(repr(value))
        odd = next((rank for rank, text in enumerate(texts) if text != texts[0]), None)
        if odd is not None:
            raise TaskError(f"worker {odd} has other {what} than worker 0", hint=hint)

    def environment(self) -> dict[str, str]:
        """That of a program which this worker starts: it is no worker itself, and has this one's GPU alone."""
        if self.world_size == 1:
            return dict(os.environ)
        environment = {name: value for name, value in os.environ.items() if not _TORCHRUN.fullmatch(name)}
        if self.gpu is not None:
            seen = environment.get("CUDA_VISIBLE_DEVICES", "")
            environment["CUDA_VISIBLE_DEVICES"] = seen.split(",")[self.gpu] if seen else str(self.gpu)
        return environment

    def failure(self, error: BaseException) -> BaseException:
        """What ended the run, as far as it can be told: ``error`` itself, or what made another worker go away.

        The first who asks is the one to speak; the others are made silent.
        """
        if self.world_size == 1:
            return error
        if _is_broken(error):
            error = self._lost_rank_error()
        shown = error if isinstance(error, CkptavgError) else None
        if isinstance(error, KeyboardInterrupt | Interruption):
            shown = InterruptedRunError("interrupted; nothing was written")
        mine = json.dumps([self.rank, shown.exit_code if shown else 1, str(shown or error), shown and shown.hint])
        try:
            first = self._store.compare_set(_FAILED, "", mine).decode()
        except RuntimeError:  # whoever started the run is gone too
            first = mine
        (restore_streams if first == mine else silence)()
        return error

    @contextmanager
    def _translate_broken_connection(self) -> Generator[None]:
        try:
            yield
        except RuntimeError as error:
            if _is_broken(error):
                raise self._lost_rank_error() from error
            raise

    def _lost_rank_error(self) -> CkptavgError:
        """What a worker that went away said before; else that it went."""
        until = time.monotonic() + _GRACE
        while time.monotonic() < until:
            try:
                if self._store.check([_FAILED]):
                    _, code, text, hint = json.loads(self._store.get(_FAILED))
                    return _error(code, text, hint)
            except RuntimeError:
                break
            time.sleep(0.05)
        return InterruptedRunError(
            f"another worker ended, or did not answer for {self.timeout:g} s; nothing was written",
            hint="run the same command to resume",
        )


ALONE: Final = Workers()


def rank() -> int:
    """This process's number among those that ``torchrun`` started; 0 where it started none."""
    return int(os.environ["RANK"]) if _world() > 1 else 0


@contextmanager
def joined(device: str, patience: float) -> Generator[Workers]:
    """This process's place among the workers, which meet here and part at the end.

    Where it ends in an error, one of them is left to speak.

    Args:
        device: as ``--device`` names it.
        patience: seconds after which a worker that does not answer is given up.
    Raises:
        UsageError: if there are more workers than GPUs on this machine.
        InterruptedRunError: if the workers do not find each other, or one of them goes away.
    """
    if _world() == 1:
        yield ALONE
        return
    import torch
    from torch import distributed
    from torch.distributed.rendezvous import rendezvous

    backend, gpu = "cpu:gloo", None
    if device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()):
        backend, gpu = "cpu:gloo,cuda:nccl", _gpu(int(os.environ["LOCAL_RANK"]))
    limit = timedelta(seconds=patience)
    try:
        store, number, world = next(rendezvous("env://", timeout=limit))
        distributed.init_process_group(backend, store=store, rank=number, world_size=world, timeout=limit)
    except RuntimeError as error:
        what = f"the workers did not find each other: {str(error).splitlines()[0]}"
        raise InterruptedRunError(what, hint="look at torchrun's --rdzv-endpoint and --nnodes") from error
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    workers = Workers(rank=number, world_size=world, local_world_size=local, gpu=gpu, timeout=patience, _store=store)
    try:
        yield workers
    except BaseException as error:
        cause = workers.failure(error)
        if cause is not error:
            raise cause from error
        raise
    distributed.destroy_process_group()


def silence() -> None:
    """Say nothing more, on neither stream."""
    sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115  # as long as the process


def restore_streams() -> None:
    """Say what there is to say again."""
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # pyright: ignore[reportAttributeAccessIssue]


def interleave(parts: Sequence[Sequence[_T]]) -> list[_T]:
    """What workers that took every ``world``-th of a sequence have, in its order."""
    longest = max(map(len, parts))
    return [part[i] for i in range(longest) for part in parts if i < len(part)]


def _world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def _gpu(number: int) -> int:
    """The GPU of the worker with this number on its machine, made the one that ``cuda`` stands for."""
    import torch

    if number >= (there := torch.cuda.device_count()):
        raise UsageError(
            f"there is no GPU for worker {number} of this machine, which has {there}",
            hint=f"torchrun --nproc-per-node {there}, or --device cpu" if there else "--device cpu",
        )
    torch.cuda.set_device(number)
    return number


def _is_broken(error: BaseException | None) -> bool:
    """Whether an error is, or comes from, a connection between workers that broke."""
    while error is not None and not isinstance(error, InterruptedRunError):
        known = type(error).__module__.startswith("torch") and type(error).__name__.startswith("Dist")
        if isinstance(error, RuntimeError) and (known or _BROKEN.search(str(error))):
            return True
        error = error.__cause__
    return False


def _error(code: int, text: str, hint: str | None) -> CkptavgError:
    """The error that another worker told."""
    kinds = {kind.exit_code: kind for kind in CkptavgError.__subclasses__()}
    return kinds.get(code, CkptavgError)(text, hint=hint)
