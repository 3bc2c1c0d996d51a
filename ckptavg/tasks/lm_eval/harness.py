"""Scores of a language model in memory by lm-evaluation-harness: no candidate is written to disk or reloaded.

Shape suffixes: U = units of a score (examples of the harness's tasks).
"""

from __future__ import annotations

import copy
import difflib
import logging
import math
import random
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptavg.errors import CkptavgError, TaskError, UsageError, is_out_of_memory
from ckptavg.filesystem.regular_file import is_file, is_folder
from ckptavg.score import PerExample

if TYPE_CHECKING:
    from torch import nn

    from ckptavg.journal.pass_progress import PassProgress


@dataclass(frozen=True, kw_only=True)
class HarnessResult:
    """Result of one score on the harness's tasks.

    Attributes:
        value: mean over tasks of the main metric, negated where smaller is better.
        figures: task → metric → value as reported by the harness; a filter name follows after a comma.
        main: task → the main metric, which enters ``value``.
        examples: total number of examples of all tasks.
        each: the per-example values whose weighted mean is ``value``, in the order of tasks and examples; the examples
            of a task share its weight. None if a main metric is not a mean over examples. Losses are negated values.
    """

    value: float
    figures: Mapping[str, Mapping[str, float]]
    main: Mapping[str, str]
    examples: int
    each: PerExample | None = field(default=None, compare=False, repr=False)


