"""Module wrapper of a PEFT model whose state dict is the adapter alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ckptavg.errors import TaskError
from ckptavg.filesystem.regular_file import is_file
from ckptavg.tasks.hugging_face.architecture import imported


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
        file = folder / "adapter_model.safetensors"
        if is_file(file):
            from safetensors import safe_open

            with safe_open(file, "pt") as stored:
                named = {name: tensor for name, tensor in named.items() if name in set(stored.keys())}
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

    def requires_grad_(self, requires_grad: bool = True) -> Adapter:
        """Set ``requires_grad`` of the adapter's tensors only."""
        for tensor in self.state_dict(keep_vars=True).values():
            tensor.requires_grad_(requires_grad)
        return self
