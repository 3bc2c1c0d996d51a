"""Vectors of spectral norm in the model that is set to mixtures."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ckptavg.average import derived
from ckptavg.average.spectral_norm import as_matrix, refined, singular_vectors, whole
from ckptavg.candidates.copied import storage
from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.checkpoints.derived import SpectralNorm
from ckptavg.coefficients import Coefficients

_ITERATIONS = 8


class SpectralVectors:
    """Recomputes the vectors from the weights of the model.

    Args:
        model: the model, with the candidates' names.
        checkpoints: the N candidates.
    """

    def __init__(self, model: nn.Module, checkpoints: Sequence[Checkpoint]) -> None:
        self._checkpoints = checkpoints
        self._state = model.state_dict(keep_vars=True)
        self._layers = derived.layers(checkpoints[0])
        self._start: Sequence[tuple[SpectralNorm, Tensor]] = ()
        self.need_mean = len(self._layers) > 0  # before `approach`

    def converge(self, coefficients: Coefficients) -> None:
        """Set them to those of the mixture that the model is set to, as they are in a file of it."""
        chosen = self._layers if len(coefficients.selected) > 1 else ()
        eps = max((torch.finfo(self._state[layer.v].dtype).eps for layer in chosen), default=0.0)
        for layer, *pair in singular_vectors(chosen, self._checkpoints, coefficients, self._weight, eps):
            self._store(layer, *pair)

    def converge_at_mean(self) -> None:
        """Set them to those of the mean of all candidates, from which `approach` starts then."""
        n, last = len(self._checkpoints), self._checkpoints[-1]
        self.converge(Coefficients.uniform(range(n), n))
        pairs = [(layer, self._state[layer.v].detach().clone()) for layer in self._layers]
        self._start = [(layer, v) for layer, v in pairs if not v.cpu().equal(whole(last, layer.v).to(v.dtype))]
        self.need_mean = False

    def approach(self) -> None:
        """Set them by a few power iterations: a function of the weights alone, so that a resumed run repeats it."""
        for layer, v in self._start:
            self._store(layer, *refined(as_matrix(self._weight(layer.weight), layer.dim), v, _ITERATIONS))

    def _store(self, layer: SpectralNorm, u: Tensor, v: Tensor) -> None:
        for name, values in ((layer.u, u), (layer.v, v)):
            storage(self._state[name]).copy_(values)

    def _weight(self, name: str) -> Tensor:
        weight = self._state[name].detach()
        return weight.full_tensor() if hasattr(weight, "full_tensor") else weight  # sharded by --shard
