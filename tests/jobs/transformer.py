"""A tiny transformer that predicts the next byte of the project's licence; the loss is its score."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

LENGTH = 24


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(128, 16)
        self.place = nn.Parameter(0.1 * torch.randn(LENGTH, 16))
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
        self.head = nn.Linear(16, 128)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH, tokens.device)
        return self.head(self.layer(self.embed(tokens) + self.place, src_mask=mask, is_causal=True))


def model() -> nn.Module:
    return Transformer()


def loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
    (text,) = batch
    each = nn.functional.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten(), reduction="none")
    return each.view(len(text), -1).mean(dim=1)


def train_dataloader() -> DataLoader:
    return DataLoader(_text(0, 350), batch_size=35, shuffle=True)


def val_dataloader() -> DataLoader:
    return DataLoader(_text(350, 450), batch_size=50)


def _text(start: int, stop: int) -> TensorDataset:
    """Lines ``start`` to ``stop`` of LENGTH + 1 bytes each."""
    codes = torch.tensor(list((Path(__file__).parents[2] / "LICENSE").read_bytes())).clamp(max=127)
    return TensorDataset(codes[: len(codes) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1)[start:stop])


def train(folder: Path, checkpoints: int = 12) -> None:
    torch.manual_seed(2)
    network = model()
    optimizer = torch.optim.Adam(network.parameters(), lr=0.05)
    step = 0
    for _ in range(checkpoints):
        for batch in train_dataloader():
            step += 1
            optimizer.zero_grad()
            loss(network, batch).mean().backward()
            optimizer.step()
        torch.save(network.state_dict(), folder / f"step-{step}.pt")
