"""A member: one of several models that train on the data of a task file, each in its own order.

Shape suffixes: D = parameters.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from ckptavg.tasks.batch import to_device

DIGITS: Final = Path(__file__).parent.parent / "demo" / "task.py"
MOMENTUM: Final = "momentum_D"  # name of the momentum in a file that has it


class Member:
    """Model, momentum and data order of one member.

    Attributes:
        state_2D: weights and momentum; the model's parameters and the optimizer's buffers are views of its rows.
    """

    def __init__(self, options: argparse.Namespace, index: int, device: torch.device) -> None:
        self._task = load_task(options.task)
        self._options, self._index, self._device = options, index, device
        torch.manual_seed(options.seed + (index << 20 if options.own_start else 0))
        self.model: nn.Module = self._task.model().to(device).train()
        parameters = list(self.model.parameters())
        weights_D = parameters_to_vector(parameters).detach()
        self.state_2D = torch.stack([weights_D, torch.zeros_like(weights_D)])
        vector_to_parameters(self.state_2D[0], parameters)
        self._optimizer = torch.optim.SGD(
            parameters, lr=options.lr, momentum=options.momentum, weight_decay=options.weight_decay
        )
        buffers = self.state_2D[1].split([parameter.numel() for parameter in parameters])
        for parameter, buffer in zip(parameters, buffers, strict=True):
            self._optimizer.state[parameter]["momentum_buffer"] = buffer.view_as(parameter)
        self._batches = self._endless()

    def step(self, step: int) -> float:
        """Take step ``step`` of T and return its share (1 + cos(π·step/T))/2 of the initial learning rate."""
        share = (1 + math.cos(math.pi * step / self._options.steps)) / 2
        for group in self._optimizer.param_groups:
            group["lr"] = share * self._options.lr
        batch = to_device(next(self._batches), self._device)
        forward = getattr(self._task, "forward", None)
        output = self.model if forward is None else forward(self.model, batch)
        self._optimizer.zero_grad()
        self._task.loss(output, batch).mean().backward()
        self._optimizer.step()
        return share

    def save(self, path: Path, *, momentum: bool = False) -> None:
        """Write the model as safetensors, and the momentum with it if asked."""
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
        save_file(tensors | ({MOMENTUM: self.state_2D[1].clone()} if momentum else {}), path)

    def load(self, path: Path) -> None:
        """Continue from a file: its weights, BatchNorm statistics and momentum, which is zero if the file has none."""
        tensors = load_file(path, device=str(self._device))
        momentum_D = tensors.pop(MOMENTUM, torch.zeros_like(self.state_2D[1]))
        self.model.load_state_dict(tensors)  # copies into the views
        self.state_2D[1].copy_(momentum_D)

    def _endless(self) -> Iterator[Any]:
        """Yield batches for ever; the order of an epoch depends on seed, member and epoch alone."""
        loader = self._task.train_dataloader()
        for epoch in itertools.count():
            torch.manual_seed((self._options.seed << 40) + (self._index << 20) + epoch + 1)
            yield from loader


def load_task(path: Path) -> SimpleNamespace:
    """Return the names of a task file of ckptavg; the recipes use model, loss, forward and train_dataloader."""
    sys.path.insert(0, str(path.parent))
    names = runpy.run_path(str(path)) if path.is_file() else {}
    if missing := {"model", "loss", "train_dataloader"} - names.keys():
        raise SystemExit(f"error: {path}: is no task file with {min(missing)}")
    return SimpleNamespace(**names)


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options of a training."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--task", type=Path, default=DIGITS, help="ckptavg task file with a train_dataloader")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps T of each member")
    parser.add_argument("--lr", type=float, default=0.1, help="initial learning rate, decayed to 0 by a cosine over T")
    parser.add_argument("--momentum", type=float, default=0.9, help="of SGD")
    parser.add_argument("--weight-decay", type=float, default=5e-4, help="of SGD")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights, the data orders and the shuffle")
    parser.add_argument("--own-start", action="store_true", help="give each member initial weights of its own")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto: the rank's own GPU if there is one")
    return parser


def join(device: str = "cpu") -> tuple[int, int, torch.device]:
    """Join the processes of torchrun, or be the only one; return rank, number of ranks, and device."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        return 0, 1, torch.device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
    return dist.get_rank(), dist.get_world_size(), torch.device(device)


def barrier() -> None:
    """Wait for the other ranks."""
    if dist.is_initialized():
        dist.barrier()
