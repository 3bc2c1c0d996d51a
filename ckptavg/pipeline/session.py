"""Start and end of every run: check the output, open the candidates, resume the journal and build the evaluator."""

import os
import sys
import time
from collections.abc import Callable, Generator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from ckptavg import average
from ckptavg.checkpoints import integrity, stability
from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.checkpoints.checksums import Manifest
from ckptavg.checkpoints.discover import Discovered, NotFinite, discover, with_directory_changes
from ckptavg.checkpoints.kept import keeping, kept_names
from ckptavg.checkpoints.state_dict import check_agreement
from ckptavg.context import Run
from ckptavg.errors import (
    CkptavgError,
    InterruptedRunError,
    OutOfMemoryError,
    TaskError,
    UsageError,
    counted,
    is_out_of_memory,
)
from ckptavg.journal import Journal, ReadOnlyJournal, source_digests
from ckptavg.journal.fingerprint import candidate_name, fingerprint
from ckptavg.objective.evaluator import Evaluator
from ckptavg.options import Options
from ckptavg.output import dcp_folder
from ckptavg.pipeline import own_output
from ckptavg.pipeline.preflight import check_output, check_sources, pick_device
from ckptavg.pipeline.task_choice import task_for
from ckptavg.runtime import signals
from ckptavg.runtime.progress import Progress, Watch
from ckptavg.tasks import from_pretrained

