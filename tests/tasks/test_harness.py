"""lm-evaluation-harness on a model in memory: scores against plain torch, offline operation, restored state."""

from __future__ import annotations

import json
import math
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ckptavg.errors import TaskError, UsageError
from ckptavg.report.interval import gain
from ckptavg.runtime import signals
from ckptavg.runtime.signals import Handler
from ckptavg.tasks.lm_eval import LmEvalTask

pytest.importorskip("lm_eval")
# warnings of the frameworks themselves: SWIG types without a module, and their own forks
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::PendingDeprecationWarning"),
]
Build = Callable[..., LmEvalTask]
WORDS = ["the", "cat", "dog", "bird", "sat", "ran", "flew", "home", "far", "slowly", "extraordinarily", "and", "again"]
DOCS = [
    {
        "question": " ".join(draw.choices(WORDS, k=draw.randint(2, 6))),
        "choices": [" ".join(draw.choices(WORDS, k=count)) for count in (1, 2, 3)],
        "gold": draw.randrange(3),
    }
    for draw in [random.Random(seed) for seed in range(30)]
]
CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {validation: FILE, train: FILE}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: gold
doc_to_choice: choices
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
PERPLEXITY = """
task: tiny_text
dataset_path: json
dataset_kwargs: {data_files: {validation: FILE}}
validation_split: validation
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create local tasks, the only ones that are found, and an empty working directory, and block the network."""
    import datasets.config
    import lm_eval.tasks

    def refuse(*_: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    data = tasks / "docs.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    shots = CHOICE.replace("tiny_choice", "tiny_shots") + "fewshot_split: train\nnum_fewshot: 1\n"
    for name, text in (("choice", CHOICE), ("text", PERPLEXITY), ("shots", shots)):
        (tasks / f"{name}.yaml").write_text(text.replace("FILE", str(data)))
    found = partial(lm_eval.tasks.TaskManager, include_path=str(tasks), include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", found)  # its own 14,000 files take 10 s to read
    return tasks


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(["<s>", "<unk>", *WORDS])}, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="<s>", unk_token="<unk>")


@pytest.fixture
def task(tokenizer: Any, tmp_path: Path) -> Build:
    tiny_gpt2(0).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return partial(LmEvalTask, tmp_path / "model")


