"""Penalties in an optax chain and a reservoir, in a user's own loops, against the bundles and by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

from sequel_benchmarks import RotatedDigits
from sequel_core.algorithms.er import ERHParams
from sequel_core.algorithms.ewc import EWCHParams
from sequel_core.algorithms.mas import MASHParams
from sequel_core.algorithms.si import SIHParams
from sequel_core.stream.task import Batch, Task
from sequel_flax import Algorithm, adapted, er, ewc, mas, reservoir
from sequel_flax import si as si_bundle
from sequel_flax.transforms import (
    PenaltyState,
    consolidate,
    diagonal_fisher,
    ewc_penalty,
    l2_init_penalty,
    mas_penalty,
    output_sensitivity,
    si,
)
from tests.quick import some

W: Any = {"w": np.ones(2)}
V: Any = {"v": np.ones(3), "w": np.ones(2)}
KEY = jax.random.key(0)
DIGITS = RotatedDigits(num_tasks=3)
NORM = DIGITS.normalisation
BATCH, STEPS = 7, 200


@pytest.fixture(autouse=True)
def _double_precision() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


class Net(nnx.Module):
    """A network with one hidden layer."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.stem = nnx.Linear(64, 16, rngs=rngs, param_dtype=jnp.float64)
        self.head = nnx.Linear(16, 10, rngs=rngs, param_dtype=jnp.float64)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.asarray(self.head(jnp.tanh(self.stem(x.reshape(len(x), -1)))))


def batches(task: Task, steps: int = STEPS) -> Iterator[Batch]:
    for step in range(steps):
        yield Batch(*task.train.take(np.arange(step * BATCH, (step + 1) * BATCH)))


def pixels(x: Any) -> jax.Array:
    return jnp.asarray(x, jnp.float64) * float(NORM.scale[0]) + float(NORM.shift[0])


def losses(logits: jax.Array, y: Any) -> jax.Array:
    return jnp.asarray(optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(y)))


def bundle_weights(algorithm: Algorithm, tx: optax.GradientTransformation) -> list[jax.Array]:
    """Train by a bundle; return the weights in the order of the layers' names."""
    model = adapted(Net(nnx.Rngs(0)))
    variables = model.init(None, jnp.zeros((1, 8, 8, 1)))
    ts = TrainState.create(apply_fn=model.apply, params=variables["params"], tx=tx)
    state, step = algorithm.init(ts, DIGITS.spec), jax.jit(algorithm.train_step)
    for task in DIGITS.tasks:
        ts, state = algorithm.start_task(ts, state, task)
        for batch in batches(task):
            ts, state, _ = step(ts, state, batch)
        ts, state = algorithm.end_task(ts, state, batches(task))
    return jax.tree.leaves(ts.params)


Importance = Callable[[Any, Any, Task], Any]


def nll_of(graph: Any) -> Callable[[Any, Any], jax.Array]:
    return lambda params, batch: losses(nnx.merge(graph, params)(pixels(batch.x)), batch.y)


def fisher(graph: Any, params: Any, task: Task) -> Any:
    return diagonal_fisher(nll_of(graph), params, batches(task), samples=101)


def sensitivity(graph: Any, params: Any, task: Task) -> Any:
    return output_sensitivity(
        lambda params, batch: nnx.merge(graph, params)(pixels(batch.x)), params, batches(task), samples=101
    )


def nnx_weights(
    tx: optax.GradientTransformation,
    importance: Importance | None,
    steps: int = STEPS,
    penalised: bool = True,
) -> list[jax.Array]:
    """Train the same network in a loop with nnx.Optimizer."""
    net = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(net, tx, wrt=nnx.Param)

    @nnx.jit
    def step(net: Net, optimizer: nnx.Optimizer[Net], x: jax.Array, y: jax.Array) -> None:
        gradient = nnx.grad(lambda net: losses(net(pixels(x)), y).mean())(net)
        optimizer.update(net, gradient)

    for task in DIGITS.tasks:
        for batch in batches(task, steps):
            step(net, optimizer, jnp.asarray(batch.x), jnp.asarray(batch.y))
        graph, params = nnx.split(net)
        importances = None if importance is None else importance(graph, params, task)
        if penalised:
            optimizer.opt_state = consolidate(optimizer.opt_state, params, importances)
    return jax.tree.leaves(nnx.state(net, nnx.Param))


