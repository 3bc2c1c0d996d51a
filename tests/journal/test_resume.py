"""Resuming an interrupted run: the same bytes, and no measurement is repeated."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import zlib
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from conftest import Run
from hypothesis import given
from hypothesis import strategies as st
from properties import examples

from ckptavg import journal as journal_module
from ckptavg.errors import InputError, OutputExistsError
from ckptavg.journal import Journal, ReadOnlyJournal

STOPPING = """
import os, signal, time
from pathlib import Path
import task as real
from task import model, val_dataloader, train_dataloader, test_dataloader, metric

calls = Path(os.environ["CALLS"])

def loss(model, batch):
    with calls.open("a") as file:
        file.write(".")
    if calls.stat().st_size == int(os.environ.get("STOP", "0")):
        raise KeyboardInterrupt
    if calls.stat().st_size == int(os.environ.get("KILL", "0")):
        os.kill(os.getpid(), signal.SIGKILL)
    return real.loss(model, batch)
"""


@pytest.fixture
def stopping(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(STOPPING)
    return tmp_path / "mine.py"


def calls(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


@pytest.mark.parametrize(
    "command",
    [
        "sewa --k 2 --steps 40",
        "aswa",
        "aswa --offload disk",
        "twa --epochs 8 --layerwise",
        "twa --solver quadratic",
        "compare --strategies swa,soup,twa:epochs=6",
    ],
)
def test_an_interrupted_run_gives_the_same_bytes_and_measures_nothing_twice(
    run: Run, digits: Path, stopping: Path, tmp_path: Path, command: str
):
    name, *options = command.split()
    base = (name, digits, "--last", 4, "--task", stopping, *options)
    whole = run(*base, "-o", "whole", CALLS=str(tmp_path / "a"))
    assert whole.returncode == 0, whole.stderr
    stops = [40, 100, 170]
    for stop in stops:
        done = run(*base, "-o", "parts", CALLS=str(tmp_path / "b"), STOP=str(stop))
        kept = "kept in parts.ckptavg/; run the same command to resume"
        assert done.returncode == 75 and kept in done.stderr, done.stderr
        assert (tmp_path / "parts.ckptavg" / "journal.jsonl").exists() and not (tmp_path / "parts").exists()
    done = run(*base, "-o", "parts", CALLS=str(tmp_path / "b"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()
    assert not (tmp_path / "parts.ckptavg").exists()
    # lost at each stop: the score in progress (19 batches and those of its BatchNorm), or a second of steps
    assert calls(tmp_path / "b") < calls(tmp_path / "a") * (1 + len(stops))


@pytest.mark.thorough
def test_a_killed_run_is_resumed(run: Run, digits: Path, stopping: Path, tmp_path: Path):
    base = ("aswa", str(digits), "--last", "4", "--task", "mine.py", "-o", "out")
    demo = str(Path(__file__).parents[2] / "scripts" / "demo")
    environment = {
        **os.environ,
        "CALLS": str(tmp_path / "a"),
        "KILL": "90",
        "PYTHONPATH": os.pathsep.join([demo, *sys.path]),
    }
    killed = subprocess.run(
        [sys.executable, "-m", "ckptavg", *base], cwd=tmp_path, env=environment, capture_output=True
    )
    assert killed.returncode == -9 and (tmp_path / "out.ckptavg").exists()
    before = calls(tmp_path / "a")
    done = run(*base, CALLS=str(tmp_path / "a"))
    assert done.returncode == 0, done.stderr
    fresh = run(*base, "--force", "--no-resume", CALLS=str(tmp_path / "c"))
    assert fresh.returncode == 0 and calls(tmp_path / "a") - before < calls(tmp_path / "c")


def test_the_journal_of_another_run_is_refused_with_the_difference(
    run: Run, digits: Path, stopping: Path, tmp_path: Path
):
    base = ("aswa", digits, "--last", 4, "--task", stopping, "-o", "out")
    assert run(*base, CALLS=str(tmp_path / "a"), STOP="60").returncode == 75
    done = run(*base, "--seed", 3, CALLS=str(tmp_path / "b"))
    assert done.returncode == 6 and "a different run: seed" in done.stderr and "--no-resume" in done.stderr
    done = run(*base, "--seed", 3, "--no-resume", CALLS=str(tmp_path / "b"))
    assert done.returncode == 0, done.stderr


def test_concurrent_runs_of_one_output_are_refused(run: Run, digits: Path, tmp_path: Path):
    with Journal(tmp_path / "out") as journal:
        done = run("swa", digits, "-o", "out")
        assert done.returncode == 6 and f"process {os.getpid()}" in done.stderr
        assert journal.folder.exists()
    assert run("swa", digits, "-o", "out").returncode == 0 and not journal.folder.exists()


def test_the_journal_can_be_kept(run: Run, digits: Path, stopping: Path, tmp_path: Path):
    done = run("best", digits, "--last", 3, "--task", stopping, "--keep-journal", CALLS=str(tmp_path / "a"))
    assert done.returncode == 0
    lines = (tmp_path / "averaged.safetensors.ckptavg" / "journal.jsonl").read_text().splitlines()
    assert json.loads(lines[0].partition(" ")[2])["candidates"] and len(lines) >= 4


@examples(60)
@given(data=st.data())
def test_a_truncated_or_corrupted_journal_never_returns_wrong_records(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
):
    folder = tmp_path_factory.mktemp("journal")
    records = {f"key {i}": [i, str(i) * i] for i in range(6)}
    with Journal(folder / "out") as journal:
        journal.begin({"run": 1})
        for key, value in records.items():
            journal.put(key, value)
    path = folder / "out.ckptavg" / "journal.jsonl"
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content)))]
    else:
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    with Journal(folder / "out") as journal:
        try:
            journal.begin({"run": 1})
        except OutputExistsError:
            return  # the header was damaged, and another record is taken for it
        for key, value in records.items():
            assert journal.get(key) in (None, value)
        journal.put("more", 1)
    with Journal(folder / "out") as journal:
        assert journal.get("more") == 1


def line_of(record: object) -> bytes:
    text = json.dumps(record, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


@pytest.mark.parametrize("header", [{"schema": 1}, {"schema": 3}, {}, [1], "run"])
def test_a_journal_of_another_version_is_refused(tmp_path: Path, header: object):
    (tmp_path / "out.ckptavg").mkdir()
    path = tmp_path / "out.ckptavg" / "journal.jsonl"
    path.write_bytes(line_of(header))
    with pytest.raises(InputError) as caught:
        Journal(tmp_path / "out")
    assert str(caught.value) == f"{path}: is from another version of ckptavg" and caught.value.hint == "--no-resume"
    with Journal(tmp_path / "out", resume=False) as journal:
        journal.begin({})


def test_invalid_records_are_dropped_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with Journal(tmp_path / "out") as journal:
        journal.begin({"run": 1})
        journal.put("good", 1)
    path = tmp_path / "out.ckptavg" / "journal.jsonl"
    bad = [[], {"key": 3, "value": 1}, {"key": "no value"}, {"value": 2}, "text"]
    path.write_bytes(path.read_bytes() + b"".join(map(line_of, bad)) + line_of({"key": "more", "value": None}))
    with Journal(tmp_path / "out") as journal:
        assert (journal.damaged, journal.replayed) == (5, 2) and journal.records == {"good": 1, "more": None}
    assert f"{path}: 5 lines are damaged; their measurements are repeated" in caplog.text


def test_a_system_without_fdatasync_is_supported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(os, "fdatasync")  # macOS
    with Journal(tmp_path / "out") as journal:
        journal.begin({"run": 1})
        journal.put("good", 1)
    with Journal(tmp_path / "out") as journal:
        assert journal.get("good") == 1


def test_records_of_a_second_are_flushed_to_the_disk_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    flushed, sync = Event(), os.fdatasync
    seen: list[int] = []

    def fdatasync(fd: int) -> None:
        seen.append(os.fstat(fd).st_size)
        sync(fd)
        flushed.set()

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    monkeypatch.setattr(journal_module, "_FLUSH_INTERVAL", 1e6)
    path = tmp_path / "out.ckptavg" / "journal.jsonl"
    with Journal(tmp_path / "out") as journal:
        journal.begin({"run": 1})
        assert seen == [path.stat().st_size]
        for number in range(100):
            journal.defer(f"score {number}", lambda number=number: number)
            journal.flush()
            assert path.read_bytes().count(b"\n") == number + 2  # another process sees it at once
        assert len(seen) == 1
        journal.put("durable", 1)
        assert seen[1:] == [path.stat().st_size]
        journal.add({"last": 1})
    assert seen[2:] == [path.stat().st_size]  # at the end of the run
    monkeypatch.setattr(journal_module, "_FLUSH_INTERVAL", 0)
    with Journal(tmp_path / "out") as journal:
        journal.begin({"run": 1})
        flushed.clear()
        journal.add({"more": 1})
        assert flushed.wait(60) and seen[3] == path.stat().st_size


def test_a_journal_that_cannot_be_flushed_warns_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    with Journal(tmp_path / "out") as journal:
        journal.begin({"run": 1})

        def fdatasync(_: int) -> None:
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(os, "fdatasync", fdatasync)
        journal.put("a", 1)
        journal.put("b", 1)
        journal.add({"c": 1})
        assert [journal.get(key) for key in "abc"] == [1, 1, 1]
    assert caplog.text.count("cannot be written") == 1


def test_scratch_folders_of_a_killed_run_are_removed(tmp_path: Path):
    scratch = tmp_path / "out.ckptavg" / "scratch-1"
    scratch.mkdir(parents=True)
    (scratch / "row").write_bytes(b"x")
    (tmp_path / "out.ckptavg" / "mine").touch()
    with Journal(tmp_path / "out"):
        assert not scratch.exists()
    assert [path.name for path in (tmp_path / "out.ckptavg").iterdir()] == ["mine"]  # files of other programs stay


def test_records_of_this_run_are_distinguished_from_earlier_ones(tmp_path: Path):
    with Journal(tmp_path / "out") as journal:
        journal.begin({"run": 1})
        journal.put("old", 1)
        assert (journal.get("old"), journal.get("old", earlier=True), journal.get("none")) == (1, None, None)
    with Journal(tmp_path / "out") as journal:
        journal.begin({"run": 1})
        journal.put("new", 2)
        assert (journal.get("old", earlier=True), journal.get("new", earlier=True), journal.get("new")) == (1, None, 2)
        copy = ReadOnlyJournal(journal.records, journal.folder)
        copy.put("more", 3)
        copy.put_all({"more": 3})
        assert copy.folder == journal.folder and (copy.get("new"), copy.get("more")) == (2, None)


def test_records_are_compact_lines_with_checksums(tmp_path: Path):
    with Journal(tmp_path / "out") as journal:
        journal.begin({"run": "ä"})
        journal.put_all({})
        journal.put_all({"a": [1, {"b": None}], "c": 2.5})
    texts = [b'{"schema":4,"run":"\\u00e4"}', b'{"key":"a","value":[1,{"b":null}]}', b'{"key":"c","value":2.5}']
    content = (tmp_path / "out.ckptavg" / "journal.jsonl").read_bytes()
    assert content == b"".join(b"%08x %s\n" % (zlib.crc32(text), text) for text in texts)


def test_a_journal_without_measurements_is_started_over(tmp_path: Path):
    with Journal(tmp_path / "out", keep=True) as journal:
        journal.begin({"run": 1})
        journal.put("file x", "digest")
        content = (journal.folder / "journal.jsonl").read_bytes()
        with Journal(tmp_path / "other") as other:
            other.begin({"run": 1})
            (other.folder / "journal.jsonl").write_bytes(content)
            other.drop()
            other.drop()
            assert not other.folder.exists()
    (tmp_path / "out.ckptavg").mkdir()
    (tmp_path / "out.ckptavg" / "journal.jsonl").write_bytes(content)
    with Journal(tmp_path / "out") as journal:
        journal.begin({"run": 2})
        assert (journal.folder / "journal.jsonl").read_bytes() == line_of({"schema": 4, "run": 2})


def test_a_journal_that_was_dropped_does_not_drop_that_of_the_next_run(tmp_path: Path):
    with Journal(tmp_path / "out") as journal:
        journal.drop()
        with Journal(tmp_path / "out") as other:
            other.begin({"run": 2})
            other.put("x", 1)
            journal.drop()
            assert (other.folder / "journal.jsonl").exists()


@pytest.mark.parametrize(
    ("was", "now", "message"),
    [
        ({"seed": 1}, {"seed": 2}, "seed: 1, not 2"),
        ({"a": {"b": [1], "c": 3}}, {"a": {"b": [1], "c": 4}}, "a c: 3, not 4"),
        ({"a": 1}, {"a": {"b": 1}}, 'a: 1, not {"b": 1}'),
        ({"a": 1, "b": 1}, {"a": 1}, "b: 1, not null"),
        ({"a": "x" * 90}, {"a": "y" * 90}, f'a: "{"x" * 79}, not "{"y" * 79}'),
    ],
)
def test_the_first_difference_is_named(tmp_path: Path, was: Any, now: Any, message: str):
    with Journal(tmp_path / "out") as journal:
        journal.begin(was)
        journal.put("x", 1)
        journal.begin(was)
        with pytest.raises(OutputExistsError) as caught:
            journal.begin(now)
    assert str(caught.value) == f"{tmp_path / 'out.ckptavg'}: was left by a different run: {message}"
    assert caught.value.hint == "start over with --no-resume, or choose another -o"


def test_nothing_is_appended_after_a_failed_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    with Journal(tmp_path / "out") as journal:
        journal.begin({"run": 1})
        journal.put("good", 1)
        size = (journal.folder / "journal.jsonl").stat().st_size
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", lambda fd, data: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
            journal.put("lost", 2)
        journal.put("lost too", 3)
        assert journal.get("lost") == 2 and (journal.folder / "journal.jsonl").stat().st_size == size
    assert caplog.text.count("cannot be written: no space left on device; the run continues") == 1


def test_lines_that_are_damaged_are_counted(tmp_path: Path):
    with Journal(tmp_path / "out") as journal:
        journal.begin({"run": 1})
        journal.put_all({"a": 1, "b": 2, "c": 3})
    path = tmp_path / "out.ckptavg" / "journal.jsonl"
    head, a, b, c = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(head + a.replace(b"1", b"7") + b.replace(b"2", b"7") + c + c[:-3])
    with Journal(tmp_path / "out") as journal:
        assert journal.damaged == 2 and journal.records == {"c": 3} and journal.replayed == 1
    assert path.read_bytes().endswith(c)  # the incomplete line is gone
