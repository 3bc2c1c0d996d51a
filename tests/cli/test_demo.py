"""The main job on the demo's checkpoints: the guarantees of ``ckptavg sewa ./ckpts --k 5``, checked independently."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
import task as demo_task
import torch
import train as demo_training
from conftest import TASK, Run
from safetensors.torch import load_file
from torch import Tensor
from torch.optim.swa_utils import update_bn

import ckptavg

# the demo, with scores that take longer than a terminal is left alone
SLOW = """
import os, sys, time

import torch

sys.path.append(os.environ["DEMO"])
import task as demo
from task import *

def loss(model, batch):
    if not torch.is_grad_enabled():
        time.sleep(0.03)
    return demo.loss(model, batch)
"""


@pytest.fixture(scope="session")
def selected(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> ckptavg.Result:
    """Run SeWA to choose 5 of the last 12 checkpoints."""
    output = tmp_path_factory.mktemp("selected") / "averaged.safetensors"
    return ckptavg.sewa(digits, k=5, last=12, task=TASK, output=output)


class ByHand:
    """The demo's evaluation in plain torch, independent of the code of the search."""

    def __init__(self, folder: Path) -> None:
        paths = sorted(folder.glob("*.pt"), key=lambda path: int(re.findall(r"\d+", path.name)[0]))
        self.states: list[dict[str, Tensor]] = [torch.load(path)["state_dict"] for path in paths]
        self.model = demo_task.model()
        torch.manual_seed(0)
        self.training = list(demo_task.train_dataloader())
        self.validation = [torch.cat(parts) for parts in zip(*demo_task.val_dataloader(), strict=True)]

    def load(self, subset: tuple[int, ...]) -> None:
        last = self.states[subset[-1]]
        mean = {
            name: torch.stack([self.states[i][name] for i in subset]).mean(dim=0) if t.is_floating_point() else t
            for name, t in last.items()
        }
        self.model.load_state_dict(mean)
        update_bn(self.training, self.model)
        self.model.eval()

    def loss(self, subset: tuple[int, ...]) -> float:
        self.load(subset)
        with torch.no_grad():
            return float(demo_task.loss(self.model, self.validation).mean())


@pytest.mark.thorough
def test_the_subset_is_within_the_best_one_percent_of_all(digits: Path, selected: ckptavg.Result):
    by_hand = ByHand(digits)
    twelve = range(len(by_hand.states) - 12, len(by_hand.states))
    losses = {subset: by_hand.loss(subset) for subset in itertools.combinations(twelve, 5)}
    chosen = tuple(twelve[i] for i, one in enumerate(selected.candidates) if one.coefficient)
    rank = sorted(losses, key=losses.__getitem__).index(chosen)
    assert len(losses) == 792 and rank < 0.01 * len(losses)


def test_the_file_is_the_uniform_average_with_the_reported_score(digits: Path, selected: ckptavg.Result):
    assert selected.output is not None
    written = load_file(selected.output.path)
    model = demo_task.model()
    model.load_state_dict(written, strict=True)
    model.eval()
    by_hand = ByHand(digits)
    chosen = [i + len(by_hand.states) - 12 for i, one in enumerate(selected.candidates) if one.coefficient]
    for name, tensor in written.items():
        if name in selected.output.recomputed:
            continue
        values = torch.stack([by_hand.states[i][name].double() for i in chosen])
        expected = values[-1] if name in selected.output.not_averaged else values.mean(dim=0)
        # 1/5 and the mean's own division differ by float64 roundings, which decide a float32 one only near a tie
        torch.testing.assert_close(tensor.double(), expected, rtol=2**-24 * (1 + 2**-20), atol=0)
    with torch.no_grad():
        loss = float(demo_task.loss(model, by_hand.validation).mean())
        accuracy = float(demo_task.metric(model, by_hand.validation).mean())
    score = selected.scores["val"]
    assert score.loss == pytest.approx(loss, rel=1e-5) and score.metric == pytest.approx(accuracy, abs=1e-6)


