"""Training step of a checkpoint: from its contents, then from all names together, never from its modification time."""

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final, NamedTuple

from ckptavg.errors import InputError, UsageError
from ckptavg.filesystem.strict_json import read_json
from ckptavg.readers import Reader

STEP_KEYS: Final = (
    "global_step", "num_updates", "batch_idx_train", "iter_num", "iteration", "ss_steps", "step", "epoch", "ss_epoch",
)  # fmt: skip
# side files with the step, relative to the checkpoint's directory: the Trainer's, LeRobot's
_STEP_FILES: Final = {"trainer_state.json": "global_step", "training_state/training_step.json": "step"}
STEP_WORDS: Final = (  # by preference
    "step", "steps", "globalstep", "iter", "iters", "iteration", "iterations", "it", "update", "updates", "batch", "ba",
    "epoch", "epochs", "ep", "e", "stage", "phase", "round", "cycle",
)  # fmt: skip
METRICS: Final = (
    "loss", "nll", "ce", "mse", "rmse", "mae", "err", "error", "acc", "accuracy", "auc", "auroc", "map", "iou", "miou",
    "dice", "score", "metric", "ppl", "perplexity", "bleu", "rouge", "wer", "cer", "psnr", "ssim", "fid", "lpips",
    "reward", "return", "precision", "recall", "spearman", "pearson", "corr", "mrr", "hits", "bpc", "bpb", "lr", "wd",
)  # fmt: skip
_NUMBERED_METRICS: Final = re.compile(r"(?:f1|r2|top[-_]?[0-9]+|map50|(?:hits|p|recall)@[0-9]+|bleu[0-9])(?![0-9])")
_HASH: Final = re.compile(r"(?<![a-z0-9])[0-9a-f]{7,}(?![a-z0-9])")
_DATE: Final = (
    r"(?:19|20)\d\d(?P<dash>[-_.]?)(?:0[1-9]|1[0-2])(?P=dash)(?:0[1-9]|[12]\d|3[01])"
    r"(?:[-_T+ .]*(?:[01]\d|2[0-3])(?P<colon>[-_:.h]?)[0-5]\d(?:(?P=colon)[0-5]\d)?)?(?!\d)"
)
_OTHER_DATE: Final = r"\d{1,2}(?P<dot>[-_.])\d{1,2}(?P=dot)(?:(?:19|20)\d\d|\d\d)(?!\d)"  # days or months first
_TOKEN: Final = re.compile(
    rf"(?P<date>(?<!\d){_DATE})|(?P<other>(?<![\d.]){_OTHER_DATE})|(?P<number>\d+(?P<decimal>\.\d+)?(?P<power>e[-+]?\d+|[kmb](?![a-z]))?)|(?P<word>[^\W\d_]+)",
    re.ASCII | re.IGNORECASE,
)


class Number(NamedTuple):
    """A number in a name: its value, None if it cannot be a step, and where it is."""

    value: int | None
    is_date: bool
    is_metric: bool
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class Column:
    """A number that every one of several names has in the same place; ``label`` is the word beside it."""

    label: str
    values: tuple[int, ...]
    is_date: bool = False
    is_metric: bool = False

    @property
    def preference(self) -> int:
        """Index of its word among the words that stand for a step; their number if it is none of them."""
        return STEP_WORDS.index(self.label) if self.label in STEP_WORDS else len(STEP_WORDS)


class AmbiguousStepError(Exception):
    """Several numbers in the names could be the step."""

    def __init__(self, columns: Sequence[Column]) -> None:
        super().__init__()
        self.columns = columns


def steps_inside(reader: Reader) -> dict[str, int]:
    """Return the training steps recorded in the file: key → number, for each of `STEP_KEYS` that it has."""
    steps: dict[str, int] = {}
    for key in STEP_KEYS:
        value = _updates(reader) if key == "num_updates" else reader.tree.get(key)
        if isinstance(value, bool) or value is None:
            value = reader.metadata.get(key)
        if type(value) is int or (isinstance(value, str) and re.fullmatch("[0-9]{1,18}", value)):
            steps[key] = int(value)
    return steps


def _updates(reader: Reader) -> object:
    """Return fairseq's ``num_updates`` of the last optimizer."""
    history = reader.tree.get("optimizer_history")
    last = history[-1] if isinstance(history, Sequence) and not isinstance(history, str) and history else None
    return last.get("num_updates") if isinstance(last, Mapping) else None


