"""``ckptavg`` in separate processes, without waiting for torch: a server imports it once and forks for each run.

The server has averaged once and never run autograd, so a fork is equivalent to a fresh process from the entry point on,
which is `ckptavg.__main__.main` with its handlers, arguments and exit codes. The earlier part, the interpreter and the
import of torch, is covered by the tests that start real processes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any, NamedTuple, Self

from ckptavg.runtime.signals import SIGNALS

TESTS = Path(__file__).resolve().parents[1]


class Done(NamedTuple):
    """Outcome of a run; the code is negative if a signal ended it."""

    code: int
    out: str
    err: str


class Child:
    """A running process."""

    def __init__(self, server: Warm, pid: int, said: Path) -> None:
        self.pid = pid
        self._server = server
        self._said = said

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal; harmless after the run has ended, since its process is not yet reaped."""
        os.kill(self.pid, number)

    def wait(self) -> Done:
        """Wait for its end."""
        status = self._server.ask({"wait": self.pid})
        files = [Path(f"{self._said}.{name}") for name in ("out", "err")]  # missing if the run was killed at once
        texts = [file.read_text(errors="replace") if file.exists() else "" for file in files]
        return Done(os.waitstatus_to_exitcode(status), *texts)


class Warm:
    """Client of the server; a context manager that ends it."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._runs = 0
        paths = [str(TESTS.parent), str(TESTS), str(TESTS.parent / "scripts" / "demo")]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("CKPTAVG")}
        environment |= {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        command = [sys.executable, "-m", "faults.warm"]
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, *arguments: object, cwd: Path, hook: Mapping[str, Any] | None = None, **environment: str) -> Child:
        """Start ``ckptavg ARGUMENTS`` in ``cwd``; ``hook`` is for `faults.hook.install`."""
        self._runs += 1
        said = self._scratch / f"run-{self._runs}"
        asked = {"argv": list(map(str, arguments)), "cwd": str(cwd), "said": str(said), "hook": dict(hook or {})}
        return Child(self, self.ask({**asked, "env": environment}), said)

    def run(self, *arguments: object, cwd: Path, hook: Mapping[str, Any] | None = None, **environment: str) -> Done:
        """Run `start` and wait."""
        return self.start(*arguments, cwd=cwd, hook=hook, **environment).wait()

    def ask(self, request: Mapping[str, Any]) -> int:
        """Send a request and read the answer."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, f"the server has ended: {self._process.wait()}"
        return int(answer)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.kill()  # a process forked from this one meanwhile may hold the other end open
        self._process.wait()
        self._process.stdout.close()


def serve() -> None:
    """Fork for each request line, and report how a child ended on request."""
    _warm_up()
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = os.waitpid(request["wait"], 0)[1]
        else:
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until the child has installed the product's handlers
            answer = os.fork()
            if answer == 0:
                _run(**request)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        sys.stdout.write(f"{answer}\n")
        sys.stdout.flush()


def _warm_up() -> None:
    """Average once by the command line, so that every module is imported."""
    import torch
    from safetensors.torch import save_file

    import ckptavg.objective.mixture
    import ckptavg.pipeline.comparison
    import ckptavg.tasks.python_file  # noqa: F401
    from ckptavg.__main__ import main

    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        for step in (1, 2):
            save_file({"w": torch.ones(1)}, Path(folder) / f"step-{step}.safetensors")
        sys.argv = ["ckptavg", "swa", folder, "-o", f"{folder}/out", "--quiet"]
        with suppress(SystemExit):
            main()


def _run(argv: list[str], cwd: str, said: str, env: dict[str, str], hook: dict[str, Any]) -> None:
    from ckptavg.__main__ import main
    from ckptavg.runtime import signals
    from faults import hook as hooks

    install = signals.install

    def install_and_unblock() -> None:
        install()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    signals.install = install_and_unblock
    code: object = 70
    try:
        for fd, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{said}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), fd)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(cwd)
        os.environ.update(env)
        sys.argv = ["ckptavg", *argv]
        with hooks.installed(hook):
            main()
    except SystemExit as left:
        code = left.code
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    serve()
