"""The study's section on the calibration of SWAG, from results made up by hand."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from scipy.stats import ttest_1samp
from study.calibration_results import NAME, PICTURE, SWAG, Calibration, Figures, append, read, section

BINS = [
    {"low": 0.6, "high": 2 / 3, "examples": 30, "confidence": 0.65, "accuracy": 0.8},
    {"low": 14 / 15, "high": 1.0, "examples": 70, "confidence": 0.95, "accuracy": 0.9},
]
CHANGES = {"spam-lora": (-0.05, -0.07, -0.06), "fashion-noise": (0.03, 0.02, 0.03), "fashion": (0.2, -0.1, 0.0)}


def _figures(nll: float) -> Figures:
    return Figures(models=1, nll=nll, accuracy=0.87, brier=0.1, ece=0.08, bins=BINS)


@pytest.fixture
def results(tmp_path: Path) -> list[Calibration]:
    """Return three seeds of three settings, written to a file and read again."""
    path = tmp_path / NAME
    for domain, changes in CHANGES.items():
        for seed, change in enumerate(changes):
            rows = {"SWA": _figures(0.5 + seed), SWAG: replace(_figures(0.5 + seed + change), models=30, ece=0.05)}
            append(path, Calibration(
                machine="", domain=domain, schedule="constant", seed=seed, n=12, scale=0.5, spread=0.1,
                factor_error=0.02 if domain == "spam-lora" else None, trained_seconds=10, seconds=5, rows=rows,
            ))  # fmt: skip
    return read(path)


def test_the_answer_counts_a_setting_as_better_or_worse_by_the_interval_over_seeds(
    results: list[Calibration], tmp_path: Path
):
    (tmp_path / "study").mkdir()
    answer = section(results, tmp_path, "study")[1]
    verdicts = dict(re.findall(r"(lower|higher|not clearly different): ([\w-]+), constant", answer))
    assert verdicts == {"lower": "spam-lora", "higher": "fashion-noise", "not clearly different": "fashion"}
    assert answer.count("SWA's over-confidence -1.0 %") == 3  # 0.3·(0.65 − 0.8) + 0.7·(0.95 − 0.9)


def test_differences_are_paired_by_seed_with_students_interval(results: list[Calibration], tmp_path: Path):
    (tmp_path / "study").mkdir()
    table = next(part for part in section(results, tmp_path, "study") if SWAG in part and part.startswith("|"))
    for domain, changes in CHANGES.items():
        low, high = ttest_1samp(changes, 0).confidence_interval(0.95)
        (line,) = (row for row in table.splitlines() if row.startswith(f"| {domain}, constant | {SWAG} |"))
        assert f"{(low + high) / 2:+.4f} ± {(high - low) / 2:.4f}" in line and "87.00 ± 0.00" in line
        assert "**-3.00 ± 0.00**" in line  # of the ECE, in percent
    assert (tmp_path / "study" / f"{PICTURE}.svg").stat().st_size > 5000


def test_without_results_there_is_no_section(tmp_path: Path):
    assert section(read(tmp_path / NAME), tmp_path, ".") == [] and not list(tmp_path.iterdir())
