"""Hand-written PyTorch loops, without this library, that `sequel bench` compares the learner with."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import Logger
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from sequel_core.algorithms.kcl import KCLHParams
from sequel_core.algorithms.naive import NaiveHParams
from sequel_core.backbones import BACKBONES as SETTINGS
from sequel_core.hparams import AlgorithmHParams, MemoryHParams, OptimizerHParams, TrainingHParams
from sequel_core.runs.learner import FitMonitor
from sequel_core.runs.orchestrator import training_numbers
from sequel_core.stream import plan
from sequel_core.stream.benchmark import Benchmark
from sequel_lightning.backbones import BACKBONES, MLP, initialise
from sequel_lightning.build import build_optimizer, make_learner, use_one_thread
from sequel_lightning.data import as_batch
from sequel_lightning.learner import quiet
from sequel_lightning.loggers import LOGGERS

WIDTHS = (256, 256)
RATE = 0.01
SEED = 0
SILENT = FitMonitor(on_progress=lambda progress: None, on_evaluate=lambda: None)


class BareModule(pl.LightningModule):
    """The least LightningModule that trains the network with a method, as one would write it alone.

    Past tasks are stood in for by ones (importances), the present weights (anchors), half the classes and the
    first samples (memories, drawn from with torch's own generator, with replacement; for KCL the coreset).
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
        self.old: Any = copy.deepcopy(net).requires_grad_(False) if self.method in ("lfl", "icarl") else None
        self.automatic_optimization = self.method != "lamaml"
        self.rates = [torch.full_like(p, self.settings.get("alpha_init", 0)) for p in net.parameters()]
        if isinstance(hparams, KCLHParams):
            width, bases = self.net.head.in_features, hparams.d_rn_f
            dense = [[nn.Linear(width, n * width) for n in (1, 1, 2)] for _ in range(2)]
            self.posterior, self.prior = (nn.Sequential(a, nn.ELU(), b, nn.ELU(), c) for a, b, c in dense)
            self.own = nn.ParameterList(torch.tensor(a) for a in (hparams.lmd, 1.0, 0.0))
            self.basis_phase = 2 * math.pi * torch.rand(bases)
            self.core = samples[0], F.one_hot(samples[1], self.net.head.out_features).float()
        if isinstance(hparams, MemoryHParams):
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
        if self.method == "kcl":
            return self.kernel_loss(x, y)
        if self.method == "lamaml":
            return self.look_ahead(x, y)
        logits = self.net(self.pixels(x))
        if self.method == "icarl":
            with torch.no_grad():
                old = self.old(self.pixels(x)).sigmoid()
            past = torch.arange(old.shape[1]) < old.shape[1] // 2
            target = torch.where(past, old, F.one_hot(y, old.shape[1]).float())
            return F.binary_cross_entropy_with_logits(logits, target)
        loss = F.cross_entropy(logits, y)
        if self.method == "mcsgd":
            self.keep(x, y)
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

    def kernel_loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Return KCL's loss."""
        h, core = (F.normalize(self.net.features(self.pixels(a))) for a in (x, self.core[0]))
        (m, v), (m0, v0) = self.posterior(core.mean(0)).chunk(2), self.prior(h.mean(0)).chunk(2)
        bases = m + (v / 2).exp() * torch.randn(len(self.basis_phase), len(m))
        psi, psi_core = (
            math.sqrt(2 / len(bases)) * torch.cos(a @ bases.T + self.basis_phase) for a in (h, core)
        )
        lmd, gain, offset = self.own
        matrix = psi_core @ psi_core.T + (lmd.abs() + 0.01) * torch.eye(len(core))
        found = torch.cholesky_solve(self.core[1], torch.linalg.cholesky(matrix))
        logits = gain * (psi @ psi_core.T @ found) + offset
        divergence = 0.5 * (v0 - v + (v.exp() + (m - m0) ** 2) / v0.exp() - 1).sum()
        loss: Tensor = F.cross_entropy(logits, y) + self.settings["tau"] * divergence
        return loss

    def look_ahead(self, x: Tensor, y: Tensor) -> Tensor:
        """Take La-MAML's glances, and move the weights; return the loss of the first."""
        names, params = zip(*self.net.named_parameters(), strict=True)
        fast: Any
        settings, means = self.settings, []

        def loss_at(weights: Any, x: Tensor, y: Tensor) -> Tensor:
            named = dict(zip(names, weights, strict=True))
            return F.cross_entropy(functional_call(self.net, named, (self.pixels(x),)), y)

        def follow(weights: Any, rates: Any, gradient: Any) -> list[Tensor]:
            return [w - F.relu(a) * g for w, a, g in zip(weights, rates, gradient, strict=True)]

        def shortened(gradient: Any) -> list[Tensor]:
            norm = torch.stack([g.norm() for g in gradient]).norm()
            return [g * (settings["grad_clip_norm"] / (norm + 1e-6)).clamp(max=1) for g in gradient]

        for glance in range(settings["glances"]):
            old, order = self.draw(len(y)), torch.randperm(len(y))
            rates, fast, losses = [a.requires_grad_() for a in self.rates], params, []
            cut = (a[order].chunk(settings["n_inner_updates"]) for a in (x, y))
            for part in zip(*cut, strict=True):
                fast = follow(fast, rates, torch.autograd.grad(loss_at(fast, *part), fast))
                losses.append(loss_at(fast, torch.cat([x, old[0]]), torch.cat([y, old[1]])))
            means.append(torch.stack(losses).mean())
            slopes = torch.autograd.grad(means[-1], [*params, *rates])
            with torch.no_grad():
                slope, rates_slope = shortened(slopes[: len(params)]), shortened(slopes[len(params) :])
                self.rates = [a - settings["lr_alpha"] * g for a, g in zip(rates, rates_slope, strict=True)]
                for p, after in zip(params, follow(params, self.rates, slope), strict=True):
                    p.copy_(after)
            if glance == 0:
                self.keep(x, y)
        return means[0].detach()

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
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=RATE)


