"""Search a file's tree for state dicts: by key, all of them, and those with the names and shapes of another."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from ckptavg.readers import Node, Refused, StoredTensor

_SEARCHED: Final = 10_000  # maximum number of containers per search
# names of wrappers around a model, and what they store beside it: DataParallel, torch.compile, AveragedModel,
# ema_pytorch, MMEngine's averaged model, and torchtitan's EMA, whose names are ``state.NAME.ema_params``
_PREFIXES: Final = ("module.", "_orig_mod.")
_AVERAGES: Final = ("module.", "ema_model.")
_COUNTERS: Final = frozenset({"n_averaged", "steps", "step", "initted"})
_RAW_COPY: Final = "online_model."
_EMA_STATE: Final = ("state.", ".ema_params")


def descend(node: Node, key: str) -> Node:
    """Return the node at ``key``, whose parts are joined by dots and may contain dots; ``""`` is the node itself."""
    if not key:
        return node
    if isinstance(node, list):
        node = {str(i): child for i, child in enumerate(node)}
    if not isinstance(node, Mapping):
        return None
    if key in node:
        return node[key]
    parts = key.split(".")
    heads = (".".join(parts[:i]) for i in range(1, len(parts)))
    inner = (descend(node[head], key[len(head) + 1 :]) for head in heads if head in node)
    return next((child for child in inner if child is not None), None)


def holds_tensors(node: Node) -> bool:
    """Return whether ``node`` is a mapping with a tensor directly in it."""
    return isinstance(node, Mapping) and any(isinstance(child, StoredTensor | Refused) for child in node.values())


def flattened(node: Node, prefix: str = "") -> dict[str, Node]:
    """Return the tensors of nested mappings, as Megatron-LM saves, by their names joined by dots; else empty."""
    tensors: dict[str, Node] = {}
    for name, child in node.items() if isinstance(node, Mapping) else ():
        if isinstance(child, StoredTensor | Refused):
            tensors[f"{prefix}{name}"] = child
        elif not _of_optimizer(name, child) and not _of_optimizer("", node):
            tensors |= flattened(child, f"{prefix}{name}.")
    return tensors


def has_tensors(tree: Node) -> bool:
    """Return whether a tensor is anywhere in ``tree``, apart from the states of optimizers."""
    return holds_tensors(tree) or any(
        holds_tensors(node) or (isinstance(node, list) and any(isinstance(child, StoredTensor) for child in node))
        for _, node in containers(tree, 6)
    )


def containers(tree: Node, levels: int) -> Iterator[tuple[str, Node]]:
    """Yield (key, container) of the containers in ``tree``, up to ``levels`` deep, without those of optimizers."""
    pending, count = [("", tree, 0)], 0
    for key, node, level in pending:
        children = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
        for name, child in children if level < levels else ():
            if isinstance(child, Mapping | list) and not _of_optimizer(str(name), child) and count < _SEARCHED:
                count += 1
                pending.append((f"{key}.{name}" if key else str(name), child, level + 1))
                yield pending[-1][:2]


def _of_optimizer(name: str, node: Node) -> bool:
    return name.startswith("optim") or (isinstance(node, Mapping) and {"state", "param_groups"} <= node.keys())


def readable_keys(tree: Mapping[str, Node]) -> list[str]:
    """Return the keys of the state dicts in ``tree`` that can be averaged."""
    return [key for key, node in containers(tree, 4) if isinstance(node, Mapping) and _is_readable(node)]


def _is_readable(node: Mapping[str, Node]) -> bool:
    tensors = [child for child in node.values() if isinstance(child, StoredTensor)]
    refused = any(isinstance(child, Refused) for child in node.values())
    return not refused and any(tensor.dtype.startswith(("F", "BF")) for tensor in tensors)


def same_model(tree: Mapping[str, Node], tensors: Mapping[str, StoredTensor]) -> tuple[list[str], list[str]]:
    """Return the keys of other state dicts with the names and shapes of ``tensors``, and of lists with the shapes.

    Names may be lacking on one side, such as buffers in an average of the parameters, but no more than half of them.
    """
    shapes = _shapes(tensors)
    count = Counter(shapes.values())
    named: list[str] = []
    unnamed: list[str] = []
    for key, node in containers(tree, 2):
        if isinstance(node, list):
            listed = [child.shape for child in node if isinstance(child, StoredTensor)]
            if listed and 2 * len(listed) >= len(shapes) and not Counter(listed) - count:
                unnamed.append(key)
        elif isinstance(node, Mapping):
            others = {name: child for name, child in node.items() if isinstance(child, StoredTensor)}
            if others and others != tensors:
                fewer, more = sorted((shapes, _shapes(unwrapped(others, []))), key=len)
                if fewer and 2 * len(fewer) >= len(more) and fewer.items() <= more.items():
                    named.append(key)
    return named, unnamed


def _shapes(tensors: Mapping[str, StoredTensor]) -> dict[str, tuple[int, ...]]:
    """Return the shapes by name, without numbers, which wrappers add."""
    return {name: tensor.shape for name, tensor in tensors.items() if tensor.shape}


def unwrapped(tensors: dict[str, StoredTensor], notes: list[str]) -> dict[str, StoredTensor]:
    """Return ``tensors``, at least one, by their names in a wrapper's model; append to ``notes`` what was changed."""
    counters = [name for name, tensor in tensors.items() if name in _COUNTERS and tensor.numel == 1]
    for prefix in _AVERAGES if counters else ():
        inside = [name for name in tensors if name.startswith(prefix)]
        rest = [name for name in tensors if not name.startswith(prefix)]
        if inside and all(name in counters or name.startswith(_RAW_COPY) for name in rest):
            notes.append(f"left out {listing(rest)}, which an average keeps beside its weights")
            tensors = _without_prefix(prefix, {name: tensors[name] for name in inside}, notes)
            break
    while prefix := next((p for p in _PREFIXES if all(len(n) > len(p) and n.startswith(p) for n in tensors)), None):
        tensors = _without_prefix(prefix, tensors, notes)
    start, end = _EMA_STATE
    if all(name.startswith(start) and name.endswith(end) for name in tensors):
        tensors = {name.removeprefix(start).removesuffix(end): child for name, child in tensors.items()}
        notes.append(f"took the names between {start} and {end}")
    return tensors


def _without_prefix(prefix: str, tensors: Mapping[str, StoredTensor], notes: list[str]) -> dict[str, StoredTensor]:
    notes.append(f"removed the prefix {prefix} from every name")
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def listing(names: Sequence[object], most: int = 8) -> str:
    """Return the first ``most`` names, and the number of the others."""
    shown = ", ".join(str(name) for name in names[:most]) or "nothing"
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
