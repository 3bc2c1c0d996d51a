"""Find the score in the output of a command, or refuse an output in which several numbers could be meant."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

from ckptavg.errors import TaskError

_FIGURE: Final = r"[-+]?(?:(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?|nan|inf(?:inity)?)"
_NUMBER: Final = re.compile(rf"(?<![\w.]){_FIGURE}(?!\w|\.\w)", re.IGNORECASE)
_WORD: Final = r"\(?[^\W\d][\w@./%+()\[\]-]*"
_ALONE: Final = re.compile(rf"(?:{_WORD}(?: +{_WORD})* *[:=] *)?({_FIGURE}) *%?", re.IGNORECASE)
_OBJECT: Final = re.compile(r"^[ \t]*(?=\{)", re.MULTILINE)
_ESCAPE: Final = re.compile(r"\x1b\[[\d;?]*[A-Za-z]")  # colours
_SHOWN: Final = 100  # characters of a line that are shown


class PrintedScore(NamedTuple):
    """The number that a command printed, and the text that it was read from."""

    number: float
    text: str


def read_score(output: str, key: str | None = None) -> PrintedScore | None:
    """Return the score in the output of a command; None if there is no number where it should be.

    With ``key``, it is that entry of the last JSON object that has it. Else it is the only number of the last line,
    which has nothing else but a name and ``:`` or ``=`` before it; the only number of a JSON object at the end; or
    the only number at all. ``91.2%`` is 91.2.

    Raises:
        TaskError: if several numbers could be meant.
    """
    output = _ESCAPE.sub("", output).replace("\r", "\n").replace("−", "-")  # a progress bar returns to the line's start
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    objects = list(_objects(output))
    if key is not None:
        named = [value for value, _ in objects if isinstance(_at(value, key), float)]
        return _entry(key, _at(named[-1], key)) if named else None
    if lines and (alone := _ALONE.fullmatch(lines[-1])):
        return PrintedScore(float(alone[1]), _cut(lines[-1]))
    if objects and not output[objects[-1][1] :].strip():
        entries = dict(_entries(objects[-1][0]))
        if len(entries) > 1:
            message = f"--score-cmd printed a JSON object with several numbers: {_cut(', '.join(entries))}"
            raise TaskError(message, hint="choose one of them with --score-key")
        return next((_entry(*entry) for entry in entries.items()), None)
    numbers = list(_NUMBER.finditer(output))
    if len(numbers) > 1:
        message = f"--score-cmd printed several numbers, and not one alone on the last line: {_cut(lines[-1])}"
        raise TaskError(message, hint="print the score last, as in accuracy=0.91, or JSON for --score-key")
    line = next((line for line in lines if _NUMBER.search(line)), "")
    return PrintedScore(float(numbers[0].group()), _cut(line)) if numbers else None


def numbers_by_key(output: str) -> list[str]:
    """Return the keys of all numbers in the last JSON object of the output, for an error."""
    objects = list(_objects(output))
    return [key for key, _ in _entries(objects[-1][0])] if objects else []


def _objects(output: str) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield the JSON objects that have lines of their own, and the index after each."""
    decoder, end = json.JSONDecoder(parse_int=float), 0
    for match in _OBJECT.finditer(output):
        if match.start() < end:
            continue  # inside of the one before
        try:
            value, after = decoder.raw_decode(output, match.end())
        except (ValueError, RecursionError):
            continue
        if not output[after:].partition("\n")[0].strip():
            end = after
            yield value, end


def _entries(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, inner in value.items():
        if isinstance(inner, dict):
            yield from _entries(inner, f"{prefix}{name}.")
        elif isinstance(inner, float):
            yield f"{prefix}{name}", inner


def _at(value: Any, key: str) -> Any:
    if not isinstance(value, dict) or key in value or "." not in key:
        return value.get(key) if isinstance(value, dict) else None
    head, _, rest = key.partition(".")
    return _at(value.get(head), rest)


def _entry(key: str, number: float) -> PrintedScore:
    return PrintedScore(number, f"{key}={number!r}")


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
