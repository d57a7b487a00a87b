"""`make bench ARGS=--together`: what many runs at once cost, compared with one run.

The runs are whole ones in JAX, with plans, evaluation, records and compilation. There are five tasks of
random images. Test sets have a sixth of the size of the training sets, as in MNIST.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
from rich.table import Table

from sequel_core.hparams import OptimizerHParams, TrainingHParams
from sequel_core.runs.learner import plugin
from sequel_core.stream.benchmark import Benchmark
from sequel_core.stream.task import Split
from tests.speed.bench import RATE, WIDTHS, settings, stream

TOGETHER = ("naive", "ewc", "er", "derpp", "lamaml", "mcsgd")
"""The algorithms that are measured."""

MEMBERS = (1, 4, 10)
NUM_TASKS = 5


class ManyRow(NamedTuple):
    """One comparison."""

    algo: str
    batch_size: int
    members: int
    seconds: float
    ratio: float  # to the seconds of one run


def measure_together(algo: str, batch_size: int, steps: int, rounds: int) -> list[ManyRow]:
    """Return medians of `rounds` turns for each number of runs; a run takes `steps` steps."""
    benchmark = five_tasks(algo, batch_size, max(steps // NUM_TASKS, 1))
    turns = []
    for _ in range(rounds + 1):
        turns.append([seconds_of(algo, batch_size, benchmark, members) for members in MEMBERS])
    del turns[0]  # warms up
    seconds = [median(turn[k] for turn in turns) for k in range(len(MEMBERS))]
    ratios = [median(turn[k] / turn[0] for turn in turns) for k in range(len(MEMBERS))]
    return [ManyRow(algo, batch_size, *row) for row in zip(MEMBERS, seconds, ratios, strict=True)]


def five_tasks(algo: str, batch_size: int, steps: int) -> Benchmark:
    """Return a stream of five tasks with `steps` batches each."""
    benchmark = stream(settings(algo, batch_size), batch_size * steps)
    first = benchmark.tasks[0]
    samples = first.train.take(np.arange(len(first.train)))
    tasks = []
    for i in range(NUM_TASKS):
        train = Split(samples.x, samples.y, i)
        test = train.head(max(len(train) // 6, 1))
        tasks.append(replace(first, index=i, train=train, test=test))
    return replace(benchmark, tasks=tuple(tasks))


def seconds_of(algo: str, batch_size: int, benchmark: Benchmark, members: int) -> float:
    """Return the seconds that runs at once take; they differ in their seeds."""
    flax = plugin("jax")
    learners = [
        flax.make_learner(
            settings(algo, batch_size),
            flax.MLP(WIDTHS, benchmark.num_classes),
            OptimizerHParams(lr=RATE),
            benchmark,
            TrainingHParams(batch_size=batch_size, seed=seed),
        )
        for seed in range(members)
    ]
    with TemporaryDirectory() as folder:
        run_dirs = [Path(folder, str(seed)) for seed in range(members)]
        start = time.perf_counter()
        outcomes = flax.run_together(learners, benchmark, run_dirs, progress=False)
        seconds = time.perf_counter() - start
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome
    return seconds


def many_table(rows: Sequence[ManyRow], rounds: int) -> Table:
    """Return the rows as a table for the terminal."""
    made = Table(title=f"Seconds of runs at once in JAX, MLP 256-256, five tasks, median of {rounds}")
    for name in ("algorithm", "batch", "runs", "seconds", "to one run"):
        made.add_column(name, justify="left" if name == "algorithm" else "right")
    for row in rows:
        cells = row.algo, str(row.batch_size), str(row.members), f"{row.seconds:.1f}", f"{row.ratio:.2f}"
        made.add_row(*cells)
    return made
