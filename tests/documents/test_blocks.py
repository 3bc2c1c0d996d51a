"""Every block of code in the documents is run as written, or marked with the reason why not."""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path

import pytest

from ckptavg.cli import demo
from documents.blocks import ROOT, Block, blocks, check_outputs, run

# pages written by the programs whose commands they show, with what these printed
GENERATED = {"docs/benchmarks.md", "docs/gpu.md", "docs/safety.md", "docs/study.md"}
# the README has no room for comments: the first line of a block → what runs it, or why it is not run
README = {
    "./scripts/demo.sh": "tests/scripts/test_setup.py has the settings of these scripts; CI runs test.sh",
    "pip install .": "installs; tests/scripts/test_wheel.py installs the wheel",
    "def model(): ...": "names only: docs/reference/task-file.md has the functions",
    "import ckptavg": "docs/reference/python.md runs it",
    "model.load_state_dict": "lines for three libraries: the tutorials load the file in each",
    "$ ": "run by tests/test_docs.py",
}
PAGES = {
    str(path.relative_to(ROOT)): path
    for path in sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
    if str(path.relative_to(ROOT)) not in GENERATED
}
RUN = [
    name
    for name, path in PAGES.items()
    if not name.startswith(("README.md", "docs/tutorials/")) and any(block.runs for block in blocks(path))
]
# pages whose blocks need other packages than the extra `test`, or take long
THOROUGH = {"docs/how-to/lora.md", "docs/strategies.md"}
# pages that begin in an empty directory
ALONE = {"docs/index.md", "docs/how-to/lora.md"}


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory that ``ckptavg demo`` creates."""
    folder = tmp_path_factory.mktemp("documents") / "ckptavg-demo"
    demo.command(folder)
    return folder


def accounted(name: str, block: Block) -> bool:
    """Return whether a block is run, is data that is parsed, no code, or has a reason why it is not run."""
    if name == "README.md":
        return any(block.text.startswith(first) for first in README)
    if block.kind == "run by":
        test = ROOT / block.reason
        return test.exists() and Path(name).name in test.read_text(encoding="utf-8")
    return bool(block.kind) or block.runs or block.language in ("text", "toml", "json")


@pytest.mark.parametrize("name", PAGES)
def test_a_block_is_run_or_says_why_not(name: str):
    for block in blocks(PAGES[name]):
        assert accounted(name, block), block.first
        if not block.kind and not block.title:
            {"toml": tomllib.loads, "json": json.loads}.get(block.language, str)(block.text)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.thorough] if name in THOROUGH else []) for name in RUN]
)
def test_the_blocks_of_a_page_run_as_written(name: str, demo_folder: Path, tmp_path: Path):
    """Pages with their own training begin in an empty directory, others in that of the demo."""
    folder = tmp_path / "work"
    if name in ALONE:
        folder.mkdir()
    else:
        shutil.copytree(demo_folder, folder)
    check_outputs(PAGES[name], run(PAGES[name], folder))
