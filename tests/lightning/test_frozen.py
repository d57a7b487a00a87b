"""Parameters with `requires_grad=False` stay exactly as they are and cost nothing, in every method."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import BaseFinetuning, ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F

from sequel_core.algorithms.ewc import EWCHParams
from sequel_core.algorithms.mas import MASHParams
from sequel_core.hparams import AlgorithmHParams, TrainingHParams
from sequel_core.runs.learner import FitMonitor
from sequel_core.stream import plan
from sequel_core.stream.benchmark import Benchmark
from sequel_lightning import ALGORITHMS, MLP, ContinualModule, LightningLearner
from sequel_lightning.replay import ReplayBatch
from sequel_lightning.trees import ParameterTree
from tests.lightning.parts import (
    AGEM,
    BATCH,
    CLASSES,
    EVERY,
    LAMAML,
    MCSGD,
    MOMENTUM,
    ONLINE,
    SI,
    At,
    arrays,
    every_algorithm,
    learn,
    own_stream,
    stream,
    trainer,
)

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1)
ADAMW = partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1)
SILENT = FitMonitor(lambda progress: None, lambda: None)
FIRST, HEAD = ("dense_0.weight", "dense_0.bias"), ("head.weight", "head.bias")


class Net(nn.Module):
    """Two hidden layers, of which the first can be frozen."""

    def __init__(self, frozen: bool = True, width: int = 7) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.dense_0, self.dense_1, self.head = (
            nn.Linear(9, width),
            nn.Linear(width, 5),
            nn.Linear(5, CLASSES),
        )
        self.dense_0.requires_grad_(not frozen)

    def features(self, x: Tensor) -> Tensor:
        return torch.tanh(self.dense_1(torch.tanh(self.dense_0(x.flatten(1)))))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(x))
        return logits


def made(
    hparams: AlgorithmHParams, benchmark: Benchmark, optimizer: Any = SGD, net: nn.Module | None = None
) -> Any:
    net = Net() if net is None else net
    return ALGORITHMS[hparams.name](net, optimizer, hparams, benchmark.spec)


def trees(module: ContinualModule) -> dict[str, ParameterTree]:
    return {name: tree for name, tree in module.named_modules() if isinstance(tree, ParameterTree)}


def copies(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def changed_parameters(net: nn.Module, before: dict[str, Tensor]) -> set[str]:
    """Return the layers that changed."""
    return {k.split(".")[0] for k, p in net.named_parameters() if not torch.equal(p, before[k])}


@every_algorithm
def test_frozen_parameters_stay_and_cost_nothing(hparams: AlgorithmHParams) -> None:
    benchmark = own_stream(hparams, num_tasks=2)
    module = made(hparams, benchmark, ADAMW if hparams.name in ("ewc", "derpp") else SGD)
    before = copies(module.net)
    for task in range(2):
        learn(module, benchmark, task)
    trained = {"dense_1"} if hparams.name == "kcl" else {"dense_1", "head"}
    assert changed_parameters(module.net, before) == trained
    for tree in trees(module).values():
        assert tree.get().keys() == before.keys() - set(FIRST)
    if not hasattr(module, "old"):  # a copy of the whole network
        wide = made(hparams, benchmark, net=Net(width=70))
        assert wide.memory_bytes() - module.memory_bytes() == 4 * len(trees(module)) * 5 * 63


@every_algorithm
def test_a_layer_that_is_unfrozen_before_the_second_task(hparams: AlgorithmHParams) -> None:
    benchmark = own_stream(hparams, num_tasks=2)
    module = made(replace(hparams, reset_optimizer=False), benchmark)
    before = copies(module.net)
    learn(module, benchmark, 0)
    assert "dense_0" not in changed_parameters(module.net, before)
    module.net.dense_0.requires_grad_(True)
    learn(module, benchmark, 1)
    assert "dense_0" in changed_parameters(module.net, before)
    assert all(tree.get().keys() == before.keys() for tree in trees(module).values())
    assert all(p.isfinite().all() for p in module.net.parameters())


@every_algorithm
def test_a_layer_that_is_frozen_before_the_second_task(hparams: AlgorithmHParams) -> None:
    """What is remembered of it stays; it is not moved by the penalty, a solution of the past or a rate."""
    benchmark = own_stream(hparams, num_tasks=3)
    module = made(replace(hparams, reset_optimizer=False), benchmark, net=Net(frozen=False))
    learn(module, benchmark, 0)
    module.net.dense_0.requires_grad_(False)
    before = copies(module.net)
    remembered = {(name, k): tree.get()[k].clone() for name, tree in trees(module).items() for k in FIRST}
    learn(module, benchmark, 1)
    assert "dense_0" not in changed_parameters(module.net, before)
    for (name, k), tensor in remembered.items():
        kept = trees(module)[name].get()[k]
        if hparams.name == "mcsgd" and name == "w_hat":  # the network at the end of the last task
            assert torch.equal(kept, before[k])
        else:
            assert torch.equal(kept, tensor), (name, k)
    module.net.dense_0.requires_grad_(True)
    learn(module, benchmark, 2)
    assert "dense_0" in changed_parameters(module.net, before)


@every_algorithm
def test_layers_frozen_after_the_module_was_made(hparams: AlgorithmHParams) -> None:
    benchmark = own_stream(hparams, num_tasks=1)
    late, early = made(hparams, benchmark, net=Net(frozen=False)), made(hparams, benchmark)
    late.net.dense_0.requires_grad_(False)
    for module in (late, early):
        learn(module, benchmark, 0)
    actual, expected = late.state_dict(), early.state_dict()
    assert actual.keys() == expected.keys()
    assert [k for k, v in expected.items() if not torch.equal(actual[k], v)] == []
    assert late.memory_bytes() == early.memory_bytes()


@pytest.mark.parametrize("hparams", [EWCHParams(), MASHParams(), SI, LAMAML, MCSGD, AGEM])
def test_a_small_head_on_a_large_network_keeps_the_heads_size_alone(hparams: AlgorithmHParams) -> None:
    benchmark = stream()
    net = MLP((300, 300), CLASSES, image_shape=benchmark.image_shape)
    net.requires_grad_(False)
    net.head.requires_grad_(True)
    module = made(hparams, benchmark, net=net)
    arrays_of_head = {"ewc": 2, "mas": 2, "si": 3, "lamaml": 1, "mcsgd": 2, "agem": 0}[hparams.name]
    memory = module.memory.get().values() if hasattr(module, "memory") else ()
    samples = sum(a.nbytes for a in memory) + 4 * (hparams.name == "mcsgd")  # and the index of a task
    assert module.memory_bytes() == samples + 4 * arrays_of_head * (300 * CLASSES + CLASSES)
    assert sum(p.nbytes for p in net.parameters()) > 300_000


def train_head(
    benchmark: Benchmark, net: Any, strength: float, images: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Train the head for two tasks with EWC written out; return its importance and anchor."""
    head = (net.head.weight, net.head.bias)
    anchor, importance = ([torch.zeros_like(p) for p in head] for _ in range(2))
    for task, x in enumerate(images):
        velocity = [torch.zeros_like(p) for p in head]
        y = arrays(benchmark, task)[1]
        for rows in map(torch.from_numpy, plan.epoch_batches(0, task, 0, len(x), BATCH)):
            slopes = torch.autograd.grad(F.cross_entropy(net(x[rows]), y[rows]), head)
            with torch.no_grad():
                for n, p in enumerate(head):
                    gradient = slopes[n] + strength * importance[n] * (p - anchor[n]) + 0.1 * p
                    velocity[n] = 0.9 * velocity[n] + gradient
                    p -= 0.1 * velocity[n]
        fisher = [torch.zeros_like(p) for p in head]
        for image, label in zip(x, y, strict=True):
            for n, g in enumerate(torch.autograd.grad(F.cross_entropy(net(image[None]), label[None]), head)):
                fisher[n] += g**2 / len(x)
        with torch.no_grad():
            for n, p in enumerate(head):
                anchor[n] = (importance[n] * anchor[n] + fisher[n] * p) / (importance[n] + fisher[n])
                importance[n] += fisher[n]
    return importance, anchor


