"""Choice of the task file; a task file that lies among the checkpoints is never run unless named."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ckptavg.checkpoints.discover import Discovered
from ckptavg.errors import UsageError
from ckptavg.filesystem.regular_file import is_file
from ckptavg.options import Options, config_file
from ckptavg.tasks import Task


def with_task(options: Options, inputs: Sequence[Path], *, required: bool) -> Options:
    """Fill in the task file from `find_task`, unless ``options`` select another way to score mixtures."""
    if set(options.ways) - {"--task"}:
        return options
    return replace(options, task=find_task(options.task, inputs, required=required))


def find_task(option: str | None, inputs: Sequence[Path], *, required: bool = True) -> str | None:
    """Return the option, else ``CKPTAVG_TASK``, else ``task`` of the configuration file, else ``./task.py``, else None.

    An unnamed task file is used only from the working directory: a ``task.py`` among the checkpoints is not run.

    Args:
        option: value of ``--task``.
        inputs: checkpoints, or directories of checkpoints.
    Raises:
        UsageError: if a task is required and the only one found is a ``./task.py`` among the checkpoints.
    """
    named = option or os.environ.get("CKPTAVG_TASK") or config_file.read(Path()).get("task")
    if named or not is_file(Path("task.py")):
        return named
    here = Path.cwd().resolve()
    if any(path.resolve() == here or (is_file(path) and path.resolve().parent == here) for path in inputs):
        if not required:
            return None
        message = "./task.py lies among the checkpoints, so it is not run unless named"
        raise UsageError(message, hint="if you trust it, name it: --task ./task.py")
    return "task.py"


def task_for(found: Discovered, options: Options) -> Task:
    """Build the task of a run on ``found``; with ``--holdout`` its validation data is split."""
    task = build_task(options, found.checkpoints[-1].folder)
    if options.holdout is None:
        return task
    if task.has("test"):
        message = "--holdout splits the validation data of a task without test data, but the task has test data"
        raise UsageError(message, path=task.source)
    if not task.has("val"):
        raise UsageError("--holdout splits the validation data, but the task has none", path=task.source)
    from ckptavg.tasks.holdout import HeldOut

    return HeldOut(task, "val", rest="val", to="test", fraction=options.holdout, seed=options.seed)


def build_task(options: Options, folder: Path) -> Task:
    """Build the task of --task, --val or --lm-eval; ``folder`` has a Hugging Face model's config and tokenizer."""
    if options.val is not None:
        from ckptavg.tasks.hugging_face import HuggingFaceTask, Overrides

        return HuggingFaceTask(
            folder, val=Path(options.val), train=None if options.train is None else Path(options.train),
            test=None if options.test is None else Path(options.test), batch_size=options.batch_size,
            trust_remote_code=options.trust_remote_code,
            overrides=Overrides(base=options.base, labels=options.labels, max_length=options.max_length),
        )  # fmt: skip
    if options.lm_eval is not None:
        from ckptavg.tasks.lm_eval import LmEvalTask

        names = [name.strip() for name in options.lm_eval.split(",") if name.strip()]
        return LmEvalTask(
            folder, names, batch_size=options.batch_size or 8, seed=options.seed,
            trust_remote_code=options.trust_remote_code, base=options.base,
        )  # fmt: skip
    given = options.objects or options.task
    assert given is not None
    from ckptavg.tasks.python_file import PythonTask

    return PythonTask(given, options.task_timeout)
