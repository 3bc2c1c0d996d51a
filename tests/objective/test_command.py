"""``--score-cmd`` with shell commands, and with a Python script that reads the file with the safetensors library."""

from __future__ import annotations

import json
import os
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
FAST = """
import struct, sys
w = struct.unpack("<3f", open(sys.argv[1], "rb").read()[-12:])
if max(map(abs, w)) > 1e3:
    sys.exit("diverged")
print("distance:", sum((a - b) ** 2 for a, b in zip(w, (1.0, -2.0, 0.5))))
"""
BY_DISTANCE = ("--score-cmd", f"{sys.executable} -S fast.py", "--score-goal", "min")
FAILED_3 = 'echo x >> log; if test "$CKPTAVG_STEP" = 3; then echo "it broke" >&2; exit 1; fi; echo 1 #'


@pytest.fixture
def ckpts(tmp_path: Path) -> Path:
    """Eight points around `TARGET`; the command prints the distance to it."""
    folder = tmp_path / "ckpts"
    folder.mkdir()
    draws = torch.Generator().manual_seed(0)
    for step in range(1, 9):
        point = TARGET + torch.randn(3, generator=draws) * 0.5 + 0.2
        save_file({"w": point}, folder / f"step-{step}.safetensors", metadata={"format": "pt"})
        os.utime(folder / f"step-{step}.safetensors", (0, 0))  # no warning that a job is still saving
    (tmp_path / "eval.py").write_text(EVAL)
    (tmp_path / "fast.py").write_text(FAST)
    return folder


def distance(tmp_path: Path) -> float:
    return float((load_file(tmp_path / "averaged.safetensors")["w"] - TARGET).square().sum())


def by_hand(ckpts: Path, chosen: tuple[int, ...]) -> float:
    points = [load_file(ckpts / f"step-{step}.safetensors")["w"].double() for step in range(1, 9)]
    return float((torch.stack([points[i] for i in chosen]).mean(dim=0) - TARGET).square().sum())


def test_greedy_soup_follows_the_score_of_the_command(run: Run, ckpts: Path, tmp_path: Path):
    done = run("soup", "ckpts", *BY_DISTANCE, "--json")
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
    assert {p.name for p in tmp_path.iterdir()} == {"ckpts", "eval.py", "fast.py", "averaged.safetensors"}


def test_score_key_reads_a_json_line_and_the_directory_has_the_config(run: Run, ckpts: Path, tmp_path: Path):
    (ckpts / "config.json").write_text('{"mark": 1}')
    command = f"test -f {{dir}}/config.json && {COMMAND} {{dir}}"
    done = run("best", "ckpts", "--score-cmd", command, "--score-key", "results.score")
    assert done.returncode == 0, done.stderr
    assert distance(tmp_path) == pytest.approx(min(by_hand(ckpts, (i,)) for i in range(8)), rel=1e-5)
    assert re.search(r"cost: \d+ scores, ", done.stderr)


@pytest.mark.thorough
def test_sewa_and_twa_search_without_gradients(run: Run, ckpts: Path, tmp_path: Path):
    more = (*BY_DISTANCE, "--evaluations", 12, "--no-baselines")
    first = run("sewa", "ckpts", "--k", 3, *more, "--json")
    assert first.returncode == 0, first.stderr
    report = json.loads(first.stdout)
    assert sum(candidate["coefficient"] > 0 for candidate in report["candidates"]) == 3
    assert report["cost"]["evaluations"] <= 12 and report["trace"]["best_score"][-1] <= 0  # negated
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


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("twa:solver=quadratic", "the quadratic solver needs a loss, not scores alone"),
        ("sewa:solver=quadratic:k=2", "the quadratic solver needs a loss, not scores alone"),
        ("twa:layerwise=true", "--layerwise is a setting of the gradient solver"),
    ],
)
def test_settings_that_need_a_loss_are_refused_before_any_strategy_of_a_comparison_is_scored(
    run: Run, ckpts: Path, spec: str, message: str
):
    for more in ((), ("--dry-run",)):
        done = run("compare", "ckpts", "--score-cmd", "touch scored; echo 1 #", "--strategies", f"last,{spec}", *more)
        assert done.returncode == 2 and f"error: {spec}: {message}" in done.stderr
    assert not (ckpts.parent / "scored").exists()


