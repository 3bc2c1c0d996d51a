"""PEFT adapters: their settings, their base model, and the model whose state is the adapter alone."""

import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

from torch import Tensor, nn

from ckptavg.checkpoints.state_dict import model_tensors
from ckptavg.errors import InputError, TaskError
from ckptavg.filesystem.regular_file import is_file
from ckptavg.filesystem.strict_json import read_json
from ckptavg.readers import open_reader
from ckptavg.tasks.hugging_face.library import imported, offline

_CONFIG: Final = "adapter_config.json"
PREFIX: Final = "base_model.model."  # of names in an adapter's file
_RANKS: Final = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "init_lora_weights")


def settings(folder: Path) -> Mapping[str, Any] | None:
    """Read the adapter_config.json in ``folder``; None if there is none."""
    if not is_file(folder / _CONFIG):
        return None
    config = read_json(folder / _CONFIG)
    if not isinstance(config, dict):
        raise InputError("is not a JSON object", path=folder / _CONFIG)
    return config


def base_of(folder: Path, adapter: Mapping[str, Any]) -> str:
    """Return the directory of the base model of the adapter in ``folder``, else its name in the hub's cache.

    A relative path is looked up from the working directory, the adapter's and the two above it, because a training
    script's paths are relative to where it was started.
    """
    name = adapter.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise TaskError("adapter_config.json does not name the base model", path=folder, hint="name it: --base PATH")
    near = folder.resolve()
    places = (place / name for place in (Path(), near, near.parent, near.parent.parent))
    return next((str(place) for place in places if is_file(place / "config.json")), name)


def shapes(folder: Path) -> Mapping[str, tuple[int, ...]]:
    """Return the shapes of the tensors in the adapter's file, by name; empty if there is no file."""
    path = next((folder / name for name in ("adapter_model.safetensors", "adapter_model.bin")
                 if is_file(folder / name)), None)  # fmt: skip
    if path is None:
        return {}
    reader = open_reader(path)
    try:
        return {name: tensor.shape for name, tensor in model_tensors(reader, None)[1].items()}
    finally:
        reader.close()


def check_complete(folder: Path, untrained: Collection[str]) -> None:
    """Check that weights which the base model lacks, and which are therefore ``untrained``, are in the adapter's file.

    Raises:
        TaskError: naming one that training drew at random and did not save, so that no score can be repeated.
    """
    stored = shapes(folder)
    lost = sorted(name for name in untrained if PREFIX + name not in stored)
    if lost:
        modules = ", ".join(f'"{module}"' for module in dict.fromkeys(name.rpartition(".")[0] for name in lost))
        message = f"{lost[0]} is neither in the base model nor in the adapter: it was random in training and not saved"
        hint = f"train with modules_to_save=[{modules}], or score otherwise, such as by --score-cmd"
        raise TaskError(message, path=folder, hint=hint)


def adapter_alone(model: nn.Module) -> nn.Module:
    """Return a PEFT model as an `Adapter`, and any other model as it is."""
    peft = sys.modules.get("peft")
    return Adapter(model, ()) if peft is not None and isinstance(model, peft.PeftModel) else model


class Adapter(nn.Module):
    """PEFT model whose state dict has only the adapter's tensors, named as in its file; the base model is frozen.

    Args:
        model: the PEFT model.
        saved: the names in the adapter's file, the only ones taken; if empty, all but those of embeddings.
    Raises:
        TaskError: if the adapter's weights are not parameters of the model, as for prompt tuning.
    """

    def __init__(self, model: nn.Module, saved: Collection[str]) -> None:
        super().__init__()
        self.model: Any = model.requires_grad_(False)
        peft = imported("peft", "peft")
        whole: dict[str, Tensor] = model.state_dict(keep_vars=True)
        named = peft.get_peft_model_state_dict(model, state_dict=whole, save_embedding_layers=bool(saved))
        named = {name: tensor for name, tensor in named.items() if name in saved} if saved else named
        inner_names = {id(tensor): name for name, tensor in whole.items()}
        if not all(id(tensor) in inner_names for tensor in named.values()):
            raise TaskError("this kind of adapter cannot be optimized", hint="merge it with merge_and_unload()")
        self._saved = saved
        self._names = {name: inner_names[id(tensor)] for name, tensor in named.items()}

    def reranked(self, config: Mapping[str, Any]) -> "Adapter":
        """Return the adapter with the ranks of another adapter_config.json, and with arbitrary factors.

        It takes over the base model; this adapter must not be used afterwards.
        """
        peft, settings = imported("peft", "peft"), self.model.peft_config[self.model.active_adapter]
        for key in _RANKS:
            setattr(settings, key, config[key])
        with offline():
            return Adapter(peft.get_peft_model(self.model.unload(), settings), self._saved)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Run the wrapped model."""
        return self.model(*inputs, **named)

    def __getattr__(self, name: str) -> Any:
        """Look up what the wrapper lacks, such as ``config``, in the wrapped model."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def state_dict(self, *, keep_vars: bool = False, **_: Any) -> dict[str, Tensor]:  # pyright: ignore
        """Return the adapter's tensors by reference, without copies."""
        whole = self.model.state_dict(keep_vars=keep_vars)
        return {name: whole[inner] for name, inner in self._names.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Copy the adapter's tensors."""
        for name, tensor in self.state_dict(keep_vars=True).items():
            tensor.data.copy_(state_dict[name])

    def requires_grad_(self, requires_grad: bool = True) -> "Adapter":
        """Set ``requires_grad`` of the adapter's tensors only."""
        for tensor in self.state_dict(keep_vars=True).values():
            tensor.requires_grad_(requires_grad)
        return self
