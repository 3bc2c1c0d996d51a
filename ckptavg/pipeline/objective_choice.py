"""Choose the device and the evaluator that scores mixtures."""

import torch

from ckptavg.checkpoints.discover import Discovered
from ckptavg.context import Run
from ckptavg.errors import UsageError
from ckptavg.objective.command import CommandEvaluator
from ckptavg.objective.evaluator import Evaluator
from ckptavg.objective.mixture import Mixture
from ckptavg.objective.score_command import ScoreCommand
from ckptavg.options import Options
from ckptavg.pipeline.task_choice import task_for


def build_evaluator(found: Discovered, options: Options, run: Run) -> Evaluator:
    """Build the evaluator that scores mixtures of the candidates; it loads nothing yet."""
    if options.score_cmd is not None:
        command = ScoreCommand(options.score_cmd, options.score_key, options.score_timeout)
        return CommandEvaluator(command, found.checkpoints, run, goal=options.score_goal, dtype=options.dtype)
    if run.device.type == "mps" and run.workers.world_size > 1:
        raise UsageError("--device mps supports one worker only", hint="use --device cpu")
    return Mixture(task_for(found, options), found.checkpoints, run, options)


def pick_device(name: str) -> torch.device:
    """Return the device for ``--device name``.

    Raises:
        UsageError: if the device does not exist or cannot be used.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"--device {name}: {str(error).splitlines()[0]}", hint="use --device cpu, or auto for the best available"
        ) from error
    return device


def device_name(device: torch.device) -> str:
    """Return the name of the hardware, which is part of the fingerprint because rounding depends on it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
