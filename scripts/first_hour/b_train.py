"""Train a network with BatchNorm on scikit-learn's digits by Lightning, and save every epoch."""

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset, random_split


class Digits(lightning.LightningDataModule):
    def setup(self, stage: str) -> None:
        images, labels = load_digits(return_X_y=True)
        draws = torch.Generator().manual_seed(0)  # the same labels and the same division in every process
        wrong = torch.randint(10, labels.shape, generator=draws)  # one label in ten is random
        labels = wrong.where(torch.rand(labels.shape, generator=draws) < 0.1, torch.tensor(labels))
        data = TensorDataset(torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, labels)
        self.parts: list[Subset] = random_split(data, [597, 600, 600], draws)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.parts[0], batch_size=32, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.parts[1], batch_size=100)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.parts[2], batch_size=100)


class Classifier(lightning.LightningModule):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(), nn.Linear(64 * width, 10)
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.03, momentum=0.9)


if __name__ == "__main__":
    torch.set_num_threads(1)  # a second thread does not help so small a network
    lightning.seed_everything(0)
    saver = ModelCheckpoint("ckpts", save_top_k=-1, save_last=True)
    trainer = lightning.Trainer(max_epochs=8, accelerator="cpu", logger=False, callbacks=[saver])
    trainer.fit(Classifier(width=16), Digits())
