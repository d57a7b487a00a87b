"""Coresets, samples that are set aside before training: task k has the slots k * N to k * N + N - 1.

They come with the task (`Task.coreset`, from `hparams.training_tasks`) and never change.

Mirror: sequel_lightning/coresets.py
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.training.train_state import TrainState

from sequel_core.algorithms.kcl import KCLHParams
from sequel_core.stream.task import Batch, Task
from sequel_flax import bundle
from sequel_flax.boundaries import StartPlan
from sequel_flax.bundle import State
from sequel_flax.replay import Memory, write


def coreset_of(memory: Memory, k: Any, size: int) -> tuple[jax.Array, jax.Array]:
    """Return images `[N, ...]` and labels `[N]` of the coreset of task k."""
    x, y = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, k * size, size), (memory.x, memory.y))
    return x, y


def with_coreset(memory: Memory, k: Any, x: Any, y: Any) -> Memory:
    """Return the memory with the coreset of task k, images `[N, ...]` and labels `[N]`."""
    slots = k * len(y) + jnp.arange(len(y))
    return write(memory, slots, Batch(x, y, jnp.full(len(y), k)), None)


def plan_start(state: State, task: Task, hparams: KCLHParams) -> StartPlan:
    """Return the index of a task and its coreset.

    Raises:
        ValueError: the task has no coreset.
    """
    x, y, _ = hparams.coreset(task)
    return bundle.plan_start(state, task)._replace(samples=(x, y.astype(np.int32)))


def apply_start(
    ts: TrainState, state: State, plan: StartPlan, hparams: KCLHParams
) -> tuple[TrainState, State]:
    """Begin a task and store its coreset in `state.memory.coreset`.

    Raises:
        ValueError: the images of the coreset have another dtype than the spec says.
    """
    x, y = plan.samples
    ts, state = bundle.apply_start(ts, state, plan, hparams)
    memory = state.memory.coreset
    images: Any = x
    if x.dtype == np.uint8 and jnp.issubdtype(memory.x.dtype, jnp.floating):
        images = bundle.normalise(state.stream, jnp.asarray(x))
    elif x.dtype != memory.x.dtype:
        raise ValueError(
            f"the coresets hold {memory.x.dtype} images, got {x.dtype}; "
            f"give a spec with LeafSpec(..., '{x.dtype}')"
        )
    memory = state.memory._replace(
        coreset=with_coreset(memory, plan.task, jnp.asarray(images), jnp.asarray(y))
    )
    return ts, state._replace(memory=memory)
