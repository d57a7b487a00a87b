"""Replay modules: hand-written loops, the contents and size of the memory, and errors."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from sequel_benchmarks import RotatedDigits
from sequel_core.algorithms.agem import AGEMHParams
from sequel_core.algorithms.der import DERHParams
from sequel_core.algorithms.derpp import DERppHParams
from sequel_core.algorithms.er import ERHParams
from sequel_core.algorithms.ewc import EWCHParams
from sequel_core.algorithms.icarl import ICaRLHParams
from sequel_core.algorithms.kcl import KCLHParams
from sequel_core.algorithms.lamaml import LaMAMLHParams
from sequel_core.algorithms.lfl import LFLHParams
from sequel_core.algorithms.mas import MASHParams
from sequel_core.algorithms.mcsgd import MCSGDHParams
from sequel_core.algorithms.naive import NaiveHParams
from sequel_core.algorithms.si import SIHParams
from sequel_core.hparams import AlgorithmHParams, ReplayHParams, TrainingHParams
from sequel_core.runs.learner import FitMonitor
from sequel_core.stream import plan
from sequel_core.stream.benchmark import Scenario
from sequel_core.stream.memory import MemoryPlanner, joined_with_memory, memory_stream
from sequel_lightning import ALGORITHMS, MLP, LightningLearner
from sequel_lightning.replay import ReplayModule
from tests.lightning.parts import (
    AGEM,
    BATCH,
    CLASSES,
    DERPP,
    ER,
    MOMENTUM,
    STEPS,
    assert_close,
    assert_same,
    every_algorithm,
    everything,
    float_spec,
    learn,
    module,
    network,
    own_loader,
    own_stream,
    stream,
    trainer,
)

SILENT = FitMonitor(lambda progress: None, lambda: None)
Held = dict[int, tuple[Tensor, Tensor]]  # image and label by slot


def replay_module(
    hparams: ReplayHParams, scenario: Scenario = "domain", floats: bool = False
) -> ReplayModule:
    benchmark = stream(scenario=scenario)
    made = module(benchmark, hparams, spec=float_spec(benchmark) if floats else benchmark.spec)
    assert isinstance(made, ReplayModule)
    return made


def learner(hparams: AlgorithmHParams) -> LightningLearner:
    return LightningLearner(
        module(stream(), hparams), TrainingHParams(batch_size=BATCH), trainer={"accelerator": "cpu"}
    )


def assert_holds(model: ReplayModule, held: Held) -> None:
    """Compare a memory, slot by slot and bit for bit, with what was kept by hand."""
    slots = np.flatnonzero(model.state.t >= 0)
    assert slots.tolist() == sorted(held)
    for slot in slots.tolist():
        assert torch.equal(model.state.x[slot], held[slot][0])
        assert model.state.y[slot] == held[slot][1]


# -- loops written by hand, on the planner's slots


@pytest.mark.parametrize("memory", ["reservoir", "class_balanced", "task_quota"])
def test_er_equals_a_loop_written_by_hand(memory: Any) -> None:
    benchmark, hparams = stream(), ERHParams(mem_size=9, mem_batch_size=6, memory=memory)
    model, net = replay_module(hparams, floats=True), network(benchmark)
    planner = MemoryPlanner(hparams, benchmark.spec, seed=0)
    held: Held = {}
    replayed = 0
    for task in range(2):
        loader = own_loader(benchmark, task, with_task=False)
        trainer().fit(model, loader)
        optimizer = MOMENTUM(net.parameters())
        for x, y in loader:
            step = planner.next(y.numpy(), np.full(len(y), task))
            past = [held[slot] for slot in step.reads[0].tolist() if slot < 9]
            images = torch.stack([*x, *(image for image, _ in past)])
            labels = torch.stack([*y, *(label for _, label in past)])
            optimizer.zero_grad()
            F.cross_entropy(net(images), labels).backward()
            optimizer.step()
            held |= {slot: (x[n], y[n]) for n, slot in enumerate(step.write.tolist()) if slot < 9}
            replayed += len(past)
        assert_close(model, net)
        assert_holds(model, held)
    assert replayed >= 3 * 6  # as soon as there is anything, or in the second task alone


@pytest.mark.parametrize("clip", [None, 0.1])
def test_agem_projects_before_the_trainer_clips(clip: float | None) -> None:
    benchmark = stream()
    model, net = replay_module(AGEM, floats=True), network(benchmark)
    params = list(net.parameters())
    planner = MemoryPlanner(AGEM, benchmark.spec, seed=0, past_only=True)

    def gradient(x: Tensor, y: Tensor) -> Tensor:
        actual = torch.autograd.grad(F.cross_entropy(net(x), y), params)
        return torch.cat([g.flatten() for g in actual])

    held: Held = {}
    violations = 0
    for task in range(3):
        loader = own_loader(benchmark, task, with_task=False)
        trainer(gradient_clip_val=clip).fit(model, loader)
        optimizer = MOMENTUM(params)
        for x, y in loader:
            step = planner.next(y.numpy(), np.full(len(y), task))
            past = [held[slot] for slot in step.reads[0].tolist() if slot < 24]
            g = gradient(x, y)
            if past:
                reference = gradient(torch.stack([a for a, _ in past]), torch.stack([b for _, b in past]))
                if g @ reference < 0:
                    g = g - (g @ reference) / (reference @ reference) * reference
                    violations += 1
            if clip is not None:
                g = g * min(1.0, clip / float(g.norm()))
            for p, part in zip(params, g.split([p.numel() for p in params]), strict=True):
                p.grad = part.reshape(p.shape)
            optimizer.step()
            held |= {slot: (x[n], y[n]) for n, slot in enumerate(step.write.tolist()) if slot < 24}
        assert_close(model, net)
        assert_holds(model, held)
    assert violations > 2


@pytest.mark.parametrize("scenario", ["domain", "task"])
def test_der_costs_nothing_with_the_network_that_stored_the_logits(scenario: Scenario) -> None:
    """Weights that never move give the same logits again, so the loss is the batch's cross-entropy."""
    benchmark, net = stream(scenario=scenario), network(stream(scenario=scenario))
    still = module(benchmark, DERHParams(alpha=1e6, mem_size=20), partial(torch.optim.SGD, lr=0.0))
    made = LightningLearner(
        still, TrainingHParams(batch_size=BATCH, log_every_n_steps=1), trainer={"accelerator": "cpu"}
    )
    actual: list[float] = []
    expected = []
    for task in benchmark.tasks[:2]:
        made.fit_task(task, FitMonitor(lambda progress: actual.append(progress.loss), lambda: None))
        for rows in plan.epoch_batches(0, task.index, 0, len(task.train), BATCH):
            x, y, t = task.train.take(rows)
            logits = net(((torch.from_numpy(x).float() / 255 - 0.4) / 0.25).movedim(-1, 1))
            if scenario == "task":
                logits = logits.masked_fill(~torch.from_numpy(benchmark.mask[t]), -torch.inf)
            expected.append(F.cross_entropy(logits, torch.from_numpy(y)).item())
    assert actual == pytest.approx(expected, rel=1e-5)


