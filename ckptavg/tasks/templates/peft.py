"""Task file for ckptavg: a PEFT adapter on its base model. Fill in the lines marked EDIT.

Text classifiers and language models need no task file, unless the loss or metric is your own:
ckptavg sewa ./run --k 5 --val val.jsonl -o averaged/
"""

import json
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

BASE = "./base"  # EDIT: the base model, a directory or a name on the hub
CHECKPOINT = "./run/checkpoint-300"  # EDIT: any checkpoint; its adapter_config.json is read, its weights are replaced
MAX_LENGTH = 512  # EDIT: tokens of a text, as in training


def model() -> nn.Module:
    """Return the base model with an adapter, whose values do not matter, since they are replaced."""
    base = AutoModelForCausalLM.from_pretrained(BASE)  # EDIT: its class; a new classifier needs num_labels too
    return PeftModel.from_pretrained(base, CHECKPOINT)


def forward(model: nn.Module, batch):
    """Run the model once for `loss`, and for `metric(output, batch)` if there is one."""
    return model(**batch)


def loss(output, batch) -> torch.Tensor:
    """Return the mean of −ln p over each text's tokens. `output.loss`, one mean, fits every kind of model."""
    logits, labels = output.logits[:, :-1], batch["labels"][:, 1:]
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")  # 0 where a label is −100
    return losses.sum(dim=1) / (labels != -100).sum(dim=1)


def val_dataloader() -> DataLoader:
    """Data to optimize coefficients on and to compute every score with."""
    return _loader("val.jsonl")  # EDIT


def test_dataloader() -> DataLoader:
    """Optional: data used for no choice, for an unbiased final score. Delete it if there are none."""
    return _loader("test.jsonl")  # EDIT


def _loader(path: str) -> DataLoader:
    """Return batches of a file with lines such as {"text": "…"}; padding has the label −100."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    texts = [json.loads(line)["text"] for line in Path(path).read_text(encoding="utf-8").splitlines()]

    def collate(texts: list[str]) -> dict[str, torch.Tensor]:
        batch = tokenizer(texts, truncation=True, max_length=MAX_LENGTH, padding=True, return_tensors="pt")
        return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}

    return DataLoader(texts, batch_size=32, collate_fn=collate)
