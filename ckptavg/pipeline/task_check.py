"""Check of a task before a run: it runs on one checkpoint, and what it does is described."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from ckptavg.batches.loader import BatchLoader, changing_data
from ckptavg.candidates.plan import Plan
from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.checkpoints.discover import Discovered, discover
from ckptavg.checkpoints.state_dict import check_agreement
from ckptavg.checkpoints.torch_dtypes import TORCH
from ckptavg.coefficients import Coefficients
from ckptavg.context import Run
from ckptavg.cost import CostMeter
from ckptavg.errors import TaskError, UsageError
from ckptavg.journal.tensor_json import raw
from ckptavg.objective.mixture import Mixture
from ckptavg.options import Options
from ckptavg.pipeline.preflight import pick_device
from ckptavg.pipeline.session import translate_errors
from ckptavg.pipeline.task_choice import task_for
from ckptavg.report.task_check import SplitCheck, TaskCheck
from ckptavg.runtime.progress import Progress, Watch
from ckptavg.runtime.seeds import reproducible, reseed
from ckptavg.score import DATA, METRIC, Split
from ckptavg.strategies.sewa import SeWA, default_steps
from ckptavg.strategies.solvers.subspace import default_epochs
from ckptavg.tasks import batch as batches
from ckptavg.tasks.batch import Batch

_LOSS: Final = "loss"  # no metric may have this name
_NUMERIC: Final = (int, float, Tensor)
_CLOSE: Final = 1e-4  # relative: losses of the same examples in another order of summation
_is_close: Final = partial(math.isclose, rel_tol=_CLOSE, abs_tol=1e-7)


@dataclass
class _Findings:
    remarks: list[str] = field(default_factory=list[str])
    problems: list[str] = field(default_factory=list[str])


def check_task(paths: Sequence[Path], options: Options, watch: Watch | None = None) -> TaskCheck:
    """Run the task on the last candidate under ``paths``, and describe what it does and what a search would cost.

    Raises:
        CkptavgError: if the task fails on it.
    """
    if set(options.ways) - {"--task", "--val", "model"} or not options.ways:
        raise UsageError("check needs a task file or --val", hint="`ckptavg init` writes ./task.py")
    with translate_errors(), reproducible(options.seed), discover(paths, options, options.key) as found:
        check_agreement(found.checkpoints, mixed=True)
        task, progress, notes = task_for(found, options), Progress(watch), _Findings()
        # the memory of these two candidates is not reported, but that of all
        run = Run(device=pick_device(options.device), workers=options.workers, seed=options.seed, progress=Progress())
        mixture = Mixture(task, found.checkpoints[-2:], run, options)  # two: the model must not keep the first one
        loader = BatchLoader(task, mixture.scored_on, run, CostMeter(), needs_two=lambda: bool(mixture.mixed.norms))
        mixture.prepare()
        loss, step = _check_loss(mixture, loader, notes)
        splits: dict[Split, SplitCheck] = {}
        more: list[Split] = ["train"] if task.has("train") and mixture.scored_on != "train" else []
        for split in (*mixture.splits, *more):
            progress(f"checking the {DATA[split]} data", 0, 0)
            splits[split] = _check_split(mixture, loader, split, notes)
        _check_fresh(mixture, found.checkpoints[-1], notes)
        _check_advice(mixture, notes)
        plan = Plan.of(
            mixture.mixed.model, len(found.checkpoints), bits=options.bits, group_size=options.group_size,
            offload=options.offload, device=run.device,
        )  # fmt: skip
        return TaskCheck(
            checkpoint=found.checkpoints[-1].path, candidates=len(found.checkpoints), model=_describe_model(mixture),
            loss=loss, metric=_describe_metric(mixture), splits=splits, memory=str(plan),
            searches=_searches(mixture, splits, step, found), problems=notes.problems,
            remarks=list(dict.fromkeys([*mixture.notes, *notes.remarks])),
        )  # fmt: skip


def _describe_model(mixture: Mixture) -> str:
    model, norms = mixture.mixed.model, len(mixture.mixed.norms)
    size = f"{type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters"
    return size + (f"; statistics of {norms} BatchNorm layers are recomputed from data" if norms else "")


def _last(mixture: Mixture) -> Coefficients:
    return Coefficients.uniform([mixture.n - 1], mixture.n)


def _describe_metric(mixture: Mixture) -> str:
    score, bounds = mixture.exact_score(_last(mixture), mixture.scored_on), mixture.task.metric_bounds
    if score.metric is None:
        return ""
    name = "" if score.name == METRIC else f"{score.name}, "
    goal = "larger" if math.copysign(1, score.value) == math.copysign(1, score.metric) else "smaller"
    return f"{name}{goal} is better" + ("" if bounds is None else f", from {bounds[0]:g} to {bounds[1]:g}")


def _check_loss(mixture: Mixture, loader: BatchLoader, notes: _Findings) -> tuple[str, float]:
    """Return what a call of the loss returns, and the seconds of a forward and backward pass over a batch."""
    run, task, counted = mixture.run, mixture.task, mixture.mixed.counted
    batch = next(loader.first(mixture.scored_on), None)
    if batch is None:
        raise loader.empty(mixture.scored_on)
    data = batches.to_device(batch.data, run.device)

    def loss(part: Any = data, seed: int = 0) -> Tensor:
        reseed(run.seed, seed)
        return counted.call(task.loss, batches.copied(part, run.device))

    def figures(part: Any) -> dict[str, float]:
        """Return the loss and the metrics that are one number for the batch."""
        metric = None if task.metric is None else counted.call(task.metric, batches.copied(part, run.device))
        values: Mapping[str, Any] = metric if isinstance(metric, Mapping) else {METRIC: metric}
        values = {**values, _LOSS: loss(part)}
        tensors = {name: torch.as_tensor(value) for name, value in values.items() if isinstance(value, _NUMERIC)}
        return {name: float(value) for name, value in tensors.items() if value.numel() == 1}

    with torch.no_grad():
        if mixture.n > 1:
            mixture.mixed.set_to(Coefficients.uniform([0], mixture.n), exact=True)
            loss()
        mixture.mixed.set_to(_last(mixture), exact=True)
        first, again, other = loss(), loss(), loss(seed=1)
        sums = _sums(batch, data, figures)
    words = "one value per example" if first.numel() > 1 else "the mean of a batch"
    for name in sums or ():
        function = f"{name}()" if name in (_LOSS, METRIC) else f"metric()[{name!r}]"
        decides = name in (_LOSS, mixture.exact_score(_last(mixture), mixture.scored_on).name)
        (notes.problems if decides else notes.remarks).append(
            f"{function} returns a sum, which grows with the batch: return the mean, or one value each"
        )
    if sums and _LOSS in sums:
        words = "the sum over a batch"
    elif sums is not None and first.numel() == 1:
        notes.remarks.append("loss() returns a mean: one value per example would give intervals over examples")
    if not torch.allclose(first, again, rtol=_CLOSE):
        notes.problems.append("loss() differs between two calls with the same seeds: does it keep a state?")
    elif not torch.allclose(first, other, rtol=_CLOSE):
        words += ", with random numbers (the same ones for every candidate)"
    step = _time_step(loss)
    if step is None:
        notes.remarks.append("loss() has no gradient, which sewa and twa need: does it use no_grad, detach or item()?")
    return words + (", without gradient" if step is None else ""), step or 0.0


def _time_step(loss: Callable[[], Tensor]) -> float | None:
    """Return the seconds of a forward and backward pass; None if the loss has no gradient."""
    step = 0.0
    for _ in range(2):  # the first backward pass takes longer
        start = time.perf_counter()
        with torch.enable_grad():
            value = loss().mean()
            if not value.requires_grad:
                return None
            value.backward()
        float(value.detach())  # waits for the device
        step = time.perf_counter() - start
    return step


def _sums(batch: Batch, data: Any, figures: Callable[[Any], dict[str, float]]) -> list[str] | None:
    """Return the names of the figures that are sums over a batch, by its halves; None if it cannot be divided."""
    if batch.size < 2:
        return None
    first_B = torch.arange(batch.size) < batch.size // 2
    try:
        whole, *halves = (
            figures(part) for part in (data, *(batches.select(data, kept) for kept in (first_B, ~first_B)))
        )
    except (TypeError, TaskError):  # a batch that is no list of examples, such as one whose first dimension is time
        return None
    share = batch.size // 2 / batch.size

    def is_sum(value: float, first: float, second: float) -> bool:
        return _is_close(first + second, value) and not _is_close(share * first + (1 - share) * second, value)

    shared = [name for name in whole if all(name in half for half in halves)]
    return [name for name in shared if is_sum(whole[name], *(half[name] for half in halves))]


def _check_split(mixture: Mixture, loader: BatchLoader, split: Split, notes: _Findings) -> SplitCheck:
    start = time.perf_counter()
    sizes, order = zip(*((batch.size, batch.checksum) for batch in loader.scored(split)), strict=True)
    again = BatchLoader(mixture.task, mixture.scored_on, mixture.run, CostMeter())  # reads the data, not its cache
    repeats = [batch.checksum for batch in again.scored(split)] == list(order)
    seconds, score, forwards = (time.perf_counter() - start) / 2, None, None
    if not repeats:
        notes.remarks.append(changing_data(split))
    if split in mixture.splits:
        score = mixture.exact_score(_last(mixture), split)
        start = time.perf_counter()
        mixture.scoring.recompute_batchnorm()
        before = mixture.meter["forward_batches"]
        mixture.scoring.evaluate(split, "the checkpoint")
        seconds = time.perf_counter() - start
        forwards = (mixture.meter["forward_batches"] - before) / len(sizes)
    return SplitCheck(
        examples=sum(sizes), batches=len(sizes), seconds=seconds, repeats=repeats,
        loss=score and score.loss, metric=score and score.metric, forwards=forwards,
    )  # fmt: skip


def _check_fresh(mixture: Mixture, checkpoint: Checkpoint, notes: _Findings) -> None:
    """Score the checkpoint in a fresh model too, as a run does with its output."""
    state = mixture.scoring.load_output(checkpoint.tensors, checkpoint.read_into)
    # in the file's dtype, which may not be the model's
    statistics = {name: state[name].to(TORCH[checkpoint.spec(name).dtype]) for name in mixture.statistics}
    recomputed = {name: bytes(raw(values)) for name, values in statistics.items()}

    def read_into(name: str, start: int, out: memoryview) -> None:
        if name in recomputed:
            begin = start * statistics[name].itemsize
            out[:] = recomputed[name][begin : begin + len(out)]
        else:
            checkpoint.read_into(name, start, out)

    try:
        mixture.score_output(_last(mixture), checkpoint.tensors, read_into)
    except TaskError as error:
        notes.problems.append(f"{error} ({error.hint})")


def _check_advice(mixture: Mixture, notes: _Findings) -> None:
    task = mixture.task
    for function, kinds in getattr(task, "undone", {}).items():
        changed = ", ".join(sorted(kinds))
        notes.remarks += (
            [f"{function}() changes the model ({changed}); that is undone after each call"] if kinds else []
        )
    if task.metric is not None and task.metric_bounds is None:
        notes.remarks.append("metric_bounds are not set: aswa --early-reject needs them")
    if not task.has("test"):
        notes.remarks.append(
            "there is no test data: --holdout 0.5 keeps half of the validation data for a fair final score"
        )
    if mixture.mixed.norms and not task.has("train"):
        notes.remarks.append("there is no training data: BatchNorm statistics are recomputed from validation data")


def _searches(mixture: Mixture, splits: dict[Split, SplitCheck], step: float, found: Discovered) -> dict[str, float]:
    """Return the estimated seconds of the searches at their default settings."""
    n, scored = len(found.checkpoints), splits[mixture.scored_on]
    sewa = SeWA()
    searches = {"best": n, "soup": 2 * n - 1, "aswa": 2 * n - 1}
    estimates = {name: count * scored.seconds for name, count in searches.items()}
    if mixture.losses is not None:
        estimates["sewa"] = default_steps(n) * sewa.samples * step + (sewa.verify + sewa.swaps + n) * scored.seconds
        estimates["twa"] = default_epochs(scored.batches) * scored.batches * step
    return estimates
