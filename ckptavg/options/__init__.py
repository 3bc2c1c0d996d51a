"""What is common to all strategies: where from, where to, with what and how."""

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
_MOST_SEEDS: Final = 2**62  # torch takes 64 bits, and each pass over the data has a seed of its own above this one


@dataclass(frozen=True, kw_only=True)
class Options:
    """The settings that every strategy shares.

    Attributes:
        output: the file to write; a path that ends in ``/`` or an existing directory gets ``model.safetensors``.
        task: a Python file or dotted module that scores mixtures.
        task_timeout: seconds that importing it, or one call of one of its functions, may take.
        val: validation data for a Hugging Face model, instead of a task file; ``train`` and ``test`` likewise.
        batch_size: of those data; None begins with 32 and halves it when memory runs out.
        trust_remote_code: let the candidates' config name code to run.
        score_cmd: a shell command that prints the score of a mixture, instead of a task file.
        score_key: the entry of a JSON line on its stdout that is the score; None is the last number.
        score_goal: whether a larger or a smaller one is better.
        score_timeout: seconds it may take.
        lm_eval: tasks of lm-evaluation-harness, separated by commas, instead of a task file.
        key: the sub-dictionary of each checkpoint that is the model.
        window: which checkpoints are candidates.
        skip_bad: leave out checkpoints that are damaged or hold NaN, with a warning each, instead of refusing them.
        allow_nonfinite: average NaN and infinite weights like any other.
        wait_stable: first wait until no candidate has changed for so many seconds.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
        dtype: of the output's floating-point tensors; None is the candidates' own.
        seed: of everything random.
        deterministic: let torch use algorithms only that repeat to the bit.
        bits: of an element of the candidate matrix while searching, or ``auto``; the average is exact whatever it is.
        group_size: elements that share a scale and a zero point where ``bits`` < 32.
        offload: where the candidate matrix lies instead of on the device: ``cpu``, the host's memory, or ``disk``.
        precision: of the passes of a search: ``float32`` (the model's own), ``bfloat16`` by autocast, or ``auto``.
        compile: let torch.compile have the model's forward.
        holdout: the fraction of validation data kept for the final scores, where the task has no test data.
        max_shard_size: bytes of a file such as ``5GB``, where the output is a directory; None writes one file.
        digests: find the SHA-256 of the sources and write them into the metadata, which takes longer than an average.
        adapter: how PEFT adapters are averaged: their ``factors``, which is approximate, or ``exact`` in weight space.
        rank: of an ``exact`` adapter; None keeps all of it, the sum of the candidates' ranks.
        force: replace an existing output.
        never_worse: write the best single candidate where it beats the selection on validation.
        baselines: score last, SWA and LAWA too.
        dry_run: say what would be done, and do nothing.
        resume: go on from the journal that an interrupted run of the same command left.
        keep_journal: leave the journal when the output is written.
        format: one of safetensors, or a directory of torch.distributed.checkpoint that FSDP goes on training from.
        parallel: what several workers divide in a score; ``auto`` is candidates where several are wanted, else batches.
        shard: divide the model and the candidates among several workers, none of whom could have them whole.
        worker_timeout: seconds that a worker waits for the others.
        workers: the processes that do it together; see `ckptavg.runtime.workers.joined`.
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
        """See `destination`; a directory of torch.distributed.checkpoint is what is written itself."""
        return (Path(self.output), None) if self.format == "dcp" else destination(self.output)

    @property
    def ways(self) -> list[str]:
        """The options given that say how a mixture is scored."""
        ways = {"--task": self.task, "--val": self.val, "--score-cmd": self.score_cmd, "--lm-eval": self.lm_eval}
        return [name for name, value in ways.items() if value is not None]

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, str | Path) and "\0" in str(value):
                raise UsageError(f"--{name.replace('_', '-')} has a NUL character in it")
        if not str(self.output):
            raise UsageError("--output is empty: name a file or a directory")
        if len(self.ways) > 1:
            raise UsageError(f"{' and '.join(self.ways)} both say how a mixture is scored: give one of them")
        for name, value in (("--train", self.train), ("--test", self.test)):
            if value is not None and self.val is None:
                raise UsageError(f"{name} goes with --val, the data that a search learns from")
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
            raise UsageError(f"a sharded model runs as it is: --shard goes without {unused}")
        if not self.worker_timeout > 0:
            raise UsageError(f"--worker-timeout must be greater than 0, not {self.worker_timeout}")

    def _check_search(self) -> None:
        """How the candidates are kept and the model is run."""
        for name, allowed in (("offload", ("none", "cpu", "disk")), ("precision", ("auto", "float32", "bfloat16"))):
            if getattr(self, name) not in allowed:
                raise UsageError(f"--{name} must be one of {', '.join(allowed)}, not {getattr(self, name)}")
        if self.offload != "none" and self.bits != 32:
            raise UsageError(
                f"--offload keeps the candidates as they are, and --bits {self.bits} in fewer bits: give one"
            )
        given = {
            "--offload": self.offload != "none",
            "--precision": self.precision != "float32",
            "--compile": self.compile,
        }
        if self.score_cmd is not None and any(given.values()):
            unused = ", ".join(name for name, asked in given.items() if asked)
            raise UsageError(f"{unused} is about a model that ckptavg runs, and --score-cmd runs its own")
