"""Start of every run: check the output, open the candidates, resume the journal and build the evaluator."""

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

_MIN_SECONDS_TO_KEEP: Final = 60.0  # an error keeps the journal of a run that measured for longer
# options that change measurements
_MEASURED_OPTIONS: Final = (
    "seed", "deterministic", "bits", "group_size", "offload", "compile", "holdout", "dtype", "key", "adapter", "rank",
    "batch_size", "score_cmd", "score_key", "score_goal", "lm_eval",
)  # fmt: skip


@contextmanager
def opened(paths: Sequence[Path], options: Options, watch: Watch | None = None) -> Generator[Discovered]:
    """Check the output, seed the run and yield the open candidates under ``paths``.

    Args:
        paths: directories of checkpoints, or checkpoints.
        options: options of the run.
        watch: progress callback.
    Raises:
        CkptavgError: on any expected failure, including an out-of-memory error raised within the context.
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
        candidates = [(checkpoint.name, checkpoint.step, checkpoint.size) for checkpoint in found.checkpoints]
        options.workers.check_equal("options", options, "start all workers with the same command")
        options.workers.check_equal("candidates", candidates, "put them on a file system that all machines share")
        try:
            yield found
        except UsageError as error:  # such as --k larger than the number of candidates
            if bad := sum(file.kind == "bad" for file in found.left_out):
                error.hint = f"{f'{error.hint}; ' if error.hint else ''}{bad} bad checkpoints were left out"
            raise


@contextmanager
def journaled(
    found: Discovered, options: Options, settings: Mapping[str, Any], watch: Watch | None
) -> Generator[tuple[Evaluator | None, Callable[[], None]]]:
    """Yield the evaluator, resumed from the journal of an interrupted run, and a function that closes the journal.

    Call the function once the output is written. A concurrent run with the same output is refused.

    Args:
        found: the candidates.
        options: options of the run.
        settings: settings of the strategy or the comparison.
        watch: progress callback.
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
            check_output(options)  # again: another run may have finished between the first check and the lock
            return journal

        journal = workers.on_rank_zero(begin)
        done = journal.done if journal else _nothing
        if not options.ways:
            yield None, done
            return
        records, location = workers.broadcast((dict(journal.records), journal.folder) if journal else ({}, path))
        log, start = MeasurementLog(journal or ReadOnlyJournal(records, location)), time.monotonic()
        try:
            evaluator = build_evaluator(found, options, watch, log)

            def identify() -> None:
                assert journal is not None
                run = {name: getattr(options, name) for name in _MEASURED_OPTIONS} | {"strategy": dict(settings)}
                run["device"] = "" if options.score_cmd else device_name(pick_device(options.device))
                run["precision"] = precision(options.precision, pick_device(options.device))
                data = [options.val, options.train, options.test]
                journal.begin(fingerprint(found.checkpoints, run, options.task, data))
                stack.enter_context(source_digests.recording_digests(journal, found.checkpoints))

            workers.on_rank_zero(identify)
            if watch and journal and journal.replayed:
                note = "measurements of an interrupted run; the cost counts new measurements only"
                watch(f"resuming with {journal.replayed} {note}", 0, 0, {})
            yield evaluator, done
        except BaseException as error:
            with suppress(RuntimeError):  # a failed device also fails here; report the original error
                log.flush()
            failed = isinstance(error, Exception) and not isinstance(error, InterruptedRunError)
            brief = time.monotonic() - start < _MIN_SECONDS_TO_KEEP
            if journal and failed and brief and not journal.replayed and not signals.pending():
                journal.drop()  # the next run, with the error fixed, will not match it
            raise


def _nothing() -> None:
    """Do nothing: there is no journal to close."""


@contextmanager
def translate_errors() -> Generator[None]:
    """Translate out-of-memory errors and dead data loader workers, which are not bugs in ckptavg.

    Raises:
        OutOfMemoryError: in place of the error that torch or Python raises.
        TaskError: if a data loader worker died.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, CkptavgError):
            raise
        if str(error).startswith("DataLoader worker (pid"):  # raised by a signal handler, at any point of the program
            message = f"a worker process of a data loader died: {' '.join(str(error).split())}"
            raise TaskError(message, hint="it may have run out of memory; num_workers=0 shows other errors") from error
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(
            f"out of memory: {str(error).splitlines()[0] if str(error) else 'the host has none left'}",
            hint="use --bits 4 or auto, --offload, fewer candidates (--last, --every) or smaller batches in the task",
        ) from error


def open_candidates(paths: Sequence[Path], options: Options, watch: Watch | None = None) -> Discovered:
    """Open the candidates under ``paths``.

    With ``skip_bad`` every candidate is read completely before any is used, so that no damage is found after the
    candidates have been chosen.

    Raises:
        InputError: if there are no candidates, or one is bad and ``skip_bad`` is not set.
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
    unstable = () if options.wait_stable is not None else stability.warnings(found.checkpoints)
    return replace(found, warnings=(*found.warnings, *manifest.warnings, *unstable))
