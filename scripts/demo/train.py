"""Train the demo's network with a constant, high learning rate, and save checkpoints at regular intervals."""

from itertools import cycle, islice
from pathlib import Path

import task
import torch

STEPS, EVERY = 360, 15
LR, WEIGHT_DECAY = 0.2, 2e-3


def train(folder: Path, seed: int = 0) -> None:
    """Write 24 checkpoints, ``step-15.pt`` to ``step-360.pt``, into ``folder``."""
    torch.set_num_threads(1)  # a network this small gains nothing from a second thread, and is reproducible with one
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, weight_decay=WEIGHT_DECAY)
    loader = task.train_dataloader()
    batches = (batch for _ in cycle([None]) for batch in loader)
    for step, batch in enumerate(islice(batches, STEPS), 1):
        optimizer.zero_grad()
        task.loss(model, batch).mean().backward()
        optimizer.step()
        if step % EVERY == 0:
            state = {"state_dict": model.state_dict(), "optimizer": optimizer.state_dict(), "global_step": step}
            torch.save(state, folder / f"step-{step}.pt")


if __name__ == "__main__":
    train(Path("ckpts"))
