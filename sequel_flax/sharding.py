"""Data parallelism: each device of a mesh computes with some rows of a batch.

The axis `data` of the mesh divides the samples of a batch, and the axis `runs`, if there is one, divides many
runs at once. The train state and the state, with the memory, are replicated: each device has a copy. XLA adds
the sums over devices, so a step has the results of one device, up to rounding.

The devices may be those of several processes of `jax.distributed`. Every process makes the same plans and has
all samples on the host; it copies the rows of its own devices to them.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sequel_core.runs.learner import OneProcess
from sequel_core.runs.watch import Watch, connected
from sequel_core.stream.augmentation import AugmentedPlan, method_plan
from sequel_core.stream.phase import PhaseSteps
from sequel_core.stream.task import Batch
from sequel_flax._compat import coordinator_host

DATA, RUNS = "data", "runs"
T = TypeVar("T")


def device_mesh(devices: int | Mesh, runs: int = 1) -> Mesh | None:
    """Return the mesh of a learner.

    Args:
        devices: The number of devices, >= 1; or a mesh with the axis `data`, and perhaps `runs`.
        runs: The size of the axis `runs`, >= 1; it must divide a number of devices.

    Returns:
        A mesh whose axes XLA shards (`AxisType.Auto`); None for one device.

    Raises:
        ValueError: There are fewer devices, a mesh has other axes, `runs` does not divide the devices, or
            devices of a process of `jax.distributed` are missing.

    Example:
        >>> device_mesh(1) is None
        True
        >>> device_mesh(jax.make_mesh((1,), ("data",))).shape["data"]
        1
    """
    existing, processes = jax.device_count(), jax.process_count()
    count = devices.size if isinstance(devices, Mesh) else devices
    groups = devices.shape.get(RUNS, 1) if isinstance(devices, Mesh) else runs
    if processes > 1 and (count != existing or groups > 1):
        raise ValueError(
            f"devices must be {existing}, those of all {processes} processes of jax.distributed, without the "
            f"axis {RUNS!r}, got {devices}; use devices={existing}"
        )
    if isinstance(devices, Mesh):
        if DATA not in devices.shape or devices.shape.keys() - {DATA, RUNS}:
            raise ValueError(
                f"mesh must have the axis {DATA!r}, and may have {RUNS!r}, got the axes "
                f"{', '.join(map(repr, devices.axis_names))}; rename them: jax.make_mesh((4,), ('{DATA}',))"
            )
        return Mesh(devices.devices, devices.axis_names)
    if not 1 <= devices <= existing:
        raise ValueError(
            f"devices must be from 1 to {existing}, the number of {jax.default_backend()} devices that JAX "
            f"has, got {devices}; lower it, or for a test on a CPU set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={devices}"
        )
    if runs < 1 or devices % runs:
        raise ValueError(f"runs must be a divisor of devices={devices}, got {runs}; use 1 or {devices}")
    if devices == 1:
        return None
    return Mesh(np.array(jax.devices()[:devices]).reshape(runs, -1), (RUNS, DATA))


class JaxProcesses(OneProcess):
    """The processes of `jax.distributed`, which do the same run; without it, this process.

    Example:
        >>> JaxProcesses().agree("results")
        'results'
    """

    @property
    def main_process(self) -> bool:
        """Whether this process records the run; see `sequel_core.runs.learner.OneProcess`."""
        return jax.process_index() == 0

    def launch(self, function: Callable[[], T]) -> T:
        """Call a function that all processes call, and notice if one of them ends.

        See `sequel_core.runs.learner.OneProcess` and `sequel_core.runs.watch`.
        """
        index, count, host = jax.process_index(), jax.process_count(), coordinator_host()
        if count == 1 or host is None:
            return function()
        with Watch(index, connected(index, count, host, self.agree), jax.distributed.shutdown) as watch:
            try:
                return function()
            except jax.errors.JaxRuntimeError:  # perhaps because a process was lost
                watch.settle()
                raise

    def agree(self, value: T | None) -> T:
        """Return the value of the main process; see `sequel_core.runs.learner.OneProcess`."""
        if jax.process_count() == 1:
            return cast(T, value)
        content = np.frombuffer(pickle.dumps(value), np.uint8)
        size = int(of_main_process(np.int32(content.size)))
        agreed: T = pickle.loads(of_main_process(np.resize(content, size)).tobytes())
        return agreed

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes; see `sequel_core.runs.learner.OneProcess`."""
        if jax.process_count() == 1:
            return [value]
        content = np.frombuffer(pickle.dumps(value), np.uint8)
        sizes = multihost_utils.process_allgather(np.int32(content.size))
        contents = multihost_utils.process_allgather(np.resize(content, sizes.max()))
        return [pickle.loads(row[:size].tobytes()) for row, size in zip(contents, sizes, strict=True)]


