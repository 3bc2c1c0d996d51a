"""The options that all strategies share: input, output, scoring, resources."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from ckptavg.checkpoints.window import Window
from ckptavg.errors import UsageError
from ckptavg.objective import Parallel
from ckptavg.output.destination import destination
from ckptavg.runtime.workers import ALONE, TIMEOUT, Workers

BITS: Final = (32, 16, 8, 4, 2, 1)
_MOST_SEEDS: Final = 2**62  # torch takes 64 bits, and each pass over the data uses its own seed above this one


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options that every strategy shares.

    Attributes:
        output: the file to write; a path that ends in ``/`` or an existing directory gets ``model.safetensors``.
        task: a Python file or dotted module that scores mixtures.
        task_timeout: time limit in seconds for importing it and for each call of its functions.
        val: validation data for a Hugging Face model, instead of a task file; ``train`` and ``test`` likewise.
        batch_size: batch size for those data; None starts with 32 and halves it when memory runs out.
        trust_remote_code: run the code that the candidates' config names.
        score_cmd: a shell command that prints the score of a mixture, instead of a task file.
        score_key: key of the score in a JSON line on its stdout; None takes the last number.
        score_goal: whether a higher or a lower score is better.
        score_timeout: time limit of the command in seconds.
        lm_eval: tasks of lm-evaluation-harness, separated by commas, instead of a task file.
        key: the sub-dictionary of each checkpoint that is the model.
        window: which checkpoints are candidates.
        skip_bad: leave out checkpoints that are damaged or hold NaN, with a warning each, instead of refusing them.
        allow_nonfinite: average NaN and infinite weights like any other.
        wait_stable: first wait until no candidate has changed for this many seconds.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
        dtype: dtype of the output's floating-point tensors; None keeps the candidates' dtypes.
        seed: seed of all random numbers.
        deterministic: restrict torch to bitwise reproducible algorithms.
        bits: bits per element of the candidate matrix during a search, or ``auto``; the average is always exact.
        group_size: elements that share a scale and a zero point if ``bits`` < 32.
        offload: storage of the candidate matrix instead of the device: ``cpu`` (host memory) or ``disk``.
        precision: precision of search passes: ``float32`` (the model's own), ``bfloat16`` by autocast, or ``auto``.
        compile: compile the model's forward with torch.compile.
        holdout: fraction of the validation data reserved for the final scores if the task has no test data.
        max_shard_size: largest file size, such as ``5GB``, if the output is a directory; None writes one file.
        digests: write the SHA-256 of the sources into the metadata, which takes longer than an average.
        adapter: average the ``factors`` of PEFT adapters, which is approximate, or ``exact`` weights.
        rank: rank of an ``exact`` adapter; None keeps the sum of the candidates' ranks.
        force: replace an existing output.
        never_worse: write the best single candidate if it beats the selection on validation.
        baselines: also score last, SWA and LAWA.
        dry_run: print what would be done and stop.
        resume: continue from the journal of an interrupted run of the same command.
        keep_journal: keep the journal after the output is written.
        format: safetensors, or dcp, a torch.distributed.checkpoint directory from which FSDP can resume training.
        parallel: the work that ranks divide in a score; ``auto`` is candidates if several are scored, else batches.
        shard: shard the model and the candidates over the ranks, for a model that fits no single device.
        worker_timeout: seconds that a rank waits for the others.
        workers: the ranks of the run; see `ckptavg.runtime.workers.joined`.
    """

    output: Path | str = "averaged.safetensors"
    task: str | None = None
    task_timeout: float | None = None
    val: Path | str | None = None
    train: Path | str | None = None
    test: Path | str | None = None
    batch_size: int | None = None
    trust_remote_code: bool = False
    score_cmd: str | None = None
    score_key: str | None = None
    score_goal: Literal["max", "min"] = "max"
    score_timeout: float | None = None
    lm_eval: str | None = None
    key: str | None = None
    window: Window = field(default_factory=Window)
    skip_bad: bool = False
    allow_nonfinite: bool = False
    wait_stable: float | None = None
    device: str = "auto"
    dtype: str | None = None
    seed: int = 0
    deterministic: bool = False
    bits: int | Literal["auto"] = 32
    group_size: int = 128
    offload: Literal["none", "cpu", "disk"] = "none"
    precision: Literal["auto", "float32", "bfloat16"] = "float32"
    compile: bool = False
    holdout: float | None = None
    max_shard_size: str | None = None
    digests: bool = True
    adapter: Literal["factors", "exact"] = "factors"
    rank: int | None = None
    force: bool = False
    never_worse: bool = False
    baselines: bool = True
    dry_run: bool = False
    resume: bool = True
    keep_journal: bool = False
    format: Literal["safetensors", "dcp"] = "safetensors"
    parallel: Parallel = "auto"
    shard: bool = False
    worker_timeout: float = TIMEOUT
    workers: Workers = field(default=ALONE, repr=False)

    @property
    def destination(self) -> tuple[Path, Path | None]:
        """Return the result of `destination`, or the output path itself with ``--format dcp``."""
        return (Path(self.output), None) if self.format == "dcp" else destination(self.output)

    @property
    def ways(self) -> list[str]:
        """The names of the given options that define the score of a mixture."""
        ways = {"--task": self.task, "--val": self.val, "--score-cmd": self.score_cmd, "--lm-eval": self.lm_eval}
        return [name for name, value in ways.items() if value is not None]

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, str | Path) and "\0" in str(value):
                raise UsageError(f"--{name.replace('_', '-')} has a NUL character in it")
        if not str(self.output):
            raise UsageError("--output is empty: name a file or a directory")
        if len(self.ways) > 1:
            raise UsageError(f"{' and '.join(self.ways)} each define how a mixture is scored: give only one")
        for name, value in (("--train", self.train), ("--test", self.test)):
            if value is not None and self.val is None:
                raise UsageError(f"{name} goes with --val, which names the data for the search")
        if self.rank is not None and self.adapter != "exact":
            raise UsageError("--rank goes with --adapter exact")
        if self.max_shard_size is not None and self.destination[1] is None:
            raise UsageError("--max-shard-size needs a directory for its files", hint="end --output with a /")
        self._check_numbers()

    def _check_numbers(self) -> None:
        counts = (("--rank", self.rank), ("--batch-size", self.batch_size), ("--group-size", self.group_size))
        for name, value in counts:
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, not {value}")
        for name, value in (("--task-timeout", self.task_timeout), ("--score-timeout", self.score_timeout)):
            if value is not None and not 0 < value < math.inf:
                raise UsageError(f"{name} must be greater than 0, not {value}")
        if self.wait_stable is not None and not 0 <= self.wait_stable < math.inf:
            raise UsageError(f"--wait-stable must be 0 or more seconds, not {self.wait_stable}")
        if abs(self.seed) >= _MOST_SEEDS:
            raise UsageError(f"--seed must be between -2^62 and 2^62, not {self.seed}")
        if self.bits != "auto" and self.bits not in BITS:
            raise UsageError(f"--bits must be one of {', '.join(map(str, BITS))} or auto, not {self.bits}")
        self._check_search()
        if self.holdout is not None and not 0 < self.holdout < 1:
            raise UsageError(f"--holdout must be between 0 and 1, not {self.holdout}")
        self._check_workers()

    def _check_workers(self) -> None:
        if self.shard and self.workers.world_size == 1:
            raise UsageError("--shard needs several workers", hint="torchrun --nproc-per-node 8 -m ckptavg ...")
        if self.shard and (self.score_cmd is not None or self.lm_eval is not None):
            raise UsageError("--shard needs a loss: a task file or --val")
        if self.shard and (self.compile or self.precision != "float32"):
            unused = "--compile" if self.compile else f"--precision {self.precision}"
            raise UsageError(f"--shard is not supported with {unused}")
        if not self.worker_timeout > 0:
            raise UsageError(f"--worker-timeout must be greater than 0, not {self.worker_timeout}")

    def _check_search(self) -> None:
        """Check the options for candidate storage and model execution."""
        for name, allowed in (("offload", ("none", "cpu", "disk")), ("precision", ("auto", "float32", "bfloat16"))):
            if getattr(self, name) not in allowed:
                raise UsageError(f"--{name} must be one of {', '.join(allowed)}, not {getattr(self, name)}")
        if self.offload != "none" and self.bits != 32:
            raise UsageError(
                f"--offload keeps the candidates in full precision, --bits {self.bits} in fewer bits: give only one"
            )
        given = {
            "--offload": self.offload != "none",
            "--precision": self.precision != "float32",
            "--compile": self.compile,
        }
        if self.score_cmd is not None and any(given.values()):
            unused = ", ".join(name for name, asked in given.items() if asked)
            raise UsageError(f"{unused} applies to a model that ckptavg runs, but --score-cmd runs its own")
