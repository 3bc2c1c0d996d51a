"""Write a model as several safetensors files and an index, in the layout of Hugging Face loaders."""

import hashlib
import json
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Final, Self

from ckptavg.errors import UsageError
from ckptavg.filesystem.atomic import flush_folder, stale_temporaries, temporary_file
from ckptavg.output.destination import preflight
from ckptavg.output.safetensors_file import SafetensorsFile
from ckptavg.readers import StoredTensor
from ckptavg.runtime.workers import ALONE, Workers

INDEX: Final = "model.safetensors.index.json"
_PATTERN: Final = "model{suffix}.safetensors"


class ShardedFiles:
    """Several `ckptavg.output.safetensors_file.SafetensorsFile` that form one output, split by huggingface_hub."""

    def __init__(
        self, folder: Path, specs: Mapping[str, StoredTensor], metadata: Mapping[str, str], largest: str,
        *, force: bool = False, workers: Workers = ALONE,
    ) -> None:  # fmt: skip
        """Reserve the space of all shards; other arguments and errors are those of `SafetensorsFile`.

        Args:
            folder: the output directory; it must exist.
            largest: maximum size of a shard, such as ``5GB``.
        Raises:
            UsageError: if ``largest`` is not a size, or huggingface_hub is missing.
        """
        self.path = folder / INDEX
        self.sha256 = ""  # of the index, once published
        workers.on_rank_zero(lambda: preflight(self.path, force))
        split = split_names(specs, largest)
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        self._index = json.dumps(index, indent=2, sort_keys=True).encode()
        self._file_of: Mapping[str, str] = split.tensor_to_filename
        self._files: dict[str, SafetensorsFile] = {}
        with ExitStack() as stack:
            for name, tensors in split.filename_to_tensors.items():
                inside = {tensor: specs[tensor] for tensor in tensors}
                shard = SafetensorsFile(folder / name, inside, metadata, force=force, workers=workers)
                self._files[name] = stack.enter_context(shard)
            self._stack = stack.pop_all()
        self.size = sum(file.size for file in self._files.values()) + len(self._index)  # of all files in bytes

    def write(self, name: str, offset: int, data: memoryview | bytes) -> None:
        """See `SafetensorsFile.write`."""
        self._files[self._file_of[name]].write(name, offset, data)

    def read_into(self, name: str, start: int, out: memoryview) -> None:
        """See `SafetensorsFile.read_into`."""
        self._files[self._file_of[name]].read_into(name, start, out)

    def barrier(self) -> None:
        """See `SafetensorsFile.barrier`."""
        for file in self._files.values():
            file.barrier()

    def publish(self, metadata: Mapping[str, str] | None = None) -> None:
        """Rename all files, the index last: no loader finds a model without it; see `SafetensorsFile.publish`.

        The index is first written under a temporary name, in which `sweep` finds the shards that a killed run renamed.
        """
        with temporary_file(self.path, self._index) as publish, ExitStack() as undo:
            for file in self._files.values():
                file.publish(metadata)
                undo.callback(file.path.unlink, missing_ok=True)
            flush_folder(self.path)
            publish()
            undo.pop_all()
        self.sha256 = hashlib.sha256(self._index).hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def sweep(folder: Path, name: str | None = None) -> None:
    """Remove leftovers of killed runs: temporary files, and shards whose index was not renamed.

    ``folder`` is the output directory or, with ``name``, the directory of an output file of that name.
    """
    for path in stale_temporaries(folder, name):
        if name is None and path.name.startswith(f".{INDEX}.") and not (folder / INDEX).exists():
            with suppress(OSError, ValueError, AttributeError):  # may be incomplete if no shard was renamed yet
                for shard in set(json.loads(path.read_bytes())["weight_map"].values()):
                    (folder / Path(shard).name).unlink(missing_ok=True)
        with suppress(OSError):
            path.unlink()


def split_names(specs: Mapping[str, StoredTensor], largest: str) -> Any:
    """Return huggingface_hub's StateDictSplit; for errors see `ShardedFiles`."""
    try:
        from huggingface_hub import split_state_dict_into_shards_factory  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UsageError("--max-shard-size needs huggingface_hub", hint="pip install 'ckptavg[hf]'") from error
    try:
        return split_state_dict_into_shards_factory(
            dict(specs), get_storage_size=lambda spec: spec.nbytes, filename_pattern=_PATTERN, max_shard_size=largest
        )
    except ValueError as error:
        raise UsageError(f"--max-shard-size {largest} is not a size such as 5GB or 500MB") from error