def test_layer_wise_coefficients_need_gradients(run: Run, ckpts: Path):
    done = run("twa", "ckpts", "--layerwise", "--score-cmd", COMMAND)
    assert done.returncode == 2 and "--layerwise is a setting of the gradient solver" in done.stderr


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
    assert {p.name for p in tmp_path.iterdir()} == {"ckpts", "eval.py", "fast.py"}


def test_a_failed_run_is_named_and_its_file_kept_with_a_command_that_repeats_it(
    run: Run, ckpts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "a b").mkdir()
    base = ("best", "ckpts", "--score-cmd", f"true {{}}; {FAILED_3}", "-o", "a b/out")
    error = "error: step-3.safetensors (step 3): --score-cmd failed with exit code 1: it broke"
    done = run(*base)
    assert done.returncode == 7 and f"{error}\nhint: --keep-failed keeps its file" in done.stderr, done.stderr
    assert "--skip-bad ranks it last" in done.stderr and list((tmp_path / "a b").iterdir()) == []
    for _ in range(2):  # it replaces the one before
        done = run(*base, "--keep-failed")
        assert f"{error}; its file is kept in a b/out.ckptavg/failed-step-3.safetensors/\n" in done.stderr, done.stderr
    (kept,) = (tmp_path / "a b" / "out.ckptavg").iterdir()
    assert load_file(kept / "model.safetensors")["w"].equal(load_file(ckpts / "step-3.safetensors")["w"])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "log").unlink()
    again = subprocess.run(done.stderr.partition("\nhint: ")[2], shell=True, capture_output=True, text=True)
    assert (again.returncode, again.stderr) == (1, "it broke\n") and (tmp_path / "log").read_text() == "x\n"


def test_with_skip_bad_a_failed_or_late_run_or_nan_is_the_worst_score(run: Run, ckpts: Path, tmp_path: Path):
    for step in (2, 5, 7):
        save_file({"w": torch.full((3,), 1e4 * step)}, ckpts / f"step-{step}.safetensors", metadata={"format": "pt"})
    nan = 'if test "$CKPTAVG_STEP" = 5; then echo nan; elif test "$CKPTAVG_STEP" = 7; then sleep 60; else'
    command = f"{nan} {BY_DISTANCE[1]} {{}}; fi"
    more = ("--score-cmd", command, "--score-goal", "min", "--score-timeout", 1)
    assert "step-2.safetensors (step 2): --score-cmd failed with exit code 1" in run("soup", "ckpts", *more).stderr
    done = run("soup", "ckpts", *more, "--skip-bad", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    alone = {candidate["step"]: candidate["score"] for candidate in report["candidates"]}
    assert {step for step, score in alone.items() if score.get("invalid")} == {2, 5, 7}
    chosen = [candidate["step"] for candidate in report["candidates"] if candidate["coefficient"]]
    order = sorted((0, 2, 3, 5, 7), key=lambda i: by_hand(ckpts, (i,)))
    soup = order[:1]
    for i in order[1:]:
        soup += [i] if by_hand(ckpts, (*soup, i)) < by_hand(ckpts, tuple(soup)) else []
    assert chosen == [i + 1 for i in sorted(soup)]
    warnings = [text for text in report["warnings"] if "ranked below every valid score" in text]
    for i, reason in enumerate(["failed with exit code 1: diverged", "printed nan", "took more than 1 s"]):
        step = (2, 5, 7)[i]
        assert warnings[i].startswith(f"step-{step}.safetensors (step {step}): --score-cmd {reason}"), warnings
    assert len(warnings) == len(set(warnings)) == 5
    assert "--score-cmd failed for 2 more mixtures" in report["warnings"]


@pytest.mark.parametrize(
    ("words", "command", "message"),
    [
        (("soup",), "exit 1 #", "no candidate has a score; the last failure: step-8.safetensors (step 8)"),
        (("swa", "--no-baselines"), 'test -n "$CKPTAVG_STEP" && echo 1 #', "mean of steps 1, 2, 3, ..., 8: --score"),
        (("best",), "nonexistent-program", "step-1.safetensors (step 1): --score-cmd failed with exit code 127"),
        (("best",), """echo '{"n": 8, "acc": 0.5}' #""", "step-1.safetensors (step 1): --score-cmd printed a JSON"),
    ],
)  # fmt: skip
def test_skip_bad_neither_writes_a_failed_mixture_nor_skips_a_wrong_command(
    run: Run, ckpts: Path, tmp_path: Path, words: tuple[str, ...], command: str, message: str
):
    done = run(*words, "ckpts", "--skip-bad", "--score-cmd", command)
    assert done.returncode == 7 and f"error: {message}" in done.stderr, done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"ckpts", "eval.py", "fast.py"}


