"""LoRA without ``adapter_config.json``: files of sd-scripts (kohya) and of diffusers, which have their scaling inside.

α is a tensor beside the factors of a module, or in diffusers' metadata; without either, s = α/r = 1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from ckptavg.average.lora_config import FACTOR_A, Config, check_equal, parsed, partner
from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.checkpoints.dtypes import NAMES
from ckptavg.checkpoints.numbers import stored, widened
from ckptavg.errors import DisagreementError, InputError
from ckptavg.filesystem.strict_json import strict_json
from ckptavg.readers import FLOATING

_METADATA: Final = "lora_adapter_metadata"  # diffusers: keys of PEFT's configuration, behind the component's name
# parts of the names of tensors that form no product of two factors
_KINDS: Final = {
    ".hada_w": "LoHa", ".lokr_w": "LoKr", ".lora_mid.": "LoCon", ".vera_lambda": "VeRA", ".lora_E": "AdaLoRA",
    ".vblora_": "VB-LoRA", ".oft_": "OFT", ".boft_": "BOFT", ".hra_u": "HRA",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class FileConfig:
    """The scaling of a file's factors, by the names of its modules."""

    ranks: Mapping[str, int]
    alphas: Mapping[str, float]  # of the modules that have a tensor
    configs: Mapping[str, Config]  # of each component, such as unet, or of the file under ""

    def rank(self, module: str) -> int:
        """Return the rank r of a module."""
        return self.ranks[module]

    def scaling(self, module: str) -> float:
        """Return the scaling s of B A."""
        if module in self.alphas:
            return self.alphas[module] / self.ranks[module]
        config = self.configs.get(module.partition(".")[0], self.configs.get(""))
        return config.scaling(module) if config else 1.0


def other_kind(checkpoint: Checkpoint) -> str | None:
    """Return the kind of an adapter that is linear neither in its tensors nor a product of two of them, or None."""
    return next((kind for part, kind in _KINDS.items() if any(part in name for name in checkpoint.names)), None)


def has_magnitude(checkpoint: Checkpoint) -> bool:
    """Return whether the weights have DoRA's magnitudes."""
    return any(".lora_magnitude_vector" in name or name.endswith(".dora_scale") for name in checkpoint.names)


def read_file_config(checkpoint: Checkpoint) -> FileConfig | None:
    """Return the scaling of a file that consists of LoRA factors, or None for any other file."""
    modules = {match[1]: name for name in checkpoint.names if (match := FACTOR_A.fullmatch(name))}
    whole = any(f"{module}.weight" in checkpoint.tensors for module in modules)  # the model with its adapted layers
    if whole or 5 * len(modules) < len(checkpoint.names) or not modules or other_kind(checkpoint):
        return None
    ranks, alphas = dict[str, int](), dict[str, float]()
    for module, a in modules.items():
        if partner(a) not in checkpoint.tensors:
            return None
        first, second = checkpoint.spec(a), checkpoint.spec(partner(a))
        ranks[module] = r = (*first.shape, 0)[0]
        factors = {first.dtype, second.dtype} <= {*FLOATING} and len(first.shape) > 1 and first.numel
        if not factors or second.shape[1:2] != (r,) or second.numel != second.shape[0] * r:
            return None
        if f"{module}.alpha" in checkpoint.tensors:
            alphas[module] = _number(checkpoint, f"{module}.alpha")
    return FileConfig(ranks=ranks, alphas=alphas, configs=_configs(checkpoint))


def check_files(checkpoints: Sequence[Checkpoint]) -> FileConfig | None:
    """Return the scaling that all files share, or None if they are not LoRA files.

    Raises:
        DisagreementError: naming the first file, and its tensor or key of the metadata, that differs from the majority.
    """
    if read_file_config(checkpoints[0]) is None:
        return None
    files = [read_file_config(checkpoint) for checkpoint in checkpoints]
    present = [file for file in files if file is not None]
    for module in present[0].alphas:
        alphas = [file.alphas.get(module) for file in present]
        common = max(alphas, key=alphas.count)
        if odd := [i for i, alpha in enumerate(alphas) if alpha != common]:
            message, source = f"α is {alphas[odd[0]]}, but others have {common}", checkpoints[odd[0]]
            hint = f"leave it out with {source.excluding}"
            raise DisagreementError(message, path=source.path, tensor=f"{module}.alpha", hint=hint)
    names = [sorted(file.configs) for file in present]
    common = max(names, key=names.count)
    for source, own in zip(checkpoints, names, strict=True):
        if own != common:
            shown, usual = (", ".join(names) or "missing" for names in (own, common))
            message = f"the components of its {_METADATA}: {shown}; of the others': {usual}"
            raise DisagreementError(message, path=source.path, hint=f"leave it out with {source.excluding}")
    for component in common:
        check_equal(checkpoints, [file.configs[component] for file in present])
    return present[0]


def _configs(checkpoint: Checkpoint) -> Mapping[str, Config]:
    text, path = checkpoint.reader.metadata.get(_METADATA), checkpoint.path
    if text is None:
        return {}
    try:
        values: Any = strict_json(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"its {_METADATA} is not valid JSON: {error}", path=path) from error
    grouped: dict[str, dict[str, Any]] = {}
    for key, value in values.items() if isinstance(values, dict) else ():
        component, _, name = key.rpartition(".")
        grouped.setdefault(component, {})[name] = value
    return {component: parsed(path, {"peft_type": "LORA", **raw}) for component, raw in grouped.items()}


def _number(checkpoint: Checkpoint, name: str) -> float:
    spec = checkpoint.spec(name)
    if spec.numel != 1 or spec.dtype not in NAMES.values():
        raise InputError("α is not one number", path=checkpoint.path, tensor=name)
    return float((widened if spec.dtype in FLOATING else stored)(checkpoint.read(name), spec.dtype)[0])
