"""The options that define how a mixture is scored."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from ckptavg.declaration import AT_LEAST_1, MAIN, POSITIVE, SCORING, Help, Limit, check, declared
from ckptavg.errors import UsageError

_FRACTION = Limit(lambda value: 0 < value < 1, "between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """One way of scoring mixtures (a task file, Hugging Face data, a command, or lm-evaluation-harness), and its data.

    The task's code and the data are part of a journal's fingerprint by their content.
    """

    task: Annotated[str | None, Help(
        MAIN, "Task file or module; else $CKPTAVG_TASK, ./task.py.",
        "A Python file or dotted module with model, loss and data.", "PATH", changes_measurements=False
    )] = None  # fmt: skip
    val: Annotated[Path | str | None, Help(
        MAIN, "Hugging Face validation data; no task file needed.", metavar="PATH", changes_measurements=False
    )] = None  # fmt: skip
    score_cmd: Annotated[str | None, Help(
        MAIN, "Command scoring {} or {dir}: 'python eval.py {}'.", "It prints the score of a file, or of a directory.",
        "CMD")] = None  # fmt: skip
    task_timeout: Annotated[float | None, Help(
        SCORING, "Limit for one call of a task function, such as a loss.", "Also for the import of the task.",
        "SECONDS", limit=POSITIVE, changes_measurements=False)] = None  # fmt: skip
    train: Annotated[Path | str | None, Help(
        SCORING, "Training data, with --val: JSONL, CSV, Parquet, images.", metavar="PATH", changes_measurements=False
    )] = None  # fmt: skip
    test: Annotated[Path | str | None, Help(
        SCORING, "Test data for an unbiased final score, with --val.", metavar="PATH", changes_measurements=False
    )] = None  # fmt: skip
    holdout: Annotated[float | None, Help(
        SCORING, "Validation share kept for the final score if no test data.", metavar="FRACTION", limit=_FRACTION
    )] = None  # fmt: skip
    batch_size: Annotated[int | None, Help(
        SCORING, "Batch size for --val; default 32, halved if out of memory.", "The default for --lm-eval is 8.", "N",
        limit=AT_LEAST_1)] = None  # fmt: skip
    labels: Annotated[str | None, Help(
        SCORING, "Class names by number for --val: ham,spam.", "Needed if data have names that config.json lacks.",
        "NAMES")] = None  # fmt: skip
    max_length: Annotated[int | None, Help(
        SCORING, "Cut texts of --val to N tokens; default as in training.",
        "That is the truncation in tokenizer.json, else the limit of the model and its tokenizer.", "N",
        limit=AT_LEAST_1)] = None  # fmt: skip
    base: Annotated[Path | str | None, Help(
        SCORING, "Base model of PEFT adapters, if not the one they name.", "A directory, or a name in the hub's cache.",
        "PATH")] = None  # fmt: skip
    trust_remote_code: Annotated[bool, Help(SCORING, "Run code that the checkpoints' config.json names.")] = False
    score_key: Annotated[str | None, Help(
        SCORING, "Key of the score in the JSON that --score-cmd prints.",
        "Dots go deeper. Needed if the JSON has several numbers; its last object with the key counts.", "KEY"
    )] = None  # fmt: skip
    score_goal: Annotated[Literal["max", "min"], Help(SCORING, "Whether a higher or a lower score wins.")] = "max"
    score_timeout: Annotated[float | None, Help(
        SCORING, "Limit for one run of --score-cmd.", metavar="SECONDS", limit=POSITIVE, changes_measurements=False
    )] = None  # fmt: skip
    score_jobs: Annotated[int, Help(
        SCORING, "Runs of --score-cmd at a time.", "For scores that do not depend on each other: not for the growing "
        "average of soup and aswa.", "N", limit=AT_LEAST_1, changes_measurements=False)] = 1  # fmt: skip
    keep_failed: Annotated[bool, Help(
        SCORING, "Keep the file for which --score-cmd failed.", "It is in OUTPUT.ckptavg/failed-NAME/.",
        changes_measurements=False)] = False  # fmt: skip
    lm_eval: Annotated[str | None, Help(
        SCORING, "Score by lm-evaluation-harness tasks, comma-separated.", metavar="TASKS")] = None  # fmt: skip
    objects: Any = field(default=None, repr=False)  # a `ckptavg.tasks.objects.TaskObjects`, from Python

    @property
    def ways(self) -> list[str]:
        """The names of the given options that define the score of a mixture."""
        ways = {
            "--task": self.task, "--val": self.val, "--score-cmd": self.score_cmd, "--lm-eval": self.lm_eval,
            "model": self.objects,
        }  # fmt: skip
        return [name for name, value in ways.items() if value is not None]

    def __post_init__(self) -> None:
        check(self)
        if len(self.ways) > 1:
            raise UsageError(f"{' and '.join(self.ways)} each define how a mixture is scored: give only one")
        for name, value in (("--train", self.train), ("--test", self.test)):
            if value is not None and self.val is None:
                raise UsageError(f"{name} goes with --val, which names the data for the search")
        for name, value in (("--labels", self.labels), ("--max-length", self.max_length)):
            if value is not None and self.val is None:
                raise UsageError(f"{name} goes with --val, whose data it describes")
        if self.base is not None and not {"--val", "--lm-eval"}.intersection(self.ways):
            raise UsageError("--base goes with --val or --lm-eval, which load the base model of adapters")
        if self.holdout is not None and (own := {"--score-cmd", "--lm-eval"}.intersection(self.ways)):
            raise UsageError(f"--holdout divides the data of a task file or of --val; {own.pop()} has its own")


def check_unscored(given: Mapping[str, Any]) -> None:
    """Raise UsageError if ``given`` has an option of a score: ``inspect`` without ``--basin`` scores nothing."""
    unused = [o.flag for o in declared(TaskOptions) if given.get(o.name, o.default) != o.default]
    if unused:
        message = f"{', '.join(unused)} says how candidates are scored, which inspect does with --basin only"
        raise UsageError(message, hint=f"--basin, or leave out {' '.join(unused)}")
