"""Model card of an output directory, written once the model is complete: a card that fails costs no model."""

import json
import shlex
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.declaration import RUN, WORKERS, Option, declared
from ckptavg.errors import InputError, OutputError, printable
from ckptavg.filesystem.strict_json import read_json
from ckptavg.objective import Strategy
from ckptavg.options import Options
from ckptavg.options.follow import FOLLOW
from ckptavg.output import model_card
from ckptavg.pipeline.session import Session
from ckptavg.report import as_json
from ckptavg.report.model_card import Source, section
from ckptavg.report.result import Result
from ckptavg.strategies import name_of

_TAGS: Final = ("checkpoint-averaging",)
_LIBRARIES: Final = {
    "transformers": "transformers", "diffusers": "diffusers", "peft": "peft",
    "sentence_transformers": "sentence-transformers",
}  # fmt: skip
_PLACES: Final = ("task", "val", "train", "test", "base")  # paths, of which only the last name is shown
_UNSHOWN: Final = (  # of this machine, or without an effect on the model
    "output", "force", "dry_run", "device", "task_timeout", "score_timeout", "score_jobs", "keep_failed", *FOLLOW,
)  # fmt: skip


def with_card(result: Result, this: Session, strategy: Strategy) -> Result:
    """Write the card of a result in its output directory, if it has one; a failure is among the result's warnings."""
    folder, output = this.options.destination[1], result.output
    if folder is None or output is None:
        return result

    def write() -> str:
        try:
            block = model_card.metadata(_metadata(folder, result.next_steps["load"]))
            if model_card.write(folder, block, _section(result, this, strategy, folder)):
                return ""
        except OutputError as error:
            return f"no model card was written: {error}"
        place = f"{folder / model_card.NAME} is not of ckptavg, and was left as it is"
        return f"{place}: with the lines {model_card.START} and {model_card.END} in it, a run writes between them"

    warning = this.run.workers.on_rank_zero(write)
    return replace(result, warnings=[*result.warnings, warning]) if warning else result


def _section(result: Result, this: Session, strategy: Strategy, folder: Path) -> str:
    assert result.output is not None
    name = folder.resolve().name or "averaged"
    load = result.next_steps["load"]
    if folder.name:  # not the working directory
        load = load.replace(f'"{_quoted(str(folder))}', f'"{_quoted(name)}')
    file = shlex.quote(printable(f"{name}/{result.output.path.relative_to(folder)}"))
    command = shlex.join(["ckptavg", name_of(strategy), "CKPTS", *_flags(strategy, this.options), "-o", f"{name}/"])
    objects = ["# its task was given as Python objects"] if this.options.objects is not None else []
    rebuild = [*objects, command, f"ckptavg verify {file} --sources CKPTS"]
    return section(as_json.to_dict(result), _sources(result, this.checkpoints), rebuild, load)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _sources(result: Result, checkpoints: Sequence[Checkpoint]) -> list[Source]:
    digests, sources = result.output.source_digests if result.output else {}, list[Source]()
    for candidate, checkpoint in zip(result.candidates, checkpoints, strict=True):
        betas = candidate.coefficient if isinstance(candidate.coefficient, tuple) else (candidate.coefficient,)
        if any(betas):
            files = {name: digests.get(str(file.path), "") for name, file in checkpoint.reader.named_files.items()}
            own = {name: digest for name, digest in files.items() if digest}
            sources.append(Source(name=checkpoint.name, step=candidate.step, coefficients=betas, digests=own))
    return sources


def _metadata(folder: Path, load: str) -> dict[str, str | Sequence[str] | None]:
    """Return what is known of the model in the Hub's words."""
    base = relation = None
    for name, key in (("adapter_config.json", "base_model_name_or_path"), ("config.json", "_name_or_path")):
        with suppress(InputError):
            config: Any = read_json(folder / name)
            base = model_card.hub_id(config.get(key)) if isinstance(config, dict) else None
        if base is not None:
            relation = "adapter" if name == "adapter_config.json" else None
            break
    library = _LIBRARIES.get(load.partition(".")[0])
    return {"base_model": base, "base_model_relation": relation, "library_name": library, "tags": _TAGS}


def _flags(strategy: Strategy, options: Options) -> Iterator[str]:
    """Yield the flags that choose this model: without directories, and without a command, which may have secrets."""
    own = declared(type(strategy))
    for values, taken in ((strategy, own), (options, declared(Options))):
        for option in taken:
            shown = option.help.panel not in (RUN, WORKERS) and option.name not in _UNSHOWN
            value = getattr(values, option.name)
            if shown and value is not None and (value != option.default or option.name == "k"):
                yield from _flag(option, value)


def _flag(option: Option, value: Any) -> Iterator[str]:
    if isinstance(value, bool):
        yield option.flag if value else f"--no-{option.flag.removeprefix('--')}"
        return
    for text in value if isinstance(value, list | tuple) else [value]:
        if option.name == "score_cmd":
            text = "…"
        elif option.name in _PLACES and not (option.name == "base" and model_card.hub_id(text)):
            text = Path(text).name
        yield from (option.flag, printable(str(text)))
