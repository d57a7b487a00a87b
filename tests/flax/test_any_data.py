"""Streams of tables, sequences and dicts, user-defined objectives, structured outputs, and LoRA."""

from __future__ import annotations

import warnings
from typing import Any

import clu.metrics
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.traverse_util import flatten_dict
from scipy.special import softmax

from sequel_core import Split, Task
from sequel_core.algorithms.agem import AGEMHParams
from sequel_core.algorithms.der import DERHParams
from sequel_core.algorithms.derpp import DERppHParams
from sequel_core.algorithms.er import ERHParams
from sequel_core.algorithms.er_ace import ERACEHParams
from sequel_core.algorithms.ewc import EWCHParams
from sequel_core.algorithms.gem import GEMHParams
from sequel_core.algorithms.icarl import ICaRLHParams
from sequel_core.algorithms.kcl import KCLHParams
from sequel_core.algorithms.lamaml import LaMAMLHParams
from sequel_core.algorithms.lfl import LFLHParams
from sequel_core.algorithms.lwf import LwFHParams
from sequel_core.algorithms.mas import MASHParams
from sequel_core.algorithms.mcsgd import MCSGDHParams
from sequel_core.algorithms.mir import MIRHParams
from sequel_core.algorithms.naive import NaiveHParams
from sequel_core.algorithms.si import SIHParams
from sequel_core.hparams import AlgorithmHParams
from sequel_core.objectives import Score
from sequel_core.stream.benchmark import Benchmark
from sequel_core.stream.plan import initial_weights
from sequel_core.stream.task import Batch
from sequel_flax import (
    ALGORITHMS,
    CNN,
    MLP,
    FlaxLearner,
    Objective,
    cross_entropy,
    ewc,
    from_outputs,
    make_learner,
    squared_error,
)
from sequel_flax.algorithms.ewc import diagonal_fisher
from sequel_flax.boundaries import given
from sequel_flax.bundle import Model
from sequel_flax.objectives import output_leaf
from tests.flax.parts import SILENT, flat, settings, sgd
from tests.quick import some

N, D, SIZE = 24, 6, 8


def stream(y: Any, num_outputs: int, x: Any = None, classes: tuple[int, ...] = ()) -> Benchmark:
    """Return two tasks of N samples each; y(rng) returns the targets."""
    tasks = []
    for i in range(2):
        rng = np.random.default_rng(i)
        split = Split(rng.normal(size=(N, D)).astype(np.float32) if x is None else x(rng), y(rng), i)
        tasks.append(Task(i, f"{i}", classes, split, split, split.head(0)))
    return Benchmark("any", tuple(tasks), num_outputs, "domain")


LABELS = stream(lambda rng: np.arange(N) % 4, 4, classes=(0, 1, 2, 3))
VALUES = stream(lambda rng: rng.normal(size=(N, 3)).astype(np.float32), 3)
ONE_VALUE = stream(lambda rng: rng.normal(size=N), 1)
SEVERAL = stream(lambda rng: rng.random((N, 3)) < 0.5, 3)
SIZES: dict[str, Any] = {"mem_size": 16, "mem_batch_size": 4}
EVERY: list[AlgorithmHParams] = [
    NaiveHParams(),
    EWCHParams(ewc_lambda=5, fisher_samples=16),
    SIHParams(),
    MASHParams(mas_samples=16),
    ERHParams(**SIZES),
    DERHParams(**SIZES),
    DERppHParams(**SIZES),
    AGEMHParams(mem_batch_size=4, mem_size=16),
    GEMHParams(mem_size=16),
    LFLHParams(lfl_lambda=0.1),
    LwFHParams(lwf_lambda=0.1),
    MIRHParams(**SIZES, num_candidates=8),
    MCSGDHParams(mem_size=16, lmc_batch_size=4, lmc_line_samples=2),
    LaMAMLHParams(**SIZES, glances=1),
]


def trained(
    hparams: AlgorithmHParams, benchmark: Benchmark, model: Any = None, **options: Any
) -> FlaxLearner:
    made = make_learner(
        hparams,
        model or MLP((8,), benchmark.num_classes),
        sgd(0.1, momentum=None),
        benchmark,
        settings(batch_size=SIZE),
        **options,
    )
    for task in benchmark.tasks:
        made.fit_task(task, SILENT)
    return made