class Harness:
    """Tasks of lm-evaluation-harness, built once and evaluated on many candidates.

    Prompts and few-shot examples are those of ``lm_eval --seed SEED`` without a chat template, the same for every
    candidate. The main metric of a task is acc_norm, else acc, else exact_match, else its first. Nothing is
    downloaded: data is read from files or the local cache of the `datasets` library, which also stores conversions.

    Args:
        tasks: names of tasks, groups or tags, patterns such as ``arc_*``, or YAML files; each task counts once.
        include_path: a directory with additional YAML files.
        limit: use only the first ``limit`` examples of each task.
        batch_size: batch size of the forward passes.
        seed: seed of the few-shot examples and of all other random draws.
    Raises:
        UsageError: if no task is named, a number is not positive or there is no such directory.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        include_path: Path | None = None,
        limit: int | None = None,
        batch_size: int = 8,
        seed: int = 0,
    ) -> None:
        if not tasks:
            raise UsageError("no lm-evaluation-harness task is named", hint="`lm_eval ls tasks` lists them")
        for name, number in (("limit", limit), ("batch size", batch_size)):
            if number is not None and number < 1:
                raise UsageError(f"the {name} of lm-evaluation-harness must be at least 1, not {number}")
        if include_path is not None and not is_folder(include_path):
            raise UsageError("no such directory of lm-evaluation-harness tasks", path=include_path)
        self._requested = tasks
        self._include_path = include_path
        self._limit = limit
        self._batch_size = batch_size
        self._seed = seed
        self._names: list[str] = []
        self._manager: Any = None
        self._adapter: Any = None
        self._tasks: dict[str, Any] = {}
        self._tokenizer: Any = None
        self._lm: Any = None

    def check(self) -> None:
        """Look up the task names; their data is read by the first score.

        Raises:
            UsageError: if lm-evaluation-harness is not installed, or has no task of a given name.
        """
        if self._names:
            return
        try:
            from lm_eval import tasks as library  # pyright: ignore[reportAttributeAccessIssue]
            from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            hint = "pip install 'ckptavg[lm-eval]'"
            raise UsageError(f"lm-evaluation-harness cannot be imported: {error}", hint=hint) from error
        path, names = self._include_path and str(self._include_path), list[str]()
        manager: Any = library.TaskManager(include_path=path, include_defaults=False)
        if not set(self._requested) <= set(manager.all_subtasks):  # the harness's 14,000 files take seconds to read
            manager = library.TaskManager(include_path=path)
        for name in self._requested:
            exact = name in manager.task_index or is_file(Path(name))
            matches: list[str] = [name] if exact else manager.match_tasks([name])
            if not matches:
                close = ", ".join(difflib.get_close_matches(name, manager.all_tasks, n=5))
                message = f"lm-evaluation-harness has no task {name}" + (f"; close matches: {close}" if close else "")
                raise UsageError(message, hint="`lm_eval ls tasks` lists them all")
            names += matches
        self._names, self._manager, self._adapter = list(dict.fromkeys(names)), manager, HFLM

    def score(self, model: nn.Module, tokenizer: Any, partial: PassProgress | None = None) -> HarnessResult:
        """Score a transformers model in memory, with its current weights and on its current device.

        Its parameters, its training mode and all random states are restored afterwards.

        Args:
            model: the module on its device; later calls may pass the same module with other weights.
            tokenizer: a transformers tokenizer, which is copied.
            partial: the answers that an interrupted run saved for this model.
        Raises:
            UsageError: if the model is not a transformers model, or there is no such task.
            TaskError: if a task cannot be built or fails, or a log-likelihood or main metric is not finite.
        """
        self.check()
        if tokenizer is None or not all(hasattr(model, name) for name in ("config", "device", "tie_weights")):
            got = "no tokenizer was given" if tokenizer is None else f"this is a {type(model).__name__}"
            raise UsageError(f"lm-evaluation-harness scores transformers models with their tokenizer; {got}")
        from lm_eval.evaluator import evaluate  # pyright: ignore[reportMissingImports]

        from ckptavg.journal.pass_progress import PassProgress
        from ckptavg.tasks.lm_eval.answer_cache import cached_answers

        try:
            with ExitStack() as after:
                _prepare_process(after, model, self._seed)
                tasks = self._tasks = self._tasks or self._build_tasks()
                lm = self._language_model(model, tokenizer)
                after.enter_context(cached_answers(lm, model, partial or PassProgress()))
                results = evaluate(lm=lm, task_dict={"tasks": tasks}, limit=self._limit, bootstrap_iters=0)
                return _result(tasks, results)
        except Exception as error:  # boundary to third-party code
            if isinstance(error, CkptavgError) or is_out_of_memory(error):
                raise
            names = ",".join(self._names)
            fetch = f"nothing is downloaded here; `lm_eval run --model dummy --tasks {names} --limit 1` downloads it"
            subject = names if self._tasks else f"{names} cannot be built"
            message = f"lm-evaluation-harness: {subject}: {type(error).__name__}: {' '.join(str(error).split())}"
            raise TaskError(message, hint="-v shows the traceback" if self._tasks else fetch) from error

    def _build_tasks(self) -> dict[str, Any]:
        tasks: dict[str, Any] = self._manager.load(self._names)["tasks"]
        for task in tasks.values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=self._seed)
            _build_requests_once(task)
        return tasks

    def _language_model(self, model: Any, tokenizer: Any) -> Any:
        """Return the harness's wrapper of the module, recreated only for another module, device or tokenizer."""
        lm = self._lm
        if lm is None or lm.model is not model or lm.device != model.device or self._tokenizer is not tokenizer:
            logging.disable(logging.WARNING)  # HFLM warns about receiving a module
            lm = self._adapter(model, tokenizer=copy.deepcopy(tokenizer), batch_size=self._batch_size)
            logging.disable(logging.INFO)
            self._lm, self._tokenizer = lm, tokenizer
        return lm


def _result(tasks: Mapping[str, Any], results: Any) -> HarnessResult:
    import torch

    counts = [int(results["n-samples"][name]["effective"]) for name in tasks]
    figures: dict[str, dict[str, float]] = {}
    main: dict[str, str] = {}
    terms: list[float] = []
    each: list[tuple[float, float]] = []
    complete = True
    for name, task in tasks.items():
        row = {key: figure for key, figure in results["results"][name].items() if "," in key and "_stderr," not in key}
        figures[name] = {key.removesuffix(",none"): float(row[key]) for key in row if isinstance(row[key], Real)}
        key = main[name] = _main_metric(task, figures[name])
        if not math.isfinite(figures[name][key]) or _has_nan(task):
            hint = "leave a broken candidate out with --exclude; `ckptavg inspect` lists them"
            raise TaskError(f"lm-evaluation-harness: {name}: a log-likelihood or {key} is not finite", hint=hint)
        sign = 1 if task.higher_is_better().get(key.partition(",")[0], True) else -1
        terms.append(sign * figures[name][key])
        values = _per_example(task, results["samples"][name], key)
        each += [(sign * value, sum(counts) / len(tasks) / len(values)) for value in values]
        complete = complete and bool(values)
    units = None
    if complete:
        values_U, examples_U = torch.tensor(each, dtype=torch.float64).T.contiguous()
        units = PerExample(values_U=values_U, losses_U=-values_U, examples_U=examples_U)
    value = math.fsum(terms) / len(terms)
    return HarnessResult(value=value, figures=figures, main=main, examples=sum(counts), each=units)


