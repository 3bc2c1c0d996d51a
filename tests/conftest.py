"""Small real trainings, once per session, and the command line by its entry point."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import task as demo_task
import torch
import typer.main
from jobs import mlp, transformer
from jobs.trained import restore
from tallies import pytest_sessionfinish, pytest_terminal_summary, pytest_testnodedown

from ckptavg.__main__ import main
from ckptavg.checkpoints.discover import discover
from ckptavg.checkpoints.window import Window
from ckptavg.context import Run as Context
from ckptavg.objective.mixture import Mixture
from ckptavg.options.search import SearchOptions
from ckptavg.runtime.signals import SIGNALS
from ckptavg.tasks.python_file import PythonTask

typer.main.get_command = cache(typer.main.get_command)  # Typer rebuilds every command in each call, which is slow
torch.set_num_threads(1)  # the networks are tiny: a second thread only waits, which is slow on a busy machine
CPU = torch.device("cpu")
TASK = Path(demo_task.__file__)
HERE = Path(__file__).parent
THOROUGH = [
    HERE / name
    for name in (
        "distributed", "faults", "frameworks", "hostile", "study", "tasks/test_harness.py",
        "tasks/test_hugging_face.py", "tasks/test_torch_metrics.py", "average/test_lora.py", "scripts/test_wheel.py",
    )
]  # fmt: skip
__all__ = ["pytest_sessionfinish", "pytest_terminal_summary", "pytest_testnodedown"]
Run = Callable[..., subprocess.CompletedProcess[str]]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--quick``, for an environment with the extra ``test`` alone, and ``--device``."""
    text = "leave out what takes long or needs other frameworks"
    parser.addoption("--quick", action="store_true", help=text)
    parser.addoption("--device", default="cpu", help="where those marked gpu compute: scripts/gpu/check.sh has a GPU")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Ignore directories and files without a quick test; some import packages that are not installed."""
    return True if config.getoption("--quick") and collection_path in THOROUGH else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With ``--quick``, deselect single tests marked ``thorough``."""
    if config.getoption("--quick"):
        left_out = [item for item in items if item.get_closest_marker("thorough")]
        items[:] = [item for item in items if not item.get_closest_marker("thorough")]
        config.hook.pytest_deselected(items=left_out)


def pytest_collection_finish() -> None:
    """Freeze the collected tests, so that the garbage collector does not scan them repeatedly."""
    gc.freeze()


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's 24 checkpoints of a BatchNorm network on noisy digits."""
    folder = tmp_path_factory.mktemp("digits") / "ckpts"
    restore("digits", folder)
    return folder


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    """Device of the tests marked ``gpu``."""
    return torch.device(pytestconfig.getoption("--device"))


@dataclass(frozen=True)
class Job:
    """A task file and the checkpoints saved by its training."""

    task: Path
    module: ModuleType
    folder: Path

    @contextmanager
    def mixture(self, *, last: int | None = None, device: torch.device = CPU, **search: Any) -> Iterator[Mixture]:
        """Open the real objective on these checkpoints, with these options of a search."""
        with discover([self.folder], Window(last=last)) as found:
            yield Mixture(
                PythonTask(str(self.task)), found.checkpoints, Context(device=device), SearchOptions(**search)
            )


@pytest.fixture(scope="session")
def jobs(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    """Three recorded trajectories: a BatchNorm CNN, an MLP and a tiny transformer."""
    found = {"cnn": Job(TASK, demo_task, digits)}
    for name, module in (("mlp", mlp), ("transformer", transformer)):
        folder = tmp_path_factory.mktemp(name)
        restore(name, folder)
        found[name] = Job(Path(str(module.__file__)), module, folder)
    return found


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Run ``ckptavg`` by its entry point in an empty directory, in this process, which has already imported torch."""

    def call(*arguments: object, cwd: Path = tmp_path, **environment: str) -> subprocess.CompletedProcess[str]:
        words = ["ckptavg", *map(str, arguments)]
        with monkeypatch.context() as patch:
            for name in [name for name in os.environ if name.startswith(("CKPTAVG", "GITHUB_STEP"))]:
                patch.delenv(name)
            for name, value in environment.items():
                patch.setenv(name, value)
            patch.chdir(cwd)
            patch.setattr(sys, "argv", words)
            patch.setattr(sys, "path", [*sys.path])
            capfd.readouterr()
            with pytest.raises(SystemExit) as left:
                main()
        out, err = capfd.readouterr()
        code = left.value.code
        return subprocess.CompletedProcess(words, code if isinstance(code, int) else int(code is not None), out, err)

    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield call
    for number, handler in before.items():
        signal.signal(number, handler)
