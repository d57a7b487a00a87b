"""Training some of the parameters: in every method the others stay exactly unchanged and cost no memory."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

from sequel_core.algorithms.ewc import EWCHParams
from sequel_core.algorithms.mas import MASHParams
from sequel_core.algorithms.naive import NaiveHParams
from sequel_core.algorithms.si import SIHParams
from sequel_core.hparams import AlgorithmHParams
from sequel_core.stream import plan
from sequel_core.stream.task import Batch
from sequel_flax import ALGORITHMS, Algorithm, FlaxLearner, State, adapted, ewc, make_learner, mas, naive, si
from sequel_flax.algorithms.si import accumulate_path_integral
from sequel_flax.bundle import empty_sum
from sequel_flax.replay import Memory
from tests.flax.parts import (
    EVERY,
    EWC,
    SILENT,
    Layered,
    batches,
    flat,
    rotated,
    settings,
    sgd,
    stream_for,
)

HEAD = {"stem": {"kernel": False, "bias": False}, "head": {"kernel": True, "bias": True}}
SLOW = (
    "joint",
    "stable_sgd",
    "der",
    "derpp",
    "mas",
    "er",
    "er_ace",
    "icarl",
    "kcl",
    "lamaml",
    "mcsgd",
    "naive",
)


def stem_only(path: tuple[str, ...]) -> bool:
    return path[0] == "stem"


def bytes_of_trees(state: State) -> int:
    """Return the bytes of a method's memory without its samples."""
    parts = jax.tree.leaves(state.memory, is_leaf=lambda part: isinstance(part, Memory))
    return sum(part.nbytes for part in parts if not isinstance(part, Memory))


TREES = {
    "ewc": 2,
    "mas": 2,
    "si": 3,
    "lfl": 1,
    "lwf": 1,
    "icarl": 1,
    "bic": 1,
    "gdumb": 2,
    "lamaml": 1,
    "mcsgd": 2,
}
"""Number of trees with the structure of the parameters that a method keeps, if not 0."""


@pytest.mark.parametrize(
    "hparams",
    [pytest.param(h, marks=[pytest.mark.slow] if h.name in SLOW else []) for h in EVERY],
    ids=lambda h: f"{h.name}-{getattr(h, 'lmc_policy', '')}",
)
def test_frozen_parameters_do_not_change_and_cost_no_memory(hparams: AlgorithmHParams) -> None:
    """AdamW decays weights. The head is trained from the second task on; the third task freezes the stem."""
    stream = stream_for(hparams, num_tasks=3)
    make, model = ALGORITHMS[hparams.name], Layered()
    tx = optax.inject_hyperparams(optax.adamw)(learning_rate=0.01, weight_decay=0.1)
    partly = FlaxLearner(make(hparams, trainable=stem_only), model, tx, stream.spec, settings())
    wholly = FlaxLearner(make(hparams), model, tx, stream.spec, settings())
    frozen = [k for k in flat(partly.ts.params) if k.startswith("head")]
    initial = flat(partly.ts.params)
    ts, state = partly.ts, partly.state
    size = {k: v.nbytes for k, v in initial.items()}
    full, part = bytes_of_trees(wholly.state), bytes_of_trees(state)
    trees = (full - part) / sum(size[k] for k in frozen)
    assert trees == int(trees)  # no tree of the method has the frozen parameters
    online = getattr(hparams, "lmc_policy", "") == "online"
    assert trees == TREES.get(hparams.name, 0) + 2 * online
    moments = [leaf.size for leaf in jax.tree.leaves(optax.tree_utils.tree_get(partly.ts.opt_state, "mu"))]
    assert sum(moments) == sum(leaf.size for k, leaf in initial.items() if k not in frozen)

    tx = optax.inject_hyperparams(optax.adamw)(learning_rate=0.01, weight_decay=0.1)
    # A user's loop has no optax.masked.
    ts = TrainState.create(apply_fn=ts.apply_fn, params=ts.params, tx=tx)
    tasks = list(hparams.training_tasks(stream))
    order = [make(hparams, trainable=stem_only), make(hparams), make(hparams, trainable=HEAD)]
    fixed_head = hparams.name in ("kcl", "lfl")  # these methods freeze it from the second task on
    unchanged: list[tuple[str, ...]] = [("head",), ("head",) if fixed_head else (), ("stem",)]
    unchanged[2] += unchanged[1]
    for algorithm, task, names in zip(order, tasks, unchanged, strict=True):
        before, position = flat(ts.params), algorithm.planner(stream.spec, state)
        ts, state = algorithm.start_task(ts, state, task)
        began = flat(ts.params)  # MC-SGD starts from the last w_hat
        step = jax.jit(algorithm.train_step)
        split = algorithm.training_split(state, task.train)
        for x, y, t, _ in list(batches(task, settings(), split))[:4]:
            ts, state, _ = step(ts, state, Batch(x, y, t, position.next(y, t)))
        ts, state = algorithm.end_task(ts, state, batches(task, settings()))
        after = flat(ts.params)
        for k in after.keys() - {"kcl/offset"}:  # always 0
            same = np.array_equal(after[k], before[k]) and np.array_equal(began[k], before[k])
            assert same is k.startswith(names), (task.index, k)
        images = jnp.asarray(task.test.take(np.arange(3)).x)
        assert np.isfinite(np.asarray(algorithm.predict(ts, state, images, jnp.zeros(3, int)))).all()
        jax.tree.map(lambda a: a.block_until_ready(), algorithm.alternatives(ts, state, x, t))
    assert bytes_of_trees(state) == full


