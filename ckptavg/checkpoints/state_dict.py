"""Find the model's state dict in a checkpoint, remove wrappers' prefixes, and check that all candidates agree."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final

from ckptavg.checkpoints import quantised
from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.errors import DisagreementError, InputError
from ckptavg.readers import FLOATING, Node, Reader, Refused, StoredTensor, as_real

MODEL_KEYS: Final = ("state_dict", "model", "model_state_dict", "module", "state.model", "state_dict_ema", "model_ema")
MAX_DENSE: Final = 1 << 30  # bytes of a sparse tensor made dense
RAW_WEIGHTS: Final = "current_model_state"  # Lightning's WeightAveraging: its state_dict holds the average
PREFIXES: Final = ("module.", "_orig_mod.")


def model_tensors(reader: Reader, key: str | None) -> tuple[str, Mapping[str, StoredTensor], tuple[str, ...]]:
    """Return the key of the model's state dict (``""`` for the whole file), name → tensor, and notes for the user.

    Args:
        key: the key given by the user (dots separate levels), or None to search `MODEL_KEYS`, then the top level.
    Raises:
        InputError: if there is no state dict, it is of a quantised model, or one of its tensors is not supported.
    """
    tree = reader.tree
    found = [name for name in MODEL_KEYS if _holds_tensors(_descend(tree, name))]
    chosen = key if key is not None else found[0] if found else ""
    node = _descend(tree, chosen)
    if not isinstance(node, Mapping) or not _holds_tensors(node):
        looked = f"at --key {key}" if key is not None else f"under {', '.join(MODEL_KEYS)} and at the top"
        inner = [str(name) for name, child in tree.items() if isinstance(child, Mapping)]
        hint = f"choose one of {_listing(inner)} with --key" if inner else None
        raise InputError(f"no model found {looked}; the file has {_listing(list(tree))}", path=reader.path, hint=hint)
    quantised.check(node, reader.path)
    notes = [f"took {chosen}, not {', '.join(found[1:])} (--key chooses)"] if key is None and found[1:] else []
    if key is None and _holds_tensors(tree.get(RAW_WEIGHTS)):
        notes.append(f"took {chosen}, which is an average already; the raw weights are {RAW_WEIGHTS} (--key chooses)")
    ignored = [name for name, child in node.items() if not isinstance(child, StoredTensor | Refused)]
    if ignored:
        notes.append(f"left out what is no tensor: {_listing(ignored)}")
    for name, child in node.items():
        if isinstance(child, Refused):
            hint = f"save the checkpoints again with a plain tensor there, or without it: del state[{name!r}]"
            others = "where only some have it, --skip-bad leaves these out"
            raise InputError(child.reason, path=reader.path, tensor=name, hint=f"{hint}; {others}")
    tensors = {name: as_real(child) for name, child in node.items() if isinstance(child, StoredTensor)}
    for name in [name for name, tensor in tensors.items() if tensor.sparse and tensor.nbytes > MAX_DENSE]:
        size = f"{tensors.pop(name).nbytes / 1e9:.1f} GB as the dense tensor that the output would need"
        notes.append(f"left out {name}: sparse, and {size}; load_state_dict(..., strict=False) keeps the model's own")
    tensors = _without_prefix(tensors, notes)
    for name, sparse in ((name, tensor.sparse) for name, tensor in tensors.items() if tensor.sparse):
        again = f"state[{name!r}] = state[{name!r}].{sparse.conversion}"
        notes.append(f"{name} is sparse, and dense in the output: {again} before load_state_dict(state)")
    return chosen, tensors, tuple(notes)


def _holds_tensors(node: Node) -> bool:
    return isinstance(node, Mapping) and any(isinstance(child, StoredTensor | Refused) for child in node.values())


def other_contents(tree: Mapping[str, Node]) -> str | None:
    """Return a description of a file that is clearly not a model, such as an optimizer's state; None otherwise."""
    if {"state", "param_groups"} <= set(tree):
        return "an optimizer's state"
    if "_step_count" in tree or {"base_lrs", "last_epoch"} <= set(tree):
        return "a scheduler's state"
    return None


def check_agreement(checkpoints: Sequence[Checkpoint], *, mixed: bool = False) -> tuple[str, ...]:
    """Raise DisagreementError naming the first checkpoint and tensor that differ from the majority.

    Args:
        mixed: floating-point dtypes may differ, because the output has one of its own, or there is none.
    Returns:
        A remark on the dtypes, if they differ.
    """
    specs = [{name: t.in_file for name, t in checkpoint.tensors.items()} for checkpoint in checkpoints]
    compared = [_without_precision(spec) for spec in specs] if mixed else specs
    signatures = [tuple(sorted(spec.items())) for spec in compared]
    usual, count = Counter(signatures).most_common(1)[0]
    if count == len(checkpoints):
        return _dtype_remark(checkpoints)
    odd = next(i for i, signature in enumerate(signatures) if signature != usual)
    here, there = specs[odd], specs[signatures.index(usual)]
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
    if _without_precision(here) == _without_precision(there):
        wide = "float64" if any(spec[name][0] in ("F64", "C128") for spec in specs) else "float32"
        hint = f"average all of them with --dtype {wide}, or {hint}"
    raise DisagreementError(what + more, path=path, tensor=name, hint=hint)


def _without_precision(spec: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, tuple[str, tuple[int, ...]]]:
    kinds = dict.fromkeys(FLOATING, "floating") | {"C128": "C64"}
    return {name: (kinds.get(dtype, dtype), shape) for name, (dtype, shape) in spec.items()}


def _dtype_remark(checkpoints: Sequence[Checkpoint]) -> tuple[str, ...]:
    """Name the dtypes of the candidates, if they differ, each with the candidates that have it."""
    by_dtypes: dict[str, list[Checkpoint]] = {}
    for checkpoint in checkpoints:
        dtypes = sorted({tensor.in_file[0] for tensor in checkpoint.tensors.values() if tensor.dtype in FLOATING})
        by_dtypes.setdefault(" and ".join(dtypes), []).append(checkpoint)
    listed = (f"{dtypes} in {_listing([c.path.name for c in those], 3)}" for dtypes, those in by_dtypes.items())
    return (f"the candidates differ in dtype: {'; '.join(listed)}",) if len(by_dtypes) > 1 else ()


def _descend(tree: Mapping[str, Node], key: str) -> Node:
    if key in tree or not key:
        return tree[key] if key else tree
    head, _, rest = key.partition(".")
    child = tree.get(head)
    return _descend(child, rest) if rest and isinstance(child, Mapping) else None


def _without_prefix(tensors: dict[str, StoredTensor], notes: list[str]) -> dict[str, StoredTensor]:
    while prefix := next((p for p in PREFIXES if all(len(n) > len(p) and n.startswith(p) for n in tensors)), None):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        notes.append(f"removed the prefix {prefix} from every name")
    return tensors


def _listing(names: Sequence[object], most: int = 8) -> str:
    shown = ", ".join(str(name) for name in names[:most]) or "nothing"
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
