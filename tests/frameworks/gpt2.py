"""A small GPT-2 that transformers' own Trainer trains on the lines of a standard library module."""

from __future__ import annotations

import json
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, TrainerCallback

LINES = [line.strip() for line in Path(textwrap.__file__).read_text().splitlines() if len(line.strip()) > 20]


@contextmanager
def quiet() -> Iterator[None]:
    """Ignore the Trainer's warnings about pinned memory without a GPU and about its own deprecations."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def fresh_tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel()
    bpe.train_from_iterator(
        LINES, trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<eos>"], show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>")


def config() -> GPT2Config:
    return GPT2Config(vocab_size=300, n_positions=48, n_embd=32, n_layer=2, n_head=2, eos_token_id=1, pad_token_id=1)


def fit(
    folder: Path, model: Any, data: list[dict[str, Any]], collator: Any, tokenizer: Any, *,
    callbacks: Sequence[TrainerCallback] = (), evaluate: bool = False,
) -> None:  # fmt: skip
    """Train with the Trainer on 120 examples, and save six times."""
    with quiet():
        arguments = transformers.TrainingArguments(
            str(folder / "run"), num_train_epochs=2, per_device_train_batch_size=10, learning_rate=5e-3, save_steps=4,
            report_to=[], disable_tqdm=True, use_cpu=True, logging_strategy="no", save_total_limit=None, seed=0,
            eval_strategy="epoch" if evaluate else "no",
        )  # fmt: skip
        transformers.Trainer(
            model, arguments, train_dataset=data, eval_dataset=data[:20] if evaluate else None,
            processing_class=tokenizer, data_collator=collator, callbacks=[*callbacks],
        ).train()  # fmt: skip


def train(folder: Path, **more: Any) -> None:
    """Train a GPT-2 of 40 thousand parameters with tied embeddings, and write two files of lines."""
    tokenizer = fresh_tokenizer()
    torch.manual_seed(0)
    encoded = [tokenizer(line, truncation=True, max_length=48)["input_ids"] for line in LINES[:120]]
    collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
    fit(folder, GPT2LMHeadModel(config()), [{"input_ids": ids} for ids in encoded], collator, tokenizer, **more)
    for name, lines in (("val", LINES[120:160]), ("test", LINES[160:200])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))


def logits(model: Any, tokenizer: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(**tokenizer(LINES[0], return_tensors="pt")).logits


def steps(folder: Path) -> list[Path]:
    return sorted((folder / "run").glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
