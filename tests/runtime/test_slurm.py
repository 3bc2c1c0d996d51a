"""Scripts of docs/tutorials/slurm.md and docs/how-to/resuming.md: valid bash that requeues interrupted jobs only."""

from __future__ import annotations

import os
import re
import subprocess
import time
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


def block(page: str, marked: str) -> str:
    """Return the only block of a page below this line."""
    (text,) = re.findall(f"^{marked}\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return text


JOB = block("tutorials/slurm.md", '```bash title="average.sh"')
LOOP = block("how-to/resuming.md", "<!-- run by: tests/runtime/test_slurm.py -->\n```bash")
# fake ckptavg: exits with CODE at once, or with 75 on SIGNAL
FAKE = """#!/bin/bash
echo "$@" >> "$HERE/asked"
if [ -n "$SIGNAL" ]; then
    trap 'sleep 0.3; echo "$SIGNAL" > "$HERE/got"; exit 75' "$SIGNAL"
    touch "$HERE/ready"
    while :; do sleep 0.05; done
fi
[ -e "$HERE/codes" ] && { read -r CODE < "$HERE/codes"; sed -i 1d "$HERE/codes"; }
exit "$CODE"
"""


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """Directory with the job script and fake ckptavg and scontrol programs that record their arguments."""
    for name, text in (("ckptavg", FAKE), ("scontrol", '#!/bin/bash\necho "$@" > "$HERE/requeued"\n'), ("job", JOB)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return tmp_path


def start(here: Path, script: str, **environment: str) -> subprocess.Popen[str]:
    found = {
        **os.environ,
        "PATH": f"{here}:{os.environ['PATH']}",
        "HERE": str(here),
        "SLURM_JOB_ID": "42",
        "SIGNAL": "",
    }
    return subprocess.Popen(
        ["bash", "-c", script], env={**found, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("script", [JOB, LOOP], ids=["job", "loop"])
def test_scripts_are_valid_bash(script: str):
    assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).stderr == ""
    for option in ("--requeue", "--open-mode=append", "--signal=B:USR1@120"):
        assert option in JOB


@pytest.mark.parametrize("code", [0, 1, 6, 7, 75, 137])
def test_requeues_only_an_interrupted_run(here: Path, code: int):
    process = start(here, JOB, CODE=str(code))
    out, err = process.communicate()
    assert process.returncode == code and not err
    assert (here / "requeued").exists() == (code == 75)
    if code == 75:
        assert (here / "requeued").read_text() == "requeue 42\n" and "requeued as restart 1" in out


@pytest.mark.parametrize("name", ["USR1", "TERM"])
def test_forwards_the_signal_of_the_scheduler_and_waits_for_the_run(here: Path, name: str):
    process = start(here, JOB, SIGNAL=name)
    while not (here / "ready").exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, {"USR1": 10, "TERM": 15}[name])
    process.communicate()
    assert (here / "got").read_text() == f"{name}\n" and process.returncode == 75
    assert (here / "requeued").read_text() == "requeue 42\n"


@pytest.mark.parametrize(("codes", "asked", "last"), [("75 75 0", 3, 0), ("75 7", 2, 1)])
def test_loop_runs_until_not_interrupted(here: Path, codes: str, asked: int, last: int):
    (here / "codes").write_text(codes.replace(" ", "\n") + "\n")
    process = start(here, LOOP)
    process.communicate()
    assert process.returncode == last and len((here / "asked").read_text().splitlines()) == asked
