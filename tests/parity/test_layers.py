"""Features by layer name: their values, LFL with them in both frameworks, and errors."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import numpy as np
import optax
import pytest
import torch
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState

import sequel_flax
import sequel_lightning
from sequel_core.algorithms.lfl import LFLHParams
from sequel_core.hparams import OptimizerHParams
from sequel_core.stream.arrays import FloatArray
from sequel_core.testing.parity import SGD, SILENT, difference, training
from sequel_core.testing.parity import stream as benchmark
from tests.parity import test_task_networks
from tests.parity.cases import flax_learner, torch_learner

LAYER = LFLHParams(lfl_lambda=0.1, layer="dense_0")


@cache
def ends(framework: Any, hparams: LFLHParams) -> dict[str, FloatArray]:
    learner = framework(hparams, SGD)
    for task in benchmark().tasks[:2]:
        learner.fit_task(task, SILENT)
    weights: dict[str, FloatArray] = learner.weights()
    return weights


def test_both_frameworks_use_the_layer_alike() -> None:
    assert difference(ends(torch_learner, LAYER), ends(flax_learner, LAYER)) < 1e-10
    default = ends(torch_learner, LFLHParams(lfl_lambda=0.1))
    assert difference(ends(torch_learner, LAYER), default) > 1e-3


@pytest.mark.slow
def test_the_last_hidden_layer_by_its_name_is_the_default() -> None:
    named = ends(torch_learner, LFLHParams(lfl_lambda=0.1, layer="relu_1"))
    assert difference(named, ends(torch_learner, LFLHParams(lfl_lambda=0.1))) < 1e-12

    class Linear(nn.Module):
        def setup(self) -> None:
            self.hidden, self.head = nn.Dense(12), nn.Dense(10)

        def features(self, x: jax.Array) -> jax.Array:
            return self.hidden(x.reshape(len(x), -1))

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.head(self.features(x))

    weights = []
    for layer in (None, "hidden"):
        hparams = LFLHParams(lfl_lambda=0.1, layer=layer)
        learner = sequel_flax.make_learner(hparams, Linear(), optax.sgd(0.05), benchmark(), training())
        for task in benchmark().tasks[:2]:
            learner.fit_task(task, SILENT)
        weights.append(learner.weights())
    assert difference(*weights) < 1e-12


@pytest.mark.slow
def test_a_head_for_each_task_with_the_layer_of_a_shared_network() -> None:
    hparams = LFLHParams(lfl_lambda=0.1, layer="trunk.dense_0", freeze_head=False, task_given=True)
    ours, theirs = test_task_networks.learners(hparams)
    for task in benchmark().tasks:
        ours.fit_task(task, SILENT)
        theirs.fit_task(task, SILENT)
    assert difference(ours.weights(), theirs.weights()) < 1e-10


def test_features_are_the_outputs_of_the_layer() -> None:
    ours, theirs = torch_learner(LAYER, OptimizerHParams()), flax_learner(LAYER, OptimizerHParams())
    x = benchmark().tasks[0].test.take(np.arange(6)).x
    weights = ours.weights()
    normalisation = benchmark().normalisation
    inputs = (x / 255 - normalisation.mean[0]) / normalisation.std[0]
    expected = inputs.reshape(6, -1) @ weights["dense_0/kernel"] + weights["dense_0/bias"]
    with torch.no_grad():
        images = torch.from_numpy(x).movedim(-1, 1)
        actual = ours.module.features(images, layer="dense_0")  # type: ignore[attr-defined]
    np.testing.assert_allclose(actual, expected, atol=1e-12)
    ts, state = theirs.ts, theirs.state  # type: ignore[attr-defined]
    np.testing.assert_allclose(
        sequel_flax.features(ts, ts.params, state, x, layer="dense_0"), expected, atol=1e-12
    )


def test_what_is_rejected() -> None:
    spec = benchmark().spec
    net, ours = sequel_flax.MLP((8,)), sequel_lightning.MLP((8,), image_shape=spec.image_shape)
    ts = TrainState.create(
        apply_fn=net.apply, params=sequel_flax.initial_params(net, spec, 0), tx=optax.sgd(0.1)
    )
    wrong = LFLHParams(layer="dense_7")
    with pytest.raises(ValueError, match=r"must be .*, got 'dense_7'; its layers are dense_0, relu_0, head"):
        sequel_lightning.LFL(ours, torch.optim.SGD, wrong, spec)
    with pytest.raises(ValueError, match=r"layer must be .*, got 'dense_7'; its layers are dense_0, .*head"):
        sequel_flax.lfl(wrong).init(ts, spec)

    plain = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    with pytest.raises(
        ValueError, match="freeze_head needs a last layer called head, got the layers 0, 1; set"
    ):
        sequel_lightning.LFL(plain, torch.optim.SGD, LFLHParams(layer="1"), spec)
    assert sequel_lightning.LFL(plain, torch.optim.SGD, LFLHParams(layer="1", freeze_head=False), spec)

    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.Dense(10)(x.reshape(len(x), -1))

    bare = TrainState.create(
        apply_fn=Plain().apply, params=sequel_flax.initial_params(Plain(), spec, 0), tx=optax.sgd(0.1)
    )
    with pytest.raises(
        ValueError, match="freeze_head needs a last layer called head, got the layers Dense_0; set"
    ):
        sequel_flax.lfl(LFLHParams(layer="Dense_0")).init(bare, spec)
    assert sequel_flax.lfl(LFLHParams(layer="Dense_0", freeze_head=False)).init(bare, spec)

    class Module(nnx.Module):
        def __init__(self) -> None:
            self.head = nnx.Linear(64, 10, rngs=nnx.Rngs(0))

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.head(x.reshape(len(x), -1))

    model = sequel_flax.adapted(Module())
    ts = TrainState.create(apply_fn=model.apply, params=model.init(None)["params"], tx=optax.sgd(0.1))
    with pytest.raises(ValueError, match="layer='head' needs a linen module"):
        sequel_flax.lfl(LFLHParams(layer="head")).init(ts, spec)
