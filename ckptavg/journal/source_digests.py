"""That a resumed run has the bytes that the interrupted one had, to the last of every candidate.

While a search runs, a thread finds the SHA-256 of the candidates' files and puts it into the journal. A file that is
still the same by inode, size and times is taken to have the same bytes; any other is read and compared before anything
in the journal is used. What was hashed is not hashed again when the average is written.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event

from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.filesystem import sha256 as digests
from ckptavg.filesystem.regular_file import RegularFile
from ckptavg.journal import SOURCE_PREFIX, Journal


@contextmanager
def recording_digests(journal: Journal, checkpoints: Sequence[Checkpoint]) -> Generator[None]:
    """Compare the candidates' files with what the journal knows of them, and tell it the rest meanwhile.

    Raises:
        OutputExistsError: if one has other bytes, or it cannot be told whether it has.
    """
    files = dict(_files(checkpoints))
    unknown = {key: file for key, file in files.items() if not _known(journal, key, file)}
    journal.put_all({key: {"file": file.identity, "sha256": None} for key, file in unknown.items()})
    stop = Event()
    with ThreadPoolExecutor(1) as pool:
        try:
            for key, file in unknown.items():
                pool.submit(_find, journal, key, file, stop)
            yield
        finally:
            stop.set()


def _files(checkpoints: Sequence[Checkpoint]) -> Iterator[tuple[str, RegularFile]]:
    for i, checkpoint in enumerate(checkpoints):
        for k, file in enumerate(checkpoint.reader.files):
            yield f"{SOURCE_PREFIX}{i} {k}", file


def _known(journal: Journal, key: str, file: RegularFile) -> bool:
    """Whether its SHA-256 is in the journal; it is compared where the file is not the same as it was."""
    found = journal.get(key)
    sha256: str | None = found and found["sha256"]
    if found and found["file"] != list(file.identity):
        if sha256 is None:
            raise journal.another(f"{file.path.name}: it was replaced or copied before its contents were known")
        if sha256 != digests.sha256(file):
            raise journal.another(f"{file.path.name}: SHA-256 {sha256[:16]}…, not {(file.sha256 or '')[:16]}…")
        journal.put(key, {"file": file.identity, "sha256": sha256})
    file.sha256 = sha256
    return sha256 is not None


def _find(journal: Journal, key: str, file: RegularFile, stop: Event) -> None:
    if sha256 := digests.sha256(file, stop):
        journal.put(key, {"file": file.identity, "sha256": sha256})
