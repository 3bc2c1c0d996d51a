"""What every run begins with: the output checked, the candidates opened, the task and the device found."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import torch

from ckptavg import companions, contents, dcp_output, durable, interrupt, loadable, recipe, shards
from ckptavg.admission import admitted
from ckptavg.average import output_specs
from ckptavg.commanded import Commanded
from ckptavg.determinism import reproducible
from ckptavg.discover import Found
from ckptavg.errors import (
    CkptavgError,
    InterruptedRunError,
    OutOfMemoryError,
    OutputError,
    OutputExistsError,
    TaskError,
    UsageError,
    is_out_of_memory,
)
from ckptavg.evaluator import Evaluator, Watch
from ckptavg.fingerprint import fingerprint
from ckptavg.journal import Copy, Journal
from ckptavg.layout import check_agreement
from ckptavg.mixture import Mixture
from ckptavg.options import Options
from ckptavg.passes import precision
from ckptavg.readers.regular_file import is_folder
from ckptavg.replay import Replay
from ckptavg.tasks import Task
from ckptavg.tasks.held_out import HeldOut
from ckptavg.tasks.python_file import PythonTask
from ckptavg.write import preflight

_OURS: Final = ("model", "adapter_model")  # how the names of what is written into a directory begin
_WORTH_KEEPING: Final = 60.0  # seconds of work that an error should not lose
# of the options those that decide what is measured
_DECISIVE: Final = (
    "seed", "deterministic", "bits", "group_size", "offload", "compile", "holdout", "dtype", "key", "adapter", "rank",
    "batch_size", "score_cmd", "score_key", "score_goal", "lm_eval",
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
    options.workers.lead(lambda: _check_output(options))
    with (
        blamed(),
        reproducible(options.seed, deterministic=options.deterministic),
        admitted(paths, options, watch) as found,
    ):
        check_agreement(found.checkpoints)
        _check_sources(found, options)
        recipe.check(found.checkpoints, options.adapter)
        if options.destination[1]:
            loadable.check(found.checkpoints[-1])
        seen = [(one.name, one.step, one.size) for one in found.checkpoints]
        options.workers.agree("options", options, "start all of them with one command")
        options.workers.agree("candidates", seen, "they must lie on a file system that all machines share")
        try:
            yield found
        except UsageError as error:  # such as a --k of more candidates than there are
            if bad := sum(one.kind == "bad" for one in found.left_out):
                error.hint = f"{f'{error.hint}; ' if error.hint else ''}{bad} bad ones were left out"
            raise


def _check_output(options: Options) -> None:
    """Refuse an output that cannot be written, and remove what killed runs of it left."""
    path, folder = options.destination
    if not options.dry_run:
        shards.sweep(folder or path.parent, None if folder else path.name)
    if folder and is_folder(folder):
        companions.check(folder)
    if options.format == "dcp":
        dcp_output.preflight(path, options.force)
    else:
        preflight(folder if folder and not is_folder(folder) else path, options.force)


def _check_sources(found: Found, options: Options) -> None:
    """Refuse an output that would take the place of a candidate."""
    path, folder = options.destination
    path, folder = path.resolve(), folder and folder.resolve()
    for file in (file for checkpoint in found.checkpoints for file in checkpoint.reader.files):
        inside = folder is not None and file.path.parent.resolve() == folder
        if file.path.resolve() == path or (inside and file.path.name.startswith(_OURS)):
            raise OutputExistsError("is one of the candidates", path=file.path, hint="choose another -o")


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
        yield evaluator(found, options, watch) if options.ways else None, _nothing
        return
    path, folder = options.destination
    workers = options.workers
    with ExitStack() as stack:

        def begin() -> Journal:
            journal = stack.enter_context(Journal(folder or path, resume=options.resume, keep=options.keep_journal))
            if options.format == "dcp":
                dcp_output.sweep(path)
            _check_output(options)  # again: another run may have finished between the first look and the lock
            return journal

        journal = workers.lead(begin)
        done = journal.done if journal else _nothing
        if not options.ways:
            yield None, done
            return
        records, place = workers.told((dict(journal.records), journal.folder) if journal else ({}, path))
        replay, began = Replay(journal or Copy(records, place)), time.monotonic()
        try:
            scores = evaluator(found, options, watch, replay)

            def identify() -> None:
                assert journal is not None
                run = {name: getattr(options, name) for name in _DECISIVE} | {"strategy": dict(settings)}
                run["device"] = "" if options.score_cmd else _described(pick_device(options.device))
                run["precision"] = precision(options.precision, pick_device(options.device))
                data = [options.val, options.train, options.test]
                journal.begin(fingerprint(found.checkpoints, run, options.task, data))
                stack.enter_context(contents.recorded(journal, found.checkpoints))

            workers.lead(identify)
            if watch and journal and journal.replayed:
                what = "measurements of an interrupted run; the cost is of what is measured from here on"
                watch(f"going on from {journal.replayed} {what}", 0, 0, {})
            yield scores, done
        except BaseException as error:
            with suppress(RuntimeError):  # of a device that has failed, which is the error to tell
                replay.flush()
            failed = isinstance(error, Exception) and not isinstance(error, InterruptedRunError)
            brief = time.monotonic() - began < _WORTH_KEEPING
            if journal and failed and brief and not journal.replayed and not interrupt.pending():
                journal.drop()  # the next run will be another one
            raise


def check_space(found: Found, options: Options) -> None:
    """Refuse an output for which there is no space now, before hours of work for it.

    Raises:
        OutputError: with what is needed and what is free.
    """
    path, folder = options.destination
    needed = sum(spec.nbytes for spec in output_specs(found.checkpoints[0], options.dtype).values())
    needed *= 2 if options.format == "dcp" else 1  # see `ckptavg.dcp_output.DcpFolder`
    free = durable.free(path.parent if folder is None or is_folder(folder) else folder.parent)
    if options.adapter != "exact" and needed > free:
        raise OutputError(f"no space left on device: {needed:,} bytes are needed, {free:,} are free", path=path)


def _nothing() -> None:
    """What the end of a run is to those who keep no journal."""


def evaluator(found: Found, options: Options, watch: Watch | None, replay: Replay | None = None) -> Evaluator:
    """What scores mixtures of the candidates; nothing is loaded yet."""
    if options.score_cmd is not None:
        return Commanded(
            options.score_cmd,
            found.checkpoints,
            key=options.score_key,
            goal=options.score_goal,
            timeout=options.score_timeout,
            dtype=options.dtype,
            beside=Path() if replay is None else replay.folder,  # in a dry run there is none
            seed=options.seed,
            watch=watch,
            replay=replay,
            workers=options.workers,
        )
    device = pick_device(options.device)
    if device.type == "mps" and options.workers.world > 1:
        raise UsageError("several workers have nothing to talk by on mps", hint="--device cpu")
    return Mixture(
        _task(found, options),
        found.checkpoints,
        device=device,
        seed=options.seed,
        bits=options.bits,
        group_size=options.group_size,
        offload=options.offload,
        precision=precision(options.precision, device),
        compiled=options.compile,
        watch=watch,
        replay=replay,
        workers=options.workers,
        parallel=options.parallel,
        shard=options.shard,
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


def _described(device: torch.device) -> str:
    """What computes; other hardware has other roundings."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


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
            hint="use --bits 4 or auto, --offload, fewer candidates (--last, --every) or smaller batches in the task",
        ) from error
