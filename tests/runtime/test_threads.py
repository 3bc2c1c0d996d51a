"""CPU quota from control groups, and the OpenMP settings derived from it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ckptavg.runtime import threads

PERIOD = 100_000
V1 = "31 23 0:29 / {mount} rw,nosuid - cgroup cgroup rw,cpu,cpuacct\n"
V2 = "31 23 0:29 / {mount} rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"


def process(folder: Path, cgroup: str, mountinfo: str) -> Path:
    """Create a directory like ``/proc/self`` in ``folder``."""
    proc = folder / "proc"
    proc.mkdir()
    (proc / "cgroup").write_text(cgroup)
    (proc / "mountinfo").write_text("22 1 8:1 / / rw - ext4 /dev/sda1 rw\n" + mountinfo)
    return proc


def group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("cpu_", "cpu.")).write_text(text)


def test_quota_is_the_minimum_over_ancestors(tmp_path: Path):
    mount = tmp_path / "sys"
    group(mount)  # the root has no cpu.max
    group(mount / "a.slice", cpu_max=f"250000 {PERIOD}\n")
    group(mount / "a.slice" / "job", cpu_max=f"max {PERIOD}\n")
    group(mount / "a.slice" / "job" / "step", cpu_max="80000 20000\n")
    group(mount / "b.slice", cpu_max=f"1000 {PERIOD}\n")  # not an ancestor
    proc = process(tmp_path, "0::/a.slice/job/step\n", V2.format(mount=mount))
    assert threads.quota(proc) == 2.5
    group(mount / "a.slice" / "job" / "step", cpu_max="30000 20000\n")
    assert threads.quota(proc) == 1.5


@pytest.mark.parametrize(("path", "root"), [("/", "/"), ("/docker/f00", "/docker/f00"), ("/../..", "/"),
                                            ("/elsewhere", "/docker/f00"), ("/../x", "/")])  # fmt: skip
def test_quota_in_a_container_is_read_at_the_mount_point(tmp_path: Path, path: str, root: str):
    """With and without a cgroup namespace, and for a process outside of the namespace or the mount."""
    mount = tmp_path / "sys"
    group(mount, cpu_max="75000 50000\n")
    proc = process(tmp_path, f"0::{path}\n", V2.format(mount=mount).replace(" / ", f" {root} ", 1))
    assert threads.quota(proc) == 1.5


def test_cgroup_version_1_with_an_empty_version_2(tmp_path: Path):
    first, second = tmp_path / "a cpu", tmp_path / "unified"
    group(first, cpu_cfs_quota_us="-1\n", cpu_cfs_period_us=f"{PERIOD}\n")
    group(first / "jobs", cpu_cfs_quota_us="300000\n", cpu_cfs_period_us=f"{PERIOD}\n")
    group(first / "jobs" / "7", cpu_cfs_quota_us="-1\n", cpu_cfs_period_us=f"{PERIOD}\n")
    group(second)
    escaped = str(first).replace(" ", r"\040")
    other = "30 23 0:28 / /nowhere rw - cgroup cgroup rw,cpuset\n"
    proc = process(
        tmp_path, "9:name=systemd:/\n4:cpu,cpuacct:/jobs/7\n3:cpuset:/\n0::/\n",
        other + V1.format(mount=escaped) + V2.format(mount=second),
    )  # fmt: skip
    assert threads.quota(proc) == 3.0


@pytest.mark.parametrize(
    "limit", ["", "max", "max 100000", "-1 100000", "x y", "100000", "100000 0", "\0", "\ud8ff", "1e5 100000"]
)
def test_malformed_limit_is_ignored(tmp_path: Path, limit: str):
    mount = tmp_path / "sys"
    group(mount)
    (mount / "cpu.max").write_bytes(limit.encode("utf-8", "surrogatepass"))
    assert threads.quota(process(tmp_path, "0::/\n", V2.format(mount=mount))) is None


def test_unreadable_limit_is_ignored(tmp_path: Path):
    mount = tmp_path / "sys"
    group(mount / "job", cpu_max="1 1\n")
    assert threads.quota(tmp_path / "gone") is None
    proc = process(tmp_path, "odd\n0::/job\n", "odd\n31 23 0:29 /\n" + V2.format(mount=mount))
    assert threads.quota(proc) == 1.0
    (mount / "job" / "cpu.max").unlink()
    (mount / "job" / "cpu.max").mkdir()
    assert threads.quota(proc) is None


@pytest.mark.parametrize(("limit", "used"), [("0.01", 1), ("1", 1), ("1.4", 1), ("1.5", 2), ("2.5", 3), ("1e6", None)])
def test_quota_is_rounded_to_the_nearest_integer(tmp_path: Path, limit: str, used: int | None):
    mount = tmp_path / "sys"
    group(mount, cpu_max=f"{round(float(limit) * PERIOD)} {PERIOD}")
    proc = process(tmp_path, "0::/\n", V2.format(mount=mount))
    available = threads.affinity()
    assert threads.processors(proc) == (available if used is None else min(used, available))


# tests in subprocesses

masks = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs affinity masks, which macOS lacks")
FIRST = """
import os, sys
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:int(sys.argv.pop(1))])
"""


def clean(**given: str) -> dict[str, str]:
    """Return the environment without thread variables, plus ``given``."""
    prefixes = ("OMP_", "GOMP_", "KMP_", "MKL_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}
    return {**kept, "PYTHONPATH": os.pathsep.join(sys.path), **given}


def child(code: str, *words: object, cwd: Path | None = None, **given: str) -> str:
    command = [sys.executable, "-W", "error", "-c", code, *map(str, words)]
    done = subprocess.run(command, cwd=cwd, env=clean(**given), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


TASK = """
import json, os, torch
from pathlib import Path
known = json.dumps([torch.get_num_threads(), dict(os.environ)])
Path("seen.json").write_text(known)
def model(): return torch.nn.Linear(2, 1)
def loss(model, batch): return model(batch).mean()
def val_dataloader(): return [torch.ones(1, 2)]
"""
CLI = FIRST + "from ckptavg.__main__ import main\nmain()\n"


@pytest.fixture
def work(tmp_path: Path) -> Path:
    for step in (1, 2):
        state = {"weight": torch.full((1, 2), float(step)), "bias": torch.zeros(1)}
        torch.save(state, tmp_path / f"step-{step}.pt")
    (tmp_path / "task.py").write_text(TASK)
    return tmp_path


def threads_and_environment(work: Path, processors: int, **given: str) -> tuple[int, dict[str, str]]:
    """Return torch's number of threads and the environment inside a task of a command-line run."""
    child(CLI, processors, "swa", work, "--task", "task.py", "--force", "--quiet", cwd=work, **given)
    count, environment = json.loads((work / "seen.json").read_text())
    return count, environment


