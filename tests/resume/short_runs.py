"""Short runs of every method in both modes, in separate processes that can be killed at any moment."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import sequel_core.runs.checkpoints
import sequel_core.runs.files
from sequel_benchmarks import SplitDigits
from sequel_core.algorithms.agem import AGEMHParams
from sequel_core.algorithms.bic import BiCHParams
from sequel_core.algorithms.der import DERHParams
from sequel_core.algorithms.derpp import DERppHParams
from sequel_core.algorithms.er import ERHParams
from sequel_core.algorithms.er_ace import ERACEHParams
from sequel_core.algorithms.ewc import EWCHParams
from sequel_core.algorithms.gdumb import GDumbHParams
from sequel_core.algorithms.gem import GEMHParams
from sequel_core.algorithms.icarl import ICaRLHParams
from sequel_core.algorithms.joint import JointHParams
from sequel_core.algorithms.kcl import KCLHParams
from sequel_core.algorithms.lamaml import LaMAMLHParams
from sequel_core.algorithms.lfl import LFLHParams
from sequel_core.algorithms.lwf import LwFHParams
from sequel_core.algorithms.mas import MASHParams
from sequel_core.algorithms.mcsgd import MCSGDHParams
from sequel_core.algorithms.mir import MIRHParams
from sequel_core.algorithms.naive import NaiveHParams
from sequel_core.algorithms.si import SIHParams
from sequel_core.algorithms.stable_sgd import StableSGDHParams
from sequel_core.hparams import AlgorithmHParams, CheckpointHParams
from sequel_core.runs.checkpoints import Checkpoints
from sequel_core.runs.directory import RunDirectory
from sequel_core.runs.learner import FitMonitor, Learner, Mode
from sequel_core.stream.benchmark import Benchmark
from sequel_core.testing.parity import BOTH
from sequel_core.testing.resume import go, short_learner, short_stream
from sequel_core.testing.streams import table

CARRY: dict[str, Any] = {"lr_decay": 0.7, "reset_optimizer": False}
METHODS: dict[str, AlgorithmHParams] = {
    hparams.name: hparams
    for hparams in (
        NaiveHParams(**CARRY),
        JointHParams(),
        EWCHParams(ewc_lambda=20, fisher_samples=20, **CARRY),
        SIHParams(si_lambda=0.3, **CARRY),
        MASHParams(mas_lambda=0.01, mas_samples=20, **CARRY),
        LFLHParams(lfl_lambda=0.05),
        LwFHParams(**CARRY),
        StableSGDHParams(lr_decay=0.7),
        AGEMHParams(mem_size=30, mem_batch_size=8),
        GEMHParams(mem_size=30, **CARRY),
        ERHParams(mem_size=25, mem_batch_size=6, **CARRY),
        ERACEHParams(mem_size=25, mem_batch_size=6, **CARRY),
        DERHParams(mem_size=25, mem_batch_size=6),
        DERppHParams(mem_size=25, mem_batch_size=6, **CARRY),
        GDumbHParams(mem_size=30, phase_epochs=7, phase_batch_size=8, **CARRY),
        MIRHParams(mem_size=25, mem_batch_size=6, num_candidates=12, **CARRY),
        BiCHParams(mem_size=50, phase_epochs=20, phase_batch_size=4, **CARRY),
        MCSGDHParams(mem_size=30, lmc_batch_size=8, lmc_epochs=1),
        LaMAMLHParams(mem_size=25, glances=2, mem_batch_size=6),
        ICaRLHParams(mem_size=30, **CARRY),
        KCLHParams(core_size=10, d_rn_f=33, normalisation="minmax", lmd=10, task_given=True),
    )
}
METHODS["derpp on values"] = METHODS["derpp"]  # a table whose targets are numbers
MODES = BOTH
CHECKPOINT = CheckpointHParams(every_n_steps=4)


def stream(method: str = "") -> Benchmark:
    """Return three rotations of a few digits, 12 steps an epoch; or a table of three tasks.

    BiC corrects classes that are new in a task, so it has pairs of digits.
    """
    if method == "bic":
        return SplitDigits(num_tasks=5, scenario="class", subset=60)
    return table("values", train=60) if method.endswith("on values") else short_stream()


def learner(mode: Mode, method: str, benchmark: Benchmark) -> Learner:
    """Return a learner with momentum and dropout, whose steps depend on everything in a checkpoint."""
    return short_learner(mode, METHODS[method], benchmark, dropout=dropout(method))


def dropout(method: str) -> float:
    """Return the rate of dropout; KCL has none."""
    return 0.0 if method == "kcl" else 0.2


class Moments:
    """Counts the moments at which a run writes a file or calls its learner; can kill the process at one."""

    def __init__(self, kill_at: int | None) -> None:
        self.count = 0
        self._kill_at = kill_at

    def __call__(self) -> bool:
        """Count a moment; return whether it is the one at which the caller must kill the process."""
        self.count += 1
        return self.count == self._kill_at

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with a moment before and one after it."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            if self():
                die()
            value = function(*args, **kwargs)
            if self():
                die()
            return value

        return counted

    def within_write(self, path: Path, content: bytes) -> None:
        """Replace `files.write_bytes`, with a moment in the middle of the content."""
        part = path.with_name(f".{path.name}.{os.getpid()}")
        if self():
            part.write_bytes(content[: len(content) // 2])
            die()
        part.write_bytes(content)
        part.replace(path)

    def within_line(self, directory: RunDirectory, record: Any, append: Callable[..., None]) -> None:
        """Replace `append_metrics`, with a moment in the middle of the line."""
        append(directory, record)
        if self():
            path = directory.path / "metrics.jsonl"
            os.truncate(path, path.stat().st_size - 9)
            die()


def die() -> None:
    """End the process as a failing machine would."""
    os.kill(os.getpid(), signal.SIGKILL)


def job(mode: Mode, method: str, run_dir: Path, kill_at: int | None, results: Any = None) -> None:
    """Start or resume a run, to its end or the moment `kill_at`; put the number of moments into `results`."""
    moments = Moments(kill_at)
    benchmark = stream(method)
    made: Any = learner(mode, method, benchmark)
    made.evaluate, made.save = moments.around(made.evaluate), moments.around(made.save)
    count(moments)
    go(made, benchmark, run_dir, CHECKPOINT)
    if results is not None:
        results.put(moments.count)


def count(moments: Moments) -> None:
    """Count the moments at which this process writes a file or takes steps."""
    append: Any = partial(moments.within_line, append=RunDirectory.append_metrics)
    after_step = FitMonitor.after_step
    RunDirectory.append_metrics = lambda self, record: append(self, record)  # type: ignore[method-assign]
    FitMonitor.after_step = moments.around(after_step)  # type: ignore[method-assign]
    Checkpoints._finish = moments.around(Checkpoints._finish)  # type: ignore[method-assign]
    sequel_core.runs.checkpoints._remove = moments.around(sequel_core.runs.checkpoints._remove)
    sequel_core.runs.files.write_bytes = moments.within_write


def start(*args: Any, target: Callable[..., None] = job) -> tuple[int | None, Any]:
    """Do a job in a new process; return its exit code, and what it put into its queue, 0 for nothing.

    A job that has not ended after ten minutes is killed, and its exit code is None.
    """
    context = multiprocessing.get_context("forkserver")
    results = context.SimpleQueue()
    process = context.Process(target=target, args=(*args, results))
    process.start()
    process.join(600)
    code = process.exitcode
    process.kill()
    return code, 0 if results.empty() else results.get()
