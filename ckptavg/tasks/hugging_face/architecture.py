"""Detection and construction, without network access, of the model or adapter in a Hugging Face directory."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from ckptavg.errors import TaskError, UsageError
from ckptavg.filesystem.regular_file import is_file, is_folder
from ckptavg.tasks.hugging_face import adapter
from ckptavg.tasks.hugging_face.adapter import Adapter
from ckptavg.tasks.hugging_face.library import WRITE_ONE, imported, offline, translate_errors

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
    Kind("tokens", "AutoModelForTokenClassification", "TOKEN_CLASSIFICATION",
         (("tokens", "ner_tags"), ("tokens", "labels"))),
    Kind("image", "AutoModelForImageClassification", "IMAGE_CLASSIFICATION", (("image", "label"),)),
)  # fmt: skip
_CLASSIFIERS: Final = ("text", "tokens", "image")
# PEFT's task_type; an adapter without one was trained on a model of `auto_mapping`
_TASK_TYPES: Final = {"SEQ_2_SEQ_LM": "seq2seq", "CAUSAL_LM": "causal", "SEQ_CLS": "text", "TOKEN_CLS": "tokens"}
_PROBE: Final = 9973  # number of classes by which the output layer is found


class ModelFolder:
    """The model that a directory declares, or the base model that a PEFT adapter in it names.

    With ``trust``, model code in the directory may run. ``base`` replaces the base model that an adapter names.

    Attributes:
        source: the directory given by the user, for errors.
        base: the model to build: the directory itself, or the adapter's base model.
        kind: the kind of model, by an adapter's task_type or else by the architecture in config.json.
        config: config.json of ``base``, with the number of classes that an adapter has.
    Raises:
        UsageError: if transformers is not installed, or ``base`` is given for a directory without an adapter.
        TaskError: if there is no language model or classifier, it needs untrusted code or is not on this machine.
    """

    def __init__(self, folder: Path, *, trust: bool, base: Path | str | None = None) -> None:
        self._folder = folder
        self._trust = trust
        self.source = str(folder)
        self._adapter = adapter.settings(folder)
        if self._adapter is not None:
            self.base = str(base) if base else adapter.base_of(folder, self._adapter)
        elif base is not None:
            raise UsageError("--base names the base model of PEFT adapters, but there is no adapter", path=folder)
        elif is_file(folder / "config.json"):
            self.base = self.source
        else:
            hint = "copy the model's beside its weights, or " + WRITE_ONE
            raise TaskError("has no config.json", path=folder, hint=hint)
        with translate_errors(self.source, "config.json"), offline():
            self.kind, self.architecture = self._find_kind()
            self.config = self._load("AutoConfig", self.base)
            if self._adapter is not None:
                self._fit_adapter()

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

        Otherwise the weights are arbitrary, and the state dict has the names of saved files. Causal classifiers find
        the last token by ``pad_token``.
        """
        with translate_errors(self.source, "model"), offline():
            auto = getattr(imported("transformers"), self.kind.auto)
            options = {"trust_remote_code": self._trust, "torch_dtype": torch.float32}
            if self._adapter is None:
                model: Any = auto.from_config(self.config, **options)
                _use_saved_names(model, self.base)
            else:
                model = self._loaded_base(auto, options)
            for config in (model.config, model.config.get_text_config()):
                if hasattr(config, "use_cache"):
                    config.use_cache = False
                if pad_token is not None:
                    config.pad_token_id = pad_token
            if self._adapter is None:
                return model
            load = imported("peft", "peft").PeftModel.from_pretrained
            adapted = load(model, self.source, local_files_only=True)
        return Adapter(adapted, adapter.shapes(self._folder))

    def _loaded_base(self, auto: Any, options: Mapping[str, Any]) -> nn.Module:
        """Load the base model; weights of a shape that the adapter changes are random until the adapter is loaded."""
        model, report = auto.from_pretrained(
            self.base, config=self.config, local_files_only=True, ignore_mismatched_sizes=True,
            output_loading_info=True, **self._revision, **options,
        )  # fmt: skip
        mismatched = {key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]}
        adapter.check_complete(self._folder, {*report["missing_keys"], *mismatched})
        return model

    @property
    def _revision(self) -> Mapping[str, Any]:
        """The revision of the base model that the adapter names, as an option of the loaders."""
        revision = self._adapter and self._adapter.get("revision")
        return {"revision": revision} if revision else {}

    def _fit_adapter(self) -> None:
        """Set the numbers of classes and of tokens in `config` to those of the layers that the adapter saves."""
        stored, probe = adapter.shapes(self._folder), self._load("AutoConfig", self.base)
        probe.num_labels = _PROBE
        with torch.device("meta"):
            auto_class = getattr(imported("transformers"), self.kind.auto)
            model = auto_class.from_config(probe, trust_remote_code=self._trust)
        table = None if self.kind.name == "image" else model.get_input_embeddings().weight
        for name, tensor in model.named_parameters():
            if shape := stored.get(adapter.PREFIX + name):
                if tensor is table:
                    self.config.get_text_config().vocab_size = shape[0]
                elif tensor.shape[0] == _PROBE and self.kind.name in _CLASSIFIERS:
                    self.config.num_labels = shape[0]

    def _find_kind(self) -> tuple[Kind, str]:
        """Return the kind of model, and the name of the architecture, or PEFT's task_type, that declares it."""
        library = imported("transformers")
        try:
            config, _ = library.PretrainedConfig.get_config_dict(self.base, local_files_only=True, **self._revision)
        except OSError as error:
            if self._adapter is None or is_file(Path(self.base) / "config.json"):
                raise
            message = f"its base model {self.base} is not on this machine"
            download = "" if Path(self.base).is_absolute() else f", or download it: hf download {self.base}"
            hint = f"name its directory: --base PATH{download}"
            raise TaskError(message, path=self.source, hint=hint) from error
        own_code: Mapping[str, str] = config.get("auto_map") or {}
        if own_code and not self._trust:
            message = "the model needs code of its own, which is not run by default (`auto_map` in config.json)"
            raise TaskError(message, path=self.base, hint="if you trust it: --trust-remote-code")
        if config.get("problem_type", _ONE_LABEL) not in (None, _ONE_LABEL):
            raise TaskError(f"problem_type {config['problem_type']} is not supported", path=self.base, hint=WRITE_ONE)
        name = (config.get("architectures") or [None])[0]
        if self._adapter is not None:
            if (task_type := self._adapter.get("task_type")) is not None:
                return _by_task_type(task_type, self.source), str(task_type)
            name = (self._adapter.get("auto_mapping") or {}).get("base_model_class", name)
        for kind in _KINDS:
            table = getattr(library.models.auto.modeling_auto, f"MODEL_FOR_{kind.table}_MAPPING_NAMES")
            classes = {each for entry in table.values() for each in ((entry,) if isinstance(entry, str) else entry)}
            if kind.auto in own_code or name in classes:
                return kind, str(name)
        message = f"the architecture {name} is not supported" if name else "config.json names no architecture"
        hint = f"language models and classifiers are supported; else {WRITE_ONE}"
        raise TaskError(message, path=self.base, hint=hint)

    def _load(self, auto: str, place: str) -> Any:
        auto_class = getattr(imported("transformers"), auto)
        revision = self._revision if place == self.base else {}
        return auto_class.from_pretrained(place, local_files_only=True, trust_remote_code=self._trust, **revision)


def _by_task_type(task_type: str, source: str) -> Kind:
    if task_type not in _TASK_TYPES:
        hint = f"{', '.join(_TASK_TYPES)} are supported; else {WRITE_ONE}"
        raise TaskError(f"task_type {task_type} in adapter_config.json is not supported", path=source, hint=hint)
    return next(kind for kind in _KINDS if kind.name == _TASK_TYPES[task_type])


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
