"""Read, compare and rewrite the LoRA settings of ``adapter_config.json``."""

import math
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.errors import DisagreementError, InputError
from ckptavg.filesystem.strict_json import read_json

CONFIG_NAME: Final = "adapter_config.json"
FACTOR_A: Final = re.compile(  # the module is group 1; the other names are those of sd-scripts and diffusers
    r"(?:base_model\.model\.)?(.+?)(?:\.lora_(?:embedding_)?A(?:\.weight)?|(?:\.lora_|[._]lora\.|\.lora_linear_layer\.)down\.weight)"
)
_SHARED: Final = (
    "peft_type", "base_model_name_or_path", "revision", "r", "lora_alpha", "use_rslora", "rank_pattern",
    "alpha_pattern", "use_dora", "target_modules", "projection_prng_key", "random_loc_seed",
)  # fmt: skip
_OBSTACLES: Final = {
    "use_dora": "the magnitude of DoRA is not linear in its weights",
    "target_parameters": "with target_parameters the ranks of several experts share one tensor",
    "use_bdlora": "the factors of BD-LoRA are block-diagonal",
    "arrow_config": "Arrow routes by the factors themselves",
    "kasa_config": "KaSA has a third factor",
    "monteclora_config": "MonteCLoRA draws its factors at random",
    "ensure_weight_tying": "factors that are tied to another module's cannot be stacked",
}
_HARMLESS_INITS: Final = (None, True, False, "gaussian", "eva", "orthogonal", "mica")  # pissa modifies the base model


@dataclass(frozen=True, kw_only=True)
class Config:
    """The keys of ``adapter_config.json`` that define s B A, named as in PEFT; ``raw`` is the whole file."""

    path: Path
    peft_type: str
    r: int
    lora_alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    raw: Mapping[str, Any] = field(repr=False)

    def rank(self, module: str) -> int:
        """Return the rank r of a module of the base model."""
        return _first_match(self.rank_pattern, module, self.r)

    def alpha(self, module: str) -> float:
        """Return the α of a module."""
        return _first_match(self.alpha_pattern, module, self.lora_alpha)

    def scaling(self, module: str) -> float:
        """Return the scaling s of B A: α/r, or α/√r for rsLoRA."""
        return self.alpha(module) / (math.sqrt(self.rank(module)) if self.use_rslora else self.rank(module))


def read_config(checkpoint: Checkpoint) -> Config | None:
    """Read the ``adapter_config.json`` next to the weights, if there is one; raises InputError if it is invalid."""
    path = checkpoint.folder / CONFIG_NAME
    if not os.path.lexists(path):
        return None
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise InputError("is not a JSON object", path=path)
    return parsed(path, raw)


def check(checkpoints: Sequence[Checkpoint]) -> Config:
    """Return the configuration shared by all adapters: the same base model, and the same rank and α per module.

    Raises:
        DisagreementError: naming the first file and key that differ from the majority.
        InputError: if an adapter has no configuration, or an invalid one.
    """
    configs: list[Config] = []
    for checkpoint in checkpoints:
        if (config := read_config(checkpoint)) is None:
            raise InputError(f"has no {CONFIG_NAME} beside it", path=checkpoint.path)
        configs.append(config)
    check_equal(checkpoints, configs)
    return configs[0]


def check_equal(checkpoints: Sequence[Checkpoint], configs: Sequence[Config]) -> None:
    """Raise DisagreementError unless the configurations have equal values that define s B A; see `check`."""
    for key in _SHARED:
        values = [_comparable(config.raw.get(key)) for config in configs]
        common = max(values, key=values.count)
        odd = next((i for i, value in enumerate(values) if value != common), None)
        if odd is not None:
            count, hint = values.count(common), f"leave it out with {checkpoints[odd].excluding}"
            others = f"{count} other candidate{'s have' if count > 1 else ' has'} {common!r}"
            raise DisagreementError(f"{key} is {values[odd]!r}, but {others}", path=configs[odd].path, hint=hint)