def test_ewc_on_a_frozen_network_is_ewc_of_the_head_alone() -> None:
    benchmark = stream(num_tasks=2)
    net = Net().double()
    net.dense_1.requires_grad_(False)
    by_hand: Any = copy.deepcopy(net)
    hparams = EWCHParams(ewc_lambda=20.0, fisher_samples=None)
    module = made(hparams, benchmark, net=net)
    for task in range(2):
        learn(module, benchmark, task)
    images = []
    for split in (task.train for task in benchmark.tasks):
        x = torch.from_numpy(split.take(np.arange(len(split)))[0]).movedim(-1, 1)
        images.append((x.double() / 255 - 0.4) / 0.25)
    importance, anchor = train_head(benchmark, by_hand, 20.0, images)
    head = (by_hand.head.weight, by_hand.head.bias)
    assert module.importance.get().keys() == set(HEAD)
    for n, name in enumerate(HEAD):
        torch.testing.assert_close(module.params()[name], head[n], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(module.importance.get()[name], importance[n], rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(module.anchor.get()[name], anchor[n], rtol=1e-8, atol=1e-10)
    assert changed_parameters(net, copies(Net().double())) == {"head"}


def test_the_momentum_of_a_parameter_stays_its_own_if_the_trained_parameters_change() -> None:
    benchmark = stream(num_tasks=2)
    module = made(EWCHParams(reset_optimizer=False), benchmark)
    learn(module, benchmark, 0)
    carried = module.lifecycle.carried_optimizer
    expected = [carried["state"][i]["momentum_buffer"].clone() for i in range(4)]  # dense_1 and the head
    module.net.dense_0.requires_grad_(True)
    actual: dict[str, Any] = {}

    def note(trainer: pl.Trainer, hook: str) -> None:
        for name, p in module.params().items():
            actual[name] = trainer.optimizers[0].state[p].get("momentum_buffer", None)
            actual[name] = None if actual[name] is None else actual[name].clone()

    learn(module, benchmark, 1, callbacks=[At(note, "on_train_start")])
    assert actual["dense_0.weight"] is None
    for tensor, name in zip(expected, ("dense_1.weight", "dense_1.bias", *HEAD), strict=True):
        assert torch.equal(actual[name], tensor)


class Unfreeze(BaseFinetuning):
    """Lightning's own way: the first layer is trained from the second epoch on."""

    def freeze_before_training(self, pl_module: pl.LightningModule) -> None:
        self.freeze(pl_module.net.dense_0)  # type: ignore[union-attr]

    def finetune_function(self, pl_module: pl.LightningModule, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net.dense_0, optimizer)  # type: ignore[union-attr]


@pytest.mark.parametrize("hparams", [EWCHParams(), SI, ONLINE, AGEM], ids=lambda hparams: hparams.name)
def test_a_callback_unfreezes_within_a_task(hparams: AlgorithmHParams) -> None:
    benchmark = stream(num_tasks=2)
    module = made(hparams, benchmark, net=Net(frozen=False))
    for task in range(2):
        before = copies(module.net)
        learn(module, benchmark, task, epochs=2, callbacks=[Unfreeze()])
        assert changed_parameters(module.net, before) == {"dense_0", "dense_1", "head"}
        assert all(tree.get().keys() == before.keys() for tree in trees(module).values())
    if hparams.name in ("ewc", "si"):
        assert float(module.importance.get()["dense_0.weight"].abs().sum()) > 0


class FirstIsBest(pl.Callback):
    """Says how good each epoch was: the first is the best."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pl_module.log("epochs", float(trainer.current_epoch))


@pytest.mark.parametrize("hparams", [EWCHParams(), SI], ids=lambda hparams: hparams.name)
def test_the_best_weights_are_older_than_the_trained_parameters(
    hparams: AlgorithmHParams, tmp_path: Path
) -> None:
    """A layer is unfrozen after the epoch that is consolidated: its path integral there was 0."""
    benchmark = stream(num_tasks=2)
    hparams = replace(hparams, consolidate="best", reset_optimizer=False)
    module = made(hparams, benchmark, net=Net(frozen=False))
    start = copies(module.net)
    for task in range(2):
        keeper = ModelCheckpoint(tmp_path / str(task), monitor="epochs", save_on_train_epoch_end=True)
        callbacks = [Unfreeze(), FirstIsBest(), keeper]
        learn(module, benchmark, task, epochs=2, callbacks=callbacks, enable_checkpointing=True)
        assert changed_parameters(module.net, start) == {"dense_1", "head"}
        assert all(tree.get().keys() == start.keys() for tree in trees(module).values())
        importance = module.importance.get()
        assert float(importance["dense_1.weight"].abs().sum()) > 0
        assert (float(importance["dense_0.weight"].abs().sum()) > 0) == (hparams.name == "ewc")


WAYS = [
    *((hparams, "load_state_dict") for hparams in (EWCHParams(), MASHParams(), SI, MCSGD, LAMAML)),
    *((EWCHParams(), way) for way in ("learner", "load_from_checkpoint")),
    *((ONLINE, way) for way in ("learner", "load_from_checkpoint")),
]


@pytest.mark.parametrize(("hparams", "way"), WAYS)
def test_a_checkpoint_of_a_grown_set_loads(hparams: AlgorithmHParams, way: str, tmp_path: Path) -> None:
    """It is read into a module that was made with the first layer frozen, and training resumes the same."""
    benchmark = stream(num_tasks=3)
    module = made(hparams, benchmark)
    learn(module, benchmark, 0)
    module.net.dense_0.requires_grad_(True)
    last = learn(module, benchmark, 1)
    fresh = made(hparams, benchmark)
    if way == "learner":
        training = TrainingHParams(batch_size=BATCH)
        LightningLearner(module, training).save(tmp_path)()
        LightningLearner(fresh, training).restore(tmp_path)
    elif way == "load_state_dict":
        fresh.load_state_dict(module.state_dict())
    else:
        last.save_checkpoint(tmp_path / "file.ckpt", weights_only=False)
        parts = {"net": Net(), "optimizer": SGD, "hparams": hparams, "spec": benchmark.spec}
        fresh = type(module).load_from_checkpoint(tmp_path / "file.ckpt", **parts)
    fresh.running_metrics.steps_done = module.running_metrics.steps_done
    fresh.net.dense_0.requires_grad_(True)
    for one in (module, fresh):
        learn(one, benchmark, 2)
    actual, expected = fresh.state_dict(), module.state_dict()
    assert actual.keys() == expected.keys()
    assert [k for k, v in expected.items() if not torch.equal(actual[k], v)] == []


@pytest.mark.parametrize("hparams", [EWCHParams(), SI, LAMAML, ONLINE], ids=lambda hparams: hparams.name)
def test_a_grown_set_resumes_within_a_task(hparams: AlgorithmHParams, tmp_path: Path) -> None:
    benchmark = stream(num_tasks=2)
    ends = []
    for interrupted in (False, True):
        module = made(hparams, benchmark)
        learn(module, benchmark, 0)
        module.net.dense_0.requires_grad_(True)
        if not interrupted:
            learn(module, benchmark, 1, epochs=2)
        else:
            with pytest.raises(RuntimeError, match="stop"):
                learn(module, benchmark, 1, epochs=2, callbacks=[Stop(tmp_path / "file.ckpt")])
            module = made(hparams, benchmark)
            module.net.dense_0.requires_grad_(True)
            path = str(tmp_path / "file.ckpt")
            learn(module, benchmark, 1, epochs=2, ckpt_path=path, weights_only=True)
        ends.append(module.state_dict())
    assert ends[0].keys() == ends[1].keys()
    assert [k for k, v in ends[0].items() if not torch.equal(ends[1][k], v)] == []


class Stop(pl.Callback):
    """Saves a checkpoint after three steps, and fails."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 3:
            trainer.save_checkpoint(self.path)
            raise RuntimeError("stop")


def test_a_checkpoint_with_another_shape_names_it() -> None:
    benchmark = stream()
    module, wide = made(EWCHParams(), benchmark), made(EWCHParams(), benchmark)
    actual = wide.state_dict()
    actual["importance.head/weight"] = torch.zeros(CLASSES, 6)
    with pytest.raises(RuntimeError, match=r"size mismatch for importance.head/weight.*\[4, 6\]"):
        module.load_state_dict(actual)
    actual = wide.state_dict()
    actual["importance.unknown/weight"] = torch.zeros(2)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*importance.unknown/weight"):
        module.load_state_dict(actual)
    actual = {k: v for k, v in wide.state_dict().items() if not k.startswith("importance.")}
    with pytest.raises(RuntimeError, match=r"Missing key.*importance.head/weight"):
        module.load_state_dict(actual)


def test_a_trained_parameter_that_changes_its_shape_raises_before_training() -> None:
    benchmark = stream(num_tasks=2)
    module = made(EWCHParams(), benchmark)
    learn(module, benchmark, 0)
    module.net.dense_1 = nn.Linear(7, 6)
    module.net.head = nn.Linear(6, CLASSES)
    with pytest.raises(
        ValueError, match=r"dense_1.weight must keep its shape .* got \[6, 7\] after \[5, 7\]"
    ):
        learn(module, benchmark, 1)


@every_algorithm
def test_nothing_to_train_raises_before_training(hparams: AlgorithmHParams) -> None:
    benchmark = own_stream(hparams, num_tasks=1)
    module = made(hparams, benchmark)
    for part in module.trained().values():
        part.requires_grad_(False)
    with pytest.raises(ValueError, match=f"{hparams.name} needs a parameter to train.*requires_grad=False"):
        learn(module, benchmark, 0)


class Unused(Net):
    """A trained layer that no output depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(3, 3)


@pytest.mark.parametrize("hparams", [h for h in EVERY if h.name != "kcl"], ids=lambda hparams: hparams.name)
def test_a_trained_parameter_without_a_gradient(hparams: AlgorithmHParams) -> None:
    benchmark = stream(num_tasks=2)
    module = made(hparams, benchmark, MOMENTUM, net=Unused())
    before = copies(module.net)
    for task in range(2):
        learn(module, benchmark, task)
    assert {"dense_1", "head"} <= changed_parameters(module.net, before)
    for name in ("other.weight", "other.bias"):  # MC-SGD rounds on a line of no length
        torch.testing.assert_close(module.params()[name], before[name], rtol=1e-5, atol=0)


class Heads(nn.Module):
    """A head for each half of the images; a batch trains those it holds images for."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bright, self.dark = nn.Linear(9, CLASSES), nn.Linear(9, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        bright = x.mean(1) > 0
        logits = x.new_zeros(len(x), CLASSES)
        if bright.any():
            logits[bright] = self.bright(x[bright])
        if not bright.all():
            logits[~bright] = self.dark(x[~bright])
        return logits


def test_agem_projects_over_parameters_that_the_batch_does_not_reach() -> None:
    """A gradient of 0 has a part in the norm of the reference, and a projected one that is not 0."""
    module = made(AGEM, stream(), net=Heads())
    torch.manual_seed(1)
    gradient = torch.randn(CLASSES, 9)
    net: Any = module.net
    module._trained_params = module.params()
    bright = torch.ones(1, 1, 3, 3)
    dark = -bright
    past = torch.cat([bright, bright, dark])
    labels = torch.tensor([0, 1, 2])

    draw = ReplayBatch(past, labels, torch.zeros(3, dtype=torch.long), None, 3)
    module.samples = [draw, draw]  # the batch's, which is not read, and the draw
    module.trainer = trainer()
    loss = F.cross_entropy(net(past), labels)
    names = list(module.params())
    reference = dict(zip(names, torch.autograd.grad(loss, list(module.params().values())), strict=True))
    gradient = -reference["bright.weight"] + 0.1 * gradient
    net.bright.weight.grad, net.bright.bias.grad = gradient.clone(), -reference["bright.bias"]
    module.on_before_optimizer_step(None)
    full = {k: torch.zeros_like(g) for k, g in reference.items()}
    full["bright.weight"], full["bright.bias"] = gradient, -reference["bright.bias"]
    along = sum(float((full[k] * g).sum()) for k, g in reference.items())
    factor = along / sum(float((g * g).sum()) for g in reference.values())
    assert factor < 0
    for k, p in module.params().items():
        torch.testing.assert_close(p.grad, full[k] - factor * reference[k])
