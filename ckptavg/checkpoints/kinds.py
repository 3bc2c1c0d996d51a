"""Kinds of files in one directory: earlier averages, EMA weights beside raw ones, two models of one job."""

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Final

from ckptavg.checkpoints.steps import METRICS, numbers
from ckptavg.errors import InputError, choosing, escaped_glob

_AVERAGES: Final = ("avg", "ave", "average", "averaged", "swa", "swag", "lawa", "soup", "soups")
_INITIAL: Final = ("init", "initial")
_EMA: Final = ("ema", "bema", "polyak")
# words that say that an average before them is one of figures, or a layer
_AVERAGED_FIGURES: Final = (*METRICS, "pool", "pooling", "val", "valid", "test", "train")
_NUMBER: Final = re.compile(r"[0-9]+(?:\.[0-9]+)?")


def words(name: str) -> list[str]:
    """Return the words of a name in lower case: ``valid.acc.ave_10best`` has valid, acc, ave and best."""
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)]


def is_ema(name: str) -> bool:
    """Return whether a name says that its weights are an exponential moving average."""
    return any(word in _EMA for word in words(name))


def aside(name: str) -> str:
    """Return why a name says that it is no candidate beside others; ``""`` if it says no such thing."""
    spoken = words(name)
    if any(word in _AVERAGES and after not in _AVERAGED_FIGURES for word, after in pairwise([*spoken, ""])):
        return "an earlier average, by its name"
    if any(word in _INITIAL for word in spoken) and not numbers(name):
        return "the weights before training, by its name"
    return ""


def asides(names: Sequence[str]) -> dict[int, str]:
    """Return {index: reason} of the names that are no candidates beside the others: averages, and the initial weights.

    A single EMA among several others is one too. Names of which all are averages are a choice that the user has made.

    Raises:
        InputError: if there are more averages than others.
    """
    found = {i: reason for i, name in enumerate(names) if (reason := aside(name))}
    emas = [i for i, name in enumerate(names) if is_ema(name) and i not in found]
    if len(emas) == 1 and len(names) - len(found) > 2:
        found[emas[0]] = "an EMA of the weights, by its name"
    if len(names) > len(found) > len(names) - len(found):
        raise several("earlier averages beside other checkpoints", names)
    return {} if len(found) == len(names) else found


def check(names: Sequence[str], contents: Sequence[Mapping[str, object]], keys: Sequence[str] = ()) -> None:
    """Refuse names of several kinds: EMA beside raw weights, or models of different tensors.

    Args:
        names: of the candidates.
        contents: name → shape of the tensors of each.
        keys: the entry of each file that is the model.
    Raises:
        InputError: listing the kinds with their counts, and an option that chooses each.
    """
    if len(set(map(is_ema, names))) == 2:
        raise several("raw and EMA weights", names)
    if len(set(map(is_ema, keys))) == 2:
        raw, ema = (next(i for i, key in enumerate(keys) if is_ema(key) is kind) for kind in (False, True))
        what = f"raw and EMA weights: {names[raw]} has {keys[raw] or 'its weights'}, but {names[ema]} {keys[ema]}"
        raise InputError(what, hint=f"choose one for all files with --key {keys[ema]} or --key {keys[raw]}")
    groups: dict[str, list[Mapping[str, object]]] = {}
    for name, content in zip(names, contents, strict=True):
        groups.setdefault(pattern(name), []).append(content)
    alike = all(content == group[0] for group in groups.values() for content in group)
    first = [group[0] for group in groups.values()]
    sizes = {len(group) for group in groups.values()}
    if alike and any(a != b for a, b in pairwise(first)) and (1 not in sizes or len(sizes) == 1):
        raise several(f"{len(groups)} kinds of model", names)


def several(what: str, names: Sequence[str]) -> InputError:
    """Return the error that lists the kinds among ``names``, with the option that chooses each."""
    groups: dict[str, list[str]] = {}
    for name in sorted(names, key=len):
        groups.setdefault(pattern(name), []).append(name)
    kinds = ", ".join(f"{glob.replace('[[]', '[')} ({len(members)})" for glob, members in groups.items())
    ways = list(dict.fromkeys(_choosing(glob, groups) for glob in groups))
    return InputError(f"{what}: {kinds}", hint=f"choose with {' or '.join(ways)}")


def pattern(name: str) -> str:
    """Return the glob of all names that differ from ``name`` in their numbers only."""
    return re.sub(r"\*(?:[-_.]?\*)*", "*", _NUMBER.sub("*", escaped_glob(name)))


def _choosing(glob: str, groups: Mapping[str, Sequence[str]]) -> str:
    others = [name for other, members in groups.items() if other != glob for name in members]
    for narrower in (glob, glob.replace("*", "[0-9]*", 1)):
        if not any(fnmatchcase(name, narrower) for name in others):
            return choosing("--include", narrower)
    return " ".join(choosing("--exclude", other) for other in groups if other != glob)
