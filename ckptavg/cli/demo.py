"""``ckptavg demo``: train the template's task, to have checkpoints on which to try the commands."""

import os
from pathlib import Path
from typing import Annotated

import typer

from ckptavg.cli.init import TEMPLATE
from ckptavg.errors import OutputError, OutputExistsError


def command(
    folder: Annotated[Path, typer.Argument(help="Directory to create.", readable=False)] = Path("ckptavg-demo"),
) -> None:
    """Train a tiny network, save its checkpoints, and print a command to try on them."""
    from ckptavg.cli.terminal import Screen
    from ckptavg.filesystem.atomic import write_text

    if os.path.lexists(folder):
        raise OutputExistsError("exists already", path=folder, hint="name another directory, or delete this one")
    try:
        (folder / "ckpts").mkdir(parents=True)
    except OSError as error:
        raise OutputError(f"cannot be made: {error.strerror}", path=folder) from error
    write_text(folder / "task.py", TEMPLATE.read_text(encoding="utf-8"))
    _train(folder / "ckpts")
    Screen().print(f"Now:  cd {folder} && ckptavg sewa ./ckpts --k 5")
    print(folder)


def _train(folder: Path) -> None:
    """Save one checkpoint per epoch of SGD with a constant, high learning rate: the setting that averaging is for.

    The update is written out because `torch.optim` imports torch's compiler, which takes longer than the training.
    """
    import torch

    from ckptavg.runtime.seeds import reproducible
    from ckptavg.tasks.templates import task

    with reproducible(0):
        model = task.model()
        momentum = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
        for epoch in range(1, 21):
            for batch in task.train_dataloader():
                model.zero_grad()
                task.loss(model, batch).mean().backward()
                with torch.no_grad():
                    for name, parameter in model.named_parameters():
                        if parameter.grad is not None:
                            momentum[name].mul_(0.9).add_(parameter.grad)
                            parameter.sub_(0.5 * momentum[name])
            state = {"state_dict": model.state_dict(), "optimizer": {"momentum": momentum}, "epoch": epoch}
            torch.save(state, folder / f"epoch-{epoch}.pt")