# -- what the memory holds


class Spoil(Callback):
    """Overwrites the batch's own tensors once its step is done."""

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        for tensor in batch:
            tensor.zero_()


@pytest.mark.parametrize("hparams", [AGEM, ER, DERPP], ids=lambda hparams: hparams.name)
def test_the_memory_holds_copies_of_the_batch(hparams: ReplayHParams) -> None:
    spoilt, plain = replay_module(hparams, floats=True), replay_module(hparams, floats=True)
    for task in range(2):
        loader = own_loader(stream(), task, with_task=True)
        trainer(callbacks=[Spoil()]).fit(spoilt, loader)
        trainer().fit(plain, loader)
    assert plain.state.x.any()
    assert_same(everything(spoilt), everything(plain))


@pytest.mark.parametrize("policy", ["reservoir", "class_balanced"])
def test_the_memory_holds_what_was_trained_on_and_no_more(policy: Any) -> None:
    """Of 22 samples, the two that fill no batch never enter."""
    task = stream().tasks[0]
    made = learner(ERHParams(mem_size=30, mem_batch_size=5, memory=policy))
    made.fit_task(task, SILENT)
    order = plan.epoch_batches(0, 0, 0, len(task.train), BATCH)
    trained_on = task.train.take(order.ravel())
    assert len(trained_on.y) == BATCH * STEPS < len(task.train)
    held = made.memory_samples()
    for actual, expected in zip(held, trained_on, strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_samples_of_the_memory_are_copies() -> None:
    made = learner(DERPP)
    made.fit_task(stream().tasks[0], SILENT)
    before = everything(made.module)
    for array in made.memory_samples():
        array[:] = 0
    assert_same(everything(made.module), before)


@pytest.mark.parametrize("hparams", [NaiveHParams(), SIHParams()], ids=lambda hparams: hparams.name)
def test_a_method_without_a_memory_has_no_samples(hparams: AlgorithmHParams) -> None:
    with pytest.raises(ValueError, match=f"{hparams.name} keeps no samples; methods with a memory do"):
        learner(hparams).memory_samples()


def test_samples_of_the_memory_train_as_a_task() -> None:
    """Twenty of task 0 and, after them, twenty-two of task 1 make ten steps of four."""
    benchmark = stream()
    keeper, other = learner(ERHParams(mem_size=30)), learner(NaiveHParams())
    keeper.fit_task(benchmark.tasks[0], SILENT)
    joined = joined_with_memory(benchmark.tasks[1], memory_stream(keeper.memory_samples()))
    assert [part.task for part in joined.train.parts] == [1, 0]
    before = other.weights()
    other.fit_task(joined, SILENT)
    assert other.step == (BATCH * STEPS + 2 + BATCH * STEPS) // BATCH == 10
    assert other.evaluate(joined, "train").total == 42
    assert not np.array_equal(other.weights()["head/bias"], before["head/bias"])


SIZES: dict[str, Any] = {"mem_size": 60, "mem_batch_size": 10}
BYTES = [
    (NaiveHParams(), 0),
    (EWCHParams(), 2 * 910 * 4),  # 64 * 12 + 12 + 12 * 10 + 10 parameters: anchor, importance
    (SIHParams(), 3 * 910 * 4),  # and path
    (MASHParams(), 2 * 910 * 4),
    (LFLHParams(), 910 * 4 + 4),  # the old network, and whether there is one
    (AGEMHParams(**SIZES), 60 * 72),  # 8 * 8 pixels, label and task of four bytes each
    (ERHParams(**SIZES), 60 * 72),
    (DERHParams(**SIZES), 60 * 112),  # and ten logits
    (DERppHParams(**SIZES), 60 * 112),
    (ERHParams(mem_size=0), 0),
    (MCSGDHParams(mem_size=60), 60 * 72 + 2 * 910 * 4 + 4),  # w_bar, w_hat, and when
    (MCSGDHParams(mem_size=60, lmc_policy="online"), 60 * 72 + 4 * 910 * 4 + 4),  # and w_bar on its way
    (LaMAMLHParams(**SIZES), 60 * 72 + 910 * 4),  # and a rate of each weight
    (ICaRLHParams(mem_size=60), 60 * 72 + 910 * 4 + 10 * 12 * 4 + 10 + 4),  # means, which, when
    (KCLHParams(core_size=20, kernel_type="rbf", task_given=True), 60 * 72),
    (  # noise; phases, positions
        KCLHParams(core_size=20, d_rn_f=16, task_given=True),
        60 * 72 + (2**20 + 11) * 4 + 16 * 8,
    ),
]
"""The same in tests/flax/test_replay.py."""


@pytest.mark.parametrize(("hparams", "expected"), BYTES)
def test_memory_bytes_are_the_sizes_of_what_is_kept(hparams: AlgorithmHParams, expected: int) -> None:
    digits = RotatedDigits(num_tasks=3, subset=43)
    net = MLP((12,), image_shape=digits.image_shape)
    model = ALGORITHMS[hparams.name](net, MOMENTUM, hparams, digits.spec)
    assert LightningLearner(model, TrainingHParams()).memory_bytes() == model.memory_bytes() == expected


# -- state_dict


@every_algorithm
def test_a_fresh_module_continues_from_the_state_dict(hparams: AlgorithmHParams) -> None:
    benchmark = own_stream(hparams)
    model, fresh = module(benchmark, hparams), module(benchmark, hparams)
    learn(model, benchmark, 0)
    fresh.load_state_dict({k: v.clone() for k, v in model.state_dict().items()})
    for each in (model, fresh):
        learn(each, benchmark, 1)
    actual, expected = everything(fresh)["tensors"], everything(model)["tensors"]
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[k], v) for k, v in expected.items())


