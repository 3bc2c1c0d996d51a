"""Task file for ckptavg: the model, data, loss and metric of a training job. Replace each part; it runs as is.

The names follow Lightning's hooks. ckptavg moves batches to the device, turns dropout off, and takes care of
BatchNorm. Try it with: ckptavg sewa ./ckpts --k 5
"""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def model() -> nn.Module:
    """Return the module whose ``state_dict()`` was saved; its values do not matter, since they are replaced."""
    return nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 2))


def loss(model: nn.Module, batch) -> torch.Tensor:
    """Return the mean loss of a batch, or (better) one loss per example."""
    inputs, labels = batch
    return nn.functional.cross_entropy(model(inputs), labels, reduction="none")


def val_dataloader() -> DataLoader:
    """Data to optimize coefficients on and to compute every score with. Keep it out of training."""
    return DataLoader(_two_moons(400, seed=1), batch_size=100)


def train_dataloader() -> DataLoader:
    """Optional: data to recompute BatchNorm statistics with, and to optimize on with `--on train`."""
    return DataLoader(_two_moons(1000, seed=0, flipped=0.2), batch_size=50, shuffle=True)


def test_dataloader() -> DataLoader:
    """Optional: data used for no choice, for an unbiased final score."""
    return DataLoader(_two_moons(400, seed=2), batch_size=100)


def metric(model: nn.Module, batch) -> torch.Tensor:
    """Optional: the metric to report, one value per example."""
    inputs, labels = batch
    return (model(inputs).argmax(dim=1) == labels).float()


# metric() may return several values by name, and predict(model, batch) class probabilities; with forward(model, batch),
# loss(output, batch), metric and predict share one forward pass: docs/reference/task-file.md
metric_goal = "max"  # "min" where a smaller metric is better
metric_bounds = (0.0, 1.0)  # optional: its range; `aswa --early-reject` needs it


def _two_moons(count: int, seed: int, flipped: float = 0.0) -> TensorDataset:
    """Generate example data: two interleaved half circles, some labels flipped."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (count,), generator=random)
    angle = torch.rand(count, generator=random) * torch.pi
    side = 1.0 - 2.0 * labels
    moons = torch.stack([angle.cos() + labels, side * angle.sin() + 0.5 * labels], dim=1)
    noise = 0.2 * torch.randn(count, 2, generator=random)
    wrong = torch.rand(count, generator=random) < flipped
    return TensorDataset(moons + noise, torch.where(wrong, 1 - labels, labels))
