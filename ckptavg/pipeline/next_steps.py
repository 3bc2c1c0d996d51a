"""Next steps after a run: how the written file is loaded, and the command that verifies it."""

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from ckptavg.average.lora_config import CONFIG_NAME
from ckptavg.average.lora_file import read_file_config
from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.errors import InputError
from ckptavg.filesystem.regular_file import is_file
from ckptavg.filesystem.strict_json import read_json
from ckptavg.options import Options
from ckptavg.readers.sentence_transformers import MODULES

# beginnings of names in LoRA files for a pipeline of diffusers, and ends of those for one of its models
_OF_PIPELINES: Final = (
    "lora_unet_",
    "lora_te",
    "lora_transformer_",
    "unet.",
    "transformer.",
    "text_encoder",
    "diffusion_model.",
)
_OF_MODELS: Final = (".lora_A.weight", ".lora.down.weight")


def next_steps(path: Path, checkpoints: Sequence[Checkpoint], options: Options) -> Mapping[str, str]:
    """Return ``load``, Python code for the output ``path``, and ``verify``, a shell command, for the candidates."""
    places = [str(checkpoint.path.parent) for checkpoint in checkpoints]
    if len({place.startswith("/") for place in places}) > 1:
        places = [*map(os.path.abspath, places)]
    sources = os.path.commonpath(places) or "."
    verify = shlex.join(["ckptavg", "verify", str(path), "--sources", sources])
    return {"load": _loading(path, checkpoints[-1], options), "verify": verify}


def _loading(path: Path, like: Checkpoint, options: Options) -> str:
    folder, quoted = options.destination[1], json.dumps(str(path), ensure_ascii=False)
    is_adapter = is_file(like.folder / CONFIG_NAME) or any(name.startswith("base_model.") for name in like.names)
    if not is_adapter and options.format != "dcp" and read_file_config(like):
        if any(name.startswith(_OF_PIPELINES) for name in like.names):
            return f"pipeline.load_lora_weights({quoted})"
        if any(name.endswith(_OF_MODELS) for name in like.names):
            return f"model.load_lora_adapter({quoted}, prefix=None, use_safetensors=True)"  # which reads the metadata
        return f"model.load_state_dict(safetensors.torch.load_file({quoted}), strict=False)"
    if options.format == "dcp":
        key = like.key if like.reader.format == "dcp" else ""
        state = f"{{{json.dumps(key)}: model.state_dict()}}" if key else "model.state_dict()"
        return f"state = {state}; torch.distributed.checkpoint.load(state, checkpoint_id={quoted})"
    if folder is not None:
        inside = json.dumps(str(folder), ensure_ascii=False)
        if is_file(folder / MODULES):
            config = folder / "config_sentence_transformers.json"
            return f"sentence_transformers.{_class(config, 'model_type', 'SentenceTransformer')}({inside})"
        if is_adapter and is_file(folder / CONFIG_NAME):
            return f"peft.PeftModel.from_pretrained(base_model, {inside})"
        config = folder / "config.json"
        if is_file(config) and not _class(config, "type", ""):  # LeRobot's has the type of the policy
            if diffusers := _class(config, "_class_name", ""):
                return f"diffusers.{diffusers}.from_pretrained({inside})"
            return f"transformers.{_class(config, 'architectures', 'AutoModel')}.from_pretrained({inside})"
        if path.name.endswith(".index.json"):
            return f"accelerate.load_checkpoint_in_model(model, {inside})"
    if is_adapter:
        return f"peft.set_peft_model_state_dict(model, safetensors.torch.load_file({quoted}))"
    return f"model.load_state_dict(safetensors.torch.load_file({quoted}))"


def _class(config: Path, key: str, default: str) -> str:
    """Return the class that a config names under ``key``, the first of several, or ``default``."""
    with suppress(InputError):
        values: Any = read_json(config)
        names = values.get(key) if isinstance(values, dict) else None
        name = names[0] if isinstance(names, list) and names else names
        if isinstance(name, str) and name.isidentifier():
            return name
    return default
