"""A pre-norm transformer block without fused kernels, so that it can be differentiated twice.

Shape suffixes: B = examples, L = positions, E = width, H = heads, C = width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """Attention and a two-layer network, each added to its input.

    Args:
        width: E.
        heads: H.
        causal: whether a position attends only to itself and earlier positions.
    """

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm_in, self.norm_out = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x_BLE: Tensor, hidden_BL: Tensor | None = None) -> Tensor:
        """Apply the block; ``hidden_BL`` masks positions that must not be attended to."""
        batch, length, width = x_BLE.shape
        split = (batch, length, 3, self.heads, width // self.heads)
        q_BHLC, k_BHLC, v_BHLC = self.qkv(self.norm_in(x_BLE)).view(split).permute(2, 0, 3, 1, 4)
        score_BHLL = q_BHLC @ k_BHLC.transpose(-1, -2) / (width // self.heads) ** 0.5
        if self.causal:
            later_LL = torch.ones(length, length, dtype=torch.bool, device=x_BLE.device).triu(1)
            score_BHLL = score_BHLL.masked_fill(later_LL, -1e9)
        if hidden_BL is not None:
            score_BHLL = score_BHLL.masked_fill(hidden_BL[:, None, None], -1e9)
        seen_BLE = (score_BHLL.softmax(-1) @ v_BHLC).transpose(1, 2).reshape(batch, length, width)
        x_BLE = x_BLE + self.out(seen_BLE)
        return x_BLE + self.mlp(self.norm_out(x_BLE))
