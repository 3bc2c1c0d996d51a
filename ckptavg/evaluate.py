"""Score checkpoints and averages as they lie on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ckptavg.determinism import reproducible
from ckptavg.discover import discover
from ckptavg.layout import check_agreement
from ckptavg.mixture import Mixture, Watch
from ckptavg.objective import Score, Split
from ckptavg.pipeline import pick_device
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
        device: see `ckptavg.pipeline.Options`.
        seed: of the loaders.
        watch: is told the progress.
    """
    with reproducible(seed), discover(files, key=key) as found:
        check_agreement(found.checkpoints)
        loaded = PythonTask(task)
        # one row is enough of a matrix: every file is loaded into the model as it is
        mixture = Mixture(loaded, found.checkpoints[:1], device=pick_device(device), seed=seed, watch=watch)
        scored: list[tuple[Path, dict[Split, Score]]] = []
        for i, checkpoint in enumerate(found.checkpoints):
            mixture.load(checkpoint.tensors, checkpoint.read_into)
            scored.append(
                (checkpoint.path, {split: mixture.evaluate(split, str(checkpoint.path)) for split in mixture.splits})
            )
            mixture.progress("scoring", i + 1, len(found.checkpoints))
        return scored
