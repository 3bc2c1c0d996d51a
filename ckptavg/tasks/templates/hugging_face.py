"""Task file for ckptavg: a model that transformers' Trainer trained. Fill in the lines marked EDIT.

Classifiers of texts or images and language models need no task file, unless the loss or metric is your own:
ckptavg sewa ./run --k 5 --val val.jsonl -o averaged/
"""

import json
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

CHECKPOINT = "./run/checkpoint-300"  # EDIT: any checkpoint; its config.json and tokenizer are read, not its weights
MAX_LENGTH = 128  # EDIT: tokens of a text, as in training


def model() -> nn.Module:
    """Return the model that was trained; its values do not matter, since they are replaced."""
    return AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(CHECKPOINT))  # EDIT: its class


def forward(model: nn.Module, batch):
    """Run the model once for `loss` and `metric`, which get its result."""
    return model(**batch)


def loss(output, batch) -> torch.Tensor:
    """Return one loss per example. `output.loss`, a mean, fits every kind of model."""
    return nn.functional.cross_entropy(output.logits, batch["labels"], reduction="none")


def accuracy(output, batch) -> torch.Tensor:
    """Optional: the metric to report, one value per example."""
    return (output.logits.argmax(dim=-1) == batch["labels"]).float()


metric = accuracy  # its name is in the tables


def val_dataloader() -> DataLoader:
    """Data to optimize coefficients on and to compute every score with."""
    return _loader("val.jsonl")  # EDIT


def test_dataloader() -> DataLoader:
    """Optional: data used for no choice, for an unbiased final score. Delete it if there are none."""
    return _loader("test.jsonl")  # EDIT


def _loader(path: str) -> DataLoader:
    """Return batches of a file with lines such as {"text": "…", "label": 1}."""
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    examples = [
        {**tokenizer(row["text"], truncation=True, max_length=MAX_LENGTH), "labels": row["label"]} for row in rows
    ]
    return DataLoader(examples, batch_size=32, collate_fn=DataCollatorWithPadding(tokenizer))
