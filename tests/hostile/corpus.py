"""All cases, by name."""

from __future__ import annotations

from functools import cache

from hostile import foreign_cases, safetensors_cases, sharded_cases, torch_cases, tree_cases
from hostile.case import Case


@cache
def corpus() -> dict[str, Case]:
    """Return name → case."""
    found: dict[str, Case] = {}
    for module in (safetensors_cases, torch_cases, foreign_cases, tree_cases, sharded_cases):
        for case in module.cases():
            assert case.id not in found, case.id
            found[case.id] = case
    return found
