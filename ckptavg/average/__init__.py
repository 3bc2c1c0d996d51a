"""Compute the output's bytes: the weighted average, or a LoRA adapter that is exact in weight space."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

from ckptavg.average import lora, lora_config
from ckptavg.average.weighted_sum import PlannedOutput, not_averaged, output_specs, part, weighted_average
from ckptavg.checkpoints.checkpoint import Checkpoint
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
        return
    config = lora_config.check(checkpoints)
    if mode == "exact" and (reason := lora_config.obstacle(checkpoints[0], config)):
        raise InputError(reason, path=checkpoints[0].path, hint="--adapter factors averages them approximately")


def plan_output(
    checkpoints: Sequence[Checkpoint], coefficients: Coefficients, *, dtype: str | None = None,
    mode: Literal["factors", "exact"] = "factors", rank: int | None = None, workers: Workers = ALONE,
) -> PlannedOutput:  # fmt: skip
    """Plan the average of ``checkpoints``.

    Args:
        checkpoints: all candidates, open.
        dtype: dtype of the output's floating-point tensors; None keeps the candidates' dtypes.
        mode: how adapters are averaged; see `ckptavg.average.lora`.
        rank: rank of an exact adapter; None keeps the full rank.
        workers: the ranks that share the work; each computes a part of the bytes, but only rank 0 an exact adapter.
    """
    first = checkpoints[0]
    if mode == "exact":
        exact = lora.exact(checkpoints, coefficients, rank, dtype)
        return exact if workers.is_rank_zero else replace(exact, parts=iter(()))
    config, error = lora_config.read_config(first), None
    averages = len(coefficients.selected) > 1 and not first.kept and not first.allow_nonfinite
    if config is not None and averages and not lora_config.obstacle(first, config):
        error = lora.factor_error(checkpoints, coefficients)
    specs, only = output_specs(checkpoints, dtype), part(first, workers.rank, workers.world_size)
    kept, copied = not_averaged(first), set[str]()
    parts = weighted_average(checkpoints, coefficients, specs, only=only, copied=copied)
    return PlannedOutput(specs=specs, parts=parts, factor_error=error, not_averaged=kept, copied=copied)


def held_in_memory(plan: PlannedOutput) -> Callable[[str, int, memoryview], None]:
    """Compute the bytes of a small output, and return the function that reads them."""
    contents = {name: bytearray(spec.nbytes) for name, spec in plan.specs.items()}
    for name, offset, data in plan.parts:
        contents[name][offset : offset + len(data)] = data

    def read_into(name: str, start: int, out: memoryview) -> None:
        first = start * ITEM_SIZE[plan.specs[name].dtype]
        out[:] = contents[name][first : first + len(out)]

    return read_into
