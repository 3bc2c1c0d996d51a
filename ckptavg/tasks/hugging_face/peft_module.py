"""A PEFT model as a module whose state is the adapter alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ckptavg.errors import TaskError
from ckptavg.filesystem.regular_file import is_file
from ckptavg.tasks.hugging_face.architecture import imported


class Adapter(nn.Module):
    """A PEFT model whose state is the adapter alone, by the names that its file has; the base does not learn.

    Args:
        base: the model, with its weights.
        folder: of the adapter.
    Raises:
        TaskError: if its weights are not parameters of the model, as those of prompt tuning are not.
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
        known = {id(tensor): name for name, tensor in whole.items()}
        if not all(id(tensor) in known for tensor in named.values()):
            raise TaskError(
                "an adapter of this kind cannot be learned on", path=folder, hint="merge it: merge_and_unload"
            )
        self._names = {name: known[id(tensor)] for name, tensor in named.items()}

    def forward(self, **inputs: Tensor) -> Any:
        """What the model gives."""
        return self.model(**inputs)

    def state_dict(self, *, keep_vars: bool = False, **_: Any) -> dict[str, Tensor]:  # pyright: ignore
        """The adapter's tensors, not copies of them."""
        whole = self.model.state_dict(keep_vars=keep_vars)
        return {name: whole[inner] for name, inner in self._names.items()}

    def requires_grad_(self, requires_grad: bool = True) -> Adapter:
        """Of the adapter alone."""
        for tensor in self.state_dict(keep_vars=True).values():
            tensor.requires_grad_(requires_grad)
        return self
