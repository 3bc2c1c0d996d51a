"""Values of a JSON report in the words that its page and its Markdown share."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from ckptavg.errors import decimal
from ckptavg.report.digits import interval_places, places

Json: TypeAlias = Mapping[str, Any]
Figures: TypeAlias = dict[str, tuple[float, float | None]]


def figures(score: Json | None) -> Figures:
    """Return name → value and standard error (None if unknown): the deciding metric, the loss, then other metrics."""
    if score is None:
        return {}
    named = dict(score.get("metrics") or {"metric": score["metric"]})
    own, metric = next(iter(named.items()))
    found = {own: (metric, score["metric_noise"]), "loss": (score["loss"], score["loss_noise"])}
    found |= {name: (value, None) for name, value in named.items() if name != own}
    return {name: pair for name, pair in found.items() if pair[0] is not None}


def with_noise(value: float | None, noise: float | None = None) -> str:
    """Return a value ± its standard error, with the digits that this allows; with four decimals if it is unknown."""
    if value is None:
        return ""
    digits = places([noise or 0.0])
    return decimal(value, places=digits) + (f" ± {decimal(noise, places=digits)}" if noise else "")


def difference(gain: Json) -> str:
    """Return a difference with its 95 % interval, if it has one, with two digits of half its width."""
    ends = gain["low"], gain["high"]
    if None in ends:
        return decimal(gain["value"], "+")
    value, low, high = (decimal(number, "+", interval_places([ends])) for number in (gain["value"], *ends))
    return f"{value} [{low}, {high}]"


def coefficients(candidate: Json) -> Sequence[float]:
    """Return the coefficients of a candidate, one per group of tensors."""
    value = candidate["coefficient"]
    return value if isinstance(value, Sequence) else (value,)
