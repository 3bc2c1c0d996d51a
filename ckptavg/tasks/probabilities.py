"""Metrics of class probabilities: accuracy, NLL, Brier score and expected calibration error.

Shape suffixes: B = examples, C = classes, U = units (here: examples of a whole pass).
"""

from collections.abc import Callable, Mapping
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

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


def reliability(signed_U: Tensor) -> list[dict[str, float]]:
    """Return the bins of a reliability diagram: their ends, examples, and mean confidence and accuracy of these.

    Args:
        signed_U: as for `calibration_gaps`, whose bins they are; bins without examples are left out.
    """
    confidence_U, rows = signed_U.abs().double(), list[dict[str, float]]()
    bin_U = ((confidence_U * BINS).ceil().long() - 1).clamp(0, BINS - 1)
    for number in range(BINS):
        inside = bin_U == number
        if count := int(inside.sum()):
            means = float(confidence_U[inside].mean()), float((signed_U[inside] > 0).double().mean())
            names = ("low", "high", "examples", "confidence", "accuracy")
            rows.append(dict(zip(names, (number / BINS, (number + 1) / BINS, count, *means), strict=True)))
    return rows


class ProbabilityMetrics:
    """Metrics of a task's ``predict`` by name; none for the whole run if that is a function for something else.

    The first batch shows it: a ``predict`` that fails, or whose result is no floating-point tensor [B, C ≥ 2], is left
    out with a remark in ``notes``, unless a metric of it is ``required``. Later batches on a GPU are checked without
    waiting for it, and their examples without probabilities or a label have NaN metrics.

    Args:
        source: the task file, for errors.
        where: returns the batch being used, for errors.
    """

    def __init__(
        self, predict: Callable[[nn.Module, Any], Any], labels: Callable[[Any], Any], source: str,
        where: Callable[[], str], notes: list[str], *, required: bool,
    ) -> None:  # fmt: skip
        self._predict = predict
        self._labels = labels
        self._source = source
        self._where = where
        self._notes = notes
        self._strict = required
        self._state: Literal["new", "used", "left out"] = "new"

    def __call__(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        """Return name → [B] values; empty if ``predict`` is left out."""
        pair = self.probabilities(model, batch)
        return {} if pair is None else probability_metrics(*pair)

    def probabilities(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor] | None:
        """Return the checked result of ``predict`` [B, C] and the labels [B]; None if it is left out."""
        if self._state == "left out":
            return None
        may_leave_out = self._state == "new" and not self._strict
        p_BC: Any = None
        try:
            p_BC = self._predict(model, batch)
            reason = wrong_shape(p_BC)
        except TaskError as error:
            if not may_leave_out:
                raise
            reason = str(error)
        if reason and may_leave_out:
            self._state = "left out"
            left_out = "predict() gives no probabilities [B, C], so accuracy, nll, brier and ece are left out"
            self._notes.append(f"{left_out}: rename it, or return floating-point probabilities ({reason})")
            return None
        wait = self._state == "new" or p_BC.device.type != "cuda"
        pair = checked(p_BC, self._labels(batch), self._source, self._where(), wait=wait)
        self._state = "used"
        return pair


def wrong_shape(p_BC: Any) -> str:
    """Describe a value that is no floating-point tensor [B, C ≥ 2]; "" if it is one."""
    if not isinstance(p_BC, Tensor):
        return f"a {type(p_BC).__name__}"
    if p_BC.ndim != 2 or p_BC.shape[1] < 2:
        return f"a tensor of shape {list(p_BC.shape)}"
    return "" if p_BC.is_floating_point() else f"a {p_BC.dtype} tensor"


def checked(p_BC: Any, labels_B: Any, source: str, where: str, *, wait: bool = True) -> tuple[Tensor, Tensor]:
    """Return probabilities and labels on one device; TaskError unless they are [B, C] and [B], NaN let through.

    Without ``wait`` nothing waits for the device: a row without probabilities, or whose label is no class, becomes NaN.
    """
    if got := wrong_shape(p_BC):
        hint = "rename it if it is for something else"
        raise TaskError(f"predict() must return probabilities [B, C], not {got}{where}", path=source, hint=hint)
    count, classes = p_BC.shape
    if not isinstance(labels_B, Tensor) or labels_B.shape != (count,) or labels_B.is_floating_point():
        got = f"a tensor of shape {list(labels_B.shape)}" if isinstance(labels_B, Tensor) else type(labels_B).__name__
        if isinstance(labels_B, Tensor) and labels_B.shape == (count,):
            got = f"a {labels_B.dtype} tensor"
        hint = "define labels(batch) in the task file"
        raise TaskError(f"the labels must be integers [{count}], not {got}{where}", path=source, hint=hint)
    labels_B = labels_B.to(p_BC.device).long()
    sums_B = p_BC.double().sum(dim=1) if p_BC.device.type != "mps" else p_BC.sum(dim=1)
    far_B = (sums_B - 1).abs() > max(_TOLERANCE, torch.finfo(p_BC.dtype).eps)
    negative_B, no_class_B = (p_BC < 0).any(dim=1), (labels_B < 0) | (labels_B >= classes)
    if not wait:
        wrong_B = far_B | negative_B | no_class_B
        return p_BC.masked_fill(wrong_B[:, None], torch.nan), labels_B.clamp(0, classes - 1)
    if negative_B.any() or far_B.any():
        least = float(p_BC.min())
        wrong = f"has {least:.4g}" if least < 0 else f"has rows with the sum {_farthest(sums_B):.4g}"
        logs = bool((p_BC <= 0).all()) and bool(((p_BC.exp().sum(dim=1) - 1).abs() < 2 * _TOLERANCE).all())
        hint = f"are these {'log-probabilities? add .exp()' if logs else 'logits? return logits.softmax(dim=1)'}"
        raise TaskError(f"predict() must return probabilities, but its result {wrong}{where}", path=source, hint=hint)
    if no_class_B.any():
        raise TaskError(f"a label is outside the {classes} classes of predict(){where}", path=source)
    return p_BC, labels_B


def labels_of(batch: Any, hook: Callable[[Any], Any] | None, source: str, where: str) -> Any:
    """Return the labels of a batch: of ``hook``, of a pair (inputs, labels), or an entry or attribute of a usual name.

    Raises:
        TaskError: if there are none.
    """
    if hook is not None:
        return hook(batch)
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[1]
    entries = batch if isinstance(batch, Mapping) else {name: getattr(batch, name, None) for name in _LABELS}
    if name := next((name for name in _LABELS if entries.get(name) is not None), None):
        return entries[name]
    got = f"{len(batch)} items" if isinstance(batch, tuple | list) else f"a {type(batch).__name__}"
    hint = "define labels(batch) in the task file, returning integers [B]"
    raise TaskError(f"predict() needs labels, but the batch is {got} without any{where}", path=source, hint=hint)


def _farthest(sums_B: Tensor) -> float:
    return float(sums_B[(sums_B - 1).abs().nan_to_num(-1.0).argmax()])
