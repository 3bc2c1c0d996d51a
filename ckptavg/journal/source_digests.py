"""Verify that the candidates of a resumed run are byte-identical to those of the interrupted run.

During the search, a thread computes the SHA-256 of the candidates' files and records it in the journal. A file with
unchanged inode, size and times is taken to have the same content; any other is hashed and compared before the journal
is used. Files hashed here are not hashed again when the average is written.
"""

from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event

from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.filesystem import sha256 as digests
from ckptavg.filesystem.regular_file import RegularFile
from ckptavg.journal import SOURCE_PREFIX, Journal


@contextmanager
def recording_digests(journal: Journal, checkpoints: Sequence[Checkpoint]) -> Generator[None]:
    """Compare the candidates' files with the journal's digests, and record missing ones while the body runs.

    Raises:
        OutputExistsError: if the content of a file differs, or cannot be compared.
    """
    numbered = ((i, *pair) for i, checkpoint in enumerate(checkpoints) for pair in enumerate(checkpoint.reader.files))
    files = {f"{SOURCE_PREFIX}{i} {k}": file for i, k, file in numbered}
    unhashed = {key: file for key, file in files.items() if not _verify(journal, key, file)}
    journal.put_all({key: {"file": file.identity, "sha256": None} for key, file in unhashed.items()})
    stop = Event()
    with ThreadPoolExecutor(1) as pool:
        try:
            for key, file in unhashed.items():
                pool.submit(_record_digest, journal, key, file, stop)
            yield
        finally:
            stop.set()


def _verify(journal: Journal, key: str, file: RegularFile) -> bool:
    """Return True if the journal has the file's SHA-256; it is compared if the file's identity has changed."""
    record = journal.get(key)
    sha256: str | None = record and record["sha256"]
    if record and record["file"] != list(file.identity):
        if sha256 is None:
            raise journal.another(f"{file.path.name}: the file was replaced or copied before its SHA-256 was recorded")
        if sha256 != digests.sha256(file):
            raise journal.another(f"{file.path.name}: SHA-256 {sha256[:16]}…, not {(file.sha256 or '')[:16]}…")
        journal.put(key, {"file": file.identity, "sha256": sha256})
    file.sha256 = sha256
    return sha256 is not None


def _record_digest(journal: Journal, key: str, file: RegularFile, stop: Event) -> None:
    if sha256 := digests.sha256(file, stop):
        journal.add({key: {"file": file.identity, "sha256": sha256}})
