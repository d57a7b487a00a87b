"""Task boundaries in two parts: decisions on the host, and a pure function of arrays that is traceable.

    plan = algorithm.plan_start(state, task)  # on the host: NumPy arrays
    ts, state = jax.jit(algorithm.apply_start)(ts, state, plan)

To run many seeds at once, stack their plans with `stack_plans` and map over the leading axis:

    plans = [algorithm.plan_end(states[s], batches[s]) for s, algorithm in enumerate(algorithms)]
    ts, state = jax.jit(jax.vmap(algorithms[0].apply_end))(ts, state, stack_plans(plans))
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sequel_core.stream.phase import PhaseSteps
from sequel_core.stream.task import Batch


class StartPlan(NamedTuple):
    """The part of a task that `apply_start` needs.

    Args:
        task: The index of the task, int32 `()`.
        samples: Samples that the method sets aside, inputs `[N, ...]` and labels `[N]`; () without any.
        num_steps: The number of steps of the task, int32 `()`; 0 if it is not known.

    Example:
        >>> StartPlan(np.int32(2)).samples
        ()
    """

    task: Any
    samples: Any = ()
    num_steps: Any = np.int32(0)


class SecondPhase(NamedTuple):
    """A second training phase at the end of a task, on samples that the method keeps.

    Args:
        steps: `steps(state)` returns the steps that are left, as NumPy arrays.
        start: `start(ts, state)` is called before the first of them.
        step: `step(ts, state, one)` takes one of the steps, `one`, as `train_step` does. It can be compiled.
        epochs: The number of epochs, of equal numbers of steps.

    Example:
        >>> SecondPhase(steps=len, start=max, step=min, epochs=1).steps([1, 2])
        2
    """

    steps: Callable[[Any], PhaseSteps]
    start: Callable[[Any, Any], tuple[Any, Any]]
    step: Callable[[Any, Any, PhaseSteps], tuple[Any, Any, dict[str, Any]]]
    epochs: int


class PhaseEnd(NamedTuple):
    """The plan for the end of a task that has a second phase.

    Args:
        steps: The steps of the second phase that are left.
        plan: The plan of the method for the end of the task, after the phase.

    Example:
        >>> PhaseEnd(steps=(), plan=()).plan
        ()
    """

    steps: Any
    plan: Any


def stack_plans(plans: Sequence[Any]) -> Any:
    """Stack the plans of several seeds along a new leading axis.

    Arrays of different lengths are padded at the end: signed integers with -1, others with 0. Samples with
    t = -1 do not count.

    Args:
        plans: At least one result of `plan_start`, or of `plan_end`.

    Returns:
        A plan with the structure of each.

    Example:
        >>> stack_plans([np.array([1, 2]), np.array([3])]).tolist()
        [[1, 2], [3, -1]]
    """

    def stack(*leaves: Any) -> Any:
        arrays = [np.asarray(leaf) for leaf in leaves]
        shape = tuple(map(max, zip(*(a.shape for a in arrays), strict=True)))
        padding = -1 if arrays[0].dtype.kind == "i" else 0
        stacked = np.full((len(arrays), *shape), padding, arrays[0].dtype)
        for k, array in enumerate(arrays):
            stacked[k, ...][tuple(map(slice, array.shape))] = array
        return stacked

    return jax.tree.map(stack, *plans)


def collected(batches: Iterable[Batch], samples: int | None = None) -> Batch:
    """Return batches as one batch of NumPy arrays `[n, B, ...]`.

    The last batch is padded with samples whose t is -1, and whose inputs and targets are 0.

    Args:
        batches: Batches of samples, each sample once, with plans of arrays `[B, ...]` or without plans.
        samples: The number of samples to use, from the first on; None for all.

    Raises:
        ValueError: There is no sample.

    Example:
        >>> x, y, t = np.zeros((3, 2), np.uint8), np.array([5, 6, 7]), np.array([0, 0, 0])
        >>> collected([Batch(x[:2], y[:2], t[:2]), Batch(x[2:], y[2:], t[2:])]).t.tolist()
        [[0, 0], [0, -1]]
    """
    used: list[Batch] = []
    count = 0
    for batch in given(batches):
        size = len(batch.t) if samples is None else min(len(batch.t), samples - count)
        used.append(jax.tree.map(lambda a, size=size: np.asarray(a)[:size], batch))
        count += size
        if count == samples:
            break
    stacked = stack_plans(used)
    valid = stacked.t >= 0

    def zero_padded(a: Any) -> Any:
        return np.where(valid.reshape(*valid.shape, *[1] * (a.ndim - 2)), a, np.zeros((), a.dtype))

    return Batch(*(jax.tree.map(zero_padded, part) for part in (stacked.x, stacked.y)), *stacked[2:])


def given(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Yield the batches that were passed to `end_task`.

    Args:
        batches: Batches of the task's samples.

    Raises:
        ValueError: While iterating: there is no batch, or `batches` is a single batch.

    Example:
        >>> next(given(Batch(None, None, None)))
        Traceback (most recent call last):
        ValueError: end_task needs batches of the task's samples, got a single Batch; give [batch]
    """
    if isinstance(batches, Batch | Mapping):
        raise ValueError("end_task needs batches of the task's samples, got a single Batch; give [batch]")
    count = 0
    for batch in batches:
        count += len(batch.t)
        yield batch
    if not count:
        raise ValueError(
            "the end of a task needs the task's samples, got no batch; give the task's batches again: "
            "a generator can be read only once, so make a new one, or give a list"
        )


