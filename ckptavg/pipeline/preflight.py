"""Checks before a run: output, disk space and strategy settings; also the plan of a dry run."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from ckptavg import declaration
from ckptavg.average.weighted_sum import output_specs
from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.checkpoints.discover import Discovered
from ckptavg.errors import OutputError, OutputExistsError, TaskError, UsageError, counted, printable
from ckptavg.filesystem import atomic
from ckptavg.filesystem.regular_file import is_file, is_folder
from ckptavg.objective import PlainAverage, Strategy
from ckptavg.options import Options
from ckptavg.output import dcp_folder, hugging_face_folder, loader_files, sharded_files
from ckptavg.output.destination import check_suffix, preflight
from ckptavg.readers import sentence_transformers
from ckptavg.readers.sentence_transformers import MODULES
from ckptavg.score import Split
from ckptavg.strategies import name_of
from ckptavg.strategies.twa import LINEAR

if TYPE_CHECKING:
    import torch

    from ckptavg.objective.evaluator import Evaluator

_BY_SCORES: Final = "search by scores"  # the panel of its settings


def check_format(options: Options) -> None:
    """Refuse an output file whose name is that of a format which is not written."""
    if options.format == "safetensors":  # a directory of ``--format dcp`` may have any name, such as Lightning's .ckpt
        check_suffix(options.output)


def check_output(options: Options) -> None:
    """Refuse an output that cannot be written, and remove temporary files left by killed runs."""
    path, folder = options.destination
    if not options.dry_run:
        sharded_files.sweep(folder or path.parent, None if folder else path.name)
    if folder and is_folder(folder):
        hugging_face_folder.check(folder)
    if options.format == "dcp":
        dcp_folder.preflight(path, options.force)
    else:
        preflight(folder if folder and not is_folder(folder) else path, options.force)


def check_sources(found: Discovered, options: Options) -> None:
    """Refuse an output that would overwrite a candidate, or files that no loader reads as they are meant."""
    path, folder = options.destination
    like = found.checkpoints[-1]
    places = [(folder / name).resolve() for name in ("", *loader_files.folders(like))] if folder else []
    for file in (file for checkpoint in found.checkpoints for file in checkpoint.reader.files):
        inside = file.path.parent.resolve() in places and file.path.name.startswith(loader_files.STEMS)
        if file.path.resolve() == path.resolve() or inside:
            raise OutputExistsError("is one of the candidates", path=file.path, hint="choose another -o")
    if folder is None:
        return
    name = MODULES if like.reader.format == sentence_transformers.NAME else loader_files.file_name(like)
    largest = options.max_shard_size
    shards = largest and loader_files.division(like, output_specs([like], options.dtype), largest)
    if is_folder(folder):
        preflight(folder / name, options.force)
        if shards and is_file(folder / name):
            hint = "remove it, or choose another -o"
            raise OutputError("loaders would prefer it to the shards", path=folder / name, hint=hint)


def check_space(checkpoints: Sequence[Checkpoint], options: Options, files: int = 1) -> None:
    """Refuse ``files`` outputs, shaped like the candidates, that do not fit on the disk, or into their format."""
    path, folder = options.destination
    specs = output_specs(checkpoints, options.dtype)
    wide = next((name for name, spec in specs.items() if spec.in_file[0] == "C128"), None)
    if wide is not None and (options.format == "safetensors" or options.score_cmd is not None):
        hint = "--dtype float32 writes complex64; --format dcp has complex128"
        raise OutputError(f"{wide} is complex128, which safetensors does not have", path=path, hint=hint)
    needed = files * sum(spec.nbytes for spec in specs.values())
    needed *= 2 if options.format == "dcp" else 1  # see `ckptavg.output.dcp_folder.DcpFolder`
    free = atomic.free(path.parent if folder is None or is_folder(folder) else folder.parent)
    if options.adapter != "exact" and needed > free:
        raise OutputError(f"no space left on device: {needed:,} bytes are needed, {free:,} are free", path=path)


def check_strategy(strategy: Strategy, n: int, evaluator: Evaluator | None, runs: Sequence[int] = ()) -> None:
    """Refuse settings that the ``n`` candidates of these runs or the task, if there is one, cannot satisfy."""
    if evaluator is None and not isinstance(strategy, PlainAverage):
        message = f"{name_of(strategy)} learns from data, so it needs a task file, --val or --score-cmd"
        raise UsageError(message, hint="`ckptavg init` writes ./task.py")
    declaration.check(strategy)
    _check_solver(strategy, has_losses=evaluator is None or evaluator.losses is not None)
    splits: Sequence[Split] = ("train", "val", "test")
    splits = [each for each in splits if evaluator and evaluator.losses is not None and evaluator.has(each)]
    if isinstance(strategy, PlainAverage) and strategy.by_run:
        n = min(Counter(evaluator.runs if evaluator else runs).values())
    strategy.check(n, splits, bounded=evaluator is not None and evaluator.bounded)


def _check_solver(strategy: Strategy, *, has_losses: bool) -> None:
    """Raise UsageError for a setting of another solver than the one that runs, unless it has its default value."""
    settings = {setting.name: setting for setting in declaration.declared(type(strategy))}
    if "solver" not in settings:
        return
    solver, names = vars(strategy)["solver"], settings["solver"].choices
    if not has_losses and solver != settings["solver"].default:
        return  # it needs a loss, which `Strategy.learn` says
    runs = getattr(strategy, "runs", f"{solver} solver") if has_losses else _BY_SCORES
    groups = {f"{name} solver": f"the {name} solver" for name in names}
    groups |= {
        "both solvers": f"the {' and '.join(names)} solvers",
        _BY_SCORES: "the search by --score-cmd or --lm-eval",
        LINEAR: "the fit of --constraint linear",
    }
    for setting in settings.values():
        users = setting.help.solvers
        used = not groups.keys() & users or runs in users or (has_losses and "both solvers" in users)
        if not used and getattr(strategy, setting.name) != setting.default:
            of, hint = " or ".join(groups[user] for user in users if user in groups), f"leave out {setting.flag}"
            others = names if has_losses and runs != LINEAR else ()
            if other := next((name for name in others if f"{name} solver" in users), None):
                hint = f"--solver {other}, or {hint}"
            raise UsageError(f"{setting.flag} is a setting of {of}; {groups[runs]} does not use it", hint=hint)


@contextmanager
def naming(name: str, strategy: Strategy) -> Generator[None]:
    """Name the strategy in an error of its settings or of the task; options in the hint become its settings."""

    def setting(option: re.Match[str]) -> str:
        key = option[1].replace("-", "_")
        return f"{name.partition(':')[0]}:{key}={option[2]}" if key in vars(strategy) else option[0]

    try:
        yield
    except (TaskError, UsageError) as error:
        error.args = (printable(f"{name}: {error}"),)
        error.hint = error.hint and re.sub(r"--([a-z-]+) (\w+)", setting, error.hint)
        raise


def pick_device(name: str) -> torch.device:
    """Return the device for ``--device name``; raise UsageError if it does not exist or cannot be used."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        message = f"--device {name}: {str(error).splitlines()[0]}"
        raise UsageError(message, hint="use --device cpu, or auto for the best available") from error
    return device


def dry_run_plan(checkpoints: Sequence[Checkpoint], options: Options) -> list[str]:
    """Describe the reads, writes and memory of a run, one line each."""
    from ckptavg.candidates.plan import Plan

    n, first = len(checkpoints), checkpoints[0]
    written = sum(spec.nbytes for spec in output_specs(checkpoints, options.dtype).values())
    elements, device = sum(tensor.numel for tensor in set(first.tensors.values())), pick_device(options.device)
    memory = Plan(
        n=n, elements=elements, size=4 * elements, gradient=4 * elements,
        group_size=options.group_size, offload=options.offload, device=device,
    ).at(options.bits)  # fmt: skip
    path, folder = options.destination
    return [
        f"would read {counted(n, 'candidate')} of {first.size:,} bytes and "
        f"write {written:,} bytes to {folder / loader_files.file_name(checkpoints[-1]) if folder else path}",
        f"memory for learning with a float32 model: {memory}",
    ]
