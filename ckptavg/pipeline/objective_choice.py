"""Choose the device and the evaluator that scores mixtures."""

from __future__ import annotations

from pathlib import Path

import torch

from ckptavg.checkpoints.discover import Discovered
from ckptavg.errors import UsageError
from ckptavg.objective.command import CommandEvaluator
from ckptavg.objective.evaluator import Evaluator
from ckptavg.objective.measurements import MeasurementLog
from ckptavg.objective.mixture import Mixture
from ckptavg.objective.precision import precision
from ckptavg.options import Options
from ckptavg.pipeline.task_choice import task_for
from ckptavg.runtime.progress import Watch


def build_evaluator(
    found: Discovered, options: Options, watch: Watch | None, log: MeasurementLog | None = None
) -> Evaluator:
    """Build the evaluator that scores mixtures of the candidates; it loads nothing yet."""
    if options.score_cmd is not None:
        return CommandEvaluator(
            options.score_cmd,
            found.checkpoints,
            key=options.score_key,
            goal=options.score_goal,
            timeout=options.score_timeout,
            dtype=options.dtype,
            beside=Path() if log is None else log.folder,  # a dry run has no journal folder
            seed=options.seed,
            watch=watch,
            log=log,
            workers=options.workers,
        )
    device = pick_device(options.device)
    if device.type == "mps" and options.workers.world_size > 1:
        raise UsageError("--device mps supports one worker only", hint="use --device cpu")
    return Mixture(
        task_for(found, options),
        found.checkpoints,
        device=device,
        seed=options.seed,
        bits=options.bits,
        group_size=options.group_size,
        offload=options.offload,
        precision=precision(options.precision, device),
        compiled=options.compile,
        watch=watch,
        log=log,
        workers=options.workers,
        parallel=options.parallel,
        shard=options.shard,
    )


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
