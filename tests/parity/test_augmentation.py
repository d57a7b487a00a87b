"""Both frameworks crop and mirror as NumPy does, and train on the same augmented samples."""

from __future__ import annotations

from dataclasses import fields
from functools import cache
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import sequel_flax
import sequel_lightning
from sequel_core.hparams import AlgorithmHParams
from sequel_core.runs.learner import Learner
from sequel_core.stream.arrays import FloatArray
from sequel_core.stream.benchmark import Benchmark
from sequel_core.stream.images import Augmentation
from sequel_core.testing import parity
from sequel_core.testing.parity import OPTIMIZERS, SILENT, WIDTHS, difference, training
from sequel_flax.augmentation import crop as flax_crop
from sequel_flax.learner import as_batch
from sequel_lightning.augmentation import crop as torch_crop
from tests.parity.cases import CASES, bar

ONE_EACH = {hparams.name: (hparams, optimizer) for hparams, optimizer in reversed(CASES)}

QUICK = ("naive", "derpp")
"""What runs by default; the rest is `slow`."""


@pytest.mark.parametrize("dtype", ["uint8", "float64"])
def test_crops_are_those_of_padding_slicing_and_reversing(dtype: str) -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(1, 256, (60, 7, 5, 3)).astype(dtype)
    crops = np.stack([rng.integers(-3, 4, 60), rng.integers(-3, 4, 60), rng.integers(0, 2, 60)], 1)
    padded = np.pad(x, ((0, 0), (3, 3), (3, 3), (0, 0)))
    places = zip(padded, crops, strict=True)
    expected = np.stack([p[3 + i : 10 + i, 3 + j : 8 + j] for p, (i, j, _) in places])
    expected[crops[:, 2] == 1] = expected[crops[:, 2] == 1, :, ::-1]
    ours: Any
    for ours in ((x, crops.astype(np.int32)), (jnp.asarray(x), jnp.asarray(crops, jnp.int32))):
        actual = np.asarray(flax_crop(*ours))  # NumPy's are those of a step that is not compiled
        np.testing.assert_array_equal(actual, expected)
    there = torch_crop(torch.from_numpy(x).movedim(-1, 1), torch.from_numpy(crops))
    assert there.dtype == torch.from_numpy(x).dtype
    np.testing.assert_array_equal(there.movedim(1, -1).numpy(), expected)


@cache
def augmented() -> Benchmark:
    stream = parity.stream("class")
    values = {f.name: getattr(stream, f.name) for f in fields(Benchmark)}
    return Benchmark(**values | {"augmentation": Augmentation(1, flip=True)})


def learners(hparams: AlgorithmHParams, optimizer: str, steps_per_call: int = 1) -> tuple[Learner, Learner]:
    settings, changes = OPTIMIZERS[optimizer]
    stream = augmented()
    net = sequel_lightning.MLP(WIDTHS, stream.num_classes, image_shape=stream.image_shape)
    factory = sequel_lightning.build_optimizer(settings)
    ours = sequel_lightning.make_learner(hparams, net, factory, stream, training(**changes))
    model, tx = sequel_flax.MLP(WIDTHS, stream.num_classes), sequel_flax.build_optimizer(settings)
    options = training(**changes)
    return ours, sequel_flax.make_learner(hparams, model, tx, stream, options, steps_per_call=steps_per_call)


def trained(learner: Learner, num_tasks: int = 3) -> dict[str, FloatArray]:
    for task in learner.hparams.training_tasks(augmented(), learner.training.seed):
        if task.index < num_tasks:
            learner.fit_task(task, SILENT)
    return learner.weights()


@pytest.mark.parametrize(
    ("hparams", "optimizer"),
    [
        pytest.param(*case, marks=[] if name in QUICK else [pytest.mark.slow], id=name)
        for name, case in ONE_EACH.items()
    ],
)
def test_same_weights_with_augmentation(hparams: AlgorithmHParams, optimizer: str) -> None:
    torch_, flax_ = (trained(learner) for learner in learners(hparams, optimizer, steps_per_call=8))
    assert difference(flax_, torch_) < bar(hparams)
    if hparams.name in ("naive", "er"):
        plain = parity.trained("jax", hparams, optimizer, "class")
        assert difference(flax_, plain) > 1e-2


def test_a_step_without_the_plan_is_refused() -> None:
    _, learner = learners(*CASES[0])
    assert isinstance(learner, sequel_flax.FlaxLearner)
    batch = as_batch(augmented().tasks[0].train.take(np.arange(4)))
    with pytest.raises(ValueError, match=r"samples are augmented and the batch has no plan.*planner.next"):
        learner.algorithm.train_step(learner.ts, learner.state, batch)
