"""LoRA classifiers of a tiny random model on generated texts, trained and evaluated by transformers' own Trainer."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
import transformers
from gpt2 import quiet
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = {"ham": ["meet", "lunch", "report", "monday"], "spam": ["win", "free", "cash", "prize"]}
SHARED = ["the", "a", "now", "you", "please", "see", "for", "and"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LENGTH = 12  # tokens to which training truncates; the longest text has 28
CLASSES = ["spam", "ham"]  # not in alphabetical order


def rows(count: int, seed: int) -> list[dict[str, str]]:
    """Return texts whose first words are mostly of their class, and whose last are of the other one."""
    draws = random.Random(seed)
    made: list[dict[str, str]] = []
    for i in range(count):
        label = CLASSES[i % 2]
        other = CLASSES[1 - i % 2]
        head = [draws.choice(WORDS[label if draws.random() < 0.6 else other] + SHARED) for _ in range(10)]
        tail = [draws.choice(WORDS[other] + SHARED) for _ in range(draws.randrange(18))]
        made.append({"text": " ".join(head + tail), "label": label})
    return made


def write(path: Path, made: list[dict[str, Any]]) -> Path:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def tokenizer() -> Any:
    """Return a tokenizer of whole words that adds [CLS] and [SEP]."""
    words = [*SPECIAL, *SHARED, *WORDS["ham"], *WORDS["spam"]]
    whole = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    whole.pre_tokenizer = pre_tokenizers.Whitespace()
    whole.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=whole, mask_token="[MASK]", model_max_length=64, **names)


def save_base(folder: Path, architecture: str) -> Path:
    """Save a base model with random weights, and the tokenizer; return ``folder``."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 21}
    bert = {"intermediate_size": 32, "max_position_embeddings": 66, "initializer_range": 0.2, **sizes}
    configs = {
        "Bert": transformers.BertConfig(**bert, pad_token_id=0),
        "Roberta": transformers.RobertaConfig(**bert, pad_token_id=0),
        "DistilBert": transformers.DistilBertConfig(dim=32, hidden_dim=32, n_layers=2, n_heads=2, vocab_size=21),
        "Llama": transformers.LlamaConfig(intermediate_size=32, pad_token_id=None, **sizes),
        "GPT2": transformers.GPT2Config(vocab_size=21, n_embd=32, n_layer=2, n_head=2, n_positions=64),
    }
    config = next(config for name, config in configs.items() if architecture.startswith(name))
    getattr(transformers, architecture)(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def train(folder: Path, base: Path, *, auto: str, config: LoraConfig, data: list[Any], val: list[Any]) -> Path:
    """Train a LoRA adapter for three evaluations, each followed by a checkpoint; return the Trainer's directory."""
    torch.manual_seed(1)
    tokens = tokenizer()
    with quiet():
        model = getattr(transformers, auto).from_pretrained(base, num_labels=len(CLASSES))
        model.config.pad_token_id = tokens.pad_token_id
        model = get_peft_model(model, config)
        arguments = transformers.TrainingArguments(
            str(folder), num_train_epochs=3, per_device_train_batch_size=16, learning_rate=0.02, eval_strategy="epoch",
            save_strategy="epoch", report_to=[], disable_tqdm=True, use_cpu=True, logging_strategy="no", seed=0,
            save_total_limit=None,
        )  # fmt: skip

        def encoded(made: list[Any]) -> list[Any]:
            ids = [tokens(row["text"], truncation=True, max_length=LENGTH) for row in made]
            return [{**one, "labels": CLASSES.index(row["label"])} for one, row in zip(ids, made, strict=True)]

        trainer = transformers.Trainer(
            model, arguments, train_dataset=encoded(data), eval_dataset=encoded(val), processing_class=tokens,
            data_collator=transformers.DataCollatorWithPadding(tokens),
            compute_metrics=lambda seen: {"accuracy": float((seen[0].argmax(-1) == seen[1]).mean())},
        )  # fmt: skip
        trainer.train()
    return folder


def logged(folder: Path) -> list[dict[str, Any]]:
    """Return the evaluations that the Trainer logged, in order."""
    last = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    state = json.loads((last / "trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if "eval_accuracy" in entry]
