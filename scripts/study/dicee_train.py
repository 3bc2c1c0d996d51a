"""Train a knowledge-graph model by dicee, the framework of ASWA's authors, or evaluate state dicts by its evaluator.

Runs in build/data/dicee-venv, a Python with dicee's own pins, and imports nothing of the study's.
"""

# pyright: reportMissingImports=false, reportUntypedBaseClass=false, reportUnknownParameterType=false

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

os.environ["TQDM_DISABLE"] = "1"  # dicee redraws a progress bar at every step
import tiktoken
import torch

# dicee asks the network for GPT-2's tokenizer, which none of its models here reads
tiktoken.get_encoding = lambda _: SimpleNamespace(n_vocab=0, encode=lambda _: [0])

from dicee import executer  # noqa: E402
from dicee.abstracts import AbstractCallback  # noqa: E402
from dicee.config import Namespace  # noqa: E402
from dicee.dataset_classes import KvsAll, _factory  # noqa: E402
from dicee.evaluation import Evaluator  # noqa: E402
from dicee.static_funcs import select_model  # noqa: E402
from dicee.trainer import dice_trainer  # noqa: E402

RATE = 0.1


class Dense(KvsAll):
    """dicee's queries with their labels as one matrix, cut into the same batches without a Python call per query."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.collate_fn = lambda batch: batch
        self._labels = torch.stack([KvsAll.__getitem__(self, index)[1] for index in range(len(self))])

    def __getitems__(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return self.train_data[indices], self._labels[indices]


class Fast(Evaluator):
    """dicee's evaluator without its loop over triples and its three pickles a call: the same ranks but for ties."""

    def vocab_preparation(self, dataset: Any) -> None:
        """Prepare the vocabularies once."""
        if self.er_vocab is None:
            super().vocab_preparation(dataset)

    def evaluate_lp_k_vs_all(self, model: Any, triple_idx: Any, *_: Any, **__: Any) -> dict[str, float]:
        """Return the filtered MRR of queries (head, relation) → tail."""
        if not hasattr(self, "_known"):
            self._triples = torch.from_numpy(triple_idx.astype(np.int64))
            self._known = torch.zeros(len(triple_idx), self.num_entities, dtype=torch.bool)
            for row, (head, relation, _) in zip(self._known, triple_idx, strict=True):
                row[self.er_vocab[head, relation]] = True
        with torch.no_grad():
            scores = model.eval()(self._triples[:, :2])
        true = scores.gather(1, self._triples[:, 2:])
        ranks = 1 + ((scores > true) & ~self._known).sum(dim=1)
        return {"MRR": float(np.mean(1.0 / ranks.numpy()))}


class Snapshots(AbstractCallback):
    """Write a state dict an epoch, and decay the learning rate to 0 along a cosine if asked to."""

    def __init__(self, folder: Path, epochs: int, schedule: str) -> None:
        super().__init__()
        self.folder, self.epochs, self.schedule, self.epoch = folder, epochs, schedule, 0

    def on_train_epoch_start(self, trainer: Any, model: Any) -> None:
        """Set the learning rate of the epoch."""
        if self.schedule == "cosine":
            for group in trainer.optimizer.param_groups:
                group["lr"] = RATE * (1 + math.cos(math.pi * self.epoch / self.epochs)) / 2

    def on_train_epoch_end(self, trainer: Any, model: Any) -> None:
        """Write the state dict."""
        self.epoch += 1
        saved = {"state_dict": model.state_dict(), "global_step": self.epoch}
        torch.save(saved, self.folder / f"step-{self.epoch}.pt")


class Run(executer.Execute):
    """A training of dicee's without the evaluation and the files at its end."""

    def end(self, form_of_labelling: str) -> dict[str, Any]:
        """Leave the trained model where it is."""
        return {}


def settings(options: argparse.Namespace, storage: str, **averaging: bool) -> Namespace:
    """Return the settings of ASWA's authors."""
    args = Namespace()
    # dicee takes a file for the split that its path names first, and a folder above may be called "training"
    os.chdir(options.data)
    args.dataset_dir, args.path_to_store_single_run = ".", storage
    args.model, args.embedding_dim, args.num_epochs, args.random_seed = options.model, 128, options.epochs, options.seed
    args.batch_size, args.lr, args.optim, args.scoring_technique = 1024, RATE, "Adam", "KvsAll"
    args.p, args.q = 0, 1
    for name, value in averaging.items():
        setattr(args, name, value)
    return args


def train(options: argparse.Namespace, extra: list[AbstractCallback], storage: str, **averaging: bool) -> Any:
    """Train a model and return it."""
    given = dice_trainer.get_callbacks
    if options.fast:
        executer.Evaluator = Fast
        _factory.KvsAll = Dense
    dice_trainer.get_callbacks = lambda args: [*given(args), *extra]
    try:
        run = Run(settings(options, storage, **averaging))
        run.start()
    finally:
        dice_trainer.get_callbacks = given
    return run.trained_model


def evaluate(options: argparse.Namespace, storage: str) -> dict[str, dict[str, float]]:
    """Return file → test figures of a state dict by dicee's own evaluator."""
    run = Run(settings(options, storage))
    run.start_time = 0.0
    run.create_and_store_kg()
    run.args.eval_model = "test"
    model, labelling = select_model(vars(run.args), False, storage)
    found = {}
    for file in options.evaluate:
        model.load_state_dict(torch.load(file))
        found[str(file)] = Evaluator(run.args).eval(run.knowledge_graph, model, labelling)["Test"]
    return found


def absolute(path: str) -> Path:
    """Return a path that remains valid in another working directory."""
    return Path(path).resolve()


def main() -> None:
    """Train, or print the figures of state dicts as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=absolute, help="folder of train.txt, valid.txt and test.txt")
    parser.add_argument("--model", required=True)
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--schedule", choices=("constant", "cosine"), default="constant")
    parser.add_argument("--into", type=absolute, help="folder for a state dict an epoch")
    parser.add_argument("--aswa", type=absolute, help="file for the state dict of dicee's ASWA")
    parser.add_argument("--swa", type=absolute, help="file for the state dict of dicee's SWA, a training of its own")
    parser.add_argument("--slow", dest="fast", action="store_false", help="decide ASWA by dicee's own evaluator")
    parser.add_argument(
        "--evaluate", type=absolute, nargs="*", default=[], help="state dicts to evaluate; trains nothing"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dicee-") as storage:
        if options.evaluate:
            print(json.dumps(evaluate(options, storage)))
            return
        options.into.mkdir(parents=True, exist_ok=True)
        snapshots = Snapshots(options.into, options.epochs, options.schedule)
        torch.save(train(options, [snapshots], storage, adaptive_swa=True).state_dict(), options.aswa)
    if options.swa:
        with tempfile.TemporaryDirectory(prefix="dicee-") as storage:
            torch.save(train(options, [], storage, swa=True).state_dict(), options.swa)


if __name__ == "__main__":
    main()