def test_a_failed_run_is_tried_again_by_the_next_one_and_no_other_is(run: Run, ckpts: Path, tmp_path: Path):
    base = ("best", "ckpts", "--no-baselines", "--skip-bad", "--keep-journal", "--force", "--score-cmd")
    command = FAILED_3.replace("= 3;", "= 3 && ! test -e fixed;")
    assert run(*base, command).returncode == 0 and (tmp_path / "log").read_text() == 8 * "x\n"
    (tmp_path / "fixed").touch()
    done = run(*base, command)
    assert "resuming with 7 scores of an interrupted run" in done.stderr and "ranked below" not in done.stderr
    assert (tmp_path / "log").read_text() == 9 * "x\n"


@pytest.mark.parametrize("words", ["soup", "aswa", "sewa --k 3 --evaluations 12", "compare --strategies best,swa,soup"])
def test_runs_at_a_time_change_no_result(run: Run, ckpts: Path, tmp_path: Path, words: str):
    name, *options = words.split()
    reports: list[dict[str, object]] = []
    for jobs in (1, 3):
        done = run(name, "ckpts", *options, *BY_DISTANCE, "--score-jobs", jobs, "--json", "--force")
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        del report["run"]  # the command
        for part in (report, *report.get("strategies", ())):
            part["cost"].pop("seconds")
        reports.append(report)
    assert reports[0] == reports[1]


def test_several_runs_are_at_work_at_a_time_each_with_a_file_and_a_name_of_its_own(
    run: Run, ckpts: Path, tmp_path: Path
):
    meet = "touch job-$CKPTAVG_JOB; until test -e job-0 && test -e job-1; do sleep 0.01; done"
    command = f'echo "$CKPTAVG_STEP|$CKPTAVG_NAME|"{{}} >> log; {meet}; echo 1'
    done = run("swa", "ckpts", "--last", 2, "--score-cmd", command, "--score-jobs", 2, "--score-timeout", 60)
    assert done.returncode == 0, done.stderr
    rows = sorted(line.split("|") for line in (tmp_path / "log").read_text().splitlines())
    assert [row[:2] for row in rows] == [
        ["", "mean of steps 7, 8"], ["7", "step-7.safetensors"], ["8", "step-8.safetensors"],
    ]  # fmt: skip
    assert len({row[2] for row in rows}) == 3 and {p.name for p in tmp_path.glob("*.ckptavg*")} == set()


def test_the_text_of_the_first_score_is_shown_once_and_equal_scores_are_a_warning(run: Run, ckpts: Path):
    done = run("best", "ckpts", *BY_DISTANCE)
    text = " ".join(done.stderr.split())
    assert f"--score-cmd scores step-1.safetensors: {by_hand(ckpts, (0,)):.6g}, from: distance: 1.7" in text
    assert text.count("from: distance") == 1 and "the same" not in text and "does it read the file" not in text
    text = " ".join(run("soup", "ckpts", "--score-cmd", "echo n=7 #", "--force").stderr.split())
    assert "mixtures the score 7: does it read the file that it is given, and is this number its score?" in text
    assert "does it read" not in run("best", "ckpts", "--last", 1, "--score-cmd", "echo n=7 #", "--force").stderr
    quiet = run("best", "ckpts", *BY_DISTANCE, "--quiet", "--force")
    assert (quiet.returncode, quiet.stderr) == (0, "")


def test_error_names_a_missing_score_key(run: Run, ckpts: Path):
    done = run("best", "ckpts", "--score-cmd", COMMAND, "--score-key", "results.acc")
    assert (
        done.returncode == 7 and "no JSON with a number at results.acc, but at results.score, results.n" in done.stderr
    )


