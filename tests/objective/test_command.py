"""``--score-cmd`` with shell commands, and with a Python script that reads the file with the safetensors library."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import Run
from hypothesis import given, settings
from hypothesis import strategies as st
from quadratic import Quadratic
from safetensors.torch import load_file, save_file

from ckptavg.coefficients import Coefficients
from ckptavg.errors import UsageError
from ckptavg.objective import score_command
from ckptavg.score import Score, Split
from ckptavg.strategies.sewa import SeWA
from ckptavg.strategies.twa import TWA

TARGET = torch.tensor([1.0, -2.0, 0.5])
EVAL = """
import json, sys
import numpy as np
from pathlib import Path
from safetensors.numpy import load_file
path = Path(sys.argv[1])
file = path / "model.safetensors" if path.is_dir() else path
w = load_file(file)["w"].astype("float64")
print("some log line with 3 numbers 7.5", file=sys.stderr)
print("distance:", float(((w - np.array([1.0, -2.0, 0.5]))**2).sum()))
print(json.dumps({"results": {"score": -float(((w - np.array([1.0, -2.0, 0.5]))**2).sum()), "n": 3}}))
"""
COMMAND = f"{sys.executable} eval.py"


@pytest.fixture
def ckpts(tmp_path: Path) -> Path:
    """Eight points around `TARGET`; the command prints the distance to it."""
    folder = tmp_path / "ckpts"
    folder.mkdir()
    draws = torch.Generator().manual_seed(0)
    for step in range(1, 9):
        point = TARGET + torch.randn(3, generator=draws) * 0.5 + 0.2
        save_file({"w": point}, folder / f"step-{step}.safetensors", metadata={"format": "pt"})
    (tmp_path / "eval.py").write_text(EVAL)
    return folder


def distance(tmp_path: Path) -> float:
    return float((load_file(tmp_path / "averaged.safetensors")["w"] - TARGET).square().sum())


def by_hand(ckpts: Path, chosen: tuple[int, ...]) -> float:
    points = [load_file(ckpts / f"step-{step}.safetensors")["w"].double() for step in range(1, 9)]
    return float((torch.stack([points[i] for i in chosen]).mean(dim=0) - TARGET).square().sum())


def test_greedy_soup_follows_the_score_of_the_command(run: Run, ckpts: Path, tmp_path: Path):
    done = run("soup", "ckpts", "--score-cmd", f"{COMMAND} {{}} | head -1", "--score-goal", "min", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    order = sorted(range(8), key=lambda i: by_hand(ckpts, (i,)))
    soup = order[:1]
    for i in order[1:]:
        if by_hand(ckpts, (*soup, i)) < by_hand(ckpts, tuple(soup)):
            soup.append(i)
    assert [i for i, candidate in enumerate(report["candidates"]) if candidate["coefficient"]] == sorted(soup)
    assert report["scores"]["val"]["metric"] == pytest.approx(by_hand(ckpts, tuple(soup)), rel=1e-5)
    assert report["scores"]["val"]["loss"] is None and report["cost"]["evaluations"] >= 15
    assert distance(tmp_path) == pytest.approx(report["scores"]["val"]["metric"], rel=1e-4)
    assert {p.name for p in tmp_path.iterdir()} == {"ckpts", "eval.py", "averaged.safetensors"}


def test_score_key_reads_a_json_line_and_the_directory_has_the_config(run: Run, ckpts: Path, tmp_path: Path):
    (ckpts / "config.json").write_text('{"mark": 1}')
    command = f"test -f {{dir}}/config.json && {COMMAND} {{dir}}"
    done = run("best", "ckpts", "--score-cmd", command, "--score-key", "results.score")
    assert done.returncode == 0, done.stderr
    assert distance(tmp_path) == pytest.approx(min(by_hand(ckpts, (i,)) for i in range(8)), rel=1e-5)
    assert re.search(r"cost: \d+ scores, ", done.stderr)


@pytest.mark.thorough
def test_sewa_and_twa_search_without_gradients(run: Run, ckpts: Path, tmp_path: Path):
    more = ("--score-cmd", COMMAND, "--score-key", "results.score", "--evaluations", 12, "--no-baselines")
    first = run("sewa", "ckpts", "--k", 3, *more, "--json")
    assert first.returncode == 0, first.stderr
    report = json.loads(first.stdout)
    assert sum(candidate["coefficient"] > 0 for candidate in report["candidates"]) == 3
    assert report["cost"]["evaluations"] <= 12 and report["trace"]["best_score"][-1] <= 0
    second = run("twa", "ckpts", *more, "--force", "--json")
    assert second.returncode == 0, second.stderr
    assert distance(tmp_path) <= by_hand(ckpts, tuple(range(8))) * (1 + 1e-5)


def test_compare_with_a_score_command(run: Run, ckpts: Path):
    names = "swa,best,soup,aswa,lawa:k=3"
    done = run("compare", "ckpts", "--score-cmd", COMMAND, "--score-key", "results.score", "--strategies", names)
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stderr.split())
    assert "scores" in text and "vs last: on validation data, on which strategies chose" in text
    chosen = "against last on the data it was chosen on. For an unbiased score, score the file once"
    assert chosen in text or "No strategy scores above the last" in text, text


def test_layer_wise_coefficients_need_gradients(run: Run, ckpts: Path):
    done = run("twa", "ckpts", "--layerwise", "--score-cmd", COMMAND)
    assert done.returncode == 2 and "layer-wise coefficients need a loss, not scores alone" in done.stderr


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        ("echo no figure #", 7, "--score-cmd printed no number on stdout: no figure"),
        ("echo nan #", 7, "--score-cmd printed nan"),
        ("echo 'it broke' >&2; exit 3 #", 7, "--score-cmd failed with exit code 3: it broke"),
        ("nonexistent-program", 7, "exit code 127: "),
        ("sleep 60 #", 7, "--score-cmd took more than 0.5 s"),
    ],
)
def test_error_shows_the_output_of_a_command_without_score(
    run: Run, ckpts: Path, tmp_path: Path, command: str, code: int, message: str
):
    done = run("best", "ckpts", "--score-cmd", command, "--score-timeout", 0.5 if "sleep" in command else 60)
    assert done.returncode == code and message in done.stderr and "Traceback" not in done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"ckpts", "eval.py"}


def test_error_names_a_missing_score_key(run: Run, ckpts: Path):
    done = run("best", "ckpts", "--score-cmd", COMMAND, "--score-key", "results.acc")
    assert done.returncode == 7 and "no JSON line with a number at results.acc" in done.stderr


@pytest.mark.parametrize("other", [("--task", "x.py"), ("--val", "x.jsonl"), ("--lm-eval", "arc")])
def test_two_ways_to_score_are_refused(run: Run, ckpts: Path, other: tuple[str, str]):
    done = run("best", "ckpts", "--score-cmd", COMMAND, *other)
    assert done.returncode == 2 and "each define how a mixture is scored" in done.stderr


def test_score_command_overrides_a_task_file_from_the_environment_or_config(run: Run, ckpts: Path, tmp_path: Path):
    (tmp_path / "task.py").write_text("raise SystemExit('was run')")
    (tmp_path / "ckptavg.toml").write_text('task = "task.py"')
    done = run("best", "ckpts", "--score-cmd", COMMAND, "--score-key", "results.score", CKPTAVG_TASK="task.py")
    assert done.returncode == 0, done.stderr


def test_an_interrupted_command_is_killed_with_its_child_processes(ckpts: Path, tmp_path: Path):
    marker = tmp_path / "alive"
    script = f"import time\nfor _ in range(600):\n    open({str(marker)!r}, 'a').write('x')\n    time.sleep(0.05)\n"
    (tmp_path / "slow.py").write_text(script)
    command = [sys.executable, "-m", "ckptavg", "best", "ckpts", "--score-cmd", f"{sys.executable} slow.py & wait #"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not marker.exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 75 and "interrupted" in err
    size = marker.stat().st_size
    time.sleep(0.3)
    assert marker.stat().st_size == size
    assert {p.name for p in tmp_path.iterdir()} == {"ckpts", "eval.py", "slow.py", "alive"}


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("acc 0.75\n", [0.75]),
        ("step 3: loss=1e-3, 2.5%", [3, 1e-3, 2.5]),
        ("v1.2.3 gpt2 -4", [-4]),
        ("inf nan", [float("inf"), float("nan")]),
        ("+.5 7.", [0.5, 7]),
        ("none", []),
    ],
)
def test_numbers_are_parsed_from_output(text: str, numbers: list[float]):
    assert list(map(repr, score_command.numbers(text))) == list(map(repr, map(float, numbers)))


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_any_number_printed_by_python_is_parsed_exactly(value: float):
    assert list(score_command.numbers(f"score: {value!r}\n")) == [value]


def test_only_json_objects_have_entries():
    text = 'log\n{"a": {"b": 1}}\n{"a.b": 2}\n[1]\n{"a": {"b": true}}\n{"a": 5}\n{bad\n'
    assert list(score_command.entries(text, "a.b")) == [1, 2]


class ScoreOnly(Quadratic):
    """The quadratic without its gradient; records the requested coefficients."""

    losses = None

    def __init__(self, n: int, d: int, seed: int) -> None:
        super().__init__(n, d, seed)
        self.requested: set[Coefficients] = set()

    def loss(self, *_: object, **__: object) -> torch.Tensor:
        raise AssertionError("there is no loss")

    def score(self, coefficients: Coefficients, on: Split | None = None) -> Score:
        self.requested.add(coefficients)
        c = torch.tensor(coefficients.values[0], dtype=torch.float64)
        value = -float((c @ self.weights_ND).square().mean())
        return Score(value=value, loss=None, metric=value, examples=None)


@pytest.mark.parametrize("seed", range(4))
def test_sewa_by_scores_ranks_far_above_chance(seed: int):
    """59 of 792 subsets are scored; the best of 59 random ones has rank 12 on average."""
    import itertools

    objective = ScoreOnly(n=12, d=8, seed=seed)
    learned = SeWA(k=5, evaluations=60).learn(objective)
    ranked = sorted(itertools.combinations(range(12), 5), key=objective.of_subset)
    assert ranked.index(learned.coefficients.selected) <= 4 and len(objective.requested) <= 60


@pytest.mark.parametrize("constraint", ["affine", "simplex"])
def test_twa_by_scores_comes_close_to_twa_by_gradients(constraint: str):
    scored = ScoreOnly(n=6, d=16, seed=1)
    learned = TWA(constraint=constraint, evaluations=200).learn(scored)  # pyright: ignore[reportArgumentType]
    assert len(scored.requested) <= 200
    trained = TWA(constraint=constraint, epochs=300, lr=0.1).learn(Quadratic(n=6, d=16, seed=1))  # pyright: ignore
    mean = scored.score(Coefficients.uniform(range(6), 6)).value
    reached, best = scored.score(learned.coefficients).value, scored.score(trained.coefficients).value
    assert reached > mean and best - reached < 0.1 * (best - mean)


@pytest.mark.parametrize("evaluations", [1, 2, 9])
def test_a_small_evaluation_budget_is_not_exceeded(evaluations: int):
    for strategy in (SeWA(k=2, evaluations=evaluations), TWA(evaluations=evaluations)):
        objective = ScoreOnly(n=6, d=3, seed=0)
        strategy.learn(objective)
        assert 1 <= len(objective.requested) <= evaluations


def test_every_subset_is_scored_if_the_budget_allows():
    objective = ScoreOnly(n=4, d=3, seed=0)
    learned = SeWA(k=3, evaluations=100).learn(objective)
    best = min(((0, 1, 2), (0, 1, 3), (0, 2, 3), (1, 2, 3)), key=objective.of_subset)
    assert learned.coefficients.selected == best


@settings(deadline=None, max_examples=5)
@given(st.integers(0, 100))
def test_search_by_scores_is_deterministic_and_leaves_numpys_generator_alone(seed: int):
    import numpy as np

    np.random.seed(7)
    first, second = (TWA(evaluations=30).learn(ScoreOnly(n=4, d=3, seed=seed)) for _ in range(2))
    assert first == second
    assert np.random.rand() == np.random.RandomState(7).rand()


def test_fewer_than_one_evaluation_is_refused():
    for strategy in (SeWA, TWA):
        with pytest.raises(UsageError, match="--evaluations must be at least 1"):
            strategy(evaluations=0)
