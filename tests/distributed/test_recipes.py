"""The commands of docs/recipes.md run as written, and end in averages that are what they say."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import acowa
import imwa
import pytest
import torch
from safetensors.torch import load_file

import ckptavg
from distributed.conftest import Torchrun

ROOT = Path(__file__).parents[2]
LINES = re.findall(r"^(torchrun --.*)$", (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8"), re.MULTILINE)
Documented = Callable[[str], tuple[Path, list[str]]]


@pytest.fixture
def documented(torchrun: Torchrun, tmp_path: Path) -> Documented:
    """Run the command of a recipe where ./scripts is that of the repository; return its output and its options."""
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")

    def run(name: str) -> tuple[Path, list[str]]:
        (line,) = (line for line in LINES if f"scripts/recipes/{name}.py" in line)
        _, _, _, processes, script, out, folder, *options = shlex.split(line)
        assert line.startswith("torchrun --standalone --nproc-per-node ") and out == "--out"
        done = torchrun(int(processes), script, out, folder, *options, cwd=tmp_path)
        output = tmp_path / folder / "averaged.safetensors"
        assert output.name in done.stdout.replace("\n", "")
        verified = ckptavg.verify(output, tmp_path / folder)
        assert verified.agree and not verified.differ
        return tmp_path / folder, options

    return run


def alone(
    recipe: ModuleType, out: Path, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> dict[str, torch.Tensor]:
    """Return what the recipe writes without torchrun."""
    monkeypatch.setattr(sys, "argv", [f"{recipe.__name__}.py", "--out", str(out), *options])
    monkeypatch.setattr(sys, "path", [*sys.path])  # IMWA adds the task's directory
    recipe.main()
    return load_file(out / "averaged.safetensors")


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys() and all(left[name].equal(right[name]) for name in left)


def test_there_is_one_line_for_each_recipe():
    names = sorted(path.stem for path in (ROOT / "scripts" / "recipes").glob("*.py"))
    assert sorted([*(re.findall(r"scripts/recipes/(\w+).py", "".join(LINES))), "member"]) == names


def test_wash_ends_with_swa_of_the_last_checkpoints(documented: Documented, tmp_path: Path):
    out, _ = documented("wash")
    files = sorted(out.glob("member-*/step-*.safetensors"))
    assert len(files) == 3 and len({file.read_bytes() for file in files}) == 3
    swa = tmp_path / "swa.safetensors"
    ckptavg.swa(files, task=ROOT / "scripts" / "demo" / "task.py", output=swa)
    averaged = load_file(out / "averaged.safetensors")
    assert_same(averaged, load_file(swa))
    members = torch.stack([load_file(file)["7.weight"] for file in files])
    assert averaged["7.weight"].equal(members.double().mean(dim=0).float())


def test_imwa_of_two_processes_is_that_of_one(documented: Documented, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out, options = documented("imwa")
    assert_same(load_file(out / "averaged.safetensors"), alone(imwa, tmp_path / "alone", options, monkeypatch))


def test_acowa_ends_with_a_combination_of_the_shards_and_is_that_of_one_process(
    documented: Documented, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out, options = documented("acowa")
    averaged = load_file(out / "averaged.safetensors")
    assert_same(averaged, alone(acowa, tmp_path / "alone", options, monkeypatch))
    models = torch.stack([load_file(out / "shards" / f"step-{p}.safetensors")["weight"][0] for p in range(1, 17)])
    models, target = models.double(), averaged["weight"][0].double()
    beta = torch.linalg.lstsq(models.T, target[:, None]).solution
    assert torch.allclose(models.T @ beta, target[:, None], atol=1e-5 * float(target.abs().max()))
    assert abs(float(beta.sum()) - 1) > 0.1  # no mean