_PER_NETWORK: list[Any] = []


def jit_per_network(function: Callable[..., Any], **options: Any) -> Any:
    """Return `jax.jit(function, **options)`, for a function of a module that takes a network as an argument.

    JAX keeps a program for each network that it was called with, and the network, too. `release_programs`
    frees them.

    Args:
        function: The function.
        **options: Options of `jax.jit`.

    Example:
        >>> double = jit_per_network(lambda x: 2 * x)
        >>> int(double(3))
        6
    """
    compiled = jax.jit(function, **options)
    _PER_NETWORK.append(compiled)
    return compiled


def release_programs() -> None:
    """Free the programs of every function of `jit_per_network`; a later call compiles again.

    Example:
        >>> double = jit_per_network(lambda x: 2 * x)
        >>> double(3), release_programs()
        (Array(6, dtype=int32, weak_type=True), None)
    """
    for compiled in _PER_NETWORK:
        compiled.clear_cache()


def is_traced(tree: Any) -> bool:
    """Return whether a tree has a leaf that is traced, so that its value is not known.

    Args:
        tree: A tree of arrays.

    Example:
        >>> is_traced(jnp.zeros(2)), bool(jax.jit(lambda x: is_traced(x))(0))
        (False, True)
    """
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def select(flag: Any, new: Any, old: Any) -> Any:
    """Return `new` if the flag is true, else `old`.

    Args:
        flag: A bool, which may be traced.
        new: A tree.
        old: A tree of the same structure.

    Example:
        >>> int(select(True, jnp.int32(1), jnp.int32(2)))
        1
    """
    return jax.tree.map(lambda a, b: jnp.where(flag, a, b), new, old)


def repeated(count: Any, body: Callable[[Any, Any], Any], carry: Any, loop: bool = False) -> Any:
    """Return the carry after `carry = body(k, carry)` for k = 0, ..., count - 1.

    If the count is not traced, each iteration is dispatched on its own, because XLA runs convolutions slowly
    in loops on a CPU.

    Args:
        count: The number of iterations, which may be traced.
        body: A function of the iteration and the carry that returns the next carry.
        carry: The initial carry.
        loop: Whether to compile a loop even if the count is not traced.

    Example:
        >>> repeated(4, lambda k, total: total + k, 0)
        6
    """
    if is_traced(count) or (loop and count):
        return jax.lax.fori_loop(0, count, body, carry)
    for k in range(int(count)):
        carry = body(k, carry)
    return carry


def on_host(function: Callable[..., Any], like: Any, *args: Any) -> Any:
    """Call a NumPy function on the host, also while tracing.

    Args:
        function: A function of NumPy arrays.
        like: A tree of arrays with the structure, shapes and dtypes of the result.
        *args: Trees of arrays.

    Returns:
        The result of the function, with the dtypes of `like`.

    Example:
        >>> jax.jit(lambda x: on_host(np.sort, x, x))(jnp.array([3, 1, 2])).tolist()
        [1, 2, 3]
    """

    def call(*arrays: Any) -> Any:
        result = function(*jax.tree.map(np.asarray, arrays))
        return jax.tree.map(lambda a, b: np.asarray(a, b.dtype), result, like)

    like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), like)
    if is_traced(args):
        return jax.pure_callback(call, like, *args, vmap_method="sequential")
    return jax.tree.map(jnp.array, call(*args))