def _reference_fisher(ts: TrainState, state: State, batches: list[Batch]) -> dict[str, np.ndarray]:
    """Return the mean squared gradient of the head's parameters, in NumPy."""
    p = {k: v.astype(np.float64) for k, v in flat(ts.params).items()}
    total = {k: np.zeros_like(p[k]) for k in ("head/kernel", "head/bias")}
    count = 0
    for x, y, _, _ in batches:
        scale, shift = (np.asarray(a, np.float64) for a in (state.stream.scale, state.stream.shift))
        inputs = (x * scale + shift).reshape(len(x), -1)
        h = np.tanh(inputs @ p["stem/kernel"] + p["stem/bias"])
        z = h @ p["head/kernel"] + p["head/bias"]
        q = np.exp(z - z.max(1, keepdims=True))
        q /= q.sum(1, keepdims=True)
        q[np.arange(len(y)), y] -= 1
        total["head/bias"] = total["head/bias"] + (q**2).sum(0)
        total["head/kernel"] = total["head/kernel"] + np.einsum("nh,nc->hc", h**2, q**2)
        count += len(y)
    return {k: v / count for k, v in total.items()}


def test_ewc_on_one_layer_equals_numpy() -> None:
    """Two tasks, SGD with weight decay: Fisher, anchor and every step of the penalised second task."""
    with jax.enable_x64(True):
        training, strength = settings(dtype="float64"), 30.0
        tx = optax.chain(optax.add_decayed_weights(0.01), optax.sgd(0.1))
        algorithm = ewc(EWCHParams(ewc_lambda=strength, fisher_samples=None), trainable=HEAD)
        model = FlaxLearner(algorithm, Layered(), tx, rotated(2).spec, training)
        expected = {k: v.copy() for k, v in flat(model.ts.params).items()}
        stem = {k: v for k, v in expected.items() if k.startswith("stem")}
        anchor: dict[str, np.ndarray] = {}
        fisher: dict[str, np.ndarray] = {}
        for task in rotated(2).tasks:
            model.fit_task(task, SILENT)
            for x, y, _, _ in batches(task, training):
                scale, shift = (np.asarray(a) for a in (model.state.stream.scale, model.state.stream.shift))
                h = np.tanh((x * scale + shift).reshape(len(x), -1) @ stem["stem/kernel"] + stem["stem/bias"])
                z = h @ expected["head/kernel"] + expected["head/bias"]
                q = np.exp(z - z.max(1, keepdims=True))
                q /= q.sum(1, keepdims=True)
                q[np.arange(len(y)), y] -= 1
                gradients = {"head/kernel": h.T @ q / len(y), "head/bias": q.mean(0)}
                for k, gradient in gradients.items():
                    penalty = strength * fisher[k] * (expected[k] - anchor[k]) if fisher else 0.0
                    expected[k] = expected[k] - 0.1 * (gradient + penalty + 0.01 * expected[k])
            if not fisher:
                order = plan.consolidation_batches(training.seed, task, training.batch_size)
                fisher = _reference_fisher(model.ts, model.state, [Batch(*samples) for samples in order])
                anchor = {k: expected[k].copy() for k in fisher}
                memory = model.state.memory
                assert memory.anchor["stem"] == memory.importance["stem"] == {"kernel": None, "bias": None}
                for k in fisher:
                    part = k.split("/")[1]
                    np.testing.assert_allclose(memory.importance["head"][part], fisher[k], rtol=1e-10)
                    np.testing.assert_allclose(memory.anchor["head"][part], anchor[k], rtol=1e-10)
        for k, v in flat(model.ts.params).items():
            np.testing.assert_allclose(v, expected[k], rtol=1e-10, atol=1e-13)
            assert (k in stem) is np.array_equal(v, stem.get(k, 0 * v))


