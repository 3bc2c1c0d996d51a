"""Versions, dates, pins and scripts are the same in every file of the project that names them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NAMED = ("pyproject.toml", "CHANGELOG.md", "CITATION.cff", "scripts/release/notes.py")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def parsed(path: Path) -> dict[str, Any]:
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def pins(text: str) -> dict[str, str]:
    return dict(re.findall(r"([\w.-]+)==([\w.]+)", text))


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The files that name a version, to be changed."""
    for name in NAMED:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def notes(root: Path, tag: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(root / "scripts/release/notes.py"), tag]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_the_version_is_the_newest_in_the_changelog_and_can_be_tagged():
    newest = re.findall(r"^## \[(\d.*?)\]", read("CHANGELOG.md"), re.MULTILINE)[0]
    assert newest == PROJECT["version"]
    outcome = notes(ROOT, f"v{newest}")
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stdout.strip()
    assert "\n## " not in outcome.stdout
    assert outcome.stdout.strip() in read("CHANGELOG.md")


@pytest.mark.parametrize(
    ("name", "pattern", "replacement", "message"),
    [
        ("pyproject.toml", r'^version = "', 'version = "9', "pyproject.toml: the version is 9"),
        ("CHANGELOG.md", r"^## \[", "## [9", "CHANGELOG.md: no section"),
        ("CHANGELOG.md", r"^## \[\d.*", r"\g<0>\n\n## [0.0.1] - 2026-01-01", "is empty"),
        ("CITATION.cff", r"^version: ", "version: 9", "CITATION.cff: version must be"),
        ("CITATION.cff", r"^date-released: 2", "date-released: 1", "CITATION.cff: date-released must be"),
    ],
)
def test_a_tag_is_refused_where_files_disagree(copy: Path, name: str, pattern: str, replacement: str, message: str):
    text, changes = re.subn(pattern, replacement, (copy / name).read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert changes
    (copy / name).write_text(text, encoding="utf-8")
    outcome = notes(copy, f"v{PROJECT['version']}")
    assert (outcome.returncode, outcome.stdout) == (1, "")
    assert message in outcome.stderr
    assert outcome.stderr.count("\n") == 1


def test_the_notes_end_where_the_section_of_an_older_version_begins(copy: Path):
    below = "\n## [0.0.1] - 2026-01-01 [YANKED]\n\nThe older one.\n"
    (copy / "CHANGELOG.md").write_text(read("CHANGELOG.md").rstrip() + "\n" + below, encoding="utf-8")
    assert notes(copy, f"v{PROJECT['version']}").stdout == notes(ROOT, f"v{PROJECT['version']}").stdout


def test_the_citation_is_yaml_that_names_the_version():
    citation = parsed(ROOT / "CITATION.cff")
    assert str(citation["version"]) == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]


def test_pre_commit_installs_the_versions_of_the_constraints():
    hooks, constraints = pins(read(".pre-commit-config.yaml")), pins(read("constraints.txt"))
    assert hooks == {name: constraints[name] for name in ("ruff", "basedpyright")}


def test_workflows_call_scripts_that_exist_and_can_be_executed():
    called = {script for path in WORKFLOWS for script in re.findall(r"run: \./(scripts/\S+)", path.read_text())}
    assert {"scripts/test.sh", "scripts/lower_bounds.sh", "scripts/release/notes.py"} <= called
    for script in called:
        assert os.access(ROOT / script, os.X_OK), script


def test_the_scripts_take_the_options_that_workflows_give_them():
    found = [
        pair for path in WORKFLOWS for pair in re.findall(r"run: \./(scripts/\S+).* (--[a-z-]+)", path.read_text())
    ]
    assert found
    for script, option in found:
        assert option in read(script), f"{script} {option}"


def test_workflows_take_uv_from_the_constraints():
    for path in WORKFLOWS:
        text = path.read_text()
        assert 0 < text.count("astral-sh/setup-uv@") == text.count("version-file: constraints.txt")
    assert "uv" in pins(read("constraints.txt"))


def test_ci_runs_the_python_versions_of_the_classifiers():
    matrix = parsed(ROOT / ".github/workflows/ci.yml")["jobs"]["quick"]["strategy"]["matrix"]
    versions = re.findall(r"Python :: (3\.\d+)", " ".join(PROJECT["classifiers"]))
    assert matrix["python"] == versions
    assert {entry["python"] for entry in matrix["include"]} <= set(versions)
    assert PROJECT["requires-python"] == f">={versions[0]}"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_every_job_has_a_time_limit_and_few_rights(path: Path):
    workflow = parsed(path)
    assert workflow["permissions"] == {"contents": "read"}
    rights = {name: job["permissions"] for name, job in workflow["jobs"].items() if "permissions" in job}
    published = {"publish": {"id-token": "write"}, "release": {"contents": "write"}}
    assert rights == (published if path.name == "publish.yml" else {})
    for name, job in workflow["jobs"].items():
        assert "uses" in job or 0 < job["timeout-minutes"] <= 120, name


def test_templates_of_issues_are_yaml_with_names_of_their_own():
    forms = [parsed(path) for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml") if path.stem != "config"]
    assert len({form["name"] for form in forms}) == len(forms) == 2
