"""Teach a small BERT to tell spam from ham: LoRA by PEFT and transformers' Trainer, which saves 8 checkpoints."""

import json
import random
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    BertTokenizerFast,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

WORDS = {
    "ham": ["lunch", "meeting", "report", "tomorrow", "thanks", "see", "agenda", "notes", "draft", "train", "home"],
    "spam": ["win", "free", "prize", "click", "cash", "offer", "now", "winner", "bonus", "urgent", "loan"],
}
COMMON = ["the", "a", "and", "to", "of", "for", "on", "with", "is", "this", "please", "your", "we", "it"]


def texts(count: int, seed: int) -> list[dict[str, str]]:
    """Generate texts with more words of one kind than of the other; one label in ten is wrong."""
    draw, rows = random.Random(seed), []
    for _ in range(count):
        label, other = draw.sample(("ham", "spam"), 2)
        words = draw.choices(WORDS[label], k=4) + draw.choices(WORDS[other], k=2)
        words += draw.choices(COMMON, k=draw.randrange(4, 20))
        draw.shuffle(words)
        rows.append({"text": " ".join(words), "label": other if draw.random() < 0.1 else label})
    return rows


def save_base(folder: str) -> None:
    """Stand in for a download: a BERT with random weights, and its tokenizer."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *COMMON, *WORDS["ham"], *WORDS["spam"]]
    tokenizer = BertTokenizerFast(vocab={word: i for i, word in enumerate(words)})
    config = BertConfig(
        vocab_size=len(words), hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=64, initializer_range=0.1,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    torch.set_num_threads(1)  # a second thread does not help so small a model
    torch.manual_seed(0)
    save_base("base")
    tokenizer = BertTokenizerFast.from_pretrained("base")
    data = {
        split: texts(count, seed) for seed, (split, count) in enumerate({"train": 800, "val": 400, "test": 400}.items())
    }
    for split, rows in data.items():
        Path(f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    label2id = {"ham": 0, "spam": 1}
    encoded = {
        split: [
            {**tokenizer(row["text"], truncation=True, max_length=32), "labels": label2id[row["label"]]} for row in rows
        ]
        for split, rows in data.items()
    }
    model = AutoModelForSequenceClassification.from_pretrained("base", num_labels=2)
    model = get_peft_model(
        model, LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=["query", "value", "dense"])
    )
    arguments = TrainingArguments(
        "run", num_train_epochs=8, per_device_train_batch_size=32, per_device_eval_batch_size=100, learning_rate=3e-3,
        save_strategy="epoch", eval_strategy="epoch", report_to=[], disable_tqdm=True, use_cpu=True, seed=0,
    )  # fmt: skip
    Trainer(
        model, arguments, train_dataset=encoded["train"], eval_dataset=encoded["val"],
        processing_class=tokenizer, data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda found: {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())},
    ).train()  # fmt: skip


if __name__ == "__main__":
    main()
