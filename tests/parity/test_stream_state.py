"""What a method can read of its position in the stream: the classes seen, those of the task, the progress."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
import torch
from flax.training.train_state import TrainState

import sequel_flax
import sequel_lightning
from sequel_benchmarks import RotatedDigits, SplitDigits
from sequel_core import Batch
from sequel_core.algorithms.naive import NaiveHParams
from sequel_core.hparams import OptimizerHParams, TrainingHParams
from sequel_core.stream.benchmark import Benchmark, Scenario
from sequel_core.testing.parity import SILENT, difference
from sequel_flax import bundle
from tests.lightning.parts import At, trainer

STEPS = 12  # of a task: two epochs of six batches
TRAINING = TrainingHParams(batch_size=10, epochs_per_task=2, dtype="float64")
SGD = OptimizerHParams(lr=0.1)


def decaying(hparams: Any, seed: int = 0, objective: Any = None) -> sequel_flax.Algorithm:
    """Naive finetuning whose loss decays to 0 within each task, and which counts the classes seen."""

    def loss(ts: Any, params: Any, state: Any, batch: Batch) -> Any:
        value, outputs = bundle.training_loss(ts, params, state, batch)
        weight = sequel_flax.seen_classes(state.stream).sum() / sequel_flax.task_classes(state.stream).sum()
        return (1 - sequel_flax.task_progress(ts, state)) * weight * value, outputs

    return sequel_flax.make_algorithm(hparams, seed, partial(bundle.train_step, training_loss=loss))


class Decaying(sequel_lightning.ContinualModule):
    hparams_class = NaiveHParams

    def loss(self, outputs: Any, batch: Batch) -> torch.Tensor:
        self.fractions: list[float] = [*getattr(self, "fractions", []), self.task_progress]
        weight = self.seen_classes().sum() / self.task_classes().sum()
        return (1 - self.task_progress) * weight * super().loss(outputs, batch)


def learners(stream: Benchmark) -> tuple[Any, Any]:
    net = sequel_lightning.MLP((8,), stream.num_classes, image_shape=stream.image_shape)
    optimizers = [plugin.build_optimizer(SGD) for plugin in (sequel_lightning, sequel_flax)]
    ours = sequel_lightning.make_learner(
        NaiveHParams(), net, optimizers[0], stream, TRAINING, implementation=Decaying
    )
    theirs = sequel_flax.make_learner(
        NaiveHParams(),
        sequel_flax.MLP((8,), stream.num_classes),
        optimizers[1],
        stream,
        TRAINING,
        implementation=decaying,
    )
    return ours, theirs


@pytest.mark.parametrize("scenario", ["domain", "task", "class"])
def test_a_method_reads_the_same_in_both_frameworks(scenario: Scenario) -> None:
    stream = (
        RotatedDigits(num_tasks=3, subset=60)
        if scenario == "domain"
        else SplitDigits(num_tasks=5, scenario=scenario, subset=60)
    )
    ours, theirs = learners(stream)
    assert np.isnan(ours.module.task_progress)
    assert np.isnan(sequel_flax.task_progress(theirs.ts, theirs.state))
    for seen in (ours.module.seen_classes(), sequel_flax.seen_classes(theirs.state.stream)):
        assert not np.asarray(seen).any()
    for task in stream.tasks[:3]:
        for learner in (ours, theirs):
            learner.fit_task(task, SILENT)
        current, seen = np.zeros((2, stream.num_classes), bool)
        current[list(task.classes)] = True
        seen[[c for past in stream.tasks[: task.index + 1] for c in past.classes]] = True
        state = theirs.state
        for actual, expected in (
            (ours.module.task_classes(), current),
            (sequel_flax.task_classes(state.stream), current),
            (ours.module.seen_classes(), seen),
            (sequel_flax.seen_classes(state.stream), seen),
        ):
            np.testing.assert_array_equal(np.asarray(actual), expected)
        assert ours.module.task_progress == sequel_flax.task_progress(theirs.ts, state) == 1
    np.testing.assert_array_equal(ours.module.fractions, np.tile(np.arange(STEPS) / STEPS, 3))
    assert difference(ours.weights(), theirs.weights()) < 1e-10


def test_a_loop_gives_the_number_of_steps() -> None:
    stream = RotatedDigits(num_tasks=2, subset=60)
    algorithm, net = decaying(NaiveHParams()), sequel_flax.MLP((8,))
    params = sequel_flax.initial_params(net, stream.spec, 0)
    ts = TrainState.create(apply_fn=net.apply, params=params, tx=optax.sgd(0.1))
    state = algorithm.init(ts, stream.spec)
    step: Any = jax.jit(algorithm.train_step)
    batch = Batch(*stream.tasks[0].train.take(np.arange(10)))
    unknown, started = algorithm.start_task(ts, state, stream.tasks[0])
    assert np.isnan(sequel_flax.task_progress(unknown, started))
    assert np.isnan(step(unknown, started, batch)[2]["loss"])
    with pytest.raises(ValueError, match="num_steps is the number of steps of a task, >= 1, got 0"):
        algorithm.start_task(ts, state, stream.tasks[0], 0)
    fractions, compiled = [], 0
    for task in stream.tasks:
        ts, state = algorithm.start_task(ts, state, task, 3)
        for _ in range(3):
            fractions.append(float(sequel_flax.task_progress(ts, state)))
            batch = Batch(*task.train.take(np.arange(10)))
            ts, state, _ = step(ts, state, batch)
        ts, state = algorithm.end_task(ts, state, [batch])
        compiled = compiled or step._cache_size()
    np.testing.assert_allclose(fractions, [0, 1 / 3, 2 / 3] * 2)
    assert step._cache_size() == compiled


def test_the_progress_resumes_with_a_checkpoint(tmp_path: Path) -> None:
    """Of Lightning, after 8 of 12 steps; Flax has it in its state."""
    stream = RotatedDigits(num_tasks=2, subset=60)
    data = sequel_lightning.TaskDataModule(stream.tasks[0], 10)

    def made() -> Decaying:
        net = sequel_lightning.MLP((8,), image_shape=stream.image_shape)
        return Decaying(net, partial(torch.optim.SGD, lr=0.1), NaiveHParams(), stream.spec)

    stopped = trainer(2, max_steps=8)
    stopped.fit(made(), datamodule=data)
    assert stopped.lightning_module.task_progress == 1  # max_steps is the last step of this fit
    save = At(lambda fit, _: fit.save_checkpoint(tmp_path / "8.ckpt"), "on_train_batch_end", step=8)
    trainer(2, callbacks=[save]).fit(made(), datamodule=data)
    resumed = made()
    trainer(2).fit(resumed, datamodule=data, ckpt_path=str(tmp_path / "8.ckpt"), weights_only=False)
    np.testing.assert_array_equal(resumed.fractions, np.arange(8, 12) / 12)


def test_classes_need_a_spec() -> None:
    module = Decaying(sequel_lightning.MLP((8,)), torch.optim.SGD)
    with pytest.raises(ValueError, match="Decaying needs the stream's spec for the classes of each task"):
        module.seen_classes()