def plain_step(module: BareModule, optimizer: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Take a step without a Trainer; return the loss."""
    optimizer.zero_grad()
    loss = module.training_step(batch, 0)
    if module.automatic_optimization:
        loss.backward()
        module.on_before_optimizer_step(optimizer)
        module.step(optimizer.step)
    return loss.detach()


class Batches:
    """Tensors, already cut into batches."""

    def __init__(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self._batches)


def network(benchmark: Benchmark, backbone: str) -> nn.Module:
    """Return the network that is measured; the multi-layer perceptron runs on one thread."""
    sizes: Any = {"num_classes": benchmark.num_classes, "image_shape": benchmark.image_shape}
    if backbone == "mlp":
        use_one_thread()
        return initialise(MLP(WIDTHS, **sizes), SEED)
    return initialise(BACKBONES[backbone](**vars(SETTINGS[backbone]()), **sizes), SEED)


def ours(
    hparams: AlgorithmHParams,
    net: nn.Module,
    benchmark: Benchmark,
    batch_size: int,
    loggers: Sequence[Logger] = (),
) -> Callable[[], float]:
    """Return a function that trains a learner on the second task for one epoch and returns the seconds.

    Args:
        hparams: of the algorithm.
        net: left as it is.
        benchmark: of two tasks.
        batch_size: of training.
        loggers: that get all that a run logs while it trains.
    """
    first, task = benchmark.tasks
    training = TrainingHParams(batch_size=batch_size, seed=SEED)
    optimizer = build_optimizer(OptimizerHParams(lr=RATE))
    learner = make_learner(hparams, copy.deepcopy(net), optimizer, benchmark, training, loggers=loggers)
    monitor = SILENT
    if loggers:
        learner.start_stream(learner.describe())
        monitor = SILENT._replace(on_progress=lambda told: learner.log(training_numbers(told, told.step)))
    learner.fit_task(first, monitor)
    learner.module.end_task = lambda batches: None  # type: ignore[method-assign]

    def fit() -> float:
        start = time.perf_counter()
        learner.fit_task(task, monitor)
        return time.perf_counter() - start

    return fit


def logging_contenders(
    hparams: AlgorithmHParams,
    benchmark: Benchmark,
    batch_size: int,
    backbone: str,
    names: Sequence[str],
    directory: Path,
) -> dict[str, Callable[[], float]]:
    """Return the learner with some loggers, which write into a directory, and without."""
    net = network(benchmark, backbone)
    loggers = [LOGGERS[name](directory, {}) for name in names]
    return {
        "sequel, logging": ours(hparams, net, benchmark, batch_size, loggers),
        "sequel, no logger": ours(hparams, net, benchmark, batch_size),
    }


def contenders(
    hparams: AlgorithmHParams, benchmark: Benchmark, batch_size: int, backbone: str = "mlp"
) -> dict[str, Callable[[], float]]:
    """Return functions that train on the second task for one epoch and return the seconds, ours first."""
    _, task = benchmark.tasks
    net = network(benchmark, backbone)
    samples = task.train.take(plan.epoch_batches(0, 0, 0, len(task.train), batch_size).reshape(-1))
    x, y, _, _ = as_batch(samples)
    batches = Batches(list(zip(x.split(batch_size), y.split(batch_size), strict=True)))
    chosen = samples if task.coreset is None else task.coreset.take(np.arange(len(task.coreset)))
    stored = as_batch(chosen)[:2]
    scale, shift = (
        torch.tensor(a, dtype=torch.float32).reshape(-1, 1, 1)
        for a in (benchmark.normalisation.scale, benchmark.normalisation.shift)
    )

    def bare() -> float:
        module = BareModule(copy.deepcopy(net), scale, shift, hparams, stored)
        off: dict[str, Any] = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
        with quiet():
            start = time.perf_counter()
            pl.Trainer(max_epochs=1, enable_model_summary=False, **off).fit(module, batches)
            return time.perf_counter() - start

    def plain() -> float:
        module = BareModule(copy.deepcopy(net), scale, shift, hparams, stored)
        optimizer: Any = module.configure_optimizers()
        start = time.perf_counter()
        for batch in batches:
            plain_step(module, optimizer, batch)
        return time.perf_counter() - start

    found = {"sequel": ours(hparams, net, benchmark, batch_size)}
    found |= {"bare LightningModule": bare, "PyTorch loop": plain}
    if hparams.name != "naive":
        found["sequel, naive"] = ours(NaiveHParams(), net, benchmark, batch_size)
    return found
