"""Scoring of checkpoints and averages as stored on disk."""

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from ckptavg.checkpoints.discover import discover
from ckptavg.checkpoints.integrity import not_finite
from ckptavg.checkpoints.state_dict import check_agreement
from ckptavg.context import Run
from ckptavg.errors import TaskError, UsageError
from ckptavg.filesystem.regular_file import is_folder
from ckptavg.objective.mixture import Mixture
from ckptavg.options import Options
from ckptavg.pipeline.preflight import pick_device
from ckptavg.pipeline.session import translate_errors
from ckptavg.pipeline.task_choice import build_task, with_task
from ckptavg.readers import FLOATING
from ckptavg.report.result import Evaluation, FileScores
from ckptavg.runtime.progress import Progress, Watch
from ckptavg.runtime.seeds import reproducible
from ckptavg.score import Score, Split


def evaluate(files: Sequence[Path], options: Options, watch: Watch | None = None) -> Evaluation:
    """Score each file on validation and test data, with the BatchNorm statistics stored in it.

    Args:
        files: checkpoints, outputs of ckptavg, or directories of checkpoints.
        options: key, device, seed and the task, which is looked up as `find_task` does.
    """
    # an output often lies beside ./task.py, so only directories are searched for one that must not be run
    parsed = with_task(options, [file for file in files if is_folder(file)], required=True)
    if not parsed.ways:
        raise UsageError("scoring needs a task file, --val or --lm-eval", hint="`ckptavg init` writes ./task.py")
    if parsed.score_cmd is not None:
        raise UsageError("eval does not support --score-cmd: run the command on the file directly")
    with translate_errors(), reproducible(parsed.seed), ExitStack() as stack:
        # each path on its own, because files that are only scored need no step number to be ordered by
        found = [stack.enter_context(discover([file], key=parsed.key)) for file in files]
        checkpoints = [checkpoint for discovered in found for checkpoint in discovered.checkpoints]
        check_agreement(checkpoints, mixed=True)
        device, progress = pick_device(parsed.device), Progress(watch)
        run = Run(device=device, workers=parsed.workers, seed=parsed.seed, progress=progress)
        # a matrix of one candidate is enough: every file is loaded directly into the model
        mixture = Mixture(build_task(parsed, checkpoints[0].folder), checkpoints[:1], run)
        scored: list[FileScores] = []
        for i, checkpoint in enumerate(checkpoints):
            mixture.mixed.candidates.load(checkpoint.tensors, checkpoint.read_into)
            score = partial(mixture.scoring.evaluate, what=str(checkpoint.path))
            try:
                scores: dict[Split, Score] = {split: score(split) for split in mixture.splits}
            except TaskError as error:
                floating = [name for name in checkpoint.names if checkpoint.spec(name).dtype in FLOATING]
                if bad := next(filter(None, map(partial(not_finite, checkpoint), floating)), None):
                    bad.hint = None  # eval has no --exclude
                    raise bad from error
                raise
            scored.append(FileScores(path=checkpoint.path, scores=scores))
            progress("scoring", i + 1, len(checkpoints))
        for note in mixture.notes:
            progress(note, 0, 0)
        return Evaluation(files=scored)
