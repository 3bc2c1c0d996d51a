"""Scores from a shell command: each mixture is written to disk, and the command prints its score."""

import math
import re
import shlex
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from ckptavg.average import derived, plan_output
from ckptavg.average.weighted_sum import output_specs
from ckptavg.candidates import ReadInto
from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.checkpoints.dtypes import dtype_names
from ckptavg.coefficients import Coefficients
from ckptavg.context import Run
from ckptavg.cost import SECONDS, Cost, CostMeter
from ckptavg.errors import TaskError
from ckptavg.journal import SCRATCH
from ckptavg.objective import Losses
from ckptavg.objective.codecs import ScoreCodec, ScoreKey
from ckptavg.objective.remembered import Remembered
from ckptavg.objective.score_command import FailedRunError, RunningCommand, ScoreCommand
from ckptavg.options import Options
from ckptavg.output import hugging_face_folder, loader_files
from ckptavg.output.safetensors_file import SafetensorsFile
from ckptavg.output.sharded_files import open_files
from ckptavg.readers import StoredTensor
from ckptavg.readers.sentence_transformers import MODULES
from ckptavg.runtime import signals
from ckptavg.score import Score, Split, valid

_POLL: Final = 0.01  # seconds between looks at the running commands
_LISTED: Final = 5  # failures in the report
_NAMED: Final = 6  # steps in the name of a mixture


class _Job(NamedTuple):
    """A command that runs on a mixture."""

    coefficients: Coefficients
    path: Path
    variables: Mapping[str, str]
    running: RunningCommand


