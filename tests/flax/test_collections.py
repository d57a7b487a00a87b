"""Variables besides parameters and running statistics: linen collections and NNX variables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

from sequel_core.algorithms.der import DERHParams
from sequel_core.algorithms.lfl import LFLHParams
from sequel_core.algorithms.mcsgd import MCSGDHParams
from sequel_core.algorithms.naive import NaiveHParams
from sequel_core.hparams import AlgorithmHParams
from sequel_core.stream.task import Batch, Task
from sequel_core.testing.streams import FEATURES, OUTPUTS, table
from sequel_flax import BatchStatsTrainState, FlaxLearner, adapted, make_learner, naive
from sequel_flax.foreign import write_back
from tests.flax.parts import SILENT, batches, settings

RATE = 0.1


class Counting(nn.Module):
    """A network with spectral normalisation, a counter, and a moving average that scales a layer."""

    def setup(self) -> None:
        self.stem = nn.SpectralNorm(nn.Dense(8))
        self.head = nn.Dense(OUTPUTS)
        self.calls = self.variable("counts", "calls", lambda: jnp.zeros((), jnp.int32))
        self.scale = self.variable("cache", "scale", jnp.ones, ())

    def features(self, x: jax.Array, train: bool) -> jax.Array:
        if train:
            self.calls.value += 1
            self.scale.value = 0.9 * self.scale.value + 0.1 * jnp.abs(x).mean()
        hidden: jax.Array = nn.tanh(self.stem(x, update_stats=train)) * self.scale.value
        return hidden

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        logits: jax.Array = self.head(self.features(x, train))
        return logits


class Count(nnx.Variable[Any]):
    """A user-defined type of variable."""


class CountingNNX(nnx.Module):
    """A network in NNX with dropout of rate 0, a counter, and a moving average that scales a layer."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.stem = nnx.Linear(FEATURES, 8, rngs=rngs)
        self.drop = nnx.Dropout(0.0, rngs=rngs)
        self.head = nnx.Linear(8, OUTPUTS, rngs=rngs)
        self.calls = Count(jnp.zeros((), jnp.int32))
        self.scale = nnx.Cache(jnp.ones(()))

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        if train:
            self.calls[...] += 1
            self.scale[...] = 0.9 * self.scale[...] + 0.1 * jnp.abs(x).mean()
        hidden = nnx.tanh(self.stem(x)) * self.scale[...]
        return self.head(self.drop(hidden))


def tasks() -> list[Task]:
    return list(table("classes").tasks[:2])


def learner(model: Any, hparams: AlgorithmHParams | None = None) -> FlaxLearner:
    return make_learner(hparams or NaiveHParams(), model, optax.sgd(RATE), table("classes"), settings())


def fitted(model: Any, hparams: AlgorithmHParams | None = None) -> FlaxLearner:
    made = learner(model, hparams)
    for task in tasks():
        made.fit_task(task, SILENT)
    return made


def cross_entropy(logits: jax.Array, y: Any) -> jax.Array:
    loss: jax.Array = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
    return loss


def assert_close(a: Any, b: Any) -> None:
    structures: list[Any] = [jax.tree.structure(tree) for tree in (a, b)]
    assert structures[0] == structures[1]
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6)


def num_steps() -> int:
    return sum(1 for task in tasks() for _ in batches(task, settings()))


def hand_written() -> dict[str, Any]:
    """Return the variables after plain training with `model.apply`."""
    net = Counting()
    variables = dict(net.init(jax.random.key(0), jnp.zeros((1, FEATURES)), train=False))

    @jax.jit
    def step(variables: Any, x: Any, y: Any) -> Any:
        others = {k: v for k, v in variables.items() if k != "params"}

        def loss(params: Any) -> Any:
            logits, updates = net.apply({"params": params, **others}, x, train=True, mutable=list(others))
            return cross_entropy(logits, y), updates

        gradient, updates = jax.grad(loss, has_aux=True)(variables["params"])
        params = jax.tree.map(lambda p, g: p - RATE * g, variables["params"], gradient)
        return {"params": params, **updates}

    for task in tasks():
        for x, y, _, _ in batches(task, settings()):
            variables = step(variables, x, y)
    return variables


