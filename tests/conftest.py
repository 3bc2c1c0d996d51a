"""Real small trainings, once a session, and the command line by its entry point."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import task as demo_task
import torch
import train as demo_training

from ckptavg.__main__ import main

torch.set_num_threads(1)  # the networks are tiny: a second thread only waits, and for long on a busy machine
TASK = Path(demo_task.__file__)
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's 24 checkpoints of a BatchNorm network on noisy digits."""
    folder = tmp_path_factory.mktemp("digits") / "ckpts"
    demo_training.train(folder)
    return folder


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """``ckptavg`` by its entry point, in an empty directory; in this process, which has torch imported already."""

    def call(*arguments: object, cwd: Path = tmp_path, **environment: str) -> subprocess.CompletedProcess[str]:
        words = ["ckptavg", *map(str, arguments)]
        with monkeypatch.context() as patch:
            for name in [name for name in os.environ if name.startswith("CKPTAVG")]:
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

    before = signal.getsignal(signal.SIGTERM)
    yield call
    signal.signal(signal.SIGTERM, before)
