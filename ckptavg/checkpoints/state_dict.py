"""Find the model's state dict in a checkpoint, remove wrappers' prefixes, and check that all candidates agree."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final

from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.checkpoints.tree_search import (
    descend,
    flattened,
    holds_tensors,
    listing,
    readable_keys,
    same_model,
    unwrapped,
)
from ckptavg.errors import DisagreementError, InputError, excluding
from ckptavg.readers import ModuleState, Node, Reader, Refused, StoredTensor

MODEL_KEYS: Final = (
    "state_dict", "model", "model_state_dict", "module", "state.model", "state_dict_ema", "model_ema",
    "ema", "ema_model", "ema_state_dict", "model_avg",
)  # fmt: skip
_SAVE: Final = "torch.save(model.state_dict(), 'model.pt') saves a model so that it can be averaged"


def model_tensors(reader: Reader, key: str | None) -> tuple[str, Mapping[str, StoredTensor], tuple[str, ...]]:
    """Return the key of the model's state dict (``""`` for the whole file), name → tensor, and notes for the user.

    Args:
        key: the key given by the user (dots separate levels), or None to search `MODEL_KEYS`, then the top level.
    Raises:
        InputError: if there is no state dict, or one of its tensors is not supported.
    """
    tree = reader.tree
    found = [name for name in MODEL_KEYS if holds_tensors(descend(tree, name))]
    chosen = key if key is not None else found[0] if found else ""
    node = descend(tree, chosen)
    notes: list[str] = []
    if not holds_tensors(node):
        chosen = chosen or next((name for name in MODEL_KEYS if flattened(descend(tree, name))), "")
        node = flattened(descend(tree, chosen)) if chosen else None
        notes.append(f"{chosen} is nested: joined its names by dots")
    if not isinstance(node, Mapping) or not node:
        raise _no_model(reader, key)
    for name, child in node.items():
        if isinstance(child, Refused):
            raise InputError(child.reason, path=reader.path, tensor=name)
    if isinstance(node, ModuleState):
        what = f"a whole module of the class {node.name}"
        notes.append(f"{chosen or 'the file'} is {what}: took its parameters and persistent buffers")
    tensors = {name: child for name, child in node.items() if isinstance(child, StoredTensor)}
    tensors = unwrapped(tensors, notes)
    if key is None:
        notes += _other_weights(tree, chosen, found[1:], tensors)
    ignored = [name for name, child in node.items() if not isinstance(child, StoredTensor)]
    if ignored:
        notes.append(f"left out what is no tensor: {listing(ignored)}")
    return chosen, tensors, tuple(notes)


def _no_model(reader: Reader, key: str | None) -> InputError:
    what = f"no model found {f'at --key {key}' if key is not None else 'at the usual keys and at the top'}"
    what += f"; the file has {listing(list(reader.tree))}"
    keys = readable_keys(reader.tree)
    if not keys:
        left_out = next((f"; {note}" for note in reader.notes if note.startswith("left out")), "")
        return InputError(what + left_out, path=reader.path, hint=_SAVE if left_out else None)
    hint = f"choose {'one of ' if keys[1:] else ''}{listing(keys)} with --key"
    if (similar := re.sub("[0-9]+", "*", excluding(reader.path.name))) != excluding(reader.path.name):
        including = similar.replace("--exclude", "--include", 1)
        hint += f", or leave out such files with {similar}" if key else f"; where others differ, add {including}"
    return InputError(what, path=reader.path, hint=hint)


def _other_weights(
    tree: Mapping[str, Node], chosen: str, others: Sequence[str], tensors: Mapping[str, StoredTensor]
) -> list[str]:
    """Return a note for the other weights of the same model, with their keys."""
    same, unnamed = same_model(tree, tensors)
    keys = dict.fromkeys((*others, *(key for key in same if key != chosen)))
    notes: list[str] = []
    if chosen == "state_dict" and holds_tensors(tree.get(raw := _raw_weights(tree))):
        keys.pop(raw, None)
        notes.append(f"took {chosen}, which is an average already; the raw weights are {raw} (--key {raw} takes them)")
    if keys:
        taken, ema = chosen or "the weights at the top", tree.get("ema")
        prefers = isinstance(ema, ModuleState) and ema.name.startswith(("ultralytics.", "models.yolo."))
        who = f"--key {next(iter(keys))} chooses" + (", as Ultralytics does" if prefers and "ema" in keys else "")
        notes.append(f"took {taken}, not {listing(list(keys))} ({who})")
    elif chosen.startswith("ema") and tree.get("model", 0) is None:
        notes.append(f"took {chosen}, because model is None")
    if unnamed:
        why = f"a list without names, of the shapes of {chosen or 'the weights'}, as of an average"
        notes.append(f"{unnamed[0]} is {why}: copy it into the model and save that to average it")
    return notes


def _raw_weights(tree: Mapping[str, Node]) -> str:
    """Return the key of the raw weights where ``state_dict`` is an average: MMEngine's EMAHook, Lightning."""
    meta = tree.get("meta")
    return "ema_state_dict" if isinstance(meta, Mapping) and "mmengine_version" in meta else "current_model_state"


def other_contents(tree: Mapping[str, Node]) -> str | None:
    """Return a description of a file that is clearly not a model, such as an optimizer's state; None otherwise."""
    if {"state", "param_groups"} <= set(tree):
        return "an optimizer's state"
    if "_step_count" in tree or {"base_lrs", "last_epoch"} <= set(tree):
        return "a scheduler's state"
    return None


def check_agreement(checkpoints: Sequence[Checkpoint]) -> None:
    """Raise DisagreementError naming the first checkpoint and tensor that differ from the majority."""
    specs = [{name: (t.dtype, t.shape) for name, t in checkpoint.tensors.items()} for checkpoint in checkpoints]
    signatures = [tuple(sorted(spec.items())) for spec in specs]
    usual, count = Counter(signatures).most_common(1)[0]
    if count == len(checkpoints):
        return
    odd = next(i for i, signature in enumerate(signatures) if signature != usual)
    here, there = specs[odd], dict(usual)
    differing = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
    name = differing[0]
    others = f"{count} other candidate{'s have' if count > 1 else ' has'}"
    if name not in here:
        what = f"missing, but {others} it"
    elif name not in there:
        what = f"{others} no such tensor"
    elif here[name][1] != there[name][1]:
        what = f"shape {list(here[name][1])}, but {others} {list(there[name][1])}"
    else:
        what = f"dtype {here[name][0]}, but {others} {there[name][0]}"
    more = f" (and {len(differing) - 1} more differences)" if len(differing) > 1 else ""
    path, hint = checkpoints[odd].path, f"leave it out with {checkpoints[odd].excluding}"
    raise DisagreementError(what + more, path=path, tensor=name, hint=hint)
