"""An index with one shard by safetensors and one by ``torch.save``."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file


def sample(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    state = {"w": torch.arange(6.0).view(2, 3), "b": torch.ones(5, dtype=torch.bfloat16)}
    save_file({"w": state["w"]}, folder / "1.safetensors")
    torch.save({"b": state["b"]}, folder / "2.bin")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 34}, "weight_map": {"w": "1.safetensors", "b": "2.bin"}}))
    return index, state
