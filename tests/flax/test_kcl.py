"""The KCL bundle in a user's loop: what it asks for, and images of the user's own kind."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.training.train_state import TrainState

from sequel_core.stream.task import Batch
from sequel_flax import kcl
from sequel_flax.kernels import solve
from tests.flax.parts import KCL, Layered, Net, learner, own_stream, rotated, settings, sgd, user_loop


def made(model: Layered | Net) -> TrainState:
    image = jnp.zeros((1, 8, 8, 1))
    params = model.init(jax.random.key(0), image)["params"]
    ts: TrainState = TrainState.create(apply_fn=model.apply, params=params, tx=sgd())
    return ts


def test_init_says_that_parameters_are_to_be_prepared_first() -> None:
    algorithm, spec = kcl(KCL), own_stream(KCL).spec
    with pytest.raises(
        ValueError, match=r"ts = algorithm.prepare\(ts, spec\) before algorithm.init\(ts, spec\)"
    ):
        algorithm.init(made(Layered()), spec)
    state = algorithm.init(algorithm.prepare(made(Layered()), spec), spec)
    assert state.memory.coreset.x.shape == (30, 8, 8, 1)


def test_a_network_without_features_is_refused() -> None:
    with pytest.raises(ValueError, match=r"kcl needs a network with a method features\(x, train\)"):
        kcl(KCL).prepare(made(Net()), own_stream(KCL).spec)


def test_a_task_without_its_coreset_is_refused() -> None:
    model = learner(KCL, own_stream(KCL))
    task = own_stream(KCL).tasks[0]
    with pytest.raises(
        ValueError, match=r"got task 0 without one; iterate over hparams.training_tasks\(bench"
    ):
        model.algorithm.start_task(model.ts, model.state, task)
    (other, *_) = replace(KCL, core_size=20).training_tasks(rotated(3, subset=93))
    with pytest.raises(ValueError, match="must have core_size=10 samples, got 20 in task 0"):
        model.algorithm.start_task(model.ts, model.state, other)


def test_a_batch_without_a_plan_is_refused() -> None:
    model = learner(KCL, own_stream(KCL))
    batch = Batch(*own_stream(KCL).tasks[0].train.take(np.arange(8)))
    with pytest.raises(ValueError, match=r"no plan, .* give Batch\(x, y, t, planner.next\(y, t\)\)"):
        model.algorithm.train_step(model.ts, model.state, batch)


def test_weights_of_16_bits_have_a_solution() -> None:
    rows = np.random.default_rng(0).normal(size=(6, 4))
    kernel, targets = (jnp.asarray(a, jnp.bfloat16) for a in (rows @ rows.T / 4, np.eye(6)[:, :3]))
    found = solve(kernel, jnp.asarray(0.5, jnp.bfloat16), targets)
    assert found.dtype == jnp.bfloat16
    matrix = np.asarray(kernel, float) + 0.5 * np.eye(6)
    expected = np.linalg.solve(matrix, np.asarray(targets, float))
    np.testing.assert_allclose(np.asarray(found, float), expected, atol=0.04)


def test_a_users_float_images_train_as_the_streams_own() -> None:
    stream = own_stream(KCL)
    norm = stream.normalisation

    def images(x: np.ndarray) -> np.ndarray:
        return (x * norm.scale + norm.shift).astype(np.float32)

    spec = stream.spec._replace(image_dtype="float32")
    ours = user_loop(kcl(KCL), stream, settings(), sgd(0.01))
    theirs = user_loop(kcl(KCL), stream, settings(), sgd(0.01), spec=spec, images=images)
    assert theirs[1].memory.coreset.x.dtype == jnp.float32
    np.testing.assert_allclose(ours[2], theirs[2], rtol=1e-4)


def test_bases_are_new_at_every_step_and_follow_the_seed() -> None:
    planners = [learner(KCL, own_stream(KCL), settings(seed=seed), seed=seed).planner for seed in (0, 0, 1)]
    y = np.zeros((3, 8))
    several, again, other = (planner.next(y, y).starts for planner in planners)
    assert several.shape == (3, 16)
    assert several.dtype == np.int32
    np.testing.assert_array_equal(several, again)
    assert not np.array_equal(several[0], several[1])
    assert not np.array_equal(several, other)
