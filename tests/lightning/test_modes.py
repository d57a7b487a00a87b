"""Training and evaluation modes are the user's: no method changes what was set before `fit`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sequel_core.algorithms.ewc import EWCHParams
from sequel_core.algorithms.naive import NaiveHParams
from sequel_core.hparams import AlgorithmHParams, TrainingHParams
from sequel_core.runs.learner import FitMonitor
from sequel_lightning import ALGORITHMS, LightningLearner
from tests.lightning.parts import (
    BATCH,
    CLASSES,
    MOMENTUM,
    SIDE,
    At,
    data,
    every_algorithm,
    learn,
    own_stream,
    stream,
    trainer,
)

pytestmark = pytest.mark.filterwarnings("ignore:Found .* module\\(s\\) in eval mode at the start of training")

REFUSE_BATCH_NORM = ("mcsgd", "lamaml")


class Net(nn.Module):
    """Has the layers whose modes matter: a normalisation with running statistics, and dropout."""

    def __init__(self, batch_norm: bool = True) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first = nn.Linear(SIDE * SIDE, 6)
        self.norm = nn.BatchNorm1d(6) if batch_norm else nn.GroupNorm(2, 6)
        self.drop = nn.Dropout(0.5)
        self.other = nn.Dropout(0.1)
        self.head = nn.Linear(6, CLASSES)

    def features(self, x: Tensor) -> Tensor:
        actual: Tensor = self.other(self.drop(self.norm(self.first(x.flatten(1))).relu()))
        return actual

    def forward(self, x: Tensor) -> Tensor:
        actual: Tensor = self.head(self.features(x))
        return actual


def modes(module: nn.Module) -> dict[str, bool]:
    return {name: part.training for name, part in module.named_modules()}


@every_algorithm
def test_modes_set_before_fit_stay_in_every_method(hparams: AlgorithmHParams, tmp_path: Path) -> None:
    """Through validation, end-of-task work, a test, and a second task; a plain loop ends alike."""
    benchmark = own_stream(hparams, validation=5)
    net = Net(batch_norm=hparams.name not in REFUSE_BATCH_NORM)
    model = ALGORITHMS[hparams.name](net, MOMENTUM, hparams, benchmark.spec)
    for part in (net.norm, net.drop):
        part.eval()
    expected = modes(model)
    statistics = {name: value.clone() for name, value in net.named_buffers()}
    seen: list[dict[str, bool]] = []
    note = At(lambda t, _: seen.append(modes(model)), "on_train_batch_start", "on_train_end")
    for task in range(2):
        done = learn(model, benchmark, task, callbacks=[note])
        assert modes(model) == expected
        done.test(model, datamodule=data(benchmark, task), verbose=False)
        assert modes(model) == expected
    assert seen == [expected] * len(seen)
    assert len(seen) > 2
    assert [name for name, training in expected.items() if not training][:2] == ["net.norm", "net.drop"]
    assert all(torch.equal(value, statistics[name]) for name, value in net.named_buffers())
    t = torch.zeros(2, dtype=torch.int64)
    model.predict(torch.zeros(2, 1, SIDE, SIDE), t)
    model.alternatives(torch.zeros(2, 1, SIDE, SIDE), t)
    assert modes(model) == expected


class Bare(pl.LightningModule):
    """What a Lightning user has without this library."""

    def __init__(self, net: nn.Module, scale: float, shift: float) -> None:
        super().__init__()
        self.net, self.scale, self.shift = net, scale, shift

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        x, y, _ = batch
        return F.cross_entropy(self.net(x.float() * self.scale + self.shift), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return MOMENTUM(self.parameters())


def test_a_frozen_batch_norm_trains_as_in_a_plain_lightning_module() -> None:
    benchmark = stream()
    mean, std = benchmark.normalisation.mean[0], benchmark.normalisation.std[0]
    nets = [Net(), Net()]
    model = ALGORITHMS["naive"](nets[0], MOMENTUM, NaiveHParams(), benchmark.spec)
    bare = Bare(nets[1], 1 / (255 * std), -mean / std)
    for net in nets:
        net.norm.eval()
    for part in (model, bare):
        torch.manual_seed(3)  # of dropout
        trainer(2).fit(part, data(benchmark, 0).train_dataloader())
    actual, expected = (torch.cat([p.detach().flatten() for p in net.parameters()]) for net in nets)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(nets[0].norm.running_mean, np.zeros(6))
    trained = Net()
    weights = torch.cat([p.detach().flatten() for p in trained.parameters()])
    assert float((actual - weights).norm()) > 0.1


@pytest.mark.parametrize("fails", [False, True], ids=["ends", "fails in validation"])
def test_the_learner_keeps_modes(fails: bool) -> None:
    benchmark = stream(validation=5)
    net = Net()
    model = ALGORITHMS["ewc"](net, MOMENTUM, EWCHParams(fisher_samples=4), benchmark.spec)
    training = TrainingHParams(batch_size=BATCH)

    def fail(*_: object) -> None:
        raise OSError("failed")

    calls = [At(fail, "on_validation_end")] if fails else []
    made = LightningLearner(model, training, trainer={"accelerator": "cpu"}, callbacks=calls)
    net.norm.eval()
    expected = modes(model)
    silent = FitMonitor(lambda progress: None, lambda: None)
    if fails:
        with pytest.raises(OSError, match="failed"):
            made.fit_task(benchmark.tasks[0], silent)
    else:
        made.fit_task(benchmark.tasks[0], silent)
        made.evaluate(benchmark.tasks[0], "test")
    assert modes(model) == expected
    np.testing.assert_array_equal(net.norm.running_mean, np.zeros(6))
