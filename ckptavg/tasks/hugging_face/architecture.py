"""Detection and construction, without network access, of the model or adapter in a Hugging Face directory."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ckptavg.errors import CkptavgError, TaskError, UsageError, is_out_of_memory
from ckptavg.filesystem.regular_file import is_file, is_folder
from ckptavg.filesystem.strict_json import read_json

WRITE_ONE: Final = "write a task file: `ckptavg init`"
_ONE_LABEL: Final = "single_label_classification"
# name, auto class, file names, and the file that a hint asks for
_TOKENIZER: Final = (
    "tokenizer",
    "AutoTokenizer",
    ("tokenizer*", "*.model", "vocab.*", "tekken.json"),
    "tokenizer.json",
)
_IMAGES: Final = ("image processor", "AutoImageProcessor", ("*processor_config.json",), "preprocessor_config.json")


class Kind(NamedTuple):
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


class ModelFolder:
    """The model that a directory declares, or the base model that a PEFT adapter in it names.

    With ``trust``, model code in the directory may run.

    Attributes:
        source: the directory given by the user, for errors.
        base: the model to build: the directory itself, or the adapter's base model.
        kind, config: what its config.json declares.
    Raises:
        UsageError: if transformers is not installed.
        TaskError: if there is no language model or classifier, it needs untrusted code or is not on this machine.
    """

    def __init__(self, folder: Path, *, trust: bool) -> None:
        self._folder = folder
        self._trust = trust
        self.source = str(folder)
        self.base = _base(folder)
        with translate_errors(self.source, "config.json"), offline():
            self.kind = self._find_kind()
            self.config = self._load("AutoConfig", self.base)

    def processor(self, *, image: bool = False) -> Any:
        """Load the tokenizer, or the image processor, from the directory or else the base model that has its files."""
        subject, auto, patterns, example = _IMAGES if image else _TOKENIZER
        with translate_errors(self.source, subject), offline():
            for place in (self.source, self.base):
                if not is_folder(Path(place)) or any(any(Path(place).glob(pattern)) for pattern in patterns):
                    return self._load(auto, place)
        raise TaskError(f"no {subject} in {self.base}", hint=f"copy {example} beside config.json")

    def build(self, *, pad_token: int | None = None) -> nn.Module:
        """Build the model in float32, without a cache for generation; an adapter around its base model with weights.

        Otherwise the weights are arbitrary, and the state dict has the names of saved files. ``pad_token`` is set in a
        configuration without one; causal classifiers use it to find the last token.
        """
        is_adapter = self.base != self.source
        with translate_errors(self.source, "model"), offline():
            auto = getattr(imported("transformers"), self.kind.auto)
            options = {"trust_remote_code": self._trust, "torch_dtype": torch.float32}
            if is_adapter:
                model = auto.from_pretrained(self.base, config=self.config, local_files_only=True, **options)
            else:
                model = auto.from_config(self.config, **options)
                _use_saved_names(model, self.base)
            for config in (model.config, model.config.get_text_config()):
                if hasattr(config, "use_cache"):
                    config.use_cache = False
                if pad_token is not None and getattr(config, "pad_token_id", None) is None:
                    config.pad_token_id = pad_token
            return Adapter(model, self._folder) if is_adapter else model

    def _find_kind(self) -> Kind:
        library = imported("transformers")
        try:
            config, _ = library.PretrainedConfig.get_config_dict(self.base, local_files_only=True)
        except OSError as error:
            if self.base == self.source or is_folder(Path(self.base)):
                raise
            message = f"its base model {self.base} is not on this machine"
            raise TaskError(message, path=self.source, hint=f"download it: hf download {self.base}") from error
        own_code: Mapping[str, str] = config.get("auto_map") or {}
        if own_code and not self._trust:
            message = "the model needs code of its own, which is not run by default (`auto_map` in config.json)"
            raise TaskError(message, path=self.base, hint="if you trust it: --trust-remote-code")
        name = (config.get("architectures") or [None])[0]
        if config.get("problem_type", _ONE_LABEL) not in (None, _ONE_LABEL):
            raise TaskError(f"problem_type {config['problem_type']} is not supported", path=self.base, hint=WRITE_ONE)
        for kind in _KINDS:
            table = getattr(library.models.auto.modeling_auto, f"MODEL_FOR_{kind.table}_MAPPING_NAMES")
            classes = {each for entry in table.values() for each in ((entry,) if isinstance(entry, str) else entry)}
            if kind.auto in own_code or name in classes:
                return kind
        message = f"the architecture {name} is not supported" if name else "config.json names no architecture"
        hint = f"language models and classifiers are supported; else {WRITE_ONE}"
        raise TaskError(message, path=self.base, hint=hint)

    def _load(self, auto: str, place: str) -> Any:
        auto_class = getattr(imported("transformers"), auto)
        return auto_class.from_pretrained(place, local_files_only=True, trust_remote_code=self._trust)


class Adapter(nn.Module):
    """PEFT model whose state dict has only the adapter's tensors, named as in its file; the base model is frozen.

    Raises:
        TaskError: if the adapter's weights are not parameters of the model, as for prompt tuning.
    """

    def __init__(self, base: nn.Module, folder: Path) -> None:
        super().__init__()
        peft = imported("peft", "peft")
        self.config = base.config
        self.model = peft.PeftModel.from_pretrained(base, str(folder), local_files_only=True).requires_grad_(False)
        whole: dict[str, Tensor] = self.model.state_dict(keep_vars=True)
        named = peft.get_peft_model_state_dict(self.model, state_dict=whole, save_embedding_layers=True)
        if is_file(file := folder / "adapter_model.safetensors"):
            with safe_open(file, "pt") as stored:
                saved = set(stored.keys())
            named = {name: tensor for name, tensor in named.items() if name in saved}
        inner_names = {id(tensor): name for name, tensor in whole.items()}
        if not all(id(tensor) in inner_names for tensor in named.values()):
            hint = "merge it with merge_and_unload()"
            raise TaskError("this kind of adapter cannot be optimized", path=folder, hint=hint)
        self._names = {name: inner_names[id(tensor)] for name, tensor in named.items()}

    def forward(self, **inputs: Tensor) -> Any:
        """Run the wrapped model."""
        return self.model(**inputs)

    def state_dict(self, *, keep_vars: bool = False, **_: Any) -> dict[str, Tensor]:  # pyright: ignore
        """Return the adapter's tensors by reference, without copies."""
        whole = self.model.state_dict(keep_vars=keep_vars)
        return {name: whole[inner] for name, inner in self._names.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Copy the adapter's tensors."""
        for name, tensor in self.state_dict(keep_vars=True).items():
            tensor.data.copy_(state_dict[name])

    def requires_grad_(self, requires_grad: bool = True) -> Adapter:
        """Set ``requires_grad`` of the adapter's tensors only."""
        for tensor in self.state_dict(keep_vars=True).values():
            tensor.requires_grad_(requires_grad)
        return self


def _base(folder: Path) -> str:
    if is_file(folder / "adapter_config.json"):
        config: Any = read_json(folder / "adapter_config.json")
        name = config.get("base_model_name_or_path") if isinstance(config, dict) else None
        if not isinstance(name, str):
            raise TaskError("adapter_config.json does not name the base model", path=folder)
        return name
    if not is_file(folder / "config.json"):
        raise TaskError("has no config.json", path=folder, hint="copy the model's beside its weights, or " + WRITE_ONE)
    return str(folder)


def _use_saved_names(model: nn.Module, source: str) -> None:
    """Rename the state dict to the names that `save_pretrained` writes, which may differ since transformers 5."""
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


def imported(module: str, extra: str = "hf") -> Any:
    """Import and return a module that an ``extra`` of ckptavg installs; UsageError naming the extra without it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(f"this task needs `{module}`", hint=f"pip install 'ckptavg[{extra}]'") from error


@contextmanager
def translate_errors(source: str, subject: str) -> Generator[None]:
    """Turn exceptions of the libraries into one-line errors that begin with ``source`` and ``subject``."""
    try:
        yield
    except Exception as error:  # boundary to third-party code
        if isinstance(error, CkptavgError) or is_out_of_memory(error):
            raise
        first_line = next(iter(str(error).strip().splitlines()), "")
        message = f"{subject}: {type(error).__name__}: {first_line}"
        raise TaskError(message, path=source, hint="-v shows the traceback") from error


@contextmanager
def offline() -> Generator[None]:
    """Block network access, which `local_files_only` alone does not, and silence warnings and progress bars."""
    log = imported("transformers").utils.logging
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
