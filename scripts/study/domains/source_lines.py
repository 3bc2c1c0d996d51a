"""Text classification: predict the standard-library module of a line.

Shape suffixes: B = lines, L = words, E = width.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from study.domains.attention import Block
from study.domains.sources import MODULES, text_of
from study.job import Batches, Domain, Job, accuracy, cross_entropy

WIDTH, WORDS, BUCKETS = 32, 16, 1024
TRAIN, VAL, TEST = 5000, 500, 2000
_WORD: Final = re.compile(r"\w+|[^\w\s]")


class Reader(nn.Module):
    """Text classifier: embedded words, one block, the mean over the words of a line, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(BUCKETS, WIDTH)
        self.place_LE = nn.Parameter(0.02 * torch.randn(WORDS, WIDTH))
        self.block = Block(WIDTH, 4, causal=False)
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, len(MODULES)))

    def forward(self, words_BL: Tensor) -> Tensor:
        padding_BL = words_BL == 0
        x_BLE = self.block(self.words(words_BL) + self.place_LE, padding_BL)
        there_BL1 = (~padding_BL).unsqueeze(-1).to(x_BLE.dtype)
        return self.head((x_BLE * there_BL1).sum(dim=1) / there_BL1.sum(dim=1))


def _code(line: str) -> list[int]:
    """Hash words into 1 … BUCKETS − 1, by a checksum because `hash` differs between runs; 0 is padding."""
    words = [1 + zlib.crc32(word.encode()) % (BUCKETS - 1) for word in _WORD.findall(line)[:WORDS]]
    return words + [0] * (WORDS - len(words))


def _lines() -> tuple[Tensor, Tensor]:
    """Return all distinct lines of at least a dozen characters that occur in only one module."""
    owned = [sorted({line.strip() for line in text_of(module).splitlines()}) for module in MODULES]
    owners = Counter(line for lines in owned for line in lines)
    found = [(line, label) for label, lines in enumerate(owned) for line in lines]
    kept = [(line, label) for line, label in found if len(line) >= 12 and owners[line] == 1]
    return torch.tensor([_code(line) for line, _ in kept]), torch.tensor([label for _, label in kept])


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)


def job(seed: int, _: Path | None) -> Job:
    words, labels = _lines()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    train, val, test = order[: TRAIN + VAL + TEST].split([TRAIN, VAL, TEST])
    return Job(
        model=Reader,
        loss=cross_entropy,
        metric=accuracy,
        train=Batches(words[train], labels[train], size=64, shuffle=True),
        val=Batches(words[val], labels[val], size=125),
        test=Batches(words[test], labels[test], size=125),
        optimizer=optimizer,
        clip=1.0,
    )


DOMAIN = Domain(
    title="Text: which module a line comes from",
    about="Lines of eight modules of the standard library, 5000 to train on; a transformer of one block, AdamW.",
    figure="test accuracy, %",
    scale=100,
    every=40,
    job=job,
)
