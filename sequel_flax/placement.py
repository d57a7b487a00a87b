"""A replay memory in host memory, for the setting `mem_device=cpu`.

A compiled step cannot read from two devices. So the samples that a step reads or writes are copied to the
device as a small memory, the step is taken with it, and what it wrote is copied back.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.training.train_state import TrainState

from sequel_core.stream.augmentation import AugmentedPlan, method_plan
from sequel_flax.boundaries import is_traced
from sequel_flax.bundle import Algorithm, AnyBatch, AnyStep, State, StepOutputs, to_batch

if TYPE_CHECKING:
    from sequel_flax.replay import Memory


class Window(NamedTuple):
    """The samples of some slots of a memory, and these slots in it."""

    memory: Memory  # N slots
    slots: Any  # for each array of slots of the large memory, the slots in this one; N stands for none


def keeps_on_host(algorithm: Algorithm) -> bool:
    """Return whether the memory of an algorithm stays in host memory."""
    return getattr(algorithm.hparams, "mem_device", "auto") == "cpu"


def placed(algorithm: Algorithm) -> Algorithm:
    """Return the algorithm, whose memory stays in host memory with `mem_device=cpu`.

    Its `train_step` then raises `ValueError` in `jax.jit`, because it compiles its parts itself. It donates
    the memory: the state before a step cannot be used after it.

    Args:
        algorithm: An algorithm with a `Memory` in its state.
    """
    if not keeps_on_host(algorithm):
        return algorithm
    step: AnyStep = jax.jit(algorithm.train_step)

    def train_step(ts: TrainState, state: State, batch: AnyBatch) -> tuple[TrainState, State, StepOutputs]:
        batch = to_batch(batch, state, algorithm.objective)
        memory, plan = memory_of(state), method_plan(batch)
        if is_traced(memory.t):
            raise ValueError(
                "mem_device=cpu copies samples between the host and the device at each step, so train_step "
                "cannot be traced; call it without jax.jit, which it applies itself, or use mem_device=auto"
            )
        if not hasattr(plan, "reads"):
            return step(ts, state, batch)  # raises ValueError
        part, (write, reads) = window(memory, plan.write, plan.reads)
        in_part = plan._replace(write=write, reads=reads)
        augmented = isinstance(batch.plan, AugmentedPlan)
        batch = batch._replace(plan=batch.plan._replace(plan=in_part) if augmented else in_part)
        ts, after, outputs = step(ts, with_memory(state, part), batch)
        rows = jax.device_get(_rows(memory_of(after), write))
        return ts, with_memory(after, _written(memory, np.asarray(plan.write), rows)), outputs

    def apply_end(ts: TrainState, state: State, plan: Any) -> tuple[TrainState, State]:
        if not hasattr(plan, "slots"):
            return algorithm.apply_end(ts, state, plan)
        memory = memory_of(state)
        part, (slots,) = window(memory, plan.slots)
        on_device: Memory = jax.tree.map(jnp.asarray, part)
        ts, after = algorithm.apply_end(ts, with_memory(state, on_device), plan._replace(slots=slots))
        return ts, with_memory(after, memory)

    def end_task(ts: TrainState, state: State, batches: Any) -> tuple[TrainState, State]:
        return apply_end(ts, state, algorithm.plan_end(state, batches))

    return algorithm._replace(train_step=train_step, apply_end=apply_end, end_task=end_task)


def window(memory: Memory, *slots: Any) -> Window:
    """Return the samples of some slots of a memory as a small memory of NumPy arrays.

    Args:
        memory: M slots.
        slots: Arrays of slots, int; those outside 0..M-1 stand for none.
    """
    size = len(memory.t)
    arrays = [np.asarray(a) for a in slots]
    used = np.unique(np.concatenate([a.ravel() for a in arrays]))
    used = used[(used >= 0) & (used < size)]
    count = min(size, sum(a.size for a in arrays))  # always the same for a step, which is compiled once
    chosen = np.zeros(count, np.int32)
    chosen[: len(used)] = used
    inside = [(a >= 0) & (a < size) for a in arrays]
    renumbered = [
        np.where(keep, np.searchsorted(used, a), count).astype(np.int32)
        for keep, a in zip(inside, arrays, strict=True)
    ]
    return Window(jax.device_get(_rows(memory, chosen)), renumbered)


def memory_of(state: State) -> Memory:
    """Return the memory of samples: the part of the method in the state, or the field `memory` of it."""
    memory: Memory = getattr(state.memory, "memory", state.memory)
    return memory


def with_memory(state: State, memory: Memory) -> State:
    """Return the state with another memory."""
    part = state.memory
    return state._replace(memory=part._replace(memory=memory) if hasattr(part, "memory") else memory)


@jax.jit
def _rows(memory: Memory, slots: Any) -> Memory:
    rows: Memory = jax.tree.map(lambda a: a.at[slots].get(mode="clip"), memory)
    return rows


@partial(jax.jit, donate_argnums=0)
def _written(memory: Memory, slots: Any, rows: Memory) -> Memory:
    written: Memory = jax.tree.map(lambda a, b: a.at[slots].set(b, mode="drop"), memory, rows)
    return written
