"""Verify that the candidates of a resumed run are byte-identical to those of the interrupted run.

During the search, a thread computes the digests of the candidates' files and records them in the journal. A file with
unchanged inode, size and times is taken to have the same content; any other is hashed and compared before the journal
is used. Files hashed here are not hashed again when the average is written.
"""

from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event

from ckptavg.checkpoints import checksums
from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.filesystem.digest import NAMES, Algorithm, Hash, algorithm_of, digest
from ckptavg.filesystem.regular_file import RegularFile
from ckptavg.journal import SOURCE_PREFIX, Journal


@contextmanager
def recording_digests(journal: Journal, checkpoints: Sequence[Checkpoint], algorithm: Algorithm) -> Generator[None]:
    """Compare the candidates' files with the journal's digests, and record missing ones while the body runs.

    Raises:
        OutputExistsError: if the content of a file differs, or cannot be compared.
    """
    numbered = ((i, *pair) for i, checkpoint in enumerate(checkpoints) for pair in enumerate(checkpoint.reader.files))
    files = {f"{SOURCE_PREFIX}{i} {k}": file for i, k, file in numbered}
    own: dict[RegularFile, Algorithm] = {file: checksums.algorithm(file, algorithm) for file in files.values()}
    unhashed = {key: file for key, file in files.items() if not _verify(journal, key, file, own[file])}
    new = {key: file for key, file in unhashed.items() if journal.get(key) is None}
    journal.put_all({key: {"file": file.identity, "digest": None} for key, file in new.items()})
    stop = Event()
    with ThreadPoolExecutor(1) as pool:
        try:
            for key, file in unhashed.items():
                pool.submit(_record_digest, journal, key, file, own[file], stop)
            yield
        finally:
            stop.set()


def _verify(journal: Journal, key: str, file: RegularFile, algorithm: Algorithm) -> bool:
    """Return True if the journal has the file's digest by ``algorithm``; one that it has is compared if the file's
    identity has changed.
    """
    record = journal.get(key)
    recorded: str | None = record and record["digest"]
    other = algorithm_of(recorded)
    if record and record["file"] != list(file.identity):
        if other is None:
            raise journal.another(f"{file.path.name}: the file was replaced or copied before its digest was recorded")
        actual = digest(file, other) if other == algorithm else Hash(file, other).digest()
        if recorded != actual:
            shown = f"{NAMES[other]} {str(recorded)[7:23]}…, not {actual[7:23]}…"
            raise journal.another(f"{file.path.name}: {shown}")
        journal.put(key, {"file": file.identity, "digest": recorded})
    if recorded is None or other != algorithm:
        return False
    file.digests[algorithm] = recorded
    return True


def _record_digest(journal: Journal, key: str, file: RegularFile, algorithm: Algorithm, stop: Event) -> None:
    if recorded := digest(file, algorithm, stop):
        journal.add({key: {"file": file.identity, "digest": recorded}})
