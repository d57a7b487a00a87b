"""Many runs in one process: no run's data, plans, network, learner or compiled programs remain.

Each test counts in a new process, because other tests leave objects and programs.
"""

from __future__ import annotations

import gc
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.extend
import pytest

import sequel_flax.programs
from sequel_core.cli import main
from tests.resume.short_runs import start

HELD = ("sequel_core.stream.", "sequel_benchmarks.", "sequel_core.runs.", "sequel_lightning.", "torch.")
LEARNERS = ("sequel_flax.learner", "sequel_flax.evaluation", "sequel_flax.steps")
SMALL = ("benchmark=rotateddigits", "benchmark.num_tasks=2", "benchmark.subset=60", "backbone.width=8")


def run(mode: str, algo: str, run_dir: Path, k: int) -> None:
    arguments = [f"mode={mode}", f"algo={algo}", *SMALL, f"seed={k}", f"run_dir={run_dir / f'{algo}{k}'}"]
    assert main(["run", "-q", *arguments, *(["algo.mem_size=20"] if algo == "mcsgd" else [])]) == 0


def remaining() -> Counter[str]:
    """Count the objects of these packages, JAX's arrays and its compiled programs."""
    gc.collect()
    modules = [(str(type(item).__module__), type(item).__qualname__) for item in gc.get_objects()]
    counts = Counter(f"{module}.{name}" for module, name in modules if module.startswith((*HELD, *LEARNERS)))
    counts["arrays"] = len(jax.live_arrays())
    counts["programs"] = len(jax.extend.backend.get_backend().live_executables())
    return counts


def check(mode: str, algorithms: tuple[str, ...], repeats: int, folder: Path, results: Any) -> None:
    """Put the objects that remain of further runs into a queue, by name."""
    for k in range(2):
        for algo in algorithms:
            run(mode, algo, folder, k)
    before = remaining()
    for k in range(2, 2 + repeats):
        for algo in algorithms:
            run(mode, algo, folder, k)
    results.put(dict(remaining() - before))


def check_release(folder: Path, results: Any) -> None:
    """Put the number of programs after a run that frees them into a queue."""
    sequel_flax.programs.RUNS_PER_RELEASE = 1
    run("jax", "naive", folder, 0)
    results.put(remaining()["programs"])


@pytest.mark.parametrize("mode", ["pytorch", "jax"])
def test_nothing_of_a_run_remains(mode: str, tmp_path: Path) -> None:
    assert start(mode, ("ewc",), 1, tmp_path, target=check) == (0, {})


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["pytorch", "jax"])
def test_nothing_of_many_runs_of_many_methods_remains(mode: str, tmp_path: Path) -> None:
    """The programs are freed after the tenth run of a process, so each process has eight runs."""
    for methods in (("ewc", "mas"), ("er", "icarl"), ("mcsgd", "lamaml")):
        assert start(mode, methods, 2, tmp_path, target=check) == (0, {})


def test_programs_are_freed_after_some_runs(tmp_path: Path) -> None:
    assert start(tmp_path, target=check_release) == (0, 0)
