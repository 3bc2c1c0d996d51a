"""Task scored by lm-evaluation-harness on the model in memory: no candidate is written to disk or reloaded.

Shape suffixes: U = units of a score (examples of the harness's tasks).
"""

import difflib
import logging
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ckptavg.errors import CkptavgError, TaskError, UsageError, is_out_of_memory
from ckptavg.filesystem.regular_file import is_file
from ckptavg.runtime import signals
from ckptavg.score import PerExample, Score, Split
from ckptavg.tasks import Task
from ckptavg.tasks.hugging_face.architecture import Adapter, ModelFolder


class LmEvalTask(Task):
    """Task over the model and tokenizer of a Hugging Face directory, scored as a whole; it has no loss.

    The harness's tasks are built once. Prompts and few-shot examples are those of ``lm_eval --seed SEED`` without a
    chat template, the same for every candidate. The main metric of a task is acc_norm, else acc, else exact_match, else
    its first. Nothing is downloaded: data is read from files or the local cache of the `datasets` library, which also
    stores conversions.

    Args:
        folder: directory with config.json and the tokenizer, or a PEFT adapter.
        names: names of tasks, groups or tags, patterns such as ``arc_*``, or YAML files; each task counts once.
        batch_size: batch size of the forward passes.
        seed: seed of the few-shot examples and of all other random draws.
        trust_remote_code: run model code in the directory.
    Raises:
        UsageError: if no task is named, lm-evaluation-harness is not installed, or has no task of a given name.
        TaskError: if the directory has no supported model, or no tokenizer.
    """

    def __init__(
        self, folder: Path, names: Sequence[str], *, batch_size: int = 8, seed: int = 0, trust_remote_code: bool = False
    ) -> None:
        if not names:
            raise UsageError("no lm-evaluation-harness task is named", hint="`lm_eval ls tasks` lists them")
        try:
            from lm_eval import tasks as library  # pyright: ignore[reportAttributeAccessIssue]
            from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            hint = "pip install 'ckptavg[lm-eval]'"
            raise UsageError(f"lm-evaluation-harness cannot be imported: {error}", hint=hint) from error
        self.source = str(folder)
        self.whole = self.score
        self._batch_size = batch_size
        self._seed = seed
        self._adapter: Any = HFLM
        self._manager: Any = library.TaskManager()
        self._names = list(dict.fromkeys(match for name in names for match in self._matches(name)))
        self._tasks: dict[str, Any] = {}
        self._lm: Any = None
        self._folder = ModelFolder(folder, trust=trust_remote_code)
        self._tokenizer = self._folder.processor()

    def model(self) -> nn.Module:
        """See `Task.model` and `ModelFolder.build`."""
        return self._folder.build()

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Raise TaskError: the harness has no loss."""
        raise TaskError("lm-evaluation-harness has no loss to optimize", path=self.source)

    def has(self, split: Split) -> bool:
        """See `Task.has`; the harness's data counts as validation data."""
        return split == "val"

    def batches(self, split: Split) -> Iterator[Any]:
        """See `Task.batches`; always empty."""
        return iter(())

    def score(self, model: Any) -> Score:
        """Score a model with its current weights and on its current device; see `Task.whole`.

        Its parameters, its training mode and all random states are restored afterwards. The score is the mean over
        tasks of the main metric, negated where smaller is better. The weighted mean of its per-example values is the
        score (the examples of a task share its weight); it has none if a main metric is not a mean over examples.

        Raises:
            TaskError: if a task cannot be built or fails, or a log-likelihood or main metric is not finite.
        """
        from lm_eval.evaluator import evaluate  # pyright: ignore[reportMissingImports]

        model = model.model if isinstance(model, Adapter) else model
        try:
            with ExitStack() as after:
                _prepare_process(after, model, self._seed)
                after.callback(model.register_forward_pre_hook(lambda *_: signals.check()).remove)
                tasks = self._tasks = self._tasks or self._build_tasks()
                if self._lm is None or self._lm.model is not model or self._lm.device != model.device:
                    logging.disable(logging.WARNING)  # HFLM warns about receiving a module
                    self._lm = self._adapter(model, tokenizer=self._tokenizer, batch_size=self._batch_size)
                    logging.disable(logging.INFO)
                return _score(tasks, evaluate(lm=self._lm, task_dict={"tasks": tasks}, bootstrap_iters=0))
        except Exception as error:  # boundary to third-party code
            if isinstance(error, CkptavgError) or is_out_of_memory(error):
                raise
            names = ",".join(self._names)
            fetch = f"nothing is downloaded here; `lm_eval run --model dummy --tasks {names} --limit 1` downloads it"
            subject = names if self._tasks else f"{names} cannot be built"
            message = f"lm-evaluation-harness: {subject}: {type(error).__name__}: {' '.join(str(error).split())}"
            raise TaskError(message, hint="-v shows the traceback" if self._tasks else fetch) from error

    def _matches(self, name: str) -> list[str]:
        """Return the harness's names of tasks that a name, pattern or file denotes."""
        if name in self._manager.task_index or is_file(Path(name)):
            return [name]
        if matches := self._manager.match_tasks([name]):
            return matches
        close = ", ".join(difflib.get_close_matches(name, self._manager.all_tasks, n=5))
        message = f"lm-evaluation-harness has no task {name}" + (f"; close matches: {close}" if close else "")
        raise UsageError(message, hint="`lm_eval ls tasks` lists them all")

    def _build_tasks(self) -> dict[str, Any]:
        tasks: dict[str, Any] = self._manager.load(self._names)["tasks"]
        for task in tasks.values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=self._seed)
            _build_requests_once(task)
        return tasks


def _score(tasks: Mapping[str, Any], results: Any) -> Score:
    examples = sum(int(results["n-samples"][name]["effective"]) for name in tasks)
    terms: list[float] = []
    each: list[tuple[float, float]] = []
    names = set[str]()
    complete = True
    for name, task in tasks.items():
        figures = {
            key.removesuffix(",none"): float(figure)
            for key, figure in results["results"][name].items()
            if "," in key and "_stderr," not in key and isinstance(figure, Real)
        }
        key = _main_metric(task, figures)
        if not math.isfinite(figures[key]) or _has_nan(task):
            hint = "leave a broken candidate out with --exclude; `ckptavg inspect` lists them"
            raise TaskError(f"lm-evaluation-harness: {name}: a log-likelihood or {key} is not finite", hint=hint)
        names.add(key.partition(",")[0])
        sign = 1 if task.higher_is_better().get(key.partition(",")[0], True) else -1
        terms.append(sign * figures[key])
        values = _per_example(task, results["samples"][name], key)
        each += [(sign * value, examples / len(tasks) / len(values)) for value in values]
        complete = complete and bool(values)
    units = None
    if complete:
        values_U, examples_U = torch.tensor(each, dtype=torch.float64).T.contiguous()
        units = PerExample(values_U=values_U, examples_U=examples_U)
    value = math.fsum(terms) / len(terms)
    metric = names.pop() if len(names) == 1 else "mean score"
    return Score(value=value, loss=None, metric=value, examples=examples, per_example=units, name=metric)


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