def usual() -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(2e-3, weight_decay=0.01))


def in_pairs(tx: optax.GradientTransformation) -> Any:
    return optax.MultiSteps(tx, 2, accumulator_dtype=jnp.float64)


SEPARATE = EWCHParams(ewc_lambda=20, fisher_samples=101, reset_optimizer=False)
ONLINE = EWCHParams(
    ewc_lambda=20, fisher_samples=101, accumulation="online", gamma=0.7, reset_optimizer=False
)
MakeTx = Callable[[], Any]
CASES: dict[str, tuple[Algorithm, MakeTx, MakeTx, Importance | None]] = {
    "ewc": (ewc(SEPARATE), usual, lambda: optax.chain(ewc_penalty(20.0), usual()), fisher),
    "online ewc": (
        ewc(ONLINE),
        lambda: optax.sgd(0.05),
        lambda: optax.chain(ewc_penalty(20.0, "online", 0.7), optax.sgd(0.05)),
        fisher,
    ),
    "ewc within MultiSteps": (
        ewc(SEPARATE),
        lambda: in_pairs(usual()),
        lambda: in_pairs(optax.chain(ewc_penalty(20.0), usual())),
        fisher,
    ),
    "mas": (
        mas(MASHParams(mas_lambda=0.05, mas_samples=101, reset_optimizer=False)),
        usual,
        lambda: optax.chain(mas_penalty(0.05), usual()),
        sensitivity,
    ),
    "si": (
        si_bundle(SIHParams(si_lambda=0.5, xi=0.01, clamp=True, reset_optimizer=False)),
        usual,
        lambda: si(usual(), 0.5, xi=0.01, clamp=True),
        None,
    ),
}


@pytest.mark.parametrize("case", some(CASES, ["ewc within MultiSteps", "si"]))
def test_a_loop_with_nnx_ends_like_the_bundle(case: str) -> None:
    algorithm, tx, with_penalty, importance = CASES[case]
    expected = bundle_weights(algorithm, tx())
    actual = nnx_weights(with_penalty(), importance)
    for a, e in zip(actual, expected, strict=True):
        assert np.linalg.norm(a - e) < 1e-10 * np.linalg.norm(e)