@pytest.mark.parametrize("other", [("--task", "x.py"), ("--val", "x.jsonl"), ("--lm-eval", "arc")])
def test_two_ways_to_score_are_refused(run: Run, ckpts: Path, other: tuple[str, str]):
    done = run("best", "ckpts", "--score-cmd", COMMAND, *other)
    assert done.returncode == 2 and "each define how a mixture is scored" in done.stderr


def test_score_command_overrides_a_task_file_from_the_environment_or_config(run: Run, ckpts: Path, tmp_path: Path):
    (tmp_path / "task.py").write_text("raise SystemExit('was run')")
    (tmp_path / "ckptavg.toml").write_text('task = "task.py"')
    done = run("best", "ckpts", "--score-cmd", COMMAND, "--score-key", "results.score", CKPTAVG_TASK="task.py")
    assert done.returncode == 0, done.stderr


def test_interrupted_commands_are_killed_with_their_child_processes_and_scores_are_kept(ckpts: Path, tmp_path: Path):
    script = "import os, time\nfor _ in range(900):\n    open(os.environ['CKPTAVG_STEP'], 'a').write('x')\n"
    (tmp_path / "slow.py").write_text(f"{script}    time.sleep(0.05)\n")
    score = f'test "$CKPTAVG_STEP" = 1 && echo 1 && exit; {sys.executable} -S slow.py & wait #'
    command = [sys.executable, "-m", "ckptavg", "best", "ckpts", "--score-cmd", score, "--score-jobs", "2"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    markers = [tmp_path / "2", tmp_path / "3"]
    while not all(marker.exists() for marker in markers):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 75 and err.splitlines()[-2:] == [
        "error: interrupted; nothing was written",
        "hint: 1 score is kept in averaged.safetensors.ckptavg/; run the same command to resume",
    ]  # fmt: skip
    sizes = [marker.stat().st_size for marker in markers]
    time.sleep(0.3)
    assert [marker.stat().st_size for marker in markers] == sizes
    left = {"ckpts", "eval.py", "fast.py", "slow.py", "2", "3", "averaged.safetensors.ckptavg"}
    assert {p.name for p in tmp_path.iterdir()} == left
    assert {p.name for p in (tmp_path / "averaged.safetensors.ckptavg").iterdir()} == {"journal.jsonl", "lock"}


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


@pytest.mark.parametrize("n", [6, 30])
def test_no_search_by_scores_is_below_the_mean_or_the_last_ones_and_a_plain_answer_is_said(n: int):
    objective = ScoreOnly(n=n, d=3, seed=1)
    for strategy in (SeWA(k=3, evaluations=24), TWA(evaluations=24, constraint="simplex")):
        value = objective.score(strategy.learn(objective).coefficients).value
        assert value >= objective.score(Coefficients.uniform(range(n), n)).value
        if isinstance(strategy, SeWA):
            assert value >= objective.score(Coefficients.uniform(range(n - 3, n), n)).value
    objective.weights_ND[:] = torch.randn(n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    objective.weights_ND -= objective.weights_ND.mean(dim=0)  # the mean of all is the optimum
    for strategy in (SeWA(k=3, evaluations=24), TWA(evaluations=24, constraint="simplex")):
        learned = strategy.learn(objective)
        assert learned.coefficients == Coefficients.uniform(range(n), n)
        assert any("the mean of all" in note for note in learned.notes)


@pytest.mark.parametrize("evaluations", [1, 2, 9])
def test_a_small_evaluation_budget_is_not_exceeded(evaluations: int):
    for strategy in (SeWA(k=2, evaluations=evaluations), TWA(evaluations=evaluations)):
        objective = ScoreOnly(n=6, d=3, seed=0)
        strategy.learn(objective)
        assert 1 <= len(objective.requested) <= evaluations


def test_every_subset_is_scored_if_the_budget_allows():
    objective = ScoreOnly(n=4, d=3, seed=0)
    learned = SeWA(k=3, evaluations=100).learn(objective)
    threes = {(0, 1, 2), (0, 1, 3), (0, 2, 3), (1, 2, 3)}
    assert {c.selected for c in objective.requested} >= threes
    best = min([*threes, *((i,) for i in range(4)), (0, 1, 2, 3)], key=objective.of_subset)
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
