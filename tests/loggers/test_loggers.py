"""Loggers of ``--log-to``, each read back by its own library: what a run has shown is what the report says."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import TASK, Run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ckptavg
from ckptavg.errors import OutputError, UsageError
from ckptavg.options import Options
from ckptavg.pipeline import logs
from ckptavg.report.result import CandidateResult, Result

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries about their own deprecations
SEWA = ("--k", 3, "--last", 6, "--steps", 12, "--task", TASK)


def events(folder: Path) -> Any:
    read = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    return read.Reload()


def curve(read: Any, name: str) -> dict[int, float]:
    return {event.step: event.value for event in read.Scalars(name)}


def close(values: dict[int, float]) -> Any:
    return pytest.approx(values, rel=1e-6)  # TensorBoard stores float32


def test_tensorboard_has_the_search_the_report_and_the_candidates_over_their_steps(
    digits: Path, tmp_path: Path, run: Run
):
    done = run("sewa", digits, *SEWA, "--log-to", "tensorboard:runs", "--json")
    assert done.returncode == 0, done.stderr
    report, read = json.loads(done.stdout), events(tmp_path / "runs" / "averaged")
    tags = read.Tags()["scalars"]
    assert curve(read, "scores/test/loss") == close({0: report["scores"]["test"]["loss"]})
    assert curve(read, "baselines/best/val/accuracy") == close({0: report["baselines"]["best"]["val"]["metric"]})
    assert curve(read, "gains/best/value") == close({0: report["gains"]["best"]["value"]})
    assert curve(read, "cost/forward_batches") == {0: report["cost"]["forward_batches"]}
    rows = report["candidates"]
    assert curve(read, "candidates/loss") == close({row["step"]: row["score"]["loss"] for row in rows})
    assert curve(read, "candidates/coefficient") == close({row["step"]: row["coefficient"] for row in rows})
    assert curve(read, "trace/loss") == close(dict(enumerate(report["trace"]["loss"])))
    live = curve(read, "search/learning_the_mask/loss")
    assert live and max(live) == 12  # the last step of a stage is always reported
    assert live[12] == pytest.approx(report["trace"]["loss"][11], rel=1e-6)
    assert not any(name in tag for tag in tags for name in ("left", " ", ":"))
    (verdict,) = read.Tensors("verdict/text_summary")
    assert verdict.tensor_proto.string_val[0].decode() == report["verdict"]
    assert b"To reproduce it" in read.Tensors("report/text_summary")[0].tensor_proto.string_val[0]
    content = read.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"solver" in content and b"gumbel" in content


def test_each_run_has_a_directory_of_its_own(digits: Path, tmp_path: Path):
    for _ in range(2):
        ckptavg.swa(
            digits, last=3, output=tmp_path / "my avg.safetensors", force=True, log_to=[f"tensorboard:{tmp_path}/r"]
        )
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == ["my_avg", "my_avg-2"]


def test_a_comparison_has_its_strategies(digits: Path, tmp_path: Path):
    done = ckptavg.compare(
        digits, "swa,soup", last=4, task=str(TASK), output=tmp_path / "c.safetensors",
        log_to=[f"tensorboard:{tmp_path}/r"],
    )  # fmt: skip
    read = events(tmp_path / "r" / "c")
    for row in done.strategies:
        assert curve(read, f"strategies/{row.name}/test/loss") == close({0: row.scores["test"].loss or 0.0})
        assert curve(read, f"strategies/{row.name}/over_last") == close({0: row.over_last["test"].value})
        assert f"strategies/{row.name}/val_accuracy" in read.Tags()["scalars"]  # live, when it has finished


def test_a_score_command_is_logged_too(tmp_path: Path, run: Run, digits: Path):
    command = f"{sys.executable} -c 'print(0.5)' {{}}"
    done = run("soup", digits, "--last", 3, "--score-cmd", command, "--log-to", "tensorboard:runs")
    assert done.returncode == 0, done.stderr
    read = events(tmp_path / "runs" / "averaged")
    assert curve(read, "scores/val/score") == {0: 0.5} and len(curve(read, "candidates/score")) == 3


def test_the_result_is_the_same_with_a_logger(digits: Path, tmp_path: Path, run: Run):
    run("sewa", digits, *SEWA, "-o", "a.safetensors")
    run("sewa", digits, *SEWA, "-o", "b.safetensors", "-q", "--log-to", "tensorboard:runs")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("tensorbord:x", "no such logger"), ("tensorboard", "no directory"), ("", "no such logger"),
        ("tensorboard:", "no directory"),
    ],
)  # fmt: skip
def test_what_is_no_logger_is_refused(text: str, part: str):
    with pytest.raises(UsageError, match=part) as error:
        Options(log_to=(text,))
    assert error.value.hint


def test_a_logger_twice_is_refused():
    with pytest.raises(UsageError, match="twice"):
        Options(log_to=("tensorboard:a", "tensorboard:a"))


def test_a_missing_package_is_named_with_its_installation(monkeypatch: pytest.MonkeyPatch):
    from ckptavg import loggers

    absent = loggers.BACKENDS["wandb"]._replace(package="package_that_does_not_exist")
    monkeypatch.setitem(loggers.BACKENDS, "wandb", absent)
    with pytest.raises(UsageError, match="needs the package") as error:
        Options(log_to=("wandb:project",))
    assert error.value.hint == "pip install wandb"


def test_a_directory_that_cannot_be_written_is_refused_before_the_run(digits: Path, tmp_path: Path, run: Run):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "absent")
    for name in ("file", "link"):
        done = run("swa", digits, "--log-to", f"tensorboard:{name}")
        assert done.returncode == 5 and f"{name}: is not a directory" in done.stderr
    assert not (tmp_path / "averaged.safetensors").exists()


def test_a_dry_run_logs_nothing(digits: Path, tmp_path: Path, run: Run):
    assert run("swa", digits, "--dry-run", "--log-to", "tensorboard:runs").returncode == 0
    assert not (tmp_path / "runs").exists()


class Broken:
    """A logger whose service goes away at its n-th call: no library does so at a given one."""

    def __init__(self, calls: int) -> None:
        self.left = calls

    def _call(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise ConnectionError("the server is gone\nand more")

    def scalar(self, name: str, value: float, step: int) -> None:
        self._call()

    def finish(self, record: object) -> None:
        self._call()

    def close(self, *, failed: bool) -> None:
        self._call()


@pytest.mark.parametrize("calls", [0, 1, 2, 3])
def test_a_logger_that_fails_costs_one_warning(calls: int):
    said: list[str] = []
    log = logs.Logs({"wandb": Broken(calls)}, lambda stage, *_: said.append(stage))
    assert log.watch is not None
    log.watch("learning", 1, 2, {"loss": 1.0})
    candidate = CandidateResult(path=Path("a"), step=1, coefficient=1.0)
    report = log.finished(Result(strategy="swa", settings={}, seed=0, candidates=[candidate]))
    log.close(failed=True)
    warnings = [text for text in said if text.startswith("--log-to wandb failed")]
    assert len(warnings) == len(report.warnings) == (calls < 3)
    assert all("ConnectionError: the server is gone" in text and "\n" not in text for text in warnings)


def test_a_stage_that_runs_again_goes_on_in_its_curve(tmp_path: Path):
    with logs.opened(Options(log_to=[f"tensorboard:{tmp_path}"]), None) as log:
        assert log.watch is not None
        for done in (1, 2, 2, 3, 1, 2):  # the 2 twice is a repeated report
            log.watch("fold", done, 3, {"loss": float(done), "left": 9.0, "stage_left": 9.0})
    assert curve(events(tmp_path / "averaged"), "search/fold/loss") == {1: 1.0, 2: 2.0, 3: 3.0, 4: 1.0, 5: 2.0}


def test_without_loggers_the_callback_is_the_given_one():
    with logs.opened(Options(), None) as log:
        assert log.watch is None


@pytest.mark.thorough
def test_mlflow_has_parameters_metrics_and_the_report(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(tmp_path / "mlruns"))
    monkeypatch.chdir(tmp_path)
    done = ckptavg.sewa(
        digits, k=3, last=6, steps=12, task=str(TASK), output=tmp_path / "avg.safetensors", log_to=["mlflow:study"]
    )
    client = mlflow.MlflowClient(tracking_uri=str(tmp_path / "mlruns"))
    (found,) = client.search_runs([client.get_experiment_by_name("study").experiment_id])
    assert found.info.status == "FINISHED" and found.info.run_name == "avg"
    assert found.data.params["strategy"] == "sewa" and found.data.params["k"] == "3"
    assert found.data.metrics["scores/test/loss"] == done.scores["test"].loss
    assert found.data.tags["verdict"] == done.verdict
    history = client.get_metric_history(found.info.run_id, "candidates/loss")
    assert {m.step: m.value for m in history} == {c.step: c.score.loss for c in done.candidates if c.score}
    assert client.get_metric_history(found.info.run_id, "search/learning_the_mask/loss")
    report = Path(client.download_artifacts(found.info.run_id, "report.json")).read_text()
    assert json.loads(report)["verdict"] == done.verdict


@pytest.mark.thorough
def test_a_run_that_fails_is_failed_in_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(tmp_path / "mlruns"))
    with pytest.raises(ckptavg.CkptavgError):
        ckptavg.swa(tmp_path / "nothing", output=tmp_path / "x.safetensors", log_to=["mlflow:study"])
    client = mlflow.MlflowClient(tracking_uri=str(tmp_path / "mlruns"))
    (found,) = client.search_runs([client.get_experiment_by_name("study").experiment_id])
    assert found.info.status == "FAILED"


@pytest.mark.thorough
def test_a_server_that_does_not_answer_is_refused_before_the_run(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # the discard port: nothing listens
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(OutputError, match="--log-to mlflow cannot be started"):
        ckptavg.swa(digits, output=tmp_path / "x.safetensors", log_to=["mlflow"])
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.thorough
def test_wandb_has_the_run_offline_and_its_service_ends(digits: Path, tmp_path: Path):
    pytest.importorskip("wandb")
    words = [sys.executable, "-m", "ckptavg", "sewa", digits, *SEWA, "--log-to", "wandb:study", "--json"]
    private = {name: str(tmp_path / name.lower()) for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR")}
    for folder in private.values():
        Path(folder).mkdir()
    environment = {**os.environ, **private, "WANDB_MODE": "offline"}
    done = subprocess.run([*map(str, words)], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "wandb" not in done.stdout.replace("wandb:study", "") and "wandb:" not in done.stderr
    report = json.loads(done.stdout)
    (file,) = (tmp_path / "wandb_dir").glob("wandb/offline-run-*/*.wandb")
    summary, config, history = wandb_records(file)
    assert json.loads(summary["scores/test/loss"]) == report["scores"]["test"]["loss"]
    assert json.loads(summary["verdict"]) == report["verdict"]
    assert json.loads(config["k"]) == 3 and json.loads(config["strategy"]) == "sewa"
    steps = {row["candidates/step"]: row["candidates/loss"] for row in history if "candidates/loss" in row}
    assert steps == {row["step"]: row["score"]["loss"] for row in report["candidates"]}
    assert any("search/learning_the_mask/loss" in row for row in history)
    deadline = time.monotonic() + 60
    while (left := processes(str(tmp_path))) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left


def wandb_records(file: Path) -> tuple[dict[str, str], dict[str, str], list[dict[str, Any]]]:
    """Read W&B's own file: the last summary and configuration as JSON by key, and the rows of the history."""
    from wandb.proto import wandb_internal_pb2

    summary, config, history = dict[str, str](), dict[str, str](), list[dict[str, Any]]()
    for data in logged(file.read_bytes()):
        record: Any = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        summary |= {item.key or "/".join(item.nested_key): item.value_json for item in record.summary.update}
        config |= {item.key: item.value_json for item in record.config.update}
        if record.history.item:
            items = record.history.item
            history.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return summary, config, history


def logged(data: bytes, block: int = 32768) -> Iterator[bytes]:
    """Yield the records of W&B's file, which has the format of LevelDB's log behind 7 bytes."""
    place, parts = 7, list[bytes]()
    while place + 7 <= len(data):
        if block - place % block < 7:  # no room for a header
            place += block - place % block
            continue
        _, size, kind = struct.unpack_from("<IHB", data, place)
        parts.append(data[place + 7 : place + 7 + size])
        place += 7 + size
        if kind in (1, 4):  # a whole record, or its last part
            yield b"".join(parts)
            parts = []


def processes(folder: str) -> list[str]:
    """Return the commands of processes that have ``folder`` in their environment."""
    found: list[str] = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if folder.encode() in path.read_bytes():
                found.append((path.parent / "cmdline").read_text())
        except OSError:
            continue
    return found
