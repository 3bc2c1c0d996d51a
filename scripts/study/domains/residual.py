"""A residual network with BatchNorm for images of any size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Residual(nn.Module):
    """Two convolutions and a shortcut.

    Args:
        width: input channels.
        out: output channels.
        stride: stride of the first convolution.
    """

    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(),
            nn.Conv2d(out, out, 3, 1, 1, bias=False),
            nn.BatchNorm2d(out),
        )
        same = stride == 1 and width == out
        self.shortcut = nn.Identity() if same else nn.Conv2d(width, out, 1, stride, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        return torch.relu(self.body(images) + self.shortcut(images))


def residual_network(
    classes: int, width: int = 64, *, channels: int = 3, strides: Sequence[int] = (1, 1, 2, 2, 2), blocks: int = 2
) -> nn.Module:
    """Return a stem and stages of residual blocks, each stage after the first with twice the channels.

    Args:
        classes: number of outputs.
        width: channels of the stem and of the first stage.
        channels: channels of an image.
        strides: strides of the stem and of each stage's first block.
        blocks: blocks of a stage.
    """
    stem, *stages = strides
    layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, stem, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    into = width
    for stage, stride in enumerate(stages):
        out = width * 2**stage
        layers += [Residual(into, out, stride), *(Residual(out, out, 1) for _ in range(blocks - 1))]
        into = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(into, classes))
