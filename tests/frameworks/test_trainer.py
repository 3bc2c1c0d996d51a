"""Checkpoints written by transformers' Trainer: averaged with only a validation file, and loaded back."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from by_hand import averaged_by_hand
from conftest import Run
from gpt2 import LINES, config, fit, fresh_tokenizer, logits, steps, train
from safetensors.torch import load_file, save_file
from templates import fill_in
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorWithPadding,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
)

import ckptavg
from ckptavg import callbacks


def test_sewa_needs_only_k_and_val(run: Run, trainer_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    val, test = trainer_run / "val.jsonl", trainer_run / "test.jsonl"
    done = run("sewa", trainer_run / "run", "--k", 3, "--val", val, "--test", test, "--steps", 20, "-o", "out/")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "out/model.safetensors\n"
    assert "val loss" in done.stderr and "test loss" in done.stderr
    with caplog.at_level(logging.WARNING):
        model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert model.lm_head.weight is model.transformer.wte.weight
    record = json.loads(run("sewa", trainer_run / "run", "--k", 3, "--val", val, "--steps", 20, "--json").stdout)
    chosen = [Path(one["path"]) for one in record["candidates"] if one["coefficient"]]
    by_hand = GPT2LMHeadModel(model.config)
    by_hand.load_state_dict(averaged_by_hand([load_file(path / "model.safetensors") for path in chosen]), strict=False)
    by_hand.tie_weights()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(model, tokenizer), logits(by_hand, tokenizer), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("command", ["aswa", "soup", "twa --epochs 2", "best"])
def test_the_other_searches_take_the_same_data(run: Run, trainer_run: Path, command: str):
    done = run(*command.split(), trainer_run / "run", "--val", trainer_run / "val.jsonl", "--last", 3)
    assert done.returncode == 0, done.stderr


def test_shards_are_loaded_like_one_file(run: Run, trainer_run: Path, tmp_path: Path):
    assert run("swa", trainer_run / "run", "-o", "whole/").returncode == 0
    done = run("swa", trainer_run / "run", "-o", "parts/", "--max-shard-size", "50KB")
    assert (done.returncode, done.stdout) == (0, "parts/model.safetensors.index.json\n"), done.stderr
    files = sorted(path.name for path in (tmp_path / "parts").glob("*.safetensors"))
    assert len(files) > 2 and files[0].startswith("model-00001-of-") and not (tmp_path / "parts" / ".tmp").exists()
    one, many = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("whole", "parts"))
    assert all(torch.equal(tensor, many.state_dict()[name]) for name, tensor in one.state_dict().items())
    checked = run("verify", "parts/model.safetensors.index.json", "--sources", trainer_run / "run")
    assert checked.returncode == 0, checked.stderr
    again = run("swa", trainer_run / "run", "-o", "parts/", "--max-shard-size", "50KB")
    assert again.returncode in (5, 6)
    assert {path.name for path in (tmp_path / "parts").iterdir()} >= {"config.json", "tokenizer.json"}
    large = run("swa", trainer_run / "run", "-o", "large/", "--max-shard-size", "5GB")
    assert large.stdout == "large/model.safetensors\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("-o", "x.safetensors", "--max-shard-size", "5GB"), "needs a directory"),
        (("-o", "x/", "--max-shard-size", "much"), "--max-shard-size much is not a size"),
    ],
)
def test_sizes_that_are_none_are_refused(run: Run, trainer_run: Path, options: tuple[str, ...], message: str):
    done = run("swa", trainer_run / "run", *options)
    assert done.returncode == 2 and message in done.stderr


def test_the_dtype_in_the_config_is_that_of_the_file(run: Run, trainer_run: Path, tmp_path: Path):
    done = run("swa", trainer_run / "run", "--dtype", "bfloat16", "-o", "half/")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16


def changed(trainer_run: Path, folder: Path, change: Any) -> Path:
    """Return two of the checkpoints with other tensors."""
    for path in steps(trainer_run)[-2:]:
        there = shutil.copytree(path, folder / path.name)
        state = change(load_file(there / "model.safetensors"))
        save_file(state, there / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {n: t for n, t in state.items() if "ln_f.bias" not in n}, "transformer.ln_f.bias"),
        (
            lambda state: {f"model.{n}": t for n, t in state.items()},
            "transformer.wte.weight: is missing: from_pretrained would make it random",
        ),
        (lambda state: {**state, "extra": torch.ones(2)}, "extra"),
        (lambda state: {**state, "lm_head.weight": state["transformer.wte.weight"] + 1}, "lm_head.weight"),
    ],
)
def test_a_model_that_would_load_with_random_weights_is_refused(
    run: Run, trainer_run: Path, tmp_path: Path, change: Any, message: str
):
    folder = changed(trainer_run, tmp_path / "run", change)
    done = run("swa", folder, "-o", "out/")
    assert done.returncode in (3, 5) and message in done.stderr and not (tmp_path / "out").exists()
    assert run("swa", folder, "-o", "plain.safetensors").returncode == 0  # a lone file gives no such guarantee


def test_an_output_layer_saved_beside_its_embedding_stays_tied(run: Run, trainer_run: Path, tmp_path: Path):
    folder = changed(
        trainer_run,
        tmp_path / "run",
        lambda state: {**state, "lm_head.weight": state["transformer.wte.weight"].clone()},
    )
    done = run("swa", folder, "-o", "out/")
    assert done.returncode == 0, done.stderr
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.transformer.wte.weight


def test_the_template_of_init_scores_as_without_a_task_file(run: Run, tmp_path: Path):
    tokenizer, data = fresh_tokenizer(), [{"text": line, "label": int("(" in line)} for line in LINES[:160]]
    encoded = [{**tokenizer(row["text"], truncation=True, max_length=48), "labels": row["label"]} for row in data[:120]]
    torch.manual_seed(0)
    fit(tmp_path, GPT2ForSequenceClassification(config()), encoded, DataCollatorWithPadding(tokenizer), tokenizer)
    (tmp_path / "val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data[120:]))
    edits = {"./run/checkpoint-300": str(steps(tmp_path)[0]), "128": "48", "test.jsonl": "val.jsonl"}
    fill_in(run, tmp_path, "--hf", edits)
    scores = []
    for options in (("--val", "val.jsonl"), ("--task", "task.py")):
        done = run("eval", "run", *options, "--json")
        assert done.returncode == 0, done.stderr
        scores.append([one["val"] for one in json.loads(done.stdout)["files"]])
    for without, templated in zip(*scores, strict=True):
        assert templated["metric"] == without["metric"]
        assert templated["loss"] == pytest.approx(without["loss"], rel=1e-5)
    assert run("sewa", "run", "--k", 2, "--steps", 5, "-o", "averaged/").returncode == 0


def test_a_run_without_tokenizer_is_an_error_with_a_remedy(run: Run, trainer_run: Path, tmp_path: Path):
    folder = tmp_path / "run"
    for path in steps(trainer_run)[-2:]:
        shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns("tokenizer*", "special*"))
    done = run("sewa", folder, "--k", 1, "--val", trainer_run / "val.jsonl")
    assert done.returncode == 7 and "no tokenizer" in done.stderr and "copy tokenizer.json" in done.stderr


def test_a_line_that_is_no_json_is_named(run: Run, trainer_run: Path, tmp_path: Path):
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": oops}\n')
    done = run("sewa", trainer_run / "run", "--val", "bad.jsonl")
    assert done.returncode in (2, 3, 7) and "bad.jsonl:2: is not JSON" in done.stderr


def test_train_and_test_go_with_val(run: Run, trainer_run: Path):
    done = run("sewa", trainer_run / "run", "--train", trainer_run / "val.jsonl")
    assert done.returncode == 2 and "--train goes with --val" in done.stderr


def test_batches_are_halved_when_memory_runs_out(run: Run, trainer_run: Path, monkeypatch: pytest.MonkeyPatch):
    from ckptavg.tasks.hugging_face import HuggingFaceTask

    real, seen = HuggingFaceTask.loss, list[int]()

    def loss(self: HuggingFaceTask, model: Any, batch: Any) -> Tensor:
        seen.append(len(batch["input_ids"]))
        if seen[-1] > 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
        return real(self, model, batch)

    monkeypatch.setattr(HuggingFaceTask, "loss", loss)
    base = ("sewa", trainer_run / "run", "--k", 1, "--last", 2, "--steps", 3, "--val", trainer_run / "val.jsonl")
    done = run(*base)
    assert done.returncode == 0, done.stderr
    assert max(seen) > 8 and seen[-1] <= 8
    fixed = run(*base, "--batch-size", 16, "--force")
    assert fixed.returncode == 8 and "out of memory" in fixed.stderr


def test_a_callback_averages_when_the_training_ends(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """It scores the Trainer's evaluation data with the model's own loss, and the file is that of a run by hand."""
    callback: Any = callbacks.TransformersCallback("soup", last=3)
    train(tmp_path, callbacks=[callback], evaluate=True)
    result = callback.result
    assert (
        result.output.path == tmp_path / "run" / "averaged" / "model.safetensors"
        and result.scores["val"].examples == 20
    )
    assert f"ckptavg: {result.verdict}" in caplog.text
    assert (
        not callback.__class__.__module__.startswith("transformers") and pickle.loads(pickle.dumps(callback)).strategy
    )
    chosen = [load_file(one.path / "model.safetensors") for one in result.candidates if one.coefficient]
    by_hand, written = averaged_by_hand(chosen), load_file(result.output.path)
    assert all(torch.allclose(tensor, by_hand[name], rtol=1e-6, atol=1e-7) for name, tensor in written.items())
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "averaged")


def test_an_error_of_a_callback_comes_before_the_training_or_is_a_warning_after_it(tmp_path: Path):
    with pytest.raises(ckptavg.CkptavgError, match="has no option 'lastt'"):
        callbacks.TransformersCallback("soup", lastt=3)
    callback: Any = callbacks.TransformersCallback("soup", output=f"{tmp_path}/there")
    (tmp_path / "there").write_text("precious")
    arguments, state = SimpleNamespace(output_dir=str(tmp_path)), SimpleNamespace(is_world_process_zero=True)
    with pytest.raises(ckptavg.CkptavgError, match="exists already"):
        callback.on_train_begin(arguments, state, None)
    with pytest.warns(UserWarning, match="the checkpoints were not averaged: .*exists already"):
        callback.on_train_end(arguments, state, None)
    state.is_world_process_zero = False
    callback.on_train_end(arguments, state, None)  # another rank does nothing
