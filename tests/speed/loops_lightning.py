"""Hand-written PyTorch loops, with and without a Trainer: what one would write for a single method.

Each takes what the past tasks would have left from the start of the task:
- importances are ones, and anchors the present weights;
- half of the classes are old ones;
- a memory holds the first samples, and is read at random, with replacement.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from sequel_core.backbones import BACKBONES as BACKBONE_HPARAMS
from sequel_core.stream.benchmark import Benchmark
from sequel_core.stream.images import Normalisation
from sequel_core.stream.task import Samples
from sequel_lightning.backbones import BACKBONES, MLP, initialise
from sequel_lightning.build import build_optimizer, make_learner
from sequel_lightning.data import as_batch
from sequel_lightning.learner import LightningLearner, quiet
from sequel_lightning.loggers import LOGGERS
from tests.speed.bench import RATE, WIDTHS, Contenders

__all__ = ["LOGGERS", "LOOPS", "build_optimizer", "make_learner"]

TRAINER: dict[str, Any] = {
    "max_epochs": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def make_network(benchmark: Benchmark, backbone: str) -> nn.Module:
    """Return the network that is measured; the MLP runs on one thread."""
    sizes: Any = {"num_classes": benchmark.num_classes, "image_shape": benchmark.image_shape}
    if backbone == "mlp":
        torch.set_num_threads(1)  # as in a run
        return initialise(MLP(WIDTHS, **sizes), seed=0)
    return initialise(BACKBONES[backbone](**BACKBONE_HPARAMS[backbone]().arguments(), **sizes), seed=0)


def skip_end_task(learner: LightningLearner) -> None:
    """Let the tasks that follow end without the work of the algorithm."""
    learner.module.end_task = lambda batches: None  # type: ignore[method-assign]


def wait_for(learner: LightningLearner) -> None:
    """Do nothing: a step on a CPU is done when it returns."""


def contenders(
    learner: LightningLearner, benchmark: Benchmark, samples: Samples, stored: Samples, scans: bool
) -> Contenders:
    """Return the learner's method as a bare LightningModule, and as a loop without a Trainer."""
    x, y = (a.split(learner.training.batch_size) for a in as_batch(samples)[:2])
    batches = Batches(zip(x, y, strict=True))
    start = hand_written(learner, benchmark.normalisation, stored)

    def bare() -> float:
        module = copy.deepcopy(start)
        with quiet():
            begin = time.perf_counter()
            pl.Trainer(**TRAINER).fit(module, batches)
            return time.perf_counter() - begin

    def plain() -> float:
        module = copy.deepcopy(start)
        optimizer = module.configure_optimizers()
        begin = time.perf_counter()
        for batch in batches:
            plain_step(module, optimizer, batch)
        return time.perf_counter() - begin

    return {"bare LightningModule": bare, "PyTorch loop": plain}


def evaluation(
    learner: LightningLearner, benchmark: Benchmark, samples: Samples, size: int
) -> Callable[[], float]:
    """Return a function that computes the accuracy on samples."""
    module = Naive(learner.module.net, benchmark.normalisation, {}, *as_batch(samples)[:2]).eval()
    batches = list(zip(*(a.split(size) for a in as_batch(samples)[:2]), strict=True))

    @torch.inference_mode()
    def accuracy() -> float:
        counts = [(module.logits(x).argmax(1) == y).sum() for x, y in batches]
        return float(torch.stack(counts).sum()) / len(samples.y)

    return accuracy


class Batches(list[Any]):
    """A list that Lightning takes for one loader; it takes a plain list for several."""


def hand_written(learner: LightningLearner, normalisation: Normalisation, stored: Samples) -> Naive:
    """Return a LightningModule of the learner's method, with copies of its weights."""
    net = copy.deepcopy(learner.module.net)
    x, y = as_batch(stored)[:2]
    return LOOPS[learner.hparams.name](net, normalisation, vars(learner.hparams), x, y)


