"""Write the output as a torch.distributed.checkpoint (DCP) directory, from which FSDP can resume training."""

import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from ckptavg.errors import OutputError, OutputExistsError
from ckptavg.filesystem.atomic import flush_folder, os_message, stale_temporaries
from ckptavg.filesystem.digest import Algorithm
from ckptavg.output.data_digest import KEY
from ckptavg.output.destination import check_parent
from ckptavg.output.safetensors_file import SafetensorsFile
from ckptavg.readers import StoredTensor
from ckptavg.readers.dcp import RECORD
from ckptavg.runtime.workers import ALONE, Workers


class DcpFolder:
    """A directory under construction; a context manager that leaves nothing behind unless `publish` was called.

    The average is first written to one temporary `SafetensorsFile`, so the disk temporarily holds it twice. Then every
    rank saves its share of the tensors, and the directory is renamed to its final name.
    """

    def __init__(
        self, path: Path, specs: Mapping[str, StoredTensor], metadata: Mapping[str, str], *, key: str = "",
        force: bool = False, workers: Workers = ALONE, digests: Algorithm | None = None,
    ) -> None:  # fmt: skip
        """Reserve the space of the directory ``path``, which must be empty or not exist.

        ``key`` is that of the model in the saved state dict, such as ``model``; ``""`` for the top level. Other
        arguments and errors are those of `SafetensorsFile`.
        """
        self.path = path
        self.data_digest = ""  # once saved: that of the safetensors file with the same content
        self.sha256 = ""  # once saved: likewise
        self.size = 0  # of all files in bytes, once published
        self.published: tuple[Path, os.stat_result] | None = None  # see `SafetensorsFile.published`
        self._specs = specs
        self._key = key
        self._force = force
        self._workers = workers
        self._temporary = workers.broadcast(path.with_name(f".{path.name}.{os.getpid()}.ckptavg-tmp"))
        workers.on_rank_zero(lambda: preflight(path, force))
        whole = path.with_name(f"{path.name}.whole")  # nominal: the file only ever has a temporary name
        self._whole = SafetensorsFile(whole, specs, metadata, force=True, workers=workers, digests=digests)
        self.write = self._whole.write
        self.read_into = self._whole.read_into
        self.barrier = self._whole.barrier

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._whole.close()
        if self._workers.is_rank_zero:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def save(self, metadata: Mapping[str, str]) -> None:
        """Save all tensors in DCP format, still under the temporary name; called by all ranks."""
        import torch
        from torch.distributed.checkpoint.api import CheckpointException
        from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
        from torch.distributed.checkpoint.filesystem import FileSystemWriter
        from torch.distributed.checkpoint.state_dict_saver import save

        from ckptavg.checkpoints.torch_dtypes import TORCH

        self._whole.finalize(metadata)
        self.data_digest, self.sha256 = self._whole.data_digest, self._whole.sha256
        prefix = f"{self._key}." if self._key else ""
        read_into = self._whole.read_into

        class Planner(DefaultSavePlanner):
            """Planner that reads tensors from the file, because those of the state dict are on the meta device."""

            def transform_object(self, write_item: Any, object: Any) -> Any:
                tensor = torch.empty_like(object, device="cpu")
                name: str = write_item.index.fqn
                read_into(name.removeprefix(prefix), 0, tensor.view(-1).view(torch.uint8).numpy().data)
                return tensor

        saved = {name: spec.in_file for name, spec in self._specs.items()}
        state: dict[str, Any] = {
            name: torch.empty(shape, dtype=TORCH[dtype], device="meta") for name, (dtype, shape) in saved.items()
        }
        for part in reversed(self._key.split(".") if self._key else []):
            state = {part: state}
        writer, alone = FileSystemWriter(self._temporary), self._workers.world_size == 1
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
                save(state, storage_writer=writer, planner=Planner(), no_dist=alone)
        except CheckpointException as error:
            rank, (cause, _) = next(iter(error.failures.items()))
            raise OutputError(f"rank {rank} cannot write it: {cause}", path=self.path) from error

    def publish(self, metadata: Mapping[str, str]) -> None:
        """Flush the saved files to disk, with ``metadata`` in a JSON file, and rename the directory.

        Called by rank 0 only; for errors see `SafetensorsFile.publish`.
        """
        old = self._temporary.with_suffix(".ckptavg-old")
        try:
            with (self._temporary / RECORD).open("w", encoding="utf-8") as file:
                own = {KEY: self.data_digest} if self.data_digest else {}
                json.dump({**metadata, **own}, file, sort_keys=True)
                file.flush()
                os.fsync(file.fileno())
            flush_folder(self._temporary / RECORD)
            preflight(self.path, self._force)
            if _is_filled(self.path):
                self.path.rename(old)
            self.published = self.path, self._temporary.stat()
            self._temporary.rename(self.path)
            flush_folder(self.path)
            shutil.rmtree(old, ignore_errors=True)
            self.size = sum(file.stat().st_size for file in self.path.iterdir())
        except OSError as error:
            if old.is_dir() and not self.path.is_dir():
                old.rename(self.path)
            raise OutputError(f"cannot be written: {os_message(error)}", path=self.path) from error


def sweep(path: Path) -> None:
    """Remove leftovers of killed runs; if one was killed between two renames, restore the old directory.

    The caller must hold the lock of the output.
    """
    pattern = re.compile(rf"\.{re.escape(path.name)}\.\d+\.ckptavg-(tmp|old)", re.DOTALL)
    with suppress(OSError):
        for temporary in stale_temporaries(path.parent, f"{path.name}.whole"):
            temporary.unlink()
        for leftover in [entry for entry in path.parent.iterdir() if pattern.fullmatch(entry.name) and entry.is_dir()]:
            if leftover.suffix == ".ckptavg-old" and not _is_filled(path):
                leftover.rename(path)
            else:
                shutil.rmtree(leftover, ignore_errors=True)


def preflight(path: Path, force: bool) -> None:
    """Check that the destination can be written, before hours of work.

    Raises:
        OutputExistsError: if it is not empty and ``force`` is not given, or was not written by ckptavg.
        OutputError: if its parent does not exist or is not writable, or it is not a directory.
    """
    if path.is_symlink() or not path.name:
        raise OutputError("--format dcp needs a directory name, not a link or .", path=path)
    if os.path.lexists(path) and not path.is_dir():
        raise OutputError("is not a directory, but --format dcp writes one", path=path)
    if _is_filled(path):
        if not (path / RECORD).is_file():
            message = "is not empty, and --force replaces only earlier outputs of ckptavg"
            raise OutputExistsError(message, path=path, hint="choose another -o")
        if not force:
            raise OutputExistsError("is not empty", path=path, hint="replace it with --force, or choose another -o")
    check_parent(path)


def _is_filled(path: Path) -> bool:
    return path.is_dir() and any(path.iterdir())