@pytest.mark.parametrize("hparams", some(EVERY, ("naive", "ewc", "derpp"), lambda hparams: hparams.name))
def test_every_method_trains_on_tables_of_values(hparams: AlgorithmHParams) -> None:
    """The score is the mean squared error of the outputs, computed here in NumPy."""
    made = trained(hparams, VALUES)
    assert made.score == Score("squared error", False, False)
    assert made.step == 6
    weights = {k: np.asarray(v, np.float64) for k, v in made.weights().items()}
    x, y, _ = VALUES.tasks[1].test.take(np.arange(N))
    h = np.maximum(x @ weights["dense_0/kernel"] + weights["dense_0/bias"], 0)
    error = (h @ weights["head/kernel"] + weights["head/bias"] - y) ** 2
    result = made.evaluate(VALUES.tasks[1], "test")
    assert result.score == pytest.approx(error.mean(), rel=1e-4)
    assert result.loss == pytest.approx(0.5 * error.sum(1).mean(), rel=1e-4)
    assert np.isnan(result.masked_score)


@pytest.mark.parametrize("benchmark", [ONE_VALUE, SEVERAL, LABELS], ids=["one value", "several", "labels"])
@pytest.mark.parametrize("name", some(["ewc", "derpp"], ["derpp"]))
def test_targets_of_any_type(name: str, benchmark: Benchmark) -> None:
    hparams = next(hparams for hparams in EVERY if hparams.name == name)
    made = trained(hparams, benchmark)
    result = made.evaluate(benchmark.tasks[0], "test")
    assert np.isfinite([result.score, result.loss]).all()
    assert made.step == 6
    if name == "derpp":
        assert made.memory_samples().y.dtype == benchmark.tasks[0].train.take(np.arange(1)).y.dtype


def test_the_mlp_has_the_initial_weights_of_the_plan() -> None:
    made = make_learner(NaiveHParams(), MLP((8,), 3), sgd(), VALUES)
    expected = initial_weights(0, "dense_0/kernel", (D, 8), D)
    np.testing.assert_allclose(made.weights()["dense_0/kernel"], expected, rtol=1e-6)


def test_a_cnn_needs_images() -> None:
    with pytest.raises(ValueError, match=r"the network needs images \[H, W, C\], the stream has inputs"):
        make_learner(NaiveHParams(), CNN((4,)), sgd(), VALUES)


# -- dicts and tokens


class Mixed(nn.Module):
    """Embeds words, and adds a linear function of an age."""

    outputs: int = 4

    @nn.compact
    def __call__(self, words: jax.Array, age: jax.Array, train: bool = False) -> jax.Array:
        assert jnp.issubdtype(words.dtype, jnp.integer)
        table = self.param("table", nn.initializers.normal(0.1), (400, 5))
        h = table[words].mean(1) + nn.Dense(5)(age[:, None])
        return nn.Dense(self.outputs, name="head")(h)


