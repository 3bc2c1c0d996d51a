"""The base training, which saves a checkpoint at regular intervals."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import torch

from ckptavg.tasks.batch import to_device
from study.job import Job
from study.plan import Schedule


def train(
    job: Job, folder: Path, *, steps: int, every: int, schedule: Schedule, seed: int, device: torch.device
) -> None:
    """Train ``job`` for ``steps`` steps and write ``step-N.pt`` after each ``every``.

    Args:
        job: what to train.
        folder: directory for the checkpoints; it is created.
        steps: optimizer steps.
        every: steps between two checkpoints.
        schedule: learning-rate schedule: constant, or a factor (1 + cos(π·t/T))/2, which ends at 0.
        seed: seed of the initial weights and the order of the batches.
        device: device to train on.
    """
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    model = job.model().to(device).train()
    optimizer = job.optimizer(model)

    def rate(step: int) -> float:
        return 1.0 if schedule == "constant" else (1 + math.cos(math.pi * step / steps)) / 2

    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    batches = (batch for _ in itertools.count() for batch in job.train)
    for step, batch in enumerate(itertools.islice(batches, steps), 1):
        optimizer.zero_grad()
        job.loss(model, to_device(batch, device)).mean().backward()
        if job.clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), job.clip)
        optimizer.step()
        rates.step()
        if step % every == 0:
            torch.save({"state_dict": model.state_dict(), "global_step": step}, folder / f"step-{step}.pt")
