"""Score checkpoints and averages as they lie on disk."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from ckptavg.determinism import reproducible
from ckptavg.discover import discover
from ckptavg.evaluator import Watch
from ckptavg.layout import check_agreement
from ckptavg.mixture import Mixture
from ckptavg.objective import Score, Split
from ckptavg.session import pick_device
from ckptavg.tasks.python_file import PythonTask


def evaluate(
    files: Sequence[Path], task: str, *, key: str | None = None, device: str = "auto", seed: int = 0,
    watch: Watch | None = None,
) -> list[tuple[Path, dict[Split, Score]]]:  # fmt: skip
    """The scores of each file on validation and test data, with the BatchNorm statistics that it holds.

    Args:
        files: checkpoints or earlier outputs; a directory stands for the checkpoints in it.
        task: a Python file or dotted module.
        key: the sub-dictionary of each that is the model.
        device: see `ckptavg.options.Options`.
        seed: of the loaders.
        watch: is told the progress.
    """
    with reproducible(seed), ExitStack() as stack:
        # one after the other, because files that are only scored need no step to be put in order by
        found = [one for file in files for one in stack.enter_context(discover([file], key=key)).checkpoints]
        check_agreement(found)
        # one row is enough of a matrix: every file is loaded into the model as it is
        mixture = Mixture(PythonTask(task), found[:1], device=pick_device(device), seed=seed, watch=watch)
        scored: list[tuple[Path, dict[Split, Score]]] = []
        for i, checkpoint in enumerate(found):
            mixture.load(checkpoint.tensors, checkpoint.read_into)
            scored.append(
                (checkpoint.path, {split: mixture.evaluate(split, str(checkpoint.path)) for split in mixture.splits})
            )
            mixture.progress("scoring", i + 1, len(found))
        return scored
