"""The program from top to bottom, one stage a line."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch

from ckptavg import batchnorm, companions, provenance
from ckptavg.average import not_averaged, output_specs, weighted_average
from ckptavg.checkpoint import Checkpoint
from ckptavg.coefficients import Coefficients
from ckptavg.determinism import reproducible
from ckptavg.discover import Found, discover
from ckptavg.dtypes import FLOATING, TORCH
from ckptavg.errors import CkptavgError, OutOfMemoryError, UsageError, is_out_of_memory
from ckptavg.judge import Judgement, judge
from ckptavg.layout import check_agreement
from ckptavg.mixture import Mixture, Watch
from ckptavg.objective import Learned, Objective, Score, Split, Strategy
from ckptavg.result import CandidateResult, Output, Result
from ckptavg.strategies import strategies
from ckptavg.tasks.python_file import PythonTask
from ckptavg.window import Window
from ckptavg.write import SafetensorsFile, preflight

if TYPE_CHECKING:
    from torch import Tensor

MEGABYTE: Final = 10**6
FILE_NAME: Final = "model.safetensors"  # in an output directory, what every loader looks for


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is common to all strategies.

    Attributes:
        output: the file to write; a path that ends in ``/`` or an existing directory gets ``model.safetensors``.
        task: a Python file or dotted module, or None where nothing is scored.
        key: the sub-dictionary of each checkpoint that is the model.
        window: which checkpoints are candidates.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
        dtype: of the output's floating-point tensors; None is the candidates' own.
        seed: of everything random.
        force: replace an existing output.
        never_worse: write the best single candidate where it beats the selection on validation.
        baselines: score last, SWA and LAWA too.
        dry_run: say what would be done, and do nothing.
    """

    output: Path | str = "averaged.safetensors"
    task: str | None = None
    key: str | None = None
    window: Window = field(default_factory=Window)
    device: str = "auto"
    dtype: str | None = None
    seed: int = 0
    force: bool = False
    never_worse: bool = False
    baselines: bool = True
    dry_run: bool = False


def run(paths: Sequence[Path], strategy: Strategy, options: Options, watch: Watch | None = None) -> Result:
    """Learn coefficients for the checkpoints under ``paths`` and write their average.

    Raises:
        CkptavgError: in one line, with the exit code of its class; nothing is written then.
    """
    path, folder = destination(options.output)
    if folder and folder.is_dir():
        companions.check(folder)
    preflight(folder if folder and not folder.is_dir() else path, options.force)
    with _out_of_memory_said(), reproducible(options.seed), discover(paths, options.window, options.key) as found:
        check_agreement(found.checkpoints)
        objective = _objective(found, strategy, options, watch)
        if options.dry_run:
            return _result(found, strategy, options, warnings=_plan(found.checkpoints, path, options))
        learned = strategy.learn(objective)
        mixture = objective if isinstance(objective, Mixture) else None
        judgement = judge(mixture, learned.coefficients, options) if mixture else Judgement(learned.coefficients)
        with companions.made(folder):
            output, scores = _write(path, found.checkpoints, judgement.coefficients, strategy, options, mixture, watch)
        copied = companions.copy(found.checkpoints[judgement.coefficients.selected[-1]], folder) if folder else ()
        return _result(
            found,
            strategy,
            options,
            learned=learned,
            judgement=judgement,
            scores=scores,
            output=output,
            mixture=mixture,
            warnings=_doubts(found.checkpoints[0], judgement.coefficients, mixture, copied),
        )


def destination(output: Path | str) -> tuple[Path, Path | None]:
    """The file to write, and its directory where the directory is what was asked for."""
    if str(output).endswith("/") or Path(output).is_dir():
        return Path(output) / FILE_NAME, Path(output)
    return Path(output), None


def pick_device(name: str) -> torch.device:
    """The device ``name`` means here.

    Raises:
        UsageError: if there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"--device {name}: {str(error).splitlines()[0]}", hint="use --device cpu, or auto for the best there is"
        ) from error
    return device


class _Untasked:
    """An objective for strategies that only want to know how many candidates there are."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.generator = torch.Generator()

    def uniform(self) -> Tensor:
        return torch.full((self.n,), 1 / self.n, dtype=torch.float64)

    def loss(self, c_N: Tensor, on: Split | None = None) -> Tensor:
        raise AssertionError("a strategy that needs no task asked for a loss")

    def score(self, coefficients: Coefficients) -> Score:
        raise AssertionError("a strategy that needs no task asked for a score")

    def progress(self, stage: str, done: int, total: int, **figures: Tensor | float) -> None:
        return None


def _objective(found: Found, strategy: Strategy, options: Options, watch: Watch | None) -> Objective:
    if options.task is not None:
        task = PythonTask(options.task)
        return Mixture(task, found.checkpoints, device=pick_device(options.device), seed=options.seed, watch=watch)
    if strategy.needs_task:
        raise UsageError(
            f"{_name(strategy)} learns from data, so it needs a task file", hint="`ckptavg init` writes ./task.py"
        )
    return _Untasked(len(found.checkpoints))


