"""The wheel in an environment of its own: the declared dependencies alone, nothing of the repository.

The dependencies are linked from the running environment, so that nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import venv
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import pytest

import ckptavg

ROOT = Path(__file__).parents[2]
Installed = Callable[..., subprocess.CompletedProcess[str]]
TASK = """
from torch.utils.data import DataLoader

from task import _two_moons, loss, metric, model, train_dataloader

def val_dataloader():
    return DataLoader(_two_moons(400, seed=1), batch_size=64, num_workers=2)
"""


def needed(root: Distribution) -> dict[str, Distribution]:
    """All distributions that one requires without extras, directly or not, by name."""
    found: dict[str, Distribution] = {}
    queue = [root]
    for one in queue:  # grows
        for line in one.requires or ():
            name = re.split(r"[^\w.-]", line)[0].lower()
            if "extra ==" not in line and name not in found:
                with suppress(PackageNotFoundError):  # a marker excludes it here
                    found[name] = distribution(name)
                    queue.append(found[name])
    return found


def link(found: Distribution, folder: Path) -> None:
    """Its top-level files and directories, as links."""
    for top in {file.parts[0] for file in found.files or () if file.parts[0] not in ("..", "__pycache__")}:
        source, target = Path(str(found.locate_file(top))), folder / top
        if not target.exists():
            target.symlink_to(source)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """Runs a program of the new environment, in an empty directory and without the variables of this one."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = [*pip, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", folder, ROOT]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    interpreter = folder / "venv" / "bin" / "python"
    install = [*pip, "--python", interpreter, "install", "--no-deps", "--no-index", wheel]
    subprocess.run(install, check=True, capture_output=True)
    (packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
    for found in needed(Distribution.at(next(packages.glob("ckptavg-*.dist-info")))).values():
        link(found, packages)
    (folder / "work").mkdir()
    kept = {
        name: os.environ[name]
        for name in ("HOME", "LANG", "LD_LIBRARY_PATH", "OPENBLAS_CORETYPE", "TMPDIR")
        if name in os.environ
    }
    kept |= {"PATH": os.defpath, "OMP_NUM_THREADS": "1"}  # a second thread only waits for the first

    def call(name: str, *words: str, cwd: str = ".") -> subprocess.CompletedProcess[str]:
        program = [str(interpreter.parent / name), *words]
        there = folder / "work" / cwd
        return subprocess.run(program, cwd=there, env=kept, capture_output=True, text=True)

    return call


def test_the_environment_holds_the_declared_dependencies_alone(installed: Installed):
    code = "import ckptavg, importlib.util as u; print(ckptavg.__file__, *[n for n in {} if u.find_spec(n)])"
    names = ("torch", "numpy", "scipy", "sklearn", "pytest", "transformers")
    done = installed("python", "-c", code.format(names))
    path, *found = done.stdout.split()
    assert found == ["torch", "numpy", "scipy"] and not Path(path).is_relative_to(ROOT), done.stderr
    assert installed("ckptavg", "--version").stdout == f"ckptavg {ckptavg.__version__}\n"


def test_the_first_commands_run_and_print_their_own_lines_only(installed: Installed):
    """stdout is the path; no line of stderr comes from a library."""
    done = installed("ckptavg", "demo")
    assert (done.returncode, done.stdout) == (0, "ckptavg-demo\n"), done.stderr
    assert done.stderr == "Now:  cd ckptavg-demo && ckptavg sewa ./ckpts --k 5\n"
    for words, out in (
        (("swa", "ckpts"), "averaged.safetensors\n"),
        (("verify", "averaged.safetensors"), "averaged.safetensors\n"),
        (("sewa", "ckpts", "-k", "5", "--steps", "20", "--force"), "averaged.safetensors\n"),
        (("compare", "ckpts", "--strategies", "swa,soup", "-o", "best.safetensors"), "best.safetensors\n"),
    ):
        done = installed("ckptavg", *words, cwd="ckptavg-demo")
        assert (done.returncode, done.stdout) == (0, out), done.stderr
        assert not re.search(r"warning|traceback|\.py\b|numpy", done.stderr.replace("task.py", ""), re.IGNORECASE)
    for words in (("inspect", "ckpts", "--json"), ("env", "--json"), ("eval", "best.safetensors", "--json", "-q"),
                  ("sewa", "ckpts", "--last", "3", "-k", "2", "--steps", "3", "--force", "--json", "-q")):  # fmt: skip
        done = installed("ckptavg", *words, cwd="ckptavg-demo")
        assert (done.returncode, done.stderr) == (0, "") and json.loads(done.stdout), words


def test_workers_of_a_loader_print_nothing(installed: Installed):
    installed("ckptavg", "demo", "second")
    code = f"open('loaded.py', 'w').write({TASK!r})"
    installed("python", "-c", code, cwd="second")
    words = ("sewa", "ckpts", "--last", "3", "-k", "2", "--steps", "3", "--task", "loaded.py", "--json", "-q")
    done = installed("ckptavg", *words, cwd="second")
    assert (done.returncode, done.stderr) == (0, "") and json.loads(done.stdout)["scores"]["val"]
