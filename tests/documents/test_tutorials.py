"""Each tutorial ends well for a reader who copies its blocks in order, from an empty directory on."""

from __future__ import annotations

from pathlib import Path

import pytest

from documents.blocks import ROOT, blocks, check_outputs, run

TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
# those that need no other packages than the extra `test`, and one process
QUICK = {"plain-loop.md", "slurm.md"}


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[] if page.name in QUICK else [pytest.mark.thorough]) for page in TUTORIALS],
    ids=lambda page: page.stem,
)
def test_a_tutorial_runs_as_written(page: Path, tmp_path: Path):
    assert any(block.is_output for block in blocks(page))
    check_outputs(page, run(page, tmp_path))
