"""Coefficients, the output of every strategy: [G, N] float64, each row summing to one unless they are linear.

Shape suffixes: G = groups of tensors, N = candidates.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Self, TypeAlias

Groups: TypeAlias = tuple[tuple[str, ...], ...]
EVERYTHING: Final[Groups] = (("",),)


def group_of(name: str, groups: Groups) -> int:
    """Return the group of the tensor ``name``: the one with the longest prefix of its name.

    Raises:
        ValueError: if no group has a prefix of ``name``.
    """
    matching = [(len(prefix), g) for g, group in enumerate(groups) for prefix in group if name.startswith(prefix)]
    if not matching:
        raise ValueError(f"no group of coefficients covers the tensor {name}")
    return max(matching)[1]


@dataclass(frozen=True)
class Coefficients:
    """One row of N coefficients for each group of tensors; w = Σ_i c_i w_i within a group.

    Attributes:
        values: G rows of N Python floats (float64).
        groups: G tuples of name prefixes; a tensor belongs to the group with the longest prefix of its name.
            `EVERYTHING` is one group for all.
        linear: whether a row may have any sum; else w lies on the plane through the candidates.
    Raises:
        ValueError: if rows differ in length, a value is not finite, or a row does not sum to 1 within N·2⁻⁴⁰ and
            ``linear`` is not set.
    """

    values: tuple[tuple[float, ...], ...]
    groups: Groups = EVERYTHING
    linear: bool = False

    def __post_init__(self) -> None:
        if not self.values or len(self.values) != len(self.groups) or len({len(row) for row in self.values}) != 1:
            raise ValueError(f"need one row of equal length for each of the groups {self.groups}")
        for row in self.values:
            if not all(math.isfinite(c) for c in row):
                raise ValueError(f"coefficients must be finite, not {row}")
            if not self.linear and abs(math.fsum(row) - 1) > len(row) * 2**-40:
                raise ValueError(f"coefficients must sum to 1, not {math.fsum(row)}")

    @classmethod
    def uniform(cls, chosen: Sequence[int], n: int) -> Self:
        """Return 1/K for each of the K candidates ``chosen``, 0 for the rest of the ``n``."""
        row = [0.0] * n
        for i in chosen:
            row[i] = 1 / len(chosen)
        return cls((tuple(row),))

    @classmethod
    def singles(cls, n: int) -> list[Self]:
        """Return the coefficients of each of the ``n`` candidates alone."""
        return [cls.uniform([i], n) for i in range(n)]

    @property
    def n(self) -> int:
        """Number of candidates N."""
        return len(self.values[0])

    @cached_property
    def selected(self) -> tuple[int, ...]:
        """Candidates with a nonzero coefficient in at least one group."""
        return tuple(i for i, column in enumerate(zip(*self.values, strict=True)) if any(column))

    @property
    def effective(self) -> float | None:
        """Effective number of candidates 1/Σβ²: K for the mean of K, 1 for one; the smallest of several groups'.

        None if a coefficient is negative or they are `linear`, since 1/Σβ² then counts nothing.
        """
        if self.linear or any(c < 0 for row in self.values for c in row):
            return None
        return min(1 / math.fsum(c * c for c in row) for row in self.values)

    @cached_property
    def uniform_subset(self) -> bool:
        """True if the mixture is the plain mean of the `selected` candidates."""
        return not self.linear and len(self.values) == 1 and len({c for c in self.values[0] if c != 0}) == 1

    def row(self, name: str) -> tuple[float, ...]:
        """Return the N coefficients of the tensor ``name``."""
        return self.values[group_of(name, self.groups)]

    def candidate(self, i: int) -> float | tuple[float, ...]:
        """Return the coefficient of candidate ``i``: one number, or one per group."""
        column = tuple(row[i] for row in self.values)
        return column[0] if len(column) == 1 else column
