"""Write the output as a torch.distributed.checkpoint (DCP) directory, from which FSDP can resume training."""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import torch

from ckptavg.checkpoints.dtypes import TORCH
from ckptavg.errors import OutputError, OutputExistsError
from ckptavg.filesystem.atomic import stale_temporaries
from ckptavg.output.destination import check_parent
from ckptavg.output.safetensors_file import SafetensorsFile
from ckptavg.readers import StoredTensor
from ckptavg.readers.dcp import RECORD
from ckptavg.runtime.workers import ALONE, Workers


class DcpFolder:
    """A directory under construction; a context manager that leaves nothing behind unless `publish` was called.

    The average is first written to one temporary `SafetensorsFile`, so the disk temporarily holds it twice. Then every
    rank saves its share of the tensors, and the directory is renamed to its final name.

    Attributes:
        path: the directory.
        size: total size of its files in bytes, once published.
        sha256: SHA-256 of the safetensors file with the same content, once saved.
    """

    def __init__(
        self, path: Path, specs: Mapping[str, StoredTensor], metadata: Mapping[str, str], *, key: str = "",
        force: bool = False, workers: Workers = ALONE,
    ) -> None:  # fmt: skip
        """Reserve the space.

        Args:
            path: the directory; it must be empty or not exist.
            specs: name → dtype and shape.
            metadata: written to a separate JSON file in the directory.
            key: key of the model in the saved state dict, such as ``model``; ``""`` for the top level.
            force: replace an existing directory.
            workers: the ranks that write it together.
        Raises:
            OutputExistsError: if the directory is not empty and ``force`` is not given.
            OutputError: if it cannot be written, or there is not enough space.
        """
        self.path = path
        self.sha256 = ""
        self.size = 0
        self._specs = specs
        self._metadata = metadata
        self._key = key
        self._force = force
        self._workers = workers
        self._temporary = workers.broadcast(path.with_name(f".{path.name}.{os.getpid()}.ckptavg-tmp"))
        workers.on_rank_zero(lambda: preflight(path, force))
        self._whole = SafetensorsFile(_whole(path), specs, metadata, force=True, workers=workers)

    def write(self, name: str, offset: int, data: memoryview | bytes) -> None:
        """See `SafetensorsFile.write`."""
        self._whole.write(name, offset, data)

    def read_into(self, name: str, start: int, out: memoryview) -> None:
        """See `SafetensorsFile.read_into`."""
        self._whole.read_into(name, start, out)

    def barrier(self) -> None:
        """See `SafetensorsFile.barrier`."""
        self._whole.barrier()

    def save(self) -> None:
        """Save all tensors in DCP format, still under the temporary name; called by all ranks.

        Raises:
            OutputError: if writing fails.
        """
        self.sha256 = self._whole.finalize()
        self._save()

    def close(self) -> None:
        """Remove temporary files that still exist."""
        self._whole.close()
        if self._workers.is_rank_zero:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _save(self) -> None:
        from torch.distributed.checkpoint.api import CheckpointException
        from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
        from torch.distributed.checkpoint.filesystem import FileSystemWriter
        from torch.distributed.checkpoint.state_dict_saver import save

        read_tensor = self._tensor

        class Planner(DefaultSavePlanner):
            """Planner that reads tensors from the file, because those of the state dict are on the meta device."""

            def transform_object(self, write_item: Any, object: Any) -> Any:
                name: str = write_item.index.fqn
                return read_tensor(name.removeprefix(prefix))

        state: dict[str, Any] = {
            name: torch.empty(spec.shape, dtype=TORCH[spec.dtype], device="meta") for name, spec in self._specs.items()
        }
        prefix = f"{self._key}." if self._key else ""
        for part in reversed(self._key.split(".") if self._key else []):
            state = {part: state}
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
                save(
                    state,
                    storage_writer=FileSystemWriter(self._temporary),
                    planner=Planner(),
                    no_dist=self._workers.world_size == 1,
                )
        except CheckpointException as error:
            rank, (cause, _) = next(iter(error.failures.items()))
            raise OutputError(f"rank {rank} cannot write it: {cause}", path=self.path) from error

    def _tensor(self, name: str) -> torch.Tensor:
        spec = self._specs[name]
        if not spec.numel:
            return torch.empty(spec.shape, dtype=TORCH[spec.dtype])
        data = bytearray(spec.nbytes)
        self._whole.read_into(name, 0, memoryview(data))
        return torch.frombuffer(data, dtype=TORCH[spec.dtype]).view(spec.shape)

    def publish(self) -> None:
        """Flush the saved files to disk and rename the directory; called by rank 0 only.

        Raises:
            OutputExistsError: if the destination was created in the meantime and ``force`` was not given.
            OutputError: if writing fails.
        """
        old = self._temporary.with_suffix(".ckptavg-old")
        try:
            with (self._temporary / RECORD).open("w", encoding="utf-8") as file:
                json.dump(dict(sorted(self._metadata.items())), file)
                file.flush()
                os.fsync(file.fileno())
            _flush(self._temporary)
            preflight(self.path, self._force)
            if _is_filled(self.path):
                self.path.rename(old)
            self._temporary.rename(self.path)
            _flush(self.path.parent)
            shutil.rmtree(old, ignore_errors=True)
            self.size = sum(file.stat().st_size for file in self.path.iterdir())
        except OSError as error:
            if old.is_dir() and not self.path.is_dir():
                old.rename(self.path)
            raise OutputError(f"cannot be written: {os.strerror(error.errno or 0).lower()}", path=self.path) from error


def sweep(path: Path) -> None:
    """Remove leftovers of killed runs; if one was killed between two renames, restore the old directory.

    The caller must hold the lock of the output.
    """
    pattern = re.compile(rf"\.{re.escape(path.name)}\.\d+\.ckptavg-(tmp|old)", re.DOTALL)
    with suppress(OSError):
        for temporary in stale_temporaries(path.parent, _whole(path).name):
            temporary.unlink()
        leftovers = [entry for entry in path.parent.iterdir() if pattern.fullmatch(entry.name) and entry.is_dir()]
        for leftover in leftovers:
            if leftover.suffix == ".ckptavg-old" and not _is_filled(path):
                leftover.rename(path)
            else:
                shutil.rmtree(leftover, ignore_errors=True)


def _whole(path: Path) -> Path:
    """Return the nominal path of the intermediate safetensors file, which only ever has a temporary name."""
    return path.with_name(f"{path.name}.whole")


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


def _flush(folder: Path) -> None:
    """Fsync a directory, so that its entries survive a power cut."""
    entry = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(entry)
    finally:
        os.close(entry)