def test_a_state_dict_of_another_memory_raises() -> None:
    other = ERHParams(mem_size=9, mem_batch_size=6, memory="class_balanced")
    with pytest.raises(
        ValueError, match="planner's state must have 3 numbers, got 19; it comes from a memory of"
    ):
        replay_module(ER).load_state_dict(replay_module(other).state_dict())


# -- errors


@pytest.mark.parametrize("hparams", [AGEM, ER, DERPP], ids=lambda hparams: hparams.name)
def test_float_images_need_a_spec_that_says_so(hparams: ReplayHParams) -> None:
    model = replay_module(hparams)
    with pytest.raises(
        ValueError,
        match=r"holds uint8 images, the batch has float32; give a spec with LeafSpec",
    ):
        trainer().fit(model, own_loader(stream(), 0, with_task=False))
    assert (model.state.t == -1).all()


@pytest.mark.parametrize("hparams", [AGEM, ER, DERPP], ids=lambda hparams: hparams.name)
def test_a_memory_needs_a_spec(hparams: ReplayHParams) -> None:
    with pytest.raises(ValueError, match=r"needs the stream's spec, got None; construct it with spec=benchm"):
        module(stream(), hparams, spec=None)


@pytest.mark.parametrize(
    ("y", "t"),
    [(CLASSES + 5, 0), (-1, 0), (1, 7), (1, -1)],
    ids=["label", "negative label", "task", "negative task"],
)
def test_labels_and_tasks_outside_the_spec_raise(y: int, t: int) -> None:
    """In the first batch by the module, later by the planner, in both cases before anything is written."""
    labels, tasks = torch.tensor([0, 1, y, 2]), torch.tensor([0, 0, t, 0])
    model = replay_module(ER, floats=True)
    before = model.planner.state
    first = f"task index of each sample, 0 to 2, got {t}" if t else f"label {y} is not among the classes of"
    with pytest.raises(ValueError, match=first):
        trainer().fit(model, DataLoader(TensorDataset(torch.zeros(4, 1, 3, 3), labels, tasks), BATCH))
    assert (model.state.t == -1).all()
    np.testing.assert_array_equal(model.planner.state, before)

    model = replay_module(ER, floats=True)
    good = TensorDataset(torch.zeros(8, 1, 3, 3), labels.new_zeros(8), tasks.new_zeros(8))
    good.tensors[1][4:], good.tensors[2][4:] = labels, tasks
    with pytest.raises(
        ValueError, match=f"labels and tasks must be in the stream's spec, got label {y} in task {t}"
    ):
        trainer().fit(model, DataLoader(good, BATCH))
    assert (model.state.t >= 0).sum() == BATCH
    assert model.running_metrics.steps_done == 1


def test_a_label_of_another_task_raises() -> None:
    """Task 0 has classes 0 and 1, task 1 has 2 and 3."""
    model = replay_module(ER, scenario="task", floats=True)
    with pytest.raises(ValueError, match=r"label [23] is not among the classes of task 0, \[0, 1\]; relabel"):
        trainer().fit(model, own_loader(stream(scenario="task"), 1, with_task=False))
