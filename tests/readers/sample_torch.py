"""A file by ``torch.save``, with a transposed tensor."""

from pathlib import Path

import torch


def sample(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    state = {"w": torch.arange(6.0).view(2, 3).t(), "b": torch.ones(5, dtype=torch.bfloat16), "n": torch.tensor(3)}
    torch.save(state, folder / "model.pt")
    return folder / "model.pt", state
