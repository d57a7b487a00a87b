"""User-defined networks: linen modules with any name for the mode, NNX modules, and row masks."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState

from sequel_core.algorithms.er import ERHParams
from sequel_core.algorithms.lfl import LFLHParams
from sequel_core.algorithms.naive import NaiveHParams
from sequel_core.hparams import AlgorithmHParams
from sequel_core.stream.arrays import FloatArray
from sequel_core.stream.task import Batch
from sequel_flax import ALGORITHMS, BatchStatsTrainState, FlaxLearner, initial_params
from sequel_flax.backbones import MLP, BatchNorm
from sequel_flax.foreign import adapted, with_row_mask, write_back
from tests.flax.parts import ICARL, SILENT, divided, flat, learner, same

WITH_STATISTICS: Any = BatchStatsTrainState
KEY = jax.random.PRNGKey(5)  # a raw uint32 key, as the training step passes it
# ER's memory is not full in the first steps, so its mask is not all True.
naive_and_er = pytest.mark.parametrize(
    "hparams",
    [pytest.param(NaiveHParams(), marks=pytest.mark.slow), ERHParams(mem_size=20, mem_batch_size=6)],
    ids=["naive", "er"],
)


class Body(nn.Module):
    """A user's network with batch normalisation and dropout; `Body()(x, train)`."""

    dropout: float = 0.5

    def setup(self) -> None:
        self.conv = nn.Conv(3, (3, 3), strides=4)
        self.norm = nn.BatchNorm(momentum=0.9)
        self.drop = nn.Dropout(self.dropout)
        self.head = nn.Dense(10)

    def features(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.relu(self.norm(self.conv(x), use_running_average=not train))
        dropped: jax.Array = self.drop(x.reshape((len(x), -1)), deterministic=not train)
        return dropped

    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        logits: jax.Array = self.head(self.features(x, train))
        return logits


class Train(nn.Module):
    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        return Body(name="body")(images, train)


class Deterministic(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, scale: float = 1.0, deterministic: bool | None = None) -> jax.Array:
        assert deterministic is not None
        return Body(name="body")(scale * x, not deterministic)


class Halves(nn.Module):
    """Applies dropout with rate 0.5; the subclasses name the mode differently."""

    @nn.compact
    def half(self, x: jax.Array, train: bool) -> jax.Array:
        dropped: jax.Array = nn.Dropout(0.5)(x, deterministic=not train)
        return dropped


class Training(Halves):
    def __call__(self, images: jax.Array, training: bool = True) -> jax.Array:
        return self.half(images, training)


class IsTraining(Halves):
    def __call__(self, x: jax.Array, *, is_training: bool) -> jax.Array:
        return self.half(x, is_training)


class Inverse(Halves):
    def __call__(self, x: jax.Array, scale: float = 1.0, deterministic: bool | None = None) -> jax.Array:
        return self.half(scale * x, deterministic is False)


class Average(Halves):
    def __call__(self, x: jax.Array, use_running_average: bool) -> jax.Array:
        return self.half(x, not use_running_average)


class Both(Halves):
    def __call__(self, x: jax.Array, deterministic: bool, train: bool) -> jax.Array:
        assert train != deterministic
        return self.half(x, train)


class NNXBody(nnx.Module):
    """The same network in NNX, with a list of layers and a constant array."""

    def __init__(self, dropout: float = 0.5, seed: int = 0) -> None:
        rngs = nnx.Rngs(seed)
        self.layers = nnx.List([nnx.Conv(1, 3, (3, 3), strides=4, rngs=rngs)])
        self.norm = nnx.BatchNorm(3, momentum=0.9, rngs=rngs)
        self.drop = nnx.Dropout(dropout, rngs=rngs)
        self.head = nnx.Linear(12, 10, rngs=rngs)
        self.one = jnp.ones(())

    def features(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = layer(x)
        x = nnx.relu(self.norm(x * self.one))
        return self.drop(x.reshape((len(x), -1)))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(self.features(x))


@cache
def images(n: int = 6) -> jax.Array:
    return jnp.asarray(np.random.default_rng(2).normal(size=(n, 8, 8, 1)), jnp.float32)


def assert_close(actual: Any, expected: Any, tolerance: float = 1e-6) -> None:
    """Compare two trees of the same structure."""
    structures: list[Any] = [jax.tree.structure(tree) for tree in (actual, expected)]
    assert structures[0] == structures[1]
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def fitted(model: Any, hparams: AlgorithmHParams, tasks: int = 2) -> FlaxLearner:
    benchmark = divided("class")
    trained = learner(hparams, benchmark, model=model)
    for task in benchmark.tasks[:tasks]:
        trained.fit_task(task, SILENT)
    return trained


def with_linen_names(weights: dict[str, FloatArray]) -> dict[str, FloatArray]:
    return {path.replace("layers/0", "conv"): value for path, value in weights.items()}


def nnx_twin(linen: nn.Module, **options: Any) -> NNXBody:
    """Return the NNX network with the initial weights of the linen network in a learner."""
    params = learner(NaiveHParams(), divided("class"), model=linen).weights()
    model = NNXBody(**options)
    for path, value in params.items():
        layer, name = path.split("/")
        owner = model.layers[0] if layer == "conv" else getattr(model, layer)
        getattr(owner, name)[...] = jnp.asarray(value)
    return model


# -- linen


def test_a_module_with_the_argument_train_is_not_wrapped() -> None:
    for model in (MLP(), Train(), Body()):
        assert adapted(model) is model
    wrapped = adapted(Training())
    assert adapted(wrapped) is wrapped
    assert repr(wrapped) == repr(Training())


@pytest.mark.parametrize("module", [Training, IsTraining, Inverse, Average, Both])
def test_every_name_of_the_mode_is_supported(module: Any) -> None:
    model, x = adapted(module()), np.ones((6, 40), np.float32)
    variables = model.init(KEY, x, train=False)
    np.testing.assert_array_equal(model.apply(variables, x, train=False), x)
    dropped, updates = model.apply(variables, x, train=True, rngs={"dropout": KEY}, mutable=["batch_stats"])
    assert set(np.unique(dropped)) == {0.0, 2.0}
    assert updates == {}


@pytest.mark.slow
@naive_and_er
def test_the_name_of_the_mode_does_not_change_the_weights(hparams: AlgorithmHParams) -> None:
    train, deterministic = (fitted(model, hparams, tasks=1).weights() for model in (Train(), Deterministic()))
    assert same(deterministic, train)


def test_a_module_without_a_mode_is_called_with_its_inputs_only() -> None:
    model = adapted(nn.Sequential([lambda x: x.reshape((len(x), -1)), nn.Dense(10)]))
    variables = jax.jit(model.init)(jax.random.key(0), images())
    kernel, bias = (np.asarray(variables["params"]["layers_1"][name]) for name in ("kernel", "bias"))
    expected = np.asarray(images()).reshape(6, -1) @ kernel + bias
    for train in (False, True):
        assert_close(model.apply(variables, images(), train=train), expected, 1e-5)


def test_features_may_lack_the_mode_that_the_call_has() -> None:
    class Mixed(nn.Module):
        def setup(self) -> None:
            self.stem, self.head = nn.Dense(4), nn.Dense(10)

        def features(self, x: jax.Array) -> jax.Array:
            stem: jax.Array = self.stem(x.reshape((len(x), -1)))
            return nn.tanh(stem)

        def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
            logits: jax.Array = self.head(self.features(x))
            return logits

    model = adapted(Mixed())
    variables = jax.jit(model.init)(jax.random.key(0), images())
    stem = jax.device_get(variables["params"]["stem"])
    expected = np.tanh(np.asarray(images()).reshape(6, -1) @ stem["kernel"] + stem["bias"])
    assert_close(model.apply(variables, images(), train=False, method="features"), expected, 1e-5)


class Needy(nn.Module):
    def __call__(self, x: jax.Array, labels: jax.Array, train: bool = False) -> jax.Array:
        return x


class NNXNeedy(nnx.Module):
    def __call__(self, x: jax.Array, carry: jax.Array) -> jax.Array:
        return x


class NoImages(nn.Module):
    def __call__(self, *, train: bool = False) -> jax.Array:
        return jnp.zeros((1, 10))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Needy(), r"Needy\.__call__ must accept .* missing a required argument: 'labels'; give other"),
        (NNXNeedy(), "use_running_average, t, rngs; got .* missing a required argument: 'carry'"),
        (NoImages(), r"must accept the inputs as its first argument.* got \(\*, train: "),
        (Body, "must be an instance of a linen or an NNX module with a __call__, got the class Body"),
        (NNXBody, "got the class NNXBody"),
        (nn.Module(), r"with a __call__, got a Module"),
        (nnx.Module(), r"with a __call__, got a Module"),
        (len, "got a builtin_function_or_method"),
    ],
    ids=["linen", "nnx", "no images", "class", "nnx class", "no call", "no nnx call", "function"],
)
def test_a_model_that_cannot_be_called_raises(model: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        learner(NaiveHParams(), model=model)


# -- NNX


def test_an_adapted_nnx_module_has_the_outputs_of_the_module_in_evaluation() -> None:
    module: Any = NNXBody()
    module.norm.mean[...] = jnp.asarray([0.1, -0.2, 0.3])
    model = adapted(module)
    variables = model.init(KEY, images(), train=False)
    assert set(flat(variables["params"])) == {
        *("layers/0/kernel", "layers/0/bias", "norm/scale", "norm/bias", "head/kernel", "head/bias"),
    }
    assert_close(variables["batch_stats"]["norm"]["mean"], np.asarray([0.1, -0.2, 0.3]))
    module.eval()
    logits = model.apply(variables, images(), train=False)
    features = module.features(images())
    assert_close(logits, module(images()))
    assert_close(model.apply(variables, images(), train=False, method="features"), features)
    assert_close(model.apply(variables, features, method=lambda m, f: m.head(f)), logits)


def test_an_adapted_nnx_module_has_the_statistics_and_gradient_of_the_module_in_training() -> None:
    module: Any = NNXBody(dropout=0.0)
    model = adapted(module)
    variables = model.init(KEY, images(), train=False)

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def loss(params: Any) -> tuple[jax.Array, Any]:
        out, updates = model.apply(
            {**variables, "params": params},
            images(),
            train=True,
            rngs={"dropout": KEY},
            mutable=["batch_stats"],
        )
        return (out**2).mean(), updates["batch_stats"]["norm"]

    (value, statistics), gradient = loss(variables["params"])
    module.train()
    truth, expected = nnx.jit(nnx.value_and_grad(lambda module: (module(images()) ** 2).mean()))(module)
    assert_close(value, truth)
    assert_close(statistics, {"mean": module.norm.mean[...], "var": module.norm.var[...]})
    assert_close(gradient["head"]["kernel"], expected["head"]["kernel"][...])
    assert_close(gradient["layers"]["0"]["kernel"], expected["layers"][0]["kernel"][...])
    assert_close(gradient["norm"]["scale"], expected["norm"]["scale"][...])


@pytest.mark.parametrize("typed", [False, True])
def test_dropout_of_an_nnx_module_follows_the_key(typed: bool) -> None:
    class Drops(nnx.Module):
        def __init__(self) -> None:
            rngs = nnx.Rngs(0)
            self.first, self.second = nnx.Dropout(0.5, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
            self.weight = nnx.Param(jnp.ones(()))

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.weight * jnp.stack([self.first(x), self.second(x)])

    model, x = adapted(Drops()), jnp.ones((1, 1000))
    variables = model.init(KEY, x)
    keys = [jax.random.key(seed) if typed else jax.random.PRNGKey(seed) for seed in (0, 1)]
    a, b = (np.asarray(model.apply(variables, x, train=True, rngs={"dropout": key})) for key in keys)
    again = model.apply(variables, x, train=True, rngs={"dropout": keys[0]})
    np.testing.assert_array_equal(a, again)
    assert set(np.unique(a)) == {0.0, 2.0}
    for one, other in ((a, b), (a[0], a[1])):  # two keys; two layers
        assert abs((one == other).mean() - 0.5) < 0.06
    np.testing.assert_array_equal(model.apply(variables, x, train=False), np.ones((2, 1, 1000)))


def test_an_nnx_module_may_take_its_mode_and_random_streams_as_arguments() -> None:
    class Explicit(nnx.Module):
        def __init__(self) -> None:
            self.drop, self.weight = nnx.Dropout(0.5), nnx.Param(jnp.ones(()))

        def __call__(self, x: jax.Array, training: bool, rngs: nnx.Rngs | None) -> jax.Array:
            return self.drop(x, deterministic=not training, rngs=rngs) * self.weight * (2 if training else 3)

    model, x = adapted(Explicit()), jnp.ones((4, 5))
    variables = model.init(KEY, x)
    expected = nnx.Dropout(0.5)(x, deterministic=False, rngs=nnx.Rngs(KEY)) * 2
    assert_close(model.apply(variables, x, train=True, rngs={"dropout": KEY}), expected)
    assert_close(model.apply(variables, x, train=False), 3 * np.ones((4, 5)))


@naive_and_er
def test_linen_and_nnx_with_the_same_weights_learn_the_same(hparams: AlgorithmHParams) -> None:
    linen = Body(dropout=0.0)
    module = nnx_twin(linen, dropout=0.0)
    before = [np.array(leaf) for leaf in jax.tree.leaves(nnx.state(module, nnx.Param, nnx.BatchStat))]
    expected, trained = fitted(linen, hparams), fitted(module, hparams)
    assert_close(with_linen_names(trained.weights()), expected.weights(), 1e-4)
    assert_close(trained.ts.batch_stats["norm"], expected.ts.batch_stats["norm"], 1e-4)
    assert not np.allclose(trained.ts.batch_stats["norm"]["mean"], module.norm.mean[...])
    after = jax.tree.leaves(nnx.state(module, nnx.Param, nnx.BatchStat))
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))  # not trained, not donated
    assert type(module.norm) is nnx.BatchNorm
    description = trained.describe()["model"]
    assert "NNXBody(" in description
    assert " at 0x" not in description


