"""The help pages: short, ordered by importance, and complete."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest
import typer.main
from conftest import Run

from ckptavg.cli.app import app

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
LINES = 102  # two screens of 51 lines
FIRST = ["--k", "--solver", "--task", "--val", "--score-cmd", "--last", "--output", "--force", "--device", "--dry-run"]


def page(run: Run, *command: str) -> str:
    """Return the help page of a command on a terminal of 100 columns."""
    return run(*command, "--help", COLUMNS="100").stdout


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
    assert listed == declared + Counter(["--help", "-h"])
    assert set(listed.values()) == {1}


def test_the_page_of_sewa_fits_two_screens(run: Run) -> None:
    assert len(page(run, "sewa").splitlines()) <= LINES


def test_the_page_of_sewa_shows_ten_options_first(run: Run) -> None:
    arguments, (title, first), *others = panels(page(run, "sewa")).items()
    assert arguments == ("Arguments", [])
    assert title == "Options"
    assert [option for option in first if option.startswith("--") and option != "--help"] == FIRST
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
    assert list(panels(page(run, "inspect"))) == ["Arguments", "Options"]
