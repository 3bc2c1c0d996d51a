"""What every run begins with: the output checked, the candidates opened, the task and the device found."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ckptavg import average
from ckptavg.checkpoints import integrity, stability
from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.checkpoints.checksums import Manifest
from ckptavg.checkpoints.discover import Discovered, discover
from ckptavg.checkpoints.state_dict import check_agreement
from ckptavg.errors import (
    CkptavgError,
    InterruptedRunError,
    OutOfMemoryError,
    TaskError,
    UsageError,
    is_out_of_memory,
)
from ckptavg.journal import Journal, ReadOnlyJournal, source_digests
from ckptavg.journal.fingerprint import fingerprint
from ckptavg.objective.evaluator import Evaluator
from ckptavg.objective.measurements import MeasurementLog
from ckptavg.objective.precision import precision
from ckptavg.options import Options
from ckptavg.output import dcp_folder
from ckptavg.pipeline.objective_choice import build_evaluator, device_name, pick_device
from ckptavg.pipeline.preflight import check_output, check_sources
from ckptavg.runtime import signals
from ckptavg.runtime.progress import Watch
from ckptavg.runtime.seeds import reproducible
from ckptavg.tasks.hugging_face import from_pretrained

if TYPE_CHECKING:
    from ckptavg.runtime.progress import Watch

_WORTH_KEEPING: Final = 60.0  # seconds of work that an error should not lose
# of the options those that decide what is measured
_DECISIVE: Final = (
    "seed", "deterministic", "bits", "group_size", "offload", "compile", "holdout", "dtype", "key", "adapter", "rank",
    "batch_size", "score_cmd", "score_key", "score_goal", "lm_eval",
)  # fmt: skip


@contextmanager
def opened(paths: Sequence[Path], options: Options, watch: Watch | None = None) -> Generator[Discovered]:
    """The candidates under ``paths``, open, in an environment that repeats itself, for an output that can be written.

    Args:
        paths: directories of checkpoints, or checkpoints.
        options: of the run.
        watch: is told the progress.
    Raises:
        CkptavgError: in one line, with the exit code of its class; memory that ran out within is one too.
    """
    options.workers.on_rank_zero(lambda: check_output(options))
    with (
        translate_errors(),
        reproducible(options.seed, deterministic=options.deterministic),
        open_candidates(paths, options, watch) as found,
    ):
        check_agreement(found.checkpoints)
        check_sources(found, options)
        average.check(found.checkpoints, options.adapter)
        if options.destination[1]:
            from_pretrained.check(found.checkpoints[-1])
        seen = [(one.name, one.step, one.size) for one in found.checkpoints]
        options.workers.check_equal("options", options, "start all of them with one command")
        options.workers.check_equal("candidates", seen, "they must lie on a file system that all machines share")
        try:
            yield found
        except UsageError as error:  # such as a --k of more candidates than there are
            if bad := sum(one.kind == "bad" for one in found.left_out):
                error.hint = f"{f'{error.hint}; ' if error.hint else ''}{bad} bad ones were left out"
            raise


@contextmanager
def journaled(
    found: Discovered, options: Options, settings: Mapping[str, Any], watch: Watch | None
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
        yield build_evaluator(found, options, watch) if options.ways else None, _nothing
        return
    path, folder = options.destination
    workers = options.workers
    with ExitStack() as stack:

        def begin() -> Journal:
            journal = stack.enter_context(Journal(folder or path, resume=options.resume, keep=options.keep_journal))
            if options.format == "dcp":
                dcp_folder.sweep(path)
            check_output(options)  # again: another run may have finished between the first look and the lock
            return journal

        journal = workers.on_rank_zero(begin)
        done = journal.done if journal else _nothing
        if not options.ways:
            yield None, done
            return
        records, place = workers.broadcast((dict(journal.records), journal.folder) if journal else ({}, path))
        replay, began = MeasurementLog(journal or ReadOnlyJournal(records, place)), time.monotonic()
        try:
            scores = build_evaluator(found, options, watch, replay)

            def identify() -> None:
                assert journal is not None
                run = {name: getattr(options, name) for name in _DECISIVE} | {"strategy": dict(settings)}
                run["device"] = "" if options.score_cmd else device_name(pick_device(options.device))
                run["precision"] = precision(options.precision, pick_device(options.device))
                data = [options.val, options.train, options.test]
                journal.begin(fingerprint(found.checkpoints, run, options.task, data))
                stack.enter_context(source_digests.recording_digests(journal, found.checkpoints))

            workers.on_rank_zero(identify)
            if watch and journal and journal.replayed:
                what = "measurements of an interrupted run; the cost is of what is measured from here on"
                watch(f"going on from {journal.replayed} {what}", 0, 0, {})
            yield scores, done
        except BaseException as error:
            with suppress(RuntimeError):  # of a device that has failed, which is the error to tell
                replay.flush()
            failed = isinstance(error, Exception) and not isinstance(error, InterruptedRunError)
            brief = time.monotonic() - began < _WORTH_KEEPING
            if journal and failed and brief and not journal.replayed and not signals.pending():
                journal.drop()  # the next run will be another one
            raise


def _nothing() -> None:
    """What the end of a run is to those who keep no journal."""


@contextmanager
def translate_errors() -> Generator[None]:
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


def open_candidates(paths: Sequence[Path], options: Options, watch: Watch | None = None) -> Discovered:
    """The candidates under ``paths``, open.

    With ``skip_bad`` all of them are read to their ends before any of them is used, so that what is bad is not found
    out when others have been chosen already.

    Raises:
        InputError: if there are none, or one is bad and not to be skipped.
    """
    if options.wait_stable is not None:
        stability.wait(paths, options.window, options.wait_stable, watch)
    manifest, checked = Manifest(), 0

    def check(checkpoint: Checkpoint) -> None:
        nonlocal checked
        manifest.check(checkpoint)
        if options.skip_bad:
            integrity.check(checkpoint)
            checked += 1
            if watch:
                watch("checking candidates", checked, checked, {})

    found = discover(
        paths, options.window, options.key, bad="skip" if options.skip_bad else "refuse", check=check,
        allow_nonfinite=options.allow_nonfinite,
    )  # fmt: skip
    doubts = () if options.wait_stable is not None else stability.warnings(found.checkpoints)
    return replace(found, warnings=(*found.warnings, *manifest.doubts, *doubts))
