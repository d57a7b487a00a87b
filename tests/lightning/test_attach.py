"""EWC, MAS and SI as callbacks of an unchanged module: against our modules, a bare Trainer, and errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from sequel_core.algorithms.ewc import EWCHParams
from sequel_core.algorithms.mas import MASHParams
from sequel_core.algorithms.si import SIHParams
from sequel_lightning import EWC, MAS, SI, ContinualModule, Naive, attach

TASKS, STEPS, BATCH = 3, 200, 7


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


def network(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 4)).double()


def loader(task: int, as_dict: bool = True, steps: int = STEPS, shuffle: bool = False) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(task)
    x = torch.randn(steps * BATCH, 6, generator=generator, dtype=torch.float64)
    y = (x.roll(task, 1)[:, :4] + 0.1).argmax(1)
    items: Any = [{"x": a, "y": b} for a, b in zip(x, y, strict=True)] if as_dict else TensorDataset(x, y)
    return DataLoader(items, BATCH, shuffle=shuffle)


def fit(module: pl.LightningModule, task: int, callbacks: list[Callback], **options: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    data: Any = loader(task, isinstance(module, Classifier))
    data = Resumable(data) if isinstance(module, Classifier) else data
    trainer = pl.Trainer(
        **{"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False, **quiet, **options},
        callbacks=callbacks,
    )
    trainer.fit(module, data)
    return trainer


def scheduled(parameters: Any) -> Any:
    """The optimizer and the scheduler of `Classifier`, as a ContinualModule takes them."""
    optimizer = adam(parameters)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 50, 0.9)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


adam = partial(torch.optim.Adam, lr=2e-3, weight_decay=0.01)


def outputs(module: Any, batch: Any) -> Tensor:
    logits: Tensor = module.net(batch["x"])
    return logits


PAIRS: dict[str, tuple[type[ContinualModule], Any, Callable[[], attach.Attached]]] = {
    "ewc": (
        EWC,
        EWCHParams(ewc_lambda=30, fisher_samples=None),
        lambda: attach.EWC(30.0, samples=None),
    ),
    "online ewc": (
        EWC,
        EWCHParams(ewc_lambda=30, fisher_samples=101, accumulation="online", gamma=0.7),
        lambda: attach.EWC(30.0, accumulation="online", gamma=0.7, samples=101),
    ),
    "mas": (MAS, MASHParams(mas_lambda=0.05), lambda: attach.MAS(0.05, outputs)),
    "si": (SI, SIHParams(si_lambda=0.5, xi=0.01, clamp=True), lambda: attach.SI(0.5, 0.01, clamp=True)),
}


@pytest.mark.parametrize(
    "options", [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}], ids=["plain", "clipped"]
)
@pytest.mark.parametrize(("cls", "hparams", "make"), PAIRS.values(), ids=PAIRS)
def test_an_attached_method_ends_like_the_module(
    cls: type[ContinualModule], hparams: Any, make: Callable[[], attach.Attached], options: dict[str, Any]
) -> None:
    ours, theirs, keep = cls(network(), scheduled, hparams), Classifier(adam), make()
    for task in range(TASKS):
        fit(ours, task, [], **options)
        fit(theirs, task, [keep], **options)
    for a, b in zip(theirs.net.parameters(), ours.net.parameters(), strict=True):
        assert torch.dist(a, b) < 1e-10 * b.norm()
    assert keep.tasks == TASKS


def test_the_penalty_changes_the_weights() -> None:
    bare, kept, keep = Classifier(adam), Classifier(adam), attach.EWC(30.0)
    for task in range(2):
        fit(bare, task, [])
        fit(kept, task, [keep])
    assert torch.dist(bare.net[0].weight, kept.net[0].weight) > 1e-3  # type: ignore[index]


@pytest.mark.parametrize(
    "make", [lambda: attach.EWC(0.0), lambda: attach.SI(0.0), lambda: attach.MAS(0.0, outputs)]
)
def test_strength_zero_is_a_bare_trainer_exactly(make: Callable[[], attach.Attached]) -> None:
    """With dropout and shuffled loaders: the end of a task draws no random numbers of the training."""
    ends = []
    callbacks: list[list[Callback]] = [[], [make()]]
    for keep in callbacks:
        module = Classifier(adam, dropout=0.3)
        torch.manual_seed(1)
        for task in range(2):
            trainer = pl.Trainer(
                max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
                accelerator="cpu", callbacks=keep,
            )  # fmt: skip
            trainer.fit(module, loader(task, shuffle=True, steps=40))
        ends.append(module.state_dict())
    assert all(torch.equal(ends[0][name], value) for name, value in ends[1].items())


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
        self.start = state["position"]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_fit_resumes_in_the_middle_of_a_task(tmp_path: Path) -> None:
    def run(path: Path | None) -> dict[str, Any]:
        module, keep = Classifier(adam), attach.SI(0.5, 0.01)
        saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=37, save_top_k=-1)
        fit(module, 0, [keep])
        fit(module, 1, [keep, saver], enable_checkpointing=True)
        if path is not None:
            module, keep = Classifier(adam), attach.SI(0.5, 0.01)
            saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=37, save_top_k=-1)
            quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu"}
            trainer = pl.Trainer(max_epochs=1, callbacks=[keep, saver], **quiet)
            trainer.fit(module, Resumable(loader(1)), ckpt_path=str(path), weights_only=True)
        fit(module, 2, [keep])
        return {**module.state_dict(), **{f"importance {k}": v for k, v in keep.importance.items()}}

    straight, resumed = run(None), run(tmp_path / "step=111.ckpt")
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[name], value) for name, value in resumed.items())


def test_the_loss_of_the_training_step_is_the_likelihood() -> None:
    ends = []
    for nll in (
        None,
        lambda module, batch: F.cross_entropy(outputs(module, batch), batch["y"], reduction="none"),
    ):
        module, keep = Classifier(adam), attach.EWC(1.0, nll=nll, samples=20)
        fit(module, 0, [keep])
        ends.append(keep.importance)
        assert not module.accuracy.update_called  # since the end of the epoch reset it
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value)


class Manual(Classifier):
    """Steps by itself."""

    def __init__(self) -> None:
        super().__init__(adam)
        self.automatic_optimization = False


class Failing(Callback):
    """Ends a fit with an error."""

    def on_train_batch_end(self, *args: Any) -> None:
        raise RuntimeError("stop")


def test_errors_before_training() -> None:
    with pytest.raises(ValueError, match="needs automatic optimization"):
        fit(Manual(), 0, [attach.EWC(1.0)])
    with pytest.raises(ValueError, match="needs a module of your own, got a Naive"):
        fit(Naive(network(), adam), 0, [attach.EWC(1.0)])
    for call, message in (
        (lambda: attach.EWC(-1.0), "strength must be >= 0"),
        (lambda: attach.EWC(1.0, gamma=0.5), "gamma is only used with accumulation='online'"),
        (lambda: attach.EWC(1.0, samples=0), "samples must be >= 1 or None"),
        (lambda: attach.SI(1.0, xi=0.0), "xi must be > 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_an_unfinished_task_has_to_be_consolidated() -> None:
    module, keep = Classifier(adam), attach.EWC(1.0)
    with pytest.raises(RuntimeError, match="stop"):
        fit(module, 0, [keep, Failing()])
    with pytest.raises(ValueError, match="task 0 was never consolidated"):
        fit(module, 1, [keep])
    keep.consolidate(module, loader(0))
    with pytest.raises(ValueError, match="no task has begun"):
        keep.consolidate(module, loader(0))
    fit(module, 1, [keep])
    assert keep.tasks == 2
