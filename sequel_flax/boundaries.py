"""The start and the end of a task as a part on the host, which decides, and a pure function of arrays.

    plan = algorithm.plan_start(state, task)                 # on the host: NumPy arrays
    ts, state = jax.jit(algorithm.apply_start)(ts, state, plan)

Many seeds at once: each has a plan of its own, and they are stacked; see `stack_plans`.

    plans = [algorithm.plan_end(of_seed(s, state), batches[s]) for s, algorithm in enumerate(algorithms)]
    ts, state = jax.jit(jax.vmap(algorithms[0].apply_end))(ts, state, stack_plans(plans))
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sequel_core.stream.task import Batch


class StartPlan(NamedTuple):
    """What a method needs to know of a task that begins."""

    task: Any  # its index, int32 ()
    samples: Any = ()  # that the task sets aside: images [N, ...] and labels [N]; () without


def stack_plans(plans: Sequence[Any]) -> Any:
    """Return the plans of several seeds as one, each array with a leading axis for the seeds.

    Arrays of different lengths are padded at their ends, signed integers with -1 and others with 0: samples
    with t = -1 do not count.

    Args:
        plans: of `plan_start`, or of `plan_end`; at least one.
    """

    def stacked(*leaves: Any) -> Any:
        arrays = [np.asarray(leaf) for leaf in leaves]
        shape = tuple(map(max, zip(*(a.shape for a in arrays), strict=True)))
        found = np.full((len(arrays), *shape), -1 if arrays[0].dtype.kind == "i" else 0, arrays[0].dtype)
        if not shape:
            return np.stack(arrays)
        for k, array in enumerate(arrays):
            part = tuple(slice(n) for n in array.shape)
            found[k][part] = array
        return found

    return jax.tree.map(stacked, *plans)


def collected(batches: Iterable[Batch], samples: int | None = None) -> Batch:
    """Return batches as one of NumPy arrays `[n, B, ...]`; the last one is padded with samples of t = -1.

    Args:
        batches: of samples, each sample once.
        samples: the first so many; None for all.

    Raises:
        ValueError: there is no sample.
    """
    found: list[Batch] = []
    count = 0
    for batch in given(batches):
        wanted = len(batch.y) if samples is None else min(len(batch.y), samples - count)
        found.append(Batch(*(np.asarray(a)[:wanted] for a in batch[:3])))
        count += wanted
        if count == samples:
            break
    stacked = stack_plans(found)
    return Batch(stacked.x, np.maximum(stacked.y, 0), stacked.t)


def given(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Yield the batches that the end of a task reads.

    Raises:
        ValueError: on reading, there is none, or one batch is given in place of several.
    """
    if isinstance(batches, Batch):
        raise ValueError("end_task needs batches of the task's samples, got a single Batch; give [batch]")
    count = 0
    for batch in batches:
        count += len(batch.y)
        yield batch
    if not count:
        raise ValueError(
            "the end of a task needs its samples, got no batch; give the task's batches again: a generator "
            "can be read only once, so make a new one, or give a list"
        )


def is_traced(tree: Any) -> bool:
    """Return whether a value is only known within a compiled function."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def select(flag: Any, new: Any, old: Any) -> Any:
    """Return one of two trees of the same structure, in the dtypes of `old`; the flag may be traced."""
    return jax.tree.map(lambda a, b: jnp.where(flag, a, b), new, old)


def repeated(count: Any, body: Callable[[Any, Any], Any], carry: Any) -> Any:
    """Return the carry after `body(k, carry)` for k = 0 to count - 1.

    Each round is dispatched alone unless the count is traced: on a CPU, convolutions are slow within loops.
    """
    if is_traced(count):
        return jax.lax.fori_loop(0, count, body, carry)
    for k in range(int(count)):
        carry = body(k, carry)
    return carry


def on_host(function: Callable[..., Any], like: Any, *args: Any) -> Any:
    """Return what a NumPy function returns, in the shapes and dtypes of `like`, also while tracing."""

    def call(*arrays: Any) -> Any:
        found = function(*jax.tree.map(np.asarray, arrays))
        return jax.tree.map(lambda a, b: np.asarray(a, b.dtype), found, like)

    like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), like)
    if is_traced(args):
        return jax.pure_callback(call, like, *args, vmap_method="sequential")
    return jax.tree.map(jnp.array, call(*args))
