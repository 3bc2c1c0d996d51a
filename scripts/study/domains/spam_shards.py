"""Sharded linear models: a logistic regression with an L1 penalty for each shard of SpamAssassin's mails.

Shape suffixes: B = mails, D = features, P = shards.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from study.domains.mails import mails
from study.job import Batches, Domain, Job, Training

PENALTIES: Final = {"λ=1e-3": 1e-3, "λ=1e-4": 1e-4}
TRAIN, VAL = 0.8, 0.1  # the share of the mails that is trained on, and that of those which strategies learn from
PEER: Final = "full L1"


class Fitted(NamedTuple):
    """Features that any model uses, of the mails of each part, and the models.

    Attributes:
        parts: name → features [B, D] and labels [B], 1 for spam.
        full: strength of the penalty → model [1, D] of all training mails.
        shards: strength of the penalty → models [P, 1, D] of the shards.
    """

    parts: Mapping[str, tuple[Tensor, Tensor]]
    full: Mapping[str, Tensor]
    shards: Mapping[str, Tensor]


@lru_cache(maxsize=1)
def fitted(seed: int, shards: int) -> Fitted:
    """Fit all models of a seed: they are needed to leave out the features, nine in ten, that no model uses."""
    known = mails()
    labels = np.array([group.startswith("spam") for group, _ in known], dtype=int)
    order = np.random.default_rng(seed).permutation(len(known))
    cut = int(TRAIN * len(order))
    terms = TfidfVectorizer(min_df=2)
    train: Any = terms.fit_transform([known[i][1] for i in order[:cut]])
    test: Any = terms.transform([known[i][1] for i in order[cut:]])
    groups = [np.arange(cut), *np.array_split(np.arange(cut), shards)]
    fits = {
        name: np.stack([_l1(train[group], labels[order[group]], strength) for group in groups])
        for name, strength in PENALTIES.items()
    }
    used = np.flatnonzero(np.any([(fit != 0).any(axis=0) for fit in fits.values()], axis=0))
    models = {name: torch.from_numpy(fit[:, None, used]).float() for name, fit in fits.items()}
    train, test = (torch.from_numpy(part[:, used].toarray()).float() for part in (train, test))
    spam = torch.from_numpy(labels[order])
    some = torch.from_numpy(np.random.default_rng([seed, 1]).permutation(cut)[: int(VAL * cut)])
    return Fitted(
        parts={"train": (train, spam[:cut]), "val": (train[some], spam[:cut][some]), "test": (test, spam[cut:])},
        full={name: model[0] for name, model in models.items()},
        shards={name: model[1:] for name, model in models.items()},
    )


def _l1(features: Any, labels: Any, strength: float) -> Any:
    """Return the weights [D] that minimise the mean loss + ``strength``·‖w‖₁, without a bias."""
    fit = LogisticRegression(
        l1_ratio=1,
        C=1 / (features.shape[0] * strength),
        solver="liblinear",
        fit_intercept=False,
        tol=1e-3,
        max_iter=20,
        random_state=0,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return fit.fit(features, labels).coef_[0]


def write(shards: int, training: Training) -> Mapping[str, Path]:
    """Write the model of each shard as a checkpoint, and return that of all mails."""
    found = fitted(training.seed, shards)
    training.folder.mkdir(parents=True)
    for step, weight in enumerate(found.shards[training.schedule], 1):
        state = {"state_dict": {"weight": weight.clone()}, "global_step": step}
        torch.save(state, training.folder / f"step-{step}.pt")
    full = training.folder.parent / "full.pt"
    torch.save({"weight": found.full[training.schedule].clone()}, full)
    return {PEER: full}


def loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
    features, labels = batch
    logits = model(features).squeeze(-1)
    return nn.functional.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none")


def accuracy(model: nn.Module, batch: list[Tensor]) -> Tensor:
    features, labels = batch
    return ((model(features).squeeze(-1) > 0) == labels.bool()).float()


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Return an optimizer that nothing uses: LIBLINEAR fits the models."""
    return torch.optim.SGD(model.parameters(), lr=1.0)


def figure(test: Batches, model: nn.Module) -> dict[str, float]:
    """Return the share of test mails that are classified correctly, and the number of nonzero weights."""
    (weight,) = model.parameters()
    with torch.no_grad():
        right = torch.cat([accuracy(model, [each.to(weight.device) for each in batch]) for batch in test])
    return {"test accuracy": float(right.mean()), "nonzeros": float((weight != 0).sum())}


def job(shards: int, seed: int, _: Path | None) -> Job:
    parts = fitted(seed, shards).parts
    features = parts["train"][0].shape[1]
    val, test = (Batches(*parts[name], size=250) for name in ("val", "test"))
    return Job(
        model=partial(nn.Linear, features, 1, bias=False),
        loss=loss,
        metric=accuracy,
        train=Batches(*parts["train"], size=100, shuffle=True),
        val=val,
        test=test,
        optimizer=optimizer,
        figure=partial(figure, test),
        run=partial(write, shards),
    )


def _domain(shards: int) -> Domain:
    return Domain(
        title=f"Spam: L1 logistic regressions of {shards} shards",
        area="Sharded linear models",
        about=(
            f"SpamAssassin's 6,046 mails without headers, tf-idf; the 80 % to train on are cut into {shards} shards. "
            "The candidates are a logistic regression of each shard, with an L1 penalty of strength λ. They are in no "
            "order, so `last`, LAWA, EMA, WSM and blend mean nothing here. Strategies learn from a tenth of the "
            f"training mails; `{PEER}` is one fit to all of them."
        ),
        figure="test accuracy, %",
        scale=100,
        every=1,
        job=partial(job, shards),
        ordered=False,
        schedules=tuple(PENALTIES),
        sizes={
            "checkpoints": shards,
            "last": shards,
            "k": 8,
            "ks": (),
            "random": 10,
            "exhaustive": False,
            "variants": False,
            "with_early": False,
            "more": {"OWA": "twa:constraint=linear"},
        },
    )


DOMAIN: Final = {f"spam-{shards}": _domain(shards) for shards in (16, 64)}
