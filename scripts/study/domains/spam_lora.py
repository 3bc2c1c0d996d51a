"""Fine-tuning of a pretrained language model: LoRA by PEFT and transformers' Trainer, in its own directories."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from ckptavg.tasks.hugging_face.library import offline
from study.data import fetched
from study.job import Batches, Domain, Job, Training

VAL, TEST = 500, 2000
BATCH: Final = 32
SAMPLE: Final = 500  # mails of the training that strategies see
HARD_HAM: Final = 1


@dataclass(frozen=True, kw_only=True)
class Size:
    """The part of the model that is trained.

    Attributes:
        length: tokens of a mail that are read.
        frozen: whether all blocks but the last are left as they are, so that their outputs need be computed only once.
        rate: learning rate.
    """

    length: int
    frozen: bool
    rate: float


class Mails:
    """Batches of some of the mails, whose tensors all splits and all trainings share."""

    def __init__(self, tensors: tuple[Tensor, ...], rows: Tensor, *, size: int, shuffle: bool = False) -> None:
        self._tensors = tensors
        self._rows = Batches(rows, size=size, shuffle=shuffle)
        self.dataset = self._rows.dataset

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[list[Tensor]]:
        for (rows,) in self._rows:
            yield [tensor[rows] for tensor in self._tensors]

    def examples(self) -> Iterator[list[Tensor]]:
        """Iterate over single mails, without copies."""
        (rows,) = self.dataset.tensors
        return ([tensor[row] for tensor in self._tensors] for row in rows.tolist())


def named(inputs: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Return the arguments of the model for tokens, or for the inputs of its last block."""
    return {"inputs_embeds" if inputs.is_floating_point() else "input_ids": inputs, "attention_mask": mask}


def loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
    inputs, mask, labels = batch
    return nn.functional.cross_entropy(model(**named(inputs, mask)).logits, labels, reduction="none")


def accuracy(model: nn.Module, batch: list[Tensor]) -> Tensor:
    """Return 1 for each correctly classified mail."""
    inputs, mask, labels = batch
    return (model(**named(inputs, mask)).logits.argmax(dim=-1) == labels).float()


@torch.inference_mode()
def figures(mails: Mails, model: nn.Module) -> dict[str, float]:
    """Return accuracy, and the mean over the classes of F1: 2 × correct / (predicted + true)."""
    device = next(model.parameters()).device
    predicted: list[Tensor] = []
    true: list[Tensor] = []
    for inputs, mask, labels in mails:
        predicted.append(model(**named(inputs.to(device), mask.to(device))).logits.argmax(dim=-1).cpu())
        true.append(labels)
    table = torch.zeros(3, 3).index_put_((torch.cat(predicted), torch.cat(true)), torch.tensor(1.0), accumulate=True)
    correct = table.diagonal()
    f1 = 2 * correct / (table.sum(dim=0) + table.sum(dim=1)).clamp(min=1)
    return {"test accuracy": float(correct.sum() / table.sum()), "macro-F1": float(f1.mean())}


def model(size: Size) -> nn.Module:
    """Return MiniLM with LoRA in all layers but the keys, and a new classifier; what is frozen has none."""
    from peft import LoraConfig, get_peft_model
    from transformers import BertForSequenceClassification

    from study.domains.last_block import LastBlock

    with offline():
        kind: Any = LastBlock if size.frozen else BertForSequenceClassification
        base: Any = kind.from_pretrained(str(fetched("minilm")), num_labels=3)
        blocks = base.config.num_hidden_layers - 1 if size.frozen else r"\d+"
        where = rf".*\.layer\.{blocks}\..*(query|value|dense)|.*\.pooler\.dense"
        lora = LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, lora_dropout=0.1, target_modules=where)
        return get_peft_model(base, lora)


def optimizer(size: Size, model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=size.rate, weight_decay=0.0)


def train(size: Size, mails: Mails, training: Training) -> Mapping[str, Path]:
    """Fine-tune with the Trainer, which writes ``checkpoint-N`` directories."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    rows = [{**named(inputs, mask), "labels": label} for inputs, mask, label in mails.examples()]
    torch.manual_seed(training.seed)
    tuned = model(size)
    arguments = TrainingArguments(
        str(training.folder), max_steps=training.steps, save_strategy="steps", save_steps=training.every,
        per_device_train_batch_size=BATCH, lr_scheduler_type=training.schedule, seed=training.seed,
        use_cpu=training.device.type == "cpu", logging_strategy="no", report_to=[], disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(tuned, arguments, train_dataset=rows, optimizers=(optimizer(size, tuned), None))  # pyright: ignore
    trainer.remove_callback(PrinterCallback)
    with offline():
        trainer.train()
    return {}


def job(size: Size, seed: int, _: Path | None) -> Job:
    from study.domains.mail_inputs import inputs

    tensors = inputs(size.length, frozen=size.frozen)
    order = torch.randperm(len(tensors[-1]), generator=torch.Generator().manual_seed(seed))
    val, test, trained = order.split([VAL, TEST, len(order) - VAL - TEST])
    train_mails, test_mails = Mails(tensors, trained, size=BATCH, shuffle=True), Mails(tensors, test, size=250)
    return Job(
        model=partial(model, size),
        loss=loss,
        forward=lambda model, batch: model(**named(*batch[:2])),
        metric=accuracy,
        train=train_mails,
        val=Mails(tensors, val, size=50),
        test=test_mails,
        optimizer=partial(optimizer, size),
        figure=partial(figures, test_mails),
        sample=Mails(tensors, trained[:SAMPLE], size=50),
        run=partial(train, size, train_mails),
    )


_AREA: Final = "Fine-tuning"
_ABOUT: Final = (
    "SpamAssassin's mails without headers, as spam, easy ham and hard ham (4 %): about 3,000 to train on, 500 for "
    "validation, 2,000 for the test. LoRA of rank 8 {} and a new classifier, AdamW, by transformers' Trainer and PEFT; "
    "what is averaged are the factors in its checkpoint directories."
)
_SIZES: Final = {"exhaustive": False, "variants": False, "random": 8}

DOMAIN = {
    "spam-lora": Domain(
        title="Mails: LoRA in the last block of MiniLM",
        area=_AREA,
        about=_ABOUT.format("in the last of MiniLM's six blocks, which reads 48 tokens,"),
        figure="test accuracy, %",
        scale=100,
        every=25,
        job=partial(job, Size(length=48, frozen=True, rate=1e-3)),
        sizes={**_SIZES, "ks": (1, 2, 3, 5, 8, 12)},
    ),
    "spam-lora-large": Domain(
        title="Mails: LoRA in all blocks of MiniLM",
        area=_AREA,
        about=_ABOUT.format("in all blocks of MiniLM, which reads 128 tokens,"),
        figure="test accuracy, %",
        scale=100,
        every=25,
        job=partial(job, Size(length=128, frozen=False, rate=5e-4)),
        schedules=("constant",),
        sizes={**_SIZES, "ks": (2, 5, 8), "random": 4, "with_early": False},
    ),
}
