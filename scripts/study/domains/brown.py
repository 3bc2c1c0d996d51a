"""Language modelling: the next byte of the Brown corpus, in documents that the model has not seen.

Shape suffixes: B = passages, L = bytes, E = width.
"""

from __future__ import annotations

import math
import re
from functools import cache
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from study.data import fetched
from study.domains.attention import Block
from study.job import Batches, Domain, Job

WIDTH, BLOCKS, HEADS, LENGTH, SYMBOLS = 64, 2, 4, 64, 128
VAL, TEST = 0.1, 0.1  # shares of the documents
SAMPLE, SEEN, UNSEEN = 400, 300, 1000  # passages of the training, validation and test documents that are scored
_DOCUMENT: Final = re.compile(r"c[a-r]\d\d")
_QUOTE: Final = re.compile("`` ?| ?''")
_SPACED: Final = re.compile(r" (?=[,.;:?!)])|(?<=\() ")  # before and after punctuation that has no space in print


class Writer(nn.Module):
    """Language model: each byte and the one before, embedded, causal blocks, and a linear layer.

    The embedding of the byte before spares the first block the thousand steps of learning to look there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.before = nn.Embedding(SYMBOLS, WIDTH), nn.Embedding(SYMBOLS, WIDTH)
        self.place_LE = nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))
        self.blocks = nn.ModuleList(Block(WIDTH, HEADS, causal=True) for _ in range(BLOCKS))
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, SYMBOLS))

    def forward(self, bytes_BL: Tensor) -> Tensor:
        before_BLE = nn.functional.pad(self.before(bytes_BL[:, :-1]), (0, 0, 1, 0))
        x_BLE = self.bytes(bytes_BL) + before_BLE + self.place_LE
        for block in self.blocks:
            x_BLE = block(x_BLE)
        return self.head(x_BLE)


def read(path: Path) -> str:
    """Return the text of a document of lines of ``word/tag``: without tags, a sentence a line, roughly as in print.

    Raises:
        ValueError: if a word has no tag, the file is not ASCII, or it has no words.
    """
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not ASCII: {error}") from error
    sentences: list[str] = []
    for number, line in enumerate(lines, 1):
        pairs = [pair.rpartition("/") for pair in line.split()]
        untagged = [tag for word, _, tag in pairs if not (word and tag)]
        if untagged:
            raise ValueError(f"{path}: line {number}: {untagged[0]!r} is not word/tag")
        if pairs:
            words = " ".join(word for word, _, _ in pairs)
            sentences.append(_SPACED.sub("", _QUOTE.sub('"', words)))
    if not sentences:
        raise ValueError(f"{path}: has no words")
    return "\n".join(sentences) + "\n"


@cache
def documents(folder: Path) -> list[Tensor]:
    """Return the bytes of each document.

    Raises:
        ValueError: if there are fewer than three, or one cannot be parsed.
    """
    paths = sorted(path for path in folder.iterdir() if _DOCUMENT.fullmatch(path.name))
    if len(paths) < 3:
        raise ValueError(f"{folder}: has {len(paths)} documents (ca01 … cr09), and three parts need one each")
    return [torch.tensor(list(read(path).encode()), dtype=torch.uint8) for path in paths]


def passages(texts: list[Tensor]) -> Tensor:
    """Return the texts cut into passages of LENGTH + 1 bytes, none of which is from two documents."""
    size = LENGTH + 1
    return torch.cat([text[: len(text) // size * size].view(-1, size) for text in texts]).long()


def loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
    """Return nats per byte for each passage."""
    (passage_BL,) = batch
    logits = model(passage_BL[:, :-1]).transpose(1, 2)
    return nn.functional.cross_entropy(logits, passage_BL[:, 1:], reduction="none").mean(dim=1)


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.1)


def job(seed: int, data: Path | None) -> Job:
    """Build the job of a seed, which draws the documents of each part, and the passages that strategies see."""
    texts = documents(data or fetched("brown"))
    random = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(texts), generator=random)
    counts = [max(1, round(share * len(texts))) for share in (VAL, TEST)]

    def cut(part: Tensor, most: int | None = None) -> Tensor:
        found = passages([texts[i] for i in part])
        return found[torch.randperm(len(found), generator=random)[:most]]

    val, test, train = order.split([*counts, len(order) - sum(counts)])
    training = cut(train)
    return Job(
        model=Writer,
        loss=loss,
        train=Batches(training, size=min(16, len(training)), shuffle=True),
        sample=Batches(training[:SAMPLE], size=min(25, len(training)), shuffle=True),
        val=Batches(cut(val, SEEN), size=25),
        test=Batches(cut(test, UNSEEN), size=100),
        optimizer=optimizer,
        clip=1.0,
    )


DOMAIN = Domain(
    title="Language modelling: the Brown corpus",
    area="Language modelling",
    about=(
        "A million words of edited English by bytes, without tags, quotes and spaces roughly as in print: 400 texts "
        f"to train on, {SEEN} passages of {LENGTH + 1} bytes from 50 others for validation, {UNSEEN} from 50 more for "
        "the test. A causal transformer of two blocks, AdamW."
    ),
    figure="− test loss, bits per byte",
    scale=1 / math.log(2),
    every=130,
    job=job,
    schedules=("constant", "cosine", "wsd"),
    sizes={"exhaustive": False, "variants": False, "with_early": False, "random": 5, "ks": (2, 5, 12)},
)
