"""The loss as a function of linear combinations of the candidates' outputs: what is left of a linear model.

Shape suffixes: N = candidates, U = units (examples, or batches if the loss has one value for each).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

if TYPE_CHECKING:
    from torch import Tensor

STAGE: Final = "computing the outputs"
CHECKS: Final = 3  # batches besides N passes: one for the outputs that the loss uses, and two mixtures


class Expansion(NamedTuple):
    """Losses of the units, and the derivatives of their weighted mean in the coefficients.

    Attributes:
        losses_U: [U], the loss of each unit.
        gradient_N: [N], the gradient of Σ_u v_u ℓ_u / Σ_u v_u.
        hessian_NN: [N, N], its second derivatives, positive semidefinite if the loss is convex in the output.
    """

    losses_U: Tensor
    gradient_N: Tensor
    hessian_NN: Tensor


class OutputLosses(Protocol):
    """Losses at the outputs Σ_i c_i z_i for coefficients of any sum, with the outputs z_i of each candidate known.

    A model that is linear in its weights has these outputs at w = Σ_i c_i w_i, so that no further pass is needed. All
    tensors are float64 on the CPU.

    Attributes:
        examples_U: [U], the number of examples of each unit.
        eps: the relative rounding error of the losses.
    """

    examples_U: Tensor
    eps: float

    def expand(self, c_N: Tensor, weight_U: Tensor) -> Expansion:
        """Return the losses at ``c_N`` [N], and the derivatives of their mean with these weights v [U] ≥ 0."""
        ...

    def metric(self, c_N: Tensor) -> Tensor | None:
        """Return the deciding metric of the units [U], larger is better; None if the task has none of each unit."""
        ...