def test_er_with_a_reservoir_ends_like_the_bundle() -> None:
    """The bundle gets the decisions of the reservoir as its plan."""
    hparams = ERHParams(mem_size=50, mem_batch_size=9)
    algorithm, model, tx = er(hparams), adapted(Net(nnx.Rngs(0))), optax.sgd(0.05)
    variables = model.init(None, jnp.zeros((1, 8, 8, 1)))
    ts = TrainState.create(apply_fn=model.apply, params=variables["params"], tx=tx)
    state, bundle_step = algorithm.init(ts, DIGITS.spec), jax.jit(algorithm.train_step)
    planner = algorithm.planner(DIGITS.spec, state)
    net = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(net, tx, wrt=nnx.Param)

    @nnx.jit
    def step(net: Net, optimizer: nnx.Optimizer[Net], batch: Any, replayed: Any, valid: jax.Array) -> None:
        def loss(net: Net) -> jax.Array:
            both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), batch, replayed)
            counts = jnp.concatenate([jnp.ones(BATCH), valid])
            return (losses(net(pixels(both["x"])), both["y"]) * counts).sum() / counts.sum()

        optimizer.update(net, nnx.grad(loss)(net))

    memory, key, seen = None, jax.random.key(4), 0
    for task in DIGITS.tasks:
        ts, state = algorithm.start_task(ts, state, task)
        for planned in batches(task):
            names = np.arange(seen, seen + BATCH)
            batch = {"x": jnp.asarray(planned.x), "y": jnp.asarray(planned.y), "name": jnp.asarray(names)}
            memory = reservoir.init(batch, 50) if memory is None else memory
            key, writing, reading = jax.random.split(key, 3)
            before = np.asarray(memory.items["name"][: min(seen, 50)]).tolist()
            replayed, valid = reservoir.sample(memory, reading, 9)
            step(net, optimizer, batch, replayed, valid)
            memory = reservoir.add(memory, batch, writing)
            seen += BATCH
            after = np.asarray(memory.items["name"]).tolist()
            write = [after.index(name) if name in after[: min(seen, 50)] else 50 for name in names]
            drawn = [before.index(name) for name in np.asarray(replayed["name"])[np.asarray(valid)]]
            reads = np.full((1, 9), 50, np.int32)
            reads[0, : len(drawn)] = sorted(drawn)
            plan = planner.next(planned.y, planned.t)._replace(write=np.array(write, np.int32), reads=reads)
            ts, state, _ = bundle_step(ts, state, planned._replace(plan=plan))
        ts, state = algorithm.end_task(ts, state, [])
    assert memory is not None
    np.testing.assert_array_equal(state.memory.y, memory.items["y"])
    for a, e in zip(jax.tree.leaves(nnx.state(net, nnx.Param)), jax.tree.leaves(ts.params), strict=True):
        assert np.linalg.norm(a - e) < 1e-10 * np.linalg.norm(e)


# -- states within other transformations


def test_only_a_part_of_the_parameters_has_a_penalty() -> None:
    params = {"stem": jnp.array([1.0, 2.0]), "head": jnp.array([3.0])}
    tx = optax.multi_transform(
        {"kept": optax.chain(ewc_penalty(10.0), optax.sgd(0.1)), "free": optax.sgd(0.1)},
        {"stem": "kept", "head": "free"},
    )
    importance = {"stem": jnp.array([0.0, 2.0]), "head": jnp.array([5.0])}
    opt_state = consolidate(tx.init(params), params, importance)
    later = jax.tree.map(lambda p: p + 1, params)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), opt_state, later)
    np.testing.assert_allclose(updates["stem"], [-0.1, -0.1 * (1 + 10 * 2)])
    np.testing.assert_allclose(updates["head"], [-0.1])


WRT: dict[str, Any] = {
    "predicate": lambda path: path[0] == "stem",
    "tree": {"stem": {"kernel": True, "bias": True}, "head": {"kernel": False, "bias": False}},
    "filter": nnx.PathContains("stem"),
}
PENALTIES: dict[str, tuple[Callable[..., Any], Importance | None]] = {
    "ewc": (lambda wrt: optax.chain(ewc_penalty(20.0, wrt=wrt), optax.sgd(0.05)), fisher),
    "mas": (lambda wrt: optax.chain(mas_penalty(0.05, wrt=wrt), optax.sgd(0.05)), sensitivity),
    "l2": (lambda wrt: optax.chain(l2_init_penalty(0.5, wrt=wrt), optax.sgd(0.05)), None),
    "si": (lambda wrt: si(optax.sgd(0.05), 0.5, xi=0.01, wrt=wrt), None),
}


def labelled(params: Any) -> Any:
    labels = ["free", "free", "kept", "kept"]  # head and stem, in the order of the parameters
    return jax.tree.unflatten(jax.tree.structure(params), labels)


def numbers(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree) if leaf.ndim)


