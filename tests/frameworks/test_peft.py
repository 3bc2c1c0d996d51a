"""LoRA adapters as PEFT saves them: averaged factor by factor or exactly, scored, and loaded back by PEFT."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import Run
from gpt2 import LINES, logits, steps
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from templates import fill_in
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture(scope="module")
def adapters(trainer_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save four adapters of one run on the last checkpoint of another, in checkpoint-N directories."""
    folder = tmp_path_factory.mktemp("peft")
    base = str(steps(trainer_run)[-1])
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # GPT-2's layers are transposed
        config = LoraConfig(
            r=4, lora_alpha=8, target_modules=["c_attn", "c_fc"], task_type="CAUSAL_LM", fan_in_fan_out=True
        )
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        tokenizer = AutoTokenizer.from_pretrained(base)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
        for step in range(1, 17):
            batch = tokenizer(LINES[step * 4 : step * 4 + 4], return_tensors="pt", padding=True)
            optimizer.zero_grad()
            model(**batch, labels=batch["input_ids"]).loss.backward()
            optimizer.step()
            if step % 4 == 0:
                model.save_pretrained(folder / f"checkpoint-{step}")
    return folder


def loaded(trainer_run: Path, folder: Path) -> Any:
    base = AutoModelForCausalLM.from_pretrained(steps(trainer_run)[-1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's warning about deprecations of transformers
        return PeftModel.from_pretrained(base, folder)


def merged(trainer_run: Path, folder: Path) -> dict[str, Tensor]:
    """Return the merged weights of base and adapter in float64."""
    model = loaded(trainer_run, folder).double().merge_and_unload()
    return {name: tensor.double() for name, tensor in model.state_dict().items()}


def by_hand(trainer_run: Path, adapters: Path) -> Any:
    states = [merged(trainer_run, adapters / f"checkpoint-{step}") for step in (4, 8, 12, 16)]
    model = AutoModelForCausalLM.from_pretrained(steps(trainer_run)[-1]).double()
    model.load_state_dict({name: torch.stack([s[name] for s in states]).mean(dim=0) for name in states[0]})
    return model


def test_factors_are_averaged_and_their_error_is_reported(run: Run, trainer_run: Path, adapters: Path, tmp_path: Path):
    done = run("swa", adapters, "-o", "out/")
    assert (done.returncode, done.stdout) == (0, "out/adapter_model.safetensors\n"), done.stderr
    (note,) = (line for line in done.stderr.splitlines() if line.startswith("averaging the adapter's factors is"))
    command = shlex.split(note.partition("for that: ")[2])
    assert command == ["ckptavg", "swa", str(adapters), "--adapter", "exact", "-o", "out-exact/"]
    assert run(*command[1:]).returncode == 0 and (tmp_path / "out-exact" / "adapter_model.safetensors").exists()
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    parts = [load_file(adapters / f"checkpoint-{step}" / "adapter_model.safetensors") for step in (4, 8, 12, 16)]
    for name, tensor in written.items():
        expected = torch.stack([part[name].double() for part in parts]).mean(dim=0).float()
        torch.testing.assert_close(tensor, expected, rtol=2**-23, atol=2**-149)
    loaded(trainer_run, tmp_path / "out")


def test_exactly_in_weight_space(run: Run, trainer_run: Path, adapters: Path, tmp_path: Path):
    done = run("swa", adapters, "-o", "out/", "--adapter", "exact")
    assert done.returncode == 0, done.stderr
    assert "has rank 16" in done.stderr
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 16
    tokenizer = AutoTokenizer.from_pretrained(steps(trainer_run)[-1])
    found, expected = loaded(trainer_run, tmp_path / "out").double(), by_hand(trainer_run, adapters)
    torch.testing.assert_close(logits(found, tokenizer), logits(expected, tokenizer), rtol=1e-5, atol=1e-5)
    checked = run("verify", "out/adapter_model.safetensors", "--sources", adapters)
    assert checked.returncode == 0, checked.stderr


def test_a_reduced_rank_reports_its_loss_and_is_scored(run: Run, trainer_run: Path, adapters: Path, tmp_path: Path):
    val = trainer_run / "val.jsonl"
    done = run("swa", adapters, "-o", "out/", "--adapter", "exact", "--rank", 4, "--val", val)
    assert done.returncode == 0, done.stderr
    assert "reduced to rank 4, which lost" in done.stderr and "val loss" in done.stderr
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 4
    loaded(trainer_run, tmp_path / "out")


def test_a_selection_of_adapters_is_learned(run: Run, trainer_run: Path, adapters: Path, tmp_path: Path):
    val = trainer_run / "val.jsonl"
    done = run("sewa", adapters, "--k", 2, "--steps", 10, "--val", val, "-o", "out/", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    model = loaded(trainer_run, tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(steps(trainer_run)[-1])
    lines = [json.loads(line)["text"] for line in val.read_text().splitlines()]
    losses: list[float] = []
    for line in lines:
        ids = tokenizer(line, return_tensors="pt", truncation=True, max_length=48)["input_ids"]
        with torch.no_grad():
            losses.append(float(model(input_ids=ids, labels=ids).loss))
    assert report["scores"]["val"]["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)


@pytest.mark.parametrize("options", [("swa",), ("sewa", "--k", "2", "--steps", "4"), ("swa", "--rank", "4")], ids=str)
def test_an_exact_adapter_is_scored_by_what_is_written(
    run: Run, trainer_run: Path, adapters: Path, tmp_path: Path, options: tuple[str, ...]
):
    """The report's score is that of the file, scored by its own configuration; the average of factors has another."""
    val = trainer_run / "val.jsonl"
    done = run(options[0], adapters, *options[1:], "-o", "out/", "--adapter", "exact", "--val", val, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    (scored,) = json.loads(run("eval", "out", "--val", val, "--json").stdout)["files"]
    assert report["scores"]["val"]["loss"] == pytest.approx(scored["val"]["loss"], abs=1e-6)
    said = re.search(r"the selection has loss (\d+\.\d+)", report["verdict"])
    assert said and float(said[1]) == pytest.approx(
        scored["val"]["loss"], abs=0.5 * 10 ** -len(said[1].partition(".")[2])
    )
    assert "Nothing was scored" not in done.stderr and ("averages of the adapters' factors" in done.stderr) == (
        options[0] == "sewa"
    )
    factors = json.loads(run("swa", adapters, "-o", "factors/", "--val", val, "--json").stdout)
    assert abs(factors["scores"]["val"]["loss"] - scored["val"]["loss"]) > 1e-5


def test_a_config_of_another_rank_in_the_output_directory_is_not_kept(run: Run, adapters: Path, tmp_path: Path):
    """Else PEFT would scale the weights by another rank, or refuse them."""

    def config() -> Any:
        return json.loads((tmp_path / "out" / "adapter_config.json").read_text())

    assert run("swa", adapters, "-o", "out/").returncode == 0
    assert run("swa", adapters, "--adapter", "exact", "-o", "out/", "--force").returncode == 0
    assert config()["r"] == 16
    (tmp_path / "out" / "adapter_model.safetensors").unlink()
    refused = run("swa", adapters, "-o", "out/")
    assert refused.returncode == 6 and "adapter_config.json" in refused.stderr and "--force" in refused.stderr
    assert config()["r"] == 16 and not (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert run("swa", adapters, "-o", "out/", "--force").returncode == 0 and config()["r"] == 4


def test_a_command_scores_the_exact_adapter(run: Run, adapters: Path, tmp_path: Path):
    """The command gets a directory that PEFT loads: its configuration has the rank of the weights."""
    code = (
        "import json, sys; from safetensors.torch import load_file; d = sys.argv[1];"
        "ranks = {t.shape[0] for n, t in load_file(d + '/adapter_model.safetensors').items() if 'lora_A' in n};"
        "assert ranks == {json.load(open(d + '/adapter_config.json'))['r']}; print(*ranks)"
    )
    command = f"{sys.executable} -c {shlex.quote(code)} {{dir}}"
    done = run("swa", adapters, "-o", "out/", "--adapter", "exact", "--score-cmd", command, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["scores"]["val"]["metric"] == 16


def test_the_lines_of_the_readme_load_what_was_written(
    run: Run, trainer_run: Path, adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    lines = re.findall(r"^    (\S.*?) +# ", readme.split("\n## Use the result\n")[1].split("\n## ")[0], re.MULTILINE)
    model, base = nn.Linear(2, 1), AutoModelForCausalLM.from_pretrained(steps(trainer_run)[-1])
    (tmp_path / "plain").mkdir()
    for step in (1, 2):
        save_file({"weight": torch.ones(1, 2), "bias": torch.ones(1)}, tmp_path / "plain" / f"step-{step}.safetensors")
    names = {**globals(), "safetensors": safetensors, "model": model, "base": base}
    monkeypatch.chdir(tmp_path)
    for line, folder in zip(lines, ("plain", trainer_run / "run", adapters), strict=True):
        output = "averaged/" if "averaged/" in line else "averaged.safetensors"
        assert run("swa", folder, "-o", output).returncode == 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's warning about deprecations of transformers
            exec(line, names)
        shutil.rmtree("averaged", ignore_errors=True)
    assert model.weight.tolist() == [[1.0, 1.0]]


@pytest.mark.filterwarnings("ignore")  # of PEFT, about deprecations of transformers
@pytest.mark.parametrize("mode", ["factors", "exact"])
def test_the_template_of_init_scores_as_without_a_task_file(
    run: Run, trainer_run: Path, adapters: Path, tmp_path: Path, mode: str
):
    base, val = str(steps(trainer_run)[-1]), str(trainer_run / "val.jsonl")
    edits = {'"./base"': repr(base), "./run/checkpoint-300": str(adapters / "checkpoint-4"), "512": "48"}
    fill_in(run, tmp_path, "--peft", {**edits, "val.jsonl": val, "test.jsonl": str(trainer_run / "test.jsonl")})
    scores = []
    for options in (("--val", val), ("--task", "task.py")):
        done = run("swa", adapters, *options, "--adapter", mode, "-o", "out/", "--json", "--force")
        assert done.returncode == 0, done.stderr
        scores.append(json.loads(done.stdout)["scores"]["val"]["loss"])
    assert scores[1] == pytest.approx(scores[0], rel=1e-5)


def test_an_adapter_of_another_base_is_refused(run: Run, adapters: Path, tmp_path: Path):
    shutil.copytree(adapters, tmp_path / "run")
    path = tmp_path / "run" / "checkpoint-8" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "other"}))
    done = run("swa", "run")
    assert done.returncode == 4 and "base_model_name_or_path is 'other'" in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [(("--rank", "4"), "--rank goes with --adapter exact"), (("--adapter", "exact", "--rank", "0"), "at least 1")],
)
def test_ranks_that_cannot_be_are_refused(run: Run, adapters: Path, options: tuple[str, ...], message: str):
    done = run("swa", adapters, *options)
    assert done.returncode == 2 and message in done.stderr


def test_a_checkpoint_without_adapter_cannot_be_merged_exactly(run: Run, trainer_run: Path):
    done = run("swa", trainer_run / "run", "--adapter", "exact")
    assert done.returncode == 2 and "no adapter_config.json" in done.stderr
