"""What ckptavg needs to know about a training job. Replace each part with your own; it runs as it is.

The names follow Lightning's hooks. ckptavg moves batches to the device, turns dropout off, and takes care of
BatchNorm. Try it with: ckptavg sewa ./ckpts --k 5
"""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def model() -> nn.Module:
    """The module whose ``state_dict()`` was saved; its values do not matter, they are replaced."""
    return nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 2))


def loss(model: nn.Module, batch) -> torch.Tensor:
    """The mean loss of a batch, or (better) one value for each example."""
    inputs, labels = batch
    return nn.functional.cross_entropy(model(inputs), labels, reduction="none")


def val_dataloader() -> DataLoader:
    """What the strategies learn from and every score is measured on. Keep it out of training."""
    return DataLoader(_two_moons(400, seed=1), batch_size=100)


def train_dataloader() -> DataLoader:
    """Optional: BatchNorm's statistics come from here, and `--on train` learns on it."""
    return DataLoader(_two_moons(1000, seed=0, flipped=0.2), batch_size=50, shuffle=True)


def test_dataloader() -> DataLoader:
    """Optional: data that nothing was chosen on, for a final score that is not flattered."""
    return DataLoader(_two_moons(400, seed=2), batch_size=100)


def metric(model: nn.Module, batch) -> torch.Tensor:
    """Optional: what you really care about, one value for each example."""
    inputs, labels = batch
    return (model(inputs).argmax(dim=1) == labels).float()


metric_goal = "max"  # "min" where a smaller metric is better
metric_bounds = (0.0, 1.0)  # optional: what it lies within; `aswa --early-reject` needs it


def _two_moons(count: int, seed: int, flipped: float = 0.0) -> TensorDataset:
    """Stand-in data: two interleaved half circles, some labels flipped."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (count,), generator=random)
    angle = torch.rand(count, generator=random) * torch.pi
    side = 1.0 - 2.0 * labels
    moons = torch.stack([angle.cos() + labels, side * angle.sin() + 0.5 * labels], dim=1)
    noise = 0.2 * torch.randn(count, 2, generator=random)
    wrong = torch.rand(count, generator=random) < flipped
    return TensorDataset(moons + noise, torch.where(wrong, 1 - labels, labels))
