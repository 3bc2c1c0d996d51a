"""Check that ``from_pretrained`` loads every output tensor; it silently initializes missing ones at random."""

import importlib.util
import re

from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.errors import CkptavgError, OutputError
from ckptavg.filesystem.regular_file import is_file
from ckptavg.readers import sentence_transformers


def check(checkpoint: Checkpoint) -> None:
    """Raise OutputError if ``from_pretrained`` would make a tensor random, or ignore one, by the config.json beside it.

    Nothing is checked without transformers, for adapters, if the model is not one of transformers' own, or if it is
    followed by other modules of sentence-transformers.
    """
    folder, unavailable = checkpoint.folder, importlib.util.find_spec("transformers") is None
    other = is_file(folder / "adapter_config.json") or checkpoint.reader.format == sentence_transformers.NAME
    if unavailable or other or not is_file(folder / "config.json"):
        return
    import torch

    from ckptavg.tasks.hugging_face.architecture import ModelFolder

    try:
        with torch.device("meta"):
            model = ModelFolder(folder, trust=False).build()
    except CkptavgError:
        return
    tied: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        tied.setdefault(id(tensor), []).append(name)
    names = set(checkpoint.names)
    missing = [group[0] for group in tied.values() if not names & set(group)]
    extra = sorted(names - {name for group in tied.values() for name in group})
    for message, mismatched, attribute in (
        ("is missing: from_pretrained would make it random", missing, "_keys_to_ignore_on_load_missing"),
        ("is not in the model: from_pretrained would leave it out", extra, "_keys_to_ignore_on_load_unexpected"),
    ):
        patterns: list[str] = list(getattr(model, attribute, None) or [])
        wrong = [name for name in mismatched if not any(re.search(pattern, name) for pattern in patterns)]
        if wrong:
            more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            hint = "write a file instead of a directory to keep the tensors as they are"
            raise OutputError(message + more, path=checkpoint.path, tensor=wrong[0], hint=hint)
