"""README.md and docs/ are correct: every name in them exists, and all commands, options and report keys are in them."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from conftest import Run

import ckptavg.errors
from ckptavg.cli import demo
from ckptavg.cli.app import app
from ckptavg.errors import CkptavgError
from ckptavg.options import config_file
from ckptavg.pipeline.comparison import DEFAULT
from ckptavg.report.as_json import to_dict
from ckptavg.report.posterior import PosteriorResult
from ckptavg.report.result import Comparison, Landscape, Result
from ckptavg.strategies import strategies
from ckptavg.surrogate import Surrogate

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
# pages whose commands and options are checked, and the options of other programs in them
USER_PAGES = [
    *(ROOT / name for name in ("README.md", "SECURITY.md")),
    *(ROOT / "docs" / f"{name}.md" for name in ("scoring", "strategies", "scaling", "follow")),
    *(page for room in ("reference", "how-to", "tutorials") for page in sorted((ROOT / "docs" / room).glob("*.md"))),
]
FOREIGN = {"--requeue", "--signal", "--open-mode"}
# a strategy that `compare` does not run by default, such as one in development, may be missing from the pages
COMPARED = list(dict.fromkeys(spec.partition(":")[0] for spec in DEFAULT))
DRAFTS = strategies().keys() - set(COMPARED)


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


README, OPTIONS = text("README.md"), text("docs/reference/options.md")


def section(page: str, heading: str) -> str:
    """Return the part of a page below a heading of the second level."""
    return page.split(f"\n## {heading}\n")[1].split("\n## ")[0]


@pytest.fixture(scope="module")
def commands() -> dict[str, Any]:
    """Return command name → the parsed command line of the program."""
    group: Any = typer.main.get_command(app)
    return group.commands


@pytest.fixture(scope="module")
def options(commands: dict[str, Any]) -> dict[str, set[str]]:
    """Return command name → all of its option names."""
    return {
        name: {
            option
            for param in command.params
            for option in (*param.opts, *param.secondary_opts)
            if param.param_type_name == "option"
        }
        | {"--help", "--help-all", "-h"}
        for name, command in commands.items()
    }


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory that ``ckptavg demo`` creates."""
    folder = tmp_path_factory.mktemp("docs") / "ckptavg-demo"
    demo.command(folder)
    return folder


CODE = re.compile(r"^```.*?^```|^ {4}.*?$", re.MULTILINE | re.DOTALL)


def spans(page: str) -> Iterator[str]:
    """Return the inline code of a page, each span on one line."""
    yield from (" ".join(span.split()) for span in re.findall(r"`([^`]+)`", CODE.sub("", page)))


def shown_commands(page: str) -> Iterator[list[str]]:
    """Return the arguments of every ``ckptavg`` command in the code blocks of a page."""
    for line in "\n".join(CODE.findall(re.sub(r"\\\n\s*", "", page))).splitlines():
        if match := re.match(r"(?:.*-m |until |.*\$ |.*\$\()? *ckptavg ([a-z]+ .*)", line):
            yield shlex.split(re.split(r"[;)&]| \|\| | 2>", match[1].replace("$!", "1"))[0], comments=True)  # a process


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 130


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_resolve(page: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in headings}, target


def test_the_navigation_of_the_site_has_every_page():
    listed = re.findall(
        r"^ +- (?:[^:\n]*: )?(\S+\.(?:md|ipynb))$", text("mkdocs.yml").split("\nnav:\n")[1], re.MULTILINE
    )
    documents = [
        path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*") if path.suffix in (".md", ".ipynb")
    ]
    pages = {*map(str, documents), "CHANGELOG.md", "CONTRIBUTING.md", "RELEASING.md", "SECURITY.md"}
    assert sorted(listed) == sorted(pages)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_rows_of_a_table_have_as_many_cells_as_its_heading(page: Path):
    for table in re.findall(r"(?:^\|.*\n)+", page.read_text(encoding="utf-8"), re.MULTILINE):
        first, rule, *rows = table.splitlines()
        assert re.fullmatch(r"\|( *:?-+:? *\|)+", rule), first
        for row in (first, *rows):
            assert len(re.findall(r"(?<!\\)\|", row)) == rule.count("|"), row


def test_every_command_is_in_the_reference(commands: dict[str, Any]):
    table = section(OPTIONS, "Commands")
    for command in commands.keys() - DRAFTS:
        assert re.search(rf"(ckptavg |`){command}\b", table), command


def test_every_option_is_in_the_reference(options: dict[str, set[str]]):
    for command in options.keys() - DRAFTS:
        for option in options[command]:
            assert f"`{option}`" in OPTIONS, f"{command} {option}"