def test_importance_and_anchor_of_a_frozen_parameter_are_kept() -> None:
    """In the second task its importance and anchor are unchanged."""
    everything, stem = ewc(EWC), ewc(EWC, trainable=stem_only)
    model = FlaxLearner(everything, Layered(), sgd(), rotated().spec, settings())
    model.fit_task(rotated().tasks[0], SILENT)
    before = model.state.memory
    ts, state = stem.start_task(model.ts, model.state, rotated().tasks[1])
    step = jax.jit(stem.train_step)
    for batch in batches(rotated().tasks[1], settings()):
        ts, state, _ = step(ts, state, batch)
    ts, state = stem.end_task(ts, state, batches(rotated().tasks[1], settings()))
    for old, new in ((before.anchor, state.memory.anchor), (before.importance, state.memory.importance)):
        for leaf in ("kernel", "bias"):
            np.testing.assert_array_equal(old["head"][leaf], new["head"][leaf])
            assert not np.array_equal(old["stem"][leaf], new["stem"][leaf])


def test_a_task_that_trains_more_parameters_must_be_started() -> None:
    model = FlaxLearner(ewc(EWC, trainable=stem_only), Layered(), sgd(), rotated().spec, settings())
    batch = next(iter(batches(rotated().tasks[0], settings())))
    more = ewc(
        EWC, trainable={"stem": {"kernel": True, "bias": True}, "head": {"kernel": False, "bias": True}}
    )
    ts, state = model.algorithm.start_task(model.ts, model.state, rotated().tasks[0])
    with pytest.raises(ValueError, match="the state has no entry for a parameter that is trained now"):
        jax.eval_shape(more.train_step, ts, state, batch)
    ts, state = more.start_task(ts, state, rotated().tasks[1])
    np.testing.assert_array_equal(state.memory.anchor["head"]["bias"], ts.params["head"]["bias"])
    assert state.memory.anchor["head"]["kernel"] is None
    jax.eval_shape(more.train_step, ts, state, batch)


# -- the three types of selection


class Adapter(nnx.Param):  # type: ignore[type-arg]
    """A user-defined type of parameter."""


class NNXNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.stem = nnx.Linear(64, 6, rngs=rngs)
        self.head = nnx.Linear(6, 10, rngs=rngs)
        self.adapter = Adapter(jnp.zeros((6, 10)))

    def __call__(self, x: jax.Array) -> jax.Array:
        h = jnp.tanh(self.stem(x.reshape(len(x), -1)))
        return self.head(h) + h @ self.adapter[...]


@pytest.mark.parametrize(
    ("trainable", "changed"),
    [
        (Adapter, {"adapter"}),
        (nnx.Any(Adapter, nnx.PathContains("head")), {"adapter", "head/kernel", "head/bias"}),
        (lambda path, variable: path == ("head", "bias"), {"head/bias"}),
        (lambda path: path[-1] == "kernel", {"stem/kernel", "head/kernel"}),
        (nnx.Not(Adapter), {"stem/kernel", "stem/bias", "head/kernel", "head/bias"}),
    ],
    ids=["type", "any of filters", "filter function", "paths", "not"],
)
def test_parameters_of_an_nnx_network_by_filter_or_path(trainable: Any, changed: set[str]) -> None:
    model = make_learner(SIHParams(), NNXNet(nnx.Rngs(0)), sgd(), rotated(), settings(), trainable=trainable)
    sizes = {k: v.nbytes for k, v in flat(model.ts.params).items()}
    paths = jax.tree_util.tree_flatten_with_path(model.state.memory.path)[0]
    assert {"/".join(key.key for key in keys) for keys, _ in paths} == changed
    assert model.memory_bytes() == 3 * sum(sizes[k] for k in changed)


def test_a_plain_loop_with_an_nnx_filter() -> None:
    net = adapted(NNXNet(nnx.Rngs(0)))
    params = net.init(jax.random.key(0), np.zeros((1, 8, 8, 1), np.float32))["params"]
    ts = TrainState.create(apply_fn=net.apply, params=params, tx=optax.sgd(0.1))
    algorithm = naive(NaiveHParams(), trainable=Adapter)
    state = algorithm.init(ts, rotated().spec)
    ts, state = algorithm.start_task(ts, state, rotated().tasks[0])
    batch = next(iter(batches(rotated().tasks[0], settings())))
    ts, _, _ = jax.jit(algorithm.train_step)(ts, state, batch)
    after, before = flat(ts.params), flat(params)
    assert {k for k in after if not np.array_equal(after[k], before[k])} == {"adapter"}


