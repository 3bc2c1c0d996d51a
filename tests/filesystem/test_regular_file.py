"""Invalid files, side files and indexes, checked before any format is parsed."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ckptavg.errors import InputError
from ckptavg.filesystem import strict_json
from ckptavg.filesystem.regular_file import RegularFile
from ckptavg.filesystem.strict_json import read_json
from ckptavg.readers import open_reader, shard_index
from ckptavg.readers.torch_zip.checked_records import CheckedRecord


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as own:
        own.bind(str(path))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Path.mkdir, "is a directory, not a regular file"),
        (os.mkfifo, "is a FIFO, not a regular file"),
        (_socket, "is a FIFO or socket, not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "is a device, not a regular file"),
        (lambda path: path.symlink_to(path.name), "is a link that leads back to itself"),
        (lambda path: path.symlink_to("nowhere"), "is a link to a file that does not exist"),
        (lambda path: None, "no such file"),
        (lambda path: (path.write_bytes(b"x"), path.chmod(0)), "permission denied"),
    ],
)
def test_a_file_that_is_not_regular_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], object], message: str
):
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    make(Path("x"))
    if "denied" in message and not os.geteuid():
        pytest.skip("root may read everything")
    with pytest.raises(InputError) as caught:
        RegularFile(Path("x"))
    assert str(caught.value) == f"x: {message}"


def test_a_read_error_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "x").write_bytes(b"0123456789")
    with RegularFile(tmp_path / "x") as file:

        def broken(*_: object) -> int:
            raise OSError(errno.EIO, "x")

        monkeypatch.setattr(os, "preadv", broken)
        with pytest.raises(InputError) as caught:
            file.read(0, 10)
    assert str(caught.value) == f"{tmp_path / 'x'}: input/output error"


def test_partial_reads_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "x").write_bytes(bytes(range(100)))
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, parts, at: whole(fd, [parts[0][:7]], at))
    with RegularFile(tmp_path / "x") as file:
        assert file.read(3, 90) == bytes(range(3, 93))
        with pytest.raises(InputError, match=r"x: file is truncated: 100 bytes present, but 101 are needed"):
            file.read(0, 101)


def test_the_listener_receives_offsets_and_bytes(tmp_path: Path):
    (tmp_path / "x").write_bytes(bytes(range(100)))
    heard: list[tuple[int, bytes]] = []
    with RegularFile(tmp_path / "x") as file:
        file.listener = lambda offset, data: heard.append((offset, bytes(data)))
        file.read(5, 3)
        file.fill(9, memoryview(bytearray(2)))
    assert heard == [(5, bytes([5, 6, 7]))]


def test_side_files_have_a_maximum_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(strict_json, "MAX_SIZE", 9)
    (tmp_path / "x").write_text('{"a": 10}')
    assert read_json(tmp_path / "x") == {"a": 10}
    (tmp_path / "x").write_text('{"a": 100}')
    with pytest.raises(InputError, match="x: is not valid JSON: 10 bytes, more than 9"):
        read_json(tmp_path / "x")


def test_an_index_has_a_maximum_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shard_index, "MAX_INDEX", 20)
    (tmp_path / "x.index.json").write_text('{"weight_map": {}}  ')
    with pytest.raises(InputError, match="has no weight_map"):
        open_reader(tmp_path / "x.index.json")
    (tmp_path / "x.index.json").write_text('{"weight_map": {}}   ')
    with pytest.raises(InputError, match=r"x\.index\.json: index has 21 bytes, more than 20"):
        open_reader(tmp_path / "x.index.json")


def test_a_thread_that_waited_for_a_checksum_does_not_recompute_it(tmp_path: Path):
    (tmp_path / "x").write_bytes(b"not what was promised")
    with RegularFile(tmp_path / "x") as file, ThreadPoolExecutor(2) as pool:
        record = CheckedRecord(file, "r", 0, 21, 0, False)
        for compute in (record.check, record.read):
            record.is_good = False
            with pytest.raises(InputError, match="checksum of record r does not match"):
                compute()
            with record._lock:
                waiting = pool.submit(compute)
                with pytest.raises(TimeoutError):
                    waiting.result(timeout=0.05)
                record.is_good = True  # as if this thread had verified it meanwhile
            assert waiting.result() in (None, b"not what was promised")
