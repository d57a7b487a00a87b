"""Sums over samples and steps are in float32 or wider, whatever the dtype of the weights."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sequel_core.algorithms.ewc import EWCHParams
from sequel_core.algorithms.mas import MASHParams
from sequel_core.algorithms.si import SIHParams
from sequel_core.hparams import AlgorithmHParams
from sequel_core.stream.task import Batch
from sequel_lightning import ALGORITHMS
from sequel_lightning.consolidation import CONSOLIDATED
from sequel_lightning.quadratic import penalty
from tests.lightning.parts import CLASSES, ICARL, MOMENTUM, At, learn, module, position, stream

HALF = torch.bfloat16
BOTH = [EWCHParams(fisher_samples=None), MASHParams()]


class Slow(nn.Module):
    """A network that no sample changes by much: many small terms are summed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(9, 6), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.tanh(self.first(x.flatten(1))))
        return logits


def made(hparams: AlgorithmHParams) -> Any:
    return ALGORITHMS[hparams.name](Slow().to(HALF), MOMENTUM, hparams)


@pytest.mark.parametrize("hparams", BOTH, ids=lambda hparams: hparams.name)
@pytest.mark.parametrize("branching", [False, True], ids=["vmap", "loop"])
def test_the_importance_of_a_network_in_bfloat16_loses_nothing(
    hparams: AlgorithmHParams, branching: bool
) -> None:
    """The sum of the squares of the same gradients, in float64; in bfloat16 it lacked a large part."""
    module, count = made(hparams), 300 if branching else 1500
    net = module.net
    if branching:
        net.register_forward_hook(lambda net, args, logits: logits if logits.sum() > 1e9 else logits * 1)
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(count, 1, 3, 3))).to(HALF)
    y = torch.from_numpy(rng.integers(0, CLASSES, count))
    batches = [Batch(*part) for part in zip(x.split(4), y.split(4), (0 * y).split(4), strict=True)]
    with torch.enable_grad():
        actual = module.eval().importances(module.frozen_params(), batches)
    expected = {k: torch.zeros_like(p, dtype=torch.float64) for k, p in net.named_parameters()}
    for image, label in zip(x, y, strict=True):
        logits = net(image[None])
        loss = F.cross_entropy(logits, label[None]) if hparams.name == "ewc" else logits.square().sum()
        for k, g in zip(expected, torch.autograd.grad(loss, list(net.parameters())), strict=True):
            expected[k] += (g.double().square() if hparams.name == "ewc" else g.double().abs()) / count
    for k, f in expected.items():
        assert actual[k].dtype == torch.float32
        # Single gradients in bfloat16 differ by how they are rounded, 0.4 % each; their sum does by less.
        assert float(actual[k].sum()) == pytest.approx(float(f.sum()), rel=2e-3 if not branching else 1e-5)


@pytest.mark.parametrize("precision", ["bf16-true", "32-true"])
@pytest.mark.parametrize("hparams", [*BOTH, SIHParams()], ids=lambda hparams: hparams.name)
def test_a_trainer_in_bfloat16_leaves_sums_in_float32(hparams: AlgorithmHParams, precision: Any) -> None:
    benchmark = stream(num_tasks=2)
    torch.manual_seed(0)
    module: Any = ALGORITHMS[hparams.name](Slow(), MOMENTUM, hparams, benchmark.spec)
    kept: dict[str, Tensor] = {}
    for task in range(2):
        learn(module, benchmark, task, precision=precision)
        weights = HALF if precision == "bf16-true" else torch.float32
        assert {p.dtype for p in module.net.parameters()} == {weights}
        assert {a.dtype for a in module.anchor.get().values()} == {weights}
        sums = module.importance.get()
        assert {f.dtype for f in sums.values()} == {torch.float32}
        assert any(not torch.equal(f, f.to(HALF).float()) for f in sums.values())
        assert all(bool((f >= kept[k]).all()) for k, f in sums.items() if kept and hparams.name != "si")
        kept = copy.deepcopy(sums)


def test_the_path_integral_of_a_network_in_bfloat16_is_summed_in_float32() -> None:
    """The path is the sum over steps of -g times the step, written out in float64 from the same weights."""
    benchmark = stream(num_tasks=1, steps=60)
    module: Any = ALGORITHMS["si"](
        Slow().to(HALF), MOMENTUM, SIHParams(si_lambda=0.0, xi=0.1), benchmark.spec
    )
    start = {k: p.double() for k, p in module.frozen_params().items()}
    path = {k: torch.zeros_like(p) for k, p in start.items()}
    latest: dict[str, dict[str, Tensor]] = {}

    def before(trainer: pl.Trainer, hook: str) -> None:
        latest["weights"] = {k: p.double() for k, p in module.frozen_params().items()}
        latest["gradient"] = {k: p.grad.double() for k, p in module.params().items()}

    def after(trainer: pl.Trainer, hook: str) -> None:
        for k, p in module.params().items():
            path[k] -= latest["gradient"][k] * (p.detach().double() - latest["weights"][k])

    learn(
        module,
        benchmark,
        0,
        callbacks=[At(before, "on_before_optimizer_step"), At(after, "on_train_batch_end")],
    )
    for k, p in module.params().items():
        omega = path[k] / ((p.detach().double() - start[k]) ** 2 + 0.1)
        torch.testing.assert_close(module.importance.get()[k].double(), omega, rtol=1e-5, atol=1e-7)


def test_the_penalty_of_weights_in_bfloat16_is_that_of_float64() -> None:
    benchmark = stream(num_tasks=1)
    module: Any = ALGORITHMS["ewc"](Slow().to(HALF), MOMENTUM, EWCHParams(), benchmark.spec)
    learn(module, benchmark, 0)
    with torch.no_grad():
        for p in module.net.parameters():
            p.add_(0.25)
    actual = penalty(module.params(), *module.state)
    actual.backward()
    expected = 0.0
    for k, p in module.params().items():
        force = module.state.importance[k].double() * (p.detach().double() - module.state.anchor[k].double())
        expected += 0.5 * float((force * (p.detach().double() - module.state.anchor[k].double())).sum())
        torch.testing.assert_close(p.grad, force.to(HALF))
    assert float(actual.detach()) == pytest.approx(expected, rel=1e-5)


def test_exemplars_are_chosen_in_bfloat16() -> None:
    """The means are those of the exemplars' features, taken in float64 with the same weights."""
    benchmark = stream()
    model = module(benchmark, ICARL)
    learn(model, benchmark, 0, precision="bf16-true")
    assert position(model) == (0, CONSOLIDATED)
    wide: Any = copy.deepcopy(model).double()
    held = wide.contents
    features = wide.net.features(wide.normalise(held.x[held.t >= 0]))
    unit = features / features.norm(dim=1, keepdim=True)
    for c in held.y[held.t >= 0].unique():
        mean = unit[held.y[held.t >= 0] == c].mean(0)
        torch.testing.assert_close(wide.means[c], mean / mean.norm(), rtol=0, atol=0.02)