def _write(
    path: Path,
    checkpoints: Sequence[Checkpoint],
    coefficients: Coefficients,
    strategy: Strategy,
    options: Options,
    mixture: Mixture | None,
    watch: Watch | None,
) -> tuple[Output, dict[Split, Score]]:
    """Stream the average into a file beside its destination, finish and score it there, then give it its name."""
    first = checkpoints[0]
    specs = output_specs(first, options.dtype)
    kept = not_averaged(first)
    recomputed = sorted(batchnorm.statistics(mixture.model) & specs.keys()) if mixture else []
    metadata = provenance.metadata(
        checkpoints, coefficients, _name(strategy), asdict(strategy),  # pyright: ignore[reportArgumentType]
        dtype=options.dtype, not_averaged=kept, recomputed=recomputed,
    )  # fmt: skip
    scores: dict[Split, Score] = {}
    with SafetensorsFile(path, specs, metadata, force=options.force) as out:
        done, total = 0, sum(spec.nbytes for spec in specs.values())
        for name, offset, data in weighted_average(checkpoints, coefficients, specs):
            out.write(name, offset, data)
            done += len(data)
            if watch:
                watch("averaging, MB", done // MEGABYTE, -(-total // MEGABYTE), {})
        if mixture:
            mixture.load(specs, out.read_into)
            mixture.recompute_batchnorm()
            state = mixture.model.state_dict()
            for name in recomputed:
                out.write(name, 0, _bytes(state[name], TORCH[specs[name].dtype]))
            for split in mixture.splits:
                scores[split] = mixture.evaluate(split, what="the average")
        for i in coefficients.selected:
            checkpoints[i].check_unchanged()
        out.commit()
    dtypes = sorted({spec.dtype for spec in specs.values() if spec.dtype in FLOATING})
    names = [str(TORCH[dtype]).removeprefix("torch.") for dtype in dtypes]
    return Output(
        path=path, sha256=out.sha256, bytes=out.size, dtype=", ".join(names), not_averaged=kept, recomputed=recomputed
    ), scores


def _bytes(tensor: Tensor, dtype: torch.dtype) -> memoryview:
    data = bytearray(tensor.numel() * dtype.itemsize)
    torch.frombuffer(data, dtype=dtype).copy_(tensor.flatten())
    return memoryview(data)


def _result(
    found: Found,
    strategy: Strategy,
    options: Options,
    *,
    learned: Learned | None = None,
    judgement: Judgement | None = None,
    scores: Mapping[Split, Score] | None = None,
    output: Output | None = None,
    mixture: Mixture | None = None,
    warnings: Sequence[str] = (),
) -> Result:
    coefficients = judgement.coefficients if judgement else None
    columns = learned.columns if learned else {}
    candidates = [
        CandidateResult(
            path=checkpoint.path,
            step=checkpoint.step,
            coefficient=coefficients.candidate(i) if coefficients else 0.0,
            score=judgement.singles[i] if judgement and judgement.singles else None,
            columns={name: values[i] for name, values in columns.items()},
        )
        for i, checkpoint in enumerate(found.checkpoints)
    ]
    result = Result(
        strategy=_name(strategy),
        settings=asdict(strategy),  # pyright: ignore[reportArgumentType]  # every strategy is a dataclass
        seed=options.seed,
        candidates=candidates,
        left_out=found.left_out,
        scores=scores or {},
        trace=learned.trace if learned else {},
        warnings=[*found.warnings, *warnings, *_notes(found.checkpoints)],
        output=output,
    )
    if judgement is None or mixture is None:
        return result
    return replace(
        result,
        baselines=judgement.baselines,
        best_step=judgement.best_step,
        scored_on=mixture.scored_on,
        verdict=judgement.verdict,
        worse=judgement.worse,
        cost=mixture.cost(),
    )


def _plan(checkpoints: Sequence[Checkpoint], path: Path, options: Options) -> list[str]:
    first = checkpoints[0]
    written = sum(spec.nbytes for spec in output_specs(first, options.dtype).values())
    matrix = len(checkpoints) * first.numel * 4
    return [
        f"would read {len(checkpoints)} candidates of {first.size:,} bytes and write {written:,} bytes to {path}",
        f"the candidate matrix of a float32 model would take {matrix:,} bytes on --device {options.device}",
    ]


def _doubts(first: Checkpoint, coefficients: Coefficients, mixture: Mixture | None, copied: Sequence[str]) -> list[str]:
    said = [f"copied {', '.join(copied)} beside it"] if copied else []
    if mixture is None and len(coefficients.selected) > 1 and any(name.endswith("running_var") for name in first.names):
        said.append("BatchNorm statistics were averaged, which is wrong for a mixture; with --task they are recomputed")
    return said


def _notes(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """What there is to say of how checkpoints were read, each sentence once, with the first that it is true of."""
    first: dict[str, Path] = {}
    count: dict[str, int] = {}
    for checkpoint in checkpoints:
        for note in checkpoint.notes:
            first.setdefault(note, checkpoint.path)
            count[note] = count.get(note, 0) + 1
    return [f"{path}{f' and {count[n] - 1} more' if count[n] > 1 else ''}: {n}" for n, path in first.items()]


def _name(strategy: Strategy) -> str:
    return next(name for name, cls in strategies().items() if isinstance(strategy, cls))


@contextmanager
def _out_of_memory_said() -> Generator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, CkptavgError) or not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(
            f"out of memory: {str(error).splitlines()[0] if str(error) else 'the host has none left'}",
            hint="use fewer candidates (--last, --every), smaller batches in the task, or --device cpu",
        ) from error
