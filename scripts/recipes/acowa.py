"""ACOWA: two rounds of sparse logistic regressions on shards, combined by OWA.

torchrun --nproc-per-node 2 scripts/recipes/acowa.py --out build/acowa

1. Each shard's worker sends the mean of its points of either class. All add these 2P centroids to their points, with
   weight 0.1·count, and fit w = argmin (1/l)·Σ_i s_i·log(1 + exp(−y_i·w·x_i)) + λ·Σ_j |w_j|; l points in the shard.
2. Each sends the support of its w. v_j = 1 + 10·(share of the P models with w_j ≠ 0); all fit again with the penalty
   λ₂·Σ_j |w_j|/v_j, where λ₂ = λ·D/Σ_j(1/v_j), so that the mean penalty is λ still.
3. OWA averages the models: `ckptavg twa --constraint linear --ridge auto` on a sample of the training points.
`--rule owa` fits once, without centroids. The ranks share the shards; the result does not depend on their number.

Shape suffixes: B = points, D = features, P = shards.

References:
    OWA: Izbicki and Shelton, ECML-PKDD 2019. ACOWA: Lu, Curtin, Raff, Ferraro and Holt 2024, arXiv:2406.01753.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from scipy import sparse
from sklearn.datasets import load_digits, load_svmlight_file
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import PolynomialFeatures
from torch import Tensor, nn

import ckptavg

T = TypeVar("T")
CENTROID: Final = 0.1  # weight of a centroid, for each point it stands for
TRUST: Final = 10.0  # v_j lies between 1 and 1 + TRUST
TRAIN, SAMPLE = 0.8, 0.1  # share of the points to train on, and of these for the last step


class Points(NamedTuple):
    """Sparse features [B, D], labels ±1 and weights [B]."""

    x_BD: Any
    y_B: Any
    s_B: Any

    def at(self, rows: Any) -> Points:
        """Return some of the points."""
        return Points(self.x_BD[rows], self.y_B[rows], self.s_B[rows])

    def batch(self) -> list[Tensor]:
        """Return dense features and labels 0 or 1."""
        return [torch.from_numpy(self.x_BD.toarray()), torch.from_numpy(self.y_B > 0).double()]

    def with_(self, others: Sequence[Points]) -> Points:
        """Return these points and the others."""
        x, y, s = zip(self, *others, strict=True)
        return Points(sparse.vstack(x).tocsr(), np.concatenate(y), np.concatenate(s))


def centroids(points: Points) -> Points:
    """Return the mean of either class that occurs, with weight 0.1·count."""
    y, counts = np.unique(points.y_B, return_counts=True)
    means = [np.asarray(points.x_BD[points.y_B == label].mean(axis=0)) for label in y]
    return Points(sparse.csr_matrix(np.vstack(means)), y, CENTROID * counts)


def fit(points: Points, count: int, penalty: float, v_D: Any = None) -> Any:
    """Return argmin_w (1/count)·Σ_i s_i·log(1 + exp(−y_i·w·x_i)) + penalty·Σ_j |w_j|/v_j [D], without a bias.

    LIBLINEAR has one penalty for all weights: it fits u = w/v to the features v∘x, and w = v∘u is that of x.
    """
    x_BD = points.x_BD if v_D is None else points.x_BD.multiply(v_D).tocsr()
    settings = {"solver": "liblinear", "fit_intercept": False, "tol": 1e-3, "max_iter": 1000, "random_state": 0}
    model = LogisticRegression(l1_ratio=1, C=1 / (count * penalty), **settings)
    u_D = model.fit(x_BD, points.y_B, sample_weight=points.s_B).coef_[0]
    return u_D if v_D is None else v_D * u_D


def on_all(shards: Sequence[Points], work: Callable[[Points], T]) -> list[T]:
    """Return ``work`` of each shard; every rank does its part and receives the rest."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    own = [work(shard) for shard in shards[rank::ranks]]
    if ranks == 1:
        return own
    results: list[Any] = [None] * ranks
    dist.all_gather_object(results, own)
    return [results[i % ranks][i // ranks] for i in range(len(shards))]


def owa(shards: Sequence[Points], penalty: float) -> Any:
    """Return the model of each shard alone [P, D]."""
    return np.stack(on_all(shards, lambda shard: fit(shard, len(shard.y_B), penalty)))


def acowa(shards: Sequence[Points], penalty: float) -> Any:
    """Return the models of the second round [P, D]."""
    centres = on_all(shards, centroids)

    def refit(shard: Points, penalty: float, v_D: Any = None) -> Any:
        return fit(shard.with_(centres), len(shard.y_B), penalty, v_D)

    support_PD = np.stack(on_all(shards, lambda shard: refit(shard, penalty) != 0))
    v_D = 1 + TRUST * support_PD.mean(axis=0)
    scaled = penalty * len(v_D) / np.sum(1 / v_D)
    return np.stack(on_all(shards, lambda shard: refit(shard, scaled, v_D)))


def loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
    features, labels = batch
    return nn.functional.binary_cross_entropy_with_logits(model(features).squeeze(-1), labels, reduction="none")


def accuracy(model: nn.Module, batch: list[Tensor]) -> Tensor:
    features, labels = batch
    return ((model(features).squeeze(-1) > 0) == labels.bool()).float()


def combine(models_PD: Any, sample: Points, test: Points, out: Path) -> ckptavg.Result:
    """Write the models as checkpoints, and their average with the coefficients that fit the sample best."""
    (out / "shards").mkdir(parents=True, exist_ok=True)
    files = [out / "shards" / f"step-{shard}.safetensors" for shard in range(1, len(models_PD) + 1)]
    for file, w_D in zip(files, models_PD, strict=True):
        save_file({"weight": torch.from_numpy(w_D[None]).contiguous()}, file)
    model = partial(nn.Linear, models_PD.shape[1], 1, bias=False, dtype=torch.float64)
    task = {"model": model, "loss": loss, "metric": accuracy, "val": [sample.batch()], "test": [test.batch()]}
    output = {"output": out / "averaged.safetensors", "force": True}
    return ckptavg.twa(files, constraint="linear", ridge="auto", **task, **output)


def read(path: Path | None) -> Points:
    """Read a file in svmlight's format with two labels; without one, the digits: is it odd, by products of pixels?"""
    if path is None:
        pixels, labels = load_digits(return_X_y=True)
        x_BD, y_B = sparse.csr_matrix(PolynomialFeatures(2, include_bias=False).fit_transform(pixels / 16)), labels % 2
    else:
        x_BD, y_B = load_svmlight_file(path)
    return Points(x_BD, np.where(y_B == y_B.max(), 1, -1), np.ones(len(y_B)))


def split(count: int, shards: int, seed: int) -> tuple[list[Any], Any, Any]:
    """Return which of ``count`` points are in each shard, in the sample of the training points, and in the test."""
    random = np.random.default_rng(seed)
    train, test = np.split(random.permutation(count), [int(TRAIN * count)])
    return np.array_split(train, shards), random.permutation(train)[: int(SAMPLE * len(train))], test


def main() -> None:
    parser = argparse.ArgumentParser(description="Fit sparse logistic regressions to shards and combine them.")
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--data", type=Path, help="file in svmlight's format (default: digits, odd or even)")
    parser.add_argument("--rule", choices=["acowa", "owa"], default="acowa", help="two rounds, or one")
    parser.add_argument("--shards", type=int, default=16, help="P (default: 16)")
    parser.add_argument("--penalty", type=float, default=1e-3, help="λ (default: 0.001)")
    parser.add_argument("--seed", type=int, default=0, help="of the split into shards, sample and test points")
    options = parser.parse_args()
    if options.shards < 1 or options.penalty <= 0:
        parser.error("--shards must be at least 1, and --penalty greater than 0")
    if options.data is not None and not options.data.is_file():
        parser.error(f"--data {options.data}: no such file")
    points = read(options.data)
    shards, sample, test = split(len(points.y_B), options.shards, options.seed)
    parts = [points.at(rows) for rows in shards]
    if lacking := sum(len(np.unique(part.y_B)) < 2 for part in parts):
        parser.error(f"--shards {options.shards}: {lacking} would have points of one class only; choose fewer")
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    models_PD = {"acowa": acowa, "owa": owa}[options.rule](parts, options.penalty)
    if "RANK" not in os.environ or dist.get_rank() == 0:
        print(combine(models_PD, points.at(sample), points.at(test), options.out))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
