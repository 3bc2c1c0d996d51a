"""Kinds of files in one directory: earlier averages, EMA weights beside raw ones, two models of one job."""

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Final

from ckptavg.errors import InputError, choosing, escaped_glob

_ASIDE: Final = {
    **dict.fromkeys(
        ("avg", "ave", "average", "averaged", "swa", "swag", "lawa", "soup", "soups"), "an earlier average, by its name"
    ),
    **dict.fromkeys(("init", "initial"), "the weights before training, by its name"),
}
_EMA: Final = ("ema", "bema", "polyak")
_NUMBER: Final = re.compile(r"[0-9]+(?:\.[0-9]+)?")


def words(name: str) -> set[str]:
    """Return the words of a name in lower case: ``valid.acc.ave_10best`` has valid, acc, ave and best."""
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)}


def asides(names: Sequence[str]) -> dict[int, str]:
    """Return {index: reason} of the names that are no candidates beside the others: averages, and the initial weights.

    A single EMA among several others is one too. Names of which all are averages are a choice that the user has made.
    """
    spoken = [words(name) for name in names]
    found = {i: reason for i, each in enumerate(spoken) for word, reason in _ASIDE.items() if word in each}
    emas = [i for i, each in enumerate(spoken) if not each.isdisjoint(_EMA) and i not in found]
    if len(emas) == 1 and len(names) - len(found) > 2:
        found[emas[0]] = "an EMA of the weights, by its name"
    return {} if len(found) == len(names) else found


def check(names: Sequence[str], contents: Sequence[Mapping[str, object]]) -> None:
    """Refuse names of several kinds: EMA beside raw weights, or models of different tensors.

    Args:
        names: of the candidates.
        contents: name → shape of the tensors of each.
    Raises:
        InputError: listing the kinds with their counts, and an option that chooses each.
    """
    is_ema = [not words(name).isdisjoint(_EMA) for name in names]
    if len(set(is_ema)) == 2:
        raise several("raw and EMA weights", names)
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
