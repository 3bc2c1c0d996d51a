"""A file by the safetensors library."""

from pathlib import Path

import torch
from safetensors.torch import save_file


def sample(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    state = {"w": torch.arange(6.0).view(2, 3), "b": torch.ones(5, dtype=torch.bfloat16), "n": torch.tensor(3)}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder / "model.safetensors", state
