"""The optimizer factory: parameter groups by name, and errors before training."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sequel_core.algorithms.naive import NaiveHParams
from sequel_lightning import Naive
from tests.lightning.parts import (
    KCL,
    MOMENTUM,
    STEPS,
    assert_same,
    everything,
    learn,
    module,
    network,
    own_loader,
    own_stream,
    stream,
    trainer,
)

CARRIED = NaiveHParams(reset_optimizer=False)


def two_groups(named_parameters: Any, momentum: float = 0.0) -> torch.optim.Optimizer:
    """Return SGD with weight decay for all but the biases."""
    decayed = [p for name, p in named_parameters if not name.endswith("bias")]
    biases = [p for name, p in named_parameters if name.endswith("bias")]
    groups = [{"params": decayed, "weight_decay": 0.5}, {"params": biases, "lr": 0.02}]
    return torch.optim.SGD(groups, lr=0.1, momentum=momentum)


def with_names(named_parameters: Any) -> torch.optim.Optimizer:
    """Return an optimizer that keeps the names, as torch 2.6 or later does."""
    return torch.optim.SGD(named_parameters, lr=0.1, momentum=0.9)


def test_parameter_groups_by_name_equal_a_loop_written_by_hand() -> None:
    benchmark = stream()
    model, net = module(benchmark, NaiveHParams(), two_groups, spec=None), network(benchmark)
    loader = own_loader(benchmark, 0, with_task=False)
    trainer().fit(model, loader)
    for x, y in loader:
        net.zero_grad()
        F.cross_entropy(net(x), y).backward()
        with torch.no_grad():
            for name, p in net.named_parameters():
                assert p.grad is not None
                p.sub_(0.02 * p.grad if name.endswith("bias") else 0.1 * (p.grad + 0.5 * p))
    for actual, expected in zip(model.net.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)


def test_a_partial_factory_gets_names_too_and_every_trained_parameter_has_one() -> None:
    seen: list[list[str]] = []

    def note(scale: float, named_parameters: Any) -> torch.optim.Optimizer:
        seen.append([name for name, _ in named_parameters])
        return torch.optim.SGD([p for _, p in named_parameters], lr=scale)

    benchmark = own_stream(KCL)
    model = module(benchmark, KCL, partial(note, 0.1))
    next(model.net.parameters()).requires_grad_(False)
    learn(model, benchmark, 0)
    kcl_names = {f"kcl.{name}" for name, _ in model.trained()["kcl"].named_parameters()}
    first, *others = dict(model.net.named_parameters())
    assert first not in seen[0]
    assert set(seen[0]) == kcl_names | set(others)


@pytest.mark.parametrize("factory", [partial(two_groups, momentum=0.9), with_names])
def test_momentum_is_carried_and_restored_with_names(factory: Any, tmp_path: Path) -> None:
    benchmark, path = stream(), tmp_path / "after.ckpt"
    model = module(benchmark, CARRIED, factory)
    learn(model, benchmark, 0).save_checkpoint(path)
    other = Naive.load_from_checkpoint(path, net=network(benchmark), optimizer=factory)
    for one in (model, other):
        learn(one, benchmark, 1)
    assert_same(everything(other), everything(model))


def test_a_plain_factory_continues_a_checkpoint_of_one_with_names(tmp_path: Path) -> None:
    benchmark, path = stream(), tmp_path / "after.ckpt"
    model = module(benchmark, CARRIED, with_names)
    learn(model, benchmark, 0).save_checkpoint(path)
    plain = Naive.load_from_checkpoint(path, net=network(benchmark), optimizer=MOMENTUM)
    for one in (model, plain):
        learn(one, benchmark, 1)
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (torch.optim.Adam([nn.Parameter(torch.zeros(1))]), r"class Adam; pass partial\(torch.optim.Adam, lr"),
        ({"lr": 0.1}, r"got an object of class dict; pass partial\(torch.optim.SGD, lr=0.1\)"),
    ],
)
def test_an_optimizer_in_place_of_a_factory_raises(optimizer: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(stream(), optimizer=optimizer)


def test_a_factory_that_returns_nothing_raises_before_training() -> None:
    def forgotten(params: Any) -> Any:
        torch.optim.SGD(params, lr=0.1)

    model = module(stream(), optimizer=forgotten)
    with pytest.raises(ValueError, match="got None; add a return statement"):
        learn(model, stream(), 0)
    assert model.running_metrics.steps_done == 0


@pytest.mark.parametrize("user_loader", [False, True])
def test_one_fit_too_many_raises_before_training(user_loader: bool) -> None:
    """With a user's loaders the module counts the tasks itself."""
    benchmark = stream(num_tasks=2)
    model = module(benchmark, NaiveHParams())
    for task in range(2):
        if user_loader:
            trainer().fit(model, own_loader(benchmark, task, with_task=False))
        else:
            learn(model, benchmark, task)
    before = everything(model)
    with pytest.raises(ValueError, match="fit would begin task 2, but the spec has tasks 0 to 1 only"):
        trainer().fit(model, own_loader(benchmark, 0, with_task=False))
    assert_same(everything(model), before)
    assert model.running_metrics.steps_done == 2 * (STEPS + user_loader)
