"""A user's own `nn.Module`: what every method asks of it, and what it may do that ours do not."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sequel_core.algorithms.ewc import EWCHParams
from sequel_core.algorithms.naive import NaiveHParams
from sequel_core.hparams import AlgorithmHParams, TrainingHParams
from sequel_core.runs.learner import FitMonitor
from sequel_core.stream import plan
from sequel_core.stream.benchmark import Benchmark
from sequel_lightning import ALGORITHMS, EWC, ContinualModule, LightningLearner
from tests.lightning.parts import (
    BATCH,
    CLASSES,
    EVERY,
    MOMENTUM,
    arrays,
    assert_close,
    learn,
    own_stream,
    stream,
)

SILENT = FitMonitor(lambda progress: None, lambda: None)
NEED_FEATURES = ("lfl", "kcl", "icarl")


class Own(nn.Module):
    """Convolutions, an activation without state that is used twice, dropout, a buffer, any names."""

    mean: Tensor

    def __init__(self, outputs: int = CLASSES, dropout: float = 0.5) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(1, 1, 3, 3))
        self.first = nn.Conv2d(1, 3, 2)
        self.act = nn.ELU()
        self.second = nn.Conv2d(3, 5, 2)
        self.drop = nn.Dropout(dropout)
        self.last = nn.Linear(5, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.first(x - self.mean))
        logits: Tensor = self.last(self.drop(self.act(self.second(x)).flatten(1)))
        return logits


def made(net: nn.Module, hparams: AlgorithmHParams, benchmark: Benchmark) -> ContinualModule:
    return ALGORITHMS[hparams.name](net, MOMENTUM, hparams, benchmark.spec)


@pytest.mark.parametrize(
    "hparams", [h for h in EVERY if h.name not in NEED_FEATURES], ids=lambda hparams: hparams.name
)
def test_any_network_learns_with_a_method_that_needs_no_features(hparams: AlgorithmHParams) -> None:
    benchmark, net = own_stream(hparams, num_tasks=2), Own()
    before = copy.deepcopy(net.state_dict())
    learner = LightningLearner(made(net, hparams, benchmark), TrainingHParams(batch_size=BATCH))
    for task in benchmark.tasks:
        learner.fit_task(task, SILENT)
    for name, p in net.named_parameters():
        assert p.isfinite().all()
        assert not torch.equal(p, before[name]), name
    assert torch.equal(net.mean, before["mean"])
    loss = learner.evaluate(benchmark.tasks[0], "test").loss
    with torch.no_grad():
        split = benchmark.tasks[0].test
        x, y, _ = (torch.from_numpy(a) for a in split.take(np.arange(len(split))))
        images = ((x.float() / 255 - 0.4) / 0.25).movedim(-1, 1)
        expected = F.cross_entropy(net.eval()(images), y)
    assert loss == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("name", NEED_FEATURES)
def test_a_method_that_needs_features_says_so(name: str) -> None:
    hparams = next(h for h in EVERY if h.name == name)
    with pytest.raises(ValueError, match=f"{name} needs a network with .*features"):
        made(Own(), hparams, stream())


def test_naive_with_a_users_network_is_a_plain_loop() -> None:
    benchmark, net = stream(num_tasks=1), Own(dropout=0.0)
    twin = copy.deepcopy(net)
    module = made(net, NaiveHParams(), benchmark)
    learn(module, benchmark, 0)
    optimizer = MOMENTUM(twin.parameters())
    x, y, _ = arrays(benchmark, 0)
    for rows in plan.epoch_batches(0, 0, 0, len(y), BATCH):
        optimizer.zero_grad()
        F.cross_entropy(twin(x[torch.from_numpy(rows)]), y[torch.from_numpy(rows)]).backward()
        optimizer.step()
    assert_close(module, twin)


def test_frozen_parameters_stay_and_the_others_learn() -> None:
    benchmark, net = stream(num_tasks=1), Own()
    net.first.requires_grad_(False)
    frozen, last = net.first.weight.clone(), net.last.weight.clone()
    learn(made(net, NaiveHParams(), benchmark), benchmark, 0)
    assert torch.equal(net.first.weight, frozen)
    assert not torch.equal(net.last.weight, last)


class Tied(nn.Module):
    """Two layers with one weight, written out where `tied` is not."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.one, self.last = nn.Linear(9, 9), nn.Linear(9, CLASSES)
        self.two = nn.Linear(9, 9, bias=False)
        if tied:
            self.two.weight = self.one.weight
        else:
            del self.two

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x.flatten(1)).tanh()
        x = self.two(x) if hasattr(self, "two") else F.linear(x, self.one.weight)
        logits: Tensor = self.last(x.tanh())
        return logits


@pytest.mark.parametrize("name", ["naive", "ewc", "si", "agem"])
def test_tied_weights_count_once(name: str) -> None:
    hparams, benchmark = next(h for h in EVERY if h.name == name), stream(num_tasks=2)
    net, plain = Tied(), Tied(tied=False)
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if not k.startswith("two")})
    modules = [made(network, hparams, benchmark) for network in (net, plain)]
    for module in modules:
        for task in range(2):
            learn(module, benchmark, task)
    assert net.one.weight is net.two.weight
    assert_close(modules[0], modules[1])


@pytest.mark.parametrize(
    ("net", "spec", "match"),
    [
        (nn.Flatten(), stream().spec, "net must be a torch.nn.Module with parameters, got a Flatten without"),
        (nn.Flatten(), None, "net must be a torch.nn.Module with parameters, got a Flatten without"),
        (nn.Linear, None, "net must be a torch.nn.Module with parameters, got a type"),
        (nn.Linear(9, 4), stream(), "spec must be a StreamSpec or None, got a Benchmark; pass"),
    ],
    ids=["no parameters", "no parameters or spec", "class", "benchmark"],
)
def test_what_is_no_network_or_no_spec_is_named(net: Any, spec: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        EWC(net, MOMENTUM, EWCHParams(), spec)


def test_a_subclass_that_leaves_out_the_start_of_the_task_is_an_error() -> None:
    class Forgets(EWC):
        def on_train_start(self) -> None:
            """Do something else."""

    benchmark = stream()
    net = nn.Sequential(nn.Flatten(), nn.Linear(9, CLASSES))
    model = Forgets(net, MOMENTUM, EWCHParams(), benchmark.spec)
    with pytest.raises(ValueError, match=r"call super\(\).on_train_start\(\) there"):
        learn(model, benchmark, 0)
