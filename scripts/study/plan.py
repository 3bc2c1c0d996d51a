"""Sizes of the whole study, of the quick one, and of a domain that differs from the rest."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Final

from ckptavg.errors import UsageError
from ckptavg.strategies import from_spec
from study.domains import MODULES, domain

VARIANTS: Final = (
    "EMA 0.5",
    "WSM cosine",
    "ASWA, no hard updates",
    "SeWA on train",
    "blend by loss",
    "TWA cross-validated, simplex",
)
"""Strategies that the toys alone run."""

_IMPORT: Final = re.compile(r"from study\.domains(?:\.| import )(\w+)")
_SCRIPT: Final = re.compile(r'"(\w+\.py)"')


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The sizes of a study.

    Attributes:
        name: name of the plan.
        seeds: trainings of each domain and schedule.
        checkpoints: number saved in each training, evenly spaced.
        last: number of final checkpoints that are the candidates: N.
        k: number that SeWA and LAWA select: K.
        ks: values of K at which SeWA and LAWA are compared.
        every: factor for the steps between checkpoints.
        sewa_steps: steps of a search by Gumbel-Softmax; None is the default.
        twa_epochs: epochs of a search by gradient descent; None is the default.
        random: number of subsets drawn as the baseline of a random choice.
        singles: number of single candidates, evenly spaced, that are scored on test data, at most.
        exhaustive: whether every subset of K is scored, for the ranks of those that strategies choose.
        variants: whether strategies run with settings that were tried and are not recommended, too.
        with_early: whether strategies also run on the first 60 % of a training.
        more: label → specification of strategies that only some domains run.
    """

    name: str
    seeds: int
    checkpoints: int
    last: int
    k: int
    ks: tuple[int, ...]
    every: float = 1.0
    sewa_steps: int | None = None
    twa_epochs: int | None = None
    random: int = 20
    singles: int = 30
    exhaustive: bool = True
    variants: bool = True
    with_early: bool = True
    more: Mapping[str, str] = field(default_factory=dict[str, str])

    def of(self, name: str) -> Plan:
        """Return the plan of one domain: its own strategies, its sizes in the whole study, none of its costly parts."""
        sizes = domain(name).sizes
        kept = {
            key: value
            for key, value in sizes.items()
            if self.name == "full" or isinstance(value, bool) or key == "more"
        }
        return replace(self, **kept)

    @property
    def early(self) -> int:
        """Return the number of checkpoints in the first 60 % of the training."""
        return round(0.6 * self.checkpoints)

    def sewa(self, k: int) -> str:
        """Return the SeWA specification that selects ``k``."""
        return f"sewa:k={k}" + ("" if self.sewa_steps is None else f":steps={self.sewa_steps}")

    def twa(self, *settings: str) -> str:
        """Return the TWA specification with gradient descent."""
        return ":".join(("twa", *settings, *([] if self.twa_epochs is None else [f"epochs={self.twa_epochs}"])))

    @property
    def strategies(self) -> dict[str, str]:
        """Return label → specification, in the order of the tables."""
        found = {
            "last": "last",
            "best": "best",
            "SWA": "swa",
            "LAWA": f"lawa:k={self.k}",
            "EMA 0.9": "ema:decay=0.9",
            "EMA 0.5": "ema:decay=0.5",
            "WSM sqrt": "wsm",
            "WSM cosine": "wsm:decay=cosine",
            "greedy soup": "soup",
            "ASWA": "aswa",
            "ASWA, no hard updates": "aswa:hard_updates=false",
            "SeWA": self.sewa(self.k),
            "SeWA on train": f"{self.sewa(self.k)}:on=train:verify=1",
            "SeWA quadratic": f"sewa:k={self.k}:solver=quadratic",
            "SeWA, K by held-out loss": "sewa:k=auto:solver=quadratic",
            "blend": "blend",
            "blend by loss": "blend:select_by=loss",
            "TWA-t": self.twa("on=train"),
            "TWA-v": self.twa("on=val"),
            "TWA-v simplex": self.twa("on=val", "constraint=simplex"),
            "TWA cross-validated": "twa:solver=quadratic",
            "TWA cross-validated, simplex": "twa:solver=quadratic:constraint=simplex",
        }
        return {label: spec for label, spec in found.items() if self.variants or label not in VARIANTS} | {**self.more}

    @property
    def early_strategies(self) -> dict[str, str]:
        """Return the strategies that are run on the first 60 % of a training."""
        if not self.with_early:
            return {}
        labels = (
            "last",
            "SWA",
            "TWA-t",
            "TWA-v",
            "TWA-v simplex",
            "TWA cross-validated",
            "TWA cross-validated, simplex",
        )
        return {label: spec for label, spec in self.strategies.items() if label in labels}

    @property
    def sweep(self) -> dict[tuple[str, int], str]:
        """Return (SeWA or LAWA, K) → specification; all N candidates are SWA."""
        kinds = {"SeWA": self.sewa, "LAWA": "lawa:k={}".format}
        return {(kind, k): "swa" if k == self.last else spec(k) for kind, spec in kinds.items() for k in self.ks}


def available(specs: Sequence[str]) -> list[str]:
    """Return the distinct specifications that this version of ckptavg supports, in their order."""
    return [spec for spec in dict.fromkeys(specs) if _known(spec)]


@cache
def _code(name: str) -> list[str]:
    """Return the sources of a training, cached at the first call so that later edits do not change the digest."""
    here = Path(__file__).parent
    found: dict[Path, str] = {}
    waiting = [here / "training.py", here / "job.py", here / "domains" / f"{MODULES[name]}.py"]
    while waiting:
        path = waiting.pop()
        if path not in found and path.is_file():
            found[path] = path.read_text(encoding="utf-8")
            waiting += [here / "domains" / f"{module}.py" for module in _IMPORT.findall(found[path])]
            waiting += [here / script for script in _SCRIPT.findall(found[path])]
    return list(found.values())


def _known(spec: str) -> bool:
    try:
        from_spec(spec)
    except UsageError:
        return False
    return True


def digest(name: str, plan: Plan, data: Path | None = None) -> str:
    """Return a key that differs for results of a domain that must not share a table.

    It depends on the sizes (except the number of seeds), the available strategies, the code of the training, and the
    path of the user's data.
    """
    settings = asdict(plan) | {"seeds": None}
    del settings["more"]  # they are among the strategies
    known = available([*plan.strategies.values(), *plan.sweep.values(), *plan.early_strategies.values()])
    identity = json.dumps([settings, known, _code(name), data and str(data.resolve())], sort_keys=True)
    return hashlib.sha256(identity.encode()).hexdigest()[:12]


FULL: Final = Plan(name="full", seeds=8, checkpoints=20, last=12, k=5, ks=tuple(range(1, 13)))
QUICK: Final = Plan(
    name="quick",
    seeds=3,
    checkpoints=13,
    last=8,
    k=4,
    ks=(1, 2, 4, 8),
    every=0.75,
    sewa_steps=50,
    twa_epochs=3,
    random=10,
)
PLANS: Final = {plan.name: plan for plan in (FULL, QUICK)}
