"""Ctrl-C in a comparison: the running strategy is dropped, and the best of those that finished is written."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

from faults import job
from faults.test_signals import DEAF, real, until
from faults.warm import Done, Warm

TASK = Path(job.__file__)
SLOW = ("--strategies", "twa:epochs=40,swa,soup", "--task", TASK, "--json", "-o")


def compare(warm: Warm, ckpts: Path, place: Path, output: str, *more: object, stop: str = "0:") -> Done:
    return warm.run("compare", ckpts, *SLOW, output, *more, cwd=place, LOG=str(place / f"log-{output}"), STOP=stop)


def gradients(log: Path) -> int:
    """Return where the first gradient is, from 1: of the strategies that run here only twa takes any."""
    return log.read_text().index("g") + 1


def test_ctrl_c_drops_the_running_strategy_and_writes_the_best_of_the_rows_so_far(
    warm: Warm, ckpts: Path, tmp_path: Path
):
    whole = json.loads(compare(warm, ckpts, tmp_path, "whole").out)
    at = gradients(tmp_path / "log-whole") + 20
    done = compare(warm, ckpts, tmp_path, "out", stop=f"{at}:SIGINT")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert report["unfinished"] == ["twa:epochs=40"]
    assert "twa:epochs=40 was stopped by Ctrl-C" in report["warnings"]
    rows = [[row for row in one["strategies"] if row["name"] != "twa:epochs=40"] for one in (report, whole)]
    for row in (*rows[0], *rows[1]):
        del row["cost"]
    assert [row["name"] for row in rows[0]] == ["last", "swa", "soup"] and rows[0] == rows[1]
    (row,) = [row for row in rows[0] if row["name"] == report["winner"]]
    assert [one["coefficient"] for one in report["candidates"]] == row["coefficients"]
    assert {path.name for path in tmp_path.iterdir()} == {"out", "whole", "log-out", "log-whole"}
    assert warm.run("verify", "out", "--sources", ckpts, cwd=tmp_path).code == 0


def test_strategies_after_the_stopped_one_do_not_run(warm: Warm, ckpts: Path, tmp_path: Path):
    names = ("--strategies", "twa:epochs=30,twa:epochs=40,swa,soup", "--force")
    compare(warm, ckpts, tmp_path, "out", *names)
    at = gradients(tmp_path / "log-out")
    (tmp_path / "log-out").unlink()
    done = compare(warm, ckpts, tmp_path, "out", *names, stop=f"{at}:SIGINT")
    assert json.loads(done.out)["unfinished"] == ["twa:epochs=30", "twa:epochs=40"]
    assert "twa:epochs=30 was stopped by Ctrl-C; twa:epochs=40 did not run" in done.err
    assert (tmp_path / "log-out").read_text().count("g") == 1


def test_ctrl_c_before_a_rival_of_the_last_candidate_ends_the_run(warm: Warm, ckpts: Path, tmp_path: Path):
    done = compare(warm, ckpts, tmp_path, "out", stop="3:SIGINT")
    assert done.code == 75 and "interrupted; nothing was written" in done.err
    assert not (tmp_path / "out").exists()


def test_sigterm_ends_a_comparison_and_keeps_its_journal(warm: Warm, ckpts: Path, tmp_path: Path):
    compare(warm, ckpts, tmp_path, "whole")
    at = gradients(tmp_path / "log-whole") + 20
    done = compare(warm, ckpts, tmp_path, "out", stop=f"{at}:SIGTERM")
    assert done.code == 75 and "are kept in out.ckptavg/; run the same command to resume" in done.err
    assert compare(warm, ckpts, tmp_path, "out").code == 0
    assert (tmp_path / "out").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_second_ctrl_c_ends_a_strategy_that_does_not_stop_at_once(tmp_path: Path, ckpts: Path):
    slow = DEAF.replace(
        "def loss(model, batch):",
        "def loss(model, batch):\n    if not torch.is_grad_enabled():\n        return job.loss(model, batch)",
    )
    (tmp_path / "mine.py").write_text("import torch\nfrom faults import job\n" + slow.replace("SIGTERM", "SIGINT"))
    names = ("--strategies", "swa,soup,twa", "--task", "mine.py", "-o", "out")
    process = real("compare", ckpts, *names, cwd=tmp_path)
    until(tmp_path / "deaf", 1, process)
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode == -signal.SIGINT and not (tmp_path / "out").exists()


def test_ctrl_c_in_a_terminal_also_stops_a_strategy_whose_loader_has_workers(tmp_path: Path, ckpts: Path):
    """The signal goes to the whole group: workers may die of it, and later passes have others."""
    log = tmp_path / "log"
    names = ("--strategies", "swa,soup,twa:epochs=500", "--task", TASK, "--json", "-o", "out")
    process = real("compare", ckpts, *names, cwd=tmp_path, LOG=str(log), WORKERS="2")
    while "g" not in (log.read_text() if log.exists() else ""):
        until(log, log.stat().st_size + 1 if log.exists() else 1, process)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 0 and "Traceback" not in err, err
    assert json.loads(out)["unfinished"] == ["twa:epochs=500"]
