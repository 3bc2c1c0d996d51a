"""What a run has measured, on disk as it goes: the same command goes on where an interrupted one stopped.

One file of lines in ``OUTPUT.ckptavg/``, each ``CRC-32, space, compact JSON``, appended whole and flushed to the disk.
The first line says what run it is of. Strategies are functions of their settings, the seed and what was measured, so
they are run again from the beginning and are answered from here.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Self

from ckptavg.errors import InputError, OutputError, OutputExistsError

SCHEMA: Final = 1
_FILE: Final = "journal.jsonl"
_LOCK: Final = "lock"


class Copy:
    """What a worker that does not write knows of the first one's journal."""

    def __init__(self, records: Mapping[str, Any]) -> None:
        self._records = records

    def get(self, key: str) -> Any:
        """See `Journal.get`."""
        return self._records.get(key)

    def put(self, key: str, value: Any) -> None:
        """The first worker does it."""


class Journal:
    """The measurements of one output's run; a context manager that holds the output's lock.

    Attributes:
        replayed: how many records an earlier run left.
        damaged: lines that were dropped because their checksum did not match.
    """

    def __init__(self, output: Path, *, resume: bool = True, keep: bool = False) -> None:
        """Take the lock, and read what an earlier run left.

        Args:
            output: of the run; the journal lies beside it.
            resume: use what is there; otherwise it is thrown away.
            keep: leave the journal when the run is done.
        Raises:
            OutputExistsError: if another run is writing this output.
            OutputError: if the journal cannot be written.
        """
        self.folder = output.with_name(f"{output.name}.ckptavg")
        self.replayed = self.damaged = 0
        self._keep = keep
        self._records: dict[str, Any] = {}
        self._header: Mapping[str, Any] | None = None
        self._fd = self._lock = -1
        try:
            self.folder.mkdir(exist_ok=True)
            self._take_lock(output)
            self._open(resume)
        except OSError as error:
            self._close()
            raise self._refused(error) from error
        except BaseException:
            self._close()
            raise

    def begin(self, header: Mapping[str, Any]) -> None:
        """Say what run this is; what was left by another one is refused.

        Raises:
            OutputExistsError: naming the first difference.
        """
        wanted = json.loads(json.dumps({"schema": SCHEMA, **header}))
        if self._header is None:
            self._header = wanted
            self._append(wanted)
            return
        for key in sorted(wanted.keys() | self._header.keys()):
            if wanted.get(key) != self._header.get(key):
                was, now = (json.dumps(one.get(key))[:80] for one in (self._header, wanted))
                raise OutputExistsError(
                    f"was left by a run with another {key}: {was}, not {now}", path=self.folder,
                    hint="--no-resume begins anew; or choose another -o",
                )  # fmt: skip

    @property
    def records(self) -> Mapping[str, Any]:
        """Everything that was put."""
        return self._records

    def get(self, key: str) -> Any:
        """What was put under ``key``, or None."""
        return self._records.get(key)

    def put(self, key: str, value: Any) -> None:
        """Write a measurement, on the disk when this returns."""
        self._records[key] = value
        self._append({"key": key, "value": value})

    def done(self) -> None:
        """The output is written: the journal goes, unless it is to be kept."""
        if not self._keep:
            self.drop()

    def drop(self) -> None:
        """Throw away what was written."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()
        if not self._records:  # nothing to go on from
            shutil.rmtree(self.folder, ignore_errors=True)

    def _take_lock(self, output: Path) -> None:
        self._lock = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(self._lock, 200, 0).decode("utf-8", "replace").strip() or "another process"
            os.close(self._lock)
            self._lock = -1
            what = f"another run is writing it ({owner})"
            raise OutputExistsError(what, path=output, hint="wait for it, or choose another -o") from error
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def _open(self, resume: bool) -> None:
        path = self.folder / _FILE
        if not resume:
            path.unlink(missing_ok=True)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        content = bytearray(os.fstat(self._fd).st_size)
        os.preadv(self._fd, [content], 0)
        whole = content.rfind(b"\n") + 1
        os.ftruncate(self._fd, whole)  # a last line that was cut off
        for line in bytes(content[:whole]).splitlines():
            self._read(line)
            if self._header is None:  # nobody knows whose the rest is
                os.ftruncate(self._fd, 0)
                break
        self.replayed = len(self._records)

    def _read(self, line: bytes) -> None:
        sum_, _, text = line.partition(b" ")
        if sum_ != b"%08x" % zlib.crc32(text):
            self.damaged += 1
            return
        record: Any = json.loads(text)
        if self._header is None:
            if record.get("schema") != SCHEMA:
                raise InputError("is of another version of ckptavg", path=self.folder / _FILE, hint="--no-resume")
            self._header = record
        else:
            self._records[record["key"]] = record["value"]

    def _append(self, record: Mapping[str, Any]) -> None:
        text = json.dumps(record, separators=(",", ":")).encode()
        line = memoryview(b"%08x %s\n" % (zlib.crc32(text), text))
        try:
            while line:
                line = line[os.write(self._fd, line) :]
            os.fdatasync(self._fd)
        except OSError as error:
            raise self._refused(error) from error

    def _refused(self, error: OSError) -> OutputError:
        return OutputError(f"cannot be written: {os.strerror(error.errno or 0).lower()}", path=self.folder)

    def _close(self) -> None:
        for fd in (self._fd, self._lock):
            if fd >= 0:
                os.close(fd)
        self._fd = self._lock = -1
