"""Inputs that are not images, and outputs of another shape, in a plain loop without a learner."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.training.train_state import TrainState

from sequel_core.algorithms.er import ERHParams
from sequel_core.algorithms.ewc import EWCHParams
from sequel_core.algorithms.naive import NaiveHParams
from sequel_core.hparams import AlgorithmHParams
from sequel_core.stream.benchmark import Scenario, StreamSpec
from sequel_core.stream.task import Batch
from sequel_core.stream.trees import LeafSpec
from sequel_flax import ALGORITHMS, initial_variables
from sequel_flax.bundle import blank_input, init_stream, masked, normalise
from tests.flax.parts import BATCH, KCL, divided, initial_states, rotated, stream_for

VOCABULARY, LENGTH, WIDTH = 30_002, 8, 4
TOKENS = np.array([30_001, 29_953, 257, 3])  # bfloat16 has no such numbers but 3


class Words(nn.Module):
    """The mean of the embeddings of tokens `[B, ...]`, and a linear layer."""

    dtype: Any = jnp.bfloat16

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        table = self.param("table", nn.initializers.normal(), (VOCABULARY, WIDTH), self.dtype)
        h = table[x].reshape((len(x), -1, WIDTH)).mean(1)
        logits: jax.Array = nn.Dense(10, param_dtype=self.dtype, dtype=self.dtype)(h)
        return logits


def spec_of_tokens(dtype: str = "int32") -> StreamSpec:
    """Return a spec of sequences, as images of one channel and one column."""
    return rotated().spec._replace(x=LeafSpec((LENGTH, 1, 1), dtype))


def batches_of_tokens(dtype: Any = np.int32) -> list[Batch]:
    rng = np.random.default_rng(0)
    return [
        Batch(
            rng.choice(TOKENS, (BATCH, LENGTH, 1, 1)).astype(dtype),
            rng.integers(0, 10, BATCH).astype(np.int32),
            np.zeros(BATCH, np.int32),
        )
        for _ in range(4)
    ]


def trained(
    hparams: AlgorithmHParams, dtype: Any, batches: list[Batch]
) -> tuple[TrainState, Any, dict[str, Any]]:
    """Return the train state and the state after the batches, and the initial parameters."""
    net = Words(dtype)
    params = net.init(jax.random.key(0), batches[0].x)["params"]
    ts = TrainState.create(apply_fn=net.apply, params=params, tx=optax.sgd(0.5))
    algorithm, spec = ALGORITHMS[hparams.name](hparams), spec_of_tokens(str(batches[0].x.dtype))
    ts, state = algorithm.start_task(ts, algorithm.init(ts, spec), rotated().tasks[0])
    planner, step = algorithm.planner(spec, state), jax.jit(algorithm.train_step)
    for batch in batches:
        ts, state, _ = step(ts, state, batch._replace(plan=planner.next(batch.y, batch.t)))
    return *algorithm.end_task(ts, state, batches), params


@pytest.mark.parametrize("hparams", [NaiveHParams(), EWCHParams(ewc_lambda=0)], ids=["naive", "ewc"])
def test_tokens_in_bfloat16_train_like_a_hand_written_loop(hparams: AlgorithmHParams) -> None:
    ts, state, expected = trained(hparams, jnp.bfloat16, batches_of_tokens())

    @jax.jit
    def step(params: Any, x: Any, y: Any) -> Any:
        def loss(params: Any) -> Any:
            logits = Words().apply({"params": params}, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        return jax.tree.map(lambda p, g: p - jnp.asarray(0.5, p.dtype) * g, params, jax.grad(loss)(params))

    start = np.asarray(expected["table"], np.float32)
    for batch in batches_of_tokens():
        expected = step(expected, batch.x, batch.y)
    for a, b in zip(jax.tree.leaves(ts.params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=0.02, atol=1e-4)
    changed = np.flatnonzero((np.asarray(ts.params["table"], np.float32) != start).any(1))
    np.testing.assert_array_equal(changed, np.sort(TOKENS))
    if hparams.name == "ewc":
        important = np.flatnonzero(np.asarray(state.memory.importance["table"]).any(1))
        np.testing.assert_array_equal(important, np.sort(TOKENS))


def test_a_memory_stores_tokens_exactly() -> None:
    batches = batches_of_tokens()
    ts, state, start = trained(ERHParams(mem_size=2 * BATCH, mem_batch_size=4), jnp.bfloat16, batches)
    assert state.memory.x.dtype == jnp.int32
    stored = {x.tobytes() for x in np.asarray(state.memory.x)}
    assert stored <= {x.tobytes() for batch in batches for x in batch.x}
    changed = np.asarray(ts.params["table"], np.float32) != np.asarray(start["table"], np.float32)
    np.testing.assert_array_equal(np.flatnonzero(changed.any(1)), np.sort(TOKENS))


@pytest.mark.parametrize("dtype", ["int8", "int16", "uint16", "int32", "uint32", "bool"])
def test_integers_and_booleans_are_not_cast(dtype: str) -> None:
    ts = TrainState.create(apply_fn=None, params={"w": jnp.zeros(1, jnp.bfloat16)}, tx=optax.sgd(0.1))
    stream = init_stream(ts, rotated().spec, NaiveHParams())
    x = jnp.asarray(np.array([[1, 0, 99]]), dtype)
    assert normalise(stream, x).dtype == x.dtype
    np.testing.assert_array_equal(normalise(stream, x), x)
    for other in ("uint8", "float32", "bfloat16"):
        assert normalise(stream, jnp.ones((1, 2, 2, 1), other)).dtype == jnp.bfloat16
    assert blank_input(spec_of_tokens(dtype), jnp.bfloat16).dtype == jnp.dtype(dtype)


def test_a_network_of_tokens_is_initialised_with_tokens() -> None:
    class Strict(Words):
        @nn.compact
        def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
            assert x.dtype == jnp.int32
            return Words(jnp.float32)(x)

    variables = initial_variables(Strict(), spec_of_tokens(), 0)
    assert variables["params"]["Words_0"]["table"].shape == (VOCABULARY, WIDTH)


def test_a_coreset_of_another_dtype_than_the_spec_raises() -> None:
    benchmark = stream_for(KCL)
    task = next(iter(KCL.training_tasks(benchmark, 0)))
    algorithm = ALGORITHMS["kcl"](KCL)
    ts, state = initial_states(algorithm, benchmark.spec)
    memory = state.memory.coreset._replace(x=state.memory.coreset.x.astype(jnp.int32))
    state = state._replace(memory=state.memory._replace(coreset=memory))
    with pytest.raises(ValueError, match=r"the coresets hold int32 images, got uint8; give a spec with"):
        algorithm.start_task(ts, state, task)


# -- outputs


class PerPosition(nn.Module):
    """Logits of each of the first B positions, `[B, B, 10]`."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        logits: jax.Array = nn.Dense(10)(x.reshape((len(x), -1, 1))[:, : len(x)])
        return logits