@pytest.mark.parametrize(("penalty", "selection"), list(zip(PENALTIES, [*WRT, "predicate"], strict=True)))
def test_wrt_is_the_penalty_of_the_selected_parameters(penalty: str, selection: str) -> None:
    """The same as `multi_transform`, in loops with nnx.Optimizer; the others have no state."""
    make, importance = PENALTIES[penalty]
    state = make(WRT[selection]).init(nnx.state(Net(nnx.Rngs(0)), nnx.Param))
    assert numbers(state) == {"ewc": 2, "mas": 2, "l2": 1, "si": 3}[penalty] * (64 * 16 + 16)
    by_label = optax.multi_transform({"kept": make(None), "free": optax.sgd(0.05)}, labelled)
    actual, expected, without = (
        nnx_weights(make(WRT[selection]), importance, steps=6),
        nnx_weights(by_label, importance, steps=6),
        nnx_weights(optax.sgd(0.05), None, steps=6, penalised=False),
    )
    for a, e, w in zip(actual, expected, without, strict=True):
        np.testing.assert_array_equal(a, e)
        assert not np.array_equal(a, w)


@pytest.mark.parametrize("selection", WRT)
def test_importances_of_the_selected_parameters_only(selection: str) -> None:
    graph, params = nnx.split(Net(nnx.Rngs(0)))
    whole = diagonal_fisher(nll_of(graph), params, batches(DIGITS.tasks[0]), 8)
    part = diagonal_fisher(nll_of(graph), params, batches(DIGITS.tasks[0]), 8, wrt=WRT[selection])
    assert numbers(part) == 64 * 16 + 16
    for leaf in ("kernel", "bias"):
        np.testing.assert_array_equal(part["stem"][leaf][...], whole["stem"][leaf][...])
    tx = ewc_penalty(1.0, wrt=WRT[selection])
    for importance in (whole, part):
        state = consolidate(tx.init(params), params, importance)
        np.testing.assert_array_equal(state.importance["stem"]["bias"][...], whole["stem"]["bias"][...])
    with pytest.raises(ValueError, match="give diagonal_fisher the wrt of the penalty"):
        consolidate(ewc_penalty(1.0).init(params), params, part)


@pytest.mark.parametrize(
    ("wrt", "message"),
    [
        (lambda path: path[0] == "body", "wrt must select at least one parameter .* none of head/bias"),
        ({"head": True}, "a tree given as wrt must have the structure of the parameters, got one that "),
        (0.5, "wrt must be a predicate over paths, a tree of bools or an NNX filter, got 0.5"),
    ],
    ids=["nothing", "tree", "number"],
)
def test_a_wrt_that_does_not_fit(wrt: Any, message: str) -> None:
    for params in (nnx.state(Net(nnx.Rngs(0)), nnx.Param), {"head": {"kernel": W["w"], "bias": W["w"]}}):
        with pytest.raises(ValueError, match=message):
            ewc_penalty(1.0, wrt=wrt).init(params)


def injected() -> Any:
    make = optax.inject_hyperparams(ewc_penalty, static_args=("accumulation", "gamma", "wrt"))
    return make(strength=10.0, wrt=lambda path: True)


def everything(value: Any) -> Callable[[Any], Any]:
    return lambda params: jax.tree.map(lambda _: value, params)


AROUND: dict[str, Callable[[], Any]] = {
    "chain": lambda: optax.chain(optax.chain(optax.identity(), ewc_penalty(10.0)), optax.sgd(1.0)),
    "multi_transform": lambda: optax.multi_transform(
        {"all": optax.chain(ewc_penalty(10.0), optax.sgd(1.0))}, everything("all")
    ),
    "MultiSteps": lambda: optax.MultiSteps(optax.chain(ewc_penalty(10.0), optax.sgd(1.0)), 1),
    "inject_hyperparams": lambda: optax.chain(injected(), optax.sgd(1.0)),
    "masked": lambda: optax.chain(optax.masked(ewc_penalty(10.0), everything(True)), optax.sgd(1.0)),
    "all of them": lambda: optax.MultiSteps(
        optax.multi_transform(
            {"all": optax.chain(optax.chain(injected()), optax.sgd(1.0))}, everything("all")
        ),
        1,
    ),
}


