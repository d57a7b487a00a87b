"""iCaRL in user-defined loops: exemplars, float images, networks, and donated buffers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from sequel_core.algorithms.icarl import ICaRLHParams
from sequel_core.stream.task import Batch
from sequel_core.stream.trees import LeafSpec
from sequel_flax import ALGORITHMS, MLP, FlaxLearner
from sequel_flax.replay import stored_samples
from tests.flax.parts import ICARL, SILENT, Layered, Net, batches, divided, learner, rotated, settings, sgd

TWENTY = ICaRLHParams(mem_size=20)


def trained(num_tasks: int = 2, model: nn.Module | None = None) -> FlaxLearner:
    made = learner(TWENTY, divided("class"), model=model)
    for task in divided("class").tasks[:num_tasks]:
        made.fit_task(task, SILENT)
    return made


def test_shapes_do_not_change_and_no_buffer_is_shared() -> None:
    """A buffer in both the train state and the state would be donated twice."""
    before, made = learner(TWENTY, divided("class")), trained()
    for a, b in zip(jax.tree.leaves(before.state), jax.tree.leaves(made.state), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    leaves = [leaf for leaf in jax.tree.leaves((made.ts, made.state)) if leaf.size > 1]
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)


def test_the_exemplars_are_appended_to_the_samples_of_the_task() -> None:
    made, task = trained(1), divided("class").tasks[1]
    split = made.algorithm.training_split(made.state, task.train)
    samples, exemplars = task.train.take(np.arange(len(task.train))), made.memory_samples()
    for joined, a, b in zip(split.take(np.arange(len(split))), samples, exemplars, strict=True):
        np.testing.assert_array_equal(joined, np.concatenate([a, b]))


def test_float_images_in_a_plain_loop() -> None:
    """The exemplars are the same, stored as floats. The loop does not append them."""
    stream, norm = divided("class"), divided("class").normalisation

    def floats(x: Any) -> Any:
        return ((x / 255 - norm.mean[0]) / norm.std[0]).astype(np.float32)

    ends = []
    for as_floats in (False, True):
        spec = (
            stream.spec._replace(x=LeafSpec(stream.spec.image_shape, "float32")) if as_floats else stream.spec
        )
        made = learner(TWENTY, stream)
        ts, state = made.ts, made.algorithm.init(made.ts, spec)
        for task in stream.tasks[:2]:
            parts = [b._replace(x=floats(b.x) if as_floats else b.x) for b in batches(task, settings())]
            ts, state = made.algorithm.start_task(ts, state, task)
            for batch in parts:
                ts, state, _ = jax.jit(made.algorithm.train_step)(ts, state, batch)
            ts, state = made.algorithm.end_task(ts, state, parts)
        ends.append(stored_samples(state.memory.exemplars))
    plain, held = ends
    assert held.x.dtype == np.float32
    np.testing.assert_array_equal(held.x, floats(plain.x))
    np.testing.assert_array_equal(held.y, plain.y)
    np.testing.assert_array_equal(held.t, plain.t)


def test_images_of_another_dtype_raise_while_the_step_is_traced() -> None:
    made = learner(ICARL)
    x, y, t, _ = next(iter(batches(rotated().tasks[0], settings())))
    with pytest.raises(
        ValueError, match=r"x of a batch must be uint8 .* got float32 .* give a spec with LeafSpec"
    ):
        jax.eval_shape(made.algorithm.train_step, made.ts, made.state, Batch(x.astype(np.float32), y, t))


def test_features_and_old_network_are_in_evaluation_mode() -> None:
    """Predictions are the same each time, although half of the units are dropped in training."""
    made = trained(model=MLP((12,), dropout=0.5))
    x = divided("class").tasks[0].test.take(np.arange(20)).x
    t = jnp.zeros(20, jnp.int32)
    first, again = (made.algorithm.predict(made.ts, made.state, jnp.asarray(x), t) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    later = made.ts.replace(step=made.ts.step + 1)  # dropout would have another mask
    np.testing.assert_array_equal(made.algorithm.predict(later, made.state, jnp.asarray(x), t), first)


def test_logits_of_later_classes_are_the_lowest_number() -> None:
    made = trained()
    x = divided("class").tasks[0].test.take(np.arange(5)).x
    logits = made.algorithm.predict(made.ts, made.state, jnp.asarray(x), jnp.zeros(5, jnp.int32))
    known = divided("class").mask[:2].any(axis=0)
    np.testing.assert_array_equal(made.state.memory.has_mean, known)
    assert (logits[:, ~known] == np.finfo(np.float32).min).all()
    assert ((logits[:, known] <= 0) & (logits[:, known] >= -4)).all()


def test_a_network_without_features_and_a_small_memory_raise() -> None:
    with pytest.raises(ValueError, match=r"icarl needs a network with a method features\(x, train\)"):
        learner(ICARL, model=Net())
    made = learner(ICARL, model=Layered())
    with pytest.raises(
        ValueError, match="mem_size must be >= 30, one exemplar of each class of each task, got 29"
    ):
        ALGORITHMS["icarl"](ICaRLHParams(mem_size=29)).init(made.ts, made.spec)


def test_the_optimizer_changes_every_parameter() -> None:
    ends = [trained(1).weights(), learner(TWENTY, divided("class"), tx=sgd(0.0)).weights()]
    assert all(not np.array_equal(ends[0][k], ends[1][k]) for k in ends[0])
