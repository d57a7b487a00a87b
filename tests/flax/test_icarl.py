"""iCaRL as a bundle: own loops, own images, which networks it takes, and what donation may touch."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from sequel_core.algorithms.icarl import ICaRLHParams
from sequel_core.stream.task import Batch
from sequel_flax import ALGORITHMS, MLP, FlaxLearner
from sequel_flax.replay import stored_samples
from tests.flax.parts import ICARL, SILENT, Layered, Net, batches, divided, learner, rotated, settings, sgd

TWENTY = ICaRLHParams(mem_size=20)


def learned(tasks: int = 2, model: nn.Module | None = None) -> FlaxLearner:
    made = learner(TWENTY, divided("class"), model=model)
    for task in divided("class").tasks[:tasks]:
        made.fit_task(task, SILENT)
    return made


def test_shapes_stay_and_nothing_is_shared() -> None:
    """An array that the weights and the state shared would be donated twice."""
    before, made = learner(TWENTY, divided("class")), learned()
    for a, b in zip(jax.tree.leaves(before.state), jax.tree.leaves(made.state), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    leaves = [leaf for leaf in jax.tree.leaves((made.ts, made.state)) if leaf.size > 1]
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)


def test_the_exemplars_join_the_task_behind_its_samples() -> None:
    made, task = learned(1), divided("class").tasks[1]
    split = made.algorithm.training_split(made.state, task.train)
    own, held = task.train.take(np.arange(len(task.train))), made.memory_samples()
    for found, a, b in zip(split.take(np.arange(len(split))), own, held, strict=True):
        np.testing.assert_array_equal(found, np.concatenate([a, b]))


def test_own_float_images_in_an_own_loop() -> None:
    """The exemplars are the same, held as floats; the loop joins none."""
    stream, norm = divided("class"), divided("class").normalisation

    def floats(x: Any) -> Any:
        return ((x / 255 - norm.mean[0]) / norm.std[0]).astype(np.float32)

    ends = []
    for own in (False, True):
        spec = stream.spec._replace(image_dtype="float32") if own else stream.spec
        made = learner(TWENTY, stream)
        ts, state = made.ts, made.algorithm.init(made.ts, spec)
        for task in stream.tasks[:2]:
            found = [b._replace(x=floats(b.x) if own else b.x) for b in batches(task, settings())]
            ts, state = made.algorithm.start_task(ts, state, task)
            for batch in found:
                ts, state, _ = jax.jit(made.algorithm.train_step)(ts, state, batch)
            ts, state = made.algorithm.end_task(ts, state, found)
        ends.append(stored_samples(state.memory.exemplars))
    plain, held = ends
    assert held.x.dtype == np.float32
    np.testing.assert_array_equal(held.x, floats(plain.x))
    np.testing.assert_array_equal(held.y, plain.y)
    np.testing.assert_array_equal(held.t, plain.t)


def test_images_of_another_dtype_are_refused_while_the_step_is_traced() -> None:
    made = learner(ICARL)
    x, y, t, _ = next(iter(batches(rotated().tasks[0], settings())))
    with pytest.raises(ValueError, match=r"holds uint8 images, the batch has float32; give spec._replace"):
        jax.eval_shape(made.algorithm.train_step, made.ts, made.state, Batch(x.astype(np.float32), y, t))


def test_features_and_old_network_are_in_evaluation_mode() -> None:
    """With half of the units dropped in training, the answers of one state are always the same."""
    made = learned(model=MLP((12,), dropout=0.5))
    x = divided("class").tasks[0].test.take(np.arange(20)).x
    t = jnp.zeros(20, jnp.int32)
    first, again = (made.algorithm.predict(made.ts, made.state, jnp.asarray(x), t) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    later = made.ts.replace(step=made.ts.step + 1)  # another mask, if there were one
    np.testing.assert_array_equal(made.algorithm.predict(later, made.state, jnp.asarray(x), t), first)


def test_classes_to_come_have_the_least_number() -> None:
    made = learned()
    x = divided("class").tasks[0].test.take(np.arange(5)).x
    found = made.algorithm.predict(made.ts, made.state, jnp.asarray(x), jnp.zeros(5, jnp.int32))
    known = divided("class").mask[:2].any(axis=0)
    np.testing.assert_array_equal(made.state.memory.has_mean, known)
    assert (found[:, ~known] == np.finfo(np.float32).min).all()
    assert ((found[:, known] <= 0) & (found[:, known] >= -4)).all()


def test_it_needs_a_network_with_features_and_room() -> None:
    with pytest.raises(ValueError, match=r"icarl needs a network with a method features\(x, train\)"):
        learner(ICARL, model=Net())
    made = learner(ICARL, model=Layered())
    with pytest.raises(
        ValueError, match="mem_size must be >= 30, one exemplar of each class of each task, got 29"
    ):
        ALGORITHMS["icarl"](ICaRLHParams(mem_size=29)).init(made.ts, made.spec)


def test_a_users_optimizer_trains_it() -> None:
    ends = [learned(1).weights(), learner(TWENTY, divided("class"), tx=sgd(0.0)).weights()]
    assert all(not np.array_equal(ends[0][k], ends[1][k]) for k in ends[0])
