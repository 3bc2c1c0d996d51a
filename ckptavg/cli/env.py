"""``ckptavg env``: print versions, devices and limits of this machine for a bug report, even if torch is broken."""

from __future__ import annotations

import json as json_module
import os
import platform
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rich.filesize import decimal

from ckptavg.cli.command import takes
from ckptavg.cli.options import SHARED
from ckptavg.runtime import threads, version

if TYPE_CHECKING:
    from types import ModuleType

_REQUIRED: Final = ("torch", "numpy", "safetensors", "typer", "rich")
_OPTIONAL: Final = (
    "accelerate", "cma", "datasets", "deepspeed", "huggingface_hub", "lightning", "lm_eval", "matplotlib", "peft",
    "timm", "torchmetrics", "torchvision", "transformers", "triton",
)  # fmt: skip
_SHOWN: Final = re.compile(
    r"(OMP|GOMP|KMP|MKL|OPENBLAS|NCCL|GLOO|PYTORCH|TORCHELASTIC)_\w+|CUDA_(VISIBLE_DEVICES|LAUNCH_BLOCKING)|CKPTAVG_\w+"
)
_PLAIN: Final = re.compile(r"(-?[\d.]+([,:]-?[\d.]+)*|auto|cpu|cuda|true|false|active|passive)?", re.IGNORECASE)


@takes(SHARED["json"], argument=None)
def command(json: bool) -> None:
    """Print versions, devices, memory, threads, file system and variables for a bug report."""
    facts = _facts()
    if json:
        from ckptavg.report.as_json import SCHEMA_VERSION

        head = {"schema_version": SCHEMA_VERSION, "kind": "environment", "run": None}  # as it may hold paths
        print(json_module.dumps(head | facts, indent=2))
        return
    for name, value in facts.items():
        for line in value if isinstance(value, list) else [value]:
            text = ", ".join(f"{key} {entry}" for key, entry in line.items()) if isinstance(line, dict) else line
            print(f"- {name}: {text or 'none'}")


def _facts() -> dict[str, Any]:
    torch, build = _torch()
    counts = {"torch": torch and torch.get_num_threads(), "affinity": threads.affinity(), "quota": threads.quota()}
    shown = {name: value for name, value in sorted(os.environ.items()) if _SHOWN.fullmatch(name)}
    return {
        "ckptavg": version.own(),
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "platform": f"{platform.platform()}, {platform.machine()}",
        "packages": {name: version.installed(name) or "missing" for name in _REQUIRED},
        "optional packages": {name: number for name in _OPTIONAL if (number := version.installed(name))},
        "torch build": build,
        "devices": [f"cpu: {_processor()}", *(_accelerators(torch) if torch else ())],
        "threads": {name: count for name, count in counts.items() if count is not None},
        "memory": _memory(),
        "working directory": _file_system(),
        # without paths and commands
        "variables": {name: value if _PLAIN.fullmatch(value) else "(set)" for name, value in shown.items()},
    }


def _torch() -> tuple[ModuleType | None, str]:
    """Return the torch module and its build, or None and the reason why the import failed."""
    try:
        import torch

        build = torch.version.cuda and f"CUDA {torch.version.cuda}"
        build = build or (torch.version.hip and f"ROCm {torch.version.hip}") or "cpu"
        return torch, f"{build}, git {str(torch.version.git_version)[:10]}"
    except Exception as error:  # a broken installation may raise any exception
        reason = str(error).strip().splitlines() or [""]
        return None, f"cannot be imported: {type(error).__name__}: {reason[-1]}"


def _processor() -> str:
    model = re.search(r"^model name\s*: (.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    name = model[1] if model else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} logical cores"


def _accelerators(torch: ModuleType) -> list[str]:
    """List the GPUs with their memory, or the error of the driver."""
    try:
        lines: list[str] = []
        for index in range(torch.cuda.device_count()):
            free, total = map(decimal, torch.cuda.mem_get_info(index))
            major, minor = torch.cuda.get_device_capability(index)
            name = torch.cuda.get_device_name(index)
            lines.append(f"cuda:{index}: {name}, {total}, {free} free, capability {major}.{minor}")
        if torch.backends.mps.is_available():
            lines.append(f"mps: {decimal(torch.mps.recommended_max_memory())}")
        return lines
    except (RuntimeError, AssertionError) as error:
        return [f"accelerator: {(str(error).splitlines() or [type(error).__name__])[0]}"]


def _memory() -> str:
    total = decimal(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    available = re.search(r"MemAvailable:\s*(\d+)", _read("/proc/meminfo"))
    return f"{total}, {decimal(1024 * int(available[1]))} available" if available else total


def _file_system() -> str:
    """Return the file system type and free space of the working directory, without its path."""
    try:
        here, usage = Path.cwd(), shutil.disk_usage(Path())
    except OSError as error:
        return f"cannot be read: {str(error.strerror).lower()}"
    mounts = re.findall(r"^(?:\S+ ){4}(\S+) .*? - (\S+)", _read("/proc/self/mountinfo"), re.MULTILINE)
    above = [(len(point), kind) for point, kind in mounts if here.is_relative_to(point)]
    kind = max(above, key=lambda mount: mount[0])[1] if above else "file system of unknown type"
    return f"{kind}, {decimal(usage.free)} free of {decimal(usage.total)}"


def _read(path: str) -> str:
    return Path(path).read_text(encoding="utf-8", errors="replace") if Path(path).exists() else ""
