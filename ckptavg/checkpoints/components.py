"""The models of each step of a training job: one in the same place in all, or those that the user chooses."""

import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ckptavg.checkpoints import kinds, layouts
from ckptavg.checkpoints.steps import numbers
from ckptavg.checkpoints.window import Window
from ckptavg.errors import InputError

_SHOWN: Final = 8


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A file or directory that is not a candidate, and the reason; ``kind`` is info, warning or bad."""

    path: Path
    reason: str
    kind: str = "info"
    hint: str | None = None  # a way out, of a bad one

    @property
    def line(self) -> str:
        """Path and reason; the reason of a bad file is an error message that starts with the path."""
        return self.reason if self.kind == "bad" else f"{self.path}: {self.reason}"


@dataclass(frozen=True)
class Step:
    """A directory, its entries, and the weights in it by their places: ``""`` if there are no others."""

    folder: Path
    names: Set[str]
    models: Mapping[str, Path]


def chosen(
    root: Path, steps: Sequence[Step], left_out: list[LeftOut], window: Window, *, alone: bool
) -> Iterator[tuple[Step, Mapping[str, Path]]]:
    """Yield each step with the one of its models that ``window`` chooses, or that it has in common with the others.

    A directory with several models beside steps that have one, of another place, is left out.
    """
    wanted = [(step, _wanted(step, window)) for step in steps]
    for step, models in wanted:
        if not models:
            reason = "left out by --include or --exclude" if window.component is None else f"has no {window.component}"
            left_out.append(LeftOut(path=step.folder, reason=reason))
    counts = Counter(place for _, models in wanted for place in models)
    if window.component is not None and not counts:
        has = Counter(place or file.name for step in steps for place, file in step.models.items())
        what = f"they have {_listing(list(has))}" if steps else "they are files"
        raise InputError(f"no checkpoint has the component {window.component}: {what}", path=root)
    crowded = [(step, models) for step, models in wanted if len(models) > 1]
    if crowded and alone and len(crowded) == len(wanted) and all(_holds_steps(*each) for each in crowded):
        inner = ", ".join(f"{len(models)} in {step.folder.name}/" for step, models in crowded[:_SHOWN])
        ways = " ".join(shlex.quote(str(step.folder)) for step, _ in crowded)
        hint = f"name that directory: {ways}" if len(crowded) == 1 else f"name one or several of them: {ways}"
        raise InputError(f"has no checkpoints itself, but {inner}", path=root, hint=hint)
    common = any(counts[place] > 1 for _, models in crowded for place in models)
    if crowded and (common or (alone and len(crowded) == len(wanted))):
        raise _several_models(root, counts)
    for step, models in wanted:
        if len(models) > 1:
            reason = f"a directory with {len(models)} models: {_listing(list(models))}; name it to average these"
            left_out.append(LeftOut(path=step.folder, reason=reason, kind="warning"))
        elif models:
            yield step, models


def _holds_steps(step: Step, models: Mapping[str, Path]) -> bool:
    """Return whether a directory looks like one of steps: its models differ in a number, and no job resumes from it."""
    patterns = Counter(kinds.pattern(place) for place in models if numbers(place))
    return max(patterns.values(), default=0) > 1 and not layouts.has_training_state(step.names)


def _several_models(root: Path, counts: Mapping[str, int]) -> InputError:
    models = [f"{place} ({count})" for place, count in counts.items()]
    ways = [f"--component {shlex.quote(place)}" for place in counts]
    hint = f"choose with {' or '.join(ways[:_SHOWN])}"
    return InputError(f"each step has several models: {_listing(models)}", path=root, hint=hint)


def _wanted(step: Step, window: Window) -> Mapping[str, Path]:
    models = step.models
    if (wish := window.component) is not None:
        models = {place: file for place, file in models.items() if _is_component(place, file, wish.strip("/"))}
    if len(models) > 1:
        name = step.folder.name
        models = {place: file for place, file in models.items() if window.admits(f"{name}/{place}")}
    return models


def _is_component(place: str, file: Path, wish: str) -> bool:
    return wish in (place, place.rpartition("/")[2], file.name) or place.startswith(f"{wish}/")


def _listing(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
