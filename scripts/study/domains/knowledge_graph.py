"""Link prediction in knowledge graphs: the setting of ASWA's authors, trained by their framework dicee.

Shape suffixes: B = triples, 2 = the queries of a triple (head, relation) → tail and (tail, inverse) → head,
E = entities, W = width.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, TypeAlias

import torch
from torch import Tensor, nn

from study.data import fetched
from study.job import SCRIPTS, Batches, Domain, Job, Training

MODELS: Final = {"distmult": "DistMult", "complex": "ComplEx", "keci": "Keci"}
GRAPHS: Final = {"umls": ("UMLS", "umls"), "kinship": ("Kinship", "kinships")}
WIDTH, EPOCHS, SAMPLE, BATCH = 128, 300, 1024, 128
MALLOC: Final = {"MALLOC_MMAP_THRESHOLD_": "1000000000", "MALLOC_TRIM_THRESHOLD_": "1000000000"}
"""glibc keeps freed memory: mapping each tensor of half a megabyte anew takes half the time of these trainings."""

Triple: TypeAlias = tuple[str, str, str]


class Bilinear(nn.Module):
    """DistMult, ComplEx, or Keci over the Clifford algebra with p = 0 and q = 1, with the state dict of dicee's.

    Score of a triple, of vectors split into halves (real, imaginary): DistMult Σ h r t; ComplEx Re Σ h r conj(t); Keci
    is ComplEx with the imaginary halves of h and r scaled by a learned coefficient.
    """

    def __init__(self, kind: str, entities: int, relations: int, width: int = WIDTH) -> None:
        super().__init__()
        self.kind = kind
        self.entity_embeddings = nn.Embedding(entities, width)
        self.relation_embeddings = nn.Embedding(relations, width)
        if kind == "Keci":
            self.q_coefficients = nn.Embedding(1, 1)
            nn.init.zeros_(self.q_coefficients.weight)

    def forward(self, heads_B: Tensor, relations_B: Tensor) -> Tensor:
        """Return the scores of all tails, [B, E]."""
        h_BW, r_BW = self.entity_embeddings(heads_B), self.relation_embeddings(relations_B)
        if self.kind == "DistMult":
            return h_BW * r_BW @ self.entity_embeddings.weight.T
        (h_re, h_im), (r_re, r_im) = h_BW.chunk(2, dim=-1), r_BW.chunk(2, dim=-1)
        if self.kind == "Keci":
            h_im, r_im = h_im * self.q_coefficients.weight, r_im * self.q_coefficients.weight
        product_BW = torch.cat([h_re * r_re - h_im * r_im, h_re * r_im + h_im * r_re], dim=-1)
        return product_BW @ self.entity_embeddings.weight.T


@dataclass(frozen=True, kw_only=True)
class Graph:
    """The triples of a knowledge graph by split, numbered as dicee numbers them: by name, inverse relations included.

    Attributes:
        entities: number of entities; relations likewise, inverse ones included.
        queries: split → heads [B, 2], relations [B, 2] and tails [B, 2].
    """

    entities: int
    relations: int
    queries: Mapping[str, tuple[Tensor, Tensor, Tensor]]

    @classmethod
    def read(cls, folder: Path) -> Graph:
        """Read train.txt, valid.txt and test.txt."""
        splits = {name: read_triples(folder / f"{name}.txt") for name in ("train", "valid", "test")}
        everything = [triple for triples in splits.values() for triple in triples]
        entities = _numbered({name for head, _, tail in everything for name in (head, tail)})
        relations = _numbered({name for _, r, _ in everything for name in (r, _inverse(r))})
        queries: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        for split, triples in splits.items():
            heads_B = torch.tensor([entities[head] for head, _, _ in triples])
            tails_B = torch.tensor([entities[tail] for _, _, tail in triples])
            relations_B2 = torch.tensor([[relations[r], relations[_inverse(r)]] for _, r, _ in triples])
            ends_B2 = torch.stack([heads_B, tails_B], dim=1)
            queries[split] = ends_B2, relations_B2, ends_B2.flip(1)
        return cls(entities=len(entities), relations=len(relations), queries=queries)

    def known(self, split: str, others: Sequence[str]) -> Tensor:
        """Return which tails but its own each query of a split has in others, [B, 2, E]: a filtered rank skips them."""
        true_HRE = torch.zeros(self.entities, self.relations, self.entities, dtype=torch.bool)
        for other in others:
            true_HRE[self.queries[other]] = True
        heads_B2, relations_B2, tails_B2 = self.queries[split]
        return true_HRE[heads_B2, relations_B2].scatter(2, tails_B2[..., None], value=False)


def read_triples(path: Path) -> list[Triple]:
    """Return the (head, relation, tail) of each line.

    Raises:
        ValueError: if a line has other than three words, or the file none or text that is not UTF-8.
    """
    found: list[Triple] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8: {error}") from error
    for number, line in enumerate(lines, 1):
        words = line.split()
        if len(words) != 3:
            raise ValueError(f"{path}:{number}: has {len(words)} words, not a head, a relation and a tail")
        found.append((words[0], words[1], words[2]))
    if not found:
        raise ValueError(f"{path}: has no triples")
    return found


def _inverse(relation: str) -> str:
    return f"{relation}_inverse"


def _numbered(names: set[str]) -> dict[str, int]:
    return {name: index for index, name in enumerate(sorted(names))}


def scores(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    """Return the filtered scores, [B, 2, E]."""
    heads_B2, relations_B2, _, known_B2E = batch
    scores_BE = model(heads_B2.flatten(), relations_B2.flatten())
    return scores_BE.view(known_B2E.shape).masked_fill(known_B2E, float("-inf"))


def loss(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    """Return the cross-entropy of each triple among the entities that are not known to be true, over both queries."""
    scores_B2E = scores(model, batch)
    return nn.functional.cross_entropy(scores_B2E.transpose(1, 2), batch[2], reduction="none").mean(dim=1)


def ranks(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    """Return the filtered ranks of the true entities, [B, 2], 1 for the best."""
    scores_B2E = scores(model, batch)
    return 1 + (scores_B2E > scores_B2E.gather(2, batch[2][..., None])).sum(dim=2)


def reciprocal_rank(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    """Return the filtered reciprocal rank of each triple, the mean of its two queries."""
    return (1.0 / ranks(model, batch)).mean(dim=1)


def figures(test: Sequence[Tensor], model: nn.Module) -> dict[str, float]:
    """Return MRR and Hits@1, 3 and 10 on test triples, filtered, over both queries."""
    device = next(model.parameters()).device
    with torch.no_grad():
        ranks_B2 = ranks(model, [tensor.to(device) for tensor in test]).double()
    hits = {f"Hits@{k}": float((ranks_B2 <= k).double().mean()) for k in (1, 3, 10)}
    return {"test MRR": float((1.0 / ranks_B2).mean()), **hits}


def run(model: str, folder: Path, training: Training) -> dict[str, Path]:
    """Train by dicee, and return the averages that it makes: ASWA's beside the training, SWA's by one of its own."""
    python = fetched("dicee-venv") / "bin" / "python"
    aswa, swa = (training.folder.parent / f"dicee-{name}.pt" for name in ("aswa", "swa"))
    command = [python, SCRIPTS / "study" / "dicee_train.py", folder, f"--model={model}", f"--epochs={training.steps}"]
    command += [f"--seed={training.seed}", f"--schedule={training.schedule}", f"--into={training.folder}"]
    command += [f"--aswa={aswa}", *([f"--swa={swa}"] if training.schedule == "constant" else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | MALLOC)
    if done.returncode:
        raise ValueError(f"{folder}: dicee fails to train {model}: {done.stderr.strip().splitlines()[-1:]}")
    return {"dicee's ASWA": aswa} | ({"dicee's SWA": swa} if training.schedule == "constant" else {})


def job_of(model: str, folder: Path, seed: int) -> Job:
    """Return the job of a model on the graph in a folder."""
    graph = Graph.read(folder)
    # the filter of validation does not show which answers are test triples: a loss that spares them learns them
    filters = {"train": ("train",), "valid": ("train", "valid"), "test": ("train", "valid", "test")}
    parts = {split: (*graph.queries[split], graph.known(split, splits)) for split, splits in filters.items()}
    count = len(parts["train"][0])
    seen = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:SAMPLE]
    return Job(
        model=partial(Bilinear, model, graph.entities, graph.relations),
        loss=loss,
        metric=reciprocal_rank,
        forward=lambda model, batch: model(batch[0].flatten(), batch[1].flatten()),
        train=Batches(*parts["train"], size=count),  # a step of these trainings is an epoch
        val=Batches(*parts["valid"], size=BATCH),
        test=Batches(*parts["test"], size=BATCH),
        sample=Batches(*(tensor[seen] for tensor in parts["train"]), size=BATCH, shuffle=True),
        optimizer=lambda model: torch.optim.Adam(model.parameters(), lr=0.1),
        figure=partial(figures, parts["test"]),
        run=partial(run, model, folder),
    )


def _job(model: str, graph: str, seed: int, _: Path | None) -> Job:
    fetched("dicee-venv")
    return job_of(model, fetched("pykeen") / graph, seed)


def _domain(graph: str, model: str) -> Domain:
    title, folder = GRAPHS[graph]
    return Domain(
        title=f"{title}, {MODELS[model]}",
        area="Knowledge graphs",
        about=(
            f"Trained by dicee, the framework of ASWA's authors, with their settings: width {WIDTH}, {EPOCHS} epochs "
            "of Adam at a rate of 0.1, a checkpoint an epoch, all of them candidates. dicee minimizes a binary "
            "cross-entropy; strategies see the cross-entropy of the true entity among those not known to be true, "
            "since a rank, too, compares the scores of one query. Their metric is the reciprocal rank. Both are "
            "filtered by the triples of training and validation; the filter of dicee's ASWA, a by-product of the same "
            "training, knows those of test too, as is usual. dicee's SWA changes the learning rate and is a training "
            "of its own, made for the constant schedule, and its seconds are in those of the training. (That a clearly "
            "better metric overrules the loss was made a rule after a first training of Keci on Kinship.)"
        ),
        figure="test MRR, %",
        scale=100,
        every=1,
        job=partial(_job, MODELS[model], folder),
        sizes={
            "checkpoints": EPOCHS,
            "last": EPOCHS,
            "k": 5,
            "ks": (),
            "exhaustive": False,
            "variants": False,
            "with_early": False,
            "random": 5,
        },
    )


DOMAIN: Final = {f"{graph}-{model}": _domain(graph, model) for graph in GRAPHS for model in MODELS}
