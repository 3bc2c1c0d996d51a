"""The study's own trainings: their data, schedules and dynamics."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from study.domains import DOMAINS, cart, domain
from study.domains.attention import Block
from study.job import Batches, write_task
from study.training import train

from ckptavg.coefficients import Coefficients
from ckptavg.discover import discover
from ckptavg.mixture import Mixture
from ckptavg.tasks.python_file import PythonTask
from ckptavg.window import Window


@pytest.mark.parametrize("name", DOMAINS)
def test_every_domain_is_a_task_that_ckptavg_scores(name: str, tmp_path: Path):
    job = domain(name).job(3, None)
    train(job, tmp_path / "c", steps=2, every=1, schedule="cosine", seed=3, device=torch.device("cpu"))
    write_task(tmp_path / "study_task.py", name, 3, None)
    trained = _mixture_scores(tmp_path)
    assert all(math.isfinite(value) for value in trained)
    if job.figure is not None:
        assert math.isfinite(job.figure(job.model()))


def _mixture_scores(folder: Path) -> list[float]:
    with discover([folder / "c"], Window()) as found:
        task = PythonTask(str(folder / "study_task.py"))
        mixture = Mixture(task, found.checkpoints, device=torch.device("cpu"))
        half = Coefficients.uniform([0, 1], 2)
        return [mixture.score(half, split).value for split in ("train", "val", "test")]


@pytest.mark.parametrize("name", ["digits-cnn", "source-lines", "source-bytes", "logistic"])
def test_no_example_is_in_two_splits(name: str):
    job = domain(name).job(1, None)
    splits = [{tuple(row.flatten().tolist()) for batch in part for row in batch[0]} for part in (job.val, job.test)]
    trained = {tuple(row.flatten().tolist()) for row in job.train.dataset.tensors[0]}  # pyright: ignore
    common = [splits[0] & trained, splits[1] & trained, splits[0] & splits[1]]
    # short passages and lines of like words do occur twice in sources
    assert max(map(len, common)) <= (0.05 * len(splits[0]) if name.startswith("source") else 0)


def test_the_cosine_ends_at_no_rate_and_the_constant_does_not(tmp_path: Path):
    job = domain("logistic").job(0, None)
    moved: dict[str, float] = {}
    for schedule in ("constant", "cosine"):
        folder = tmp_path / schedule
        train(job, folder, steps=40, every=1, schedule=schedule, seed=0, device=torch.device("cpu"))
        before, after = (torch.load(folder / f"step-{step}.pt")["state_dict"]["weight"] for step in (39, 40))
        moved[schedule] = float((after - before).norm())
    assert moved["cosine"] < 0.01 * moved["constant"]


def test_batches_are_whole_when_shuffled_and_all_when_not():
    numbers = torch.arange(10)
    assert [batch[0].tolist() for batch in Batches(numbers, size=4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    shuffled = list(Batches(numbers, size=4, shuffle=True))
    assert [len(batch[0]) for batch in shuffled] == [4, 4] and len(Batches(numbers, size=4, shuffle=True)) == 2


def test_a_step_of_the_cart_is_that_of_the_textbook():
    # one episode with plain floats, from the equations as the paper's appendix has them (friction left out)
    x, v, a, w, push = 0.3, -0.2, 0.05, 0.4, 1.0
    force, total, length = 10.0, 1.1, 0.5
    inner = (-force - 0.1 * length * w**2 * math.sin(a)) / total
    spin = (9.8 * math.sin(a) + math.cos(a) * inner) / (length * (4 / 3 - 0.1 * math.cos(a) ** 2 / total))
    speed_up = (force + 0.1 * length * (w**2 * math.sin(a) - spin * math.cos(a))) / total
    expected = [x + 0.02 * v, v + 0.02 * speed_up, a + 0.02 * w, w + 0.02 * spin]
    found = cart.step(torch.tensor([[x, v, a, w]]), torch.tensor([push]))
    assert found[0].tolist() == pytest.approx(expected, rel=1e-5)  # float32


def test_returns_count_the_steps_before_the_fall():
    upright = torch.zeros(1, 4)
    right = cart.returns(lambda states: torch.ones(len(states)), upright, 500)
    state, lasted = upright, 0
    while not bool(cart.fallen(state := cart.step(state, torch.ones(1)))):
        lasted += 1
    assert right.tolist() == [lasted] and 0 < lasted < 20
    assert cart.returns(cart.expert, upright, 123).tolist() == [123]
    assert cart.returns(cart.expert, torch.tensor([[3.0, 0, 0, 0]]), 123).tolist() == [0]


def test_the_expert_outlasts_chance():
    start = cart.starts(40, torch.Generator().manual_seed(0))
    chance = cart.returns(lambda states: (states[:, 1] > 0).float(), start, 500).mean()
    assert cart.returns(cart.expert, start, 500).mean() > 5 * chance


def test_attention_sees_neither_the_future_nor_padding():
    torch.manual_seed(0)
    causal, open_ = Block(8, 2, causal=True).eval(), Block(8, 2, causal=False).eval()
    x = torch.randn(1, 5, 8)
    changed = x.clone()
    changed[0, 3:] = torch.randn(2, 8)  # a constant added would be lost in LayerNorm
    torch.testing.assert_close(causal(changed)[0, :3], causal(x)[0, :3])
    hidden = torch.tensor([[False, False, False, True, True]])
    torch.testing.assert_close(open_(changed, hidden)[0, :3], open_(x, hidden)[0, :3])
    assert not torch.allclose(open_(changed)[0, :3], open_(x)[0, :3])
