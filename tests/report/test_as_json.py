"""JSON of a report against a literal: scripts depend on every key and on their order."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from ckptavg.checkpoints.components import LeftOut
from ckptavg.cost import Cost
from ckptavg.report.as_json import plain, to_json
from ckptavg.report.result import CandidateResult, Comparison, Gain, MatrixResult, Output, Result, StrategyResult
from ckptavg.runtime import version
from ckptavg.runtime.command_line import CommandLine
from ckptavg.score import PerExample, Score

COST = Cost(forward_batches=4, backward_batches=2, evaluations=3, seconds=1.23456, epochs=None, epochs_of="train")
EACH = PerExample(values_U=torch.ones(2), examples_U=torch.ones(2))
GOOD = Score(value=0.5, loss=0.25, metric=0.5, examples=2, per_example=EACH, resampled=lambda _: 0.0, batches=30)
BAD = Score(value=-math.inf, loss=math.nan, metric=None, examples=None, invalid="loss is nan")
COST_JSON = {"forward_batches": 4, "backward_batches": 2, "evaluations": 3, "seconds": 1.235, "epochs": None,
             "epochs_of": "train", "passes": None, "passes_over": "val"}  # fmt: skip
GOOD_JSON = {"loss": 0.25, "metric": 0.5, "examples": 2, "loss_noise": None, "metric_noise": None}
BAD_JSON = {"loss": None, "metric": None, "examples": None, "loss_noise": None, "metric_noise": None,
            "invalid": "loss is nan"}  # fmt: skip
RESULT = Result(
    strategy="sewa",
    settings={"k": 2, "betas": (0.9, 0.99)},
    seed=7,
    candidates=[
        CandidateResult(path=Path("a/1.pt"), step=1, coefficient=0.0, score=BAD, columns={"s": math.inf, "said": "no"}),
        CandidateResult(path=Path("a/2.pt"), step=2, coefficient=(0.25, 0.75)),
    ],
    left_out=[LeftOut(path=Path("a/x"), reason="not a checkpoint")],
    scores={"val": GOOD},
    baselines={"best": {"val": GOOD, "test": BAD}},
    scored_on="val",
    groups=(("a.", "b."), ("",)),
    holdout=0.5,
    held_out=0.75,
    effective=1.5,
    best_step=2,
    verdict="Better.",
    gains={"best": Gain(value=0.5, units=9, unit="batches", reason="only 9 batches")},
    worse=True,
    replaced=True,
    cost=COST,
    matrix=MatrixResult(bits=4, group_size=128, bytes=10, error=0.1),
    tables={"subsets": [{"loss": math.nan, "real": 1}]},
    trace={"loss": (1.0, math.nan)},
    warnings=("w",),
    output=Output(path=Path("o"), data_digest="blake3:ab", sha256="cd", bytes=9, dtype="float32", not_averaged=["n"]),
    next_steps={"load": "f", "verify": "v"},
)
RESULT_JSON = {
    "schema_version": 1,
    "kind": "average",
    "run": None,
    "strategy": "sewa",
    "settings": {"k": 2, "betas": [0.9, 0.99]},
    "seed": 7,
    "version": version.own(),
    "candidates": [
        {"path": "a/1.pt", "step": 1, "coefficient": 0.0, "score": BAD_JSON, "s": None, "said": "no"},
        {"path": "a/2.pt", "step": 2, "coefficient": [0.25, 0.75], "score": None},
    ],
    "left_out": [{"path": "a/x", "reason": "not a checkpoint", "kind": "info", "hint": None}],
    "scores": {"val": GOOD_JSON},
    "baselines": {"best": {"val": GOOD_JSON, "test": BAD_JSON}},
    "scored_on": "val",
    "groups": [["a.", "b."], [""]],
    "holdout": 0.5,
    "held_out": 0.75,
    "effective": 1.5,
    "best_step": 2,
    "verdict": "Better.",
    "gains": {"best": {"value": 0.5, "low": None, "high": None, "separated": False, "units": 9, "unit": "batches",
                       "paired": True, "reason": "only 9 batches"}},
    "worse": True,
    "replaced": True,
    "cost": COST_JSON,
    "matrix": {"bits": 4, "group_size": 128, "bytes": 10, "error": 0.1, "offload": "none", "precision": "float32",
               "compiled": False},
    "tables": {"subsets": [{"loss": None, "real": 1}]},
    "trace": {"loss": [1.0, None]},
    "warnings": ["w"],
    "output": {"path": "o", "data_digest": "blake3:ab", "sha256": "cd", "bytes": 9, "dtype": "float32",
               "source_digests": {}, "not_averaged": ["n"], "recomputed": [], "derived": [], "averaged_buffers": []},
    "next_steps": {"load": "f", "verify": "v"},
}  # fmt: skip


def test_a_report_has_its_keys_in_their_order():
    assert to_json(RESULT) == json.dumps(RESULT_JSON, indent=2)
    empty = json.loads(to_json(Result(strategy="swa", settings={}, seed=0, candidates=[])))
    assert list(empty) == list(RESULT_JSON)
    assert [empty[key] for key in ("cost", "matrix", "output")] == [None, None, None]


def test_a_score_has_its_standard_errors():
    values = torch.tensor([0.0, 1.0, 1.0, 0.0])
    each = PerExample(values_U=values, examples_U=torch.ones(4))
    score = Score(value=0.5, loss=0.25, metric=0.5, examples=4, per_example=each, loss_noise=0.125)
    assert plain(score) == {"loss": 0.25, "metric": 0.5, "examples": 4, "loss_noise": 0.125, "metric_noise": 0.25}


def test_a_report_has_the_command_that_it_is_of(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["anything", "sewa", "my ckpts", "--k", "5"])
    monkeypatch.setenv("CKPTAVG_VAL", "a b.jsonl")
    line = CommandLine.current({"seed": "3"}, processes=2)
    assert line.command == "CKPTAVG_VAL='a b.jsonl' ckptavg sewa 'my ckpts' --k 5"
    head = plain(line)
    assert json.loads(to_json(RESULT, line))["run"] == head
    assert (head["configuration"], head["processes"]) == ({"seed": "3"}, 2)
    assert head["versions"].keys() >= {"ckptavg", "python", "torch", "numpy"}


def test_a_comparison_has_every_strategy_after_the_winners_report():
    gain = Gain(value=0.1, low=0.05, high=0.2, units=30, paired=False)
    contestant = StrategyResult(
        name="sewa:k=2", strategy="sewa", settings={"k": 2}, coefficients=[0.0, (0.5, 0.5)], groups=(("",),), used=1,
        effective=1.0,
        scores={"val": GOOD}, over_last={"val": gain}, cost=COST, notes=("n",),
        chose_on="val", held_out=0.5, output=RESULT.output,
    )  # fmt: skip
    expected = {
        "name": "sewa:k=2", "strategy": "sewa", "settings": {"k": 2}, "coefficients": [0.0, [0.5, 0.5]],
        "groups": [[""]], "used": 1, "effective": 1.0, "scores": {"val": GOOD_JSON},
        "over_last": {"val": {"value": 0.1, "low": 0.05, "high": 0.2, "separated": True, "units": 30,
                              "unit": "examples", "paired": False, "reason": ""}},
        "cost": COST_JSON, "notes": ["n"], "chose_on": "val", "held_out": 0.5, "output": RESULT_JSON["output"],
    }  # fmt: skip
    comparison = Comparison(
        **vars(RESULT), winner="sewa:k=2", strategies=[contestant], selected_by="loss", reason="r", unfinished=("twa",)
    )
    more = {"winner": "sewa:k=2", "strategies": [expected], "selected_by": "loss", "reason": "r", "unfinished": ["twa"]}
    assert to_json(comparison) == json.dumps({**RESULT_JSON, "kind": "comparison", **more}, indent=2)
