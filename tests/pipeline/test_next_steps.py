"""The last two lines of a run: the code loads the written file, and the command verifies it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import safetensors.torch  # for the code that is run
import torch
import torch.distributed.checkpoint
from conftest import Run
from safetensors.torch import load_file, save_file
from torch import nn

ADAPTER = {f"base_model.model.0.lora_{part}.weight": torch.ones(2, 2) for part in "AB"}
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["0"], "task_type": None}
assert safetensors.torch and torch.distributed.checkpoint


def folder(tmp_path: Path) -> Path:
    """Return a directory, with a space in its name, of two checkpoints of a linear layer."""
    (tmp_path / "my run").mkdir()
    for step in (1, 2):
        save_file({"weight": torch.full((2, 300), float(step)), "bias": torch.zeros(2)},
                  tmp_path / "my run" / f"step-{step}.safetensors")  # fmt: skip
    return tmp_path


def steps(stderr: str) -> tuple[str, str]:
    """Return the code that loads and the command that verifies, each a line of stderr."""
    load, verify = (line for line in stderr.splitlines() if line.startswith("to "))
    return load.removeprefix("to load:   "), verify.removeprefix("to verify: ")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")  # one process loads
@pytest.mark.parametrize(
    "options",
    [('my "best".safetensors',), ("out/",), ("dcp", "--format", "dcp"), ("out/", "--max-shard-size", "1KB")],
    ids=["file", "directory", "dcp", "shards"],
)  # fmt: skip
def test_the_code_loads_the_average_and_the_command_verifies_it(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
):
    done = run("swa", "my run", "-o", *options, cwd=folder(tmp_path))
    assert done.returncode == 0, done.stderr
    load, verify = steps(done.stderr)
    verified = run(*shlex.split(verify)[1:])
    assert (verified.returncode, verified.stderr.splitlines()[-1][:9]) == (0, "2 tensors"), verified.stderr
    model = nn.Linear(300, 2)
    monkeypatch.chdir(tmp_path)
    names = {"model": model, "torch": torch, "safetensors": safetensors}
    if load.startswith("accelerate."):
        names["accelerate"] = pytest.importorskip("accelerate")
    exec(load, names)
    assert torch.equal(model.weight, torch.full((2, 300), 1.5))
    quiet = run("swa", "my run", "-o", "q", "-q")
    assert (quiet.stdout, quiet.stderr) == ("q\n", "")


@pytest.mark.parametrize(("files", "output", "code"), [
    ({"adapter_model": ADAPTER, "adapter_config": CONFIG}, "out/", 'peft.PeftModel.from_pretrained(base_model, "out")'),
    ({"adapter_model": ADAPTER, "adapter_config": CONFIG}, "x", "peft.set_peft_model_state_dict(model, safetensors."),
    ({"model": {"w": torch.ones(2)}, "config": {"architectures": ["GPT2LMHeadModel"]}}, "out/",
     'transformers.GPT2LMHeadModel.from_pretrained("out")'),
    ({"model": {"w": torch.ones(2)}, "config": {}}, "out/", 'transformers.AutoModel.from_pretrained("out")'),
])  # fmt: skip
def test_directories_of_hugging_face_are_loaded_by_their_library(
    run: Run, tmp_path: Path, files: dict[str, dict[str, object]], output: str, code: str
):
    for step in (1, 2):
        (place := tmp_path / "ckpts" / f"checkpoint-{step}").mkdir(parents=True)
        for name, content in files.items():
            if "config" in name:
                (place / f"{name}.json").write_text(json.dumps(content))
            else:
                save_file({key: step * value for key, value in content.items()}, place / f"{name}.safetensors")  # pyright: ignore
    done = run("swa", "ckpts", "-o", output)
    assert done.returncode == 0, done.stderr
    load, verify = steps(done.stderr)
    assert load.startswith(code) and run(*shlex.split(verify)[1:]).returncode == 0
    assert load_file(tmp_path / done.stdout.strip())
