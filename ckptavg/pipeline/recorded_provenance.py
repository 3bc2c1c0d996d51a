"""Provenance that an output records in its metadata, as untrusted input: types, and what the strategy implies."""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from types import NoneType, UnionType
from typing import Any, Final, Literal, Union, get_args, get_origin

from ckptavg import declaration
from ckptavg.checkpoints.dtypes import NAMES
from ckptavg.coefficients import EVERYTHING, Coefficients
from ckptavg.errors import InputError, UsageError
from ckptavg.filesystem.strict_json import strict_json
from ckptavg.objective import PlainAverage, Strategy
from ckptavg.output import provenance
from ckptavg.pipeline.recorded_draw import RecordedDraw, recorded_draw
from ckptavg.readers import FLOATING, Reader
from ckptavg.runtime import version
from ckptavg.strategies import strategies
from ckptavg.strategies.twa import TWA

_UNIFORM: Final = ("aswa", "best", "sewa", "soup")  # strategies that choose a subset and average it with equal weights
_MAX_PARTS: Final = 64  # of a source's name
_SAME: Final = 1e-12  # relative difference of equal coefficients; powers may differ by an ulp between machines


@dataclass(frozen=True, kw_only=True)
class Source:
    """A recorded source; the entries of `ckptavg.output.provenance.metadata`."""

    name: str
    step: int
    key: str
    coefficient: float | list[float]
    sha256: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class RecordedProvenance:
    """Entries of an output's metadata with the right types; ``entries`` has them as they are recorded."""

    entries: Mapping[str, Any]
    sources: Sequence[Source]
    coefficients: Coefficients
    draw: RecordedDraw | None = None  # of `ckptavg.pipeline.swag`
    own_strategy: str | None  # a strategy that is none of ckptavg's, so that its settings have no known meaning

    @property
    def without_digest(self) -> Sequence[str]:
        """Names of the sources of which at least one file has no digest."""
        return [source.name for source in self.sources if not all(source.sha256.values())]


def read(output: Reader) -> RecordedProvenance:
    """Return the provenance in the metadata of ``output``.

    Raises:
        InputError: if there is none, an entry is missing, unknown or of a wrong type, or the coefficients are not what
            the strategy and its settings imply.
    """
    text, path = output.metadata.get(provenance.KEY), output.path
    if text is None:
        raise InputError("has no ckptavg metadata, so its sources are unknown", path=path)
    try:
        record: Any = strict_json(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"its ckptavg metadata is not valid JSON: {error}", path=path) from error
    if isinstance(record, dict) and "posterior" in record:
        message = "is a posterior of swag, or was drawn from one, and not an average that its sources give again"
        raise InputError(message, path=path, hint="ckptavg swag --from FILE --samples N draws from a posterior")
    schema = record.get("schema") if isinstance(record, dict) else None
    if type(schema) is not int or schema != provenance.SCHEMA:
        raise InputError("its ckptavg metadata is of another version", path=path, hint="use a newer ckptavg")
    try:
        _check_entries(record, _ENTRIES, "", optional=("keep", "average", "derived", "runs"))
        for i, source in enumerate(record["sources"]):
            _check_entries(source, _SOURCE, f"sources[{i}].")
        if record["adapter"] == "factors" and record["rank"] is not None:
            raise ValueError("rank is set, but only an exact adapter has one")
        if record["adapter"] == "exact" and (record.get("keep") or record.get("average")):
            raise ValueError("keep and average do not go with an exact adapter")
        sources = [Source(**source) for source in record["sources"]]
        columns = [s.coefficient if isinstance(s.coefficient, list) else [s.coefficient] for s in sources]
        groups = tuple(map(tuple, record["groups"]))
        if wrong := [i for i, column in enumerate(columns) if len(column) != len(groups)]:
            raise ValueError(f"sources[{wrong[0]}].coefficient must have {len(groups)} values, one for each group")
        linear = record["settings"].get("constraint") == "linear"  # of TWA, or of a strategy of one's own
        coefficients = Coefficients(tuple(zip(*columns, strict=True)), groups, linear)
        if unused := [source.name for i, source in enumerate(sources) if i not in coefficients.selected]:
            raise ValueError(f"the coefficient of {unused[0]} is 0, so it is not a source")
        draw = recorded_draw(record["settings"], coefficients) if record["strategy"] == provenance.DRAWN else None
        strategy = None if draw else _constructed(record["strategy"], record["settings"])
        if strategy is not None:
            _check_coefficients(record["strategy"], strategy, coefficients, record.get("runs"))
    except (ValueError, OverflowError) as error:
        recorded = record.get("version")
        other = isinstance(recorded, str) and recorded != version.own()
        hint = f"if it is as ckptavg {recorded} wrote it, verify it with that version" if other else None
        raise InputError(f"its ckptavg metadata is damaged: {error}", path=path, hint=hint) from error
    own = record["strategy"] if strategy is None and draw is None else None
    return RecordedProvenance(entries=record, sources=sources, coefficients=coefficients, draw=draw, own_strategy=own)