def check_batch_size(mesh: Mesh | None, batch_size: int) -> None:
    """Check that the batches of a run can be divided among the devices.

    Args:
        mesh: The mesh; None for one device.
        batch_size: The number of samples of a batch, on all devices together.

    Raises:
        ValueError: The number of devices does not divide the batch size.

    Example:
        >>> check_batch_size(None, 10)
    """
    count = 1 if mesh is None else mesh.shape[DATA]
    if batch_size % count:
        below = batch_size // count * count
        sizes = f"{below} or {below + count}" if below else f"{count}"
        divisor = math.gcd(batch_size, count)
        raise ValueError(
            f"batch_size must be a multiple of {count}, the number of devices that share a batch, got "
            f"{batch_size}; use {sizes}, or {divisor} device{'s' if divisor > 1 else ''}"
        )


def copies(mesh: Mesh | None) -> NamedSharding | None:
    """Return the sharding of an array that each device has a copy of; None for one device.

    Args:
        mesh: The mesh; None for one device.
    """
    return None if mesh is None else NamedSharding(mesh, PartitionSpec())


def of_runs(mesh: Mesh | None, width: int) -> NamedSharding | None:
    """Return the sharding of stacked arrays of runs `[width, ...]`, divided among the devices by run.

    Args:
        mesh: The mesh; None for one device, which returns None.
        width: The number of runs. If the axis `runs` does not divide it, each device has a copy.
    """
    return None if mesh is None else _fitting((width,), mesh, PartitionSpec(RUNS))


def replicated(tree: Any, mesh: Mesh | None) -> Any:
    """Return a tree whose arrays each device has a copy of.

    Args:
        tree: A tree of arrays.
        mesh: The mesh; None for one device, which returns the tree itself.
    """
    sharding = copies(mesh)
    return tree if sharding is None else jax.tree.map(lambda a: _placed(a, sharding), tree)


def one_copy(tree: Any) -> Any:
    """Return a replicated tree with the copies of the first device.

    Args:
        tree: A tree of arrays, which may also be on one device.
    """
    return jax.tree.map(lambda a: a.addressable_data(0) if isinstance(a, jax.Array) else a, tree)


def of_main_process(tree: Any) -> Any:
    """Return the arrays of the main process, in all processes; with one process, the tree itself.

    Processes that compute the same results may round them differently, for example on different machines.

    Args:
        tree: A tree of arrays of one device, whose shapes are equal in all processes.
    """
    return multihost_utils.broadcast_one_to_all(tree) if jax.process_count() > 1 else tree


def sharded(batch: Any, mesh: Mesh | None, axis: int = 0, runs: bool = False) -> Any:
    """Return a batch whose samples, and those of each draw from a memory, are divided among the devices.

    Samples whose number is not a multiple of the number of devices are replicated, for example those of the
    last batch of an epoch.

    Args:
        batch: A `Batch` or `PhaseSteps` of NumPy arrays.
        mesh: The mesh; None for one device, which returns the batch itself.
        axis: The axis of the samples.
        runs: Whether the first axis is that of many runs.
    """
    if mesh is None:
        return batch

    def put(tree: Any, axis: int) -> Any:
        spec = PartitionSpec(*[RUNS if runs and k == 0 else None for k in range(axis)], DATA)
        return jax.tree.map(lambda a: _placed(a, _fitting(a.shape, mesh, spec)), tree)

    if isinstance(batch, PhaseSteps):
        return replicated(batch, mesh)._replace(slots=put(batch.slots, axis))
    plan = method_plan(batch)
    placed_plan = replicated(plan, mesh)
    if hasattr(plan, "reads"):
        placed_plan = placed_plan._replace(reads=put(plan.reads, axis + 1))
    if isinstance(batch.plan, AugmentedPlan):
        placed_plan = replicated(batch.plan._replace(plan=()), mesh)._replace(plan=placed_plan)
    x, y, t = (put(part, axis) for part in batch[:3])
    return Batch(x, y, t, placed_plan)


def _placed(array: Any, sharding: NamedSharding) -> jax.Array:
    """Return an array with a sharding; `device_put` would compare the arrays of all processes."""
    if isinstance(array, jax.Array) and array.sharding == sharding:
        return array
    if sharding.is_fully_addressable:
        placed: jax.Array = jax.device_put(array, sharding)
        return placed
    on_host = np.asarray(array)
    return jax.make_array_from_callback(on_host.shape, sharding, lambda index: on_host[index])


def _fitting(shape: tuple[int, ...], mesh: Mesh, spec: PartitionSpec) -> NamedSharding:
    """Return the sharding of a spec, without the axes that do not divide an array of this shape."""
    pairs = zip(spec, shape, strict=False)
    fits = [name if name in mesh.shape and size % mesh.shape[name] == 0 else None for name, size in pairs]
    return NamedSharding(mesh, PartitionSpec(*fits))