class CommandEvaluator:
    """Objective whose score is the number that a shell command prints; see `ckptavg.objective.evaluator.Evaluator`.

    Each mixture is the exact average in the output's dtype, written to a directory in ``OUTPUT.ckptavg/``, which also
    has the candidates' config and tokenizer files if the command reads the directory. There is no loss. The
    environment of the command has the mixture's name, the step of a single candidate, and the number of the job.

    With ``--skip-bad``, a run that fails is a `Score.invalid`, which is not recorded: a resumed run tries it again.

    Args:
        options: have the command and the dtype of the mixtures.
        checkpoints: the N open candidates.
        run: has the ranks, of which each runs the command for other mixtures if several are requested, else only rank
            0, and the journal, in whose directory the mixtures are written.
    """

    losses: Losses | None = None
    scored_on: Split = "val"
    splits: tuple[Split, ...] = ("val",)
    bounded = False
    statistics: Collection[str] = ()
    averaged_buffers: Collection[str] = ()
    matrix = None

    def __init__(self, options: Options, checkpoints: Sequence[Checkpoint], run: Run) -> None:
        assert options.score_cmd is not None
        self._command = ScoreCommand(options.score_cmd, options.score_key, options.score_timeout)
        self._options = options
        self._checkpoints = checkpoints
        self._run = run
        self._specs = output_specs(checkpoints, options.dtype)
        self._shown = False  # whether it was said from what a score was read
        self._meter = CostMeter()
        self._scores = Remembered(ScoreCodec(None, run.candidates), run, self._meter)
        self.n = len(checkpoints)
        self.runs: Sequence[int] = [checkpoint.run for checkpoint in checkpoints]
        self.progress = run.progress
        self.restart()

    def has(self, split: Split) -> bool:
        """See `Evaluator.has`."""
        return split == "val"

    def restart(self, search: str = "") -> None:
        """See `Evaluator.restart`."""
        self.generator = torch.Generator().manual_seed(self._run.seed)
        self._meter.restart()

    def score_batches(self, split: Split) -> int:
        """See `Evaluator.score_batches`; a score is one run of the command."""
        return 1

    def prepare(self) -> None:
        """Do nothing, as there is nothing to load; see `Evaluator.prepare`."""

    @property
    def notes(self) -> list[str]:
        """See `Evaluator.notes`."""
        scores = {coefficients: score for (coefficients, _, _), score in self._scores.values.items()}
        failed = sorted(
            (c for c, score in scores.items() if score.invalid), key=lambda c: (len(c.selected), c.values[::-1])
        )
        notes = [f"{scores[c].invalid}: ranked below every valid score" for c in failed]
        if (more := len(notes) - _LISTED) > 0:
            notes[_LISTED:] = [f"--score-cmd failed for {more} more mixture{'s' if more > 1 else ''}"]
        values = [score.metric for score in scores.values() if not score.invalid]
        if len(values) > 1 and len(set(values)) == 1:
            same = f"--score-cmd gave all {len(values)} mixtures the score {values[0]:g}"
            notes.append(f"{same}: does it read the file that it is given, and is this number its score?")
        return notes

    def score(self, coefficients: Coefficients, on: Split | None = None) -> Score:
        """See `Objective.score`; the number that the command prints for the average, cached."""
        return self._scores.find((coefficients, "val", True), partial(self._measure_once, coefficients))

    def prefetch(self, coefficients: Sequence[Coefficients], on: Split | None = None, *, exact: bool = False) -> None:
        """See `Evaluator.prefetch`."""
        keys: list[ScoreKey] = [(c, "val", True) for c in coefficients]
        if self._run.workers.world_size > 1:
            self._scores.prefetch(keys, lambda key: self._measure(key[0]))
        elif self._options.score_jobs > 1:
            self._scores.prefetch_together(keys, self._measure_all)

    def score_at_least(self, coefficients: Coefficients, threshold: float, *, strict: bool) -> Score | None:
        """See `Objective.score_at_least`; a command always runs to its end."""
        score = self.score(coefficients)
        return score if (score.value > threshold if strict else score.value >= threshold) else None

    def exact_score(self, coefficients: Coefficients, split: Split) -> Score:
        """See `Evaluator.exact_score`; every score of a command is exact."""
        return self.score(coefficients)

    def load_output(self, specs: Mapping[str, StoredTensor], read_into: ReadInto) -> Mapping[str, Tensor]:
        """See `Evaluator.load_output`; nothing is recomputed, since the output file equals the one that was scored."""
        return {}

    def score_output(
        self, coefficients: Coefficients, specs: Mapping[str, StoredTensor], read_into: ReadInto,
        adapter: Mapping[str, Any] | None = None,
    ) -> Mapping[Split, Score]:  # fmt: skip
        """See `Evaluator.score_output`."""
        return {"val": valid(self.score(coefficients))}

    def cost(self) -> Cost:
        """See `Evaluator.cost`."""
        return Cost(
            forward_batches=0, backward_batches=0, evaluations=round(self._meter["evaluations"]),
            seconds=self._meter[SECONDS], epochs=None, epochs_of="val",
        )  # fmt: skip

    def _measure_once(self, coefficients: Coefficients) -> Score:
        workers = self._run.workers
        score = workers.broadcast(workers.on_rank_zero(lambda: self._measure(coefficients)))
        assert score is not None
        return score

    def _measure(self, coefficients: Coefficients) -> Score:
        ((_, score),) = self._measure_all([(coefficients, "val", True)])
        return score

    def _measure_all(self, keys: Sequence[ScoreKey]) -> Generator[tuple[ScoreKey, Score]]:
        """Run the command on each mixture, ``--score-jobs`` at a time; yield each score once it is known."""
        waiting, jobs = deque(coefficients for coefficients, _, _ in keys), dict[int, _Job]()
        try:
            while waiting or jobs:
                while waiting and (free := set(range(self._options.score_jobs)) - jobs.keys()):
                    jobs[min(free)] = self._start(waiting.popleft(), min(free))
                ended = [slot for slot, job in jobs.items() if job.running.ended()]
                for slot in ended:
                    yield (jobs[slot].coefficients, "val", True), self._score_of(jobs[slot])
                    self._discard(jobs.pop(slot))
                if not ended:
                    with signals.at_once():
                        time.sleep(_POLL)
        finally:
            for job in jobs.values():
                self._discard(job)

    def _start(self, coefficients: Coefficients, slot: int) -> _Job:
        """Write the average to a temporary directory, and start the command on it."""
        self._meter.evaluated()
        self._run.progress.work(1)
        folder = Path(tempfile.mkdtemp(prefix=SCRATCH, dir=self._run.journal.folder)).absolute()
        chosen, config = [self._checkpoints[i] for i in coefficients.selected], None
        specs, parts = self._specs, derived.average(self._checkpoints, coefficients, self._specs)
        if self._options.adapter == "exact" and len(chosen) > 1:
            dtype, rank = self._options.dtype, self._options.rank
            plan = plan_output(self._checkpoints, coefficients, dtype=dtype, mode="exact", rank=rank)
            specs, parts, config = plan.specs, plan.parts, plan.config
        try:
            with ExitStack() as stack:
                if self._command.needs_directory:
                    stack.enter_context(hugging_face_folder.created_folder(folder, loader_files.folders(chosen[-1])))
                    out = stack.enter_context(open_files(folder, chosen[-1], specs, {"format": "pt"}))
                else:
                    path = folder / Path(loader_files.file_name(chosen[-1])).name
                    out = stack.enter_context(SafetensorsFile(path, specs, {"format": "pt"}))
                for part in parts:
                    out.write(*part)
                out.commit()
            path = out.path if out.path.parent == folder else folder / MODULES
            wanted = folder if self._command.needs_directory else None
            with hugging_face_folder.copies(chosen[-1], wanted, dtype_names(specs.values()), config):
                step = str(chosen[0].step) if len(chosen) == 1 else ""
                variables = {"CKPTAVG_STEP": step, "CKPTAVG_NAME": self._name(coefficients), "CKPTAVG_JOB": str(slot)}
                running = RunningCommand(self._command, path, self._run.workers.environment() | variables)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return _Job(coefficients, path, variables, running)

    def _discard(self, job: _Job) -> None:
        job.running.close()
        shutil.rmtree(job.path.parent, ignore_errors=True)

    def _score_of(self, job: _Job) -> Score:
        """Return the score that a command printed; of a failed run, an invalid one or its error."""
        try:
            number, text = job.running.score()
        except TaskError as error:
            failure = self._failure(job, error)
            if not self._options.skip_bad or not isinstance(error, FailedRunError):
                raise failure from error
            self._check_failures(job.coefficients, failure)
            return Score(value=-math.inf, loss=None, metric=math.nan, examples=None, invalid=str(failure))
        if not self._shown:
            self._shown = True
            self._run.progress(f"--score-cmd scores {self._name(job.coefficients)}: {number:.6g}, from: {text}", 0, 0)
        value = number if self._options.score_goal == "max" else -number
        return Score(value=value, loss=None, metric=number, examples=None, name=self._command.name)

    def _failure(self, job: _Job, error: TaskError) -> TaskError:
        """Return the error with the mixture's name, and keep its file if that is wanted."""
        name, step, text = job.variables["CKPTAVG_NAME"], job.variables["CKPTAVG_STEP"], str(error)
        hint = error.hint or self._options.score_cmd
        if self._options.keep_failed:
            kept = job.path.parent.with_name("failed-" + re.sub(r"[^\w.-]+", "-", name))
            shutil.rmtree(kept, ignore_errors=True)
            job.path.parent.rename(kept)
            text += f"; its file is kept in {self._run.journal.folder / kept.name}/"
            settings = " ".join(f"{name}={shlex.quote(value)}" for name, value in job.variables.items())
            hint = f"export {settings}; {self._command.line(kept / job.path.name)}"
        elif isinstance(error, FailedRunError):
            ways = "--keep-failed keeps its file and shows the command for it, --skip-bad ranks it last"
            hint = f"{error.hint}; {ways}" if error.hint else ways
        return type(error)(text, path=f"{name} (step {step})" if step else name, hint=hint)

    def _check_failures(self, failed: Coefficients, failure: TaskError) -> None:
        """Raise TaskError if each single candidate has failed, and nothing else has a score."""
        known = {coefficients: bool(score.invalid) for (coefficients, _, _), score in self._scores.values.items()}
        known[failed] = True
        if all(known.values()) and all(single in known for single in Coefficients.singles(self.n)):
            raise TaskError(f"no candidate has a score; the last failure: {failure}", hint=failure.hint)

    def _name(self, coefficients: Coefficients) -> str:
        """Return the name of a single candidate, or a few words for a mixture."""
        chosen = [self._checkpoints[i] for i in coefficients.selected]
        if len(chosen) == 1:
            return chosen[0].name
        steps = [str(checkpoint.step) for checkpoint in chosen]
        if len(steps) > _NAMED:
            steps[_NAMED // 2 : -1] = ["..."]
        return f"{'mean' if coefficients.uniform_subset else 'mixture'} of steps {', '.join(steps)}"
