"""Tensors that are functions of others, recognised by name, shape and dtype: an average is the wrong value of them."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ckptavg.readers import FLOATING, StoredTensor

Tensors = Mapping[str, StoredTensor]

SPECTRAL_NORM: Final = "spectral_norm"
# kind → the reason, for the user; tensors of the kinds of `Derived.kept` are those of the last selected candidate
REASONS: Final = {
    "spectral_norm_other": "vectors of spectral norm that cannot be recomputed from a weight of the file: "
    "run the model in training mode for some batches before it is used",
    "queue": "a queue holds features of the last batches, of which a mean is none",
    "quantization": "a range and its zero point belong together: calibrate the average again",
    "observations": "the later statistics of observations include the earlier ones",
    "codebook": "code vectors are averaged as weights are, which is wrong for those that were replaced in between "
    "(--keep PATTERN copies them)",
}  # fmt: skip
# names that occur together in one module, the first two with one shape
_TOGETHER: Final = (
    ("observations", ("mean", "var", "count")),
    ("observations", ("running_mean", "running_var", "count")),  # rl_games
    ("observations", ("_mean", "_var", "_std", "count")),  # rsl_rl
    ("observations", ("running_mean", "running_variance", "current_count")),  # skrl
    ("codebook", ("embed", "embed_avg", "cluster_size")),  # lucidrains' vector-quantize, EnCodec
)


@dataclass(frozen=True, kw_only=True)
class SpectralNorm:
    """Names of a weight W and of the vectors of its spectral norm: a model divides W by σ = uᵀWv."""

    weight: str
    u: str
    v: str
    dim: int  # the dimension of W that has u's length; the others together have that of v


@dataclass(frozen=True, kw_only=True)
class Derived:
    """Tensors of a checkpoint that are functions of others.

    Attributes:
        spectral: the weights whose vectors are recomputed from the averaged weight.
        kept: kind → names of those that are copied from the last selected candidate.
        averaged: kind → names of those that are averaged, for want of anything better.
    """

    spectral: tuple[SpectralNorm, ...] = ()
    kept: Mapping[str, list[str]] = field(default_factory=dict[str, list[str]])
    averaged: Mapping[str, list[str]] = field(default_factory=dict[str, list[str]])

    @property
    def vectors(self) -> list[str]:
        """Names of the recomputed vectors, sorted."""
        return sorted({name for layer in self.spectral for name in (layer.u, layer.v)})

    @property
    def kinds(self) -> dict[str, list[str]]:
        """Kind → names of all that are not averaged."""
        return {**({SPECTRAL_NORM: self.vectors} if self.spectral else {}), **self.kept}

    @property
    def notes(self) -> dict[str, list[str]]:
        """One sentence for each kind that is not recomputed → its names."""
        named = {**self.kept, **self.averaged}
        more = {kind: f" and {len(names) - 1} more" if len(names) > 1 else "" for kind, names in named.items()}
        return {f"{names[0]}{more[kind]}: {REASONS[kind]}": names for kind, names in named.items()}


def find(tensors: Tensors, chosen: Callable[[str], bool], read: Callable[[str], NDArray[np.float64]]) -> Derived:
    """Find the tensors that are functions of others, apart from those that the user has ``chosen`` what to do with.

    Args:
        tensors: a state dict.
        chosen: whether an option names this tensor.
        read: reads one, of the last candidate: where two dimensions of a weight have u's length, that with the larger
            uᵀWv is taken. Both APIs of torch use the first, except for transposed convolutions and on request.
    """
    spectral: list[SpectralNorm] = []
    kept: dict[str, list[str]] = {}
    averaged: dict[str, list[str]] = {}
    for weight, u, v in _spectral_names(tensors):
        if chosen(u) or chosen(v):
            continue
        dims = _dims(tensors[weight], tensors[u], tensors[v]) if weight in tensors else []
        if len(dims) > 1:
            dims.sort(key=lambda dim: -_sigma(read(weight), read(u), read(v), dim))  # stable: of equal ones the first
        if dims:
            spectral.append(SpectralNorm(weight=weight, u=u, v=v, dim=dims[0]))
        else:
            kept.setdefault("spectral_norm_other", []).extend((u, v))
    for name in sorted(tensors):
        if tensors[name].dtype in FLOATING and not chosen(name) and (kind := _kind(name, tensors)):
            (averaged if kind == "codebook" else kept).setdefault(kind, []).append(name)
    return Derived(spectral=tuple(spectral), kept=kept, averaged=averaged)


def _spectral_names(tensors: Tensors) -> Iterator[tuple[str, str, str]]:
    """Yield the names of weight, u and v of both of torch's APIs, and of the class that many GANs copied before them.

    A spectral norm behind another parametrization has a weight that is in no file: it has the name "".
    """
    for u in sorted(tensors):
        v = f"{u[:-1]}v"
        if v not in tensors:
            continue
        if behind := re.fullmatch(r"(.*\bparametrizations\.[^.]+)\.(\d+)\._u", u):
            yield f"{behind[1]}.original" if behind[2] == "0" else "", u, v
        elif u.endswith("_u"):
            yield from ((weight, u, v) for weight in (f"{u[:-2]}_orig", f"{u[:-2]}_bar") if weight in tensors)


def _dims(weight: StoredTensor, u: StoredTensor, v: StoredTensor) -> list[int]:
    """Return the dimensions of the weight that may be u's."""
    if len(u.shape) != 1 or len(v.shape) != 1 or {weight.dtype, u.dtype, v.dtype} - set(FLOATING):
        return []
    sizes = (u.numel, v.numel)
    return [d for d, size in enumerate(weight.shape) if (size, prod(weight.shape) // max(1, size)) == sizes and size]


def _sigma(weight: NDArray[np.float64], u: NDArray[np.float64], v: NDArray[np.float64], dim: int) -> float:
    with np.errstate(all="ignore"):
        sigma = abs(float(u @ np.moveaxis(weight, dim, 0).reshape(len(u), len(v)) @ v))
    return sigma if sigma < float("inf") else 0.0  # NaN too


def _kind(name: str, tensors: Tensors) -> str | None:
    """Return the kind of a floating-point tensor by its name and those beside it, and by their shapes."""
    module, _, last = name.rpartition(".")
    shape = tensors[name].shape

    def beside(*names: str) -> list[StoredTensor]:
        paths = (f"{module}.{other}".removeprefix(".") for other in names)
        return [tensors[path] for path in paths if path in tensors]

    # MoCo's queue, ALBEF's image_queue and text_queue, each with a pointer that is an integer
    if last.endswith("queue") and len(shape) > 1:
        pointers = beside("queue_ptr", "ptr_queue", f"{last}_ptr", f"{last.removesuffix('queue')}ptr")
        return "queue" if any(p.numel == 1 and p.dtype not in FLOATING for p in pointers) else None
    # observers and fake-quantization modules of torch.ao
    if re.search(r"(^|\.)\w*(activation_post_process|fake_quant)\w*(\.|$)", module):
        return "quantization" if last in ("scale", "min_val", "max_val", "histogram") else None
    for kind, names in _TOGETHER:
        values = beside(*names)
        if last in names and len(values) == len(names) and values[0].shape == values[1].shape:
            return kind
    return None
