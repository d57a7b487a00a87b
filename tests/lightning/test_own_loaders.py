"""A user's own loaders, metrics, schedulers and Trainer settings."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.tuner.tuning import Tuner
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from sequel_core.algorithms.ewc import EWCHParams
from sequel_core.algorithms.naive import NaiveHParams
from sequel_core.hparams import AlgorithmHParams
from sequel_lightning import ALGORITHMS, EWC, ContinualModule, algorithms
from sequel_lightning.optimizers import OptimizerFactory
from tests.lightning.parts import (
    ADAM,
    AGEM,
    BATCH,
    CLASSES,
    DERPP,
    ICARL,
    LAMAML,
    LFL,
    MCSGD,
    MOMENTUM,
    ONLINE,
    SI,
    STEPS,
    At,
    arrays,
    assert_close,
    counted,
    data,
    every_algorithm,
    everything,
    float_spec,
    learn,
    module,
    network,
    own_loader,
    position,
    stream,
    trainer,
)

ALL = EWCHParams(ewc_lambda=10.0, fisher_samples=None)


def fisher_by_hand(model: ContinualModule, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Return the mean over samples of the squared gradient, one backward pass per sample."""
    total = {k: torch.zeros_like(p) for k, p in model.net.named_parameters()}
    for one, label in zip(x, y, strict=True):
        model.zero_grad()
        F.cross_entropy(model.net(one[None]), label[None]).backward()
        for k, p in model.net.named_parameters():
            assert p.grad is not None
            total[k] += p.grad**2 / len(y)
    model.zero_grad()
    return total


@pytest.mark.parametrize("with_task", [False, True])
@pytest.mark.parametrize("with_spec", [False, True])
def test_own_loaders_train_and_consolidate(with_task: bool, with_spec: bool) -> None:
    benchmark = stream()
    model = module(benchmark, ALL, spec=benchmark.spec if with_spec else None)
    assert isinstance(model, EWC)
    for task in range(2):
        trainer().fit(model, own_loader(benchmark, task, with_task))
        assert position(model) == (task, 2)
        if task == 0:
            expected = fisher_by_hand(model, *arrays(benchmark, 0)[:2])
            for k, f in model.importance.get().items():
                torch.testing.assert_close(f, expected[k], rtol=1e-4, atol=1e-7)
    assert model.running_metrics.steps_done == 2 * (STEPS + 1)


@every_algorithm
@pytest.mark.parametrize("with_task", [False, True])
def test_every_algorithm_trains_on_own_loaders(hparams: AlgorithmHParams, with_task: bool) -> None:
    benchmark = stream()
    model = module(benchmark, hparams, spec=float_spec(benchmark))
    before = {name: p.detach().clone() for name, p in model.net.named_parameters()}
    for task in range(2):
        if isinstance(model, algorithms.KCL):
            x, y, _ = arrays(benchmark, task)
            model.keep_coreset(task, x[:4], y[:4])
        trainer().fit(model, own_loader(benchmark, task, with_task))
        assert position(model) == (task, 2)
    second_phase = 6 if hparams.name == "gdumb" else 0
    assert model.running_metrics.steps_done == 2 * (STEPS + 1 + second_phase)
    still = {name for name, p in model.net.named_parameters() if torch.equal(p, before[name])}
    assert still == ({"head.weight", "head.bias"} if hparams.name == "kcl" else set())


def test_own_loader_equals_a_loop_written_by_hand() -> None:
    benchmark = stream()
    model, net = module(benchmark, NaiveHParams(), spec=None), network(benchmark)
    loader = own_loader(benchmark, 0, with_task=False)
    trainer(2).fit(model, loader)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
    for weights, expected in zip(model.net.parameters(), net.parameters(), strict=True):
        assert torch.equal(weights, expected)


