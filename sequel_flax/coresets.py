"""Samples that a task sets aside before it is trained on: slots k * N to k * N + N - 1 hold those of task k.

They come with the task (`Task.coreset`, from `hparams.training_tasks`) and never change.

Mirror: sequel_lightning/coresets.py
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.training.train_state import TrainState

from sequel_core.hparams import KCLHParams
from sequel_core.task import Batch, Task
from sequel_flax import bundle
from sequel_flax.bundle import State
from sequel_flax.replay import Memory, store


def held(memory: Memory, k: Any, size: int) -> tuple[jax.Array, jax.Array]:
    """Return images `[N, ...]` and labels `[N]` of the coreset of task k."""
    x, y = (jax.lax.dynamic_slice_in_dim(a, k * size, size) for a in (memory.x, memory.y))
    return x, y


def keep(memory: Memory, k: int, x: Any, y: Any) -> Memory:
    """Return the memory with the coreset of task k, images `[N, ...]` and labels `[N]`."""
    slots = k * len(y) + np.arange(len(y))
    return store(memory, jnp.asarray(slots), Batch(x, y, np.full(len(y), k)), memory.y)


def start_task(ts: TrainState, state: State, task: Task, hparams: KCLHParams) -> tuple[TrainState, State]:
    """Begin a task and keep its coreset in `state.memory.coreset`.

    Raises:
        ValueError: the task has no coreset, or one of images of another kind than the spec says.
    """
    x, y, _ = hparams.coreset(task)
    ts, state = bundle.start_task(ts, state, task, hparams)
    memory = state.memory.coreset
    images: Any = x
    if x.dtype == np.uint8 and jnp.issubdtype(memory.x.dtype, jnp.floating):
        images = bundle.normalise(state.stream, jnp.asarray(x))
    elif x.dtype != memory.x.dtype:
        raise ValueError(
            f"the coresets hold {memory.x.dtype} images, got {x.dtype}; "
            f"give spec._replace(image_dtype='{x.dtype}')"
        )
    memory = state.memory._replace(coreset=keep(memory, task.index, images, y))
    return ts, state._replace(memory=memory)
