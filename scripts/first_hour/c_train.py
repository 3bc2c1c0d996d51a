"""Train a network in plain torch, and save four checkpoints."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))

    def forward(self, points: Tensor) -> Tensor:
        return self.layers(points)


def spirals(count: int, seed: int) -> TensorDataset:
    """Three noisy spirals; one label in five is random."""
    draws = torch.Generator().manual_seed(seed)
    labels, radius = torch.randint(3, (count,), generator=draws), torch.rand(count, generator=draws)
    angle = 4 * radius + 2 * torch.pi / 3 * labels + 0.3 * torch.randn(count, generator=draws)
    noise = torch.randint(3, (count,), generator=draws).where(torch.rand(count, generator=draws) < 0.2, labels)
    return TensorDataset(torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1), noise)


def val_loader() -> DataLoader:
    return DataLoader(spirals(1000, seed=1), batch_size=200)


def train() -> None:
    torch.manual_seed(0)
    Path("ckpts").mkdir()
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for epoch in range(1, 13):
        for points, labels in DataLoader(spirals(1000, seed=0), batch_size=50, shuffle=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(points), labels).backward()
            optimizer.step()
        if epoch % 3 == 0:
            torch.save({"model": model.state_dict(), "epoch": epoch}, f"ckpts/epoch-{epoch}.pt")


if __name__ == "__main__":
    train()
