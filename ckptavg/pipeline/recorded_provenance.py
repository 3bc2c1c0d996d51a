"""Provenance that an output records in its metadata, as untrusted input: its entries and their types."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Final

from ckptavg.checkpoints.dtypes import NAMES
from ckptavg.coefficients import Coefficients
from ckptavg.errors import InputError
from ckptavg.filesystem.digest import algorithm_of
from ckptavg.filesystem.strict_json import strict_json
from ckptavg.output import provenance
from ckptavg.pipeline.recorded_draw import RecordedDraw, recorded_draw
from ckptavg.pipeline.recorded_strategy import check_coefficients, constructed, shown
from ckptavg.readers import FLOATING, Reader
from ckptavg.runtime import version

_MAX_PARTS: Final = 64  # of a source's name


@dataclass(frozen=True, kw_only=True)
class Source:
    """A recorded source; the entries of `ckptavg.output.provenance.metadata`."""

    name: str
    step: int
    key: str
    coefficient: float | list[float]
    digests: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class RecordedProvenance:
    """Entries of an output's metadata with the right types; ``entries`` has them as they are recorded, in the form of
    today's schema.
    """

    entries: Mapping[str, Any]
    schema: int  # that they were recorded in
    sources: Sequence[Source]
    coefficients: Coefficients
    draw: RecordedDraw | None = None  # of `ckptavg.pipeline.swag`
    own_strategy: str | None  # a strategy that is none of ckptavg's, so that its settings have no known meaning

    @property
    def without_digest(self) -> Sequence[str]:
        """Names of the sources of which at least one file has no digest."""
        return [source.name for source in self.sources if not all(source.digests.values())]


class NotAnAverageError(InputError):
    """An output that cannot be rebuilt: a posterior, or a draw from one."""

    reason: Final = "is a posterior of swag, or was drawn from one, and not an average that its sources give again"


def read(output: Reader) -> RecordedProvenance:
    """Return the provenance in the metadata of ``output``.

    Raises:
        InputError: if there is none, an entry is missing, unknown or of a wrong type, or the coefficients are not what
            the strategy and its settings imply.
    """
    path, record = output.path, _parsed(output)
    schema = record["schema"]
    try:
        _check_entries(record, _ENTRIES, "", optional=("keep", "average", "derived", "runs"))
        for i, source in enumerate(record["sources"]):
            _check_entries(source, _SOURCE_1 if schema == 1 else _SOURCE, f"sources[{i}].")
        if schema == 1:
            _update(record)
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
        strategy = None if draw else constructed(record["strategy"], record["settings"])
        if strategy is not None:
            check_coefficients(record["strategy"], strategy, coefficients, record.get("runs"))
    except (ValueError, OverflowError) as error:
        recorded = record.get("version")
        other = isinstance(recorded, str) and recorded != version.own()
        hint = f"if it is as ckptavg {recorded} wrote it, verify it with that version" if other else None
        raise InputError(f"its ckptavg metadata is damaged: {error}", path=path, hint=hint) from error
    own = record["strategy"] if strategy is None and draw is None else None
    return RecordedProvenance(
        entries=record, schema=schema, sources=sources, coefficients=coefficients, draw=draw, own_strategy=own
    )  # fmt: skip


def _parsed(output: Reader) -> dict[str, Any]:
    """Return the JSON object of the provenance, of a known schema; its other entries may be anything."""
    text, path = output.metadata.get(provenance.KEY), output.path
    if text is None:
        raise InputError("has no ckptavg metadata, so its sources are unknown", path=path)
    try:
        record: Any = strict_json(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"its ckptavg metadata is not valid JSON: {error}", path=path) from error
    if isinstance(record, dict) and "posterior" in record:
        hint = "ckptavg swag --from FILE --samples N draws from a posterior"
        raise NotAnAverageError(NotAnAverageError.reason, path=path, hint=hint)
    schema = record.get("schema") if isinstance(record, dict) else None
    if type(schema) is not int or schema not in (1, provenance.SCHEMA):
        raise InputError("its ckptavg metadata is of another version", path=path, hint="use a newer ckptavg")
    return record


def difference(recorded: Any, rebuilt: Any, entry: str = "") -> str | None:
    """Describe the first entry in which two JSON values differ, also in type; None if they are equal."""
    pairs: Sequence[tuple[str, Any, Any]] = ()
    if isinstance(recorded, dict) and isinstance(rebuilt, dict) and recorded.keys() == rebuilt.keys():
        pairs = [(f"{entry}.{key}".removeprefix("."), recorded[key], rebuilt[key]) for key in sorted(rebuilt)]
    elif isinstance(recorded, list) and isinstance(rebuilt, list) and len(recorded) == len(rebuilt):
        pairs = [(f"{entry}[{i}]", a, b) for i, (a, b) in enumerate(zip(recorded, rebuilt, strict=True))]
    elif type(recorded) is not type(rebuilt) or recorded != rebuilt:
        return f"{entry} is {shown(recorded)}, but must be {shown(rebuilt)}"
    return next(filter(None, (difference(a, b, inner) for inner, a, b in pairs)), None)


def _check_entries(
    record: Any, kinds: Mapping[str, Callable[[Any], bool]], prefix: str, optional: Sequence[str] = ()
) -> None:
    """Raise ValueError naming the first entry that is missing, unknown or not of its kind.

    An entry that this version does not know might change the bytes, as a list of copied tensors does, so it must not be
    ignored.
    """
    if not isinstance(record, dict):
        raise ValueError(f"{prefix.removesuffix('.')} cannot be {shown(record)}")
    for name in sorted(kinds.keys() | record.keys()):
        if name not in kinds:
            raise ValueError(f"{prefix}{name[:100]} is not a known entry")
        if name not in record and name not in optional:
            raise ValueError(f"{prefix}{name} is missing")
        if name in record and not kinds[name](record[name]):
            raise ValueError(f"{prefix}{name} cannot be {shown(record[name])}")


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


def _are_digests(value: Any, prefix: str = "") -> bool:
    """Return whether ``value`` maps files of a checkpoint to digests less their ``prefix``, or to an empty text."""
    return (
        isinstance(value, dict)
        and len(value) > 0
        and all(map(_is_source_name, value))
        and all(text == "" or (isinstance(text, str) and algorithm_of(prefix + text)) for text in value.values())
    )


def _update(record: dict[str, Any]) -> None:
    """Rewrite a record of schema 1, whose digests are all SHA-256, as one of today's."""
    record["schema"] = provenance.SCHEMA
    for source in record["sources"]:
        sums = source.pop("sha256").items()
        source["digests"] = {name: digest and f"sha256:{digest}" for name, digest in sums}


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
    "digests": _are_digests,
}
_SOURCE_1: Final[Mapping[str, Callable[[Any], bool]]] = {
    **{name: kind for name, kind in _SOURCE.items() if name != "digests"},
    "sha256": lambda value: _are_digests(value, "sha256:"),
}