@pytest.mark.parametrize("page", USER_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_options_in_the_prose_exist(page: Path, options: dict[str, set[str]]):
    for span in spans(page.read_text(encoding="utf-8")):
        words = [word for word in re.split(r"[\s=|]", re.sub(r"^.*\bckptavg ", "", span)) if word]
        known = options.get(words[0], set[str]())
        if not known and not span.startswith(("--", "ckptavg ")):
            continue  # the command line of another program
        for option in (word for word in words if re.match(r"--[a-z]", word)):
            assert option in (known or set[str]().union(*options.values(), FOREIGN, {"--version"})), span


@pytest.mark.parametrize("page", USER_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_in_code_blocks_can_be_parsed(page: Path, commands: dict[str, Any]):
    for name, *arguments in shown_commands(page.read_text(encoding="utf-8")):
        # a command keeps the help option of its first context, and other tests see the same command
        commands[name].make_context(name, arguments, help_option_names=["-h", "--help"])


def test_every_exit_code_is_in_the_reference():
    codes = {e.exit_code for e in vars(ckptavg.errors).values() if isinstance(e, type) and issubclass(e, CkptavgError)}
    listed = re.findall(r"^\| (\d+) \|", text("docs/reference/exit-codes.md"), re.MULTILINE)
    assert sorted(map(int, listed)) == sorted(codes | {0})


def test_every_key_of_a_report_is_in_the_reference():
    listed = text("docs/reference/report.md")
    result = Result(strategy="x", settings={}, seed=0, candidates=[])
    comparison = Comparison(**vars(result), winner="x", strategies=())
    posterior = PosteriorResult(**vars(result), gaussian={})
    q = Surrogate(0.0, torch.zeros(2), torch.zeros(2, 2), "exact")
    landscape = Landscape(
        surrogate=q, eigenvalues=(), predicted=(), measured=(), spearman=0.0, r_squared=0.0, steps=(), plane=None
    )
    for key in {**to_dict(result), **to_dict(comparison), **to_dict(posterior), **to_dict(landscape)}:
        assert f"`{key}`" in listed, key


def test_the_configuration_that_the_reference_shows_has_options_that_exist(
    options: dict[str, set[str]], tmp_path: Path
):
    (shown,) = re.findall(r"^```toml\n(.*?)^```", OPTIONS, re.MULTILINE | re.DOTALL)
    (tmp_path / "ckptavg.toml").write_text(shown)
    for name in config_file.read(tmp_path):
        assert any(f"--{name.replace('_', '-')}" in known for known in options.values()), name


def test_every_public_name_is_in_the_reference():
    listed = text("docs/reference/python.md")
    for name in {*dir(ckptavg)} - DRAFTS:
        assert re.search(rf"`(ckptavg\.)?{name}\b", listed), name


def test_every_strategy_has_a_section_and_a_row():
    page = text("docs/strategies.md")
    for name in COMPARED:
        assert "Cost:" in section(page, name) and "hen:" in section(page, name), name
        assert f"\n| [`{name}`](#{name}) |" in page, name


@pytest.mark.parametrize("name", sorted(strategies()))
def test_every_setting_of_a_strategy_has_help(run: Run, name: str):
    shown = " ".join(run(name, "--help", COLUMNS="200").stdout.split())
    for setting in fields(strategies()[name]):  # pyright: ignore[reportArgumentType]
        assert f"--{setting.name.replace('_', '-')} " in shown, setting.name
    assert strategies()[name].__doc__ is not None


def test_the_tour_of_the_readme_runs_as_written(run: Run, demo_folder: Path, tmp_path: Path):
    """Run each `$ ckptavg` line of the README in the directory that `ckptavg demo` creates."""
    folder = shutil.copytree(demo_folder, tmp_path / "demo")
    lines = re.findall(r"^    \$ (?:m=\$\()?(ckptavg [^)\n]*)\)?$", README, re.MULTILINE)
    assert len(lines) == 5
    for line in lines:
        done = run(*shlex.split(line)[1:], cwd=folder)
        assert done.returncode == 0, done.stderr


def test_the_template_that_init_writes_runs_as_it_is(run: Run, demo_folder: Path):
    assert run("init").stdout == "task.py\n"
    assert run("sewa", demo_folder / "ckpts", "--k", 3, "--steps", 5).returncode == 0
    assert run("init").returncode == 6
    assert run("init", "--force").returncode == 0


def test_the_script_that_init_writes_scores_a_file_as_the_task_does(run: Run, demo_folder: Path, tmp_path: Path):
    shutil.copy(demo_folder / "task.py", tmp_path / "train.py")
    script = tmp_path / run("init", "--score-cmd").stdout.strip()
    assert script.name == "eval.py"
    script.write_text(script.read_text().replace("Net, val_loader", "model as Net, val_dataloader as val_loader"))
    scores = []
    for way in (("--task", "train.py"), ("--score-cmd", f"{sys.executable} eval.py {{}}")):
        done = run("last", demo_folder / "ckpts", *way, "--no-baselines", "--json", "--force")
        assert done.returncode == 0, done.stderr
        scores.append(json.loads(done.stdout)["scores"]["val"]["metric"])
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)


def test_init_replaces_no_file_and_writes_one_template(run: Run, tmp_path: Path):
    for option in ("--hf", "--peft", "--lightning", "--score-cmd"):
        (tmp_path / "mine.py").write_text("precious")
        assert run("init", option, "mine.py").returncode == 6 and (tmp_path / "mine.py").read_text() == "precious"
        done = run("init", option, "mine.py", "--force")
        assert done.returncode == 0 and "# EDIT" in (tmp_path / "mine.py").read_text() and "mine.py" in done.stderr
    assert run("init", "--hf", "--peft", "new.py").returncode == 2 and not (tmp_path / "new.py").exists()


def test_the_committed_versions_pin_torch():
    pins = text("constraints.txt")
    assert "torch==2.13.0\n" in pins and "://" not in pins and "@" not in pins


def test_the_option_tables_of_the_reference_are_current():
    module = runpy.run_path(str(ROOT / "scripts" / "option_tables.py"))
    assert module["updated"](OPTIONS) == OPTIONS, "run python scripts/option_tables.py"