def threads_without_ckptavg(processors: int, **given: str) -> int:
    """Return torch's number of threads without ckptavg."""
    return int(child(FIRST + "import torch\nprint(torch.get_num_threads())", processors, **given))


@pytest.mark.thorough
@masks
@pytest.mark.parametrize("processors", sorted({1, min(2, threads.affinity()), threads.affinity()}))
def test_run_uses_as_many_threads_as_its_mask_has_processors(work: Path, processors: int):
    count, environment = threads_and_environment(work, processors)
    alone = threads_without_ckptavg(processors)
    assert environment["GOMP_SPINCOUNT"] == "10000"
    assert count == alone or (count < alone and threads.quota() is not None)
    assert count <= processors


@pytest.mark.thorough
@masks
@pytest.mark.parametrize("given", [{"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "5000"}, {"KMP_BLOCKTIME": "3"},
                                   {"OMP_NUM_THREADS": "3"}], ids=str)  # fmt: skip
def test_variables_set_by_the_user_are_kept(work: Path, given: dict[str, str]):
    count, environment = threads_and_environment(work, 1, **given)
    ours = {name: value for name, value in environment.items() if name.startswith(("OMP_", "GOMP_", "KMP_", "MKL_"))}
    assert ours == (given if "OMP_NUM_THREADS" not in given else {**given, "GOMP_SPINCOUNT": "10000"})
    assert count == threads_without_ckptavg(1, **given)


@pytest.mark.parametrize("given", [{}, {"OMP_NUM_THREADS": "7"}, {"MKL_NUM_THREADS": "7"}], ids=str)
def test_quota_sets_the_number_of_threads_unless_set_by_the_user(
    tmp_path: Path, given: dict[str, str], monkeypatch: pytest.MonkeyPatch
):
    environment = dict(given)
    monkeypatch.setattr(threads, "affinity", lambda: 64)
    monkeypatch.setattr(threads, "processors", lambda: 1)
    monkeypatch.delitem(sys.modules, "torch")
    threads.configure(environment)
    assert environment == {"GOMP_SPINCOUNT": "10000", **(given or {"OMP_NUM_THREADS": "1"})}


def test_scoring_command_inherits_the_settings(work: Path):
    child(CLI, 1, "swa", work, "--force", "--quiet", "--score-cmd", "env > seen.txt; echo 1; true", cwd=work)
    assert "GOMP_SPINCOUNT=10000\n" in (work / "seen.txt").read_text()


@pytest.mark.parametrize("first", ["import torch", "pass"])
def test_python_api_keeps_the_settings_of_a_loaded_torch(work: Path, first: str):
    before = "import torch; before = dict(os.environ), torch.get_num_threads()" if first != "pass" else ""
    code = f"""
import json, os, sys
{before}
import ckptavg
assert ("torch" in sys.modules) is {first != "pass"} and "GOMP_SPINCOUNT" not in os.environ
ckptavg.swa({str(work)!r}, output="x.safetensors")
import torch
print("GOMP_SPINCOUNT" in os.environ)
{"assert before == (dict(os.environ), torch.get_num_threads())" if before else ""}
"""
    assert child(code, cwd=work) == f"{first == 'pass'}\n"


@pytest.mark.parametrize(("workers", "noted"), [(0, False), (1, False), (2, True)])
def test_warns_about_more_loader_processes_than_the_quota_allows(
    work: Path, workers: int, noted: bool, monkeypatch: pytest.MonkeyPatch
):
    import ckptavg
    from ckptavg.tasks import python_file

    loader = f"torch.utils.data.DataLoader(torch.ones(4, 2), num_workers={workers}, multiprocessing_context="
    loader += "'fork')" if workers else "None)"
    (work / "task.py").write_text(TASK.replace("[torch.ones(1, 2)]", loader))
    monkeypatch.setattr(python_file, "processors", lambda: 1)
    monkeypatch.setattr(python_file, "quota", lambda: 1.2)
    monkeypatch.setattr(python_file, "affinity", lambda: 2)
    monkeypatch.chdir(work)
    result = ckptavg.swa(work, task=work / "task.py", output=work / "x.safetensors", force=True)
    message = "val_dataloader() has num_workers=2, and the CPU quota is 1.2: use at most 1"
    assert [text for text in result.warnings if "num_workers" in text] == ([message] if noted else [])
