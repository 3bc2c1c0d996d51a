"""Detection and construction, without network access, of the model in a Hugging Face directory."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from ckptavg.errors import TaskError, UsageError
from ckptavg.filesystem.regular_file import is_file, is_folder
from ckptavg.filesystem.strict_json import read_json

WRITE_ONE: Final = "write a task file: `ckptavg init`"
_ONE_LABEL: Final = "single_label_classification"


@dataclass(frozen=True)
class Kind:
    """Kind of model: the auto class that builds it, transformers' table of its classes, and its data columns."""

    name: str
    auto: str
    table: str
    columns: tuple[tuple[str, ...], ...]


_KINDS: Final = (
    Kind("seq2seq", "AutoModelForSeq2SeqLM", "SEQ_TO_SEQ_CAUSAL_LM", (("prompt", "completion"),)),
    Kind("causal", "AutoModelForCausalLM", "CAUSAL_LM", (("prompt", "completion"), ("messages",), ("text",))),
    Kind("masked", "AutoModelForMaskedLM", "MASKED_LM", (("text",),)),
    Kind("text", "AutoModelForSequenceClassification", "SEQUENCE_CLASSIFICATION", (("text", "label"),)),
    Kind("image", "AutoModelForImageClassification", "IMAGE_CLASSIFICATION", (("image", "label"),)),
)


def architecture(place: str, source: str, *, trust: bool) -> Kind:
    """Return the kind of model declared in config.json.

    Args:
        place: the model to build, as returned by `base`.
        source: the directory given by the user, for errors; for an adapter it differs from ``place``.
        trust: allow model code in the directory to run.
    Raises:
        TaskError: if it is not a language model or classifier, needs untrusted code, or is not on this machine.
        OSError: from transformers, if config.json cannot be read.
    """
    library = transformers()
    try:
        config, _ = library.PretrainedConfig.get_config_dict(place, local_files_only=True)
    except OSError as error:
        if place == source or is_folder(Path(place)):
            raise
        hint = f"download it: hf download {place}"
        raise TaskError(f"its base model {place} is not on this machine", path=source, hint=hint) from error
    own_code: Mapping[str, str] = config.get("auto_map") or {}
    if own_code and not trust:
        raise TaskError(
            "the model needs code of its own, which is not run by default (`auto_map` in config.json)",
            path=place,
            hint="if you trust it: --trust-remote-code",
        )
    name = (config.get("architectures") or [None])[0]
    if config.get("problem_type", _ONE_LABEL) not in (None, _ONE_LABEL):
        raise TaskError(f"problem_type {config['problem_type']} is not supported", path=place, hint=WRITE_ONE)
    for kind in _KINDS:
        table = getattr(library.models.auto.modeling_auto, f"MODEL_FOR_{kind.table}_MAPPING_NAMES")
        classes = {each for entry in table.values() for each in ((entry,) if isinstance(entry, str) else entry)}
        if kind.auto in own_code or name in classes:
            return kind
    message = f"the architecture {name} is not supported" if name else "config.json names no architecture"
    raise TaskError(message, path=place, hint=f"language models and classifiers are supported; else {WRITE_ONE}")


def build(place: str, kind: Kind, config: Any, *, trust: bool, weights: bool = False) -> Any:
    """Build the model of ``place`` in float32, without a cache for generation; call within `offline`.

    Args:
        place: model directory, or a model id in the local cache.
        kind: the result of `architecture`.
        config: the transformers configuration.
        trust: run model code in the directory.
        weights: load them; otherwise their values are arbitrary and the state dict has the names of saved files.
    """
    auto = getattr(transformers(), kind.auto)
    if weights:
        model = auto.from_pretrained(
            place, config=config, local_files_only=True, trust_remote_code=trust, torch_dtype=torch.float32
        )
    else:
        model = auto.from_config(config, trust_remote_code=trust, torch_dtype=torch.float32)
        use_saved_names(model, place)
    for each in (model.config, model.config.get_text_config()):
        if hasattr(each, "use_cache"):
            each.use_cache = False
    return model


def use_saved_names(model: nn.Module, source: str) -> None:
    """Rename the state dict to the names that `save_pretrained` writes, which may differ since transformers 5.

    Raises:
        TaskError: naming ``source``, if the files hold tensors that are not parameters of the model.
    """
    revert = getattr(importlib.import_module("transformers.modeling_utils"), "revert_weight_conversion", None)
    if revert is None:
        return
    own = {name: torch.empty_like(tensor, device="meta") for name, tensor in model.state_dict().items()}
    own_names = {id(tensor): name for name, tensor in own.items()}
    stored: dict[str, Tensor] = revert(model, own)
    if not all(id(tensor) in own_names for tensor in stored.values()):
        raise TaskError("its files store the weights in another layout than the model", path=source, hint=WRITE_ONE)
    names = {name: own_names[id(tensor)] for name, tensor in stored.items()}

    def rename(_: nn.Module, state: dict[str, Tensor], *__: Any) -> dict[str, Tensor]:
        return {name: state[inner] for name, inner in names.items()}

    if list(names) != list(own):
        model._register_state_dict_hook(rename)  # pyright: ignore[reportPrivateUsage]


def base(folder: Path) -> str:
    """Return the model to build: the directory itself, or the base model named by an adapter in it.

    Raises:
        TaskError: if there is no config.json, or adapter_config.json does not name the base model.
    """
    if is_file(folder / "adapter_config.json"):
        config: Any = read_json(folder / "adapter_config.json")
        name = config.get("base_model_name_or_path") if isinstance(config, dict) else None
        if not isinstance(name, str):
            raise TaskError("adapter_config.json does not name the base model", path=folder)
        return name
    if not is_file(folder / "config.json"):
        raise TaskError("has no config.json", path=folder, hint="copy the model's beside its weights, or " + WRITE_ONE)
    return str(folder)


def transformers() -> Any:
    """Import transformers on first use; see `imported`."""
    return imported("transformers", "hf")


def imported(module: str, extra: str) -> Any:
    """Import and return a module that an extra of ckptavg installs.

    Raises:
        UsageError: naming the extra, if the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(f"this directory needs `{module}`", hint=f"pip install 'ckptavg[{extra}]'") from error


@contextmanager
def offline() -> Generator[None]:
    """Block network access, which `local_files_only` alone does not, and silence warnings and progress bars."""
    log = transformers().utils.logging
    constants: Any = importlib.import_module("huggingface_hub.constants")
    level, bars, before = log.get_verbosity(), log.is_progress_bar_enabled(), constants.HF_HUB_OFFLINE
    log.set_verbosity_error()
    log.disable_progress_bar()
    constants.HF_HUB_OFFLINE = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        constants.HF_HUB_OFFLINE = before
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
