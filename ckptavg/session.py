"""What every run begins with: the output checked, the candidates opened, the task and the device found."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch

from ckptavg import companions, loadable, recipe
from ckptavg.admission import admitted
from ckptavg.commanded import Commanded
from ckptavg.determinism import reproducible
from ckptavg.discover import Found
from ckptavg.errors import CkptavgError, OutOfMemoryError, TaskError, UsageError, is_out_of_memory
from ckptavg.evaluator import Evaluator, Watch
from ckptavg.journal import Journal
from ckptavg.layout import check_agreement
from ckptavg.mixture import Mixture
from ckptavg.options import Options, destination
from ckptavg.readers.regular_file import is_folder
from ckptavg.replay import Replay, fingerprint
from ckptavg.tasks import Task
from ckptavg.tasks.held_out import HeldOut
from ckptavg.tasks.python_file import PythonTask
from ckptavg.write import preflight

_WORTH_KEEPING: Final = 60.0  # seconds of work that an error should not lose
# of the options those that decide what is measured
_DECISIVE: Final = (
    "seed", "bits", "group_size", "holdout", "device", "dtype", "key", "batch_size", "score_cmd", "score_key",
    "score_goal", "lm_eval",
)  # fmt: skip


@contextmanager
def opened(paths: Sequence[Path], options: Options, watch: Watch | None = None) -> Generator[Found]:
    """The candidates under ``paths``, open, in an environment that repeats itself, for an output that can be written.

    Args:
        paths: directories of checkpoints, or checkpoints.
        options: of the run.
        watch: is told the progress.
    Raises:
        CkptavgError: in one line, with the exit code of its class; memory that ran out within is one too.
    """
    path, folder = destination(options.output)
    if folder and is_folder(folder):
        companions.check(folder)
    preflight(folder if folder and not is_folder(folder) else path, options.force)
    with blamed(), reproducible(options.seed), admitted(paths, options, watch) as found:
        check_agreement(found.checkpoints)
        recipe.check(found.checkpoints, options.adapter)
        if folder:
            loadable.check(found.checkpoints[-1])
        try:
            yield found
        except UsageError as error:  # such as a --k of more candidates than there are
            if bad := sum(one.kind == "bad" for one in found.left_out):
                error.hint = f"{f'{error.hint}; ' if error.hint else ''}{bad} bad ones were left out"
            raise


@contextmanager
def journaled(
    found: Found, options: Options, settings: Mapping[str, Any], watch: Watch | None
) -> Generator[tuple[Evaluator | None, Callable[[], None]]]:
    """What scores mixtures, going on from the journal of an interrupted run, and what to call when all is written.

    Another run that writes the same output is refused.

    Args:
        found: the candidates.
        options: of the run.
        settings: of the strategy or the comparison.
        watch: is told the progress.
    """
    if options.dry_run:
        yield evaluator(found, options, watch) if options.ways else None, lambda: None
        return
    path, folder = destination(options.output)
    with Journal(folder or path, resume=options.resume, keep=options.keep_journal) as journal:
        replay, began = None, time.monotonic()
        if options.ways:
            run = {name: getattr(options, name) for name in _DECISIVE} | {"strategy": dict(settings)}
            journal.begin(fingerprint(found.checkpoints, run, [options.task, options.val, options.train, options.test]))
            replay = Replay(journal)
        try:
            yield evaluator(found, options, watch, replay) if options.ways else None, journal.done
        except BaseException as error:
            if replay is not None:
                replay.flush()
            if isinstance(error, Exception) and time.monotonic() - began < _WORTH_KEEPING:
                journal.drop()  # not an interruption: the next run will be another one
            raise


def evaluator(found: Found, options: Options, watch: Watch | None, replay: Replay | None = None) -> Evaluator:
    """What scores mixtures of the candidates; nothing is loaded yet."""
    if options.score_cmd is not None:
        path, folder = destination(options.output)
        return Commanded(
            options.score_cmd,
            found.checkpoints,
            key=options.score_key,
            goal=options.score_goal,
            timeout=options.score_timeout,
            dtype=options.dtype,
            beside=path.parent if folder is None or is_folder(folder) else folder.parent,
            seed=options.seed,
            watch=watch,
            replay=replay,
        )
    return Mixture(
        _task(found, options),
        found.checkpoints,
        device=pick_device(options.device),
        seed=options.seed,
        bits=options.bits,
        group_size=options.group_size,
        watch=watch,
        replay=replay,
    )


def pick_device(name: str) -> torch.device:
    """The device ``name`` means here.

    Raises:
        UsageError: if there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"--device {name}: {str(error).splitlines()[0]}", hint="use --device cpu, or auto for the best there is"
        ) from error
    return device


def _task(found: Found, options: Options) -> Task:
    task = task_of(options, found.checkpoints[-1].folder)
    if options.holdout is None:
        return task
    if task.has("test"):
        raise UsageError(
            "--holdout divides the validation data where there are no test data, but the task has some",
            path=task.source,
        )
    if not task.has("val"):
        raise UsageError("--holdout divides the validation data, but the task has none", path=task.source)
    return HeldOut(task, "val", rest="val", to="test", fraction=options.holdout, seed=options.seed)


def task_of(options: Options, folder: Path) -> Task:
    """The task that ``options`` ask for.

    Args:
        options: with one of task, val and lm_eval.
        folder: where a Hugging Face model's config and tokenizer lie.
    """
    if options.val is not None:
        from ckptavg.tasks.hugging_face import HuggingFaceTask

        return HuggingFaceTask(
            folder,
            val=Path(options.val),
            train=None if options.train is None else Path(options.train),
            test=None if options.test is None else Path(options.test),
            batch_size=options.batch_size,
            trust_remote_code=options.trust_remote_code,
        )
    if options.lm_eval is not None:
        from ckptavg.tasks.lm_eval import LmEvalTask

        names = [name.strip() for name in options.lm_eval.split(",") if name.strip()]
        return LmEvalTask(
            folder, names, batch_size=options.batch_size or 8, seed=options.seed,
            trust_remote_code=options.trust_remote_code,
        )  # fmt: skip
    assert options.task is not None
    return PythonTask(options.task, options.task_timeout)


@contextmanager
def blamed() -> Generator[None]:
    """Memory that runs out, or a data loader's worker that dies, is no bug of ours.

    Raises:
        OutOfMemoryError: instead of what torch or Python raise for it.
        TaskError: for a worker.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, CkptavgError):
            raise
        if str(error).startswith("DataLoader worker (pid"):  # a signal's news, which arrives anywhere
            what = f"a worker process of a data loader died: {' '.join(str(error).split())}"
            raise TaskError(what, hint="was it killed for its memory? num_workers=0 shows other errors") from error
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(
            f"out of memory: {str(error).splitlines()[0] if str(error) else 'the host has none left'}",
            hint="use --bits 4 or auto, fewer candidates (--last, --every) or smaller batches in the task",
        ) from error
