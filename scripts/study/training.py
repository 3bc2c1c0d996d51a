"""The base training, which saves a checkpoint at regular intervals."""

from __future__ import annotations

import itertools
import math

import torch

from ckptavg.tasks.batch import to_device
from study.job import Job, Training

WARM, DECAY = 0.05, 0.2  # shares of a warm-up-stable-decay schedule


def rate(schedule: str, done: float) -> float:
    """Return the factor of the learning rate after a share ``done`` of the training.

    ``constant`` is 1; ``cosine`` (1 + cos(π·done))/2; ``wsd`` rises over the first 5 %, is 1, and falls linearly to 0
    over the last 20 %.
    """
    if schedule == "cosine":
        return (1 + math.cos(math.pi * done)) / 2
    if schedule == "wsd":
        return max(0.0, min(1.0, (done + 1e-3) / WARM, (1 - done) / DECAY))
    return 1.0


def train(job: Job, training: Training) -> None:
    """Train ``job`` and write ``step-N.pt`` after each ``every`` steps."""
    training.folder.mkdir(parents=True)
    torch.manual_seed(training.seed)
    model = job.model().to(training.device).train()
    optimizer = job.optimizer(model)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(training.schedule, step / training.steps))
    batches = (batch for _ in itertools.count() for batch in job.train)
    for step, batch in enumerate(itertools.islice(batches, training.steps), 1):
        optimizer.zero_grad()
        job.loss(model, to_device(batch, training.device)).mean().backward()
        if job.clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), job.clip)
        optimizer.step()
        rates.step()
        if step % training.every == 0:
            path = training.folder / f"step-{step}.pt"
            torch.save({"state_dict": model.state_dict(), "global_step": step}, path)