class Pooled(nn.Module):
    """One row of logits for the whole batch, `[1, 10]`."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        logits: jax.Array = nn.Dense(10)(x.reshape((len(x), -1)).mean(0, keepdims=True))
        return logits


class Narrow(nn.Module):
    """A head without the last class of the stream."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        logits: jax.Array = nn.Dense(9)(x.reshape((len(x), -1)))
        return logits


@pytest.mark.parametrize(
    "hparams", [NaiveHParams(), ERHParams(mem_size=8, mem_batch_size=4)], ids=["naive", "er"]
)
@pytest.mark.parametrize(
    ("net", "scenario", "shape"),
    [
        (PerPosition(), "task", [8, 8, 10]),
        (PerPosition(), "domain", [8, 8, 10]),
        (Pooled(), "task", [1, 10]),
        (Pooled(), "class", [1, 10]),
        (Narrow(), "task", [8, 9]),
    ],
)
def test_logits_that_are_not_one_row_for_each_sample_raise(
    net: nn.Module, scenario: Scenario, shape: list[int], hparams: AlgorithmHParams
) -> None:
    benchmark = divided(scenario)
    task, spec, algorithm = benchmark.tasks[0], benchmark.spec, ALGORITHMS[hparams.name](hparams)
    x, y, t = task.train.take(np.arange(BATCH))
    ts, state = algorithm.start_task(*initial_states(algorithm, spec, model=net), task)
    batch = Batch(x, y, t, algorithm.planner(spec, state).next(y, t))
    for call, rows in (
        (lambda: jax.jit(algorithm.train_step)(ts, state, batch), 8 + 4 * (hparams.name == "er")),
        (lambda: algorithm.predict(ts, state, *map(jnp.asarray, (x, t))), 8),
    ):
        logits = [{8: rows}.get(size, size) for size in shape]
        with pytest.raises(ValueError, match=re.escape(f"[B]; got logits {logits} and t [{rows}]; reduce")):
            call()


def test_one_task_index_for_a_whole_batch_raises() -> None:
    ts = TrainState.create(apply_fn=None, params={"w": jnp.zeros(1)}, tx=optax.sgd(0.1))
    stream = init_stream(ts, divided("task").spec, NaiveHParams())
    with pytest.raises(ValueError, match=r"\[B, 10\], for task .* got logits \[4, 10\] and t \[\]; reduce"):
        masked(stream, jnp.zeros((4, 10)), jnp.asarray(0))
