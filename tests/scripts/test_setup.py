"""Tests of scripts/setup.sh: the settings of pip that uv gets, and the names of extras."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def for_uv(folder: Path, configuration: str, **variables: str) -> dict[str, str]:
    """The variables that a shell has after the lines were evaluated in it."""
    (folder / "pip.conf").write_text(configuration)
    outer = {name: value for name, value in os.environ.items() if not re.match("PIP_|UV_|XDG_|SSL_", name)}
    environment = {**outer, "PIP_CONFIG_FILE": str(folder / "pip.conf"), "HOME": str(folder), **variables}
    code = f'eval "$({sys.executable} {ROOT}/scripts/pip_to_uv.py)"; env'
    done = subprocess.run(["bash", "-euc", code], env=environment, capture_output=True, text=True, check=True)
    lines = dict(line.partition("=")[::2] for line in done.stdout.splitlines())
    return {name: value for name, value in lines.items() if re.match("UV_|SSL_", name)}


def test_uv_gets_the_indexes_of_pips_files(tmp_path: Path):
    text = (
        "[global]\nindex-url = file:///a\nextra-index-url =\n  file:///b\n  file:///c\nfind-links = /d /e\ncert = /f\n"
    )
    expected = {"UV_DEFAULT_INDEX": "file:///a", "UV_INDEX": "file:///b file:///c", "UV_FIND_LINKS": "/d,/e",
                "UV_INDEX_STRATEGY": "unsafe-best-match", "SSL_CERT_FILE": "/f"}  # fmt: skip
    assert expected.items() <= for_uv(tmp_path, text).items()


def test_pips_variables_are_stronger_than_its_files_and_those_of_uv_than_both(tmp_path: Path):
    text = "[global]\nindex-url = file:///a\nfind-links = /d\n[install]\nfind-links = /e\n"
    assert for_uv(tmp_path, text)["UV_FIND_LINKS"] == "/e"
    assert for_uv(tmp_path, text, PIP_FIND_LINKS="/it's")["UV_FIND_LINKS"] == "/it's"
    kept = for_uv(tmp_path, text, PIP_FIND_LINKS="/x", UV_FIND_LINKS="/y", UV_INDEX_URL="file:///z")
    assert kept["UV_FIND_LINKS"] == "/y" and "UV_DEFAULT_INDEX" not in kept


def test_uvs_own_file_is_left_alone(tmp_path: Path):
    (tmp_path / ".config" / "uv").mkdir(parents=True)
    (tmp_path / ".config" / "uv" / "uv.toml").write_text("")
    assert for_uv(tmp_path, "[global]\nindex-url = file:///a\n") == {}


def test_scripts_ask_for_extras_that_there_are():
    known = PROJECT["optional-dependencies"]
    asked: set[str] = set()
    for path in ROOT.glob("scripts/**/*.sh"):
        code = re.sub(r"^#.*$", "", path.read_text(), flags=re.MULTILINE)
        for words in re.findall(r'(?:scripts/setup\.sh"?|extras=\() *([a-z -]+)', code):
            asked |= {*words.split()}
    assert asked >= {"demo", "dev", "lint", "test"} and asked <= known.keys()


def test_the_lower_bounds_are_written_as_the_script_reads_them():
    assert all(re.fullmatch(r"[a-z0-9]+>=[\d.]+", line) for line in PROJECT["dependencies"])


def test_a_missing_browser_is_named_and_does_not_end_the_setup(tmp_path: Path):
    code = re.search(r"^browser\(\) \{.*?^\}\n", (ROOT / "scripts" / "setup.sh").read_text(), re.MULTILINE | re.DOTALL)
    assert code is not None
    script = f"set -euo pipefail; OSTYPE=linux\n{code[0]}id() {{ echo 1000; }}; browser; echo done"
    bash = shutil.which("bash")
    assert bash is not None
    done = subprocess.run([bash, "-c", script], env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=True)
    assert done.stdout == "done\n" and "apt-get install chromium" in done.stderr
    (tmp_path / "google-chrome").symlink_to("/bin/true")
    done = subprocess.run([bash, "-c", script], env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=True)
    assert done.stdout == "done\n" and done.stderr == ""
