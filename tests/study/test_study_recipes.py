"""The study's measurements of the recipes, and its section on them."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import pytest
import study.data
import torch
from study import recipe_results, recipes
from study.recipe_results import Result, append, read, section
from torch import nn

PUBLISHED = Path(__file__).parents[2] / "docs" / "study" / recipe_results.NAME


def result(part: str, label: str, seed: int, **settings: object) -> Result:
    given = {"figures": {}, "how": "x", "cpu_seconds": 30.0, "machine": "m", **settings}
    return Result(part=part, label=label, seed=seed, **given)  # pyright: ignore[reportArgumentType]


def test_results_survive_their_file(tmp_path: Path):
    results = [result("ACOWA", "OWA", 1, setting=("16", "0.01")), result("WASH", "independent", 0)]
    assert read(tmp_path / "missing") == []
    for one in results:
        append(tmp_path / "results", one)
    stored = read(tmp_path / "results")
    assert [one.cell for one in stored] == [("ACOWA", "OWA", "1", "16", "0.01"), ("WASH", "independent", "0")]
    assert stored[1] == results[1]


def test_differences_between_members_are_paired_by_seed():
    values = {"independent": [0.50, 0.60, 0.70], "WASH": [0.52, 0.63, 0.71]}
    which = ("average", "members", "ensemble")
    results = [
        result("WASH", label, seed, figures={f"accuracy {name}": value for name in which})
        for label, of_label in values.items()
        for seed, value in reversed(list(enumerate(of_label)))
    ]
    text = "\n".join(section(results))
    # the mean of 2, 3 and 1, with s = 1 and t = 4.303: 2 ± 2.48
    assert "| WASH | 62.0 | 62.0 | 62.0 | +2.0 ± 2.5 | +0.0 ± 0.0 |" in text
    assert "| independent | 60.0 | 60.0 | 60.0 | – | +0.0 ± 0.0 |" in text and "3 seeds" in text


def test_the_table_of_shards_has_means_and_standard_deviations_of_the_published_results():
    text = "\n".join(section([one for one in read(PUBLISHED) if one.part == "ACOWA"]))
    (row,) = (line for line in text.splitlines() if line.startswith("| 64 | 0.001"))
    _, _, *cells = [cell.strip() for cell in row.split("|")[1:-1]]
    lines = [json.loads(line) for line in PUBLISHED.read_text("utf-8").splitlines()]
    for cell, label in zip(cells, ("full L1", "naive mean", "OWA", "ACOWA"), strict=True):
        figures = [one["figures"] for one in lines if one["label"] == label and one.get("setting") == ["64", "0.001"]]
        accuracies = [100 * each["accuracy"] for each in figures]
        nonzeros = fmean(each["nonzeros"] for each in figures)
        assert len(figures) == recipes.SEEDS_ACOWA
        assert cell.replace("**", "") == f"{fmean(accuracies):.1f} ± {stdev(accuracies):.1f} ({nonzeros:,.0f})"
    assert [cell.startswith("**") for cell in cells].count(True) == 1


def test_an_unknown_part_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        recipes.main(["--parts", "WASH,SWAG", "--out", str(tmp_path / "out")])
    assert "no part SWAG: choose from WASH, IMWA, ACOWA" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_nothing_measured_is_no_section():
    assert section([]) == []


def test_an_ensemble_is_the_mean_of_probabilities():
    torch.manual_seed(0)
    members = [nn.Linear(3, 2) for _ in range(2)]
    inputs = torch.randn(5, 3)
    wanted = sum(torch.softmax(member(inputs), dim=1) for member in members) / 2
    assert torch.allclose(recipes.Ensemble(members)(inputs), wanted)


def test_shards_of_mails_give_four_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    random = np.random.default_rng(0)
    words = np.array([f"word{chr(ord('a') + i)}" for i in range(25)])
    for name in range(200):
        group = "spam-1" if name % 3 == 0 else "easy-ham-1"
        often = np.where(np.arange(25) < 10, 2.0 if group == "spam-1" else 1.0, 1.0)
        text = " ".join(random.choice(words, 30, p=often / often.sum()))
        path = tmp_path / "spam-assassin" / "data" / group / f"{name:03}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"group": group, "text": f"Subject: x\n\n{text}"}))
    monkeypatch.setattr(study.data, "ROOT", tmp_path)
    recipes._mails.cache_clear()
    rows = list(recipes.sharded(0, 4, 1e-2))
    recipes._mails.cache_clear()
    assert [one.label for one in rows] == ["full L1", "naive mean", "OWA", "ACOWA"]
    assert all(one.setting == ("4", "0.01") and one.figures["accuracy"] > 0.6 for one in rows)
    assert rows[1].figures["nonzeros"] == rows[2].figures["nonzeros"] > rows[0].figures["nonzeros"] > 0