@pytest.mark.parametrize(
    ("settings", "clip", "accumulate", "optimizer"),
    [
        ({}, None, 1, MOMENTUM),
        ({"gradient_clip_val": 0.1}, 0.1, 1, MOMENTUM),
        ({"accumulate_grad_batches": 2}, None, 2, MOMENTUM),
        ({"accumulate_grad_batches": 4, "gradient_clip_val": 0.1}, 0.1, 4, ADAM),
    ],
    ids=["plain", "clip", "accumulate", "accumulate-clip-adam"],
)
def test_si_equals_a_loop_written_by_hand(
    settings: dict[str, Any], clip: float | None, accumulate: int, optimizer: OptimizerFactory
) -> None:
    """The path is of the mean gradient of cross-entropy, without penalty and clipping, and the real step."""
    benchmark = stream()
    model, net = module(benchmark, SI, optimizer, spec=None), network(benchmark)
    assert isinstance(model, algorithms.SI)
    params = dict(net.named_parameters())
    importance = {k: torch.zeros_like(p) for k, p in params.items()}
    for task in range(3):
        loader = own_loader(benchmark, task, with_task=False)
        trainer(**settings).fit(model, loader)
        sgd = optimizer(net.parameters())
        anchor = {k: p.detach().clone() for k, p in params.items()}
        path = {k: torch.zeros_like(p) for k, p in params.items()}
        for i, (x, y) in enumerate(loader, 1):
            (F.cross_entropy(net(x), y) / accumulate).backward()
            if i % accumulate and i < len(loader):
                continue
            gradient = {k: p.grad.clone() for k, p in params.items() if p.grad is not None}
            before = {k: p.detach().clone() for k, p in params.items()}
            penalty = sum((f * (params[k] - anchor[k]) ** 2).sum() for k, f in importance.items())
            (SI.si_lambda * penalty).backward()  # type: ignore[union-attr]
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
            sgd.step()
            sgd.zero_grad()
            for k, g in gradient.items():
                path[k] -= g * (params[k].detach() - before[k])
        for k, p in params.items():
            importance[k] += path[k] / ((p.detach() - anchor[k]) ** 2 + SI.xi)
        assert_close(model, net)
        for k, f in model.importance.get().items():
            torch.testing.assert_close(f, importance[k], rtol=1e-3, atol=1e-5)


def test_a_users_datamodule_hooks_reach_the_end_of_task_work() -> None:
    class Scaled(pl.LightningDataModule):
        """Images in [0, 255], normalised by the hooks for batches; its `task` is none of ours."""

        task = "digits"

        def train_dataloader(self) -> DataLoader[Any]:
            x, y, t = arrays(benchmark, 0)
            return DataLoader(TensorDataset(x * 64, y, t), BATCH)

        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [batch[0] / 8, *batch[1:]]

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [batch[0] / 8, *batch[1:]]

    benchmark = stream()
    model, plain = module(benchmark, ALL), module(benchmark, ALL)
    trainer().fit(model, datamodule=Scaled())
    trainer().fit(plain, own_loader(benchmark, 0, with_task=True))
    assert position(model) == (0, 2)
    weights, expected = everything(model)["tensors"], everything(plain)["tensors"]
    assert all(torch.equal(weights[k], v) for k, v in expected.items())


def test_resuming_within_an_epoch_of_a_plain_loader_warns(tmp_path: Path) -> None:
    benchmark = stream()
    path = str(tmp_path / "third.ckpt")
    keep = At(lambda trainer, hook: trainer.save_checkpoint(path), "on_train_batch_end", step=3)
    trainer(callbacks=[keep]).fit(module(benchmark), own_loader(benchmark, 0, with_task=True))
    resumed = module(benchmark)
    calls = counted(resumed)
    with pytest.warns(UserWarning, match="your dataloader is not resumable"):
        trainer().fit(resumed, own_loader(benchmark, 0, with_task=True), ckpt_path=path)
    assert calls == [0]
    assert resumed.running_metrics.steps_done == STEPS + 1


def test_own_metrics_are_updated_logged_and_reset() -> None:
    benchmark = stream()
    metrics = MetricCollection({"own": MulticlassAccuracy(CLASSES, average="micro")})
    model = module(benchmark, NaiveHParams(), partial(torch.optim.SGD, lr=0.0), spec=None, metrics=metrics)
    loader = own_loader(benchmark, 0, with_task=False)
    seen: list[float] = []
    note = At(lambda t, _: seen.append(float(t.callback_metrics["own"])), "on_train_batch_end", step=2)
    last = At(lambda t, _: seen.append(float(t.callback_metrics["own"])), "on_train_epoch_end")
    trainer(callbacks=[note, last]).fit(model, loader)
    correct = [float((model.net(x).argmax(-1) == y).sum()) for x, y in loader]
    assert seen == pytest.approx([sum(correct[:2]) / (2 * BATCH), sum(correct[4:]) / (BATCH + 2)])


