"""The plan: all random choices, made in NumPy outside both frameworks.

The numbers come from the counter-based generator Philox through `random_raw`: item n of a random stream is
the 64-bit word at counter n. Therefore any part of a stream can be computed on its own, in chunks of any
length, without generator state and with any NumPy version. The methods of `Generator` guarantee neither.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from sequel_core.settings import check_name
from sequel_core.stream.arrays import BoolArray, FloatArray, IntArray
from sequel_core.stream.task import AnySplit, Samples, Task
from sequel_core.stream.trees import leaves, tree_map

WORDS_PER_COUNTER = 4
CHUNK_BYTES = 1 << 22
BLOCK_NUMBERS = 4096

T = TypeVar("T")

Init = Literal["torch", "xavier", "kaiming"]
"""Distributions of initial weights; see `initial_weights`."""


def words(*key: object, count: int, start: int = 0) -> NDArray[np.uint64]:
    """Return items `start` to `start + count - 1` of the random stream named `key`, uint64 `[count]`.

    Args:
        key: the name of the stream, for example `(seed, "batches", task, epoch)`. Equal keys give equal
            streams.
        count: number of words, >= 0.
        start: index of the first word, >= 0.

    Example:
        >>> bool((words(0, "batches", count=5)[3:] == words(0, "batches", count=2, start=3)).all())
        True
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    counter, skip = divmod(start, WORDS_PER_COUNTER)
    philox = np.random.Philox(key=int.from_bytes(digest, "little"), counter=counter)
    return philox.random_raw(skip + count)[skip:]


def uniform(*key: object, count: int, start: int = 0) -> FloatArray:
    """Return floats in [0, 1) with 53 random bits, float64 `[count]`; see `words`."""
    return (words(*key, count=count, start=start) >> np.uint64(11)) * np.float64(2.0**-53)


class Uniforms:
    """The numbers of `uniform` for one key, computed in blocks so that reading a few is cheap."""

    def __init__(self, *key: object) -> None:
        """Set the key of the random stream; see `words`."""
        self._key = key
        self._start = 0
        self._block: list[float] = []

    def take(self, start: int, count: int) -> list[float]:
        """Return items `start` to `start + count - 1`."""
        first = start - self._start
        if first < 0 or first + count > len(self._block):
            self._block = uniform(*self._key, count=max(count, BLOCK_NUMBERS), start=start).tolist()
            self._start, first = start, 0
        return self._block[first : first + count]