def test_batchnorm_statistics_match_update_bn(digits: Path, selected: ckptavg.Result):
    assert selected.output is not None
    written = load_file(selected.output.path)
    model = demo_task.model()
    model.load_state_dict(written)
    torch.manual_seed(0)  # the seed of the run: the training loader shuffles
    update_bn(list(demo_task.train_dataloader()), model)
    assert selected.output.recomputed == [name for name in sorted(written) if "running" in name]
    for name in selected.output.recomputed:
        torch.testing.assert_close(written[name], model.state_dict()[name], rtol=1e-6, atol=1e-7)


def test_the_average_beats_the_last_and_the_best_single_checkpoint(selected: ckptavg.Result):
    value = selected.scores["val"].value
    assert not selected.worse and selected.best_step is not None
    better = f"Better than the best single candidate (step {selected.best_step}) on test data by accuracy: "
    assert selected.verdict.startswith(f"{better}{selected.gains['best']}") and selected.gains["best"].separated
    for name, gain in selected.gains.items():
        rival = selected.baselines[name]["test"].value
        assert gain.value == pytest.approx(selected.scores["test"].value - rival) and gain.units == 400
    assert value > selected.baselines["best"]["val"].value >= selected.baselines["last"]["val"].value
    assert set(selected.baselines) == {"best", "last", "swa", "lawa-5"}
    assert selected.scores["test"].value > selected.baselines["last"]["test"].value


def test_the_cost_counts_every_batch(selected: ckptavg.Result):
    assert selected.cost is not None
    # On 4 validation batches, on each of which loss and metric run the model: 12 candidates, the 8 most probable masks,
    # SWA and LAWA, and swaps. On 4 test batches: best, last, SWA and LAWA. Before each, BatchNorm from 15 training
    # batches. The file itself on both. Learning: 100 steps of 2 samples; each gradient that ranks swaps: 4 batches.
    on_test = 2 + 2
    scored = selected.cost.evaluations - on_test
    ranking = selected.cost.backward_batches - 200
    assert scored > 12 + 8 + 2 and ranking > 0 and ranking % 4 == 0
    assert selected.cost.forward_batches == 200 + ranking + (scored + on_test) * (8 + 15) + (8 + 8 + 15)


def test_two_runs_give_identical_bytes(digits: Path, run: Run, tmp_path: Path):
    runs = [run("sewa", digits, "--k", 5, "--last", 6, "--task", TASK, "-o", name, "--steps", 20) for name in "ab"]
    assert [done.returncode for done in runs] == [0, 0]
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_command_prints_one_line_on_stdout_and_the_report_on_stderr(digits: Path, run: Run, tmp_path: Path):
    done = run("sewa", digits, "--k", 5, "--task", TASK, "--steps", 30, "--report", "report.json")
    assert (done.returncode, done.stdout) == (0, "averaged.safetensors\n")
    model = demo_task.model()
    model.load_state_dict(load_file(tmp_path / "averaged.safetensors"), strict=True)
    for expected in (
        "24 candidates",
        "step-360.pt",
        "best single* (step",
        "lawa-5",
        "single candidate",
        "passes over the validation data",
        "blake3:",
    ):
        assert expected in done.stderr, expected
    assert "\x1b" not in done.stderr  # no colours and no progress bar without a terminal
    report = json.loads((tmp_path / "report.json").read_text())
    assert sum(one["coefficient"] for one in report["candidates"]) == pytest.approx(1)
    assert report["output"]["bytes"] == (tmp_path / "averaged.safetensors").stat().st_size


def test_json_is_the_only_thing_on_stdout(digits: Path, run: Run):
    done = run("sewa", digits, "--k", 3, "--last", 5, "--task", TASK, "--steps", 5, "--json", "-q", "--no-baselines")
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert set(report) >= {
        "strategy",
        "settings",
        "seed",
        "version",
        "candidates",
        "scores",
        "cost",
        "output",
        "verdict",
    }
    assert report["baselines"] == {} and report["candidates"][0]["score"] is None
    assert set(report["candidates"][0]) == {"path", "step", "coefficient", "score", "s"}