def tiny_gpt2(seed: int) -> Any:
    """Build a tiny GPT-2 with large weights, so that its predictions are far from uniform."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(WORDS) + 2, n_positions=64, n_layer=2, n_embd=32, n_head=2, initializer_range=0.5
    )
    config.bos_token_id = config.eos_token_id = 0
    return GPT2LMHeadModel(config)


@torch.no_grad()
def log_likelihood(model: Any, tokenizer: Any, context: str, continuation: str) -> float:
    context_ids = tokenizer(context)["input_ids"] if context else [tokenizer.bos_token_id]
    ids = context_ids + tokenizer(continuation)["input_ids"]
    logits = model.eval()(torch.tensor([ids[:-1]])).logits[0].double().log_softmax(-1)
    return sum(float(logits[i - 1, ids[i]]) for i in range(len(context_ids), len(ids)))


def by_hand(model: Any, tokenizer: Any) -> tuple[list[float], list[float]]:
    """Compute acc and acc_norm of each document; acc_norm divides by the characters of the choice."""
    acc, acc_norm = list[float](), list[float]()
    for doc in DOCS:
        own = [log_likelihood(model, tokenizer, doc["question"], choice) for choice in doc["choices"]]
        per_char = [value / len(choice) for value, choice in zip(own, doc["choices"], strict=True)]
        acc.append(float(own.index(max(own)) == doc["gold"]))
        acc_norm.append(float(per_char.index(max(per_char)) == doc["gold"]))
    return acc, acc_norm


def test_accuracy_matches_log_likelihoods_in_plain_torch(folder: Path, task: Build, tokenizer: Any):
    model = tiny_gpt2(0)
    measured = task(["tiny_choice"]).score(model)
    acc, acc_norm = by_hand(model, tokenizer)
    assert measured.per_example is not None and measured.per_example.values_U.tolist() == acc_norm != acc
    assert measured.value == measured.metric == sum(acc_norm) / 30 == float(measured.per_example.values_U.mean())
    assert measured.per_example.examples_U.tolist() == [1.0] * 30 and measured.examples == 30
    assert measured.loss is None and sum(acc_norm) != sum(acc)


def test_new_weights_in_the_same_module_score_as_with_a_fresh_harness(folder: Path, task: Build):
    model, other = tiny_gpt2(0), tiny_gpt2(1)
    harness = task(["tiny_choice", "tiny_shots", "tiny_text"])
    first = harness.score(model)
    tasks, adapter = harness._tasks, harness._lm
    model.load_state_dict(other.state_dict())
    second = harness.score(model)
    assert harness._tasks is tasks and harness._lm is adapter  # nothing was rebuilt
    assert second != first
    assert second == task(["tiny_choice", "tiny_shots", "tiny_text"]).score(other)
    model.load_state_dict(tiny_gpt2(0).state_dict())
    assert harness.score(model) == first
    assert harness.score(other) == second  # another module


def test_perplexity_is_negated_and_is_not_a_mean_over_examples(folder: Path, task: Build, tokenizer: Any):
    model = tiny_gpt2(0)
    measured = task(["tiny_text"]).score(model)
    total = sum(log_likelihood(model, tokenizer, "", doc["question"]) for doc in DOCS)
    perplexity = math.exp(-total / sum(len(doc["question"].split()) for doc in DOCS))
    assert measured.value == pytest.approx(-perplexity, rel=1e-5)  # float32 logits, float64 by hand
    assert measured.per_example is None and measured.metric == measured.value


def test_a_median_is_not_a_mean_over_examples(folder: Path, task: Build, tokenizer: Any):
    lines = [line.replace("aggregation: mean", "aggregation: median") for line in CHOICE.splitlines(keepends=True)]
    (folder / "median.yaml").write_text(
        "".join(lines).replace("tiny_choice", "tiny_median").replace("FILE", str(folder / "docs.jsonl"))
    )
    model = tiny_gpt2(0)
    measured = task(["tiny_median"]).score(model)
    assert measured.per_example is None and measured.value == sorted(by_hand(model, tokenizer)[1])[15]


def test_tasks_have_equal_weight_whatever_their_number_of_examples(folder: Path, task: Build, tokenizer: Any):
    (folder / "few.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in DOCS[:7]))
    few = CHOICE.replace("tiny_choice", "tiny_few").replace("FILE", str(folder / "few.jsonl"))
    (folder / "few.yaml").write_text(few)
    model = tiny_gpt2(0)
    measured = task(["tiny_choice", "tiny_few"]).score(model)
    _, acc_norm = by_hand(model, tokenizer)
    assert measured.value == pytest.approx((sum(acc_norm) / 30 + sum(acc_norm[:7]) / 7) / 2, rel=1e-15)
    assert measured.per_example is not None and measured.per_example.values_U.tolist() == acc_norm + acc_norm[:7]
    weighted = (
        measured.per_example.values_U.dot(measured.per_example.examples_U) / measured.per_example.examples_U.sum()
    )
    assert float(weighted) == pytest.approx(measured.value, rel=1e-14)
    assert float(measured.per_example.examples_U.sum()) == pytest.approx(measured.examples, rel=1e-14)
    assert gain(measured, measured).value == 0.0


def test_the_batch_size_does_not_change_the_examples(folder: Path, task: Build, tokenizer: Any):
    model = tiny_gpt2(0)
    measured = task(["tiny_choice"], batch_size=2).score(model)
    assert measured.per_example is not None and measured.per_example.values_U.tolist() == by_hand(model, tokenizer)[1]


def test_scoring_restores_the_process_state(folder: Path, task: Build, capfd: pytest.CaptureFixture[str]):
    model = tiny_gpt2(0).train()
    model.transformer.h[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    parameters = {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
    harness = task(["tiny_choice", "tiny_shots", "tiny_text"])
    harness.score(model)
    files = sorted(folder.parent.rglob("*"))
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    expected = torch.rand(1), random.random(), np.random.rand()
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    harness.score(model)
    assert (torch.rand(1), random.random(), np.random.rand()) == expected
    assert sorted(folder.parent.rglob("*")) == files and not list((folder.parent / "empty").iterdir())
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)} == parameters
    assert "tie_weights" not in vars(model)
    assert capfd.readouterr() == ("", "")


def test_weights_that_are_separate_in_the_checkpoints_are_not_tied(folder: Path, task: Build, tokenizer: Any):
    model = tiny_gpt2(0)
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    before = by_hand(model, tokenizer)[1]
    measured = task(["tiny_choice"]).score(model)
    assert measured.per_example is not None and measured.per_example.values_U.tolist() == before
    assert model.lm_head.weight is not model.transformer.wte.weight


@pytest.mark.parametrize("name", ["tiny_choice", "tiny_text"])
def test_a_model_that_returns_nan_is_an_error(folder: Path, task: Build, name: str):
    model = tiny_gpt2(0)
    torch.nn.init.constant_(model.transformer.wte.weight, math.nan)
    with pytest.raises(TaskError, match=f"{name}: a log-likelihood or .* is not finite"):
        task([name]).score(model)


def test_an_unknown_task_is_a_one_line_error_with_close_matches():
    with pytest.raises(UsageError) as error:
        LmEvalTask(Path("any"), ["hellaswagg"])
    assert str(error.value).startswith("lm-evaluation-harness has no task hellaswagg; close matches: hellaswag")
    assert "\n" not in str(error.value)


def test_missing_data_is_not_downloaded(folder: Path, task: Build):
    (folder / "hub.yaml").write_text(CHOICE.replace("dataset_path: json", "dataset_path: nobody/nothing"))
    (folder / "choice.yaml").unlink()
    with pytest.raises(TaskError, match="tiny_choice cannot be built") as error:
        task(["tiny_choice"]).score(tiny_gpt2(0))
    assert error.value.hint is not None and "lm_eval run --model dummy --tasks tiny_choice" in error.value.hint


def test_a_missing_package_is_an_error_with_the_install_command(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UsageError) as error:
        LmEvalTask(Path("any"), ["any"])
    assert error.value.hint == "pip install 'ckptavg[lm-eval]'"


def test_a_task_must_be_named():
    with pytest.raises(UsageError, match="no lm-evaluation-harness task is named"):
        LmEvalTask(Path("any"), [])


def test_patterns_and_files_name_tasks_and_each_counts_once(folder: Path, task: Build):
    model = tiny_gpt2(0)
    expected = task(["tiny_choice", "tiny_text"]).score(model)
    assert task([str(folder / "choice.yaml"), "tiny_text", "tiny_t*"]).score(model) == expected


def test_importing_the_module_does_not_import_a_framework():
    code = "import ckptavg.tasks.lm_eval, sys; print({'transformers', 'datasets', 'lm_eval'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_a_signal_ends_a_score_before_the_next_forward_pass(folder: Path, task: Build, monkeypatch: pytest.MonkeyPatch):
    model, forwards = tiny_gpt2(0), [0]

    def arrive(*_: object) -> None:
        forwards[0] += 1
        monkeypatch.setattr(signals, "_handler", Handler())
        signals._handler.received = signal.SIGTERM  # pyright: ignore

    model.register_forward_hook(arrive)
    with pytest.raises(signals.Interruption):
        task(["tiny_choice"], batch_size=2).score(model)
    assert forwards == [1] and not model._forward_pre_hooks
