"""Model card: valid on the Hub, the same for the same inputs, and never at the cost of somebody's own README.md."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TASK, Run
from safetensors.torch import load_file, save_file

import ckptavg
from ckptavg.output.model_card import END, NAME, START, hub_id, merged, metadata

OWN = "# My model\n\nTrained by hand.\n"


def checkpoints(folder: Path, config: dict[str, Any] | None = None, name: str = "config.json") -> Path:
    """Write three checkpoints, each in a directory with a config."""
    for step in (1, 2, 3):
        place = folder / f"checkpoint-{step}"
        place.mkdir(parents=True)
        save_file({"weight": torch.full((2, 2), float(step))}, place / "model.safetensors")
        if config is not None:
            (place / name).write_text(json.dumps(config))
    return folder


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "config", "expected"),
    [
        ("config.json", {"_name_or_path": "org/base-7b", "architectures": ["BertModel"]}, "org/base-7b"),
        ("config.json", {"_name_or_path": "gpt2"}, "gpt2"),
        ("config.json", {"_name_or_path": "/home/me/secret/model"}, None),
        ("config.json", {"_name_or_path": "./outputs/run"}, None),
        ("config.json", {"_name_or_path": "outputs/checkpoint-500"}, None),
        ("config.json", {"_name_or_path": 'x"\n---\nlicense: mit'}, None),
        ("config.json", {}, None),
    ],
)
def test_the_hub_reads_the_metadata(name: str, config: dict[str, Any], expected: str | None, tmp_path: Path, run: Run):
    hub = pytest.importorskip("huggingface_hub")
    done = run("swa", checkpoints(tmp_path / "ckpts", config, name), "-o", "out/")
    assert done.returncode == 0, done.stderr
    card = hub.ModelCard.load(tmp_path / "out" / NAME)
    assert card.data.tags == ["checkpoint-averaging"]
    assert card.data.base_model == expected
    assert card.data.library_name == "transformers"
    assert {"license", "model-index", "datasets"}.isdisjoint(card.data.to_dict())
    assert "secret" not in card.content and str(tmp_path) not in card.content


@pytest.mark.thorough
def test_an_adapter_names_its_base(tmp_path: Path, run: Run):
    hub = pytest.importorskip("huggingface_hub")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["0"], "task_type": None}
    for step in (1, 2):
        place = tmp_path / "ckpts" / f"checkpoint-{step}"
        place.mkdir(parents=True)
        tensors = {f"base_model.model.0.lora_{part}.weight": torch.full((2, 2), float(step)) for part in "AB"}
        save_file(tensors, place / "adapter_model.safetensors")
        (place / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "org/base"}))
    done = run("swa", "ckpts", "-o", "out/")
    assert done.returncode == 0, done.stderr
    data = hub.ModelCard.load(tmp_path / "out" / NAME).data
    assert (data.base_model, data.base_model_relation, data.library_name) == ("org/base", "adapter", "peft")


def test_what_was_averaged_and_how_it_scored(digits: Path, tmp_path: Path, run: Run):
    done = run("sewa", digits, "--k", 3, "--last", 6, "--steps", 5, "--task", TASK, "-o", "out/", "--json")
    assert done.returncode == 0, done.stderr
    report, text = json.loads(done.stdout), (tmp_path / "out" / NAME).read_text()
    used = {Path(row["path"]).name: row for row in report["candidates"] if row["coefficient"]}
    listed = re.findall(r"^\| `([^`]+)` \| (\d+) \| (\S+) \|$", text, re.MULTILINE)
    assert {name: (int(step), float(c)) for name, step, c in listed} == {
        name: (row["step"], pytest.approx(row["coefficient"], rel=1e-5)) for name, row in used.items()
    }
    written = next(line for line in text.splitlines() if "as written" in line)
    shown = [float(text) for text in re.findall(r"\| ([\d.]+) ± ", written)]
    assert shown == pytest.approx(
        [report["scores"][s][f] for s in ("val", "test") for f in ("metric", "loss")], abs=0.005
    )
    for digest in report["output"]["source_digests"].values():
        assert digest in text
    assert str(tmp_path) not in text and str(digits) not in text and str(TASK.parent) not in text
    commands = re.findall(r"^ckptavg .*$", text, re.MULTILINE)
    words = shlex.split("ckptavg sewa CKPTS --k 3 --steps 5 --task task.py --last 6 -o out/")
    assert sorted(shlex.split(commands[0])) == sorted(words) and commands[0].startswith("ckptavg sewa CKPTS --k 3 ")


def test_the_commands_rebuild_and_verify_the_model(tmp_path: Path, run: Run):
    checkpoints(tmp_path / "ckpts", {"model_type": "x"})
    assert run("lawa", "ckpts", "--k", 2, "--dtype", "float64", "-o", "out/").returncode == 0
    text, data = (tmp_path / "out" / NAME).read_text(), (tmp_path / "out/model.safetensors").read_bytes()
    rebuild, verify = re.findall(r"^ckptavg (.*)$", text, re.MULTILINE)
    assert run(*shlex.split(verify.replace("CKPTS", "ckpts"))).returncode == 0
    assert run(*shlex.split(rebuild.replace("CKPTS", "ckpts")), "--force").returncode == 0
    assert (tmp_path / "out/model.safetensors").read_bytes() == data
    assert (tmp_path / "out" / NAME).read_text() == text


def test_the_code_loads_the_model_from_beside_its_directory(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch):
    run("swa", checkpoints(tmp_path / "ckpts"), "-o", f"{tmp_path}/deep/", cwd=tmp_path)
    code = re.findall(r"```python\n(.*?)\n```", (tmp_path / "deep" / NAME).read_text(), re.DOTALL)[0]
    assert '"deep/model.safetensors"' in code
    monkeypatch.chdir(tmp_path)
    assert torch.equal(load_file("deep/model.safetensors")["weight"], torch.full((2, 2), 2.0))


def test_equal_runs_have_equal_cards(digits: Path, tmp_path: Path):
    texts: list[bytes] = []
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        ckptavg.sewa(digits, k=3, last=6, steps=5, task=str(TASK), output=f"{tmp_path}/{place}/out/")
        texts.append((tmp_path / place / "out" / NAME).read_bytes())
    assert texts[0] == texts[1]


def test_a_secret_in_a_score_command_is_not_in_the_card(tmp_path: Path, run: Run):
    checkpoints(tmp_path / "ckpts")
    command = "TOKEN=hunter2 sh -c 'echo 0.5' {}"
    done = run("soup", "ckpts", "--score-cmd", command, "-o", "out/", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "out" / NAME).read_text()
    assert "hunter2" not in text and "--score-cmd …" in text.replace("'", "")


def test_a_card_of_somebody_else_is_left_alone_with_one_warning(tmp_path: Path, run: Run):
    checkpoints(tmp_path / "ckpts")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / NAME).write_text(OWN)
    done = run("swa", "ckpts", "-o", "out/", cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / "out" / NAME).read_text() == OWN
    assert sum(NAME in line for line in done.stderr.splitlines()) == 1


def test_a_section_is_replaced_and_what_is_around_it_stays(tmp_path: Path, run: Run):
    checkpoints(tmp_path / "ckpts")
    (tmp_path / "out").mkdir()
    front = "---\nlicense: mit\n---\n"
    mine = b"\xff not UTF-8\r\n"
    (tmp_path / "out" / NAME).write_bytes(f"{front}{OWN}{START}{END}\n".encode() + mine)
    assert run("swa", "ckpts", "-o", "out/", cwd=tmp_path).returncode == 0
    first = (tmp_path / "out" / NAME).read_bytes()
    assert first.startswith(f"{front}{OWN}{START}\n## Check".encode()) and first.endswith(END.encode() + b"\n" + mine)
    assert run("last", "ckpts", "-o", "out/", "--force", cwd=tmp_path).returncode == 0
    second = (tmp_path / "out" / NAME).read_bytes()
    assert second != first and second.count(START.encode()) == 1
    assert b"`ckptavg last`" in second and b"`ckptavg swa`" not in second and second.endswith(mine)


def test_metadata_are_replaced_until_somebody_takes_them_over():
    old, new = metadata({"base_model": "a/b"}), metadata({"base_model": "c/d"})
    card = merged(None, old, "one")
    assert card is not None and card.startswith(old)
    assert merged(card, new, "two") == merged(None, new, "two")
    taken = card.replace(old.splitlines()[1] + "\n", "license: mit\n")
    assert merged(taken, new, "two") == taken.replace("one", "two")


def test_a_marker_in_a_name_does_not_end_the_section():
    card = merged(None, metadata({}), f"a `{END}` b")
    assert card is not None and card.count(END) == 1
    assert merged(card, metadata({}), "new") == merged(None, metadata({}), "new")


def test_files_get_no_card(tmp_path: Path, run: Run):
    checkpoints(tmp_path / "ckpts")
    assert run("swa", "ckpts", "-o", "a.safetensors", cwd=tmp_path).returncode == 0
    assert run("swa", "ckpts", "-o", "dcp/", "--format", "dcp", cwd=tmp_path).returncode == 0
    assert not [*tmp_path.glob(f"**/{NAME}")]


def test_a_pipe_in_place_of_a_card_is_not_opened(tmp_path: Path, run: Run):
    checkpoints(tmp_path / "ckpts")
    (tmp_path / "out").mkdir()
    os.mkfifo(tmp_path / "out" / NAME)
    done = run("swa", "ckpts", "-o", "out/", cwd=tmp_path)
    assert done.returncode == 0 and sum(NAME in line for line in done.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", ["org/model", "org/model.v1-x_y", "gpt2", "bert-base-uncased", "t5-small"])
def test_names_on_the_hub(name: str):
    assert hub_id(name) == name


@pytest.mark.parametrize(
    "name", [None, 3, "", "model", "out", "/a/b", "./a", "a/b/c", "~/x", "a/..", "runs/step-5", "a b/c", "a/b\n"]
)
def test_paths_and_names_that_may_be_paths_are_not(name: object):
    assert hub_id(name) is None


def test_a_directory_that_exists_is_not_a_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert hub_id("org/model") is None
