"""An archive as NeMo's ``SaveRestoreConnector`` writes it: the folder of config and weights, by ``tarfile``."""

import tarfile
from pathlib import Path

import torch


def sample(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    state = {"encoder.weight": torch.arange(6.0).view(2, 3)}
    (folder / "content").mkdir(exist_ok=True)
    (folder / "content" / "model_config.yaml").write_text("target: nemo")
    torch.save(state, folder / "content" / "model_weights.ckpt")
    with tarfile.open(folder / "model.nemo", "w:") as archive:
        archive.add(folder / "content", arcname=".")
    return folder / "model.nemo", state
