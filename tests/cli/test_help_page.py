"""The help pages: short, ordered by importance, and complete."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest
import typer.main
from conftest import Run

from ckptavg.cli.app import app
from ckptavg.cli.help_page import ONE_PANEL
from ckptavg.declaration import PANELS, declared
from ckptavg.options import Options
from ckptavg.options.search import SearchOptions
from ckptavg.strategies.sewa import SeWA

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
LINES = 50  # a screen
FIRST = ["--k", "--solver", "--task", "--val", "--score-cmd", "--last", "--output", "--force", "--device", "--dry-run"]


def page(run: Run, *command: str) -> str:
    """Return the whole help page of a command on a terminal of 100 columns."""
    return run(*command, "--help-all" if command else "--help", COLUMNS="100").stdout


def panels(text: str) -> dict[str, list[str]]:
    """Return the option names in each panel, in the order of the page; negative and short names included."""
    names: dict[str, list[str]] = {}
    for line in text.splitlines():
        if title := re.match(r"╭─ (.+?) ─*╮$", line):
            names[title[1]] = []
        elif option := re.match(r"│ ((?:--?[\w-]+ +)+)", line):
            list(names.values())[-1].extend(option[1].split())
    return names


@pytest.mark.parametrize("name", ["", *sorted(COMMANDS)])
def test_a_flag_has_no_type(run: Run, name: str) -> None:
    assert "<bool>" not in page(run, *filter(None, [name]))


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_option_is_listed_once(run: Run, name: str) -> None:
    declared = Counter(
        option
        for param in COMMANDS[name].params
        if param.param_type_name == "option"
        for option in (*param.opts, *param.secondary_opts)
    )
    listed = Counter(option for names in panels(page(run, name)).values() for option in names)
    more = ["--help-all"] if len(declared) > ONE_PANEL else []
    assert listed == declared + Counter(["--help", "-h", *more])
    assert set(listed.values()) == {1}


def test_the_page_of_sewa_fits_a_screen(run: Run) -> None:
    assert len(run("sewa", "--help", COLUMNS="100").stdout.splitlines()) <= LINES


@pytest.mark.parametrize("name", ["swa", "sewa", "compare", "landscape", "check", "inspect"])
def test_short_help_has_the_main_and_own_options_and_says_how_many_more_there_are(run: Run, name: str) -> None:
    text, whole = run(name, "--help", COLUMNS="80").stdout, page(run, name)
    short, full = panels(text), panels(whole)
    shared = {f"Advanced: {panel}" for panel in PANELS}
    assert not short.keys() & shared and list(short) == [panel for panel in full if panel not in shared]
    assert all(short[panel] == full[panel] for panel in short)
    options = [option for panel in shared & full.keys() for option in full[panel] if option.startswith("--")]
    more = [option for option in options if not option.startswith("--no-")]
    assert text.split("\n")[-4:-2][0].strip() == f"{len(more)} more options: ckptavg {name} --help-all"


def test_short_help_of_a_plain_average_has_no_option_of_a_search(run: Run) -> None:
    shown = {option for names in panels(run("swa", "--help", COLUMNS="80").stdout).values() for option in names}
    assert not shown & {option.flag for option in declared(SearchOptions)}
    assert {"--last", "--output", "--force", "--dry-run", "--help-all"} <= shown


@pytest.mark.parametrize("width", [60, 80, 100])
def test_no_choice_is_divided(run: Run, width: int) -> None:
    text = " ".join(re.sub("[│╭╮╰╯─]", " ", run("sewa", "--help-all", COLUMNS=str(width)).stdout).split())
    for option in (*declared(SeWA), *declared(Options)):
        assert all(re.search(rf"(?<![\w-]){re.escape(str(choice))}(?![\w-])", text) for choice in option.choices)


def test_the_page_of_sewa_shows_ten_options_first(run: Run) -> None:
    arguments, (title, first), *others = panels(page(run, "sewa")).items()
    assert arguments == ("Arguments", [])
    assert title == "Options"
    assert [option for option in first if option.startswith("--") and "--help" not in option] == FIRST
    assert others and all(title.startswith("Advanced") for title, _ in others)


@pytest.mark.parametrize(
    ("name", "solvers"),
    [
        ("sewa", ["both solvers", "gumbel solver", "quadratic solver", "search by scores"]),
        ("twa", ["both solvers", "gradient solver", "quadratic solver", "search by scores"]),
    ],
)
def test_options_are_grouped_by_solver(run: Run, name: str, solvers: list[str]) -> None:
    shown = panels(page(run, name))
    assert list(shown)[2:6] == [f"Advanced: {solver}" for solver in solvers]
    assert "--hessian" in shown["Advanced: quadratic solver"]
    assert shown["Advanced: search by scores"] == ["--evaluations"]


def test_a_page_with_few_options_has_one_panel(run: Run) -> None:
    assert list(panels(page(run, "eval"))) == ["Arguments", "Options"]
