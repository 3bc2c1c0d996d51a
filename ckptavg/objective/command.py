"""Scores by any program: each mixture is written to disk, and a command prints how good it is."""

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
    """An objective whose score is the number that a shell command prints; see `ckptavg.objective.evaluator.Evaluator`.

    The mixture is the exact average, in the dtype of the output, in a directory in ``OUTPUT.ckptavg/``. In the
    command ``{}`` stands for its safetensors file and ``{dir}`` for the directory, which has the candidates' config
    and tokenizer files too. There is no loss and no gradient.

    Args:
        command: for ``/bin/sh -c``; without ``{}`` and ``{dir}`` the file is its last argument.
        checkpoints: the N candidates, open.
        key: the entry of a JSON line that is the score (dots go deeper); None takes the last number of the output.
        goal: whether larger or smaller is better.
        timeout: seconds that a command may take.
        dtype: of the mixtures, as in `ckptavg.average.weighted_sum.output_specs`.
        beside: where the mixtures are written while they are scored.
        seed: of the generator that strategies draw from.
        watch: is told the progress.
        replay: knows what an interrupted run of the same command has measured.
        workers: who each run the command for other mixtures where several are expected, and else leave it to the first.
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
        beside: Path, seed: int = 0, watch: Watch | None = None, replay: MeasurementLog | None = None,
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
        self._replay = replay
        self._workers = workers
        self._scores: dict[Coefficients, Score] = {}
        self._meter = CostMeter()
        self.restart()

    @property
    def n(self) -> int:
        """The number of candidates."""
        return len(self._checkpoints)

    def has(self, split: Split) -> bool:
        """See `Evaluator.has`."""
        return split == "val"

    def restart(self) -> None:
        """See `Evaluator.restart`."""
        self.generator = torch.Generator().manual_seed(self._seed)
        self._meter.restart()

    def prepare(self) -> None:
        """See `Evaluator.prepare`: there is nothing to load."""

    def step(self, i: int) -> int:
        """The training step of candidate ``i``."""
        return self._checkpoints[i].step

    def uniform(self) -> Tensor:
        """See `Objective.uniform`."""
        return torch.full((self.n,), 1 / self.n, dtype=torch.float64)

    def surrogate(self, on: Split | None = None, hessian: Hessian = "auto") -> Surrogate:
        """There is no loss."""
        raise UsageError(_NO_LOSS)

    def gradient(self, coefficients: Coefficients, on: Split | None = None) -> tuple[float, Tensor]:
        """There is no loss."""
        raise UsageError(_NO_LOSS)

    def score(self, coefficients: Coefficients, on: Split | None = None) -> Score:
        """See `Objective.score`: what the command prints for the average, remembered."""
        if coefficients in self._scores:
            self._meter.charge(coefficients)
            return self._scores[coefficients]
        if self._known(coefficients):
            return self._scores[coefficients]
        with self._meter.pricing(coefficients):
            self._meter.evaluated()
            number = self._workers.broadcast(self._workers.on_rank_zero(lambda: self._measured(coefficients)))
            assert number is not None
        self._keep(coefficients, number)
        return self._scores[coefficients]

    def prefetch(self, coefficients: Sequence[Coefficients], on: Split | None = None, *, exact: bool = False) -> None:
        """See `Evaluator.prefetch`."""
        if self._workers.world_size == 1:
            return
        keys = [key for key in dict.fromkeys(coefficients) if key not in self._scores and not self._known(key)]

        def measure(key: Coefficients) -> tuple[float, dict[str, float]]:
            with self._meter.measure() as spent:
                self._meter.evaluated()
                number = self._measured(key)
            return number, spent | {SECONDS: spent[SECONDS] / self._workers.world_size}

        for key, (number, spent) in self._workers.map_parallel(keys, measure):
            self._meter.price(key, spent)
            self._keep(key, number)

    def score_at_least(self, coefficients: Coefficients, bar: float, *, strict: bool) -> Score | None:
        """See `Objective.score_at_least`: a command cannot be stopped early."""
        score = self.score(coefficients)
        return score if (score.value > bar if strict else score.value >= bar) else None

    def exact_score(self, coefficients: Coefficients, split: Split) -> Score:
        """See `Evaluator.exact_score`: every score is."""
        return self.score(coefficients)

    def load_output(
        self,
        coefficients: Coefficients,
        specs: Mapping[str, StoredTensor],
        read_into: Callable[[str, int, memoryview], None],
    ) -> Mapping[str, Tensor]:
        """See `Evaluator.load_output`: nothing is recomputed, so the file is the one that was scored."""
        return {}

    def score_output(self, coefficients: Coefficients, split: Split) -> Score:
        """See `Evaluator.score_output`."""
        return self.score(coefficients)

    def progress(self, stage: str, done: int, total: int, **figures: Tensor | float) -> None:
        """See `Objective.progress`."""
        if self.watch:
            self.watch(stage, done, total, {name: float(value) for name, value in figures.items()})

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
        """There are none."""
        raise UsageError(_NO_LOSS)

    def blocks(self, size: int | None) -> Groups:
        """There is no model."""
        raise UsageError(_NO_LOSS)

    def distances(self, groups: Groups) -> Tensor:
        """There is no model."""
        raise UsageError(_NO_LOSS)

    def loss(self, c_N: Tensor, on: Split | None = None, *, groups: Groups = EVERYTHING, again: bool = False) -> Tensor:
        """There is none."""
        raise UsageError(_NO_LOSS)

    def _measured(self, coefficients: Coefficients) -> float:
        with self._written(coefficients) as path:
            return self._run(path)

    def _known(self, coefficients: Coefficients) -> bool:
        """Whether an interrupted run has measured it; it is remembered then."""
        known = self._replay and self._replay.score(score_key(coefficients, "val", exact=True))
        if known:
            self._scores[coefficients] = known
        return bool(known)

    def _keep(self, coefficients: Coefficients, number: float) -> None:
        score = Score(value=self._sign * number, loss=None, metric=number, examples=None)
        self._scores[coefficients] = score
        if self._replay is not None:
            self._replay.keep_score(score_key(coefficients, "val", exact=True), score)

    @contextmanager
    def _written(self, coefficients: Coefficients) -> Generator[Path]:
        """The average as a file, in a directory that is gone afterwards."""
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
        except BaseException as error:  # the whole group: the command may have started others
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            if isinstance(error, subprocess.TimeoutExpired):
                raise TaskError(
                    f"--score-cmd took more than {self._timeout:g} s", hint="give it longer with --score-timeout"
                ) from error
            raise
        if process.returncode:
            raise TaskError(f"--score-cmd failed with exit code {process.returncode}: {tail(err)}", hint=command)
        return self._number(out, err, command)

    def _number(self, out: str, err: str, command: str) -> float:
        found = list(numbers(out) if self._key is None else entries(out, self._key))
        if not found:
            wanted = "no number" if self._key is None else f"no JSON line with a number at {self._key}"
            raise TaskError(f"--score-cmd printed {wanted} on stdout: {tail(out) or tail(err)}", hint=command)
        if not math.isfinite(found[-1]):
            raise TaskError(f"--score-cmd printed {found[-1]}", hint=command)
        return found[-1]
