"""The models of each step of a training job: one in the same place in all, or those that the user chooses."""

import os
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Final

from ckptavg.checkpoints import kinds, layouts
from ckptavg.checkpoints.steps import STEP_WORDS, numbers
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
    root: Path, steps: Sequence[Step], left_out: list[LeftOut], window: Window, *, files: int
) -> Iterator[tuple[Step, Mapping[str, Path]]]:
    """Yield each step with the one of its models that ``window`` chooses, or that it has in common with the others.

    A directory with several models beside steps that have one, of another place, is left out.
    """
    wanted = [(step, _wanted(step, window)) for step in steps]
    for step, models in wanted:
        if not models:
            reason = "left out by --include or --exclude" if window.component is None else f"has no {window.component}"
            left_out.append(LeftOut(path=step.folder, reason=reason))
    counts = Counter(place or file.name for _, models in wanted for place, file in models.items())
    if window.component is not None and not counts:
        has = Counter(place or file.name for step in steps for place, file in step.models.items())
        what = f"they have {_listing(list(has))}" if steps else "they are files"
        raise InputError(f"no checkpoint has the component {window.component}: {what}", path=root)
    single = [step for step, models in wanted if len(models) == 1]
    usual = {file.name for step in single for place, file in step.models.items() if not place}
    wanted = [(step, _with_usual_name(models, usual)) for step, models in wanted]
    crowded = [(step, models) for step, models in wanted if len(models) > 1]
    numbered = all(numbers(step.folder.name) for step, _ in crowded)
    nested = [each for each in crowded if _holds_steps(*each, numbered=numbered)]
    if nested and len(single) + files < 2:
        raise _one_level_too_high(root, nested)
    rest = [each for each in crowded if each not in nested]
    places = Counter(place for _, models in rest for place in models)
    patterns = Counter(kinds.pattern(place) for _, models in rest for place in models)
    if max(places.values(), default=0) > 1 or (len(single) + files == 0 and len(rest) == 1):
        raise _several_models(root, counts)
    if max(patterns.values(), default=0) > 1:
        raise _several_models(root, patterns)
    for step, models in wanted:
        if len(models) > 1:
            reason = f"a directory with {len(models)} models: {_listing(list(models))}; name it to average these"
            left_out.append(LeftOut(path=step.folder, reason=reason, kind="warning"))
        elif models:
            yield step, models


def _with_usual_name(models: Mapping[str, Path], usual: Set[str]) -> Mapping[str, Path]:
    """Return the one of several models whose name those have that are alone in their steps, unless one is an EMA."""
    same = [file for file in models.values() if file.name in usual]
    return {"": same[0]} if len(models) > 1 and len(same) == 1 and not any(map(kinds.is_ema, models)) else models


def _one_level_too_high(root: Path, nested: Sequence[tuple[Step, Mapping[str, Path]]]) -> InputError:
    folders: dict[Path, int] = {}
    for step, models in nested:
        above = [str(PurePosixPath(place).parent) for place in models]
        folders[step.folder / os.path.commonpath(above)] = len(models)
    inner = ", ".join(f"{count} in {folder.relative_to(root)}/" for folder, count in list(folders.items())[:_SHOWN])
    ways = " ".join(shlex.quote(str(folder)) for folder in folders)
    hint = f"name that directory: {ways}" if len(folders) == 1 else f"name one or several of them: {ways}"
    return InputError(f"has no checkpoints itself, but {inner}", path=root, hint=hint)


def _holds_steps(step: Step, models: Mapping[str, Path], *, numbered: bool) -> bool:
    """Return whether a directory looks like one of steps: its models differ in a number, and no job resumes from it.

    Of ``numbered`` directories, which may be steps with the parts of a model, the number must be that of a step.
    """
    inside = [place for place in models if numbers(place)]
    patterns = Counter(map(kinds.pattern, inside))
    steps = any(label in STEP_WORDS for place in inside for label in numbers(place))
    holds = max(patterns.values(), default=0) > 1 and not layouts.has_training_state(step.names)
    return holds and (steps or not numbered)


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
    names = (place, place.rpartition("/")[2], file.name)
    return place.startswith(f"{wish}/") or any(fnmatchcase(name, wish) for name in names)


def _listing(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
