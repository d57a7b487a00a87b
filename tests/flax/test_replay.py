"""Replay methods and less-forgetting learning: errors, contents and size of the memory, and dropout."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import linen as nn

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
from sequel_core.hparams import AlgorithmHParams, ReplayHParams
from sequel_core.stream import plan
from sequel_core.stream.arrays import FloatArray, UInt8Array
from sequel_core.stream.benchmark import Scenario
from sequel_core.stream.memory import StepPlan, joined_with_memory, memory_stream
from sequel_core.stream.task import Batch
from sequel_core.stream.trees import LeafSpec
from sequel_flax import ALGORITHMS, MLP, FlaxLearner
from sequel_flax.replay import Memory, stored_samples
from tests.flax.parts import (
    AGEM,
    BATCH,
    DERPP,
    ER,
    LFL,
    SI,
    SILENT,
    STEPS,
    Net,
    batches,
    divided,
    every_replay,
    flat,
    learner,
    rotated,
    same,
    settings,
    sgd,
    user_loop,
)

STILL = optax.sgd(0.0)
DROPPING = MLP((12,), dropout=0.5)


def normalised(x: UInt8Array) -> FloatArray:
    """Return normalised images, float64."""
    stream = rotated().normalisation
    images: FloatArray = (x / 255 - np.array(stream.mean)) / np.array(stream.std)
    return images


@cache
def with_large_memory() -> FlaxLearner:
    """Return a learner whose memory is larger than a task, after its first task."""
    made = learner(ERHParams(mem_size=50, mem_batch_size=6))
    made.fit_task(rotated().tasks[0], SILENT)
    return made


# -- errors while the step is traced


@every_replay
def test_a_batch_without_a_plan_raises(hparams: ReplayHParams) -> None:
    made = learner(hparams)
    batch = next(iter(batches(rotated().tasks[0], settings())))
    with pytest.raises(
        ValueError,
        match=r"no plan, .*algorithm.planner\(spec, state\) and give Batch\(x, y, t, planner.next\(y, t\)\)",
    ):
        jax.eval_shape(made.algorithm.train_step, made.ts, made.state, batch)


@every_replay
def test_float_images_need_a_spec_with_their_dtype(hparams: ReplayHParams) -> None:
    made = learner(hparams)
    x, y, t, _ = next(iter(batches(rotated().tasks[0], settings())))
    batch = Batch(normalised(x), y, t, made.planner.next(y, t))
    with pytest.raises(
        ValueError,
        match=r"x of a batch must be uint8 .* got float32 .* give a spec with LeafSpec",
    ):
        jax.eval_shape(made.algorithm.train_step, made.ts, made.state, batch)


class Headless(nn.Module):
    """A module whose last layer has another name."""

    def setup(self) -> None:
        self.stem, self.classifier = nn.Dense(5), nn.Dense(10)

    def features(self, x: jax.Array, train: bool = False) -> jax.Array:
        return nn.tanh(self.stem(x.reshape((x.shape[0], -1))))

    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        logits: jax.Array = self.classifier(self.features(x, train))
        return logits


class Inline(nn.Module):
    """A module whose head is created in `__call__`, so other methods cannot use it."""

    def setup(self) -> None:
        self.stem = nn.Dense(5)

    def features(self, x: jax.Array, train: bool = False) -> jax.Array:
        return nn.tanh(self.stem(x.reshape((x.shape[0], -1))))

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        return nn.Dense(10, name="head")(self.features(x, train))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Net(), r"lfl needs a network with a method features\(x, train\), the last hidden layer"),
        (Headless(), "lfl needs a last layer called head, got the layers stem, classifier|classifier, stem"),
        (Inline(), "lfl needs a network with .* setup's head turns into logits; got one without: .*head"),
    ],
    ids=["features", "head", "inline head"],
)
def test_lfl_raises_for_a_network_without_features_or_head(model: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        learner(LFL, model=model)


# -- contents of the memory


@pytest.mark.parametrize("hparams", [ER, DERPP], ids=lambda hparams: hparams.name)
def test_float_images_are_stored_exactly(hparams: ReplayHParams) -> None:
    def as_floats(x: UInt8Array) -> Any:
        return normalised(x).astype(np.float32)

    spec = rotated().spec._replace(x=LeafSpec(rotated().spec.image_shape, "float32"))
    bundle = ALGORITHMS[hparams.name](hparams)
    ts, state, _ = user_loop(bundle, rotated(), settings(), sgd(), spec=spec, images=as_floats)
    ours = learner(hparams)
    for task in rotated().tasks:
        ours.fit_task(task, SILENT)
    held, expected = stored_samples(state.memory), ours.memory_samples()
    assert held.x.dtype == np.float32
    np.testing.assert_array_equal(held.x, as_floats(expected.x))
    np.testing.assert_array_equal(held.y, expected.y)
    np.testing.assert_array_equal(held.t, expected.t)
    assert set(held.t.tolist()) == {0, 1, 2}
    weights = flat(ts.params)
    for name, array in ours.weights().items():
        np.testing.assert_allclose(weights[name], array, rtol=1e-4, atol=1e-5)


def test_the_memory_stores_copies_of_the_batch() -> None:
    made = learner(DERPP)
    step = jax.jit(made.algorithm.train_step)
    ends = []
    for overwrite in (False, True):
        planner, ts, state = made.algorithm.planner(made.spec, made.state), made.ts, made.state
        for x, y, t, _ in batches(rotated().tasks[0], settings()):
            batch = Batch(x.copy(), y.copy(), t.copy(), planner.next(y, t))
            ts, state, _ = step(ts, state, batch)
            if overwrite:
                jax.block_until_ready(state)
                for array in (*batch[:3], *batch.plan):
                    array[:] = 0
        ends.append(jax.tree.leaves((ts.params, state.memory)))
    assert all(np.array_equal(a, b) for a, b in zip(*ends, strict=True))


def test_the_memory_stores_the_samples_of_the_training_batches() -> None:
    """Of 43 samples, the three of the incomplete batch are not stored."""
    task = rotated().tasks[0]
    order = plan.epoch_batches(0, 0, 0, len(task.train), BATCH)
    trained_on = task.train.take(order.ravel())
    assert len(trained_on.y) == BATCH * STEPS < len(task.train)
    for stored, expected in zip(with_large_memory().memory_samples(), trained_on, strict=True):
        np.testing.assert_array_equal(stored, expected)


def test_samples_of_the_memory_are_copies() -> None:
    for array in with_large_memory().memory_samples():
        array[:] = 0
    held = with_large_memory().memory_samples()
    assert held.x.any()
    assert held.y.any()


@pytest.mark.parametrize("hparams", [NaiveHParams(), SIHParams()], ids=lambda hparams: hparams.name)
def test_a_method_without_a_memory_has_no_samples(hparams: AlgorithmHParams) -> None:
    with pytest.raises(ValueError, match=f"{hparams.name} keeps no samples; methods with a memory do"):
        learner(hparams).memory_samples()


def test_samples_of_the_memory_train_as_a_task() -> None:
    """The 43 samples of task 1 and 40 of task 0 make ten steps."""
    memory = memory_stream(with_large_memory().memory_samples())
    joined = joined_with_memory(rotated().tasks[1], memory)
    assert [part.task for part in joined.train.parts] == [1, 0]
    other = learner(NaiveHParams())
    before = other.weights()
    other.fit_task(joined, SILENT)
    assert other.step == (43 + 40) // BATCH == 10
    assert other.evaluate(joined, "train").total == 83
    assert not same(other.weights(), before)


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
    (ERHParams(mem_size=0), 72),  # one unused slot, because orbax cannot save an empty array
    (MCSGDHParams(mem_size=60), 60 * 72 + 2 * 910 * 4 + 4),  # w_bar, w_hat, and a step
    (MCSGDHParams(mem_size=60, lmc_policy="online"), 60 * 72 + 4 * 910 * 4 + 4),  # and the moving w_bar
    (LaMAMLHParams(**SIZES), 60 * 72 + 910 * 4),  # and a learning rate per weight
    (ICaRLHParams(mem_size=60), 60 * 72 + 910 * 4 + 10 * 12 * 4 + 10 + 4),  # means, which, when
    (KCLHParams(core_size=20, kernel_type="rbf", task_given=True), 60 * 72),
    (  # noise; phases, positions
        KCLHParams(core_size=20, d_rn_f=16, task_given=True),
        60 * 72 + (2**20 + 11) * 4 + 16 * 8,
    ),
]
"""The same numbers are in tests/lightning/test_replay.py, except for the memory of size 0."""


@pytest.mark.parametrize(("hparams", "expected"), BYTES)
def test_memory_bytes(hparams: AlgorithmHParams, expected: int) -> None:
    assert learner(hparams, model=MLP((12,))).memory_bytes() == expected


# -- logits and dropout


@pytest.mark.parametrize("scenario", ["domain", "task"])
def test_the_logit_distance_of_der_is_zero_for_constant_weights(scenario: Scenario) -> None:
    """Constant weights give the stored logits again, so the loss is the cross-entropy of the batch."""
    stream = rotated() if scenario == "domain" else divided(scenario)
    bundle = ALGORITHMS["der"](DERHParams(alpha=1e6, mem_size=20))
    ts, state, losses = user_loop(bundle, stream, settings(), STILL)
    assert len(stored_samples(state.memory).y) == 20
    w = flat(ts.params)
    expected = []
    for task in stream.tasks:
        for x, y, t, _ in batches(task, settings()):
            x = (
                x.reshape(BATCH, -1) * np.float64(stream.normalisation.scale[0])
                + stream.normalisation.shift[0]
            )
            f = np.tanh(x @ w["Dense_0/kernel"] + w["Dense_0/bias"]) @ w["Dense_1/kernel"] + w["Dense_1/bias"]
            if scenario == "task":
                f = np.where(stream.mask[t], f, -np.inf)
            expected.append(np.mean(np.log(np.exp(f).sum(1)) - f[np.arange(BATCH), y]))
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_batch_and_memory_have_different_dropout_masks() -> None:
    """The batch has the mask that it has in Naive.

    The second step reads its own batch from the memory, in the same order: with one mask for both, the logits
    would be equal.
    """
    hparams = DERHParams(alpha=1.0, mem_size=BATCH, mem_batch_size=BATCH)
    der, naive = (learner(h, model=DROPPING, tx=STILL) for h in (hparams, NaiveHParams()))
    x, y, t, _ = next(iter(batches(rotated().tasks[0], settings())))
    step, bare_step = (jax.jit(made.algorithm.train_step) for made in (der, naive))
    (ts, state), (bare, bare_state) = (
        made.algorithm.start_task(made.ts, made.state, rotated().tasks[0]) for made in (der, naive)
    )
    passes, losses = [], []
    for _ in range(2):
        held = state.memory
        ts, state, outputs = step(ts, state, Batch(x, y, t, der.planner.next(y, t)))
        bare, bare_state, expected = bare_step(bare, bare_state, Batch(x, y, t))
        np.testing.assert_allclose(outputs["logits"], expected["logits"], rtol=1e-5, atol=1e-6)
        passes.append(np.asarray(outputs["logits"]))
        losses.append(float(outputs["loss"] - expected["loss"]))
    np.testing.assert_array_equal(held.x, x)
    np.testing.assert_array_equal(held.outputs, passes[0])
    same_mask = np.mean(np.sum((passes[0] - passes[1]) ** 2, axis=1))
    assert losses[0] == pytest.approx(0, abs=1e-6)
    assert same_mask > 0.01
    assert losses[1] > 0.01
    assert abs(losses[1] - same_mask) > 0.05 * same_mask


def test_the_reference_gradient_of_agem_has_its_own_dropout_mask() -> None:
    """The memory has the images of the batch with another label, so the two gradients disagree."""
    stream = divided("task")
    agem, naive = (learner(h, stream, model=DROPPING, tx=optax.sgd(1.0)) for h in (AGEM, NaiveHParams()))
    x, n = stream.tasks[1].train.take(np.arange(12)).x, 12
    empty = agem.state.memory
    memory = Memory(empty.x.at[:n].set(x), empty.y.at[:n].set(3), empty.t.at[:n].set(1), None)
    position = agem.state.position.at[0].set(1)
    step_plan = StepPlan(np.full(n, 150, np.int32), np.arange(n, dtype=np.int32)[None], position)
    bare_step, step = (jax.jit(made.algorithm.train_step) for made in (naive, agem))

    def gradient(ts: Any) -> FloatArray:
        parts = [(array - flat(ts.params)[k]).ravel() for k, array in naive.weights().items()]
        return np.concatenate(parts).astype(np.float64)

    def batch(y: int, plan: Any = ()) -> Batch:
        return Batch(x, np.full(n, y), np.full(n, 1), plan)

    g, r = (gradient(bare_step(naive.ts, naive.state, batch(y))[0]) for y in (2, 3))
    projected = gradient(step(agem.ts, agem.state._replace(memory=memory), batch(2, step_plan))[0])
    share = (g @ r) / (r @ r)
    assert share < -0.1
    assert np.abs(projected - g).max() > 1e-3
    assert np.abs(projected - (g - share * r)).max() > 1e-3  # r has the mask of the batch


@pytest.mark.parametrize("hparams", [SI, AGEM], ids=lambda hparams: hparams.name)
def test_dropout_changes_the_weights_of_each_method(hparams: AlgorithmHParams) -> None:
    ends = []
    for model in (DROPPING, MLP((12,))):
        made = learner(hparams, model=model, tx=sgd())
        for task in rotated().tasks[:2]:
            made.fit_task(task, SILENT)
        ends.append(made.weights())
    assert all(np.isfinite(array).all() for array in ends[0].values())
    assert not same(*ends)
