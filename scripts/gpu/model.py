"""A transformer of the size of GPT-2 medium (0.35 B) in bfloat16, and a task for it on random tokens.

``CKPTAVG_GPU_SIZE`` selects the size.
"""

import os
from collections.abc import Iterable
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn


class Size(NamedTuple):
    vocabulary: int
    width: int
    layers: int
    heads: int
    context: int


SIZES: Final = {"medium": Size(50257, 1024, 24, 16, 1024), "tiny": Size(64, 16, 2, 2, 32)}


class GPT(nn.Module):
    """Causal transformer blocks between an embedding and its transpose."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.tokens = nn.Embedding(size.vocabulary, size.width)
        self.places = nn.Embedding(size.context, size.width)
        self.blocks = nn.ModuleList([Block(size) for _ in range(size.layers)])
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, size.vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Block(nn.Module):
    """Attention and a feed-forward network, each after a LayerNorm."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        self.before, self.between = nn.LayerNorm(size.width), nn.LayerNorm(size.width)
        self.qkv, self.out = nn.Linear(size.width, 3 * size.width), nn.Linear(size.width, size.width)
        self.up, self.down = nn.Linear(size.width, 4 * size.width), nn.Linear(4 * size.width, size.width)

    def forward(self, x: Tensor) -> Tensor:
        split = self.qkv(self.before(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(*split, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.between(x)), approximate="tanh"))


def network(size: str) -> nn.Module:
    model = GPT(SIZES[size])
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.02)
    return model.to(torch.bfloat16)


def environment(size: str) -> dict[str, str]:
    """Return the environment of a process that uses this file as its task."""
    return {**os.environ, "CKPTAVG_GPU_SIZE": size}


# the task
def model() -> nn.Module:
    return network(os.environ["CKPTAVG_GPU_SIZE"])


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    logits = model(batch)
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())


def val_dataloader() -> Iterable[Tensor]:
    size = SIZES[os.environ["CKPTAVG_GPU_SIZE"]]
    draws = torch.Generator().manual_seed(0)
    return [torch.randint(size.vocabulary, (8, size.context), generator=draws) for _ in range(4)]
