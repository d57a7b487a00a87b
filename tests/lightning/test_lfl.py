"""Less-forgetting learning: the frozen last layer, the old network, and which networks it takes."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sequel_core.algorithms.lfl import LFLHParams
from sequel_core.testing.streams import table
from sequel_lightning import MLP, algorithms
from sequel_lightning.objectives import from_outputs, output_leaf
from sequel_lightning.optimizers import OptimizerFactory
from tests.lightning.parts import (
    CLASSES,
    LFL,
    MOMENTUM,
    SIDE,
    At,
    arrays,
    assert_close,
    learn,
    own_loader,
    stream,
    trainer,
)

DECAYING = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1)
ADAMW = partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1)


class Own(nn.Module):
    """A user's own network: its layers are named `stem` and `head`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, 6), nn.Tanh())
        self.head = nn.Linear(6, CLASSES)

    def features(self, x: Tensor) -> Tensor:
        features: Tensor = self.stem(x)
        return features

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(x))
        return logits


class Headless(Own):
    """One whose last layer has another name."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = self.head
        del self.head


def lfl(net: nn.Module, hparams: LFLHParams = LFL, optimizer: OptimizerFactory = MOMENTUM) -> algorithms.LFL:
    return algorithms.LFL(net, optimizer, hparams, stream().spec)


def mlp(dropout: float = 0.0) -> MLP:
    return MLP((8,), CLASSES, dropout, (SIDE, SIDE, 1))


def copies(net: nn.Module) -> dict[str, Tensor]:
    return {k: p.detach().clone() for k, p in net.named_parameters()}


def changed_parameters(net: nn.Module, before: dict[str, Tensor]) -> set[str]:
    """Return the layers of which any number has changed."""
    return {k.partition(".")[0] for k, p in net.named_parameters() if not torch.equal(p, before[k])}


@pytest.mark.parametrize("carry", [False, True])
@pytest.mark.parametrize("optimizer", [DECAYING, ADAMW], ids=["momentum", "adamw"])
def test_the_head_stays_as_the_first_task_left_it(optimizer: OptimizerFactory, carry: bool) -> None:
    model = lfl(mlp(), LFLHParams(lfl_lambda=0.5, reset_optimizer=not carry), optimizer)
    start = copies(model.net)
    learn(model, stream(), 0)
    assert changed_parameters(model.net, start) == {"dense_0", "head"}
    first = copies(model.net)
    for task in (1, 2):
        learn(model, stream(), task, gradient_clip_val=0.5)
    assert changed_parameters(model.net, first) == {"dense_0"}


def test_the_head_moves_where_it_is_not_frozen() -> None:
    model = lfl(mlp(), LFLHParams(lfl_lambda=0.5, freeze_head=False))
    learn(model, stream(), 0)
    first = copies(model.net)
    learn(model, stream(), 1)
    assert changed_parameters(model.net, first) == {"dense_0", "head"}


def test_the_old_network_evaluates_and_never_trains() -> None:
    model = lfl(mlp(dropout=0.5))
    modes: dict[str, list[bool]] = {"net": [], "old": []}
    for name, net in (("net", model.net), ("old", model.old)):
        net.dropout_0.register_forward_hook(lambda layer, *_, seen=modes[name]: seen.append(layer.training))
    learn(model, stream(), 0)
    assert (modes["net"], modes["old"]) == ([True] * 5, [])
    kept, steps = copies(model.net), []

    def compare(trainer: Any, hook: str) -> None:
        steps.append((changed_parameters(model.old, kept), changed_parameters(model.net, kept)))

    learn(model, stream(), 1, callbacks=[At(compare, "on_train_batch_end")])
    assert (modes["net"][5:], modes["old"]) == ([True] * 5, [False] * 5)
    assert steps == [(set(), {"dense_0"})] * 5
    assert not any(p.requires_grad or p.grad is not None for p in model.old.parameters())
    assert changed_parameters(model.old, copies(model.net)) == set()


def test_a_users_own_network_equals_a_loop_written_by_hand() -> None:
    torch.manual_seed(1)
    benchmark, net, twin = stream(), Own(), Own()
    twin.load_state_dict(net.state_dict())
    model = lfl(net)
    old: list[Tensor] = []
    for task in range(2):
        loader = own_loader(benchmark, task, with_task=False)
        trainer().fit(model, loader)
        optimizer = MOMENTUM((twin.stem if task else twin).parameters())
        for k, (x, y) in enumerate(loader):
            optimizer.zero_grad()
            loss = F.cross_entropy(twin(x), y)
            if task:
                loss = loss + LFL.lfl_lambda / 2 * ((twin.features(x) - old[k]) ** 2).sum() / len(y)
            loss.backward()
            optimizer.step()
        assert_close(model, twin)
        old = [features.detach() for features in twin.features(arrays(benchmark, 1)[0]).split(4)]


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(9, 4)), r"a method features\(x\), the last hidden layer, .*"),
        (Headless(), r"a head, .*"),
    ],
    ids=["features", "head"],
)
def test_a_network_without_features_or_head_raises(net: nn.Module, message: str) -> None:
    missing = "head" if "a head" in message else "features"
    says = rf"lfl needs a network with {message}net.head\(net.features\(x\)\); \w+ has no {missing}"
    with pytest.raises(ValueError, match=says):
        lfl(net)


class Named(nn.Module):
    """A network that returns a dict, while its last layer returns a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(12, 5), nn.Linear(5, 4)

    def features(self, x: Tensor) -> Tensor:
        return torch.tanh(self.stem(x))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"values": self.head(self.features(x))}


def test_the_objective_must_take_what_the_head_returns() -> None:
    spec = table("values").spec
    of_dicts = from_outputs(lambda outputs, y: (outputs["values"] - y).abs().sum(1))
    with pytest.raises(ValueError, match=r"must take what head returns, \[1, 4\] for B=1: .*return the same"):
        algorithms.LFL(Named(), MOMENTUM, LFLHParams(), spec, objective=of_dicts)
    of_tensors = from_outputs(lambda outputs, y: (output_leaf(outputs) - y).abs().sum(1))
    algorithms.LFL(Named(), MOMENTUM, LFLHParams(), spec, objective=of_tensors)
