"""The exact second derivatives of a batch's mean loss.

Shape suffixes: N = candidates.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ckptavg.objective.curvature.directions import Directions, derivatives, gradients_of


@dataclass(frozen=True)
class Exact:
    """H_ij = d_iᵀ ∇²F d_j by reverse over reverse: the gradient's graph once, then one backward per direction."""

    directions: Directions

    def measure(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Return the mean loss of a batch at the mean, its gradient [N] and H [N, N]."""
        d = self.directions
        loss = d.loss(batch)
        gradient_N, hessian_NN = d.eye_NN.new_zeros(d.n), torch.zeros_like(d.eye_NN)
        with derivatives():
            slopes = gradients_of(loss, d.weights, again=True)
            curved = [k for k, slope in enumerate(slopes) if slope is not None and slope.requires_grad]
            for j in range(d.n):
                direction = d[j]
                gradient_N[j] = d.dot(slopes, direction)
                if curved:
                    hessian_NN[:, j] = d.vjp([slopes[k] for k in curved], [direction[k] for k in curved])
        d.count(batch, backward=1 + 2 * d.n)
        return loss.detach(), gradient_N, hessian_NN