@pytest.mark.parametrize(
    ("trainable", "message"),
    [
        (
            lambda path: path[0] == "body",
            r"at least one parameter .* none of head/bias, head/kernel, stem/bias",
        ),
        (jax.tree.map(lambda on: False, HEAD), r"at least one parameter of the network, got \{'head'"),
        ({"head": True}, "must have the structure of the parameters, got one that has head;"),
        ({**HEAD, "body": {"bias": True}}, "got one that has body/bias; the parameters are head/bias"),
        ({"head": HEAD["head"]}, "got one that lacks stem/bias"),
        ({**HEAD, "head": {"kernel": 1, "bias": True}}, "must hold bools, got 1 for head/kernel"),
        (Adapter, "must select at least one parameter"),
        (0.5, "trainable must be a predicate over paths, a tree of bools or an NNX filter, got 0.5"),
    ],
    ids=["no path", "nothing", "prefix", "unknown", "lacking", "numbers", "no variable", "float"],
)
def test_a_selection_that_does_not_fit_raises(trainable: Any, message: str) -> None:
    for algorithm in (naive(NaiveHParams(), trainable=trainable), ewc(EWC, trainable=trainable)):
        with pytest.raises(ValueError, match=message):
            FlaxLearner(algorithm, Layered(), sgd(), rotated().spec, settings())


# -- sums in low precision


@pytest.mark.parametrize(
    "algorithm",
    [
        ewc(EWCHParams(fisher_samples=None)),
        pytest.param(mas(MASHParams(mas_samples=None)), marks=pytest.mark.slow),
        pytest.param(mas(MASHParams(mas_samples=None, gradients="batch")), marks=pytest.mark.slow),
    ],
    ids=["ewc", "mas", "mas-batch"],
)
def test_importances_of_bfloat16_weights_are_summed_in_float32(algorithm: Algorithm) -> None:
    """Compared with float64 at the same weights. A Fisher summed in bfloat16 loses a quarter of its mass."""
    task = rotated(2, subset=400).tasks[0]
    last = [Batch(*task.train.take(np.arange(k, k + 100))) for k in range(0, 400, 100)]

    def importance(dtype: Any) -> dict[str, np.ndarray]:
        params = jax.tree.map(lambda p: jnp.asarray(jnp.asarray(p, jnp.bfloat16), dtype), initial)
        ts = TrainState.create(apply_fn=Layered(width=6).apply, params=params, tx=optax.sgd(1e-3))
        ts, state = algorithm.start_task(ts, algorithm.init(ts, rotated(2).spec), task)
        _, state = algorithm.end_task(ts, state, last)
        assert {leaf.dtype for leaf in jax.tree.leaves(state.memory.anchor)} == {jnp.dtype(dtype)}
        return flat(state.memory.importance)

    with jax.enable_x64(True):
        initial = Layered(width=6).init(jax.random.key(0), np.zeros((1, 8, 8, 1)))["params"]
        low, exact = importance(jnp.bfloat16), importance(jnp.float64)
    for name, value in low.items():
        assert value.dtype == np.float32
        assert abs(value.sum() / exact[name].sum() - 1) < 0.02, name


def test_the_path_integral_of_bfloat16_weights_is_summed_in_float32() -> None:
    """Many small steps, compared with the same products summed in float64."""
    rng = np.random.default_rng(0)
    path, exact = empty_sum(jnp.zeros(50, jnp.bfloat16)), np.zeros(50)
    before = jnp.asarray(rng.normal(size=50), jnp.bfloat16)
    for _ in range(300):
        gradient = jnp.asarray(rng.uniform(0.5, 1, 50), jnp.bfloat16)
        after = jnp.asarray(before - jnp.asarray(0.02, jnp.bfloat16), jnp.bfloat16)
        path = accumulate_path_integral(path, gradient, before, after)
        exact -= np.float64(gradient) * (np.float64(after) - np.float64(before))
        before = after
    assert path.dtype == jnp.float32
    np.testing.assert_allclose(path, exact, rtol=1e-5)
    state = si(SIHParams()).init(
        TrainState.create(apply_fn=Layered().apply, params=_bf16_params(), tx=optax.sgd(0.1)), rotated(2).spec
    )
    for tree in (state.memory.path, state.memory.importance):
        assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype(jnp.float32)}


def _bf16_params() -> Any:
    params = Layered().init(jax.random.key(0), np.zeros((1, 8, 8, 1), np.float32))["params"]
    return jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
