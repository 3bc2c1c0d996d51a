"""Torch's dtypes by safetensors' names; apart from `dtypes`, which an average imports without torch."""

from collections.abc import Mapping
from typing import Final

import torch

from ckptavg.checkpoints.dtypes import NAMES

TORCH: Final[Mapping[str, torch.dtype]] = {dtype: getattr(torch, name) for name, dtype in NAMES.items()}
