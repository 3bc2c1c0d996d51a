"""The options that commands share, and how they become the arguments of `ckptavg.pipeline.run`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import typer

from ckptavg.runtime.workers import TIMEOUT

if TYPE_CHECKING:
    from ckptavg.report.result import Comparison, Landscape, Result

Report: TypeAlias = "Result | Comparison | Landscape"


def option(panel: str, text: str, *names: str, **more: Any) -> Any:
    """A Typer option under a heading of the help."""
    return typer.Option(*names, help=text, rich_help_panel=panel, **more)


Paths = Annotated[
    list[Path],
    typer.Argument(
        metavar="CKPTS", help="A directory of checkpoints, several, or the checkpoints themselves.", readable=False
    ),
]
Include = Annotated[str | None, option("Candidates", "Only checkpoints whose name matches this glob.")]
Exclude = Annotated[str | None, option("Candidates", "No checkpoints whose name matches this glob.")]
Start = Annotated[int | None, option("Candidates", "From this training step on.")]
Stop = Annotated[int | None, option("Candidates", "Up to this training step.")]
Every = Annotated[int | None, option("Candidates", "Every N-th, counted back from the last.")]
LastN = Annotated[int | None, option("Candidates", "The last N.", "--last")]
Key = Annotated[str | None, option("Candidates", "The part of each file that is the model, such as state_dict_ema.")]
SkipBad = Annotated[
    bool, option("Candidates", "Leave out bad checkpoints (damaged, NaN), with a warning each.", "--skip-bad")
]
AllowNonfinite = Annotated[
    bool, option("Candidates", "Average NaN and infinite weights too, instead of refusing them.", "--allow-nonfinite")
]
WaitStable = Annotated[
    float | None, option("Candidates", "First wait until no candidate has changed for so many seconds.")
]
TaskFile = Annotated[
    str | None,
    option("Task", "Python file or module: model, loss, data. Else CKPTAVG_TASK, ./task.py.", metavar="PATH"),
]
TaskTimeout = Annotated[
    float | None, option("Task", "Seconds that a call of the task's functions may take, such as one loss.")
]
Val = Annotated[
    str | None,
    option("Task", "Validation data for a Hugging Face model: JSONL, CSV, Parquet, images.", metavar="PATH"),
]
Train = Annotated[str | None, option("Task", "Training data, with --val.", metavar="PATH")]
Test = Annotated[str | None, option("Task", "Data for an unbiased final score, with --val.", metavar="PATH")]
BatchSize = Annotated[int | None, option("Task", "Of that data; default 32, halved when memory runs out.")]
TrustRemoteCode = Annotated[
    bool, option("Task", "Let the candidates' config.json name code to run.", "--trust-remote-code")
]
ScoreCmd = Annotated[
    str | None,
    option("Task", "A command that prints the score of {} (a file) or {dir}: 'python eval.py {}'.", metavar="CMD"),
]
ScoreKey = Annotated[
    str | None, option("Task", "The entry of a JSON line on its stdout that is the score; else the last number.")
]
ScoreGoal = Annotated[Literal["max", "min"], option("Task", "Whether a larger or a smaller score is better.")]
ScoreTimeout = Annotated[float | None, option("Task", "Seconds that the command may take.")]
LmEval = Annotated[str | None, option("Task", "Tasks of lm-evaluation-harness, separated by commas.", metavar="TASKS")]
Device = Annotated[str, option("Run", "auto, cpu, cuda, cuda:1, mps.")]
Seed = Annotated[int, option("Run", "Of everything random.")]
Deterministic = Annotated[
    bool, option("Run", "Only operations that repeat to the bit, which on a GPU may be slower.", "--deterministic")
]
Json = Annotated[bool, option("Report", "Print the report as JSON on stdout.", "--json")]
Quiet = Annotated[bool, option("Report", "Only errors and the result.", "-q", "--quiet")]
Verbose = Annotated[bool, option("Report", "More detail; tracebacks.", "-v", "--verbose")]

Bits = Annotated[
    Literal["32", "16", "8", "4", "2", "1", "auto"],
    option("Run", "Of the candidates while searching; auto is the most that fits. The average is exact in any case."),
]
GroupSize = Annotated[int, option("Run", "Elements that share a scale where there are fewer than 32 bits.")]
Offload = Annotated[
    Literal["none", "cpu", "disk"],
    option(
        "Run", "Where the candidates lie while searching, where the device has no room: host memory, or their files."
    ),
]
Precision = Annotated[
    Literal["float32", "bfloat16", "auto"],
    option(
        "Run",
        "Of the search's passes: bfloat16 by autocast; auto is that on a GPU that has it. Reported scores are float32.",
    ),
]
Compile = Annotated[bool, option("Run", "Let torch.compile have the model: pays in long searches.", "--compile")]
Holdout = Annotated[
    float | None,
    option("Run", "Keep this part of the validation data for the final score, where there are no test data."),
]
Output = Annotated[
    str, option("Output", "The file to write; a directory/ gets model.safetensors.", "-o", "--output", metavar="PATH")
]
Force = Annotated[bool, option("Output", "Replace an existing output.", "--force")]
Dtype = Annotated[
    Literal["float64", "float32", "float16", "bfloat16"] | None,
    option("Output", "Of the output; default the candidates' own."),
]
NeverWorse = Annotated[
    bool, option("Output", "Write the best single candidate where it scores higher.", "--never-worse")
]
MaxShardSize = Annotated[
    str | None, option("Output", "In a directory: files of at most this size, such as 5GB, and an index.")
]
AdapterMode = Annotated[
    Literal["factors", "exact"],
    option("Output", "PEFT adapters: average their factors (approximate), or exactly in weight space."),
]
Rank = Annotated[int | None, option("Output", "Reduce an exact adapter to this rank.")]
Format = Annotated[
    Literal["safetensors", "dcp"],
    option("Output", "dcp: a directory of torch.distributed.checkpoint, to go on training from."),
]
Digests = Annotated[
    bool,
    option("Output", "Write the sources' SHA-256 into the file, so that verify knows them; a search hides the time."),
]
DryRun = Annotated[bool, option("Run", "Say what would be done, and do nothing.", "--dry-run")]
Resume = Annotated[bool, option("Run", "Go on from what an interrupted run of this command has measured.")]
KeepJournal = Annotated[bool, option("Run", "Leave OUTPUT.ckptavg/ when the output is written.", "--keep-journal")]
Parallel = Annotated[
    Literal["auto", "batches", "candidates"],
    option("Workers", "What processes started by torchrun divide in a score."),
]
Shard = Annotated[
    bool, option("Workers", "Divide the model and its candidates among them, for one that fits no device.", "--shard")
]
WorkerTimeout = Annotated[float, option("Workers", "Seconds that one of them waits for the others.")]
Baselines = Annotated[bool, option("Report", "Score last, SWA and LAWA for comparison.")]
ReportFile = Annotated[
    Path | None, option("Report", "Write the report to a file too.", metavar="FILE.json", readable=False)
]


def shared_options(
    *,
    output: Output = "averaged.safetensors",
    force: Force = False,
    dtype: Dtype = None,
    never_worse: NeverWorse = False,
    max_shard_size: MaxShardSize = None,
    digests: Digests = True,
    format: Format = "safetensors",
    adapter: AdapterMode = "factors",
    rank: Rank = None,
    include: Include = None,
    exclude: Exclude = None,
    start: Start = None,
    stop: Stop = None,
    every: Every = None,
    last: LastN = None,
    key: Key = None,
    skip_bad: SkipBad = False,
    allow_nonfinite: AllowNonfinite = False,
    wait_stable: WaitStable = None,
    task: TaskFile = None,
    task_timeout: TaskTimeout = None,
    val: Val = None,
    train: Train = None,
    test: Test = None,
    batch_size: BatchSize = None,
    trust_remote_code: TrustRemoteCode = False,
    score_cmd: ScoreCmd = None,
    score_key: ScoreKey = None,
    score_goal: ScoreGoal = "max",
    score_timeout: ScoreTimeout = None,
    lm_eval: LmEval = None,
    device: Device = "auto",
    seed: Seed = 0,
    deterministic: Deterministic = False,
    bits: Bits = "32",
    group_size: GroupSize = 128,
    offload: Offload = "none",
    precision: Precision = "float32",
    compile: Compile = False,
    holdout: Holdout = None,
    dry_run: DryRun = False,
    resume: Resume = True,
    keep_journal: KeepJournal = False,
    parallel: Parallel = "auto",
    shard: Shard = False,
    worker_timeout: WorkerTimeout = TIMEOUT,
    baselines: Baselines = True,
    json: Json = False,
    report: ReportFile = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """The options of every strategy; only its signature is used."""
