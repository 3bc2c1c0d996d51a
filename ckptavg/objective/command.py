"""Scores from a shell command: each mixture is written to disk, and the command prints its score."""

from __future__ import annotations

import contextlib
import math
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Literal

import torch
from torch import Tensor

from ckptavg.average.weighted_sum import output_specs, weighted_average
from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.checkpoints.dtypes import dtype_names
from ckptavg.coefficients import EVERYTHING, Coefficients, Groups
from ckptavg.cost import SECONDS, Cost, CostMeter
from ckptavg.errors import TaskError, UsageError
from ckptavg.journal import SCRATCH
from ckptavg.objective import Hessian
from ckptavg.objective.measurements import MeasurementLog, score_key
from ckptavg.objective.score_command import DIRECTORY, FILE, entries, numbers, tail
from ckptavg.output import hugging_face_folder
from ckptavg.output.safetensors_file import SafetensorsFile
from ckptavg.readers import StoredTensor
from ckptavg.runtime import signals
from ckptavg.runtime.progress import Watch
from ckptavg.runtime.workers import ALONE, Workers
from ckptavg.score import Score, Split
from ckptavg.surrogate import Surrogate

_NO_LOSS: Final = "a command gives a score and no gradient: score with a task file or --val for this"


class CommandEvaluator:
    """Objective whose score is the number that a shell command prints; see `ckptavg.objective.evaluator.Evaluator`.

    Each mixture is the exact average in the output's dtype, written to a directory in ``OUTPUT.ckptavg/``. In the
    command, ``{}`` stands for its safetensors file and ``{dir}`` for the directory, which also has the candidates'
    config and tokenizer files. There is no loss and no gradient.

    Args:
        command: the command for ``/bin/sh -c``; without ``{}`` or ``{dir}``, the file is appended as last argument.
        checkpoints: the N open candidates.
        key: the entry of a JSON line that holds the score, dots for nesting; None takes the last number printed.
        goal: ``max`` if larger is better, ``min`` if smaller is.
        timeout: the time limit of one command, in seconds.
        dtype: the dtype of the mixtures, as in `ckptavg.average.weighted_sum.output_specs`.
        beside: the directory that mixtures are written to while they are scored.
        seed: the seed of the strategies' generator.
        watch: progress callback.
        log: measurements of an interrupted run of the same command.
        workers: the ranks; each runs the command for different mixtures if several are requested, else only rank 0.
    """

    differentiable = False
    scored_on: Split = "val"
    splits: tuple[Split, ...] = ("val",)
    bounded = False
    statistics: Collection[str] = ()
    matrix = None
    notes: Sequence[str] = ()

    def __init__(
        self, command: str, checkpoints: Sequence[Checkpoint], *, key: str | None = None,
        goal: Literal["max", "min"] = "max", timeout: float | None = None, dtype: str | None = None,
        beside: Path, seed: int = 0, watch: Watch | None = None, log: MeasurementLog | None = None,
        workers: Workers = ALONE,
    ) -> None:  # fmt: skip
        self._command = command if FILE in command or DIRECTORY in command else f"{command} {FILE}"
        self._checkpoints = checkpoints
        self._key = key
        self._sign = 1.0 if goal == "max" else -1.0
        self._timeout = timeout
        self._dtype = dtype
        self._beside = beside
        self._seed = seed
        self.watch = watch
        self._log = log
        self._workers = workers
        self._scores: dict[Coefficients, Score] = {}
        self._meter = CostMeter()
        self.restart()

    @property
    def n(self) -> int:
        """Number of candidates N."""
        return len(self._checkpoints)

    def has(self, split: Split) -> bool:
        """See `Evaluator.has`."""
        return split == "val"

    def restart(self) -> None:
        """See `Evaluator.restart`."""
        self.generator = torch.Generator().manual_seed(self._seed)
        self._meter.restart()

    def prepare(self) -> None:
        """Do nothing, as there is nothing to load; see `Evaluator.prepare`."""

    def step(self, i: int) -> int:
        """Return the training step of candidate ``i``."""
        return self._checkpoints[i].step

    def uniform(self) -> Tensor:
        """See `Objective.uniform`."""
        return torch.full((self.n,), 1 / self.n, dtype=torch.float64)

    def surrogate(self, on: Split | None = None, hessian: Hessian = "auto") -> Surrogate:
        """Raise UsageError: a command has no loss."""
        raise UsageError(_NO_LOSS)

    def gradient(self, coefficients: Coefficients, on: Split | None = None) -> tuple[float, Tensor]:
        """Raise UsageError: a command has no loss."""
        raise UsageError(_NO_LOSS)

    def score(self, coefficients: Coefficients, on: Split | None = None) -> Score:
        """See `Objective.score`; the number that the command prints for the average, cached."""
        if coefficients in self._scores:
            self._meter.charge(coefficients)
            return self._scores[coefficients]
        if self._recall(coefficients):
            return self._scores[coefficients]
        with self._meter.pricing(coefficients):
            self._meter.evaluated()
            number = self._workers.broadcast(self._workers.on_rank_zero(lambda: self._run_on_average(coefficients)))
            assert number is not None
        self._keep(coefficients, number)
        return self._scores[coefficients]

    def prefetch(self, coefficients: Sequence[Coefficients], on: Split | None = None, *, exact: bool = False) -> None:
        """See `Evaluator.prefetch`."""
        if self._workers.world_size == 1:
            return
        keys = [key for key in dict.fromkeys(coefficients) if key not in self._scores and not self._recall(key)]

        def measure(key: Coefficients) -> tuple[float, dict[str, float]]:
            with self._meter.measure() as spent:
                self._meter.evaluated()
                number = self._run_on_average(key)
            return number, spent | {SECONDS: spent[SECONDS] / self._workers.world_size}

        for key, (number, spent) in self._workers.map_parallel(keys, measure):
            self._meter.price(key, spent)
            self._keep(key, number)

    def score_at_least(self, coefficients: Coefficients, threshold: float, *, strict: bool) -> Score | None:
        """See `Objective.score_at_least`; a command always runs to its end."""
        score = self.score(coefficients)
        return score if (score.value > threshold if strict else score.value >= threshold) else None

    def exact_score(self, coefficients: Coefficients, split: Split) -> Score:
        """See `Evaluator.exact_score`; every score of a command is exact."""
        return self.score(coefficients)

    def load_output(
        self,
        coefficients: Coefficients,
        specs: Mapping[str, StoredTensor],
        read_into: Callable[[str, int, memoryview], None],
    ) -> Mapping[str, Tensor]:
        """See `Evaluator.load_output`; nothing is recomputed, since the output file equals the one that was scored."""
        return {}

    def score_output(self, coefficients: Coefficients, split: Split) -> Score:
        """See `Evaluator.score_output`."""
        return self.score(coefficients)

    def progress(self, stage: str, done: int, total: int, **metrics: Tensor | float) -> None:
        """See `Objective.progress`."""
        if self.watch:
            self.watch(stage, done, total, {name: float(value) for name, value in metrics.items()})

    def cost(self) -> Cost:
        """See `Evaluator.cost`."""
        return Cost(
            forward_batches=0,
            backward_batches=0,
            evaluations=round(self._meter["evaluations"]),
            seconds=self._meter[SECONDS],
            epochs=None,
            epochs_of="val",
        )

    def batches(self, on: Split) -> int:
        """Raise UsageError: a command has no batches."""
        raise UsageError(_NO_LOSS)

    def blocks(self, size: int | None) -> Groups:
        """Raise UsageError: a command has no model."""
        raise UsageError(_NO_LOSS)

    def distances(self, groups: Groups) -> Tensor:
        """Raise UsageError: a command has no model."""
        raise UsageError(_NO_LOSS)

    def loss(self, c_N: Tensor, on: Split | None = None, *, groups: Groups = EVERYTHING, again: bool = False) -> Tensor:
        """Raise UsageError: a command has no loss."""
        raise UsageError(_NO_LOSS)

    def _run_on_average(self, coefficients: Coefficients) -> float:
        with self._written(coefficients) as path:
            return self._run(path)

    def _recall(self, coefficients: Coefficients) -> bool:
        """Load the score that an interrupted run measured; return False if there is none."""
        score = self._log and self._log.score(score_key(coefficients, "val", exact=True))
        if score:
            self._scores[coefficients] = score
        return bool(score)

    def _keep(self, coefficients: Coefficients, number: float) -> None:
        score = Score(value=self._sign * number, loss=None, metric=number, examples=None)
        self._scores[coefficients] = score
        if self._log is not None:
            self._log.keep_score(score_key(coefficients, "val", exact=True), score)

    @contextmanager
    def _written(self, coefficients: Coefficients) -> Generator[Path]:
        """Write the average to a file in a temporary directory, removed on exit."""
        folder = Path(tempfile.mkdtemp(prefix=SCRATCH, dir=self._beside))
        try:
            path = folder / "model.safetensors"
            specs = output_specs(self._checkpoints[0], self._dtype)
            with SafetensorsFile(path, specs, {"format": "pt"}) as out:
                for name, offset, data in weighted_average(self._checkpoints, coefficients, specs):
                    out.write(name, offset, data)
                out.commit()
            if DIRECTORY in self._command:
                hugging_face_folder.copy(
                    self._checkpoints[coefficients.selected[-1]],
                    folder,
                    dtype_names(spec.dtype for spec in specs.values()),
                )
            yield path
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _run(self, path: Path) -> float:
        command = self._command.replace(DIRECTORY, shlex.quote(str(path.parent))).replace(FILE, shlex.quote(str(path)))
        process = subprocess.Popen(
            ["/bin/sh", "-c", command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, errors="replace", start_new_session=True, env=self._workers.environment(),
        )  # fmt: skip
        try:
            with signals.at_once():
                out, err = process.communicate(timeout=self._timeout)
        except BaseException as error:  # kill the process group: the command may have started other processes
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            if isinstance(error, subprocess.TimeoutExpired):
                raise TaskError(
                    f"--score-cmd took more than {self._timeout:g} s", hint="raise the limit with --score-timeout"
                ) from error
            raise
        if process.returncode:
            raise TaskError(f"--score-cmd failed with exit code {process.returncode}: {tail(err)}", hint=command)
        return self._number(out, err, command)

    def _number(self, out: str, err: str, command: str) -> float:
        values = list(numbers(out) if self._key is None else entries(out, self._key))
        if not values:
            wanted = "no number" if self._key is None else f"no JSON line with a number at {self._key}"
            raise TaskError(f"--score-cmd printed {wanted} on stdout: {tail(out) or tail(err)}", hint=command)
        if not math.isfinite(values[-1]):
            raise TaskError(f"--score-cmd printed {values[-1]}", hint=command)
        return values[-1]
