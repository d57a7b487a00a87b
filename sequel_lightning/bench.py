"""Hand-written PyTorch loops, without this library, that `sequel bench` compares the learner with."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sequel_core import plan
from sequel_core.hparams import (
    AlgorithmHParams,
    NaiveHParams,
    OptimizerHParams,
    ReplayHParams,
    TrainingHParams,
)
from sequel_core.learner import FitMonitor
from sequel_core.task import Benchmark
from sequel_lightning.backbones import MLP, initialise
from sequel_lightning.build import build_optimizer, make_learner, use_one_thread
from sequel_lightning.data import as_batch
from sequel_lightning.learner import LightningLearner, quiet

WIDTHS = (256, 256)
RATE = 0.01
SILENT = FitMonitor(on_progress=lambda progress: None, on_evaluate=lambda: None)


class BareModule(pl.LightningModule):
    """The least LightningModule that trains the network with a method, as one would write it alone.

    Past tasks are stood in for by ones (importances), the present weights (anchors) and the first samples
    (memories, drawn from with torch's own generator, with replacement).
    """

    net: Any

    def __init__(
        self, net: nn.Module, scale: Tensor, shift: Tensor, hparams: AlgorithmHParams, samples: Any
    ) -> None:
        super().__init__()
        self.net = net
        self.scale, self.shift = scale, shift
        self.method, self.settings = hparams.name, vars(hparams)
        self.past = [(p.detach().clone(), torch.ones_like(p)) for p in net.parameters()]
        self.path = [torch.zeros_like(p) for p in net.parameters()]
        self.old: Any = copy.deepcopy(net) if self.method == "lfl" else None
        if isinstance(hparams, ReplayHParams):
            size = hparams.mem_size
            self.seen = size
            logits = torch.zeros(size, self.net.head.out_features)
            self.memory = [samples[0][:size].clone(), samples[1][:size].clone(), logits]

    def pixels(self, x: Tensor) -> Tensor:
        """Return normalised images."""
        return x.float() * self.scale + self.shift

    def draw(self, count: int) -> list[Tensor]:
        """Return images, labels and logits from the memory."""
        slots = torch.randint(len(self.memory[1]), (count,))
        return [a[slots] for a in self.memory]

    def keep(self, *new: Tensor) -> None:
        """Write a batch to the reservoir."""
        size = len(self.memory[1])
        n = self.seen + torch.arange(len(new[1]))
        slots = (torch.rand(len(n)) * (n + 1)).long()
        kept = slots < size
        for a, b in zip(self.memory, new, strict=False):
            a[slots[kept]] = b[kept]
        self.seen += len(n)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss."""
        x, y = batch
        if self.method == "er":
            old = self.draw(len(y))
            both = self.net(self.pixels(torch.cat([x, old[0]]))), torch.cat([y, old[1]])
            self.keep(x, y)
            return F.cross_entropy(*both)
        if self.method == "lfl":
            features = self.net.features(self.pixels(x))
            with torch.no_grad():
                distance = self.old.features(self.pixels(x))
            pull: Tensor = 0.0005 * ((features - distance) ** 2).sum(1).mean()
            return pull + F.cross_entropy(self.net.head(features), y)
        logits = self.net(self.pixels(x))
        loss = F.cross_entropy(logits, y)
        if self.method in ("ewc", "mas"):
            for p, (anchor, importance) in zip(self.net.parameters(), self.past, strict=True):
                loss = loss + 0.5 * (importance * (p - anchor) ** 2).sum()
        if self.method in ("der", "derpp"):
            old = self.draw(len(y))
            distance = (self.net(self.pixels(old[0])) - old[2]).square().sum(1).mean()
            loss = loss + self.settings["alpha"] * distance
        if self.method == "derpp":
            more = self.draw(len(y))
            loss = loss + self.settings["beta"] * F.cross_entropy(self.net(self.pixels(more[0])), more[1])
        if self.method in ("agem", "der", "derpp"):
            self.count = len(y)
            self.keep(x, y, logits.detach())
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Change the gradient, where the method does."""
        params = list(self.net.parameters())
        if self.method == "si":
            self.gradient = [p.grad.clone() for p in params]
            for p, (anchor, importance) in zip(params, self.past, strict=True):
                p.grad += importance * (p.detach() - anchor)
        if self.method == "agem":
            x, y, _ = self.draw(self.count)
            reference = torch.autograd.grad(F.cross_entropy(self.net(self.pixels(x)), y), params)
            along = sum((p.grad * r).sum() for p, r in zip(params, reference, strict=True))
            if along < 0:
                norm = sum((r * r).sum() for r in reference)
                for p, r in zip(params, reference, strict=True):
                    p.grad -= along / norm * r
        if self.method == "lfl":
            for p in self.net.head.parameters():
                p.grad = None

    def step(self, take: Callable[[], Any]) -> None:
        """Take the optimizer's step."""
        if self.method != "si":
            take()
            return
        before = [p.detach().clone() for p in self.net.parameters()]
        take()
        for w, g, p, old in zip(self.path, self.gradient, self.net.parameters(), before, strict=True):
            w -= g * (p.detach() - old)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        """Take the optimizer's step, under a Trainer."""
        self.step(lambda: optimizer.step(closure=optimizer_closure))

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
    """Return functions that train on the second task for one epoch and return the seconds, ours first."""
    use_one_thread()
    first, task = benchmark.tasks
    training = TrainingHParams(batch_size=batch_size)
    net = initialise(MLP(WIDTHS, benchmark.num_classes, image_shape=benchmark.image_shape), training.seed)
    optimizer = build_optimizer(OptimizerHParams(lr=RATE))
    learner = make_learner(hparams, copy.deepcopy(net), optimizer, benchmark, training)
    learner.fit_task(first, SILENT)
    naive = make_learner(NaiveHParams(), copy.deepcopy(net), optimizer, benchmark, training)
    samples = task.train.take(plan.epoch_batches(0, 0, 0, len(task.train), batch_size).reshape(-1))
    x, y, _, _ = as_batch(samples)
    batches = Batches(list(zip(x.split(batch_size), y.split(batch_size), strict=True)))
    scale, shift = (
        torch.tensor(a, dtype=torch.float32).reshape(-1, 1, 1)
        for a in (benchmark.normalisation.scale, benchmark.normalisation.shift)
    )

    def fit(learner: LightningLearner) -> float:
        start = time.perf_counter()
        learner.fit_task(task, SILENT)
        return time.perf_counter() - start

    def bare() -> float:
        module = BareModule(copy.deepcopy(net), scale, shift, hparams, (x, y))
        off: dict[str, Any] = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
        with quiet():
            start = time.perf_counter()
            pl.Trainer(max_epochs=1, enable_model_summary=False, **off).fit(module, batches)
            return time.perf_counter() - start

    def plain() -> float:
        module = BareModule(copy.deepcopy(net), scale, shift, hparams, (x, y))
        optimizer: Any = module.configure_optimizers()
        start = time.perf_counter()
        for i, batch in enumerate(batches):
            optimizer.zero_grad()
            module.training_step(batch, i).backward()
            module.on_before_optimizer_step(optimizer)
            module.step(optimizer.step)
        return time.perf_counter() - start

    found: dict[str, Callable[[], float]] = {}
    found |= {"sequel": partial(fit, learner), "bare LightningModule": bare, "PyTorch loop": plain}
    return found if hparams.name == "naive" else {**found, "sequel, naive": partial(fit, naive)}