def normal(*key: object, count: int) -> FloatArray:
    """Return standard normal numbers, float64 `[count]` (Box & Muller 1958); see `words`."""
    pairs = -(-count // 2)
    u = uniform(*key, count=2 * pairs)
    radius, angle = np.sqrt(-2.0 * np.log1p(-u[:pairs])), 2.0 * np.pi * u[pairs:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]


def permutation(*key: object, count: int) -> IntArray:
    """Return a uniform random order of `0..count-1`, int64 `[count]`; see `words`."""
    return np.argsort(words(*key, count=count), kind="stable").astype(np.int64)


def check_batch_size(task: int, num_samples: int, batch_size: int, drop_last: bool = True) -> None:
    """Raise ValueError if the batches of a task are dropped because there is no whole one."""
    if drop_last and batch_size > num_samples:
        raise ValueError(
            f"batch_size must be <= the samples of a task, got {batch_size} with {num_samples} training "
            f"samples in task {task}; lower batch_size, raise subset or set drop_last=false"
        )


def steps_per_epoch(num_samples: int, batch_size: int, drop_last: bool = True) -> int:
    """Return the number of batches of an epoch; without `drop_last` the last one may be incomplete."""
    return num_samples // batch_size if drop_last else -(-num_samples // batch_size)


def epoch_batches(seed: int, task: int, epoch: int, num_samples: int, batch_size: int) -> IntArray:
    """Return the batches of one epoch as positions in the training split, int64 `[steps, batch_size]`.

    Each epoch has a new random order. The incomplete last batch is dropped.

    Raises:
        ValueError: the split is smaller than one batch.
    """
    check_batch_size(task, num_samples, batch_size)
    steps = num_samples // batch_size
    order = permutation(seed, "batches", task, epoch, count=num_samples)
    return order[: steps * batch_size].reshape(steps, batch_size)


def training_batches(
    seed: int, task: int, epoch: int, split: AnySplit, batch_size: int, drop_last: bool = True, start: int = 0
) -> Iterator[Samples]:
    """Yield the batches of one epoch in chunks, from step `start` on; see `epoch_batches`.

    Yields:
        Samples `[steps, batch_size, ...]`; without `drop_last` the incomplete last batch is a chunk of its
        own, `[1, rest, ...]`.
    """
    rest = 0 if drop_last else len(split) % batch_size
    if rest < len(split):
        yield from take_in_chunks(split, epoch_batches(seed, task, epoch, len(split), batch_size)[start:])
    if rest:
        order = permutation(seed, "batches", task, epoch, count=len(split))
        yield from take_in_chunks(split, order[None, -rest:])


def consolidation_batches(seed: int, task: Task, batch_size: int) -> Iterator[Samples]:
    """Yield the training samples of a task once, in the random order used for consolidation (Fisher, ...).

    The last batch may be incomplete.
    """
    order = permutation(seed, "consolidation", task.index, count=len(task.train))
    for start in range(0, len(order), batch_size):
        yield task.train.take(order[start : start + batch_size])


def evaluation_batches(split: AnySplit, batch_size: int) -> Iterator[tuple[Samples, BoolArray]]:
    """Yield batches of equal size, in order, and which of their samples are valid, bool `[batch_size]`.

    The last batch is padded with copies of its last sample, which are not valid.
    """

    def take(start: int) -> tuple[Samples, BoolArray]:
        positions = np.arange(start, start + batch_size)
        valid = positions < len(split)
        return split.take(np.minimum(positions, len(split) - 1)), valid

    return one_ahead(take, range(0, len(split), batch_size))


def take_in_chunks(split: AnySplit, positions: IntArray) -> Iterator[Samples]:
    """Yield the samples at positions `[n, ...]` in chunks along the first axis.

    A pixel map then processes many images at once.

    Yields:
        Samples whose leading axes are those of the chunk, `[rows, ...]`.
    """
    sizes = [int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize for leaf in leaves(split.x_spec)]
    per_row = int(np.prod(positions.shape[1:], dtype=np.int64)) * sum(sizes)
    rows = max(1, CHUNK_BYTES // max(1, per_row))

    def take(start: int) -> Samples:
        block = positions[start : start + rows]
        return Samples(
            *(
                tree_map(lambda a: a.reshape(*block.shape, *a.shape[1:]), part)
                for part in split.take(block.reshape(-1))
            )
        )

    return one_ahead(take, range(0, len(positions), rows))


def one_ahead(take: Callable[[int], T], starts: range) -> Iterator[T]:
    """Yield `take(start)` for every start, and compute the next value in a thread meanwhile.

    NumPy releases the interpreter lock while it gathers and maps pixels.
    """
    with ThreadPoolExecutor(1) as pool:
        following = None
        for start in starts:
            current, following = following, pool.submit(take, start)
            if current is not None:
                yield current.result()
        if following is not None:
            yield following.result()


def check_built_in(init: Init, built_in: bool) -> None:
    """Raise ValueError if initial weights are chosen for a network that is not built in."""
    if init != "torch" and not built_in:
        raise ValueError(f"init={init} is for built-in networks; drop it and initialise your own network")


def initial_weights(
    seed: int, path: str, shape: tuple[int, ...], fan_in: int, init: Init = "torch"
) -> FloatArray:
    """Return the initial values of one array of a built-in backbone.

    They are drawn from U(-b, b):

    - `torch`: b = 1 / sqrt(fan_in) for kernels and biases, as in torch's layers;
    - `xavier` (Glorot & Bengio 2010): b = sqrt(6 / (fan_in + fan_out)), biases are 0;
    - `kaiming` (He et al. 2015): b = sqrt(6 / fan_in), biases are 0.

    Args:
        seed: of the run.
        path: the array's name in the canonical layout, for example `dense_0/kernel`.
        shape: in the canonical layout (Flax's: `[in, out]`, `[H, W, in, out]`).
        fan_in: inputs of one output unit; biases use their kernel's.
        init: the distribution.

    Returns:
        float64 of the given shape.

    Raises:
        ValueError: init is unknown.
    """
    check_name("init", init, get_args(Init))
    bound = float(1.0 / np.sqrt(fan_in))
    if init != "torch":
        if len(shape) == 1:
            return np.zeros(shape)
        fan_out = int(np.prod(shape)) // shape[-2]
        bound = float(np.sqrt(6.0 / (fan_in + fan_out if init == "xavier" else fan_in)))
    draws = uniform(seed, "initial weights", path, count=int(np.prod(shape, dtype=np.int64)))
    return ((2.0 * draws - 1.0) * bound).reshape(shape)