def test_verify_rebuilds_the_file_and_detects_a_changed_one(digits: Path, run: Run, tmp_path: Path):
    run("sewa", digits, "--k", 3, "--last", 5, "--task", TASK, "--steps", 5)
    done = run("verify", "averaged.safetensors", "--sources", digits.parent)
    assert (done.returncode, done.stdout) == (0, "averaged.safetensors\n")
    assert "12 tensors equal to the average" in done.stderr and "4 were recomputed" in done.stderr
    content = bytearray((tmp_path / "averaged.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "averaged.safetensors").write_bytes(content)
    done = run("verify", "averaged.safetensors", "--sources", digits)
    assert done.returncode == 3 and "1 tensor not equal to the average of the sources" in done.stderr
    done = run("verify", "averaged.safetensors", "--sources", tmp_path)
    assert done.returncode == 3 and "no source" in done.stderr


def test_eval_of_the_output_matches_the_report(digits: Path, run: Run):
    report = json.loads(run("sewa", digits, "--k", 2, "--last", 4, "--task", TASK, "--steps", 5, "--json").stdout)
    (scored,) = json.loads(run("eval", "averaged.safetensors", "--task", TASK, "--json").stdout)["files"]
    assert scored["val"] == report["scores"]["val"] and scored["test"] == report["scores"]["test"]
    done = run("eval", "averaged.safetensors", digits / "step-360.pt", "--task", TASK)  # the output has no step
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 4  # a heading, two files, the standard errors


def test_never_worse_writes_the_best_single_checkpoint(digits: Path, run: Run, tmp_path: Path):
    """Averaging networks trained from different starts lowers the score, and the report states it."""
    demo_training.train(tmp_path / "other", seed=1)
    arguments = (
        "swa",
        digits / "step-360.pt",
        tmp_path / "other" / "step-360.pt",
        "--task",
        TASK,
    )
    done = run(*arguments, "--json")
    worse = json.loads(done.stdout)
    assert worse["worse"] and "WORSE than a single candidate" in worse["verdict"] and "WORSE" in done.stderr
    assert [one["coefficient"] for one in worse["candidates"]] == [0.5, 0.5]
    report = json.loads(run(*arguments, "--json", "--force", "--never-worse").stdout)
    (single,) = [one for one in report["candidates"] if one["coefficient"]]
    assert single["coefficient"] == 1.0 and single["score"]["metric"] == max(
        c["score"]["metric"] for c in report["candidates"]
    )
    written = load_file(tmp_path / "averaged.safetensors")
    original = torch.load(single["path"])["state_dict"]
    assert all(torch.equal(written[name], original[name]) for name in written if "running" not in name)
    assert report["scores"]["val"]["metric"] == single["score"]["metric"]
    assert "was written instead" in report["verdict"]


@pytest.mark.thorough
def test_a_terminal_shows_the_loss_the_time_left_and_the_certainty_of_the_mask(digits: Path, tmp_path: Path):
    (tmp_path / "slow_task.py").write_text(SLOW)
    main_end, terminal = pty.openpty()
    words = f"-m ckptavg sewa {digits} --k 2 --last 4 --task slow_task.py --steps 150"
    command = [sys.executable, *words.split()]
    environment = {**os.environ, "COLUMNS": "100", "TERM": "xterm", "OMP_NUM_THREADS": "1", "DEMO": str(TASK.parent)}
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=terminal, env=environment)
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # Linux raises it when the other end is closed
        while part := os.read(main_end, 4096):
            shown += part
    os.close(main_end)
    assert process.stdout is not None and process.stdout.read() == b"averaged.safetensors\n" and process.wait() == 0
    process.stdout.close()
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())
    assert re.search(r"learning the mask .*/150 +loss 0\.\d{4} +sure \d+% +about \d+ s left", text)
    assert "scoring candidates" in text and "●" in text
