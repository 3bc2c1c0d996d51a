"""``ckptavg env`` against the interpreter's own facts, with a working and a broken torch."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from conftest import Run

import ckptavg
from ckptavg.runtime import threads


def environment(run: Run, **variables: str) -> dict[str, object]:
    return json.loads(run("env", "--json", **variables).stdout)


def test_versions_match_the_installed_distributions(run: Run):
    facts = environment(run)
    assert facts["ckptavg"] == ckptavg.__version__ == version("ckptavg")
    assert facts["packages"] == {name: version(name) for name in ("torch", "numpy", "safetensors", "typer", "rich")}
    assert str(facts["python"]).startswith(platform.python_version())
    assert str(facts["torch build"]).startswith(
        f"CUDA {torch.version.cuda}" if torch.version.cuda else "ROCm" if torch.version.hip else "cpu"
    )


def test_devices_processors_and_threads_are_counted(run: Run):
    facts = environment(run)
    devices = facts["devices"]
    assert isinstance(devices, list) and len(devices) == 1 + torch.cuda.device_count() + torch.mps.is_available()
    assert f"{os.cpu_count()} logical cores" in devices[0]
    limit = {} if (quota := threads.quota()) is None else {"quota": quota}
    assert facts["threads"] == {"torch": torch.get_num_threads(), "affinity": threads.affinity(), **limit}


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="needs Linux")
def test_the_file_system_matches_df_and_the_memory_matches_the_kernel(run: Run, tmp_path: Path):
    facts = environment(run)
    words = ["df", "--output=fstype", tmp_path]
    kind = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()[1]
    assert str(facts["working directory"]).startswith(f"{kind}, ")
    assert str(facts["memory"]).endswith(" GB available")


def test_lines_for_a_report_hold_the_fields_of_the_json(run: Run):
    lines = run("env").stdout.splitlines()
    assert {line.removeprefix("- ").split(":")[0] for line in lines} == set(environment(run)) - {
        "schema_version",
        "kind",
        "run",
    }
    assert all(line.startswith("- ") for line in lines)


def test_variables_are_shown_without_paths_and_commands(run: Run):
    given = {"OMP_NUM_THREADS": "3", "CUDA_VISIBLE_DEVICES": "0,1", "CKPTAVG_K": "5", "CKPTAVG_BITS": "auto"}
    hidden = {"CKPTAVG_TASK": "/home/somebody/task.py", "CKPTAVG_SCORE_CMD": "score.sh", "CKPTAVG_VAL": "patients.csv"}
    shown = environment(run, **given, **hidden, MY_TOKEN="abc")["variables"]
    assert isinstance(shown, dict) and {name: shown[name] for name in given} == given
    assert {name: shown[name] for name in hidden} == dict.fromkeys(hidden, "(set)") and "MY_TOKEN" not in shown


@pytest.mark.parametrize("code", ["raise ImportError('libx.so: cannot open')", "raise OSError('libx.so: cannot open')",
                                  "import ctypes; ctypes.CDLL('libx.so')"])  # fmt: skip
def test_a_torch_that_cannot_be_imported_is_reported(tmp_path: Path, code: str):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(code)
    words = [sys.executable, "-m", "ckptavg", "env"]
    paths = os.pathsep.join([str(tmp_path), str(Path(ckptavg.__file__).parents[1])])
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths})
    assert (done.returncode, done.stderr) == (0, "")
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("- torch build: ")]
    assert "cannot be imported: " in line and "libx.so: cannot open" in line
    assert f"- packages: torch {version('torch')}" in done.stdout


def test_the_version_option_agrees(run: Run):
    assert run("--version").stdout == f"ckptavg {ckptavg.__version__}\n"
    assert "__version__" in dir(ckptavg)


def test_a_source_tree_that_is_not_installed_has_a_version(tmp_path: Path):
    """Run a copy of the package in an interpreter without site-packages."""
    (tmp_path / "ckptavg").symlink_to(Path(ckptavg.__file__).parent)
    words = [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import ckptavg; "
             "print(ckptavg.__version__)"]  # fmt: skip
    assert subprocess.run(words, capture_output=True, text=True).stdout == "0+unknown\n"
