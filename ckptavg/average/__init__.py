"""Compute the output's bytes: the weighted average, or a LoRA adapter that is exact in weight space."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

from ckptavg.average import derived, lora, lora_config, lora_file
from ckptavg.average.runs import part
from ckptavg.average.weighted_sum import AddedNoise, PlannedOutput, not_averaged, output_specs
from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.checkpoints.derived import Derived
from ckptavg.checkpoints.integrity import same_bytes
from ckptavg.coefficients import Coefficients
from ckptavg.errors import InputError, UsageError
from ckptavg.readers import ITEM_SIZE
from ckptavg.runtime.workers import ALONE, Workers


def check(checkpoints: Sequence[Checkpoint], mode: Literal["factors", "exact"]) -> None:
    """Check that adapters are compatible and, in exact mode, that their exact average exists.

    Raises:
        DisagreementError: if adapters differ in their base model or in how their factors are scaled.
        UsageError: if ``mode`` is exact and the candidates are not adapters.
        InputError: if adapters of this kind cannot be averaged exactly.
    """
    if lora_config.read_config(checkpoints[0]) is None:
        if mode == "exact":
            raise UsageError("--adapter exact needs PEFT adapters, but the candidates have no adapter_config.json")
        lora_file.check_files(checkpoints)
        return
    config = lora_config.check(checkpoints)
    if mode == "exact" and (reason := lora_config.obstacle(checkpoints[0], config)):
        raise InputError(reason, path=checkpoints[0].path, hint="--adapter factors averages them approximately")


def plan_output(
    checkpoints: Sequence[Checkpoint], coefficients: Coefficients, *, dtype: str | None = None,
    mode: Literal["factors", "exact"] = "factors", rank: int | None = None, workers: Workers = ALONE,
    noise: AddedNoise | None = None,
) -> PlannedOutput:  # fmt: skip
    """Plan the average of ``checkpoints``.

    Args:
        checkpoints: all candidates, open.
        dtype: dtype of the output's floating-point tensors; None keeps the candidates' dtypes.
        mode: how adapters are averaged; see `ckptavg.average.lora`.
        rank: rank of an exact adapter; None keeps the full rank.
        workers: the ranks that share the work; each computes a part of the bytes, but only rank 0 an exact adapter.
        noise: see `ckptavg.average.weighted_sum.weighted_average`; a draw's factors are no approximation of others.
    """
    first = checkpoints[0]
    if mode == "exact":
        exact = lora.exact(checkpoints, coefficients, rank, dtype)
        return exact if workers.is_rank_zero else replace(exact, parts=iter(()))
    error, notes = None, list[str]()
    if len(coefficients.selected) > 1 and not first.kept and not first.allow_nonfinite and noise is None:
        error, notes = _error_of_factors(checkpoints, coefficients)
    specs, only = output_specs(checkpoints, dtype), part(first, workers.rank, workers.world_size)
    functions, copied = first.derived or Derived(), set[str]()
    selected = [checkpoints[i] for i in coefficients.selected]
    notes += [note for note, names in functions.notes.items() if not all(same_bytes(selected, name) for name in names)]
    single = len(selected) == 1  # of one candidate everything is its own
    elsewhere = {name for names in functions.kinds.values() for name in names} if single else functions.vectors
    return PlannedOutput(
        specs=specs, parts=derived.average(checkpoints, coefficients, specs, only=only, copied=copied, noise=noise),
        notes=notes, factor_error=error, copied=copied, derived={} if single else functions.kinds,
        not_averaged=[name for name in not_averaged(first) if name not in elsewhere],
    )  # fmt: skip


def _error_of_factors(checkpoints: Sequence[Checkpoint], coefficients: Coefficients) -> tuple[float | None, list[str]]:
    """Return the error of averaging factors where an exact adapter can be written; elsewhere notes about it."""
    first = checkpoints[0]
    config = lora_config.read_config(first)
    if kind := lora_file.other_kind(first):
        return None, [
            f"{kind}: its tensors are averaged one by one, which is not the average of what they do to the weights"
        ]
    if config is not None and not lora_config.obstacle(first, config):
        return lora.factor_error(checkpoints, coefficients), []
    dora = lora_file.has_magnitude(first)
    scaling = config if config is not None and dora else lora_file.read_file_config(first) if config is None else None
    if scaling is None:
        return None, []
    note = (
        f"averaging the adapter's factors is {lora.factor_error(checkpoints, coefficients, scaling):.1%} off the exact"
    )
    rest = "average; that cannot be written here, because there is no adapter_config.json"
    if dora:
        rest = "average of their products; DoRA's magnitudes are averaged too, and are not part of this figure"
    return None, [f"{note} {rest}"]


def held_in_memory(plan: PlannedOutput) -> Callable[[str, int, memoryview], None]:
    """Compute the bytes of a small output, and return the function that reads them."""
    contents = {name: bytearray(spec.nbytes) for name, spec in plan.specs.items()}
    for name, offset, data in plan.parts:
        contents[name][offset : offset + len(data)] = data

    def read_into(name: str, start: int, out: memoryview) -> None:
        first = start * ITEM_SIZE[plan.specs[name].dtype]
        out[:] = contents[name][first : first + len(out)]

    return read_into