class NNXMixed(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.embed, self.age = nnx.Embed(400, 5, rngs=rngs), nnx.Linear(1, 5, rngs=rngs)
        self.head = nnx.Linear(5, 4, rngs=rngs)

    def __call__(self, words: jax.Array, age: jax.Array) -> jax.Array:
        return self.head(self.embed(words).mean(1) + self.age(age[:, None]))


def mixed_inputs(rng: np.random.Generator) -> Any:
    return {"words": rng.integers(300, 400, (N, 3)), "age": rng.normal(size=N)}


MIXED = stream(lambda rng: np.arange(N) % 4, 4, mixed_inputs, (0, 1, 2, 3))


@pytest.mark.parametrize("model", [Mixed, NNXMixed])
@pytest.mark.parametrize("name", some(["naive", "ewc", "derpp", "agem", "lamaml"], ["ewc", "derpp"]))
def test_dicts_are_passed_as_keywords(name: str, model: Any) -> None:
    """Words of 64 bits are kept exactly, in 32 bits and without a warning."""
    hparams = next(hparams for hparams in EVERY if hparams.name == name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = trained(hparams, MIXED, model())
    assert np.isfinite(made.evaluate(MIXED.tasks[0], "test").loss)
    table = next(v for k, v in made.weights().items() if v.shape == (400, 5))
    start = make_learner(hparams, model(), sgd(), MIXED).weights()
    before = next(v for v in start.values() if v.shape == (400, 5))
    np.testing.assert_array_equal(table[:300], before[:300])  # such words do not occur
    assert (table[300:] != before[300:]).any(1).sum() > 30
    if name == "derpp":
        stored = made.memory_samples()
        words = {w.tobytes() for task in MIXED.tasks for w in task.train.take(np.arange(N)).x["words"]}
        assert {w.astype(np.int64).tobytes() for w in stored.x["words"]} <= words


class MaskedMean(nn.Module):
    """The mean of the embedded words that a mask keeps; it is not defined without any."""

    @nn.compact
    def __call__(self, words: jax.Array, mask: jax.Array, train: bool = False) -> jax.Array:
        kept = mask[..., None].astype(jnp.float32)
        h = (nn.Embed(9, 5)(words) * kept).sum(1) / kept.sum(1)
        return nn.Dense(4, name="head")(h)


def masked_inputs(rng: np.random.Generator) -> Any:
    return {"words": rng.integers(0, 9, (N, 3)), "mask": np.arange(3) < rng.integers(1, 4, (N, 1))}


@pytest.mark.parametrize("name", some(["er", "derpp", "agem", "mcsgd", "lamaml"], ["derpp", "agem"]))
def test_empty_slots_do_not_reach_the_network(name: str) -> None:
    """An empty memory has masks without any word, whose mean and gradient are nan."""
    hparams = next(hparams for hparams in EVERY if hparams.name == name)
    made = trained(
        hparams, stream(lambda rng: np.arange(N) % 4, 4, masked_inputs, (0, 1, 2, 3)), MaskedMean()
    )
    assert all(np.isfinite(a).all() for a in made.weights().values())


def test_steps_take_dicts() -> None:
    """A dict with the key of the targets is the same batch; the samples are of the current task."""
    hparams = next(hparams for hparams in EVERY if hparams.name == "derpp")
    made = make_learner(hparams, Mixed(), sgd(), MIXED)
    step, ends = jax.jit(made.algorithm.train_step), []
    for as_dict in (False, True):
        ts, state = made.algorithm.start_task(made.ts, made.state, MIXED.tasks[0])
        planner = made.algorithm.planner(MIXED.spec, state)
        for k in range(2):
            x, y, t = MIXED.tasks[0].train.take(np.arange(k * SIZE, (k + 1) * SIZE))
            plan = planner.next(y, t)
            batch = {**x, "labels": y, "plan": plan} if as_dict else Batch(x, y, t, plan)
            ts, state, _ = step(ts, state, batch)
        ts, state = made.algorithm.end_task(ts, state, [batch])
        ends.append(flat(ts.params))
    for name, array in ends[0].items():
        np.testing.assert_array_equal(ends[1][name], array)
    with pytest.raises(
        ValueError, match=r"must have the target 'labels' .* got the keys 'age', 'words'; give"
    ):
        step(ts, state, x)
    with pytest.raises(ValueError, match="got a single Batch; give"):
        next(given({**x, "labels": y}))  # type: ignore[dict-item]


def test_the_key_of_the_targets_is_that_of_the_objective() -> None:
    objective = cross_entropy()._replace(target="answers")
    made = make_learner(NaiveHParams(), Mixed(), sgd(), MIXED, objective=objective)
    ts, state = made.algorithm.start_task(made.ts, made.state, MIXED.tasks[0])
    x, y, t = MIXED.tasks[0].train.take(np.arange(SIZE))
    _, _, expected = made.algorithm.train_step(ts, state, Batch(x, y, t))
    _, _, outputs = made.algorithm.train_step(ts, state, {**x, "answers": y, "t": t})
    assert outputs["loss"] == expected["loss"]
    with pytest.raises(ValueError, match="must have the target 'answers'"):
        made.algorithm.train_step(ts, state, {**x, "labels": y})


@pytest.mark.parametrize("hparams", [ICaRLHParams(mem_size=20), KCLHParams(task_given=True)])
def test_methods_that_keep_one_array_name_the_keys(hparams: AlgorithmHParams) -> None:
    with pytest.raises(ValueError, match=f"{hparams.name} needs inputs that are one array, .* words, age"):
        make_learner(hparams, Mixed(), sgd(), MIXED)


class Named(nn.Module):
    """A network that returns a dict, while its last layer returns an array."""

    def setup(self) -> None:
        self.stem, self.head = nn.Dense(5), nn.Dense(3)

    def features(self, x: jax.Array, train: bool = False) -> jax.Array:
        return nn.tanh(self.stem(x))

    def __call__(self, x: jax.Array, train: bool = False) -> dict[str, jax.Array]:
        return {"values": self.head(self.features(x, train))}


def test_lfl_needs_an_objective_of_what_the_head_returns() -> None:
    of_dicts = from_outputs(lambda outputs, y: jnp.abs(outputs["values"] - y).sum(1))
    with pytest.raises(ValueError, match=r"must take what head returns, \[1, 3\] for B=1: .*return the same"):
        make_learner(LFLHParams(), Named(), sgd(), VALUES, objective=of_dicts)
    of_arrays = from_outputs(lambda outputs, y: jnp.abs(output_leaf(outputs) - y).sum(1))
    trained(LFLHParams(), VALUES, Named(), objective=of_arrays)


def test_partly_trained_networks_take_dicts() -> None:
    made = trained(EVERY[1], MIXED, Mixed(), trainable=lambda path: path[0] == "head")
    assert made.memory_bytes() == 2 * 4 * (5 * 4 + 4)


class Tagger(nn.Module):
    """Logits of each token, `[B, L, V]`."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        return nn.Dense(5)(nn.Embed(9, 4)(x))


TAGS = stream(
    lambda rng: np.where(rng.random((N, 3)) < 0.3, -100, rng.integers(0, 5, (N, 3))),
    5,
    lambda rng: rng.integers(0, 9, (N, 3)),
)


@pytest.mark.parametrize("name", some(["naive", "ewc", "er", "derpp", "mcsgd"], ["ewc", "derpp"]))
def test_tokens(name: str) -> None:
    hparams = next(hparams for hparams in EVERY if hparams.name == name)
    made = trained(hparams, TAGS, Tagger())
    params, (x, y, _) = made.ts.params, TAGS.tasks[0].test.take(np.arange(N))
    logits = np.asarray(Tagger().apply({"params": params}, x))
    counts = y != -100
    result = made.evaluate(TAGS.tasks[0], "test")
    assert result.score == pytest.approx((logits.argmax(-1) == y)[counts].mean(), rel=1e-5)
    log_p = np.log(softmax(logits, -1))
    losses = -np.take_along_axis(log_p, np.where(counts, y, 0)[..., None], -1)[..., 0]
    assert result.loss == pytest.approx(losses[counts].mean(), rel=1e-5)


def test_replay_divides_by_the_tokens_of_batch_and_draw() -> None:
    """The second batch and its draw, the first batch itself, at constant weights."""
    hparams = ERHParams(mem_size=SIZE, mem_batch_size=SIZE)
    made = make_learner(hparams, Tagger(), optax.sgd(0.0), TAGS, settings(batch_size=SIZE))
    algorithm, planner = made.algorithm, made.planner
    ts, state = algorithm.start_task(made.ts, made.state, TAGS.tasks[0])
    losses, taken = [], []
    for rows in np.arange(2 * SIZE).reshape(2, SIZE):
        x, y, t = TAGS.tasks[0].train.take(rows)
        ts, state, outputs = algorithm.train_step(ts, state, Batch(x, y, t, planner.next(y, t)))
        losses.append(float(outputs["loss"]))
        taken.append((x, y))
    x, y = (np.concatenate(part) for part in zip(*taken, strict=True))
    log_p = np.log(softmax(np.asarray(Tagger().apply({"params": ts.params}, x)), -1))
    counts = y != -100
    values = -np.take_along_axis(log_p, np.where(counts, y, 0)[..., None], -1)[..., 0]
    assert losses[1] == pytest.approx(values[counts].sum() / counts.sum(), rel=1e-5)


# -- objectives


def _linear_fisher(made: FlaxLearner, fisher: str) -> Any:
    """Return the Fisher of the weights of a linear classifier on task 0, in NumPy."""
    p = {k: np.asarray(v, np.float64) for k, v in made.weights().items()}
    x, y, _ = LABELS.tasks[0].train.take(np.arange(N))
    q = softmax(x @ p["head/kernel"] + p["head/bias"], axis=1)
    if fisher == "exact":
        return np.einsum("nd,nc->dc", x.astype(np.float64) ** 2, q * (1 - q)) / N
    residual = q - np.eye(4)[y]
    if fisher in ("empirical", "weighted"):
        weights = q[np.arange(N), y][:, None] if fisher == "weighted" else 1
        return np.einsum("nd,nc->dc", x.astype(np.float64) ** 2, weights * residual**2) / N
    if fisher == "mean":
        return (x.T @ residual / N) ** 2
    return sum(SIZE * (x[k : k + SIZE].T @ residual[k : k + SIZE] / SIZE) ** 2 for k in range(0, N, SIZE)) / N


def fisher_of(made: FlaxLearner, hparams: EWCHParams, objective: Objective) -> Any:
    batches = [Batch(*LABELS.tasks[0].train.take(np.arange(k, k + SIZE))) for k in range(0, N, SIZE)]
    model = Model(made.ts, made.state, objective)
    tree = diagonal_fisher(made.ts.params, model, batches, hparams, 0, 0)
    return np.asarray(tree["head"]["kernel"])


@pytest.mark.parametrize("fisher", ["empirical", "exact", "batch", "mean", "weighted"])
def test_ewc_fisher_of_a_linear_classifier(fisher: Any) -> None:
    """Label smoothing and class weights do not change it: `nll` has neither."""
    hparams = EWCHParams(fisher=fisher, fisher_samples=None)
    made = make_learner(hparams, MLP((), 4), sgd(), LABELS)
    plain = fisher_of(made, hparams, cross_entropy())
    np.testing.assert_allclose(plain, _linear_fisher(made, fisher), rtol=1e-4, atol=1e-7)
    other = fisher_of(made, hparams, cross_entropy(0.2, (1.0, 2.0, 0.5, 3.0)))
    np.testing.assert_array_equal(plain, other)


def test_ewc_sampled_fisher_is_near_the_exact_one_and_the_same_in_parts() -> None:
    """With many repetitions of the samples; `plan_end` and `apply_end` give the same as `end_task`."""
    hparams = EWCHParams(fisher="sampled", fisher_samples=None)
    made = make_learner(hparams, MLP((), 4), sgd(), LABELS)
    model = Model(made.ts, made.state, cross_entropy())
    rows = np.tile(np.arange(N), 100)
    batches = [Batch(*LABELS.tasks[0].train.take(rows))]
    tree = diagonal_fisher(made.ts.params, model, batches, hparams, 0, 0)
    np.testing.assert_allclose(tree["head"]["kernel"], _linear_fisher(made, "exact"), rtol=0.15, atol=2e-3)
    algorithm, task = made.algorithm, LABELS.tasks[0]
    ts, state = algorithm.start_task(made.ts, made.state, task)
    few = [Batch(*task.train.take(np.arange(k, k + 5))) for k in (0, 5)]
    whole = algorithm.end_task(ts, state, few)[1].memory.importance
    parts = jax.jit(algorithm.apply_end)(ts, state, algorithm.plan_end(state, few))[1].memory.importance
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8)
    assert float(whole["head"]["kernel"].sum()) > 0


def absolute(outputs: Any, y: Any) -> jax.Array:
    return jnp.abs(outputs - y).sum(1)


@pytest.mark.parametrize(
    "name", some(["naive", "si", "mas", "er", "agem", "mcsgd", "lamaml", "lfl"], ["si", "mas", "er", "agem"])
)
def test_a_user_defined_loss_is_used_everywhere(name: str) -> None:
    """The shorthand and the general form give the same weights, which are those of no built-in loss."""
    hparams = next(hparams for hparams in EVERY if hparams.name == name)
    general = Objective(lambda model, batch: absolute(model(batch.x), batch.y))
    short, whole = (
        trained(hparams, VALUES, objective=objective) for objective in (from_outputs(absolute), general)
    )
    for k, array in short.weights().items():
        np.testing.assert_array_equal(array, whole.weights()[k])
    assert short.score.name == "loss"
    result = short.evaluate(VALUES.tasks[0], "test")
    assert result.score == result.loss
    assert not np.array_equal(
        short.weights()["head/kernel"], trained(hparams, VALUES).weights()["head/kernel"]
    )


def test_class_weights_are_normalised_over_batch_and_draw() -> None:
    """The value of a step of ER at the initial weights, against NumPy."""
    weights = np.array([1.0, 2.0, 0.5, 3.0])
    objective = cross_entropy(class_weights=tuple(weights))
    hparams = ERHParams(mem_size=SIZE, mem_batch_size=SIZE)
    training = settings(batch_size=SIZE)
    made = make_learner(hparams, MLP((), 4), optax.sgd(0.0), LABELS, training, objective=objective)
    ts, state = made.algorithm.start_task(made.ts, made.state, LABELS.tasks[0])
    for rows in np.arange(2 * SIZE).reshape(2, SIZE):
        x, y, t = LABELS.tasks[0].train.take(rows)
        batch = Batch(x, y, t, made.planner.next(y, t))
        ts, state, outputs = made.algorithm.train_step(ts, state, batch)
    x, y, _ = LABELS.tasks[0].train.take(np.arange(2 * SIZE))
    p = flat(ts.params)
    log_p = np.log(softmax(x @ p["head/kernel"] + p["head/bias"], axis=1))[np.arange(len(y)), y]
    expected = -(weights[y] * log_p).sum() / weights[y].sum()
    assert float(outputs["loss"]) == pytest.approx(expected, rel=1e-5)


def test_multi_steps_need_means_over_samples() -> None:
    tx, weighted = (
        optax.MultiSteps(optax.sgd(0.1), every_k_schedule=2),
        cross_entropy(class_weights=(1, 2, 3, 4)),
    )
    with pytest.raises(
        ValueError, match=r"optax.MultiSteps gives each batch the same weight.*reduce=samples"
    ):
        make_learner(NaiveHParams(), Mixed(), tx, MIXED, objective=weighted)
    make_learner(NaiveHParams(), Mixed(), tx, MIXED)


def test_a_metric_with_state_is_the_score() -> None:
    """The metric is updated with all samples, without padding."""
    objective = cross_entropy()._replace(values=None, metric=clu.metrics.Accuracy.empty)
    made = make_learner(
        NaiveHParams(),
        MLP((8,), 4),
        sgd(),
        LABELS,
        settings(batch_size=SIZE, eval_batch_size=10),
        objective=objective,
    )
    made.fit_task(LABELS.tasks[0], SILENT)
    plain = FlaxLearner(
        ALGORITHMS["naive"](NaiveHParams()), MLP((8,), 4), sgd(), LABELS.spec, settings(eval_batch_size=10)
    )
    plain.ts = made.ts
    result, expected = (each.evaluate(LABELS.tasks[0], "test") for each in (made, plain))
    assert result.score == pytest.approx(expected.score)
    assert 0 < result.score < 1


# -- structured outputs


class Several(nn.Module):
    """Returns logits and hidden units."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> Any:
        h = nn.tanh(nn.Dense(5)(x))
        return {"logits": nn.Dense(4)(h), "hidden": h}


def test_a_metric_gets_the_logits_of_several_outputs() -> None:
    objective = cross_entropy()._replace(values=None, metric=clu.metrics.Accuracy.empty)
    made = trained(NaiveHParams(), LABELS, Several(), objective=objective)
    x, y, _ = LABELS.tasks[0].test.take(np.arange(N))
    outputs: Any = Several().apply({"params": made.ts.params}, x)
    expected = (np.asarray(outputs["logits"]).argmax(1) == y).mean()
    assert made.evaluate(LABELS.tasks[0], "test").score == pytest.approx(expected)


def test_outputs_that_are_stored_may_be_named() -> None:
    for output, width in ((None, 4), ("logits", 4), ("hidden", 5)):
        made = trained(DERHParams(**SIZES, output=output), LABELS, Several())
        assert made.state.memory.outputs.shape == (16, width)
    made = trained(MASHParams(output="hidden"), LABELS, Several())
    assert not flatten_dict(made.state.memory.importance, sep="/")["Dense_1/kernel"].any()
    for hparams in (DERHParams(**SIZES, output="scores"), MASHParams(output="scores")):
        with pytest.raises(ValueError, match=r"an array scores in what the network returns, got dict of"):
            make_learner(hparams, Several(), sgd(), LABELS)


# -- errors


def test_methods_that_need_class_labels() -> None:
    for hparams in (ICaRLHParams(mem_size=20), KCLHParams(core_size=8, task_given=True), ERACEHParams()):
        with pytest.raises(ValueError, match=f"{hparams.name} needs targets that are class labels"):
            make_learner(hparams, MLP((8,), 3), sgd(), VALUES)
        with pytest.raises(ValueError, match=f"{hparams.name} needs an objective for class labels"):
            ALGORITHMS[hparams.name](hparams, objective=squared_error())


def test_ewc_needs_a_likelihood() -> None:
    with pytest.raises(ValueError, match="negative log-likelihood, got nll=None; give the objective an nll"):
        ewc(EWCHParams(), objective=from_outputs(absolute))
    no_draws = from_outputs(absolute, absolute)
    for fisher, field in (("sampled", "sample"), ("exact", "outcomes")):
        with pytest.raises(ValueError, match=f"fisher={fisher} needs an objective with {field}"):
            ewc(EWCHParams(fisher=fisher), objective=no_draws)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="fisher=exact needs an objective with outcomes"):
        make_learner(EWCHParams(fisher="exact"), Tagger(), sgd(), TAGS)  # of the built-in objective


@pytest.mark.parametrize("name", ["naive", "er", "lamaml"])
def test_a_loss_that_is_not_one_number_per_sample_raises(name: str) -> None:
    hparams = next(hparams for hparams in EVERY if hparams.name == name)
    for loss, shape in (
        (lambda f, y: (f - y) ** 2, r"\[8, 3\]|\[1, 3\]"),
        (lambda f, y: jnp.mean(f), r"\[\]"),
    ):
        with pytest.raises(ValueError, match=f"must return one number per sample, .* got ({shape}); do not"):
            trained(hparams, VALUES, objective=from_outputs(loss))


def test_a_leaf_that_differs_from_the_spec_raises() -> None:
    made = make_learner(NaiveHParams(), Mixed(), sgd(), MIXED)
    ts, state = made.algorithm.start_task(made.ts, made.state, MIXED.tasks[0])
    x, y, t = MIXED.tasks[0].train.take(np.arange(SIZE))
    step = jax.jit(made.algorithm.train_step)
    assert np.isfinite(step(ts, state, Batch(x, y, t))[2]["loss"])
    for change, message in (
        (
            {"words": x["words"].astype(np.float32)},
            r"x.words of a batch must be int32 \[8, 3\] .* got float32",
        ),
        (
            {"age": np.zeros((SIZE, 2), np.float32)},
            r"x.age of a batch must be float32 \[8\] .* got float32 \[8, 2",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            step(ts, state, Batch({**x, **change}, y, t))
    with pytest.raises(ValueError, match=r"a batch must have x\.words by the stream's spec, got x\.age"):
        step(ts, state, Batch({"age": x["age"]}, y, t))


# -- LoRA


class LoRANet(nnx.Module):
    """A network of 300,000 frozen weights with adapters of rank 2."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.stem = nnx.Linear(D, 550, rngs=rngs)
        self.hidden = nnx.LoRALinear(550, 550, lora_rank=2, rngs=rngs)
        self.head = nnx.LoRALinear(550, 4, lora_rank=2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        logits: jax.Array = self.head(nnx.relu(self.hidden(nnx.relu(self.stem(x)))))
        return logits


def test_lora_adapters_alone_are_trained_and_remembered() -> None:
    first = LABELS.tasks[0]
    third = Task(2, "2", first.classes, train=first.train, test=first.test, validation=first.validation)
    tasks = (*LABELS.tasks, third)
    three = Benchmark("three", tasks, 4, "domain")
    module = LoRANet()
    made = make_learner(
        EWCHParams(ewc_lambda=10),
        module,
        sgd(0.05),
        three,
        settings(batch_size=SIZE),
        trainable=nnx.LoRAParam,
    )
    before = made.weights()
    for task in three.tasks:
        made.fit_task(task, SILENT)
    after = made.weights()
    adapters = {k for k in before if "lora" in k}
    count = sum(before[k].size for k in adapters)
    assert count == 2 * (550 + 550) + 2 * (550 + 4)
    assert sum(v.size for v in before.values()) - count > 300_000
    assert made.memory_bytes() == 2 * 4 * count
    for k in before:
        assert np.array_equal(before[k], after[k]) is (k not in adapters), k


def test_a_predicate_that_matches_nothing_raises() -> None:
    with pytest.raises(ValueError, match="trainable must select at least one parameter of the network"):
        make_learner(EWCHParams(), MLP((8,), 4), sgd(), LABELS, trainable=nnx.LoRAParam)
    with pytest.raises(ValueError, match="trainable must select at least one parameter of the network"):
        make_learner(EWCHParams(), MLP((8,), 4), sgd(), LABELS, trainable=lambda path: "lora" in path)
