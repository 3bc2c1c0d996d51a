"""Metrics of class probabilities: accuracy, NLL, Brier score and expected calibration error.

Shape suffixes: B = examples, C = classes, U = units (here: examples of a whole pass).
"""

from collections.abc import Callable, Mapping
from typing import Any, Final, Literal

import torch
from torch import Tensor

from ckptavg.errors import TaskError

GOALS: Final[Mapping[str, Literal["max", "min"]]] = {"accuracy": "max", "nll": "min", "brier": "min", "ece": "min"}
BINS: Final = 15
_LABELS: Final = ("labels", "label", "targets", "target", "y")
_TOLERANCE: Final = 1e-3  # of the sum of a row; less than one bfloat16 rounding, which is allowed as well


def probability_metrics(p_BC: Tensor, labels_B: Tensor) -> dict[str, Tensor]:
    """Return name → [B] values, in float64 and rounded once to the precision of ``p_BC``, float32 at least.

    - ``accuracy``: 1 if argmax_c p_c is the label y, else 0.
    - ``nll``: −ln p_y, with p_y at least the smallest normal number of its precision.
    - ``brier``: Σ_c (p_c − [c = y])², from 0 to 2 (Brier 1950, Verification of Forecasts Expressed in Terms of
      Probability, equation 2).
    - ``ece``: the top-label confidence max_c p_c, negative if that label is wrong; see `calibration_gaps`.
    """
    dtype = torch.float64 if p_BC.dtype == torch.float64 else torch.float32
    wide_BC = p_BC if p_BC.device.type == "mps" else p_BC.double()
    true_B = wide_BC.gather(1, labels_B[:, None]).squeeze(1)
    confidence_B, guess_B = wide_BC.max(dim=1)
    right_B = guess_B == labels_B
    values = {
        "accuracy": torch.where(confidence_B.isnan(), confidence_B, right_B.to(confidence_B.dtype)),
        "nll": -true_B.clamp(min=torch.finfo(dtype).tiny).log(),
        "brier": wide_BC.square().sum(dim=1) - 2 * true_B + 1,
        "ece": torch.where(right_B, confidence_B, -confidence_B),
    }
    return {name: value_B.to(dtype) for name, value_B in values.items()}


def calibration_gaps(signed_U: Tensor) -> Tensor:
    """Return [U] terms whose mean is the expected calibration error of a pass, in 15 bins of equal width.

    ECE = Σ_m |Σ_{i in bin m} g_i| / U with g_i = confidence − correctness, bin m holding the confidences in
    ((m − 1)/15, m/15]. The term of an example is g_i times the sign of its bin's sum: also its influence on the ECE, so
    that the differences of two models' terms give the interval of the difference of their errors.

    Args:
        signed_U: [U], confidence of the top label, negative if that label is wrong.
    References:
        Naeini, Cooper and Hauskrecht 2015, AAAI; Guo et al. 2017, arXiv:1706.04599, equation 3. The influence is that
        of the infinitesimal jackknife: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 21.
    """
    if not signed_U.isfinite().all():
        return signed_U
    confidence_U = signed_U.abs()
    # float32, as the confidence itself, which halves the journal
    gaps_U = (confidence_U - (signed_U > 0).to(signed_U.dtype)).float().double()
    bin_U = ((confidence_U * BINS).ceil().long() - 1).clamp(0, BINS - 1)
    sums = torch.zeros(BINS, dtype=gaps_U.dtype).scatter_add(0, bin_U, gaps_U)
    return gaps_U * sums.sign()[bin_U]


def checked(p_BC: Any, labels_B: Any, source: str, where: str) -> tuple[Tensor, Tensor]:
    """Return probabilities and labels on one device; TaskError unless they are [B, C] and [B], NaN let through."""
    if not isinstance(p_BC, Tensor) or p_BC.ndim != 2 or p_BC.shape[1] < 2 or not p_BC.is_floating_point():
        got = f"a tensor of shape {list(p_BC.shape)}" if isinstance(p_BC, Tensor) else f"a {type(p_BC).__name__}"
        raise TaskError(f"predict() must return probabilities [B, C], not {got}{where}", path=source)
    count, classes = p_BC.shape
    sums_B, least = p_BC.double().sum(dim=1) if p_BC.device.type != "mps" else p_BC.sum(dim=1), p_BC.min()
    tolerance = max(_TOLERANCE, torch.finfo(p_BC.dtype).eps)
    if least < 0 or ((sums_B - 1).abs() > tolerance).any():
        wrong = f"has {float(least):.4g}" if least < 0 else f"has rows with the sum {_farthest(sums_B):.4g}"
        hint = "are these logits? return logits.softmax(dim=1)"
        raise TaskError(f"predict() must return probabilities, but its result {wrong}{where}", path=source, hint=hint)
    if not isinstance(labels_B, Tensor) or labels_B.shape != (count,) or labels_B.is_floating_point():
        got = f"a tensor of shape {list(labels_B.shape)}" if isinstance(labels_B, Tensor) else type(labels_B).__name__
        if isinstance(labels_B, Tensor) and labels_B.shape == (count,):
            got = f"a {labels_B.dtype} tensor"
        hint = "define labels(batch) in the task file"
        raise TaskError(f"the labels must be integers [{count}], not {got}{where}", path=source, hint=hint)
    labels_B = labels_B.to(p_BC.device).long()
    if ((labels_B < 0) | (labels_B >= classes)).any():
        raise TaskError(f"a label is outside the {classes} classes of predict(){where}", path=source)
    return p_BC, labels_B


def labels_of(batch: Any, hook: Callable[[Any], Any] | None, source: str, where: str) -> Any:
    """Return the labels of a batch: of ``hook``, of a pair (inputs, labels), or of a mapping with a usual name.

    Raises:
        TaskError: if there are none.
    """
    if hook is not None:
        return hook(batch)
    if isinstance(batch, Mapping) and (name := next((name for name in _LABELS if name in batch), None)):
        return batch[name]
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[1]
    got = f"{len(batch)} items" if isinstance(batch, tuple | list) else f"a {type(batch).__name__}"
    hint = "define labels(batch) in the task file, returning integers [B]"
    raise TaskError(f"predict() needs labels, but the batch is {got} without any{where}", path=source, hint=hint)


def _farthest(sums_B: Tensor) -> float:
    return float(sums_B[(sums_B - 1).abs().nan_to_num(-1.0).argmax()])
