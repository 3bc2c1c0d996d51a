"""The study's own trainings: their data, schedules and dynamics."""

from __future__ import annotations

import math
from pathlib import Path

import gymnasium
import pytest
import torch
from study.domains import TOYS, cart, domain
from study.domains.attention import Block
from study.job import Batches, Training, write_task
from study.training import train

from ckptavg.checkpoints.discover import discover
from ckptavg.checkpoints.window import Window
from ckptavg.coefficients import Coefficients
from ckptavg.context import Run
from ckptavg.objective.mixture import Mixture
from ckptavg.tasks.python_file import PythonTask


@pytest.mark.parametrize("name", TOYS)
def test_every_domain_is_a_task_that_ckptavg_scores(name: str, tmp_path: Path):
    job = domain(name).job(3, None)
    train(job, _training(tmp_path / "c", steps=2, schedule="cosine", seed=3))
    write_task(tmp_path / "study_task.py", name, 3, None)
    trained = _mixture_scores(tmp_path)
    assert all(math.isfinite(value) for value in trained)
    if job.figure is not None:
        assert math.isfinite(job.figure(job.model()))


def _training(folder: Path, *, steps: int, schedule: str, seed: int = 0) -> Training:
    return Training(folder=folder, steps=steps, every=1, schedule=schedule, seed=seed, device=torch.device("cpu"))


def _mixture_scores(folder: Path) -> list[float]:
    with discover([folder / "c"], Window()) as found:
        task = PythonTask(str(folder / "study_task.py"))
        mixture = Mixture(task, found.checkpoints, Run(device=torch.device("cpu")))
        half = Coefficients.uniform([0, 1], 2)
        return [mixture.score(half, split).value for split in ("train", "val", "test")]


@pytest.mark.parametrize("name", ["digits-cnn", "source-lines", "source-bytes", "logistic"])
def test_no_example_is_in_two_splits(name: str):
    job = domain(name).job(1, None)
    splits = [{tuple(row.flatten().tolist()) for batch in part for row in batch[0]} for part in (job.val, job.test)]
    trained = {tuple(row.flatten().tolist()) for row in job.train.dataset.tensors[0]}  # pyright: ignore
    common = [splits[0] & trained, splits[1] & trained, splits[0] & splits[1]]
    # short passages and similar lines do occur twice in sources
    assert max(map(len, common)) <= (0.05 * len(splits[0]) if name.startswith("source") else 0)


def test_the_cosine_ends_at_no_rate_and_the_constant_does_not(tmp_path: Path):
    job = domain("logistic").job(0, None)
    moved: dict[str, float] = {}
    for schedule in ("constant", "cosine"):
        folder = tmp_path / schedule
        train(job, _training(folder, steps=40, schedule=schedule))
        before, after = (torch.load(folder / f"step-{step}.pt")["state_dict"]["weight"] for step in (39, 40))
        moved[schedule] = float((after - before).norm())
    assert moved["cosine"] < 0.01 * moved["constant"]


def test_batches_are_whole_when_shuffled_and_all_when_not():
    numbers = torch.arange(10)
    assert [batch[0].tolist() for batch in Batches(numbers, size=4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    shuffled = list(Batches(numbers, size=4, shuffle=True))
    assert [len(batch[0]) for batch in shuffled] == [4, 4] and len(Batches(numbers, size=4, shuffle=True)) == 2


def test_returns_are_those_of_one_environment_alone():
    env = gymnasium.make("CartPole-v1", max_episode_steps=123)
    starts = cart.starts(60, torch.Generator().manual_seed(1))
    alone = []
    for start in starts:
        env.reset(seed=0)
        env.unwrapped.state = start.double().numpy()
        state, over, total = start, False, 0.0
        while not over:
            seen, reward, ended, cut, _ = env.step(int(cart.expert(state[None])))
            state, over, total = torch.from_numpy(seen), ended or cut, total + float(reward)
        alone.append(total)
    assert cart.returns(cart.expert, starts, 123).tolist() == alone and 1 < min(alone) < max(alone) == 123


def test_demonstrations_end_with_their_episodes_and_are_noisy():
    states, pushes = cart.demonstrations(30, 100, 0.5, torch.Generator().manual_seed(0))
    assert len(states) == len(pushes) < 30 * 100
    assert (states[:, 0].abs() <= 2.4).all() and (states[:, 2].abs() <= 12 * torch.pi / 180).all()
    assert float((pushes == cart.expert(states)).float().mean()) == pytest.approx(0.75, abs=0.05)


def test_the_expert_outlasts_chance():
    start = cart.starts(40, torch.Generator().manual_seed(0))
    chance = cart.returns(lambda states: (states[:, 1] > 0).float(), start, 500).mean()
    assert cart.returns(cart.expert, start, 500).mean() > 5 * chance


def test_attention_sees_neither_the_future_nor_padding():
    torch.manual_seed(0)
    causal, open_ = Block(8, 2, causal=True).eval(), Block(8, 2, causal=False).eval()
    x = torch.randn(1, 5, 8)
    changed = x.clone()
    changed[0, 3:] = torch.randn(2, 8)  # LayerNorm would cancel an added constant
    torch.testing.assert_close(causal(changed)[0, :3], causal(x)[0, :3])
    hidden = torch.tensor([[False, False, False, True, True]])
    torch.testing.assert_close(open_(changed, hidden)[0, :3], open_(x, hidden)[0, :3])
    assert not torch.allclose(open_(changed)[0, :3], open_(x)[0, :3])
