"""Which runs can share one compiled program, and the numbers in which they differ as its arguments.

The program of several runs is that of the first one. A setting that is a number and differs between the runs
becomes an argument: the program is traced with settings that hold traced arrays, which are not validated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sequel_core.hparams import OptimizerHParams
from sequel_core.settings import Settings
from sequel_core.stream.benchmark import Benchmark
from sequel_core.stream.task import Batch
from sequel_flax.bundle import Algorithm, collections
from sequel_flax.evaluation import as_batch
from sequel_flax.learner import FlaxLearner, complete_optimizer, planned
from sequel_flax.placement import keeps_on_host

Numbers = dict[str, Any]
"""Numbers by the names of their settings, such as `algo.ewc_lambda`."""


STREAM = ("x", "y", "num_classes", "num_tasks", "scenario", "augmentation", "max_evaluated")
"""The parts of a stream's specification that must be equal; the others are in the state."""


class Group(NamedTuple):
    """Runs that share a program.

    Args:
        members: The indices of the runs.
        names: The names of the numbers in which they differ, besides the seed.
        reason: Why these runs are not in the first group; empty for that group.

    Example:
        >>> Group([0, 2], ("algo.ewc_lambda",)).reason
        ''
    """

    members: list[int]
    names: tuple[str, ...]
    reason: str = ""


def grouped(learners: Sequence[FlaxLearner], benchmarks: Sequence[Benchmark]) -> list[Group]:
    """Divide runs into groups that share a program.

    Args:
        learners: The learners of the runs.
        benchmarks: The benchmark of each run.

    Returns:
        The groups, in the order of their first runs.

    Example:
        >>> from sequel_benchmarks import RotatedDigits
        >>> from sequel_core import ERHParams, OptimizerHParams
        >>> from sequel_flax import MLP, make_learner
        >>> digits, sgd = RotatedDigits(num_tasks=2, subset=20), OptimizerHParams(lr=0.1)
        >>> settings = [ERHParams(mem_size=size, mem_batch_size=5) for size in (20, 30, 20)]
        >>> learners = [make_learner(hparams, MLP((8,)), sgd, digits) for hparams in settings]
        >>> [(group.members, group.reason) for group in grouped(learners, [digits] * 3)]
        [([0, 2], ''), ([1], 'algo.mem_size')]
    """
    groups: list[Group] = []
    for k, learner in enumerate(learners):
        reason = ""
        for at, group in enumerate(groups):
            first = group.members[0]
            names, differs = _differences(learners[first], learner)
            new = [name for name in names if name not in group.names]
            differs = differs or _untraceable(learners[first], benchmarks[first], new)
            reason = reason or differs
            if not differs:
                groups[at] = group._replace(members=[*group.members, k], names=(*group.names, *new))
                break
        else:
            groups.append(Group([k], (), reason))
    return groups


def _differences(a: FlaxLearner, b: FlaxLearner) -> tuple[tuple[str, ...], str]:
    """Return the names of the numbers that differ, and the name of what else differs; "" for nothing."""
    names = []
    settings = [_settings(learner) for learner in (a, b)]
    for name in settings[0].keys() | settings[1].keys():
        values = [values.get(name) for values in settings]
        if values[0] != values[1]:
            if not all(isinstance(value, float) for value in values):
                return (), name
            names.append(name)
    parts = [_parts(learner) for learner in (a, b)]
    return tuple(sorted(names)), next((name for name in parts[0] if parts[0][name] != parts[1][name]), "")


def _settings(learner: FlaxLearner) -> dict[str, Any]:
    """Return the settings by name, without the seed, on which only the state and plans depend."""
    sections = {"algo": learner.hparams, "training": learner.training, "optimizer": learner.optimizer}
    values_of = {"algo.type": type(learner.hparams), "optimizer.type": type(learner.optimizer)}
    for section, values in sections.items():
        if isinstance(values, Settings):
            values_of |= {f"{section}.{spec.name}": getattr(values, spec.name) for spec in fields(values)}
        else:
            values_of[section] = values
    del values_of["training.seed"]
    return values_of


def _parts(learner: FlaxLearner) -> dict[str, Any]:
    """Return what must be equal besides settings, by the name that is shown."""
    algorithm = learner.algorithm
    alone = not algorithm.mappable or algorithm.second_phase is not None or keeps_on_host(algorithm)
    spec, trained = learner.spec, algorithm.trained
    trees = learner.ts.params, learner.ts.opt_state, collections(learner.ts), learner.state
    return {
        "the method, whose runs have a program each": id(learner) if alone else None,
        "the network": learner.model,
        "the parameters that are trained": trained.trainable,
        "the objective": algorithm.objective,
        "the metrics": learner.metrics,
        "steps_per_call": learner.steps_per_call,
        "the devices": learner.mesh,
        "the stream": tuple(getattr(spec, name) for name in STREAM),
        "the shapes of the state": (
            jax.tree.structure(trees),
            [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(trees)],
        ),
    }


