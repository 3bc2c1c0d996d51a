"""Copy the companion files of a Hugging Face model: config, tokenizer, processor."""

import json
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

from ckptavg.checkpoints.checkpoint import Checkpoint, chunks
from ckptavg.errors import InputError, OutputError, OutputExistsError
from ckptavg.filesystem.atomic import flush_folder, write_bytes
from ckptavg.filesystem.regular_file import is_file, is_folder
from ckptavg.filesystem.strict_json import read_json
from ckptavg.output import loader_files
from ckptavg.readers import StoredTensor, sentence_transformers, suffixes
from ckptavg.readers.sentence_transformers import MODULES

PATTERNS: Final = (
    "config.json", "*_config.json", "config_*.json",  # of generation, preprocessors, schedulers, sentence-transformers
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model", "*.spm",
    "bpe.codes", "normalizer.json", "chat_template.json", "*.jinja", "additional_chat_templates/*", MODULES,
    "policy_*processor*.json", "policy_*processor*.safetensors",  # LeRobot: statistics of the data
    "configuration_*.py", "modeling_*.py", "tokenization_*.py", "*processing_*.py",  # a model's own code, never run
)  # fmt: skip
_NOT_COPIED: Final = ("*.pt", "*.pth", "*.pkl", "optimizer*", "training_args.bin")  # in a module's directory
_CONFIGS: Final = ("config.json", "adapter_config.json")
_HEADS: Final = ("lm_head", "embed_out", "output_layer", "cls.predictions.decoder")
_EMBEDDINGS: Final = ("embed_tokens", "wte", "word_embeddings", "shared", "embed_in")


def check(folder: Path) -> None:
    """Raise OutputError if a directory holds a sharded model, whose index some loaders would prefer to the new file."""
    for index in sorted(folder.glob("*.index*.json")):
        message = "belongs to a sharded model that loaders would mix with the new file"
        raise OutputError(message, path=index, hint="choose an empty directory")


@contextmanager
def created_folder(folder: Path | None, inside: Sequence[str] = ()) -> Generator[None]:
    """Create ``folder`` and the directories ``inside`` if they do not exist; remove them again if the body fails."""
    with ExitStack() as undo:
        for path in [] if folder is None else [folder, *(folder / name for name in inside)]:
            _create(path, undo)
        yield
        undo.pop_all()


def _create(folder: Path, undo: ExitStack) -> None:
    """Create a directory if it does not exist, which ``undo`` removes again."""
    if is_folder(folder):
        return
    try:
        folder.mkdir()
    except OSError as error:
        raise OutputError(f"cannot be created: {error.strerror}", path=folder) from error
    undo.callback(_remove_folder, folder)
    flush_folder(folder)


def _remove_folder(path: Path) -> None:
    with suppress(OSError):  # it may contain files of other programs
        path.rmdir()


def check_tied(
    checkpoint: Checkpoint, specs: Mapping[str, StoredTensor], read_into: Callable[[str, int, memoryview], None]
) -> None:
    """Raise OutputError if a file's output layer and embedding differ, but the config.json of ``checkpoint`` ties them.

    transformers would silently untie the model.
    """
    places = ["", *loader_files.folders(checkpoint)]
    configs = [_read_json(checkpoint.folder / place / "config.json") for place in places]
    parts: list[Any] = [part for config in configs for part in (config, config.get("text_config"))]
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
    written = MODULES if checkpoint.reader.format == sentence_transformers.NAME else ""  # with the weights
    with ExitStack() as undo:
        for name in _companions(checkpoint):
            path, target = source / name, folder / name
            exists = target.exists()
            if name == written or (exists and path.name not in _CONFIGS):
                continue
            try:
                data = path.read_bytes()
            except OSError as error:
                raise OutputError(f"cannot copy {name} here: {error.strerror}", path=folder) from error
            if path.name == "config.json" and "," not in dtype:
                config = _read_json(path)
                if outdated := [key for key in ("dtype", "torch_dtype") if config.get(key, dtype) != dtype]:
                    data = (json.dumps(config | dict.fromkeys(outdated, dtype), indent=2) + "\n").encode()
            if path.name == "adapter_config.json" and adapter is not None:
                data = (json.dumps(adapter, indent=2, sort_keys=True) + "\n").encode()
            if not exists:
                for inner in reversed(Path(name).parents):
                    _create(folder / inner, undo)
                undo.callback(target.unlink, missing_ok=True)
            elif _is_same(data, target):
                continue
            elif not force:
                message = "is of another model than the average, or of one of other settings"
                raise OutputExistsError(message, path=target, hint="--force replaces it; or choose another directory")
            else:
                undo.callback(write_bytes, target, target.read_bytes())
            write_bytes(target, data)
            copied.append(name)
        yield copied
        undo.pop_all()


def _companions(checkpoint: Checkpoint) -> list[str]:
    """Return the files to copy, relative to the checkpoint's directory.

    All that the directories of a model's modules have is copied, except weights and states of the training.
    """
    source, found = checkpoint.folder, list[str]()
    for pattern in PATTERNS:
        found += [path.relative_to(source).as_posix() for path in source.glob(pattern)]
    for module in loader_files.folders(checkpoint):
        unwanted = (*_NOT_COPIED, *(f"*{suffix}" for suffix in suffixes()))
        for folder, _, names in os.walk(source / module):
            inside = Path(folder).relative_to(source)
            wanted = (name for name in names if not any(fnmatchcase(name, pattern) for pattern in unwanted))
            found += [(inside / name).as_posix() for name in wanted]
    return sorted({name for name in found if is_file(source / name)})


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