@pytest.mark.parametrize("around", AROUND)
def test_consolidate_finds_the_state_within_other_transformations(around: str) -> None:
    """A step whose gradient is 0 moves by -10 * importance * distance; of a dict and of an NNX module."""
    importance = {"w": jnp.array([0.5, 0.0, 2.0])}
    params = {"w": jnp.array([1.0, 2.0, 3.0])}
    tx = AROUND[around]()
    state = tx.init(params)
    after = consolidate(state, params, importance)
    structure: Any = jax.tree.structure
    assert structure(after) == structure(state)
    updates, _ = tx.update({"w": jnp.zeros(3)}, after, {"w": jnp.array([2.0, 4.0, 3.5])})
    np.testing.assert_allclose(updates["w"], [-5, 0, -10])

    net: Any = Vector(params["w"])
    optimizer: Any = nnx.Optimizer(net, AROUND[around](), wrt=nnx.Param)
    given = jax.tree.map(lambda _: importance["w"], nnx.state(net, nnx.Param))
    optimizer.opt_state = consolidate(optimizer.opt_state, nnx.state(net, nnx.Param), given)
    net.w[...] = jnp.array([2.0, 4.0, 3.5])
    optimizer.update(net, jax.tree.map(jnp.zeros_like, nnx.state(net, nnx.Param)))
    np.testing.assert_allclose(net.w[...], [-3, 4, -6.5])


class Vector(nnx.Module):
    """One parameter."""

    def __init__(self, w: jax.Array) -> None:
        self.w = nnx.Param(w)


def test_l2_towards_the_initial_weights_equals_numpy() -> None:
    """Two hundred steps of SGD with momentum on a linear regression."""
    rng = np.random.default_rng(0)
    x, y, w0 = rng.normal(size=(200, 5, 4)), rng.normal(size=(200, 5)), rng.normal(size=4)
    tx = optax.chain(l2_init_penalty(0.3), optax.sgd(0.05, momentum=0.9))

    def loss(params: Any, inputs: jax.Array, targets: jax.Array) -> jax.Array:
        return jnp.mean((inputs @ params["w"] - targets) ** 2) / 2

    @jax.jit
    def step(params: Any, state: Any, inputs: jax.Array, targets: jax.Array) -> Any:
        updates, state = tx.update(jax.grad(loss)(params, inputs, targets), state, params)
        return optax.apply_updates(params, updates), state

    params: Any = {"w": jnp.asarray(w0)}
    state, w, trace = tx.init(params), w0.copy(), np.zeros(4)
    for inputs, targets in zip(x, y, strict=True):
        params, state = step(params, state, inputs, targets)
        trace = 0.9 * trace + inputs.T @ (inputs @ w - targets) / 5 + 0.3 * (w - w0)
        w = w - 0.05 * trace
    np.testing.assert_allclose(params["w"], w, rtol=1e-10)
    assert np.linalg.norm(w - w0) > 0.1


def test_the_strength_may_change_between_steps() -> None:
    params = {"w": jnp.array([1.0])}
    tx = optax.inject_hyperparams(ewc_penalty, static_args=("accumulation", "gamma"))(strength=10.0)
    opt_state = consolidate(tx.init(params), params, {"w": jnp.array([1.0])})
    later, zero = {"w": jnp.array([2.0])}, {"w": jnp.zeros(1)}
    assert tx.update(zero, opt_state, later)[0]["w"] == 10
    opt_state.hyperparams["strength"] = jnp.asarray(3.0)
    assert tx.update(zero, opt_state, later)[0]["w"] == 3


