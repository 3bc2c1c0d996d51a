"""What a run has measured, on disk as it goes: the same command goes on where an interrupted one stopped.

One file of lines in ``OUTPUT.ckptavg/``, each ``CRC-32, space, compact JSON``, appended whole and flushed to the disk.
The first line says what run it is of. Strategies are functions of their settings, the seed and what was measured, so
they are run again from the beginning and are answered from here.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import zlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any, Final, Self

from ckptavg.errors import InputError, OutputError, OutputExistsError
from ckptavg.filesystem.atomic import flush_folder, os_message
from ckptavg.filesystem.lock import release, take

SCHEMA: Final = 2
SOURCE_PREFIX: Final = "file "  # how keys begin that tell of the inputs: alone they are nothing to go on from
SCRATCH: Final = "scratch-"  # how directories begin that a killed run leaves, and the next one removes
_FILE: Final = "journal.jsonl"
_LOCK: Final = "lock"


class ReadOnlyJournal:
    """What a worker that does not write knows of the first one's journal."""

    def __init__(self, records: Mapping[str, Any], folder: Path) -> None:
        self._records = records
        self.folder = folder

    def get(self, key: str, *, earlier: bool = False) -> Any:
        """See `Journal.get`; all that is here an earlier run has put."""
        return self._records.get(key)

    def put(self, key: str, value: Any) -> None:
        """The first worker does it."""

    def put_all(self, values: Mapping[str, Any]) -> None:
        """The first worker does it."""


class Journal:
    """The measurements of one output's run; a context manager that holds the output's lock.

    Where a measurement cannot be written, the run goes on without: it is remembered, and a warning is logged once.

    Attributes:
        folder: where it lies, and whatever else belongs to the run that writes the output.
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
            OutputError: if the journal cannot be made.
        """
        self.folder = output.with_name(f"{output.name}.ckptavg")
        self.replayed = self.damaged = 0
        self._keep = keep
        self._records: dict[str, Any] = {}
        self._own: set[str] = set()  # keys that this run has put
        self._header: Mapping[str, Any] | None = None
        self._writing = Lock()
        self._lost = self._dropped = False
        self._fd = self._lock = -1
        try:
            self._lock = take(self.folder / _LOCK, output)
            self._sweep()
            self._open(resume)
        except OSError as error:
            self._close()
            raise OutputError(f"cannot be written: {os_message(error)}", path=self.folder) from error
        except BaseException:
            self._close()
            raise

    def begin(self, header: Mapping[str, Any]) -> None:
        """Say what run this is; what was left by another one is refused.

        Raises:
            OutputExistsError: naming the first difference.
        """
        wanted = json.loads(json.dumps({"schema": SCHEMA, **header}))
        if not self._measured():  # whatever run it was, it left nothing to go on from
            self._header = wanted
            self._records = {}
            self._append([wanted], first=True)
        elif difference := _difference(self._header, wanted):
            raise self.another(difference)

    def another(self, difference: str) -> OutputExistsError:
        """What to say of a journal that another run left."""
        return OutputExistsError(
            f"was left by a run with another {difference}", path=self.folder,
            hint="--no-resume begins anew; or choose another -o",
        )  # fmt: skip

    @property
    def records(self) -> Mapping[str, Any]:
        """Everything that was put."""
        return self._records

    def get(self, key: str, *, earlier: bool = False) -> Any:
        """What was put under ``key``, or None; only what an ``earlier`` run put, if that is asked for."""
        return None if earlier and key in self._own else self._records.get(key)

    def put(self, key: str, value: Any) -> None:
        """Write a measurement, on the disk when this returns; from any thread."""
        self.put_all({key: value})

    def put_all(self, values: Mapping[str, Any]) -> None:
        """Write several at once."""
        with self._writing:
            self._records.update(values)
            self._own.update(values)
            self._append([{"key": key, "value": value} for key, value in values.items()])

    def done(self) -> None:
        """The output is written: the journal goes, unless it is to be kept."""
        if not self._keep:
            self.drop()

    def drop(self) -> None:
        """Throw away what was written, once: another run may have begun since."""
        if not self._dropped:
            self._dropped = True
            self._sweep()
            with suppress(OSError):  # of somebody else's files
                for path in (self.folder / _FILE, self.folder / _LOCK):
                    path.unlink(missing_ok=True)
                self.folder.rmdir()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._measured():
            self.drop()
        self._close()

    def _open(self, resume: bool) -> None:
        path = self.folder / _FILE
        if not resume:
            path.unlink(missing_ok=True)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        content = _whole(self._fd)
        whole = content.rfind(b"\n") + 1
        os.ftruncate(self._fd, whole)  # a last line that was cut off
        for line in content[:whole].splitlines():
            self._read(line)
            if self._header is None:  # nobody knows whose the rest is
                os.ftruncate(self._fd, 0)
                break
        self.replayed = self._measured()
        if self.damaged:
            what = "%s: %d lines are damaged; what they told is measured again"
            logging.getLogger("ckptavg").warning(what, path, self.damaged)
        if not whole:  # it is new: its name must last too
            flush_folder(path)
            flush_folder(self.folder)

    def _sweep(self) -> None:
        for path in self.folder.glob(f"{SCRATCH}*"):
            shutil.rmtree(path, ignore_errors=True)

    def _measured(self) -> int:
        return sum(not key.startswith(SOURCE_PREFIX) for key in self._records)

    def _read(self, line: bytes) -> None:
        sum_, _, text = line.partition(b" ")
        if sum_ != b"%08x" % zlib.crc32(text):
            self.damaged += 1
            return
        record: Any = json.loads(text)
        if self._header is None:
            if not isinstance(record, dict) or record.get("schema") != SCHEMA:
                raise InputError("is of another version of ckptavg", path=self.folder / _FILE, hint="--no-resume")
            self._header = record
        elif isinstance(record, dict) and isinstance(record.get("key"), str) and "value" in record:
            self._records[record["key"]] = record["value"]
        else:
            self.damaged += 1

    def _append(self, records: Iterable[Mapping[str, Any]], *, first: bool = False) -> None:
        texts = [json.dumps(record, separators=(",", ":")).encode() for record in records]
        lines = memoryview(b"".join(b"%08x %s\n" % (zlib.crc32(text), text) for text in texts))
        if self._lost or not lines:
            return
        try:
            if first:
                os.ftruncate(self._fd, 0)
            while lines:
                lines = lines[os.write(self._fd, lines) :]
            getattr(os, "fdatasync", os.fsync)(self._fd)  # macOS has only the other
        except OSError as error:
            self._lost = True  # what follows a torn line would be torn too
            what = "cannot be written: %s; the run goes on, but what it measures from now on is lost if it ends early"
            logging.getLogger("ckptavg").warning("%s: " + what, self.folder, os_message(error))

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        if self._lock >= 0:
            release(self._lock)
        self._fd = self._lock = -1


def _whole(fd: int) -> bytes:
    content, done = bytearray(os.fstat(fd).st_size), 0
    while done < len(content) and (count := os.preadv(fd, [memoryview(content)[done:]], done)):
        done += count
    return bytes(content[:done])


def _difference(was: Any, now: Any) -> str:
    """Where two values differ first, and how, short enough for a line; empty if they do not."""
    if was == now:
        return ""
    if isinstance(was, dict) and isinstance(now, dict):
        key = next(key for key in sorted({*was, *now}) if was.get(key) != now.get(key))
        inner = _difference(was.get(key), now.get(key))
        return f"{key}{'' if inner.startswith(': ') else ' '}{inner}"
    return f": {json.dumps(was)[:80]}, not {json.dumps(now)[:80]}"