def plain_step(module: Naive, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Take a step without a Trainer; return the loss."""
    optimizer.zero_grad()
    loss = module.training_step(batch, 0)
    if module.automatic_optimization:
        loss.backward()
        module.on_before_optimizer_step(optimizer)
        optimizer.step()
        module.on_train_batch_end(loss, batch, 0)
    return loss.detach()


class Naive(pl.LightningModule):
    """Plain SGD on the cross-entropy.

    Args:
        net: the network.
        normalisation: of the images.
        settings: of the algorithm.
        x: stored images, `[N, C, H, W]`.
        y: their labels, `[N]`.
    """

    net: Any

    def __init__(
        self, net: nn.Module, normalisation: Normalisation, settings: dict[str, Any], x: Tensor, y: Tensor
    ) -> None:
        super().__init__()
        self.net, self.settings = net, settings
        self.scale, self.shift = (
            torch.tensor(a, dtype=torch.float32)[:, None, None]
            for a in (normalisation.scale, normalisation.shift)
        )

    def pixels(self, x: Tensor) -> Tensor:
        return x.float() * self.scale + self.shift

    def logits(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(self.pixels(x))
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.logits(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=RATE)


# Regularisers.


class Regulariser(Naive):
    def __init__(self, net: nn.Module, *args: Any) -> None:
        super().__init__(net, *args)
        self.anchor = [p.detach().clone() for p in net.parameters()]
        self.importance = [torch.ones_like(p) for p in net.parameters()]
        self.path = [torch.zeros_like(p) for p in net.parameters()]


class EWC(Regulariser):
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        for p, f, a in zip(self.net.parameters(), self.importance, self.anchor, strict=True):
            loss = loss + 0.5 * (f * (p - a) ** 2).sum()
        return loss


class SI(Regulariser):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        params = list(self.net.parameters())
        self.gradient = [p.grad.clone() for p in params]
        self.before = [p.detach().clone() for p in params]
        for p, f, a, b in zip(params, self.importance, self.anchor, self.before, strict=True):
            p.grad += f * (b - a)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        for w, g, p, b in zip(self.path, self.gradient, self.net.parameters(), self.before, strict=True):
            w -= g * (p.detach() - b)


class LFL(Naive):
    def __init__(self, net: nn.Module, *args: Any) -> None:
        super().__init__(net, *args)
        self.old: Any = copy.deepcopy(net).requires_grad_(False)
        self.net.head.requires_grad_(False)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        features = self.net.features(self.pixels(x))
        with torch.no_grad():
            old = self.old.features(self.pixels(x))
        distance = ((features - old) ** 2).sum(1).mean()
        loss: Tensor = (
            F.cross_entropy(self.net.head(features), y) + self.settings["lfl_lambda"] / 2 * distance
        )
        return loss


class LwF(Naive):
    def __init__(self, net: nn.Module, *args: Any) -> None:
        super().__init__(net, *args)
        self.old: Any = copy.deepcopy(net).requires_grad_(False)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        logits, temperature = self.logits(x), self.settings["temperature"]
        with torch.no_grad():
            q = (self.old(self.pixels(x)) / temperature).softmax(1)
        distillation = -(q * (logits / temperature).log_softmax(1)).sum(1).mean()
        loss: Tensor = F.cross_entropy(logits, y) + self.settings["lwf_lambda"] * distillation
        return loss


# Methods that keep samples.


class Replay(Naive):
    def __init__(self, net: nn.Module, normalisation: Any, settings: Any, x: Tensor, y: Tensor) -> None:
        super().__init__(net, normalisation, settings, x, y)
        self.seen = size = settings["mem_size"]
        logits = torch.zeros(size, self.net.head.out_features)
        self.memory = [x[:size].clone(), y[:size].clone(), logits]

    def read(self, count: int) -> list[Tensor]:
        """Return images, labels and logits from the memory."""
        slots = torch.randint(len(self.memory[1]), (count,))
        return [a[slots] for a in self.memory]

    def write(self, *batch: Tensor) -> None:
        """Write images, labels and perhaps logits by reservoir sampling."""
        n = self.seen + torch.arange(len(batch[1]))
        slots = (torch.rand(len(n)) * (n + 1)).long()
        kept = slots < len(self.memory[1])
        for a, new in zip(self.memory, batch, strict=False):
            a[slots[kept]] = new[kept]
        self.seen += len(n)


class ER(Replay):
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        old_x, old_y, _ = self.read(len(y))
        loss = F.cross_entropy(self.logits(torch.cat([x, old_x])), torch.cat([y, old_y]))
        self.write(x, y)
        return loss


class ERACE(Replay):
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        logits = self.logits(x)
        present = F.one_hot(y, logits.shape[1]).bool().any(0)
        old_x, old_y, _ = self.read(len(y))
        loss = F.cross_entropy(logits.masked_fill(~present, -1e9), y)
        loss = loss + F.cross_entropy(self.logits(old_x), old_y)
        self.write(x, y)
        return loss


class GDumb(Replay):
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        with torch.no_grad():
            loss = F.cross_entropy(self.logits(x), y)
        self.write(x, y)
        return loss.requires_grad_()


class MIR(Replay):
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        params = dict(self.net.named_parameters())
        gradient = torch.autograd.grad(F.cross_entropy(self.logits(x), y), list(params.values()))
        old_x, old_y, _ = self.read(self.settings["num_candidates"])
        with torch.no_grad():
            virtual = {k: p - RATE * g for (k, p), g in zip(params.items(), gradient, strict=True)}
            pixels = self.pixels(old_x)
            before = F.cross_entropy(self.net(pixels), old_y, reduction="none")
            after = F.cross_entropy(functional_call(self.net, virtual, (pixels,)), old_y, reduction="none")
        best = (after - before).topk(self.settings["mem_batch_size"]).indices
        loss = F.cross_entropy(self.logits(torch.cat([x, old_x[best]])), torch.cat([y, old_y[best]]))
        self.write(x, y)
        return loss


class DER(Replay):
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        logits = self.logits(x)
        old_x, _, old_logits = self.read(len(y))
        distance = ((self.logits(old_x) - old_logits) ** 2).sum(1).mean()
        loss: Tensor = F.cross_entropy(logits, y) + self.settings["alpha"] * distance
        if "beta" in self.settings:  # DER++
            old_x, old_y, _ = self.read(len(y))
            loss = loss + self.settings["beta"] * F.cross_entropy(self.logits(old_x), old_y)
        self.write(x, y, logits.detach())
        return loss


class MCSGD(Replay):
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.write(*batch)
        return loss


class AGEM(MCSGD):
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.draw = self.read(len(batch[1]))
        return super().training_step(batch, batch_idx)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        params, (x, y, _) = list(self.net.parameters()), self.draw
        reference = torch.autograd.grad(F.cross_entropy(self.logits(x), y), params)
        along = sum((p.grad * r).sum() for p, r in zip(params, reference, strict=True))
        if along < 0:
            square = sum((r * r).sum() for r in reference)
            for p, r in zip(params, reference, strict=True):
                p.grad -= along / square * r


class ICaRL(Naive):
    def __init__(self, net: nn.Module, *args: Any) -> None:
        super().__init__(net, *args)
        self.old = copy.deepcopy(net).requires_grad_(False)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        logits = self.logits(x)
        with torch.no_grad():
            old = self.old(self.pixels(x)).sigmoid()
        num_classes = old.shape[1]
        is_old = torch.arange(num_classes) < num_classes // 2
        target = torch.where(is_old, old, F.one_hot(y, num_classes).float())
        return F.binary_cross_entropy_with_logits(logits, target)


class BiC(ICaRL):
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        logits, temperature = self.logits(x), self.settings["temperature"]
        with torch.no_grad():
            old = self.old(self.pixels(x))
        half = old.shape[1] // 2
        target = F.softmax(old[:, :half] / temperature, dim=1)
        distance = -(target * F.log_softmax(logits[:, :half] / temperature, dim=1)).sum(1).mean()
        return 0.5 * distance + 0.5 * F.cross_entropy(logits, y)


class KCL(Naive):
    def __init__(self, net: nn.Module, normalisation: Any, settings: Any, x: Tensor, y: Tensor) -> None:
        super().__init__(net, normalisation, settings, x, y)
        width, num_classes = self.net.head.in_features, self.net.head.out_features

        def inference_net() -> nn.Module:
            a, b, c = (nn.Linear(width, n * width) for n in (1, 1, 2))
            return nn.Sequential(a, nn.ELU(), b, nn.ELU(), c)

        self.posterior, self.prior = inference_net(), inference_net()
        self.classifier = nn.ParameterList(torch.tensor(a) for a in (settings["lmd"], 1.0, 0.0))
        self.basis_phase = 2 * math.pi * torch.rand(settings["d_rn_f"])
        self.core = x, F.one_hot(y, num_classes).float()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        (x, y), (core_x, core_y), (lmd, gain, offset) = batch, self.core, self.classifier
        h, core = (F.normalize(self.net.features(self.pixels(a))) for a in (x, core_x))
        (m, v), (m0, v0) = self.posterior(core.mean(0)).chunk(2), self.prior(h.mean(0)).chunk(2)
        d = len(self.basis_phase)
        bases = m + (v / 2).exp() * torch.randn(d, len(m))
        psi, psi_core = (math.sqrt(2 / d) * torch.cos(a @ bases.T + self.basis_phase) for a in (h, core))
        matrix = psi_core @ psi_core.T + (lmd.abs() + 0.01) * torch.eye(len(core))
        coefficients = torch.cholesky_solve(core_y, torch.linalg.cholesky(matrix))
        logits = gain * (psi @ psi_core.T @ coefficients) + offset
        divergence = 0.5 * (v0 - v + (v.exp() + (m - m0) ** 2) / v0.exp() - 1).sum()
        loss: Tensor = F.cross_entropy(logits, y) + self.settings["tau"] * divergence
        return loss


class LaMAML(Replay):
    def __init__(self, net: nn.Module, *args: Any) -> None:
        super().__init__(net, *args)
        self.automatic_optimization = False
        self.rates = [torch.full_like(p, self.settings["alpha_init"]) for p in net.parameters()]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        (x, y), settings, means = batch, self.settings, []
        names, params = zip(*self.net.named_parameters(), strict=True)

        def loss_at(weights: Any, x: Tensor, y: Tensor) -> Tensor:
            named = dict(zip(names, weights, strict=True))
            return F.cross_entropy(functional_call(self.net, named, (self.pixels(x),)), y)

        def follow(weights: Any, rates: Any, gradient: Any) -> list[Tensor]:
            return [w - F.relu(a) * g for w, a, g in zip(weights, rates, gradient, strict=True)]

        def clip(gradient: Any) -> list[Tensor]:
            norm = torch.stack([g.norm() for g in gradient]).norm()
            return [g * (settings["grad_clip_norm"] / (norm + 1e-6)).clamp(max=1) for g in gradient]

        for glance in range(settings["glances"]):
            (old_x, old_y, _), order = self.read(len(y)), torch.randperm(len(y))
            both = torch.cat([x, old_x]), torch.cat([y, old_y])
            rates, losses = [a.requires_grad_() for a in self.rates], []
            fast: Any = params
            pieces = (a[order].chunk(settings["n_inner_updates"]) for a in (x, y))
            for part in zip(*pieces, strict=True):
                fast = follow(fast, rates, torch.autograd.grad(loss_at(fast, *part), fast))
                losses.append(loss_at(fast, *both))
            means.append(torch.stack(losses).mean())
            gradient = torch.autograd.grad(means[-1], [*params, *rates])
            with torch.no_grad():
                of_params, of_rates = clip(gradient[: len(params)]), clip(gradient[len(params) :])
                self.rates = [a - settings["lr_alpha"] * g for a, g in zip(rates, of_rates, strict=True)]
                for p, after in zip(params, follow(params, self.rates, of_params), strict=True):
                    p.copy_(after)
            if glance == 0:
                self.write(x, y)
        return means[0].detach()


LOOPS: dict[str, type[Naive]] = {
    "naive": Naive,
    "joint": Naive,
    "stable_sgd": Naive,
    "ewc": EWC,
    "mas": EWC,
    "si": SI,
    "lfl": LFL,
    "lwf": LwF,
    "er": ER,
    "er_ace": ERACE,
    "mir": MIR,
    "der": DER,
    "derpp": DER,
    "agem": AGEM,
    "gem": AGEM,
    "mcsgd": MCSGD,
    "bic": BiC,
    "gdumb": GDumb,
    "icarl": ICaRL,
    "kcl": KCL,
    "lamaml": LaMAML,
}
"""From algorithm to its LightningModule."""