def _main_metric(task: Any, figures: Mapping[str, float]) -> str:
    """Return the key of the main metric; with several filters, that of the first."""
    for metric in ("acc_norm", "acc", "exact_match", *task.aggregation(), *figures):
        for key in figures:
            if metric in (key, key.partition(",")[0]):
                return key
    raise TaskError(f"lm-evaluation-harness: {task.task_name} has no metric that is a number")


def _has_nan(task: Any) -> bool:
    """Return whether a log-likelihood is NaN; accuracy would hide it: the argmax of NaN is the first answer."""
    answers = [answer for instance in task.instances for answer in instance.resps]
    numbers = [answer[0] if isinstance(answer, tuple) else answer for answer in answers]  # tuple: (number, is_greedy)
    return any(isinstance(number, float) and math.isnan(number) for number in numbers)


def _per_example(task: Any, samples: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    """Return the per-example values whose mean is ``key``, in order; empty if the metric is not a mean."""
    from lm_eval.api.metrics import mean  # pyright: ignore[reportMissingImports]

    metric, _, filtered = key.partition(",")
    values = [sample.get(metric) for sample in samples if sample["filter"] == (filtered or "none")]
    numbers = [float(value) for value in values if isinstance(value, Real)]
    is_mean = task.aggregation().get(metric, mean) is mean and len(numbers) == len(values)
    return numbers if is_mean else []


def _build_requests_once(task: Any) -> None:
    """Reuse the prompts, which do not depend on the weights, in later calls, and only clear the old answers."""
    build = task.build_all_requests

    def reuse(**settings: Any) -> None:
        if not getattr(task, "_instances", None):
            build(**settings)
        for instance in task.instances:
            instance.resps, instance.filtered_resps = [], {}

    task.build_all_requests = reuse


def _prepare_process(after: ExitStack, model: Any, seed: int) -> None:
    """Set evaluation mode, seed, offline mode and log level warning; undo all of it when ``after`` closes."""
    import datasets.config  # pyright: ignore[reportMissingImports]
    import numpy as np
    import torch
    from huggingface_hub import constants  # pyright: ignore[reportMissingImports]
    from tqdm import tqdm  # pyright: ignore[reportMissingModuleSource]

    indices = sorted({parameter.device.index for parameter in model.parameters() if parameter.is_cuda})
    after.enter_context(torch.random.fork_rng(devices=indices))
    after.callback(random.setstate, random.getstate())
    after.callback(np.random.set_state, np.random.get_state())
    random.seed(seed)
    np.random.seed(seed)
    for generator in (torch.default_generator, *(torch.cuda.default_generators[i] for i in indices)):
        generator.manual_seed(seed)
    for module in model.modules():
        _replace(after, module, "training", False)
    # tying would replace a parameter that is separate in the checkpoints
    after.callback(delattr, model, "tie_weights")
    model.tie_weights = lambda: None
    for library in (constants, datasets.config):
        _replace(after, library, "HF_HUB_OFFLINE", True)
    after.callback(logging.disable, logging.root.manager.disable)
    logging.disable(max(logging.INFO, logging.root.manager.disable))
    original_init = tqdm.__init__
    hidden: Any = lambda bar, *args, **kwargs: original_init(bar, *args, **{**kwargs, "disable": True})  # noqa: E731
    _replace(after, tqdm, "__init__", hidden)  # the harness has no option to disable its progress bars


def _replace(after: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set an attribute of a third-party object; restore it when ``after`` closes."""
    after.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)
