"""How much data the end-of-task work reads, and how little is kept between two reports."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import Logger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from sequel_core.algorithms.ewc import EWCHParams
from sequel_core.algorithms.mas import MASHParams
from sequel_core.algorithms.naive import NaiveHParams
from sequel_core.hparams import AlgorithmHParams
from sequel_core.stream.benchmark import StreamSpec
from sequel_core.stream.trees import LeafSpec
from sequel_lightning import Naive, reporting
from sequel_lightning.consolidation import CONSOLIDATED, TRAINING
from tests.lightning.parts import (
    BATCH,
    CLASSES,
    ICARL,
    MOMENTUM,
    SIDE,
    STEPS,
    At,
    arrays,
    assert_same,
    data,
    everything,
    float_spec,
    module,
    own_loader,
    position,
    stream,
    trainer,
)

ALL = EWCHParams(ewc_lambda=10.0, fisher_samples=None)


class Endless(IterableDataset[tuple[Tensor, Tensor]]):
    """The samples of a task again and again; counts those that were read."""

    def __init__(self, length: int | None = None) -> None:
        self.x, self.y, _ = arrays(stream(), 0)
        self.length = length
        self.reads = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for i in islice(count(), self.length):
            self.reads += 1
            yield self.x[i % len(self.y)], self.y[i % len(self.y)]


def fisher_by_hand(net: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    total = {k: torch.zeros_like(p) for k, p in net.named_parameters()}
    for one, label in zip(x, y, strict=True):
        gradients = torch.autograd.grad(F.cross_entropy(net(one[None]), label[None]), list(net.parameters()))
        for k, g in zip(total, gradients, strict=True):
            total[k] += g**2 / len(y)
    return total


def assert_fisher(model: Any, samples: int) -> None:
    """The importances are those of the first so many samples."""
    x, y, _ = arrays(stream(), 0)
    index = torch.arange(samples) % len(y)
    for k, expected in fisher_by_hand(model.net, x[index], y[index]).items():
        torch.testing.assert_close(model.importance.get()[k], expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("limits", "batches"),
    [
        ({"limit_train_batches": 2}, 2),
        ({"limit_train_batches": 0.5}, 3),
        ({"max_steps": 3}, 3),
        ({"overfit_batches": 1}, 1),
        ({}, STEPS + 1),
    ],
    ids=["limit", "share", "max_steps", "overfit", "none"],
)
def test_the_end_of_a_task_reads_no_more_than_training(limits: dict[str, Any], batches: int) -> None:
    benchmark = stream()
    model = module(benchmark, ALL, spec=float_spec(benchmark))
    loader = own_loader(benchmark, 0, with_task=False)
    trainer(2, **limits).fit(model, loader)
    assert position(model) == (0, CONSOLIDATED)
    assert_fisher(model, min(BATCH * batches, BATCH * STEPS + 2))


@pytest.mark.parametrize(
    ("limits", "samples"),
    [({"limit_train_batches": 2}, 2 * BATCH), ({"max_steps": 3}, 3 * BATCH), ({}, STEPS * BATCH + 2)],
    ids=["limit", "max_steps", "none"],
)
@pytest.mark.parametrize("hparams", [ALL, MASHParams(), ICARL], ids=lambda hparams: hparams.name)
def test_so_it_does_with_our_own_data(
    hparams: AlgorithmHParams, limits: dict[str, Any], samples: int
) -> None:
    benchmark = stream()
    model = module(benchmark, hparams)
    seen: list[int] = []
    end_task = model.end_task

    def counting(batches: Any) -> None:
        actual = list(batches)
        seen.append(sum(len(batch.y) for batch in actual))
        end_task(actual)

    object.__setattr__(model, "end_task", counting)
    trainer(2, **limits).fit(model, datamodule=data(benchmark, 0))
    assert seen == [samples]
    assert position(model) == (0, CONSOLIDATED)


@pytest.mark.parametrize(
    ("limits", "steps"),
    [({"max_steps": 7}, 7), ({"limit_train_batches": 4}, 4), ({"limit_train_batches": 9, "max_steps": 7}, 7)],
    ids=["max_steps", "limit", "both"],
)
def test_data_without_an_end_are_consolidated(limits: dict[str, Any], steps: int) -> None:
    benchmark, endless = stream(), Endless()
    model = module(benchmark, ALL, spec=float_spec(benchmark))
    trained: list[int] = []
    note = At(lambda t, _: trained.append(endless.reads), "on_train_end")
    trainer(1 if "max_steps" not in limits else None, callbacks=[note], **limits).fit(
        model, DataLoader(endless, BATCH)
    )
    assert position(model) == (0, CONSOLIDATED)
    assert trained[0] >= steps * BATCH
    assert endless.reads - trained[0] == steps * BATCH
    assert_fisher(model, steps * BATCH)


def test_data_of_unknown_length_are_read_once() -> None:
    benchmark, some = stream(), Endless(18)
    model = module(benchmark, ALL, spec=float_spec(benchmark))
    trainer(3).fit(model, DataLoader(some, BATCH))
    assert some.reads == 4 * 18
    assert_fisher(model, 18)


def test_an_iterator_that_is_used_up_loses_no_task() -> None:
    benchmark = stream()
    loader = own_loader(benchmark, 0, with_task=False)
    model = module(benchmark, ALL, spec=float_spec(benchmark))
    with pytest.raises(ValueError, match=r"no batch for the end of task 0.*call module.consolidate_task"):
        trainer().fit(model, iter(list(loader)))
    assert position(model) == (0, TRAINING)
    model.consolidate_task(loader)
    twin = module(benchmark, ALL, spec=float_spec(benchmark))
    trainer().fit(twin, loader)
    assert_same(everything(model), everything(twin))
    naive = module(benchmark, NaiveHParams(), spec=float_spec(benchmark))
    trainer().fit(naive, iter(list(loader)))
    assert position(naive) == (0, CONSOLIDATED)


# -- reports


class Records(Logger):
    """Keeps what is logged."""

    name, version = "records", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        actual = {k: float(v) for k, v in metrics.items() if k.startswith("train/")}
        self.rows += [(step, actual)] if actual else []

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""


def test_reports_are_the_means_of_their_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps at a time, whether they are counted together or one by one."""
    benchmark = stream()
    loader = own_loader(benchmark, 0, with_task=False)
    actual = []
    for held in (reporting.HELD, 1):
        monkeypatch.setattr(reporting, "HELD", held)
        model, records = module(benchmark, NaiveHParams(), spec=float_spec(benchmark)), Records()
        trainer(logger=records).fit(model, loader)
        actual.append(records.rows)
    net = module(benchmark, NaiveHParams()).net
    optimizer = MOMENTUM(net.parameters())
    expected, losses, hits = [], [], []
    for step, (x, y) in enumerate(loader, 1):
        optimizer.zero_grad()
        logits = net(x)
        loss = F.cross_entropy(logits, y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        hits += (logits.argmax(1) == y).tolist()
        if step % 2 == 0:
            expected.append({"train/loss": sum(losses) / 2, "train/accuracy": sum(hits) / len(hits)})
            losses, hits = [], []
    for rows in actual:
        assert [step for step, _ in rows] == [2, 4, 6]
        assert [row for _, row in rows] == [pytest.approx(row) for row in expected]


@pytest.mark.parametrize("held", [reporting.HELD, 700], ids=["waiting", "counted"])
def test_a_resumed_fit_reports_the_same_bits(
    held: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a checkpoint after each step of a report of five, of which some are counted and some wait."""
    monkeypatch.setattr(reporting, "HELD", held)
    benchmark = stream()
    straight = Records()

    def save(one: pl.Trainer, hook: str) -> None:
        one.save_checkpoint(tmp_path / f"{one.global_step}.ckpt")

    def fit(logger: Records, path: Path | None, *callbacks: At) -> None:
        one: Any = trainer(2, logger=logger, callbacks=[*callbacks])
        one.log_every_n_steps = 5
        one.fit(module(benchmark), datamodule=data(benchmark, 0), ckpt_path=path)

    fit(straight, None, At(save, "on_train_batch_end"))
    kept = [torch.load(tmp_path / f"{step}.ckpt", weights_only=True)["sequel"] for step in range(1, 5)]
    assert any(actual["counts"] for actual in kept) == (held == 700)
    assert all(actual["waiting"] or actual["counts"] for actual in kept)
    for step in range(1, 2 * STEPS):
        resumed = Records()
        fit(resumed, tmp_path / f"{step}.ckpt")
        assert resumed.rows == straight.rows[step // 5 :]


def held_bytes(classes: int, steps: int) -> int:
    """Train that many steps without a report, and return the most bytes that wait for it."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, classes))
    mask = torch.ones(1, classes, dtype=torch.bool).numpy()
    spec = StreamSpec(LeafSpec((SIDE, SIDE, 1), "float32"), classes, 1, "domain", mask)
    model = Naive(net, MOMENTUM, NaiveHParams(), spec)
    most = 0

    def measure(*_: Any) -> None:
        nonlocal most
        running = model.running_metrics
        tensors = [tensor for step in running.waiting for tensor in step] + list(running.counts or ())
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        most = max(most, sum(storages.values()))

    one: Any = trainer(None, max_steps=steps, callbacks=[At(measure, "on_train_batch_end")])
    one.log_every_n_steps = 10**9
    one.fit(model, DataLoader(Endless(), BATCH))
    return most


def test_what_is_kept_for_a_report_grows_neither_with_classes_nor_with_steps() -> None:
    bound = 8 * reporting.HELD
    assert held_bytes(CLASSES, 2) < held_bytes(CLASSES, 20) < bound
    few = held_bytes(20_000, 4)
    assert few == held_bytes(20_000, 12) < 1000  # all logits of four steps would be 1.3 MB
