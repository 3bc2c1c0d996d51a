"""Journal of a run's measurements on disk, with which the same command resumes an interrupted run.

It is one file in ``OUTPUT.ckptavg/``, with lines of ``CRC-32, space, compact JSON``, each appended in one piece, and on
the disk within a second. The first line identifies the run. Strategies are deterministic functions of their settings,
the seed and the measurements, so a resumed run starts from the beginning and replays measurements from the journal.
"""

import json
import logging
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from threading import Lock, Timer
from typing import Any, Final, Self

from ckptavg.errors import InputError, OutputError, OutputExistsError
from ckptavg.filesystem.atomic import flush_folder, os_message
from ckptavg.filesystem.lock import release, take

SCHEMA: Final = 4
SOURCE_PREFIX: Final = "file "  # prefix of keys about input files; a journal with only these cannot be resumed
SCRATCH: Final = "scratch-"  # prefix of directories that a killed run leaves behind and the next run removes
_FLUSH_INTERVAL: Final = 1.0  # seconds between writes of deferred records, and until a write is on the disk
_FILE: Final = "journal.jsonl"
_LOCK: Final = "lock"


class ReadOnlyJournal:
    """Copy of rank 0's journal on the other ranks, which do not write; empty for a run without one."""

    def __init__(self, records: Mapping[str, Any] | None = None, folder: Path = Path()) -> None:
        self._records = records or {}
        self.folder = folder

    def get(self, key: str, *, earlier: bool = False) -> Any:
        """See `Journal.get`; all records are from an earlier run."""
        return self._records.get(key)

    def put(self, *_: Any) -> None:
        """Do nothing: only rank 0 writes the journal."""

    put_all = add = defer = flush = put


