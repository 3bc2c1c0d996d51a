"""Score the averaged predictions of draws beside those of the last candidate and of the mean."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final, TypeAlias

from ckptavg.average.gaussian import Posterior
from ckptavg.average.weighted_sum import AddedNoise
from ckptavg.coefficients import Coefficients
from ckptavg.errors import UsageError, decimal
from ckptavg.objective.evaluator import Evaluator
from ckptavg.objective.mixture import Mixture
from ckptavg.objective.model_average import STAGE, NoLikelihoodError
from ckptavg.options.posterior import DRAWS, SCALES, PosteriorOptions
from ckptavg.pipeline.session import Session
from ckptavg.report import interval
from ckptavg.report.posterior import Predictions
from ckptavg.runtime.estimate import Stage
from ckptavg.score import DATA, Split

_HARDLY: Final = 1e-3  # relative difference of two NLLs
_Table: TypeAlias = Mapping[Split, Mapping[str, Predictions]]


def check_scale(this: Session, settings: PosteriorOptions) -> None:
    """Raise UsageError if ``--scale auto`` has no predictions to choose by."""
    if settings.scale != "auto":
        return
    evaluator = this.scored("--scale auto chooses by the NLL on validation data, so it needs a task")
    if not _draws(settings):
        raise UsageError("--scale auto chooses by averaged predictions, so --draws cannot be 0")
    if not isinstance(evaluator, Mixture) or evaluator.losses is None:
        raise UsageError(
            "--scale auto chooses by averaged predictions, which need a task with a loss, not scores alone"
        )


def average_predictions(
    this: Session, posterior: Posterior, settings: PosteriorOptions
) -> tuple[Posterior, _Table, list[str]]:
    """Return the scores of averaged predictions on each split, the posterior with the scale chosen, and notes.

    Only the first split, of validation data where the task has any, decides about ``--scale auto``.

    Raises:
        NoLikelihoodError: with ``--scale auto``, if the task has neither probabilities nor a loss for each example.
    """
    evaluator, chosen, draws = this.evaluator, settings.scale == "auto", _draws(settings)
    if evaluator is None or draws == 0:
        return posterior, {}, []
    if not isinstance(evaluator, Mixture) or evaluator.losses is None:
        return posterior, {}, ["predictions were not averaged: that needs a task with a loss, not scores alone"]
    try:
        return _scored(evaluator, posterior, draws, SCALES if chosen else (posterior.gaussian.scale,))
    except NoLikelihoodError as error:
        if chosen:
            raise
        return posterior, {}, [f"predictions were not averaged: {error}; {error.hint}"]


def prediction_stages(evaluator: Evaluator, settings: PosteriorOptions) -> Sequence[Stage]:
    """Return the stages of `average_predictions`, for an estimate of the time."""
    draws, tried = _draws(settings), len(SCALES) - 1 if settings.scale == "auto" else 1
    if not draws or evaluator.losses is None:
        return ()
    counts = {split: 2 + draws * (tried if split == evaluator.scored_on else 1) for split in evaluator.splits}
    return [
        Stage(STAGE.format(split), tests=count) if split == "test" else Stage(STAGE.format(split), scores=count)
        for split, count in counts.items()
    ]


def _draws(settings: PosteriorOptions) -> int:
    return next(count for count in (settings.draws, settings.samples, DRAWS) if count is not None)


def _scored(
    evaluator: Mixture, posterior: Posterior, draws: int, scales: Sequence[float]
) -> tuple[Posterior, _Table, list[str]]:
    n, result, notes = len(posterior.checkpoints), dict[Split, dict[str, Predictions]](), list[str]()
    mean: tuple[Coefficients, AddedNoise | None] = (Coefficients.uniform(range(n), n), None)

    def predictions(models: Sequence[tuple[Coefficients, AddedNoise | None]], split: Split) -> Predictions:
        score, bins = evaluator.average_predictions(models, split)
        return Predictions(models=len(models), score=score, bins=bins)

    for split in evaluator.splits:
        last = predictions([(Coefficients.singles(n)[-1], None)], split)
        swa, tried = predictions([mean], split), dict[float, Predictions]()
        for scale in scales:
            scaled = replace(posterior, gaussian=replace(posterior.gaussian, scale=scale))
            models = [(draw.coefficients, draw.noise) for draw in map(scaled.draw, range(1, draws + 1))]
            tried[scale] = predictions(models, split) if scale else swa
        best = min(scales, key=lambda scale: (tried[scale].score.loss or 0.0, scale))
        result[split] = {"last": last, "swa": swa, "swag": tried[best]}
        if len(scales) > 1:
            figures = ", ".join(f"{scale:g}: {decimal(tried[scale].score.loss)}" for scale in scales)
            notes.append(f"NLL on {DATA[split]} data by scale: {figures}; {best:g} was taken")
            scales, posterior = [best], replace(posterior, gaussian=replace(posterior.gaussian, scale=best))
    return posterior, result, [*notes, *_differences(evaluator, result)]


def _differences(evaluator: Mixture, result: _Table) -> list[str]:
    """Compare the averaged predictions with those of the mean, on test data where there are any."""
    split = evaluator.splits[-1]
    swag, swa = result[split]["swag"], result[split]["swa"]
    gain, scale = interval.single_gain(swag.score, swa.score), abs(swa.score.loss or 0.0)
    notes = [f"NLL of the averaged predictions on {DATA[split]} data against the mean's (+ is lower): {gain}"]
    if swag is swa:
        notes = ["scale 0: every draw is the mean"]
    elif abs(gain.value) < _HARDLY * scale:
        notes.append(
            "the average over draws is the mean: the candidates hardly differ, as after a decay of the rate to 0"
        )
    if evaluator.task.probabilities is None:
        notes.append("nll takes each example's loss for −ln p of it; a mean over tokens gives that of a typical token")
    return notes
