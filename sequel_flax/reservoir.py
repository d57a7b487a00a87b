"""A reservoir of samples as pure functions: `init`, `add` and `sample`, for your own training loops.

    memory = reservoir.init(batch, size=500)
    for batch in stream:
        key, writing, reading = jax.random.split(key, 3)
        replayed, valid = reservoir.sample(memory, reading, 10)
        ...                                                   # a step on the batch and on the valid samples
        memory = reservoir.add(memory, batch, writing)

A batch is any tree of arrays `[B, ...]`. All functions can be compiled, mapped and scanned. The methods of
this package keep samples by the plan instead, so that both frameworks keep the same ones.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Reservoir(NamedTuple):
    """Samples in M slots.

    Args:
        items: A tree of arrays `[M, ...]`.
        seen: The number of samples seen, int32 ().

    Example:
        >>> memory = init({"x": jnp.ones((4, 3))}, size=10)
        >>> memory.items["x"].shape, int(memory.seen)
        ((10, 3), 0)
    """

    items: Any
    seen: jax.Array


def init(batch: Any, size: int) -> Reservoir:
    """Return an empty reservoir.

    Args:
        batch: An example, a tree of arrays `[B, ...]`; only shapes and dtypes are used.
        size: The number M of slots, >= 1.

    Returns:
        The reservoir.

    Raises:
        ValueError: The size is below 1.

    Example:
        >>> init(jnp.zeros((4, 28, 28, 1), jnp.uint8), size=5).items.shape
        (5, 28, 28, 1)
    """
    if size < 1:
        raise ValueError(f"size must be >= 1, got {size}")
    items = jax.tree.map(lambda a: jnp.zeros((size, *jnp.shape(a)[1:]), jnp.result_type(a)), batch)
    return Reservoir(items, jnp.zeros((), jnp.int32))


def add(memory: Reservoir, batch: Any, key: jax.Array) -> Reservoir:
    """Return the reservoir after a batch: each of n samples seen is kept with probability M / n.

    Args:
        memory: The reservoir.
        batch: A tree of arrays `[B, ...]`.
        key: A random key, used once.

    Returns:
        The reservoir.

    Source: Vitter 1985, algorithm R.

    Example:
        >>> memory = add(init(jnp.zeros(3), size=4), jnp.array([1.0, 2.0, 3.0]), jax.random.key(0))
        >>> memory.items.tolist(), int(memory.seen)
        ([1.0, 2.0, 3.0, 0.0], 3)
    """
    size, count = _sizes(memory, batch)
    before = memory.seen + jnp.arange(count)  # samples seen before each of the batch
    drawn = jnp.floor(jax.random.uniform(key, (count,)) * (before + 1)).astype(jnp.int32)
    slots = jnp.where(before < size, before, drawn)
    later = jnp.triu(slots[:, None] == slots[None], k=1).any(1)  # the slot is overwritten in the same call
    slots = jnp.where(later, size, slots)
    items = jax.tree.map(
        lambda a, b: a.at[slots].set(jnp.asarray(b, a.dtype), mode="drop"), memory.items, batch
    )
    return Reservoir(items, memory.seen + count)


def sample(memory: Reservoir, key: jax.Array, count: int) -> tuple[Any, jax.Array]:
    """Return samples drawn without replacement.

    Args:
        memory: The reservoir.
        key: A random key, used once.
        count: The number of samples to draw, from 1 to M.

    Returns:
        A tree of arrays `[count, ...]`, and which of these samples are valid, bool `[count]`: fewer than
        `count` if the reservoir holds fewer, none if it is empty.

    Raises:
        ValueError: The count is out of its range.

    Example:
        >>> memory = add(init(jnp.zeros(3), size=4), jnp.array([1.0, 2.0, 3.0]), jax.random.key(0))
        >>> items, valid = sample(memory, jax.random.key(1), 4)
        >>> sorted(items[valid].tolist())
        [1.0, 2.0, 3.0]
    """
    size, _ = _sizes(memory, memory.items)
    if not 1 <= count <= size:
        raise ValueError(f"count must be from 1 to the {size} slots, got {count}")
    held = jnp.minimum(memory.seen, size)
    order = jnp.where(jnp.arange(size) < held, jax.random.uniform(key, (size,)), 2.0)
    slots = jnp.argsort(order)[:count]
    return jax.tree.map(lambda a: a[slots], memory.items), jnp.arange(count) < held


def _sizes(memory: Reservoir, batch: Any) -> tuple[int, int]:
    return len(jax.tree.leaves(memory.items)[0]), len(jax.tree.leaves(batch)[0])
