"""The options that commands share, and how they become the arguments of `ckptavg.pipeline.run`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, TypeAlias

import typer

from ckptavg.runtime.workers import TIMEOUT

if TYPE_CHECKING:
    from ckptavg.report.result import Comparison, Landscape, Result

Report: TypeAlias = "Result | Comparison | Landscape"

MAIN: Final = None  # Typer's own panel "Options", which comes first
CANDIDATES: Final = "Advanced: candidates"
SCORING: Final = "Advanced: scoring"
SEARCH: Final = "Advanced: search"
OUTPUT: Final = "Advanced: output"
WORKERS: Final = "Advanced: several processes (torchrun)"
RUN: Final = "Advanced: run and report"


def option(panel: str | None, text: str, *names: str, **more: Any) -> Any:
    """Return a Typer option listed in `panel` of the help page."""
    return typer.Option(*names, help=text, rich_help_panel=panel, **more)


Paths = Annotated[
    list[Path],
    typer.Argument(metavar="CKPTS", help="Checkpoint directories, or single checkpoints.", readable=False),
]

TaskFile = Annotated[
    str | None,
    option(MAIN, "Task file or module; else $CKPTAVG_TASK, ./task.py.", metavar="PATH"),
]
Val = Annotated[
    str | None,
    option(MAIN, "Hugging Face validation data; no task file needed.", metavar="PATH"),
]
ScoreCmd = Annotated[
    str | None,
    option(MAIN, "Command scoring {} or {dir}: 'python eval.py {}'.", metavar="CMD"),
]
LastN = Annotated[int | None, option(MAIN, "Use only the last N checkpoints.", "--last", metavar="N")]
Output = Annotated[
    str, option(MAIN, "File to write; a directory/ gets model.safetensors.", "-o", "--output", metavar="PATH")
]
Force = Annotated[bool, option(MAIN, "Replace an existing output.", "--force")]
Device = Annotated[str, option(MAIN, "auto, cpu, cuda, cuda:1 or mps.", metavar="DEVICE")]
DryRun = Annotated[bool, option(MAIN, "Show what would be done, and stop.", "--dry-run")]

Include = Annotated[str | None, option(CANDIDATES, "Only checkpoints whose name matches this glob.", metavar="GLOB")]
Exclude = Annotated[str | None, option(CANDIDATES, "No checkpoints whose name matches this glob.", metavar="GLOB")]
Start = Annotated[int | None, option(CANDIDATES, "First training step to use.", metavar="STEP")]
Stop = Annotated[int | None, option(CANDIDATES, "Last training step to use.", metavar="STEP")]
Every = Annotated[int | None, option(CANDIDATES, "Every N-th checkpoint, counted back from the last.", metavar="N")]
Key = Annotated[
    str | None, option(CANDIDATES, "Entry of each file that is the model, such as state_dict_ema.", metavar="KEY")
]
SkipBad = Annotated[
    bool, option(CANDIDATES, "Leave out damaged or NaN checkpoints, with a warning each.", "--skip-bad")
]
AllowNonfinite = Annotated[
    bool, option(CANDIDATES, "Average NaN and infinite weights instead of refusing them.", "--allow-nonfinite")
]
WaitStable = Annotated[
    float | None, option(CANDIDATES, "First wait until no checkpoint has changed for SECONDS.", metavar="SECONDS")
]

TaskTimeout = Annotated[
    float | None, option(SCORING, "Limit for one call of a task function, such as a loss.", metavar="SECONDS")
]
Train = Annotated[
    str | None, option(SCORING, "Training data, with --val: JSONL, CSV, Parquet, images.", metavar="PATH")
]
Test = Annotated[str | None, option(SCORING, "Test data for an unbiased final score, with --val.", metavar="PATH")]
BatchSize = Annotated[
    int | None, option(SCORING, "Batch size for --val; default 32, halved if out of memory.", metavar="N")
]
TrustRemoteCode = Annotated[
    bool, option(SCORING, "Run code that the checkpoints' config.json names.", "--trust-remote-code")
]
ScoreKey = Annotated[
    str | None, option(SCORING, "Key of the score in JSON output; else the last number.", metavar="KEY")
]
ScoreGoal = Annotated[Literal["max", "min"], option(SCORING, "Whether a higher or a lower score wins.")]
ScoreTimeout = Annotated[float | None, option(SCORING, "Limit for one run of --score-cmd.", metavar="SECONDS")]
LmEval = Annotated[
    str | None, option(SCORING, "Score by lm-evaluation-harness tasks, comma-separated.", metavar="TASKS")
]
Holdout = Annotated[
    float | None, option(SCORING, "Validation share kept for the final score if no test data.", metavar="FRACTION")
]

Bits = Annotated[
    Literal["32", "16", "8", "4", "2", "1", "auto"],
    option(SEARCH, "Bits per candidate weight."),
]
GroupSize = Annotated[int, option(SEARCH, "Weights per scale below 32 bits.", metavar="N")]
Offload = Annotated[
    Literal["none", "cpu", "disk"],
    option(SEARCH, "Keep candidates off the device."),
]
Precision = Annotated[
    Literal["float32", "bfloat16", "auto"],
    option(SEARCH, "Autocast for search passes."),
]
Compile = Annotated[bool, option(SEARCH, "Use torch.compile; pays in long searches.", "--compile")]
Seed = Annotated[int, option(SEARCH, "Seed of all random numbers.", metavar="N")]
Deterministic = Annotated[bool, option(SEARCH, "Use deterministic algorithms; may be slower.", "--deterministic")]

Dtype = Annotated[
    Literal["float64", "float32", "float16", "bfloat16"] | None,
    option(OUTPUT, "float64|float32|float16|bfloat16; default as stored.", metavar="DTYPE"),
]
NeverWorse = Annotated[bool, option(OUTPUT, "Write the best single checkpoint if it scores higher.", "--never-worse")]
MaxShardSize = Annotated[
    str | None, option(OUTPUT, "In a directory: files of at most SIZE, such as 5GB.", metavar="SIZE")
]
AdapterMode = Annotated[
    Literal["factors", "exact"],
    option(OUTPUT, "Average PEFT factors (approximate) or exact weights."),
]
Rank = Annotated[int | None, option(OUTPUT, "Reduce the adapter of --adapter exact to rank N.", metavar="N")]
Format = Annotated[
    Literal["safetensors", "dcp"],
    option(OUTPUT, "dcp: torch.distributed.checkpoint, to train further."),
]
Digests = Annotated[bool, option(RUN, "Store the sources' SHA-256.")]

Resume = Annotated[bool, option(RUN, "Continue an interrupted run.")]
KeepJournal = Annotated[bool, option(RUN, "Keep OUTPUT.ckptavg/ after the run.", "--keep-journal")]
Parallel = Annotated[
    Literal["auto", "batches", "candidates"],
    option(WORKERS, "What ranks divide in a score."),
]
Shard = Annotated[bool, option(WORKERS, "Shard a model that fits no single device.", "--shard")]
WorkerTimeout = Annotated[float, option(WORKERS, "Timeout between ranks.", metavar="SECONDS")]

Baselines = Annotated[bool, option(RUN, "Score last, SWA and LAWA.")]
Json = Annotated[bool, option(RUN, "Print the report as JSON on stdout.", "--json")]
ReportFile = Annotated[
    Path | None, option(RUN, "Also write the report to a file.", metavar="FILE.json", readable=False)
]
Quiet = Annotated[bool, option(RUN, "Print only errors and the result.", "-q", "--quiet")]
Verbose = Annotated[bool, option(RUN, "Print more detail, and tracebacks.", "-v", "--verbose")]


def shared_options(
    *,
    task: TaskFile = None,
    val: Val = None,
    score_cmd: ScoreCmd = None,
    last: LastN = None,
    output: Output = "averaged.safetensors",
    force: Force = False,
    device: Device = "auto",
    dry_run: DryRun = False,
    include: Include = None,
    exclude: Exclude = None,
    start: Start = None,
    stop: Stop = None,
    every: Every = None,
    key: Key = None,
    skip_bad: SkipBad = False,
    allow_nonfinite: AllowNonfinite = False,
    wait_stable: WaitStable = None,
    task_timeout: TaskTimeout = None,
    train: Train = None,
    test: Test = None,
    holdout: Holdout = None,
    batch_size: BatchSize = None,
    trust_remote_code: TrustRemoteCode = False,
    score_key: ScoreKey = None,
    score_goal: ScoreGoal = "max",
    score_timeout: ScoreTimeout = None,
    lm_eval: LmEval = None,
    seed: Seed = 0,
    deterministic: Deterministic = False,
    bits: Bits = "32",
    group_size: GroupSize = 128,
    offload: Offload = "none",
    precision: Precision = "float32",
    compile: Compile = False,
    never_worse: NeverWorse = False,
    dtype: Dtype = None,
    max_shard_size: MaxShardSize = None,
    format: Format = "safetensors",
    adapter: AdapterMode = "factors",
    rank: Rank = None,
    parallel: Parallel = "auto",
    shard: Shard = False,
    worker_timeout: WorkerTimeout = TIMEOUT,
    resume: Resume = True,
    keep_journal: KeepJournal = False,
    digests: Digests = True,
    baselines: Baselines = True,
    json: Json = False,
    report: ReportFile = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Declare the options of every strategy; only the signature is used."""