def rates_beside(folder: Path) -> dict[int, float]:
    """Return the learning rates in the Trainer's log beside a checkpoint: step → rate, by step; empty without one."""
    with suppress(InputError):
        state = read_json(folder / "trainer_state.json")
        log = state.get("log_history") if isinstance(state, dict) else None
        entries = [entry for entry in log if isinstance(entry, dict)] if isinstance(log, list) else []
        pairs = [(entry.get("step"), entry.get("learning_rate")) for entry in entries]
        return dict(sorted((step, float(rate)) for step, rate in pairs if type(step) is int and type(rate) is float))
    return {}


def steps_beside(folder: Path) -> dict[str, int]:
    """Return the training step in the side files of a checkpoint's directory: key → number."""
    for file, key in _STEP_FILES.items():
        if os.path.lexists(folder / file):
            state = read_json(folder / file)
            step = state.get(key) if isinstance(state, dict) else None
            if type(step) is int:
                return {key: step}
    return {}


def numbers(name: str) -> dict[str, Number]:
    """Return the numbers of a name by the word beside each.

    ``1e5``, ``10k`` and ``1M`` are numbers; one with a decimal point, a negative one and one behind the name of a
    metric are no steps. The word is the one before the number, or the one after it if that alone stands for a step, as
    in ``3-EPOCH`` and ``1000_steps``; a second number behind the same word is labelled ``word 2``.
    """
    lower = _HASH.sub(lambda match: "-" * len(match[0]) if _is_hash(match[0]) else match[0], name.lower())
    metrics = _NUMBERED_METRICS.sub(lambda match: "loss".ljust(len(match[0]), "_"), lower)
    tokens = [*_TOKEN.finditer(metrics if len(metrics) == len(name) else name)]
    found: dict[str, Number] = {}
    word = ""
    for i, token in enumerate(tokens):
        if token["word"]:
            attached = i + 1 < len(tokens) and tokens[i + 1].start() == token.end()
            word = token["word"] if attached or token["word"] != "e" else ""
            continue
        after = tokens[i + 1]["word"] if i + 1 < len(tokens) else None
        ends = i + 2 >= len(tokens) or bool(tokens[i + 2]["word"])
        label = after if after in STEP_WORDS and ends and word not in STEP_WORDS else word
        is_date = bool(token["date"]) and label not in STEP_WORDS
        value = None if token["other"] else _date(token[0]) if is_date else _integer(token)
        negative = token.string[: token.start()].endswith("=-")
        count = sum(other == label or other.startswith(f"{label} ") for other in found)
        key = f"{label} {count + 1}" if count else label
        is_metric = not count and (label or after) in METRICS
        found[key] = Number(None if negative else value, is_date, is_metric, *token.span())
    return found


def _is_hash(text: str) -> bool:
    """Return whether letters and digits alternate, as in a digest, and not as in ``ba1000000``."""
    return len(re.findall(r"[a-f]+|[0-9]+", text)) > 2


def _date(text: str) -> int:
    return int(re.sub(r"\D", "", text).ljust(14, "0"))


def _integer(token: re.Match[str]) -> int | None:
    text, power = token["number"] or re.sub(r"\D", "", token[0]), token["power"] or ""
    if power in ("k", "m", "b"):
        text, power = text[:-1], {"k": "e3", "m": "e6", "b": "e9"}[power]
        text += power
    if not power:
        return None if token["decimal"] else int(text[:18])
    value = float(text) if len(text) < 20 else 0.5
    return int(value) if value.is_integer() and value < 1e18 else None


def columns(names: Sequence[str]) -> list[Column]:
    """Return the numbers that all ``names`` have behind the same word, each an integer in every one.

    Without such a word, the only number of each name is a column where some are behind one word for a step, and no
    other is a part of a word.
    """
    read = [numbers(name) for name in names]
    shared = [label for label in read[0] if all(label in one for one in read)] if read else []
    found: list[Column] = []
    for label in shared:
        values = tuple(one[label].value for one in read if one[label].value is not None)
        if len(values) == len(read):
            is_date, is_metric = (any(getattr(one[label], flag) for one in read) for flag in ("is_date", "is_metric"))
            found.append(Column(label=label, values=values, is_date=is_date, is_metric=is_metric))  # pyright: ignore[reportArgumentType]
    only = [[(label, n) for label, n in one.items() if n.value is not None and not n.is_date] for one in read]
    if not shared and all(len(numbers) == 1 for numbers in only):
        words = {label for ((label, _),) in only if label in STEP_WORDS}
        others = [
            name[number.start - 1 : number.start]
            for name, ((label, number),) in zip(names, only, strict=True)
            if label not in words
        ]
        if len(words) == 1 and not any(map(str.isalpha, others)):
            values = tuple(number.value for ((_, number),) in only if number.value is not None)
            found.append(Column(label=words.pop(), values=values))
    return found


