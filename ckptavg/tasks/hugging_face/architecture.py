"""Which model a Hugging Face directory holds, by its config.json, and the library that builds it, kept offline."""

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
    """A kind of model: what builds it, transformers' table of such classes, and the columns it learns from."""

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
    """The kind of model that config.json says it is.

    Args:
        place: where the model is built from, as `base` says.
        source: the directory that was named, for errors; of an adapter it is another.
        trust: whether code that the model brings may be run.
    Raises:
        TaskError: if it is no language model or classifier, brings code without leave, or is not on this machine.
        OSError: as transformers, if a config.json cannot be read.
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
            "the model brings code of its own, which is not run unasked (`auto_map` in config.json)",
            path=place,
            hint="if you trust it: --trust-remote-code",
        )
    name = (config.get("architectures") or [None])[0]
    if config.get("problem_type", _ONE_LABEL) not in (None, _ONE_LABEL):
        raise TaskError(f"problem_type {config['problem_type']} is not supported", path=place, hint=WRITE_ONE)
    for kind in _KINDS:
        table = getattr(library.models.auto.modeling_auto, f"MODEL_FOR_{kind.table}_MAPPING_NAMES")
        known = {each for found in table.values() for each in ((found,) if isinstance(found, str) else found)}
        if kind.auto in own_code or name in known:
            return kind
    what = f"{name} is no architecture that is known here" if name else "config.json names no architecture"
    raise TaskError(what, path=place, hint=f"known are language models and classifiers; else {WRITE_ONE}")


def build(place: str, kind: Kind, config: Any, *, trust: bool, weights: bool = False) -> Any:
    """The model of ``place`` in float32, without a cache for generation; call it `offline`.

    Args:
        place: its directory, or an id in the local cache.
        kind: what `architecture` found.
        config: of transformers.
        trust: run code that lies in the directory.
        weights: load them; otherwise they are anything, and the state dict has the names of saved files.
    """
    auto = getattr(transformers(), kind.auto)
    if weights:
        model = auto.from_pretrained(
            place, config=config, local_files_only=True, trust_remote_code=trust, torch_dtype=torch.float32
        )
    else:
        model = auto.from_config(config, trust_remote_code=trust, torch_dtype=torch.float32)
        use_saved_names(model, place)
    for one in (model.config, model.config.get_text_config()):
        if hasattr(one, "use_cache"):
            one.use_cache = False
    return model


def use_saved_names(model: nn.Module, source: str) -> None:
    """Give the state dict the names that `save_pretrained` writes, which since transformers 5 need not be its own.

    Raises:
        TaskError: naming ``source``, if the files hold tensors that are no parameters of the model.
    """
    revert = getattr(importlib.import_module("transformers.modeling_utils"), "revert_weight_conversion", None)
    if revert is None:
        return
    own = {name: torch.empty_like(tensor, device="meta") for name, tensor in model.state_dict().items()}
    known = {id(tensor): name for name, tensor in own.items()}
    stored: dict[str, Tensor] = revert(model, own)
    if not all(id(tensor) in known for tensor in stored.values()):
        raise TaskError("its files hold the weights in another form than the model", path=source, hint=WRITE_ONE)
    names = {name: known[id(tensor)] for name, tensor in stored.items()}

    def rename(_: nn.Module, state: dict[str, Tensor], *__: Any) -> dict[str, Tensor]:
        return {name: state[inner] for name, inner in names.items()}

    if list(names) != list(own):
        model._register_state_dict_hook(rename)  # pyright: ignore[reportPrivateUsage]


def base(folder: Path) -> str:
    """Where the model is built from: the directory itself, or what an adapter in it names.

    Raises:
        TaskError: if there is no config.json, or an adapter's does not name its base.
    """
    if is_file(folder / "adapter_config.json"):
        config: Any = read_json(folder / "adapter_config.json")
        name = config.get("base_model_name_or_path") if isinstance(config, dict) else None
        if not isinstance(name, str):
            raise TaskError("adapter_config.json does not name the base model", path=folder)
        return name
    if not is_file(folder / "config.json"):
        raise TaskError("has no config.json", path=folder, hint="copy the model's beside the weights, or " + WRITE_ONE)
    return str(folder)


def transformers() -> Any:
    """The library, which nothing loads before it is needed; see `imported`."""
    return imported("transformers", "hf")


def imported(module: str, extra: str) -> Any:
    """A module that an extra of ckptavg installs.

    Raises:
        UsageError: naming the extra, if it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(f"this directory needs `{module}`", hint=f"pip install 'ckptavg[{extra}]'") from error


@contextmanager
def offline() -> Generator[None]:
    """Without the network, which `local_files_only` leaves to look up other things, and without a word."""
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
