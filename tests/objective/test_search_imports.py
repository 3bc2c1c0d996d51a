"""Modules that a search loads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from conftest import TASK


def test_sewa_does_not_load_sympy(digits: Path, tmp_path: Path):
    """Torch loads it, which takes half a second, for a backward pass from a given gradient."""
    code = "import sys; from ckptavg.__main__ import main; import atexit; " \
        "atexit.register(lambda: print('sympy' in sys.modules)); main()"  # fmt: skip
    options = ["--k", "2", "--steps", "2", "--swaps", "1", "--task", str(TASK), "-q"]
    call = [sys.executable, "-c", code, "sewa", str(digits), *options]
    done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "averaged.safetensors\nFalse\n"