@pytest.mark.slow
@pytest.mark.parametrize("hparams", [LFLHParams(lfl_lambda=0.5), ICARL], ids=["lfl", "icarl"])
def test_methods_that_need_features_take_an_nnx_module(hparams: AlgorithmHParams) -> None:
    class Plain(nnx.Module):
        def __init__(self, kernels: dict[str, FloatArray]) -> None:
            rngs = nnx.Rngs(0)
            stem, self.head = nnx.Linear(64, 12, rngs=rngs), nnx.Linear(12, 10, rngs=rngs)
            self.features = nnx.Sequential(lambda x: x.reshape((len(x), -1)), stem, nnx.tanh)
            stem.kernel[...] = jnp.asarray(kernels["stem/kernel"])
            self.head.kernel[...] = jnp.asarray(kernels["head/kernel"])

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.head(self.features(x))

    start = learner(hparams, divided("class")).weights()
    trained, expected = fitted(Plain(start), hparams).weights(), fitted(None, hparams).weights()
    assert_close(trained["head/kernel"], expected["head/kernel"], 1e-5)
    assert_close(trained["features/layers/1/kernel"], expected["stem/kernel"], 1e-5)


class Cached(nnx.Module):
    def __init__(self, state: Any) -> None:
        self.layers: Any = nnx.List([nnx.Linear(2, 2, rngs=nnx.Rngs(0))])
        self.layers[0].kept = state

    def __call__(self, x: jax.Array) -> jax.Array:
        return x


