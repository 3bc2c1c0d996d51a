"""What a strategy may ask, and what it answers: the seam between mathematics and everything else.

Shape suffixes: N = candidates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, TypeAlias

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ckptavg.coefficients import Coefficients

Split: TypeAlias = Literal["train", "val", "test"]


@dataclass(frozen=True, kw_only=True)
class Score:
    """How good a model is on one split.

    Attributes:
        value: what strategies compare; larger is better. The metric (negated where smaller is better), else −loss.
        loss: the mean loss over examples.
        metric: the mean metric over examples, as the task gives it, or None where it has none.
        examples: how many examples were averaged over.
    """

    value: float
    loss: float
    metric: float | None
    examples: int


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What the search cost.

    Attributes:
        forward_batches: batches that went forward, for learning, scoring and BatchNorm statistics.
        backward_batches: batches that went backward.
        seconds: wall-clock time.
        epochs: the same work in epochs of ``epochs_of`` data, a backward counted as two forwards; None if its size
            is not known.
        epochs_of: the split whose size an epoch is.
    """

    forward_batches: int
    backward_batches: int
    seconds: float
    epochs: float | None
    epochs_of: Split


class Objective(Protocol):
    """Loss and score of a mixture of checkpoints, as functions of its coefficients alone.

    Files, devices, precision and the model are hidden behind this. A strategy that is given a two-line quadratic
    instead of a network cannot tell the difference, which is how every strategy is tested.
    """

    @property
    def n(self) -> int:
        """The number of candidates N, in training order."""
        ...

    @property
    def generator(self) -> torch.Generator:
        """The seeded source of every random number a strategy draws; on the CPU, so that devices agree."""
        ...

    def uniform(self) -> Tensor:
        """[N], 1/N each, where `loss` wants its coefficients to be; derive tensors from it to stay there."""
        ...

    def loss(self, c_N: Tensor, on: Split | None = None) -> Tensor:
        """The mean loss at w = Σ_i c_i w_i on the next batch, differentiable in ``c_N``.

        ∂ℓ/∂c_i = ⟨w_i, ∂ℓ/∂w⟩. BatchNorm normalises with the batch's own statistics, dropout is off.

        Args:
            c_N: [N] coefficients that sum to one, on the device of `uniform`.
            on: the data; None is the validation data where the task has some, else the training data.
        """
        ...

    def score(self, coefficients: Coefficients) -> Score:
        """The score on validation data, BatchNorm statistics recomputed; remembered, so asking again is free.

        Raises:
            TaskError: if loss or metric is NaN or infinite.
        """
        ...

    def progress(self, stage: str, done: int, total: int, **figures: Tensor | float) -> None:
        """Say how far the work is; cheap enough to be called every step (figures are looked at now and then)."""
        ...


@dataclass(frozen=True, kw_only=True)
class Learned:
    """What a strategy found, and how.

    Attributes:
        coefficients: the answer.
        columns: name → one number for each candidate, shown in the table of candidates.
        trace: name → one number for each step.
    """

    coefficients: Coefficients
    columns: Mapping[str, Sequence[float]] = field(default_factory=dict[str, Sequence[float]])
    trace: Mapping[str, Sequence[float]] = field(default_factory=dict[str, Sequence[float]])


class Strategy(Protocol):
    """A frozen keyword-only dataclass of settings that turns an objective into coefficients.

    A field ``name: Annotated[type, "help"] = default`` is also the command's option ``--name``.
    """

    needs_task: ClassVar[bool]

    def learn(self, objective: Objective) -> Learned:
        """The coefficients for the N candidates of ``objective``.

        Raises:
            UsageError: if the settings do not fit the candidates.
        """
        ...