def test_a_search_leaves_nothing_in_the_users_metrics(tmp_path: Path) -> None:
    benchmark = stream()
    metrics = MetricCollection({"own": MulticlassAccuracy(CLASSES, average="micro")})
    model = module(benchmark, metrics=metrics)
    searching = trainer(default_root_dir=tmp_path)
    Tuner(searching).lr_find(model, datamodule=data(benchmark, 0), update_attr=False, num_training=3)
    updates: list[int] = []
    first = At(lambda t, _: updates.append(metrics["own"].update_count), "on_train_batch_start", step=0)
    learn(model, benchmark, 0, callbacks=[first])
    assert updates == [0]


def test_own_scheduler_sets_the_learning_rate() -> None:
    def scheduled(params: Iterable[torch.nn.Parameter]) -> dict[str, Any]:
        optimizer = torch.optim.SGD(params, lr=0.2)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    benchmark = stream()
    model = module(benchmark, optimizer=scheduled)
    rates: list[float] = []
    note = At(lambda t, _: rates.append(t.optimizers[0].param_groups[0]["lr"]), "on_train_batch_start")
    for task in range(2):
        learn(model, benchmark, task, callbacks=[note])
    assert rates == pytest.approx([0.2, 0.2, 0.1, 0.1, 0.05] * 2)


@pytest.mark.parametrize(
    ("settings", "clip", "accumulate"),
    [({"gradient_clip_val": 0.1}, 0.1, 1), ({"accumulate_grad_batches": 2}, None, 2)],
    ids=["clip", "accumulate"],
)
def test_clipping_and_accumulation_are_the_trainers(
    settings: dict[str, Any], clip: float | None, accumulate: int
) -> None:
    benchmark = stream()
    model, net = module(benchmark, ALL, spec=None), network(benchmark)
    loader = own_loader(benchmark, 0, with_task=False)
    trainer(**settings).fit(model, loader)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for i, (x, y) in enumerate(loader, 1):
        (F.cross_entropy(net(x), y) / accumulate).backward()
        if i % accumulate == 0:
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
    for weights, expected in zip(model.net.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(weights, expected, rtol=1e-6, atol=1e-7)
    assert position(model) == (0, 2)


MANY = pytest.mark.parametrize(
    "hparams", [ALL, SI, LFL, AGEM, DERPP, ICARL, MCSGD, ONLINE, LAMAML], ids=lambda hparams: hparams.name
)


@MANY
def test_double_precision_is_the_trainers(hparams: AlgorithmHParams) -> None:
    benchmark = stream()
    model = module(benchmark, hparams)
    twin = ALGORITHMS[hparams.name](network(benchmark).double(), MOMENTUM, hparams, benchmark.spec)
    for task in range(2):
        learn(model, benchmark, task, precision="64-true")
        learn(twin, benchmark, task, precision="64-true")
    weights, expected = model.state_dict(), twin.state_dict()
    assert {v.dtype for v in weights.values() if v.is_floating_point()} == {torch.float64}
    for k, v in expected.items():
        torch.testing.assert_close(weights[k], v, rtol=1e-5, atol=1e-6)


@MANY
def test_mixed_precision_stays_near_single(hparams: AlgorithmHParams) -> None:
    benchmark = stream()
    mixed, single = module(benchmark, hparams), module(benchmark, hparams)
    for task in range(2):
        learn(mixed, benchmark, task, precision="bf16-mixed")
        learn(single, benchmark, task)
    kept, expected_kept = mixed.state_dict(), single.state_dict()
    assert {v.dtype for v in kept.values() if v.is_floating_point()} == {torch.float32}
    assert all(torch.equal(v, expected_kept[k]) for k, v in kept.items() if not v.is_floating_point())
    weights, expected = (
        torch.cat([p.detach().flatten() for p in m.net.parameters()]) for m in (mixed, single)
    )
    difference = float((weights - expected).norm() / expected.norm())
    assert 0 < difference < 0.05


@pytest.mark.parametrize("hparams", [AGEM, DERPP, ICARL], ids=lambda hparams: hparams.name)
def test_own_float_images_in_double_precision(hparams: AlgorithmHParams) -> None:
    benchmark = stream()
    model = module(benchmark, hparams, spec=float_spec(benchmark))
    for task in range(2):
        trainer(precision="64-true").fit(model, own_loader(benchmark, task, with_task=True))
    assert position(model) == (1, 2)
    held = {name: a.dtype for name, a in model.state_dict().items() if name in ("exemplars.x", "memory.x")}
    expected = {"exemplars.x": torch.float64} if hparams.name == "icarl" else {"memory.x": torch.float32}
    assert held == expected  # a memory of a replay method has the dtype of the spec