def _untraceable(learner: FlaxLearner, benchmark: Benchmark, names: Sequence[str]) -> str:
    """Return the names of the numbers that cannot be arguments; "" if all of them can."""
    return ", ".join(name for name in names if not _is_argument(learner, benchmark, name))


def _is_argument(learner: FlaxLearner, benchmark: Benchmark, name: str) -> bool:
    """Return whether the start of a task and a step can be traced with a number as an argument."""
    if name.startswith("algo.") and learner.implementation is None:
        return False
    task = next(iter(learner.hparams.training_tasks(benchmark, learner.training.seed)))
    rows = np.arange(min(learner.training.batch_size, len(task.train)))
    batch = as_batch(task.train.take(rows))
    batch = planned(learner.algorithm, learner.spec, learner.state, batch)
    start = learner.algorithm.plan_start(learner.state, task)

    def trace(numbers: Numbers, ts: Any, state: Any, batch: Batch) -> Any:
        algorithm, ts = with_numbers(learner, numbers, ts)
        ts, state = algorithm.apply_start(ts, state, start)
        ts, state, outputs = algorithm.train_step(ts, state, batch)
        return ts.params, state, outputs["loss"]

    try:
        jax.eval_shape(trace, numbers_of([learner], [name]), learner.ts, learner.state, batch)
    except (TypeError, ValueError):  # a branch depends on it, or it is the size of something
        return False
    return True


def numbers_of(learners: Sequence[FlaxLearner], names: Sequence[str]) -> Numbers:
    """Return the numbers of runs, each an array `[n]`, or `[]` for a single run, in the dtype of the weights.

    Args:
        learners: The learners.
        names: The names of the numbers.
    """
    dtype = jax.tree.leaves(learners[0].ts.params)[0].dtype
    values = {name: [_settings(learner)[name] for learner in learners] for name in names}
    return {name: jnp.asarray(v if len(v) > 1 else v[0], dtype) for name, v in values.items()}


def with_numbers(learner: FlaxLearner, numbers: Numbers, ts: Any) -> tuple[Algorithm, Any]:
    """Return the algorithm of a learner and a train state, with other numbers.

    Args:
        learner: The learner.
        numbers: Traced numbers by name.
        ts: A train state.

    Returns:
        The algorithm, and the train state with the optimizer.
    """
    algorithm, optimizer, training = learner.algorithm, learner.optimizer, learner.training
    of_algorithm, of_optimizer = (_section(numbers, section) for section in ("algo", "optimizer"))
    if of_algorithm and learner.implementation is not None:
        algorithm = learner.implementation(unchecked(learner.hparams, of_algorithm))
    if of_optimizer and isinstance(optimizer, OptimizerHParams):
        optimizer = unchecked(optimizer, of_optimizer)
    training = unchecked(training, _section(numbers, "training"))
    if len(numbers) > len(of_algorithm):
        ts = ts.replace(tx=complete_optimizer(algorithm, learner.model, optimizer, training))
    return algorithm, ts


def _section(numbers: Numbers, section: str) -> Numbers:
    return {name.partition(".")[2]: n for name, n in numbers.items() if name.startswith(f"{section}.")}


def unchecked(settings: Any, numbers: Mapping[str, Any]) -> Any:
    """Return a copy of settings with other numbers, which may be traced and are not validated.

    Args:
        settings: The settings.
        numbers: The numbers by the names of their fields.

    Example:
        >>> from sequel_core import EWCHParams
        >>> settings = unchecked(EWCHParams(), {"ewc_lambda": jnp.ones(())})
        >>> isinstance(settings, EWCHParams), settings.ewc_lambda.shape
        (True, ())
    """
    cls: Any = type(settings)
    copy = object.__new__(_unchecked_class(cls))
    for name, value in {**vars(settings), **numbers}.items():
        object.__setattr__(copy, name, value)
    return copy


@cache
def _unchecked_class(cls: Any) -> type[Any]:
    """Return a subclass of a class of settings, without validation; its objects are compared by identity."""
    members = {"__post_init__": lambda self: None, "__eq__": object.__eq__, "__hash__": object.__hash__}
    return type(cls.__name__, (cls,), members)