MIN_SECONDS_TO_KEEP: Final = 60.0  # an error keeps the journal of a run that measured for longer


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """State that the runs of `ckptavg.pipeline.follow` share.

    Attributes:
        journal: open journal, in which candidates are named by `candidate_name`.
        admit: raises InputError for a candidate that is not complete yet.
        checked: identities of a candidate's files → its tensors that are not finite.
    """

    journal: Journal
    admit: Callable[[Checkpoint], None]
    checked: MutableMapping[Any, Mapping[str, NotFinite]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Session:
    """A run in progress.

    Attributes:
        paths: the paths under which the candidates were found.
        options: options of the run.
        found: the open candidates.
        run: device, ranks, seed, progress and journal.
        evaluator: scores mixtures; None if nothing defines a score.
        rounds: shared with other runs, if it is one of several.
    """

    paths: Sequence[Path]
    options: Options
    found: Discovered
    run: Run
    evaluator: Evaluator | None
    rounds: Rounds | None = None

    @property
    def checkpoints(self) -> Sequence[Checkpoint]:
        """The N candidates, in training order."""
        return self.found.checkpoints

    def scored(self, reason: str) -> Evaluator:
        """Return the evaluator, or raise UsageError if there is none: ``reason`` says what needs it."""
        if self.evaluator is None:
            raise UsageError(reason, hint="`ckptavg init` writes ./task.py")
        return self.evaluator

    def record_output(self, published: tuple[Path, os.stat_result] | None) -> None:
        """Record what was just written in the journal of several runs, of which the next one may replace it."""
        if self.rounds and published:
            own_output.record(self.rounds.journal, *published)

    def finish(self, output: Path) -> Discovered:
        """Remove the journal once ``output`` is written; return the candidates, with changes of their directory."""
        if isinstance(self.run.journal, Journal) and self.rounds is None:
            self.run.journal.done()
        return with_directory_changes(self.found, self.paths, output)


@contextmanager
def open_session(
    paths: Sequence[Path], options: Options, watch: Watch | None = None, *, mixed: bool = False,
    rounds: Rounds | None = None,
) -> Generator[Session]:  # fmt: skip
    """Check the output, seed the run, open the candidates under ``paths`` and resume the journal of an earlier run.

    A concurrent run with the same output is refused.

    Args:
        mixed: candidates may differ in floating-point dtypes, as with ``--dtype``.
        rounds: makes it one of several runs, whose journal this is, and which leave out bad candidates.
    Raises:
        CkptavgError: on any expected failure, including an out-of-memory error raised within the context.
    """
    workers = options.workers
    workers.on_rank_zero(lambda: check_output(options))
    with (
        translate_errors(),
        _seeded(options),
        _open_candidates(paths, options, watch, rounds) as found,
        ExitStack() as stack,
    ):
        remarks = check_agreement(found.checkpoints, mixed=mixed or options.dtype is not None)
        candidates = keeping(found.checkpoints, options.keep, options.average)
        found = replace(found, checkpoints=candidates, warnings=(*found.warnings, *remarks))
        check_sources(found, options)
        average.check(found.checkpoints, options.adapter)
        if options.destination[1]:
            from_pretrained.check(found.checkpoints[-1])
        candidates = [(checkpoint.name, checkpoint.step, checkpoint.size) for checkpoint in found.checkpoints]
        workers.check_equal("options", options, "start all workers with the same command")
        workers.check_equal("candidates", candidates, "put them on a file system that all machines share")
        start, journal = time.monotonic(), None
        try:
            run = Run(device=_device(options), workers=workers, seed=options.seed, progress=Progress(watch))
            if not options.dry_run:
                journal = workers.on_rank_zero(lambda: rounds.journal if rounds else open_journal(options, stack))
                records = workers.broadcast((dict(journal.records), journal.folder) if journal else ({}, Path()))
                names = [candidate_name(checkpoint) for checkpoint in found.checkpoints] if rounds else ()
                run = replace(run, journal=journal or ReadOnlyJournal(*records), candidates=names)
            evaluator = _evaluator(found, options, run) if options.ways else None
            if (evaluator or rounds) and not options.dry_run:
                workers.on_rank_zero(lambda: stack.enter_context(_compared(found, options, run)))
            if evaluator and journal and journal.summary:
                note = "of an interrupted run; the cost counts new measurements only"
                run.progress(f"resuming with {journal.summary} {note}", 0, 0)
            yield Session(paths=paths, options=options, found=found, run=run, evaluator=evaluator, rounds=rounds)
        except BaseException as error:
            if isinstance(error, UsageError) and (bad := sum(file.kind == "bad" for file in found.left_out)):
                # such as --k larger than the number of candidates
                error.hint = f"{f'{error.hint}; ' if error.hint else ''}{counted(bad, 'bad checkpoint')} left out"
            failed = isinstance(error, Exception) and not isinstance(error, InterruptedRunError)
            brief = failed and time.monotonic() - start < MIN_SECONDS_TO_KEEP and not signals.pending()
            if journal and not rounds and (not resumable(options) or (brief and not journal.replayed)):
                journal.drop()  # the next run, with the error fixed, will not match it
            elif journal:
                _say_what_is_kept(journal, error)
            raise


def _say_what_is_kept(journal: Journal, error: BaseException) -> None:
    """Add the number of measurements in the journal to an error's hint, or to what ended the run as a note."""
    with suppress(RuntimeError):  # a device that failed also fails here
        journal.flush()
    if not journal.summary:
        return
    kept = f"{journal.summary} {'is' if journal.summary.startswith('1 ') else 'are'} kept in {journal.folder}/"
    if isinstance(error, TaskError):  # the others ask for another command
        error.hint = f"{f'{error.hint}; ' if error.hint else ''}{kept}"
    error.add_note(f"{kept}; run the same command to resume")


def open_journal(options: Options, stack: ExitStack) -> Journal:
    """Open the journal of a run, which locks its output, and check the output again."""
    path, folder = options.destination
    resume = options.resume and resumable(options)
    journal = stack.enter_context(Journal(folder or path, resume=resume, keep=options.keep_journal))
    if options.format == "dcp":
        dcp_folder.sweep(path)
    check_output(options)  # again: another run may have finished between the first check and the lock
    return journal


def resumable(options: Options) -> bool:
    """Return whether a later run can recognise the task: objects, and a module without a file, have no fingerprint."""
    module = sys.modules.get(options.task or "")
    return options.objects is None and (module is None or getattr(module, "__file__", None) is not None)


def _seeded(options: Options) -> AbstractContextManager[None]:
    """Seed every random generator; a plain average without scores has no use for them, and none for torch."""
    if not options.ways:
        return nullcontext()
    from ckptavg.runtime.seeds import reproducible

    return reproducible(options.seed, deterministic=options.deterministic)


def _device(options: Options) -> Any:
    """Return the torch.device of model and candidates; None if nothing is scored."""
    return pick_device("cpu" if options.score_cmd else options.device) if options.ways else None


def _evaluator(found: Discovered, options: Options, run: Run) -> Evaluator:
    """Return the evaluator that scores mixtures of the candidates; it loads nothing yet."""
    if options.score_cmd is not None:
        from ckptavg.objective.command import CommandEvaluator

        return CommandEvaluator(options, found.checkpoints, run)
    if run.device.type == "mps" and run.workers.world_size > 1:
        raise UsageError("--device mps supports one worker only", hint="use --device cpu")
    # a model is scored in its own dtype
    plan = partial(average.plan_output, found.checkpoints, dtype=None, mode="exact", rank=options.rank)
    exact_adapter = plan if options.adapter == "exact" else None
    from ckptavg.objective.mixture import Mixture

    return Mixture(task_for(found, options), found.checkpoints, run, options, exact_adapter)


def _compared(found: Discovered, options: Options, run: Run) -> AbstractContextManager[None]:
    """Compare this run with that of the journal, and record the candidates' digests in the context.

    If candidates have names in the journal, these are compared, score by score.
    """
    assert isinstance(run.journal, Journal)
    measured = options.measured()
    if options.ways:
        from torch.cuda import get_device_name

        from ckptavg.objective.precision import precision

        device = run.device
        hardware = get_device_name(device) if device.type == "cuda" else device.type  # rounding depends on it
        measured |= {
            "device": "" if options.score_cmd else hardware, "precision": precision(options.precision, device)
        }  # fmt: skip
    data = {"val": options.val, "train": options.train, "test": options.test}
    named = bool(run.candidates)
    run.journal.begin(fingerprint(() if named else found.checkpoints, measured, options.task, data))
    if named:
        return nullcontext()
    return source_digests.recording_digests(run.journal, found.checkpoints, options.algorithm or "blake3")


@contextmanager
def translate_errors() -> Generator[None]:
    """Translate out-of-memory errors and dead data loader workers, which are not bugs in ckptavg."""
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
        message = f"out of memory: {str(error).splitlines()[0] if str(error) else 'the host has none left'}"
        hint = "use --bits 4 or auto, --offload, fewer candidates (--last, --every) or smaller batches in the task"
        raise OutOfMemoryError(message, hint=hint) from error


def _open_candidates(
    paths: Sequence[Path], options: Options, watch: Watch | None, rounds: Rounds | None = None
) -> Discovered:
    """Open the candidates; with ``skip_bad`` each is read completely, so that no damage is found after the choice.

    So is each in its first of several ``rounds``.
    """
    if options.wait_stable is not None and not rounds:
        stability.wait(paths, options, options.wait_stable, watch)
    manifest, checked = Manifest(), 0
    skips = options.skip_bad or rounds is not None

    def check(checkpoint: Checkpoint) -> Mapping[str, NotFinite]:
        nonlocal checked
        if rounds:
            rounds.admit(checkpoint)
        manifest.check(checkpoint)
        key = tuple(file.identity for file in checkpoint.reader.files)
        if not skips or (rounds and key in rounds.checked):
            return rounds.checked[key] if rounds else {}
        checked += 1
        if watch:
            watch("checking candidates", checked, checked, {})
        kept = kept_names(checkpoint, options.keep, options.average)
        nonfinite = integrity.check(replace(checkpoint, kept=kept))
        if rounds:
            rounds.checked[key] = nonfinite
        return nonfinite

    found = discover(
        paths, options, options.key, bad="skip" if skips else "refuse", check=check,
        allow_nonfinite=options.allow_nonfinite,
    )  # fmt: skip
    unstable = () if options.wait_stable is not None or rounds else stability.warnings(found.checkpoints)
    return replace(found, warnings=(*found.warnings, *manifest.warnings, *unstable))
