"""The pages of docs/examples: small, made anew from the commands of scripts/examples.py, and of no machine."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs" / "examples").glob("*.html"))


def test_there_is_a_page_for_each_run():
    script = (ROOT / "scripts" / "examples.py").read_text()
    assert {page.stem for page in PAGES} == {*re.findall(r'^    "(\w+)": \("', script, re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_an_example_is_small_and_names_no_directory_of_a_machine(page: Path):
    text = page.read_text(encoding="utf-8")
    assert len(text.encode()) < 400_000
    assert not re.search(r"(?<![\w.:/\"'#-])/(home|root|tmp|work|Users|private|var)/", text)
    assert f"ckptavg {page.stem} ./ckpts" in text and "changed" not in text