class Journal:
    """Measurements of the run that writes one output; a context manager that holds the output's lock.

    If a measurement cannot be written, it is kept in memory, a warning is logged once, and the run continues.

    Attributes:
        folder: directory of the journal and of other files of the run.
        records: all records, by key.
        replayed: number of records from an earlier run.
        damaged: number of lines dropped because of a checksum mismatch.
    """

    def __init__(self, output: Path, *, resume: bool = True, keep: bool = False) -> None:
        """Take the lock of the directory next to ``output``, and read the journal of an earlier run, or delete it.

        Raises:
            OutputExistsError: if another run is writing this output.
            OutputError: if the journal cannot be created.
        """
        self.folder = output.with_name(f"{output.name}.ckptavg")
        self.replayed = self.damaged = 0
        self._keep = keep
        self.records: dict[str, Any] = {}
        self._own: set[str] = set()  # keys written by this run
        self._header: Mapping[str, Any] | None = None
        self._writing, self._syncing = Lock(), Lock()
        self._timer: Timer | None = None  # set while records wait for it to be flushed to the disk
        self._pending: list[tuple[str, Callable[[], Any]]] = []
        self._flushed = time.monotonic()
        self._lost = self._dropped = False
        self._fd = self._lock = -1
        try:
            self._lock = take(self.folder / _LOCK, output)
            self._sweep()
            self._open(resume)
        except BaseException as error:
            self._close()
            if isinstance(error, OSError):
                raise OutputError(f"cannot be written: {os_message(error)}", path=self.folder) from error
            raise

    def begin(self, header: Mapping[str, Any]) -> None:
        """Write the run's header, or compare it with that of the existing journal, whose records are earlier ones.

        Raises:
            OutputExistsError: if the journal is of a different run; the message names the first difference.
        """
        normalized = json.loads(json.dumps({"schema": SCHEMA, **header}))
        self._own.clear()
        if not self._measured():  # no measurements to resume from, regardless of the run
            self._header = normalized
            self.records = {}
            self._append([normalized], first=True)
            self._sync()
        elif difference := _difference(self._header, normalized):
            raise self.another(difference)

    def another(self, difference: str) -> OutputExistsError:
        """Return the error for a journal left by a different run."""
        hint = "start over with --no-resume, or choose another -o"
        return OutputExistsError(f"was left by a different run: {difference}", path=self.folder, hint=hint)

    def get(self, key: str, *, earlier: bool = False) -> Any:
        """Return the record of ``key``, or None; with ``earlier``, only records of an earlier run."""
        return None if earlier and key in self._own else self.records.get(key)

    def put(self, key: str, value: Any) -> None:
        """Write a record and flush it to disk; thread-safe."""
        self.put_all({key: value})

    def put_all(self, values: Mapping[str, Any]) -> None:
        """Write several records with one flush."""
        with self._writing:
            self._record(values)
        self._sync()

    def add(self, values: Mapping[str, Any]) -> None:
        """Write records that are not lost if the process is killed, nor in a power cut more than a second later.

        Thread-safe. One flush to the disk, in a thread, serves all records of that second.
        """
        with self._writing:
            self._record(values)
            if self._timer is None and not self._lost:
                self._timer = Timer(_FLUSH_INTERVAL, self._sync)
                self._timer.daemon = True
                self._timer.start()

    def defer(self, key: str, value: Callable[[], Any]) -> None:
        """Write a record within about a second; ``value`` returns it later, or None for no record.

        A value that has to be read from a device waits for it: records are written in groups.
        """
        self._pending.append((key, value))
        if time.monotonic() - self._flushed > _FLUSH_INTERVAL:
            self.flush()

    def flush(self) -> None:
        """Write the deferred records, as `add` does."""
        pending, self._pending, self._flushed = self._pending, [], time.monotonic()
        values = {key: value() for key, value in pending}
        if known := {key: value for key, value in values.items() if value is not None}:
            self.add(known)

    @property
    def summary(self) -> str:
        """The number of its measurements, such as "1 score and 24 losses"; empty if there are none."""
        kinds = [key.partition(" ")[0] for key in self.records]
        scores, losses = (sum(map(kinds.count, names)) for names in (("score", "written"), ("loss", "gradient")))
        counts = ((scores, "score" if scores == 1 else "scores"), (losses, "loss" if losses == 1 else "losses"))
        return " and ".join(f"{number} {word}" for number, word in counts if number)

    def done(self) -> None:
        """Remove the journal after the output has been written, unless it is to be kept."""
        if not self._keep:
            self.drop()

    def drop(self) -> None:
        """Delete the journal; repeated calls do nothing, since another run may have started in the meantime."""
        if not self._dropped:
            self._dropped = True
            self._sweep()
            with suppress(OSError):  # the directory contains other files
                for path in (self.folder / _FILE, self.folder / _LOCK):
                    path.unlink(missing_ok=True)
                self.folder.rmdir()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            with suppress(RuntimeError):  # a device that failed also fails here; the original error is reported
                self.flush()
            if not self._measured():
                self.drop()
            if self._timer is not None and not self._dropped:
                self._sync()
        finally:
            self._close()

    def _open(self, resume: bool) -> None:
        path = self.folder / _FILE
        if not resume:
            path.unlink(missing_ok=True)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        content = path.read_bytes()
        complete = content.rfind(b"\n") + 1
        os.ftruncate(self._fd, complete)  # drop an incomplete last line
        for line in content[:complete].splitlines():
            self._read(line)
            if self._header is None:  # without a header the run of the other lines is unknown
                os.ftruncate(self._fd, 0)
                break
        self.replayed = self._measured()
        if self.damaged:
            message = "%s: %d lines are damaged; their measurements are repeated"
            logging.getLogger("ckptavg").warning(message, path, self.damaged)
        if not complete:  # a new file: its name must be durable too
            flush_folder(path)
            flush_folder(self.folder)

    def _sweep(self) -> None:
        for path in self.folder.glob(f"{SCRATCH}*"):
            shutil.rmtree(path, ignore_errors=True)

    def _measured(self) -> int:
        return sum(not key.startswith(SOURCE_PREFIX) for key in self.records)

    def _read(self, line: bytes) -> None:
        checksum, _, text = line.partition(b" ")
        if checksum != b"%08x" % zlib.crc32(text):
            self.damaged += 1
            return
        record: Any = json.loads(text)
        if self._header is None:
            if not isinstance(record, dict) or record.get("schema") != SCHEMA:
                raise InputError("is from another version of ckptavg", path=self.folder / _FILE, hint="--no-resume")
            self._header = record
        elif isinstance(record, dict) and isinstance(record.get("key"), str) and "value" in record:
            self.records[record["key"]] = record["value"]
        else:
            self.damaged += 1

    def _record(self, values: Mapping[str, Any]) -> None:
        self.records.update(values)
        self._own.update(values)
        self._append([{"key": key, "value": value} for key, value in values.items()])

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
        except OSError as error:
            self._lose(error)

    def _sync(self) -> None:
        """Flush the file to the disk."""
        with self._syncing:
            timer, self._timer = self._timer, None  # before the flush: a record written during it starts another
            if timer is not None:
                timer.cancel()
            try:
                if self._fd >= 0 and not self._lost:
                    getattr(os, "fdatasync", os.fsync)(self._fd)  # macOS has no fdatasync
            except OSError as error:
                self._lose(error)

    def _lose(self, error: OSError) -> None:
        self._lost = True  # lines after an incomplete one would be unreadable
        message = "cannot be written: %s; the run continues, but further measurements are lost if it ends early"
        logging.getLogger("ckptavg").warning("%s: " + message, self.folder, os_message(error))

    def _close(self) -> None:
        with self._syncing:
            if self._timer is not None:
                self._timer.cancel()
            if self._fd >= 0:
                os.close(self._fd)
            if self._lock >= 0:
                release(self._lock)
            self._fd = self._lock = -1


def _difference(was: Any, now: Any) -> str:
    """Describe the first difference between two values in one line; empty if they are equal."""
    if was == now:
        return ""
    if isinstance(was, dict) and isinstance(now, dict):
        key = next(key for key in sorted({*was, *now}) if was.get(key) != now.get(key))
        inner = _difference(was.get(key), now.get(key))
        return f"{key}{'' if inner.startswith(': ') else ' '}{inner}"
    return f": {json.dumps(was)[:80]}, not {json.dumps(now)[:80]}"
