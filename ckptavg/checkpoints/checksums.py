"""Recorded SHA-256 sums: ``SHA256SUMS`` beside the checkpoints, and blob names of a Hugging Face cache.

safetensors has no checksum, so a changed weight is undetectable without such a sum.
"""

import os
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Final

from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.errors import InputError
from ckptavg.filesystem.digest import Algorithm, digest
from ckptavg.filesystem.regular_file import RegularFile

NAME: Final = "SHA256SUMS"
MAX_SIZE: Final = 64 << 20
_GNU: Final = re.compile(r"(\\?)(?P<sum>[0-9a-fA-F]{64}) [ *](?P<name>.+)", re.DOTALL)  # the format of sha256sum …
_BSD: Final = re.compile(r"(\\?)SHA256 \((?P<name>.+)\) = (?P<sum>[0-9a-fA-F]{64})", re.DOTALL)  # … and with --tag
_BLOB: Final = re.compile("[0-9a-f]{64}")
_ESCAPES: Final = {"\\n": "\n", "\\r": "\r", "\\\\": "\\"}


class Manifest:
    """``SHA256SUMS`` files beside checkpoints; each is read once.

    Attributes:
        unlisted: files that are missing from the ``SHA256SUMS`` beside or above them.
    """

    def __init__(self) -> None:
        self.unlisted: list[Path] = []
        self._sums = cache(_read)

    def check(self, checkpoint: Checkpoint) -> None:
        """Compare each file of ``checkpoint`` with its sum in the nearest list: that of its directory, of a parent
        directory within the checkpoint, or of the directory beside the checkpoint.

        Raises:
            InputError: if a sum differs, or a list is not in the format of sha256sum.
        """
        for file in checkpoint.reader.files:
            folders, top = list(file.path.parents), checkpoint.path.parent
            folders = folders[: folders.index(top) + 1] if top in folders else folders[:1]
            lists = {os.path.relpath(file.path, folder): self._sums(folder) for folder in folders}
            expected = next((sums[name] for name, sums in lists.items() if sums and name in sums), None)
            if expected is None:
                self.unlisted += [file.path] if any(sums is not None for sums in lists.values()) else []
            elif (actual := digest(file, "sha256").partition(":")[2]) != expected:
                what = f"its SHA-256 is {actual[:16]}…, but by {NAME} {expected[:16]}…: damaged, or changed since"
                raise InputError(what, path=file.path, hint=checkpoint.hint)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warning about files that are in no list; empty if there are none."""
        if not self.unlisted:
            return ()
        more = f" and {len(self.unlisted) - 1} more" if len(self.unlisted) > 1 else ""
        return (f"{self.unlisted[0]}{more}: not in {NAME}, so not compared with it",)


def algorithm(file: RegularFile, requested: Algorithm) -> Algorithm:
    """Return the algorithm of the digest to record of ``file``: SHA-256 where it is known, or a blob's name, which
    `agreed` compares it with; else ``requested``.
    """
    return "sha256" if "sha256" in file.digests or _blob(file) else requested


def agreed(file: RegularFile, found: str) -> str:
    """Return ``found``, the digest of ``file``; raise InputError for a Hugging Face cache's blob of another name."""
    kind, _, actual = found.partition(":")
    name = _blob(file) if kind == "sha256" else ""
    if name and name != actual:
        what = f"its SHA-256 is {actual[:16]}…, but in the cache it is called {name[:16]}…: damaged"
        raise InputError(what, path=file.path, hint="delete it and download it again")
    return found


def _blob(file: RegularFile) -> str:
    """Return the SHA-256 that a Hugging Face cache calls ``file`` by; empty for other files."""
    blob = file.path.resolve()
    return blob.name if blob.parent.name == "blobs" and _BLOB.fullmatch(blob.name) else ""


def _read(folder: Path) -> Mapping[str, str] | None:
    """Parse a directory's ``SHA256SUMS``, if it has one: name relative to the directory → SHA-256."""
    path, sums = folder / NAME, dict[str, str]()
    if not os.path.lexists(path):
        return None
    with RegularFile(path) as file:
        if file.size > MAX_SIZE:
            raise InputError(f"{file.size} bytes, more than {MAX_SIZE}", path=path)
        lines = os.fsdecode(file.read(0, file.size)).split("\n")
    for number, line in enumerate(lines, 1):
        line = line.removesuffix("\r")
        if not line.strip() or line.startswith("#"):
            continue
        match = _GNU.fullmatch(line) or _BSD.fullmatch(line)
        if not match:
            raise InputError(f"line {number} is not as sha256sum writes it", path=path)
        name, digest = match["name"], match["sum"].lower()
        if match[1]:
            name = re.sub(r"\\[nr\\]", lambda found: _ESCAPES[found[0]], name)
        if sums.setdefault(os.path.normpath(name), digest) != digest:
            raise InputError(f"line {number} gives {name[:255]} another sum than one above", path=path)
    return sums
