"""Recognise quantised models, whose codes have no mean: by names, by dtypes, and by the config.json beside them."""

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from ckptavg.errors import InputError
from ckptavg.filesystem.regular_file import is_file, is_folder
from ckptavg.filesystem.strict_json import read_json
from ckptavg.readers import Node, Refused, StoredTensor

_CODES: Final = ("I8", "U8", "I16", "U16", "I32", "U32", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
# (last part of a tensor's name, beginning of that of another tensor in its module, method); "" needs no other
_METHODS: Final = (
    ("bitsandbytes__nf4", "", "bitsandbytes NF4"),
    ("bitsandbytes__fp4", "", "bitsandbytes FP4"),
    ("absmax", "quant_map", "bitsandbytes"),
    ("SCB", "weight", "bitsandbytes int8"),
    ("qweight", "g_idx", "GPTQ"),
    ("qweight", "qzeros", "AWQ"),
    ("W_q", "scale", "HQQ"),
    ("codes", "codebooks", "AQLM"),
    ("_packed_params", "", "torch.ao"),
)
_ENDINGS: Final = frozenset(ending for ending, *_ in _METHODS)
# the scales of codes called weight, weight_packed or weight._data are weight_scale, weight_scale_inv, weight._scale, …
_STEM: Final = re.compile(r"(.*?)[._]?(packed|qdata|data|blocks|quantized|int_data)?")
_WEIGHTS: Final = ("weight", "kernel", "qweight", "weight_q", "q_weight", "int_weight", "quantized_weight")
_SCALES: Final = ("scale", "zero_point", "absmax")
_LOADED: Final[Mapping[str, str]] = {  # quant_method → what makes transformers' model one of floating-point weights
    "bitsandbytes": ").dequantize()",
    "fp8": ", quantization_config=transformers.FineGrainedFP8Config(dequantize=True))",
    "compressed-tensors": ", quantization_config=transformers.CompressedTensorsConfig(dequantize=True))",
    "mxfp4": ", quantization_config=transformers.Mxfp4Config(dequantize=True))",
}


def check(nodes: Mapping[str, Node], path: Path) -> None:
    """Raise InputError, with the method and a way out, if ``nodes`` are the state dict of a quantised model.

    Their average would be the codes of one checkpoint with the mean of all scales. Integers alone are no sign, nor are
    scales: codes need scales beside them, or a quantization_config.

    Args:
        nodes: the state dict.
        path: its file or directory.
    """
    modules: dict[str, set[str]] = {}
    for name in nodes:
        module, _, last = name.rpartition(".")
        modules.setdefault(module, set()).add(last)
    found: dict[str, str] = {}  # method → the first tensor that shows it
    for name, node in nodes.items():
        found.setdefault(_method(name, node, modules), name)
    folder = path if is_folder(path) else path.parent
    codes = next((name for name, node in nodes.items() if _is_code(node)), "")
    config = _config(folder / "config.json") if codes else {}
    settings = config.get("quantization_config", config.get("compression_config"))
    settings = settings if isinstance(settings, dict) else {}
    quant_method = str(settings.get("quant_method", "by its config.json"))
    if codes and settings:
        found.setdefault(quant_method, codes)
    method = next((method for *_, method in _METHODS if method in found), next(filter(None, found), ""))
    if not method:
        return
    hint = "average the checkpoints that were quantised, or adapters trained on them"
    if way := _LOADED.get(quant_method):
        names = config.get("architectures")
        model = names[0] if isinstance(names, list) and names else "AutoModelForCausalLM"
        saved = f"save_pretrained({f'dequantised/{folder.name}'!r}, save_original_format=False)"
        load = f"transformers.{model}.from_pretrained({str(folder)!r}{way}"
        hint = f"in Python, for each checkpoint: {load}.{saved}; or {hint}"
    what = f"is quantised ({method}): codes cannot be averaged, only the weights that they stand for"
    raise InputError(what, path=path, tensor=found[method], hint=hint)


def _method(name: str, node: Node, modules: Mapping[str, set[str]]) -> str:
    """Return the method by which a tensor was quantised; empty if it is none of the known ones."""
    if isinstance(node, Refused) and (made := re.search("torchao|_rebuild_qtensor", node.reason)):
        return "torchao" if made[0] == "torchao" else "torch.ao"
    module, _, last = name.rpartition(".")
    beside = modules[module]
    for ending, other, method in _METHODS if last in _ENDINGS else ():
        if last == ending and any(sibling.startswith(other) for sibling in beside):
            return method
    if not isinstance(node, StoredTensor) or not _is_code(node):
        return ""
    stem = _STEM.fullmatch(last)
    scale = re.compile(rf"{re.escape(stem[1] if stem else last)}[._]?scale")
    inner = {f"{last}.{sibling}" for sibling in modules.get(name, ())}
    related = any(map(scale.match, beside | inner))
    named = last in _WEIGHTS and any(word in sibling for sibling in beside for word in _SCALES)
    return f"{node.dtype} codes with scales" if related or named else ""


def _is_code(node: Node) -> bool:
    return isinstance(node, StoredTensor) and len(node.shape) > 1 and node.dtype in _CODES


def _config(file: Path) -> Mapping[str, Any]:
    with suppress(InputError):
        config = read_json(file) if is_file(file) else {}
        return config if isinstance(config, dict) else {}
    return {}
