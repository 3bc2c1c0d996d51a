"""Copy the companion files of a Hugging Face model: config, tokenizer, processor."""

import json
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

from ckptavg.checkpoints.checkpoint import Checkpoint, chunks
from ckptavg.errors import InputError, OutputError, OutputExistsError
from ckptavg.filesystem.atomic import flush_folder, write_bytes
from ckptavg.filesystem.regular_file import is_file, is_folder
from ckptavg.filesystem.strict_json import read_json
from ckptavg.readers import StoredTensor, entries

PATTERNS: Final = (
    "config.json", "generation_config.json", "*_config.json", "preprocessor_config.json", "tokenizer*", "vocab*",
    "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model", "*.jinja", "modules.json",
)  # fmt: skip
_CONFIGS: Final = ("config.json", "adapter_config.json")
_HEADS: Final = ("lm_head", "embed_out", "output_layer", "cls.predictions.decoder")
_EMBEDDINGS: Final = ("embed_tokens", "wte", "word_embeddings", "shared", "embed_in")


def check(folder: Path) -> None:
    """Raise OutputError if a directory holds a sharded model, whose index some loaders would prefer to the new file."""
    for index in sorted(folder.glob("*.index.json")):
        message = "belongs to a sharded model that loaders would mix with the new file"
        raise OutputError(message, path=index, hint="choose an empty directory")


@contextmanager
def created_folder(folder: Path | None) -> Generator[None]:
    """Create ``folder`` if it does not exist, and remove it again if the body fails."""
    if folder is None or is_folder(folder):
        yield
        return
    try:
        folder.mkdir()
    except OSError as error:
        raise OutputError(f"cannot be created: {error.strerror}", path=folder) from error
    try:
        flush_folder(folder)
        yield
    except BaseException:
        with suppress(OSError):  # it may contain files of other programs
            folder.rmdir()
        raise


def file_name(checkpoint: Checkpoint) -> str:
    """Return the file name of the weights that the loader of an output directory expects."""
    name = checkpoint.reader.path.name
    return "adapter_model.safetensors" if name.startswith("adapter_model.") else "model.safetensors"


def check_tied(
    checkpoint: Checkpoint, specs: Mapping[str, StoredTensor], read_into: Callable[[str, int, memoryview], None]
) -> None:
    """Raise OutputError if a file's output layer and embedding differ, but the config.json of ``checkpoint`` ties them.

    transformers would silently untie the model.
    """
    config = _read_json(checkpoint.folder / "config.json")
    parts: tuple[Any, ...] = (config, config.get("text_config"))
    if not any(isinstance(part, dict) and part.get("tie_word_embeddings") for part in parts):
        return
    heads = [name for name in specs if name.rpartition(".")[0].endswith(_HEADS) and name.endswith(".weight")]
    tables = [name for name in specs if name.removesuffix(".weight").endswith(_EMBEDDINGS)]
    for head, table in ((head, table) for head in heads for table in tables if specs[head].shape == specs[table].shape):
        pairs = zip(*(chunks(specs[head], name, read_into) for name in (head, table)), strict=True)
        if any(ours != others for ours, others in pairs):
            raise OutputError(f"{head} and {table} differ, but config.json ties them", path=checkpoint.path)


@contextmanager
def copies(
    checkpoint: Checkpoint, folder: Path | None, dtype: str, adapter: Mapping[str, Any] | None = None, *,
    force: bool = False,
) -> Generator[list[str]]:  # fmt: skip
    """Copy the companion files of ``checkpoint`` into ``folder``, each atomically; existing files are kept.

    But a config.json or adapter_config.json of other content would give the weights another meaning.

    Args:
        folder: the destination; nothing is copied if it is None.
        dtype: dtype of the output's floating-point tensors, put into config.json because transformers loads the model
            in it; comma-separated if there are several, which changes nothing.
        adapter: content of adapter_config.json, if it differs from the candidates'.
        force: replace such a config.
    Yields:
        The names copied; these files are removed if the body fails.
    Raises:
        OutputError: if a file cannot be written.
        OutputExistsError: if there is such a config.
    """
    if folder is None:
        yield []
        return
    source, copied = checkpoint.folder, list[str]()
    with ExitStack() as undo:
        for path in sorted(source / name for name in entries(source)):
            wanted = is_file(path) and any(fnmatchcase(path.name, pattern) for pattern in PATTERNS)
            exists = (target := folder / path.name).exists()
            if not wanted or (exists and path.name not in _CONFIGS):
                continue
            try:
                data = path.read_bytes()
            except OSError as error:
                raise OutputError(f"cannot copy {path.name} here: {error.strerror}", path=folder) from error
            if path.name == "config.json" and "," not in dtype:
                config = _read_json(path)
                if outdated := [key for key in ("dtype", "torch_dtype") if config.get(key, dtype) != dtype]:
                    data = (json.dumps(config | dict.fromkeys(outdated, dtype), indent=2) + "\n").encode()
            if path.name == "adapter_config.json" and adapter is not None:
                data = (json.dumps(adapter, indent=2, sort_keys=True) + "\n").encode()
            if not exists:
                undo.callback(target.unlink, missing_ok=True)
            elif _is_same(data, target):
                continue
            elif not force:
                message = "is of another model than the average, or of one of other settings"
                raise OutputExistsError(message, path=target, hint="--force replaces it; or choose another directory")
            else:
                undo.callback(write_bytes, target, target.read_bytes())
            write_bytes(target, data)
            copied.append(path.name)
        yield copied
        undo.pop_all()


def _is_same(data: bytes, file: Path) -> bool:
    """Return whether a file has these bytes, or the same JSON."""
    with suppress(ValueError, OSError):
        return data == file.read_bytes() or json.loads(data) == json.loads(file.read_bytes())
    return False


def _read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; returns an empty dict if the file is missing, invalid or not an object."""
    with suppress(InputError):
        if isinstance(value := read_json(path), dict):
            return value
    return {}
