"""Training step of a checkpoint: from its contents, then from its name, never from its modification time."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from ckptavg.filesystem.strict_json import read_json
from ckptavg.readers import Reader

STEP_KEYS: Final = ("global_step", "num_updates", "batch_idx_train", "iter_num", "iteration", "step", "epoch")
_BEFORE_STEP: Final = ("step[-_=]?", "iter(?:ation)?[-_=]?", "(?:^|[-_])ba", "ep(?:och)?[-_=]?", "")  # in names


def steps_inside(reader: Reader) -> dict[str, int]:
    """Return the training steps recorded in the file: key → number, for each of `STEP_KEYS` that it has."""
    steps: dict[str, int] = {}
    for key in STEP_KEYS:
        value = _updates(reader) if key == "num_updates" else reader.tree.get(key)
        if isinstance(value, bool) or value is None:
            value = reader.metadata.get(key)
        if type(value) is int or (isinstance(value, str) and re.fullmatch("[0-9]{1,18}", value)):
            steps[key] = int(value)
    return steps


def _updates(reader: Reader) -> object:
    """Return fairseq's ``num_updates`` of the last optimizer."""
    history = reader.tree.get("optimizer_history")
    last = history[-1] if isinstance(history, Sequence) and not isinstance(history, str) and history else None
    return last.get("num_updates") if isinstance(last, Mapping) else None


def step_in_name(name: str) -> int | None:
    """Return the training step in a name: the number after ``step``, ``iter``, ``ba`` or ``epoch``, or the last one."""
    for prefix in _BEFORE_STEP:
        if numbers := re.findall(f"{prefix}([0-9]+)", name.lower()):
            return int(numbers[-1][:18])
    return None


def trainer_step(path: Path) -> dict[str, int]:
    """Return the ``global_step`` of a Hugging Face ``trainer_state.json``, if the file exists."""
    if not os.path.lexists(path):
        return {}
    state = read_json(path)
    step = state.get("global_step") if isinstance(state, dict) else None
    return {"global_step": step} if type(step) is int else {}


def natural(name: str) -> tuple[tuple[int, str] | tuple[int, int, str], ...]:
    """Return a sort key that puts step-9 before step-10."""
    parts = [part for part in re.split(r"([0-9]+)", name) if part]
    return tuple((1, int(part), part) if part.isascii() and part.isdigit() else (0, part) for part in parts)


def common_kind(steps: Sequence[Mapping[str, int]], runs: Sequence[int]) -> str | None:
    """Return the kind of step to order checkpoints by, one of `STEP_KEYS` or ``name``.

    This is the first that all checkpoints have and that is distinct within each run, else the first that all have,
    else None. ``steps`` has kind → number and ``runs`` the run of each checkpoint.
    """
    shared = [kind for kind in (*STEP_KEYS, "name") if steps and all(kind in one for one in steps)]
    distinct = (k for k in shared if len({(run, one[k]) for run, one in zip(runs, steps, strict=True)}) == len(steps))
    return next(distinct, shared[0] if shared else None)