def obstacle(checkpoint: Checkpoint, config: Config) -> str | None:
    """Return why ΔW is not a sum Σ s B A of stackable factors, as a clause for error messages, or None if it is."""
    if config.peft_type != "LORA":
        return f"its peft_type is {config.peft_type}, not LORA"
    if reason := next((reason for key, reason in _OBSTACLES.items() if config.raw.get(key)), None):
        return reason
    if (init := config.raw.get("init_lora_weights")) not in _HARMLESS_INITS:
        return f"init_lora_weights {init!r} may change the base model depending on the rank when the adapter is loaded"
    if any(".lora_magnitude_vector" in name for name in checkpoint.names):
        return _OBSTACLES["use_dora"]
    factors = {name for a in checkpoint.names if FACTOR_A.fullmatch(a) for name in (a, partner(a))}
    if not factors:
        return "it has no LoRA factors"
    rest = (name for name in checkpoint.names if ".lora_" in name and name not in factors)
    unknown = next((name for name in rest if not name.endswith(".lora_B.bias")), None)
    return f"{unknown} is not a LoRA factor" if unknown else None


def partner(a: str) -> str:
    """Return the name of the factor B that belongs to A."""
    old, new = ("down", "up") if a.endswith("down.weight") else ("A", "B")
    head, _, tail = a.rpartition(old)
    return f"{head}{new}{tail}"


def stacked_config(config: Config, r: int, ranks: Mapping[str, int]) -> dict[str, Any]:
    """Return ``config`` with the new ranks and with each α rescaled so that every scaling is unchanged.

    If modules differ, all are listed, longer names first: PEFT uses the first pattern that matches the end of a name.
    """
    alpha = _rescaled(config.lora_alpha, config.r, r, config.use_rslora)
    listed = {name: ranks[name] for name in sorted(ranks, key=lambda name: (-len(name), name))}
    alphas = {n: _rescaled(config.alpha(n), config.rank(n), new, config.use_rslora) for n, new in listed.items()}
    result = {
        **config.raw,
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": listed if set(ranks.values()) - {r} else {},
        "alpha_pattern": alphas if set(alphas.values()) - {alpha} else {},
        "init_lora_weights": True,  # some initializations reject some ranks, and loaded factors need none
    }
    read = parsed(config.path, result)
    if any((read.rank(name), read.alpha(name)) != (ranks[name], alphas[name]) for name in listed):
        raise AssertionError("a module's name, used as a pattern, matches another module")
    return result


def parsed(path: Path, raw: Mapping[str, Any]) -> Config:
    """Return the configuration in the JSON object ``raw`` of ``path``; raises InputError if it is invalid."""
    config = Config(
        path=path,
        peft_type=str(raw.get("peft_type")),
        r=raw.get("r", 8),
        lora_alpha=raw.get("lora_alpha", 8),
        use_rslora=bool(raw.get("use_rslora")),
        rank_pattern=raw.get("rank_pattern") or {},
        alpha_pattern=raw.get("alpha_pattern") or {},
        raw=raw,
    )
    if config.peft_type == "LORA":
        _check_numbers(path, "r", "rank_pattern", config.r, config.rank_pattern, (int,))
        _check_numbers(path, "lora_alpha", "alpha_pattern", config.lora_alpha, config.alpha_pattern, (int, float))
    return config


def _check_numbers(path: Path, key: str, pattern_key: str, value: Any, pattern: Any, kinds: tuple[type, ...]) -> None:
    if not isinstance(pattern, dict):
        raise InputError(f"{pattern_key} is not a JSON object", path=path)
    for label, number in ((key, value), *((f"{pattern_key}: {name}", number) for name, number in pattern.items())):
        if type(number) not in kinds or not 0 < number < math.inf:
            raise InputError(f"{label} must be a positive number, not {number!r}", path=path)
    for name in pattern:
        try:
            _compiled(name)
        except re.error as error:
            raise InputError(f"{pattern_key}: {name!r} is not a regular expression: {error}", path=path) from error


def _comparable(value: Any) -> Any:
    """Normalize a value: PEFT saves the set ``target_modules`` in any order, and empty values differ by version."""
    return sorted(map(str, value)) if isinstance(value, list) else value or None


def _compiled(pattern: str) -> re.Pattern[str]:
    with warnings.catch_warnings(action="ignore"):  # FutureWarning about syntax whose meaning may change
        return re.compile(pattern)


def _first_match(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """Look up ``rank_pattern`` or ``alpha_pattern`` as PEFT does."""
    return next((v for key, v in pattern.items() if _compiled(rf"(.*\.)?({key})$").match(module)), default)


def _rescaled(alpha: float, old: int, new: int, use_rslora: bool) -> float:
    """Return the α for rank ``new`` that keeps the scaling of ``alpha`` at rank ``old``."""
    scaled = alpha * math.sqrt(new / old) if use_rslora else alpha * new / old
    return int(scaled) if float(scaled).is_integer() else scaled
