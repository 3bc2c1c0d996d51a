"""A model over several safetensors files and their index, as Hugging Face's loaders expect it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, Self

from ckptavg.errors import UsageError
from ckptavg.readers import StoredTensor
from ckptavg.workers import ALONE, Workers
from ckptavg.write import SafetensorsFile, preflight, write_text

INDEX: Final = "model.safetensors.index.json"


class ShardedFiles:
    """Several `ckptavg.write.SafetensorsFile` that are one output; the index gets its name last.

    Which tensor goes where is decided by huggingface_hub's own splitter.

    Attributes:
        path: the index.
        size: of all files, in bytes.
        sha256: of the index, once committed.
    """

    def __init__(
        self, folder: Path, specs: Mapping[str, StoredTensor], metadata: Mapping[str, str], largest: str,
        *, force: bool = False, workers: Workers = ALONE,
    ) -> None:  # fmt: skip
        """Reserve the space of all shards.

        Args:
            folder: where they go; it must exist.
            specs: name → dtype and shape.
            metadata: of every shard.
            largest: bytes of a shard, such as ``5GB``.
            force: replace existing files.
            workers: who write them together; see `SafetensorsFile`.
        Raises:
            UsageError: if ``largest`` is no size, or huggingface_hub is missing.
            OutputExistsError, OutputError: as `SafetensorsFile` does.
        """
        self.path = folder / INDEX
        self.sha256 = ""
        self._workers = workers
        workers.lead(lambda: preflight(self.path, force))
        split = split_names(specs, largest)
        self._index = json.dumps(
            {"metadata": split.metadata, "weight_map": split.tensor_to_filename}, indent=2, sort_keys=True
        )
        self._of: Mapping[str, str] = split.tensor_to_filename
        with ExitStack() as stack:
            self._files = {
                name: stack.enter_context(
                    SafetensorsFile(
                        folder / name,
                        {tensor: specs[tensor] for tensor in tensors},
                        metadata,
                        force=force,
                        workers=workers,
                    )
                )
                for name, tensors in split.filename_to_tensors.items()
            }
            self._stack = stack.pop_all()
        self.size = sum(file.size for file in self._files.values()) + len(self._index)

    def write(self, name: str, offset: int, data: memoryview | bytes) -> None:
        """See `SafetensorsFile.write`."""
        self._files[self._of[name]].write(name, offset, data)

    def read_into(self, name: str, start: int, out: memoryview) -> None:
        """See `SafetensorsFile.read_into`."""
        self._files[self._of[name]].read_into(name, start, out)

    def settle(self) -> None:
        """See `SafetensorsFile.settle`."""
        for file in self._files.values():
            file.settle()

    def commit(self) -> None:
        """Give all files their names, the index last: a model without it is found by no loader."""
        for file in self._files.values():
            file.commit()
        self._workers.lead(lambda: write_text(self.path, self._index))
        self.sha256 = hashlib.sha256(self._index.encode()).hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def split_names(specs: Mapping[str, StoredTensor], largest: str) -> Any:
    """huggingface_hub's StateDictSplit of the tensors.

    Raises:
        UsageError: if ``largest`` is no size, or huggingface_hub is missing.
    """
    try:
        from huggingface_hub import split_state_dict_into_shards_factory
    except ImportError as error:
        raise UsageError("--max-shard-size needs huggingface_hub", hint="pip install 'ckptavg[hf]'") from error
    try:
        return split_state_dict_into_shards_factory(
            dict(specs),
            get_storage_size=lambda spec: spec.nbytes,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=largest,
        )
    except ValueError as error:
        raise UsageError(f"--max-shard-size {largest} is no size such as 5GB or 500MB") from error