class Custom(nnx.Variable[Any]):
    """A user-defined type of variable."""


@pytest.mark.parametrize(
    ("state", "problem"),
    [
        (lambda: nnx.Intermediate(jnp.zeros(3)), "a Intermediate"),
        (lambda: Custom([jnp.zeros(3)]), "a Custom that is not one array"),
        (lambda: nnx.Param({"a": jnp.zeros(3)}), "a Param that is not one array"),
    ],
    ids=["intermediate", "custom", "tree"],
)
def test_nnx_state_that_cannot_be_carried_is_named(state: Any, problem: str) -> None:
    match = f"Cached is an NNX module with state that cannot be carried.*layers/0/kept is {problem}"
    with pytest.raises(ValueError, match=match):
        adapted(Cached(state()))


def test_an_array_that_changes_in_a_call_is_named() -> None:
    class Counts(nnx.Module):
        def __init__(self) -> None:
            self.calls = jnp.zeros(())

        def __call__(self, x: jax.Array) -> jax.Array:
            self.calls = self.calls + 1
            return x

    with pytest.raises(ValueError, match=r"Counts is an NNX module with state .*calls is an array"):
        adapted(Counts()).apply({"params": {}}, images())


# -- row masks


class TorchNorm(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        return BatchNorm(name="norm")(x, use_running_average=not train)


class LinenNorm(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, training: bool) -> Any:
        return nn.BatchNorm(momentum=0.9, name="norm")(x, use_running_average=not training)


class NNXNorm(nnx.Module):
    def __init__(self) -> None:
        self.norm = nnx.BatchNorm(3, momentum=0.9, rngs=nnx.Rngs(0))

    def __call__(self, x: jax.Array) -> Any:
        return self.norm(x)


@pytest.mark.parametrize("network", [TorchNorm, LinenNorm, NNXNorm])
@pytest.mark.parametrize("rows", [(0, 1, 2, 3, 4, 5), (1, 4, 5), ()], ids=["all", "some", "none"])
def test_statistics_are_computed_from_the_rows_of_the_mask(
    network: Any, rows: tuple[int, ...], rng: np.random.Generator
) -> None:
    x, mask = rng.normal(size=(6, 4, 4, 3)).astype(np.float32), np.isin(np.arange(6), rows)
    model = adapted(network())
    variables = model.init(jax.random.key(0), x, train=False)

    @jax.jit
    def apply(x: jax.Array, mask: jax.Array) -> Any:
        call = partial(with_row_mask(model.apply, mask), variables, train=True, mutable=["batch_stats"])
        out, updates = call(x)
        return out, updates["batch_stats"]["norm"], jax.grad(lambda x: (call(x)[0] ** 2).sum())(x)

    out, statistics, gradient = apply(x, mask)
    selected = x[mask].astype(np.float64)
    mean, var, n = np.zeros(3), np.ones(3), selected.size // 3
    if rows:
        mean, var = selected.mean((0, 1, 2)), selected.var((0, 1, 2))
    running_var = var * n / (n - 1) if rows and network is TorchNorm else var
    rate = 0.1 if rows else 0.0
    assert_close(statistics, {"mean": rate * mean, "var": (1 - rate) + rate * running_var}, 1e-5)
    assert_close(out[mask], (selected - mean) / np.sqrt(var + 1e-5), 1e-4)
    assert np.isfinite(out).all()
    assert np.isfinite(gradient).all()


class Unmasked(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        mean = self.variable("batch_stats", "mean", jnp.zeros, ())
        return x - mean.value


class HasUnmasked(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        return Unmasked(name="centre")(x, train)


class NNXUnmasked(nnx.Module):
    def __init__(self) -> None:
        self.mean = nnx.BatchStat(jnp.zeros(()))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x - self.mean


class NNXHasUnmasked(nnx.Module):
    def __init__(self) -> None:
        self.centre = NNXUnmasked()

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.centre(x)


@pytest.mark.parametrize("module", [HasUnmasked(), NNXHasUnmasked()], ids=["linen", "nnx"])
def test_a_layer_without_a_mask_is_named(module: Any) -> None:
    model, x = adapted(module), images()
    variables = model.init(jax.random.key(0), x, train=False)
    assert_close(model.apply(variables, x, train=True), x)
    masked = with_row_mask(model.apply, jnp.ones(6, bool))
    with pytest.raises(ValueError, match="the layer centre has batch statistics, but its __call__ has no"):
        masked(variables, x, train=True, mutable=["batch_stats"])


# -- a user-defined TrainState


class NoMode(nn.Module):
    """A linen module that is called with its inputs only."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        logits: jax.Array = nn.Dense(10)(nn.tanh(nn.Dense(6)(images.reshape((len(images), -1)))))
        return logits


def stepped(ts: TrainState, hparams: AlgorithmHParams | None = None, steps: int = 4) -> TrainState:
    """Return the train state after the loop of docs/guides/flax.md, before `end_task`."""
    hparams, task = hparams or NaiveHParams(), divided("class").tasks[0]
    algorithm, spec = ALGORITHMS[hparams.name](hparams), divided("class").spec
    ts, state = algorithm.start_task(ts, algorithm.init(ts, spec), task)
    step = jax.jit(algorithm.train_step)
    for rows in np.arange(4 * steps).reshape(steps, 4):
        ts, state, _ = step(ts, state, Batch(*task.train.take(rows)))
    return ts


def plain_loop(ts: TrainState, forward: Any, steps: int = 4) -> Any:
    """Return the parameters after SGD steps on the cross-entropy of `forward(params, x, step)`."""
    params, task, normalisation = ts.params, divided("class").tasks[0], divided("class").normalisation

    @jax.jit
    def update(params: Any, x: jax.Array, y: jax.Array, step: Any) -> Any:
        def loss(params: Any) -> jax.Array:
            logits = nn.log_softmax(forward(params, x, step))
            return -(logits * jax.nn.one_hot(y, 10)).sum() / len(y)

        return jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss)(params))

    for k, rows in enumerate(np.arange(4 * steps).reshape(steps, 4)):
        x, y, _ = task.train.take(rows)
        x = (x / 255 - normalisation.mean[0]) / normalisation.std[0]
        params = update(params, jnp.asarray(x, jnp.float32), jnp.asarray(y), k)
    return params


def test_a_linen_module_without_a_mode_trains_as_in_a_plain_loop() -> None:
    net = NoMode()
    params = initial_params(net, divided("class").spec, seed=0)
    ts = TrainState.create(apply_fn=net.apply, params=params, tx=optax.sgd(0.1))
    assert_close(stepped(ts).params, plain_loop(ts, lambda p, x, _: net.apply({"params": p}, x)), 1e-5)


def test_dropout_with_another_name_of_the_mode_trains_as_in_a_plain_loop() -> None:
    class Dropping(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:
            h = nn.relu(nn.Dense(20)(x.reshape((len(x), -1))))
            logits: jax.Array = nn.Dense(10)(nn.Dropout(0.5)(h, deterministic=deterministic))
            return logits

    net = Dropping()
    params = net.init(KEY, images(), deterministic=True)["params"]
    ts = TrainState.create(apply_fn=net.apply, params=params, tx=optax.sgd(0.1))

    def forward(params: Any, x: jax.Array, step: Any) -> Any:
        rngs = {"dropout": jax.random.fold_in(jax.random.PRNGKey(0), step)}
        return net.apply({"params": params}, x, deterministic=False, rngs=rngs)

    assert_close(stepped(ts).params, plain_loop(ts, forward), 1e-5)


def plain_state(apply_fn: Any, params: Any) -> TrainState:
    ts: TrainState = TrainState.create(apply_fn=apply_fn, params=params, tx=optax.sgd(0.1))
    return ts


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: plain_state(lambda v, x: x, {"w": jnp.zeros(1)}),
            r"got an unexpected keyword argument 'train'",
        ),
        (
            lambda: plain_state(None, {"w": jnp.zeros(1)}),
            r"got None: .*use apply_fn=sequel_flax\.adapted\(net\)",
        ),
        (lambda: plain_state(Needy().apply, {"w": jnp.zeros(1)}), "a required argument: 'labels'"),
        (
            lambda: plain_state(Body().apply, Body().init(KEY, images())["params"]),
            'lacks: Tried to access "mean"',
        ),
        (
            lambda: plain_state(adapted(NNXBody()).apply, adapted(NNXBody()).init(KEY, images())["params"]),
            r"lacks: no array batch_stats/norm/mean; make it with sequel_flax\.BatchStatsTrainState\.create",
        ),
    ],
    ids=["function", "none", "needy", "linen without statistics", "nnx without statistics"],
)
def test_a_train_state_that_cannot_be_called_raises(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stepped(make())


def test_less_forgetting_learning_takes_an_nnx_module_with_batch_normalisation() -> None:
    linen = Body(dropout=0.0)
    variables = linen.init(KEY, images())
    model = adapted(NNXBody(dropout=0.0))
    params = {**variables["params"]}
    renamed = {**params, "layers": {"0": params.pop("conv")}}
    del renamed["conv"]
    nnx_state = WITH_STATISTICS.create(
        apply_fn=model.apply, params=renamed, batch_stats=variables["batch_stats"], tx=optax.sgd(0.1)
    )
    linen_state = WITH_STATISTICS.create(apply_fn=linen.apply, tx=optax.sgd(0.1), **variables)
    hparams = LFLHParams(lfl_lambda=0.5)
    trained, expected = stepped(nnx_state, hparams), stepped(linen_state, hparams)
    assert_close(trained.params["head"], expected.params["head"], 1e-4)
    assert_close(trained.params["layers"]["0"], expected.params["conv"], 1e-4)


def test_trained_weights_are_written_back_into_an_nnx_module_with_a_list() -> None:
    module: Any = NNXBody(dropout=0.0)
    model = adapted(module)
    ts = WITH_STATISTICS.create(apply_fn=model.apply, tx=optax.sgd(0.1), **model.init(KEY, images()))
    trained: Any = stepped(ts)
    expected = model.apply({"params": trained.params, "batch_stats": trained.batch_stats}, images())
    module.eval()
    assert np.abs(module(images()) - expected).max() > 1e-3
    write_back(module, trained)
    assert_close(module(images()), expected)
    np.testing.assert_array_equal(module.layers[0].kernel[...], trained.params["layers"]["0"]["kernel"])
    assert_close(
        adapted(module).init(KEY, images()), {"params": trained.params, "batch_stats": trained.batch_stats}
    )
    jax.tree.map(lambda leaf: leaf.delete(), trained.params)  # the module has copies
    assert np.isfinite(module(images())).all()


@pytest.mark.parametrize("change", ["shape", "missing", "statistics"])
def test_a_train_state_that_does_not_fit_an_nnx_module_is_not_written(change: str) -> None:
    module: Any = NNXBody()
    before = np.array(module.layers[0].bias[...])
    ts: Any = WITH_STATISTICS.create(
        apply_fn=None, tx=optax.sgd(0.1), **jax.tree.map(lambda a: a + 1, adapted(module).init(KEY, images()))
    )
    if change == "shape":
        ts = ts.replace(params={**ts.params, "norm": {"scale": jnp.zeros(4), "bias": jnp.zeros(3)}})
    elif change == "missing":
        ts = ts.replace(params={k: v for k, v in ts.params.items() if k != "norm"})
    else:
        ts = plain_state(None, ts.params)
    message = {
        "shape": r"ts\.params must have the array norm/scale of NNXBody with shape \[3\], got \[4\]; use the",
        "missing": r"ts\.params must have the array norm/bias of NNXBody with shape \[3\], got none",
        "statistics": r"ts\.batch_stats must have the array norm/mean of NNXBody with shape \[3\], got none",
    }
    with pytest.raises(ValueError, match=message[change]):
        write_back(module, ts)
    np.testing.assert_array_equal(module.layers[0].bias[...], before)
