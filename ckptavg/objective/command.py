"""Scores from a shell command: each mixture is written to disk, and the command prints its score."""

import shutil
import tempfile
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ckptavg.average.weighted_sum import output_specs, weighted_average
from ckptavg.candidates import ReadInto
from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.checkpoints.dtypes import dtype_names
from ckptavg.coefficients import Coefficients
from ckptavg.context import Run
from ckptavg.cost import SECONDS, Cost, CostMeter
from ckptavg.journal import SCRATCH
from ckptavg.objective import Losses
from ckptavg.objective.codecs import ScoreCodec, ScoreKey
from ckptavg.objective.mixed_model import PlanAdapter
from ckptavg.objective.remembered import Remembered
from ckptavg.objective.score_command import ScoreCommand
from ckptavg.output import hugging_face_folder
from ckptavg.output.safetensors_file import SafetensorsFile
from ckptavg.readers import StoredTensor
from ckptavg.score import Score, Split


class CommandEvaluator:
    """Objective whose score is the number that a shell command prints; see `ckptavg.objective.evaluator.Evaluator`.

    Each mixture is the exact average in the output's dtype, written to a directory in ``OUTPUT.ckptavg/``, which also
    has the candidates' config and tokenizer files if the command reads the directory. There is no loss.

    Args:
        command: the command.
        checkpoints: the N open candidates.
        run: has the ranks, of which each runs the command for other mixtures if several are requested, else only rank
            0, and the journal, in whose directory the mixtures are written.
        goal: ``max`` if larger is better, ``min`` if smaller is.
        dtype: the dtype of the mixtures, as in `ckptavg.average.weighted_sum.output_specs`.
        exact_adapter: see `ckptavg.objective.mixed_model.MixedModel`.
    """

    losses: Losses | None = None
    scored_on: Split = "val"
    splits: tuple[Split, ...] = ("val",)
    bounded = False
    statistics: Collection[str] = ()
    averaged_buffers: Collection[str] = ()
    matrix = None
    notes: Sequence[str] = ()

    def __init__(
        self, command: ScoreCommand, checkpoints: Sequence[Checkpoint], run: Run, *,
        goal: Literal["max", "min"] = "max", dtype: str | None = None, exact_adapter: PlanAdapter | None = None,
    ) -> None:  # fmt: skip
        self._command = command
        self._checkpoints = checkpoints
        self._run = run
        self._sign = 1.0 if goal == "max" else -1.0
        self._specs = output_specs(checkpoints[0], dtype)
        self._exact_adapter = exact_adapter
        self._meter = CostMeter()
        self._scores = Remembered(ScoreCodec(None), run, self._meter)
        self.n = len(checkpoints)
        self.progress = run.progress
        self.restart()

    def has(self, split: Split) -> bool:
        """See `Evaluator.has`."""
        return split == "val"

    def restart(self, search: str = "") -> None:
        """See `Evaluator.restart`."""
        self.generator = torch.Generator().manual_seed(self._run.seed)
        self._meter.restart()

    def prepare(self) -> None:
        """Do nothing, as there is nothing to load; see `Evaluator.prepare`."""

    def score(self, coefficients: Coefficients, on: Split | None = None) -> Score:
        """See `Objective.score`; the number that the command prints for the average, cached."""
        return self._scores.find((coefficients, "val", True), partial(self._measure_once, coefficients))

    def prefetch(self, coefficients: Sequence[Coefficients], on: Split | None = None, *, exact: bool = False) -> None:
        """See `Evaluator.prefetch`."""
        if self._run.workers.world_size > 1:
            keys: list[ScoreKey] = [(c, "val", True) for c in coefficients]
            self._scores.prefetch(keys, lambda key: self._measure(key[0]))

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
        return {"val": self.score(coefficients)}

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
        """Write the average to a temporary directory and run the command on it."""
        self._meter.evaluated()
        source, config = self._checkpoints[coefficients.selected[-1]], None
        specs, parts = self._specs, weighted_average(self._checkpoints, coefficients, self._specs)
        if self._exact_adapter and len(coefficients.selected) > 1:
            plan = self._exact_adapter(coefficients)
            specs, parts, config = plan.specs, plan.parts, plan.config
        folder = Path(tempfile.mkdtemp(prefix=SCRATCH, dir=self._run.journal.folder))
        try:
            path = folder / hugging_face_folder.file_name(source)
            with SafetensorsFile(path, specs, {"format": "pt"}) as out:
                for part in parts:
                    out.write(*part)
                out.commit()
            wanted = folder if self._command.needs_directory else None
            with hugging_face_folder.copies(source, wanted, dtype_names(s.dtype for s in specs.values()), config):
                number = self._command.run(path, self._run.workers.environment())
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return Score(value=self._sign * number, loss=None, metric=number, examples=None)