def difference(recorded: Any, rebuilt: Any, entry: str = "") -> str | None:
    """Describe the first entry in which two JSON values differ, also in type; None if they are equal."""
    pairs: Sequence[tuple[str, Any, Any]] = ()
    if isinstance(recorded, dict) and isinstance(rebuilt, dict) and recorded.keys() == rebuilt.keys():
        pairs = [(f"{entry}.{key}".removeprefix("."), recorded[key], rebuilt[key]) for key in sorted(rebuilt)]
    elif isinstance(recorded, list) and isinstance(rebuilt, list) and len(recorded) == len(rebuilt):
        pairs = [(f"{entry}[{i}]", a, b) for i, (a, b) in enumerate(zip(recorded, rebuilt, strict=True))]
    elif type(recorded) is not type(rebuilt) or recorded != rebuilt:
        return f"{entry} is {_shown(recorded)}, but must be {_shown(rebuilt)}"
    return next(filter(None, (difference(a, b, inner) for inner, a, b in pairs)), None)


def _check_entries(
    record: Any, kinds: Mapping[str, Callable[[Any], bool]], prefix: str, optional: Sequence[str] = ()
) -> None:
    """Raise ValueError naming the first entry that is missing, unknown or not of its kind.

    An entry that this version does not know might change the bytes, as a list of copied tensors does, so it must not be
    ignored.
    """
    if not isinstance(record, dict):
        raise ValueError(f"{prefix.removesuffix('.')} cannot be {_shown(record)}")
    for name in sorted(kinds.keys() | record.keys()):
        if name not in kinds:
            raise ValueError(f"{prefix}{name[:100]} is not a known entry")
        if name not in record and name not in optional:
            raise ValueError(f"{prefix}{name} is missing")
        if name in record and not kinds[name](record[name]):
            raise ValueError(f"{prefix}{name} cannot be {_shown(record[name])}")


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _is_list(value: Any, kind: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(kind, value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _are_texts(value: Any) -> bool:
    return _is_list(value, _is_text) and len(set(value)) == len(value)


def _is_source_name(value: Any) -> bool:
    """Return whether ``value`` is a name of `Checkpoint`: a relative path without ``..``."""
    if not isinstance(value, str) or "\0" in value:
        return False
    parts = PurePath(value).parts
    return 0 < len(parts) <= _MAX_PARTS and "/".join(parts) == value and not {"..", "/"} & set(parts)


def _are_digests(value: Any) -> bool:
    """Return whether ``value`` maps files of a checkpoint to digests, or each of them to an empty text."""
    return (
        isinstance(value, dict)
        and len(value) > 0
        and all(map(_is_source_name, value))
        and all(isinstance(digest, str) and re.fullmatch("(?:[0-9a-f]{64})?", digest) for digest in value.values())
    )


_ENTRIES: Final[Mapping[str, Callable[[Any], bool]]] = {
    "schema": lambda value: type(value) is int,
    "version": lambda value: isinstance(value, str) and value != "",
    "strategy": lambda value: isinstance(value, str) and value.isidentifier(),
    "settings": lambda value: isinstance(value, dict),
    "dtype": lambda value: value is None or (isinstance(value, str) and NAMES.get(value) in FLOATING),
    "adapter": lambda value: value in ("factors", "exact"),
    "rank": lambda value: value is None or (type(value) is int and 0 < value < 2**31),
    "groups": lambda value: _is_list(value, lambda group: _are_texts(group) and len(group) > 0) and len(value) > 0,
    "keep": _are_texts,
    "average": _are_texts,
    "not_averaged": _are_texts,
    "derived": lambda value: isinstance(value, dict) and len(value) > 0 and all(map(_are_texts, value.values())),
    "recomputed": _are_texts,
    "runs": lambda value: _is_list(value, lambda run: type(run) is int),
    "sources": lambda value: isinstance(value, list) and len(value) > 0,
}
_SOURCE: Final[Mapping[str, Callable[[Any], bool]]] = {
    "name": _is_source_name,
    "step": lambda value: type(value) is int,
    "key": _is_text,
    "coefficient": lambda value: _is_number(value) or (_is_list(value, _is_number) and len(value) > 1),
    "sha256": _are_digests,
}


def _constructed(name: str, settings: Mapping[str, Any]) -> Strategy | None:
    """Return the strategy with its recorded settings; raise ValueError if they are not its own.

    A strategy of one's own (`ckptavg.run`) is recorded by the name of its class, whose settings have no meaning here:
    the result is None.
    """
    if name not in strategies():
        return None
    cls = strategies()[name]
    options = {option.name: option for option in declaration.declared(cls)}
    if wrong := sorted(options.keys() ^ settings.keys()):
        raise ValueError(
            f"settings.{wrong[0][:100]} is {'missing' if wrong[0] in options else f'no setting of {name}'}"
        )
    for key, value in settings.items():
        if not _has_type(value, options[key].hint):
            raise ValueError(f"settings.{key} cannot be {_shown(value)}")
    try:
        strategy = cls(**settings)
        declaration.check(strategy)
    except UsageError as error:
        raise ValueError(f"settings of {name}: {error}") from error
    return strategy


def _check_coefficients(name: str, strategy: Strategy, coefficients: Coefficients, runs: Sequence[int] | None) -> None:
    """Raise ValueError if the strategy cannot have led to the coefficients of sources of these ``runs``."""
    n = coefficients.n
    by_run = isinstance(strategy, PlainAverage) and strategy.by_run
    if (runs is not None) != by_run or len(runs or [0] * n) != n:
        raise ValueError(f"runs must be one for each of {n} sources, and only where {name} averages by run")
    by_block = isinstance(strategy, TWA) and (strategy.layerwise or strategy.block_size is not None)
    if coefficients.groups != EVERYTHING and not by_block:
        raise ValueError(f"groups must be one for all tensors, as {name} with its settings has")
    if isinstance(strategy, PlainAverage):
        # powers of a small decay may be zero: the other coefficients are those of one candidate more
        rows = _by_run(coefficients.values[0], runs or [0] * n)
        if not all(any(_equal(row, strategy, m) for m in (len(row), len(row) + 1)) for row in rows):
            raise ValueError(f"the coefficients of {n} sources are not those of {name} with its settings")
    elif name in _UNIFORM:
        if coefficients != Coefficients.uniform(range(n), n):
            raise ValueError(f"the coefficients are not equal, as those of {name} are")
        k = 1 if name == "best" else getattr(strategy, "k", "auto")
        # SeWA may take a single candidate, or the mean of all, if it is better than every average of k
        if isinstance(k, int) and k != n and not (name == "sewa" and (n == 1 or n > k)):
            raise ValueError(f"{n} sources, but {name} with its settings has {k}")
    elif isinstance(strategy, TWA) and strategy.constraint == "simplex" and min(map(min, coefficients.values)) < 0:
        raise ValueError("a coefficient is negative, but the constraint is simplex")


def _by_run(row: Sequence[float], runs: Sequence[int]) -> list[list[float]]:
    """Return the coefficients within each run, times the number of runs."""
    members = dict.fromkeys(runs)
    return [[len(members) * c for c, its in zip(row, runs, strict=True) if its == run] for run in members]


def _equal(row: Sequence[float], strategy: PlainAverage, n: int) -> bool:
    """Return whether ``row`` has the coefficients of ``strategy`` for ``n`` candidates, less the zero ones."""
    try:
        expected = [c for c in strategy.coefficients(n).values[0] if c != 0]
    except ValueError:  # fewer candidates than its settings require
        return False
    return len(row) == len(expected) and all(
        math.isclose(a, b, rel_tol=_SAME) for a, b in zip(row, expected, strict=True)
    )


def _has_type(value: Any, hint: Any) -> bool:
    """Return whether a setting's JSON value has the type of its option."""
    if get_origin(hint) in (Union, UnionType):
        return any(_has_type(value, kind) for kind in get_args(hint))
    if get_origin(hint) is Literal:
        return any(type(value) is type(choice) and value == choice for choice in get_args(hint))
    if hint is float:
        return _is_number(value)
    return type(value) is (NoneType if hint is None else hint)
