"""Short runs of every method in both modes, in separate processes that can be killed at any moment."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import sequel_core.runs.checkpoints
import sequel_core.runs.files
from sequel_benchmarks import RotatedDigits
from sequel_core.algorithms.agem import AGEMHParams
from sequel_core.algorithms.der import DERHParams
from sequel_core.algorithms.derpp import DERppHParams
from sequel_core.algorithms.er import ERHParams
from sequel_core.algorithms.ewc import EWCHParams
from sequel_core.algorithms.icarl import ICaRLHParams
from sequel_core.algorithms.joint import JointHParams
from sequel_core.algorithms.kcl import KCLHParams
from sequel_core.algorithms.lamaml import LaMAMLHParams
from sequel_core.algorithms.lfl import LFLHParams
from sequel_core.algorithms.mas import MASHParams
from sequel_core.algorithms.mcsgd import MCSGDHParams
from sequel_core.algorithms.naive import NaiveHParams
from sequel_core.algorithms.si import SIHParams
from sequel_core.algorithms.stable_sgd import StableSGDHParams
from sequel_core.hparams import AlgorithmHParams, CheckpointHParams, OptimizerHParams, TrainingHParams
from sequel_core.runs.checkpoints import Checkpoints
from sequel_core.runs.directory import RunDirectory
from sequel_core.runs.learner import FitMonitor, Learner, plugin
from sequel_core.runs.orchestrator import run
from sequel_core.stream.benchmark import Benchmark
from tests.tables import table

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
        StableSGDHParams(lr_decay=0.7),
        AGEMHParams(mem_size=30, mem_batch_size=8),
        ERHParams(mem_size=25, mem_batch_size=6, **CARRY),
        DERHParams(mem_size=25, mem_batch_size=6),
        DERppHParams(mem_size=25, mem_batch_size=6, **CARRY),
        MCSGDHParams(mem_size=30, lmc_batch_size=8, lmc_epochs=1),
        LaMAMLHParams(mem_size=25, glances=2, mem_batch_size=6),
        ICaRLHParams(mem_size=30, **CARRY),
        KCLHParams(core_size=10, d_rn_f=33, normalisation="minmax", lmd=10, task_given=True),
    )
}
METHODS["derpp on values"] = METHODS["derpp"]  # a table whose targets are numbers
MODES = ("pytorch", "jax")
CHECKPOINT = CheckpointHParams(every_n_steps=4)


def stream(method: str = "") -> Benchmark:
    """Return three rotations of a few digits, 12 steps an epoch; shifted by a pixel at random in training."""
    if method.endswith("on values"):
        return table("values", train=60)
    return RotatedDigits(num_tasks=3, subset=60, crop_padding=1)


def learner(mode: str, method: str, benchmark: Benchmark) -> Learner:
    """Return a learner with momentum and dropout, whose steps depend on everything in a checkpoint."""
    package: Any = plugin(mode)  # type: ignore[arg-type]
    shape = {"image_shape": benchmark.spec.x.shape} if mode == "pytorch" else {}
    net = package.MLP((12,), benchmark.num_classes, dropout=0.0 if method == "kcl" else 0.2, **shape)
    optimizer = package.build_optimizer(OptimizerHParams(lr=0.05, momentum=0.9))
    training = TrainingHParams(batch_size=5, seed=3, epochs_per_task=2, log_every_n_steps=5)
    made: Learner = package.make_learner(METHODS[method], net, optimizer, benchmark, training)
    return made


def tensors(made: Any) -> dict[str, np.ndarray]:
    """Return the tensors of a learner's final state by name: weights, memory and everything else."""
    if made.mode == "pytorch":
        return {name: tensor.numpy() for name, tensor in made.module.state_dict().items()}
    import jax

    leaves = jax.tree_util.tree_flatten_with_path((made.ts, made.state))[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


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


def job(mode: str, method: str, run_dir: Path, kill_at: int | None, results: Any = None) -> None:
    """Start or resume a run, to its end or the moment `kill_at`; put the number of moments into `results`."""
    moments = Moments(kill_at)
    benchmark = stream(method)
    made: Any = learner(mode, method, benchmark)
    made.evaluate, made.save = moments.around(made.evaluate), moments.around(made.save)
    append: Any = partial(moments.within_line, append=RunDirectory.append_metrics)
    after_step = FitMonitor.after_step
    RunDirectory.append_metrics = lambda self, record: append(self, record)  # type: ignore[method-assign]
    FitMonitor.after_step = moments.around(after_step)  # type: ignore[method-assign]
    Checkpoints._finish = moments.around(Checkpoints._finish)  # type: ignore[method-assign]
    sequel_core.runs.checkpoints._remove = moments.around(sequel_core.runs.checkpoints._remove)
    sequel_core.runs.files.write_bytes = moments.within_write
    go(made, benchmark, run_dir)
    if results is not None:
        results.put(moments.count)


def go(
    made: Learner, benchmark: Benchmark, run_dir: Path, checkpoint: CheckpointHParams = CHECKPOINT
) -> None:
    """Start or resume a run to its end; save the learner's final tensors beside the run directory."""
    run(
        made,
        benchmark,
        run_dir=run_dir,
        evaluate_every=6,
        progress=False,
        resume="auto",
        checkpoint=checkpoint,
    )
    arrays: dict[str, Any] = dict(tensors(made))
    np.savez(run_dir.with_suffix(".npz"), **arrays)


def start(*args: Any) -> tuple[int | None, int]:
    """Do a job in a new process; return its exit code and, if it finished, its number of moments."""
    context = multiprocessing.get_context("forkserver")
    results = context.SimpleQueue()
    process = context.Process(target=job, args=(*args, results))
    process.start()
    process.join()
    return process.exitcode, 0 if results.empty() else results.get()


def records(run_dir: Path) -> list[dict[str, Any]]:
    """Return the records of a run without its speed."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "samples_per_second"} for line in lines]


def assert_same_arrays(path: Path, wanted: Path) -> None:
    """Assert that two files hold bit-identical arrays."""
    with np.load(path) as actual, np.load(wanted) as arrays:
        assert set(actual.files) == set(arrays.files)
        for name in arrays.files:
            np.testing.assert_array_equal(actual[name], arrays[name], err_msg=name)


def assert_same_records(run_dir: Path, straight: Path) -> None:
    """Assert that two runs ended with bit-identical weights, matrices and records."""
    assert_same_arrays(run_dir / "weights.npz", straight / "weights.npz")
    (matrix,) = (path.name for path in straight.glob("*_matrix.csv"))
    assert (run_dir / matrix).read_text() == (straight / matrix).read_text()
    assert records(run_dir) == records(straight)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert not [path for path in run_dir.iterdir() if path.name.startswith(".lock")]


def assert_same_end(run_dir: Path, straight: Path) -> None:
    """Assert that two runs of `go` ended with equal records and equal tensors of their learners."""
    assert_same_arrays(run_dir.with_suffix(".npz"), straight.with_suffix(".npz"))
    assert_same_records(run_dir, straight)
