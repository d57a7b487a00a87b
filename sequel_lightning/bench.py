"""Hand-written PyTorch loops, without this library, that `sequel bench` compares the learner with."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sequel_core import plan
from sequel_core.hparams import AlgorithmHParams, EWCHParams, OptimizerHParams, TrainingHParams
from sequel_core.learner import FitMonitor
from sequel_core.task import Benchmark
from sequel_lightning.backbones import MLP, initialise
from sequel_lightning.build import build_optimizer, make_learner
from sequel_lightning.data import as_batch
from sequel_lightning.learner import quiet

WIDTHS = (256, 256)
RATE = 0.01
SILENT = FitMonitor(on_progress=lambda progress: None, on_evaluate=lambda: None)


class BareModule(pl.LightningModule):
    """The least LightningModule that trains the network: cross-entropy and, for EWC, the penalty."""

    def __init__(self, net: nn.Module, scale: Tensor, shift: Tensor, penalised: bool) -> None:
        super().__init__()
        self.net = net
        self.scale, self.shift = scale, shift
        self.past = [(p.detach().clone(), torch.ones_like(p)) for p in net.parameters()] if penalised else []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss."""
        x, y = batch
        loss = F.cross_entropy(self.net(x.float() * self.scale + self.shift), y)
        if self.past:
            for p, (anchor, importance) in zip(self.net.parameters(), self.past, strict=True):
                loss = loss + 0.5 * (importance * (p - anchor) ** 2).sum()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return plain SGD."""
        return torch.optim.SGD(self.net.parameters(), lr=RATE)


class Batches:
    """Tensors, already cut into batches."""

    def __init__(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self._batches)


def contenders(
    hparams: AlgorithmHParams, benchmark: Benchmark, batch_size: int
) -> dict[str, Callable[[], float]]:
    """Return functions that train on the first task for one epoch and return the seconds, ours first."""
    task = benchmark.tasks[0]
    training = TrainingHParams(batch_size=batch_size)
    net = initialise(MLP(WIDTHS, benchmark.num_classes, image_shape=benchmark.image_shape), training.seed)
    learner = make_learner(
        hparams, copy.deepcopy(net), build_optimizer(OptimizerHParams(lr=RATE)), benchmark, training
    )
    samples = task.train.take(plan.epoch_batches(0, 0, 0, len(task.train), batch_size).reshape(-1))
    x, y, _, _ = as_batch(samples)
    batches = Batches(list(zip(x.split(batch_size), y.split(batch_size), strict=True)))
    scale, shift = (
        torch.tensor(a, dtype=torch.float32).reshape(-1, 1, 1)
        for a in (benchmark.normalisation.scale, benchmark.normalisation.shift)
    )
    penalised = isinstance(hparams, EWCHParams)

    def ours() -> float:
        start = time.perf_counter()
        learner.fit_task(task, SILENT)
        return time.perf_counter() - start

    def bare() -> float:
        module = BareModule(copy.deepcopy(net), scale, shift, penalised)
        off: dict[str, Any] = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
        with quiet():
            start = time.perf_counter()
            pl.Trainer(max_epochs=1, enable_model_summary=False, **off).fit(module, batches)
            return time.perf_counter() - start

    def plain() -> float:
        module = BareModule(copy.deepcopy(net), scale, shift, penalised)
        optimizer = module.configure_optimizers()
        start = time.perf_counter()
        for i, batch in enumerate(batches):
            optimizer.zero_grad()
            module.training_step(batch, i).backward()
            optimizer.step()
        return time.perf_counter() - start

    return {"sequel": ours, "bare LightningModule": bare, "PyTorch loop": plain}
