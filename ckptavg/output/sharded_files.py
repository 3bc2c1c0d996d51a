"""Write a model as several safetensors files and an index, as `ckptavg.output.loader_files` divides it."""

import json
import os
import re
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Final, Self

from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.filesystem.atomic import flush_folder, stale_temporaries, temporary_file
from ckptavg.filesystem.digest import Algorithm, of_bytes
from ckptavg.output import loader_files
from ckptavg.output.data_digest import of_files
from ckptavg.output.destination import preflight
from ckptavg.output.loader_files import Division
from ckptavg.output.safetensors_file import SafetensorsFile
from ckptavg.readers import StoredTensor
from ckptavg.readers.sentence_transformers import MODULES
from ckptavg.runtime.workers import ALONE, Workers

_INDEX: Final = re.compile(r"\.(.+\.index(?:\..+)?\.json)\.\d+\.ckptavg-tmp", re.DOTALL)


class ShardedFiles:
    """Several `ckptavg.output.safetensors_file.SafetensorsFile` that form one output: shards, or a model's modules."""

    def __init__(
        self, folder: Path, specs: Mapping[str, StoredTensor], metadata: Mapping[str, str], division: Division,
        *, force: bool = False, workers: Workers = ALONE, digests: Algorithm | None = None,
    ) -> None:  # fmt: skip
        """Reserve the space of all files; other arguments and errors are those of `SafetensorsFile`.

        Args:
            folder: the output directory; it must exist, and the directories of the files too.
            division: the tensors of each file.
        """
        self._index = folder / division.index
        self._content = division.content
        self.path = folder if division.index == MODULES else self._index  # opened to read it
        self.data_digest = ""  # once published: of the list of the files and the digests of their data
        self.sha256 = ""  # once published: of the index of shards, or of the list of modules' files and their SHA-256
        self._digests: Algorithm | None = digests
        self.published: tuple[Path, os.stat_result] | None = None  # see `SafetensorsFile.published`; of the index
        workers.on_rank_zero(lambda: preflight(self._index, force))
        self._places: dict[str, tuple[str, str]] = {}  # name of a tensor → its file, and its name in it
        self._files: dict[str, SafetensorsFile] = {}
        with ExitStack() as stack:
            for file, names in division.files.items():
                self._places |= {name: (file, own) for name, own in names.items()}
                inside = {own: specs[name] for name, own in names.items()}
                shard = SafetensorsFile(
                    folder / file, inside, metadata, force=force, workers=workers, digests=digests
                )  # fmt: skip
                self._files[file] = stack.enter_context(shard)
            self._stack = stack.pop_all()
        self.size = sum(file.size for file in self._files.values()) + len(self._content)  # of all files in bytes

    def write(self, name: str, offset: int, data: memoryview | bytes) -> None:
        """See `SafetensorsFile.write`."""
        file, own = self._places[name]
        self._files[file].write(own, offset, data)

    def read_into(self, name: str, start: int, out: memoryview) -> None:
        """See `SafetensorsFile.read_into`."""
        file, own = self._places[name]
        self._files[file].read_into(own, start, out)

    def barrier(self) -> None:
        """See `SafetensorsFile.barrier`."""
        for file in self._files.values():
            file.barrier()

    def commit(self) -> None:
        """See `SafetensorsFile.commit`."""
        self.publish()

    def publish(self, metadata: Mapping[str, str] | None = None) -> None:
        """Rename all files, the index last: no loader finds a model without it; see `SafetensorsFile.publish`.

        The index is first written under a temporary name, in which `sweep` finds the shards that a killed run renamed.
        """
        with temporary_file(self._index, self._content) as publish, ExitStack() as undo:
            for file in self._files.values():
                file.publish(metadata)
                undo.callback(file.path.unlink, missing_ok=True)
            for file in {file.path.parent: file for file in self._files.values()}.values():
                flush_folder(file.path)
            self.published = self._index, publish()
            undo.pop_all()
        flush_folder(self._index)
        if self._digests:
            self.data_digest = of_files({name: f.data_digest for name, f in self._files.items()}, self._digests)
        if self._digests == "sha256":
            files = of_files({name: file.sha256 for name, file in self._files.items()}, "sha256")
            whole = of_bytes(self._content, "sha256") if self.path == self._index else files
            self.sha256 = whole.partition(":")[2]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def open_files(
    folder: Path, like: Checkpoint, specs: Mapping[str, StoredTensor], metadata: Mapping[str, str],
    largest: str | None = None, *, force: bool = False, workers: Workers = ALONE, digests: Algorithm | None = None,
) -> SafetensorsFile | ShardedFiles:  # fmt: skip
    """Open the files that the loader of ``folder`` expects; see `ckptavg.output.loader_files.division`."""
    if division := loader_files.division(like, specs, largest):
        return ShardedFiles(folder, specs, metadata, division, force=force, workers=workers, digests=digests)
    path = folder / loader_files.file_name(like)
    return SafetensorsFile(path, specs, metadata, force=force, workers=workers, digests=digests)


def sweep(folder: Path, name: str | None = None) -> None:
    """Remove leftovers of killed runs: temporary files, and shards whose index was not renamed.

    ``folder`` is the output directory or, with ``name``, the directory of an output file of that name.
    """
    for path in stale_temporaries(folder, name):
        index = _INDEX.fullmatch(path.name)
        if name is None and index and not (folder / index[1]).exists():
            with suppress(OSError, ValueError, AttributeError):  # may be incomplete if no shard was renamed yet
                for shard in set(json.loads(path.read_bytes())["weight_map"].values()):
                    (folder / Path(shard).name).unlink(missing_ok=True)
        with suppress(OSError):
            path.unlink()
