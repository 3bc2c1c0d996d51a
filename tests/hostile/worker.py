"""A process that runs the command line on hostile inputs, so that a crash or a hang can be counted.

It reads names of cases, one per line, and answers each with ``> NAME`` and then a line of JSON. A signal ends it.
"""

from __future__ import annotations

import io
import json
import os
import resource
import signal
import sys
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import typer.main

HANG = 30  # seconds after which a signal ends the process unconditionally
MEMORY = 1 << 30  # bytes by which a run may exceed its initial memory
USUAL = 0.03  # seconds that `_pace` takes on the machine for which the limit on CPU time was set
_CHEAP = 2.0  # CPU seconds below which the speed of the machine is not measured
_NOBODY = 65534
# calls that no reader makes; other effects of code are detected by the file it creates
_SUSPECT = frozenset({
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "os.kill", "subprocess.Popen",
    "pty.spawn", "pickle.find_class", "socket.connect", "socket.bind", "urllib.Request",
    "webbrowser.open", "ctypes.dlopen", "builtins.input", "builtins.breakpoint",
})  # fmt: skip
_DRIVERS = ("libnvidia-ml.so.1", "libamd_smi.so")  # loaded again by torch's GPU builds to count devices


class Watcher:
    """Records the interpreter's audit events that only code from a checkpoint would raise."""

    def __init__(self) -> None:
        self.on = False
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.on and event in _SUSPECT and not (event == "ctypes.dlopen" and arguments[0] in _DRIVERS):
            self.seen.append(event)


def run(arguments: list[str], watcher: Watcher) -> dict[str, Any]:
    """Run ``ckptavg ARGUMENTS`` in this process and directory; return its exit code, output, and resource use."""
    from ckptavg.__main__ import main

    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    before = sys.argv, sys.stdout, sys.stderr
    sys.argv, sys.stdout, sys.stderr = ["ckptavg", *arguments], out, err
    start, cpu, memory = time.monotonic(), time.process_time(), _reset_peak()
    watcher.on = True
    signal.alarm(HANG)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + MEMORY, limits[1]))
    code: Any = -1
    try:
        main()
    except SystemExit as left:
        code = left.code
    except BaseException as error:
        code = f"{type(error).__name__}: {error}"
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.alarm(0)
        cpu = time.process_time() - cpu
        watcher.on = False
        sys.argv, sys.stdout, sys.stderr = before
    if cpu > _CHEAP:  # a CPU that is slow or shared does not count against the run
        cpu /= max(1.0, _pace() / USUAL)
    seen, watcher.seen = watcher.seen, []
    texts = [stream.buffer.getvalue().decode("utf-8", "backslashreplace") for stream in (out, err)]  # type: ignore
    return {
        "code": 0 if code is None else code, "out": texts[0][:20_000], "err": texts[1][:20_000], "seen": seen,
        "cpu": cpu, "wall": time.monotonic() - start,
        "memory": _status("VmHWM") - memory,
    }  # fmt: skip


def _pace() -> float:
    """Return CPU seconds for half a million calls through a table, as in a reader of pickles."""
    table, stack = [lambda stack, byte: stack.append(byte)] * 256, []
    start = time.process_time()
    for byte in bytes(range(256)) * 2000:
        table[byte](stack, byte)
    return time.process_time() - start


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) << 10
    raise AssertionError(key)


def _reset_peak() -> int:
    """Reset the peak resident memory if permitted; return the current resident memory."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def listing(folder: Path) -> list[str]:
    """List everything below ``folder``, without following links."""
    return sorted(
        os.path.relpath(f"{at}/{name}", folder).encode("utf-8", "backslashreplace").decode()
        for at, folders, files in os.walk(folder)
        for name in (*folders, *files)
    )


def serve(base: Path) -> None:
    """Answer cases until the input ends."""
    from hostile.case import plain
    from hostile.corpus import corpus

    _build_commands_once()
    watcher = Watcher()
    known = corpus()
    _warm(base / "warm", watcher, plain)
    for number, line in enumerate(sys.stdin):
        case = known[line.rstrip("\n")]
        print(f"> {case.id}", flush=True)
        work = base / f"{os.getpid()}-{number}"
        folder = work / "ckpts"
        folder.mkdir(parents=True)
        if not case.alone:
            for step in (1, 2):
                (folder / f"step-{step}.safetensors").write_bytes(plain(step))
        os.chdir(work)
        case.build(folder)
        before = listing(work)
        if case.nobody:
            work.chmod(0o777)
            os.seteuid(_NOBODY)
        try:
            commands = [["inspect", "ckpts"], ["swa", "ckpts", "-o", "out.safetensors", *case.options]]
            runs = [run(command, watcher) for command in commands[: 1 if case.quick else 2]]
        finally:
            if case.nobody:
                os.seteuid(0)
        after = listing(work)
        os.chdir(base)
        _remove(work)
        new, gone = sorted(set(after) - set(before)), sorted(set(before) - set(after))
        print(json.dumps({"runs": runs, "new": new, "gone": gone}), flush=True)


def _build_commands_once() -> None:
    """Cache the commands: Typer rebuilds all of them in each call, which is two thirds of the time of a run."""
    typer.main.get_command = cache(typer.main.get_command)


def _warm(work: Path, watcher: Watcher, plain: Any) -> None:
    """Import every module, so that no run is charged for the imports."""
    folder = work / str(os.getpid()) / "ckpts"
    folder.mkdir(parents=True)
    for step in (1, 2):
        (folder / f"step-{step}.safetensors").write_bytes(plain(step))
    os.chdir(folder.parent)
    for command in (["inspect", "ckpts"], ["swa", "ckpts", "-o", "out.safetensors"]):
        done = run(command, watcher)
        assert done["code"] == 0, done
    os.chdir(work.parent)


def _remove(folder: Path) -> None:
    """Remove a tree of any depth, links and all."""
    for entry in list(os.scandir(folder)):
        _remove(Path(entry.path)) if entry.is_dir(follow_symlinks=False) else Path(entry.path).unlink()
    folder.rmdir()


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    serve(Path(sys.argv[1]))
