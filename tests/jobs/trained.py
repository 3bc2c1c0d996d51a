"""The trajectories of three trainings, stored as bytes: a training's floats differ between processors and torch builds.

``python -m jobs.trained``, with tests/ and scripts/demo/ on PYTHONPATH, trains anew and replaces the stored files.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from pathlib import Path
from types import ModuleType
from typing import Any

import task as demo_task
import torch
import train as demo_training
from safetensors.torch import load_file, save_file
from torch import Tensor

from jobs import mlp, transformer

HERE = Path(__file__).parent
TRAININGS: dict[str, ModuleType] = {"digits": demo_training, "mlp": mlp, "transformer": transformer}


def restore(name: str, folder: Path) -> None:
    """Write the checkpoints that the training ``name`` left, ``step-N.pt``, into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    states: defaultdict[int, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in load_file(HERE / f"{name}.safetensors").items():
        step, _, tensor_name = key.partition(".")
        states[int(step)][tensor_name] = tensor
    for step, state in sorted(states.items()):
        torch.save(_as_saved(name, step, state), folder / f"step-{step}.pt")


def _as_saved(name: str, step: int, state: dict[str, Tensor]) -> dict[str, Any]:
    if name != "digits":
        return state
    model = demo_task.model()
    ordered = {tensor_name: state[tensor_name] for tensor_name in model.state_dict()}
    optimizer = torch.optim.SGD(model.parameters(), lr=demo_training.LR, momentum=0.9)
    for parameter in model.parameters():
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return {"state_dict": ordered, "optimizer": optimizer.state_dict(), "global_step": step}


def store() -> None:
    """Train, and replace the stored files."""
    for name, module in TRAININGS.items():
        tensors: dict[str, Tensor] = {}
        with tempfile.TemporaryDirectory() as folder:
            module.train(Path(folder))
            for path in Path(folder).glob("*.pt"):
                saved = torch.load(path)
                step = path.stem.removeprefix("step-")
                tensors |= {f"{step}.{key}": tensor for key, tensor in saved.get("state_dict", saved).items()}
        save_file(tensors, HERE / f"{name}.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    store()
