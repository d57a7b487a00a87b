"""KCL in user-defined loops: errors, and float images."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.training.train_state import TrainState

from sequel_core.stream.task import Batch
from sequel_core.stream.trees import LeafSpec
from sequel_flax import kcl
from sequel_flax.kernels import solve
from tests.flax.parts import KCL, Layered, Net, learner, rotated, settings, sgd, stream_for, user_loop


def train_state(model: Layered | Net) -> TrainState:
    image = jnp.zeros((1, 8, 8, 1))
    params = model.init(jax.random.key(0), image)["params"]
    ts: TrainState = TrainState.create(apply_fn=model.apply, params=params, tx=sgd())
    return ts


def test_init_without_prepare_raises() -> None:
    algorithm, spec = kcl(KCL), stream_for(KCL).spec
    with pytest.raises(
        ValueError, match=r"ts = algorithm.prepare\(ts, spec\) before algorithm.init\(ts, spec\)"
    ):
        algorithm.init(train_state(Layered()), spec)
    state = algorithm.init(algorithm.prepare(train_state(Layered()), spec), spec)
    assert state.memory.coreset.x.shape == (30, 8, 8, 1)


def test_a_network_without_features_raises() -> None:
    with pytest.raises(ValueError, match=r"kcl needs a network with a method features\(x, train\)"):
        kcl(KCL).prepare(train_state(Net()), stream_for(KCL).spec)


def test_a_task_without_its_coreset_raises() -> None:
    model = learner(KCL, stream_for(KCL))
    task = stream_for(KCL).tasks[0]
    with pytest.raises(
        ValueError, match=r"got task 0 without one; iterate over hparams.training_tasks\(bench"
    ):
        model.algorithm.start_task(model.ts, model.state, task)
    (other, *_) = replace(KCL, core_size=20).training_tasks(rotated(3, subset=93))
    with pytest.raises(ValueError, match="must have core_size=10 samples, got 20 in task 0"):
        model.algorithm.start_task(model.ts, model.state, other)


def test_a_batch_without_a_plan_raises() -> None:
    model = learner(KCL, stream_for(KCL))
    batch = Batch(*stream_for(KCL).tasks[0].train.take(np.arange(8)))
    with pytest.raises(ValueError, match=r"no plan, .* give Batch\(x, y, t, planner.next\(y, t\)\)"):
        model.algorithm.train_step(model.ts, model.state, batch)


def test_weights_of_16_bits_are_solved_for() -> None:
    rows = np.random.default_rng(0).normal(size=(6, 4))
    kernel, targets = (jnp.asarray(a, jnp.bfloat16) for a in (rows @ rows.T / 4, np.eye(6)[:, :3]))
    weights = solve(kernel, jnp.asarray(0.5, jnp.bfloat16), targets)
    assert weights.dtype == jnp.bfloat16
    matrix = np.asarray(kernel, float) + 0.5 * np.eye(6)
    expected = np.linalg.solve(matrix, np.asarray(targets, float))
    np.testing.assert_allclose(np.asarray(weights, float), expected, atol=0.04)


def test_float_images_train_like_uint8_images() -> None:
    stream = stream_for(KCL)
    norm = stream.normalisation

    def images(x: np.ndarray) -> np.ndarray:
        return (x * norm.scale + norm.shift).astype(np.float32)

    spec = stream.spec._replace(x=LeafSpec(stream.spec.image_shape, "float32"))
    expected = user_loop(kcl(KCL), stream, settings(), sgd(0.01))
    as_floats = user_loop(kcl(KCL), stream, settings(), sgd(0.01), spec=spec, images=images)
    assert as_floats[1].memory.coreset.x.dtype == jnp.float32
    np.testing.assert_allclose(expected[2], as_floats[2], rtol=1e-4)


def test_bases_differ_between_steps_and_seeds() -> None:
    planners = [learner(KCL, stream_for(KCL), settings(seed=seed), seed=seed).planner for seed in (0, 0, 1)]
    y = np.zeros((3, 8))
    several, again, other = (planner.next(y, y).starts for planner in planners)
    assert several.shape == (3, 16)
    assert several.dtype == np.int32
    np.testing.assert_array_equal(several, again)
    assert not np.array_equal(several[0], several[1])
    assert not np.array_equal(several, other)
