"""LoRA adapters in PEFT's layout, without PEFT."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

CONFIG = {"peft_type": "LORA", "base_model_name_or_path": "base", "r": 2, "lora_alpha": 4, "target_modules": ["q", "v"]}


def save_adapters(folder: Path) -> Path:
    """Save three adapters of two modules in directories with a step in their names; return ``folder``."""
    draws = torch.Generator().manual_seed(0)
    for step in (1, 2, 3):
        place = folder / f"checkpoint-{step}"
        place.mkdir(parents=True)
        shapes = {"A": (2, 5), "B": (4, 2)}
        names = {f"base_model.model.{m}.lora_{f}.weight": shape for m in "qv" for f, shape in shapes.items()}
        save_file(
            {name: torch.randn(shape, generator=draws) for name, shape in names.items()},
            place / "adapter_model.safetensors",
        )
        (place / "adapter_config.json").write_text(json.dumps(CONFIG))
    return folder