def test_two_tasks_by_hand() -> None:
    """F/2 (theta - a)^2 + G/2 (theta - b)^2 has the gradient (F + G) theta - F a - G b."""
    params, tx = {"w": jnp.array([1.0, 4.0])}, ewc_penalty(2.0)
    state = consolidate(tx.init(params), params, {"w": jnp.array([0.5, 0.0])})
    later = {"w": jnp.array([3.0, 5.0])}
    state = consolidate(state, later, {"w": jnp.array([1.5, 0.0])})
    at = {"w": jnp.array([2.0, 7.0])}
    gradient, _ = tx.update({"w": jnp.zeros(2)}, state, at)
    np.testing.assert_allclose(gradient["w"], [2 * (2.0 * 2 - 0.5 * 1 - 1.5 * 3), 0])
    assert isinstance(state, PenaltyState)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ewc_penalty(-1.0), r"strength must be >= 0, got -1\.0"),
        (lambda: ewc_penalty(1.0, "online", 2.0), r"gamma must be in \[0, 1\], got 2\.0"),
        (lambda: ewc_penalty(1.0, gamma=0.5), "gamma is only used with accumulation=online"),
        (lambda: ewc_penalty(1.0, "sum"), "accumulation must be separate or online, got 'sum'"),  # type: ignore[arg-type]
        (lambda: si(optax.sgd(0.1), 1.0, xi=0.0), r"xi must be > 0, got 0\.0"),
        (lambda: mas_penalty(-0.1), "strength must be >= 0"),
        (lambda: l2_init_penalty(-0.1), "strength must be >= 0"),
        (lambda: consolidate(optax.sgd(0.1).init(W), W, W), "opt_state has no state of ewc_penalty"),
        (lambda: consolidate(ewc_penalty(1.0).init(W), W), "importance must be given for ewc_penalty"),
        (lambda: consolidate(si(optax.sgd(0.1), 1.0).init(W), W, W), "importance must be left out for si"),
        (lambda: consolidate(ewc_penalty(1.0).init(W), V, V), "must have the structure of the parameters"),
        (lambda: ewc_penalty(1.0).update(W, ewc_penalty(1.0).init(W)), "the penalty needs the parameters"),
        (lambda: diagonal_fisher(lambda p, b: b, W, []), "batches must hold at least one sample"),
        (lambda: diagonal_fisher(lambda p, b: b, W, [jnp.ones(2)], 0), "samples must be >= 1 or None, got 0"),
        (lambda: reservoir.init(jnp.ones(3), 0), "size must be >= 1, got 0"),
        (lambda: reservoir.sample(reservoir.init(jnp.ones(3), 4), KEY, 5), "count must be from 1 to the 4"),
    ],
)
def test_bad_arguments(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# -- the reservoir


def test_the_reservoir_is_algorithm_r() -> None:
    memory, expected, seen = reservoir.init(jnp.zeros(9, jnp.int32), 5), [0] * 5, 0
    for step in range(20):
        key = jax.random.key(step)
        memory = reservoir.add(memory, jnp.arange(seen, seen + 9), key)
        for u in np.asarray(jax.random.uniform(key, (9,))):
            slot = seen if seen < 5 else int(np.floor(u * (seen + 1)))
            if slot < 5:
                expected[slot] = seen
            seen += 1
    assert memory.items.tolist() == expected
    assert int(memory.seen) == seen == 180


def test_every_sample_is_kept_and_drawn_equally_often() -> None:
    def kept_and_drawn(key: jax.Array) -> Any:
        first, second, third = jax.random.split(key, 3)
        memory = reservoir.add(reservoir.init(jnp.zeros(6, jnp.int32), 4), jnp.arange(6), first)
        memory = reservoir.add(memory, jnp.arange(6, 12), second)
        drawn, valid = reservoir.sample(memory, third, 3)
        return jnp.bincount(memory.items, length=12), jnp.bincount(drawn, length=12), valid

    runs = 4000
    kept, drawn, valid = jax.jit(jax.vmap(kept_and_drawn))(jax.random.split(jax.random.key(1), runs))
    assert valid.all()
    assert kept.max() == drawn.max() == 1  # without replacement
    for counts, p in ((kept.sum(0), 4 / 12), (drawn.sum(0), 3 / 12)):
        deviation = np.sqrt(runs * p * (1 - p))
        assert np.abs(np.asarray(counts) - runs * p).max() < 4 * deviation


def test_an_empty_reservoir_gives_no_valid_sample() -> None:
    _, valid = reservoir.sample(reservoir.init({"x": jnp.ones((2, 3))}, 4), KEY, 4)
    assert not valid.any()