def pattern_of(names: Sequence[str], label: str) -> str | None:
    """Return a short regular expression whose group is the number ``label`` in all ``names``; None if there is none."""
    places = [numbers(name)[label] for name in names if label in numbers(name)]
    if len(places) < len(names):
        return None
    plain = all(name[place.start : place.stop].isdigit() for name, place in zip(names, places, strict=True))
    group = r"(\d+)" if plain else r"(\d+(?:\.\d+)?(?:[kMB]|e\d+)?)"
    before = names[0][: places[0].start]
    starts = [match.start() for match in re.finditer(r"[^\W\d_]+", before)]
    for start in (*reversed(starts), 0):
        parts = (r"\d+" if part.isdigit() else re.escape(part) for part in re.split("([0-9]+)", before[start:]))
        pattern = "".join(parts) + group
        found = [re.search(pattern, name) for name in names]
        if all(m and m.span(1) == (place.start, place.stop) for m, place in zip(found, places, strict=True)):
            return pattern
    return None


def step_column(names: Sequence[str], runs: Sequence[int]) -> Column | None:
    """Return the column of ``names`` that is the training step, or None if no number tells the names apart.

    It differs between all names of a run. Of several, those beside a word such as ``step`` or ``epoch`` count before
    others, and dates last.

    Raises:
        AmbiguousStepError: if two columns remain, or another one that counts as much ranks the names otherwise.
    """
    every = columns(names)
    found = [column for column in every if not column.is_metric]
    distinct = [column for column in found if is_distinct(column.values, runs)]
    if len(names) == 1:
        return min(reversed(distinct), key=lambda column: (column.is_date, column.preference), default=None)
    worded = sorted((c for c in found if c.label in STEP_WORDS), key=lambda c: c.preference)
    plain = [c for c in found if c not in worded]
    first = [c for c in worded if c in distinct][:1]
    several = [c for c in plain if c in distinct and not c.is_date]
    if not first and len(several) > 1:
        raise AmbiguousStepError(several)
    first = first or several or [c for c in plain if c in distinct]
    if first:
        rivals = worded if first[0] in worded else [*worded, *plain]
        if other := next((c for c in rivals if not agree(first[0].values, c.values)), None):
            raise AmbiguousStepError([first[0], other])
        return first[0]
    if doubtful := [c for c in every if c.is_metric and is_distinct(c.values, runs)]:
        raise AmbiguousStepError(doubtful)
    # two files a step, as raw and averaged weights: the caller names them
    repeated = [c for c in found if c.label in STEP_WORDS or len(set(c.values)) > 1]
    return min(repeated, key=lambda column: column.preference, default=None)


def agree(fine: Sequence[int], coarse: Sequence[int]) -> bool:
    """Return whether ``coarse`` never falls in the order of ``fine``."""
    ordered = [c for _, c in sorted(zip(fine, coarse, strict=True))]
    return all(a <= b for a, b in pairwise(ordered))


def is_distinct(values: Sequence[int], runs: Sequence[int]) -> bool:
    """Return whether no value occurs twice in a run."""
    return len(set(zip(runs, values, strict=True))) == len(values)


def steps_in_name(name: str) -> dict[str, int]:
    """Return every number in the parts of a path that could be its step, by part, counted from the end, and word."""
    return {
        f"name {level} {label}": number.value
        for level, part in enumerate(reversed(name.split("/")))
        for label, number in numbers(part).items()
        if number.value is not None
    }


def step_by_pattern(pattern: re.Pattern[str], name: str) -> int | None:
    """Return the number that ``pattern`` finds in a name: its group, or the whole match; None if it finds none.

    Raises:
        UsageError: if the group is no whole number, but a part of one or a text.
    """
    if not (match := pattern.search(name)):
        return None
    start, stop = match.span(1 if pattern.groups else 0)
    values = [number.value for number in numbers(name[start:stop]).values()]
    texts = {part[n.start : n.stop] for part in name.split("/") for n in numbers(part).values()}
    if len(values) != 1 or values[0] is None or name[start:stop] not in texts:
        message = f"--step-from {pattern.pattern} finds {name[start:stop]!r} in {name}, which is not one whole number"
        raise UsageError(message, hint=r"its group must be the number, as in 'step=(\d+)'")
    return values[0]


def natural(name: str) -> tuple[tuple[int, str] | tuple[int, int, str], ...]:
    """Return a sort key that puts step-9 before step-10."""
    parts = [part for part in re.split(r"([0-9]+)", name) if part]
    return tuple((1, int(part), part) if part.isascii() and part.isdigit() else (0, part) for part in parts)
