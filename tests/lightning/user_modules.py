"""A user's LightningModule, its data and its Trainer, for the tests of `sequel_lightning.attach`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from sequel_core import LeafSpec, StreamSpec
from sequel_lightning import attach
from sequel_lightning.attach.replay import Replay

TASKS, STEPS, BATCH = 3, 30, 7
SPEC = StreamSpec(LeafSpec((6,), "float64"), 4, TASKS, "domain", np.ones((TASKS, 4), bool))
CLASSES = [range(4)] * TASKS


class Classifier(pl.LightningModule):
    """A user's module: batches are dicts, and it logs a loss and a metric in every step."""

    def __init__(self, optimizer: Callable[..., Any], dropout: float = 0.0) -> None:
        super().__init__()
        self.net = network(dropout)
        self.optimizer_factory = optimizer
        self.accuracy = MulticlassAccuracy(4)
        self.steps = 0

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        logits = self.net(batch["x"])
        loss = F.cross_entropy(logits, batch["y"])
        self.accuracy(logits, batch["y"])
        self.log("loss", loss)
        self.log_dict({"accuracy": self.accuracy})
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer_factory(self.net.parameters())
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 50, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Network(nn.Module):
    """A network with features and a head."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(dropout))
        self.head = nn.Linear(16, 4)

    def features(self, x: Tensor) -> Any:
        return self.body(x)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.features(x))


def network(dropout: float = 0.0) -> Network:
    torch.manual_seed(5)
    return Network(dropout).double()


class Items(Dataset[Any]):
    """Samples as dicts, with new noise each time that they are read."""

    def __init__(self, x: Tensor, y: Tensor, noise: float) -> None:
        self.x, self.y, self.noise = x, y, noise

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Any]:
        x = self.x[index]
        if self.noise:
            x = x + self.noise * torch.randn_like(x)
        return {"x": x, "y": self.y[index]}


def loader(
    task: int, as_dict: bool = True, steps: int = STEPS, shuffle: bool = False, noise: float = 0.0
) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(task)
    x = torch.randn(steps * BATCH, 6, generator=generator, dtype=torch.float64)
    y = (x.roll(task, 1)[:, :4] + 0.1).argmax(1)
    return DataLoader(Items(x, y, noise) if as_dict else TensorDataset(x, y), BATCH, shuffle=shuffle)


def fit(
    module: pl.LightningModule, task: int, callbacks: list[Any], steps: int = STEPS, **options: Any
) -> pl.Trainer:
    """Train on a task, with the loader that the callbacks need."""
    data: Any = loader(task, isinstance(module, Classifier), steps)
    if isinstance(module, Classifier):
        data = with_loader(data, callbacks)
    new = trainer(callbacks, **options)
    new.fit(module, data)
    return new


def with_loader(data: Any, callbacks: list[Any], bare: bool = False, **options: Any) -> Any:
    """Return the loader with the replay of a callback; without one a loader that resumes, unless `bare`."""
    for keep in callbacks:
        if isinstance(keep, Replay):
            labels = data.dataset.y if keep.labelled else None
            return attach.with_replay(data, keep, labels, **options)
    return data if bare else Resumable(data)


def trainer(callbacks: list[Any], **options: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    defaults = {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False, **quiet}
    return pl.Trainer(**{**defaults, **options}, callbacks=callbacks)


def scheduled(parameters: Any) -> Any:
    """The optimizer and the scheduler of `Classifier`, as a ContinualModule takes them."""
    optimizer = adam(parameters)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 50, 0.9)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


adam = partial(torch.optim.Adam, lr=2e-3, weight_decay=0.01)


def outputs(module: Any, batch: Any) -> Tensor:
    logits: Tensor = module.net(batch["x"])
    return logits


def features(module: Any, batch: Any) -> Tensor:
    values: Tensor = module.net.features(batch["x"])
    return values


class Resumable:
    """A loader that continues where a checkpoint was written."""

    def __init__(self, batches: Any) -> None:
        self.batches, self.position, self.start = list(batches), 0, 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        start, self.start = self.start, 0
        for position, batch in enumerate(self.batches[start:], start + 1):
            self.position = position
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = state["position"] % len(self.batches)
