"""Directories as training libraries write them: names of weights and side files, and marks of a complete save."""

import re
from collections.abc import Set
from fnmatch import fnmatchcase
from typing import Final

WEIGHT_NAMES: Final = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
    "adapter_model.safetensors", "adapter_model.bin",
    "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.bin", "pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin",
)  # fmt: skip
SIDE_FILES: Final = {
    "optimizer*": "an optimizer's state",
    "optim[._]*": "an optimizer's state",
    "scheduler*": "a scheduler's state",
    "scaler*": "a gradient scaler's state",
    "sampler*": "a sampler's state",
    "dl_state_dict*": "a data loader's state",
    "rng_state*": "random number generators",
    "random_states_*": "random number generators",
    "extra_state*": "a scheduler's state and random number generators",  # verl
    "training_args.bin": "the trainer's arguments",
    "policy_*processor*": "a policy's processor",  # LeRobot
    "*_optim_states.pt": "an optimizer's state",  # DeepSpeed
    "*.optimizer.pth": "an optimizer's state",  # Stable-Baselines3, unpacked
    "pytorch_variables.pth": "variables that are no parameters",
    "SHA256SUMS": "what the checkpoints' sums must be",
}
SIDE_FOLDERS: Final = {
    "recipe_state": "a recipe's state",  # torchtune
    "training_state": "the training's state",  # LeRobot
    "lost+found": "the file system's own",
}
# patterns of unfinished files, of a job that is running or has died
TEMPORARY: Final = ("tmp-*", "tmp_*", "*.tmp", ".tmp*", "*.part", "*.incomplete", "*.ckptavg-tmp")
# entries of a directory that mark it as one checkpoint of the library
_MARKS: Final = {
    "trainer_state.json": "Hugging Face Trainer",
    "random_states_*.pkl": "Accelerate save_state",
    "modules.json": "sentence-transformers",
    "adapter_config.json": "PEFT adapters",
    "pretrained_model": "LeRobot",
    "mp_rank_*": "Megatron-LM",
    "CKPT.yaml": "SpeechBrain",
    "fsdp_config.json": "verl",
    "actor": "verl",
    "*.distcp": "torch.distributed.checkpoint",
    "model_index.json": "diffusers pipelines",
}
_BY_TRAINER: Final = ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth")  # Accelerate's are .bin
_STATES: Final = ("trainer_state.json", "random_states_*", "optimizer*", "rng_state*", "training_state", "CKPT.yaml")
_FURTHER: Final = re.compile(r"(model|pytorch_model)_\d+\.(safetensors|bin)")
_PARTS: Final = re.compile(r"mp_rank_\d\d(_\d\d\d)?")
TENSOR_PARALLEL: Final = "a model in {} tensor-parallel parts; merge them first with Megatron-LM's tools/checkpoint"


def is_usual(name: str) -> bool:
    """Return whether a file has one of the `WEIGHT_NAMES`, or that of a further model of Accelerate."""
    return name in WEIGHT_NAMES or _FURTHER.fullmatch(name) is not None


def usual_order(name: str) -> tuple[int, int, str]:
    """Return a sort key that puts the file to load first."""
    return WEIGHT_NAMES.index(name) if name in WEIGHT_NAMES else len(WEIGHT_NAMES), len(name), name


def library(names: Set[str]) -> str | None:
    """Return the library that writes directories with these entries, if one is known."""
    return next((name for mark, name in _MARKS.items() if any(fnmatchcase(entry, mark) for entry in names)), None)


def has_training_state(names: Set[str]) -> bool:
    """Return whether a directory holds what a job resumes from, and is so one step of it."""
    return any(fnmatchcase(name, mark) for name in names for mark in _STATES)


def incomplete(name: str, names: Set[str], anywhere: Set[str]) -> str | None:
    """Return why the save into the directory ``name`` was interrupted, or None.

    Args:
        name: its name.
        names: its entries.
        anywhere: the entries of all directories beside it, and its own.
    """
    if any(entry.endswith(".distcp") for entry in names) and not any(entry.endswith(".metadata") for entry in names):
        return "it has no .metadata"
    by_trainer = any(mark in names for mark in _BY_TRAINER) or "trainer_state.json" in anywhere
    if by_trainer and re.fullmatch(r"checkpoint-\d+", name) and "trainer_state.json" not in names:
        return "it has no trainer_state.json"
    last = "random_states_0.pkl"  # Accelerate's
    if not by_trainer and last in anywhere - names:
        return f"it has no {last}"
    return None


def tensor_parallel(names: Set[str]) -> int:
    """Return into how many parts Megatron-LM divided the model of a directory; 0 if it did not."""
    return sum(bool(_PARTS.fullmatch(name)) for name in names)
