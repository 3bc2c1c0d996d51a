"""Checks before a run: output, disk space and strategy settings; also the plan of a dry run."""

from collections.abc import Sequence
from typing import Final

from ckptavg.average.weighted_sum import output_specs
from ckptavg.candidates.plan import Plan
from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.checkpoints.discover import Discovered
from ckptavg.errors import OutputError, OutputExistsError, UsageError
from ckptavg.filesystem import atomic
from ckptavg.filesystem.regular_file import is_folder
from ckptavg.objective import PlainAverage, Strategy
from ckptavg.objective.evaluator import Evaluator
from ckptavg.options import Options
from ckptavg.output import dcp_folder, hugging_face_folder, sharded_files
from ckptavg.output.destination import preflight
from ckptavg.pipeline.objective_choice import pick_device
from ckptavg.score import Split
from ckptavg.strategies import name_of

_OUTPUT_PREFIXES: Final = ("model", "adapter_model")  # prefixes of the files written into an output directory


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
    """Refuse an output that would overwrite a candidate."""
    path, folder = options.destination
    path, folder = path.resolve(), folder and folder.resolve()
    for file in (file for checkpoint in found.checkpoints for file in checkpoint.reader.files):
        inside = folder is not None and file.path.parent.resolve() == folder
        if file.path.resolve() == path or (inside and file.path.name.startswith(_OUTPUT_PREFIXES)):
            raise OutputExistsError("is one of the candidates", path=file.path, hint="choose another -o")


def check_space(found: Discovered, options: Options) -> None:
    """Refuse an output that does not fit on the disk, before hours of work for it.

    Raises:
        OutputError: with the bytes needed and the bytes free.
    """
    path, folder = options.destination
    needed = sum(spec.nbytes for spec in output_specs(found.checkpoints[0], options.dtype).values())
    needed *= 2 if options.format == "dcp" else 1  # see `ckptavg.output.dcp_folder.DcpFolder`
    free = atomic.free(path.parent if folder is None or is_folder(folder) else folder.parent)
    if options.adapter != "exact" and needed > free:
        raise OutputError(f"no space left on device: {needed:,} bytes are needed, {free:,} are free", path=path)


def check_strategy(strategy: Strategy, n: int, evaluator: Evaluator | None) -> None:
    """Refuse settings that the candidates or the task cannot satisfy, before hours of work.

    Args:
        strategy: strategy with its settings.
        n: number of candidates.
        evaluator: scores mixtures; None without a task.
    """
    if evaluator is None and not isinstance(strategy, PlainAverage):
        raise UsageError(
            f"{name_of(strategy)} learns from data, so it needs a task file, --val or --score-cmd",
            hint="`ckptavg init` writes ./task.py",
        )
    splits: Sequence[Split] = ("train", "val", "test")
    if evaluator is not None and evaluator.losses is not None:
        splits = [split for split in splits if evaluator.has(split)]
    strategy.check(n, splits, bounded=evaluator is not None and evaluator.bounded)


def dry_run_plan(checkpoints: Sequence[Checkpoint], options: Options) -> list[str]:
    """Describe the reads, writes and memory of a run, one line each."""
    first = checkpoints[0]
    path, _ = options.destination
    written = sum(spec.nbytes for spec in output_specs(first, options.dtype).values())
    n, elements, device = len(checkpoints), first.numel, pick_device(options.device)
    memory = Plan(
        n=n, elements=elements, size=4 * elements, gradient=4 * elements,
        group_size=options.group_size, offload=options.offload, device=device,
    ).at(options.bits)  # fmt: skip
    return [
        f"would read {n} candidates of {first.size:,} bytes and write {written:,} bytes to {path}",
        f"memory for learning with a float32 model: {memory}",
    ]