def test_linen_collections_against_a_hand_written_loop() -> None:
    made, expected = fitted(Counting()), hand_written()
    ts = made.ts
    assert_close(
        {"params": ts.params, "batch_stats": ts.batch_stats, **ts.collections}, jax.device_get(expected)
    )
    assert ts.collections["counts"]["calls"] == num_steps()
    assert ts.collections["counts"]["calls"].dtype == jnp.int32
    assert abs(float(ts.collections["cache"]["scale"]) - 1) > 0.05
    before = jax.device_get(ts.collections)
    made.evaluate(tasks()[0], "test")
    x, _, t = tasks()[0].test.take(np.arange(5))
    assert_close(
        made.algorithm.predict(ts, made.state, x, jnp.asarray(t)), Counting().apply(expected, x, train=False)
    )
    assert_close(ts.collections, before)


def test_nnx_variables_against_a_hand_written_loop() -> None:
    made, module = fitted(CountingNNX()), CountingNNX()
    optimizer = nnx.Optimizer(module, optax.sgd(RATE), wrt=nnx.Param)
    module.train()  # type: ignore[no-untyped-call]

    @nnx.jit
    def step(module: Any, optimizer: Any, x: Any, y: Any) -> None:
        optimizer.update(module, nnx.grad(lambda net: cross_entropy(net(x, train=True), y))(module))

    for task in tasks():
        for x, y, _, _ in batches(task, settings()):
            step(module, optimizer, x, y)
    trained = CountingNNX()
    write_back(trained, made.ts)
    kinds = (nnx.Param, nnx.Cache, Count)
    a, b = (jax.tree.leaves(nnx.state(net, kinds)) for net in (trained, module))
    assert_close(a, b)
    assert made.ts.collections["Count"]["calls"] == module.calls[...] == num_steps()
    x, _, t = tasks()[0].test.take(np.arange(5))
    module.eval()  # type: ignore[no-untyped-call]
    assert_close(
        made.algorithm.predict(made.ts, made.state, x, jnp.asarray(t)), module(jnp.asarray(x), train=False)
    )


@pytest.mark.parametrize("model", [Counting, CountingNNX], ids=lambda model: model.__name__)
def test_collections_are_resumed(model: Any, tmp_path: Path) -> None:
    first, second = learner(model()), learner(model())
    first.fit_task(tasks()[0], SILENT)
    first.save(tmp_path / "1")()
    second.restore(tmp_path / "1")
    for made in (first, second):
        made.fit_task(tasks()[1], SILENT)
    a, b = (jax.tree.leaves((made.ts.params, made.ts.collections)) for made in (first, second))
    assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_draws_without_samples_change_no_variable() -> None:
    """Each step has a pass for the batch and one for its draw; the draw of the first step is empty."""
    made = fitted(Counting(), DERHParams(mem_size=20, mem_batch_size=6))
    assert made.ts.collections["counts"]["calls"] == 2 * num_steps() - 1


def test_a_frozen_copy_of_a_network_has_its_variables() -> None:
    made = fitted(Counting(), LFLHParams(lfl_lambda=0.1))
    old = made.state.memory.statistics
    assert old["counts"]["calls"] == made.ts.collections["counts"]["calls"] == num_steps()
    assert old["cache"]["scale"] is not made.ts.collections["cache"]["scale"]


def test_a_method_without_other_variables_names_them() -> None:
    with pytest.raises(ValueError, match=r"mcsgd cannot train a network with batch normalisation, .*c"):
        learner(Counting(), MCSGDHParams(mem_size=24, lmc_batch_size=4))


def test_a_train_state_takes_variables_as_init_returns_them() -> None:
    net = Counting()
    variables = adapted(net).init(jax.random.key(0), jnp.zeros((1, FEATURES)), train=False)
    ts: Any = BatchStatsTrainState.create(apply_fn=net.apply, tx=optax.sgd(RATE), **variables)
    algorithm, task = naive(NaiveHParams()), tasks()[0]
    state = algorithm.init(ts, table("classes").spec)
    ts, state = algorithm.start_task(ts, state, task)
    ts, state, _ = jax.jit(algorithm.train_step)(ts, state, Batch(*task.train.take(np.arange(8))))
    assert ts.collections["counts"]["calls"] == 1
