"""The documents say what the program does: every command, option, exit code and report key is in them."""

from __future__ import annotations

import re
import shlex
import textwrap
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from conftest import Run
from quadratic import Quadratic

import ckptavg.errors
from ckptavg.cli.app import app
from ckptavg.errors import CkptavgError
from ckptavg.report.as_json import comparison_to_dict, to_dict
from ckptavg.report.result import Comparison, Result
from ckptavg.strategies import strategies

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_command_is_in_the_readme():
    for command in app.registered_commands:
        assert re.search(rf"(ckptavg |`){command.name}\b", README), command.name


def test_every_exit_code_is_in_the_readme():
    codes = {e.exit_code for e in vars(ckptavg.errors).values() if isinstance(e, type) and issubclass(e, CkptavgError)}
    paragraph = README[README.index("Exit codes:") :].split("\n\n")[0]
    assert codes | {0} == {int(code) for code in re.findall(r"(?:^|· |: )(\d+) ", paragraph.replace("\n", " "))}


def test_every_key_of_the_report_is_in_the_readme():
    section = README[README.index("## Report") :]
    empty = Result(strategy="x", settings={}, seed=0, candidates=[])
    for key in to_dict(empty):
        assert f"`{key}`" in section, key


def test_every_key_of_a_comparison_is_in_the_readme():
    section = README[README.index("## Report") :]
    empty = Comparison(contestants=(), winner="x", result=Result(strategy="x", settings={}, seed=0, candidates=[]))
    for key in comparison_to_dict(empty):
        assert f"`{key}`" in section, key


def test_the_strategy_that_contributing_shows_works():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^    @dataclass.*?STRATEGY: type\[Strategy\] = \w+$", text, re.MULTILINE | re.DOTALL)
    names = "from dataclasses import dataclass\nfrom typing import Annotated, ClassVar\n"
    names += (
        "from ckptavg.coefficients import Coefficients\nfrom ckptavg.objective import Learned, Objective, Strategy\n"
    )
    scope: dict[str, Any] = {}
    exec(names + textwrap.dedent(code), scope)
    (row,) = scope["STRATEGY"](power=1).learn(Quadratic(n=4, d=1, seed=0)).coefficients.values
    assert row == pytest.approx([0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize("name", sorted(strategies()))
def test_every_setting_of_a_strategy_has_help(run: Run, name: str):
    text = " ".join(run(name, "--help", COLUMNS="200").stdout.split())
    for setting in fields(strategies()[name]):  # pyright: ignore[reportArgumentType]
        assert f"--{setting.name.replace('_', '-')} " in text, setting.name
    assert strategies()[name].__doc__ is not None


def test_the_readmes_options_exist(run: Run):
    shown = " ".join(
        run(name, "--help", COLUMNS="200").stdout
        for name in (*strategies(), "compare", "landscape", "inspect", "verify", "eval")
    )
    for option in set(re.findall(r"`(--[a-z-]+)", README)):
        assert option in shown, option


def test_the_readmes_tour_runs_as_written(run: Run, tmp_path: Path):
    """Each `$ ckptavg` line of the README, in the directory that `ckptavg demo` makes."""
    assert run("demo").stdout == "ckptavg-demo\n"
    folder = tmp_path / "ckptavg-demo"
    lines = re.findall(r"^    \$ (?:m=\$\()?(ckptavg [^)\n]*)\)?$", README, re.MULTILINE)
    assert len(lines) == 5
    for line in lines:
        done = run(*shlex.split(line)[1:], cwd=folder)
        assert done.returncode == 0, done.stderr


def test_the_template_that_init_writes_runs_as_it_is(run: Run, tmp_path: Path):
    run("demo")
    assert run("init").stdout == "task.py\n"
    assert run("sewa", "ckptavg-demo/ckpts", "--k", 3, "--steps", 5).returncode == 0
    assert run("init").returncode == 6
    assert run("init", "--force").returncode == 0


def test_the_committed_versions_pin_torch():
    pins = (ROOT / "constraints.txt").read_text()
    assert "torch==2.13.0\n" in pins and "://" not in pins and "@" not in pins
