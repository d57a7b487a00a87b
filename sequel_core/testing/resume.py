"""A run that is resumed in the middle of a task ends bit-identical to an uninterrupted one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from sequel_core.hparams import AlgorithmHParams, CheckpointHParams, OptimizerHParams, TrainingHParams
from sequel_core.runs.learner import Learner, Mode, plugin
from sequel_core.runs.orchestrator import run
from sequel_core.stream.benchmark import Benchmark
from sequel_core.testing.parity import Implementations, modes_of

EVERYTHING = CheckpointHParams(every_n_steps=17, keep=1000)


def check_resume(
    hparams: AlgorithmHParams,
    folder: Path,
    *,
    implementations: Implementations = None,
    modes: Sequence[Mode] | None = None,
    benchmark: Benchmark | None = None,
    dropout: float = 0.2,
) -> None:
    """Check that a run cut off in the middle of its second task and resumed ends bit-identical.

    Weights, accuracies, records and the whole state of the learner are compared, with momentum, dropout and
    two epochs per task.

    Args:
        hparams: settings of the method.
        folder: an empty folder for the runs.
        implementations: the module and the factory by mode; None if the method is built in or installed.
        modes: frameworks to check; None for all that the method has an implementation for.
        benchmark: the stream; None for three rotations of a few digits, shifted at random in training.
        dropout: rate of the network, in [0, 1).

    Raises:
        AssertionError: the two runs differ.

    Example:
        >>> from pathlib import Path
        >>> from sequel_core import ERHParams
        >>> check_resume(ERHParams(mem_size=25, mem_batch_size=6), Path("runs"), modes=["pytorch"])
    """
    stream = short_stream() if benchmark is None else benchmark
    for mode in modes_of(hparams, implementations) if modes is None else modes:
        given = None if implementations is None else implementations[mode]
        straight, resumed = folder / mode / "straight", folder / mode / "resumed"
        go(short_learner(mode, hparams, stream, given, dropout), stream, straight, EVERYTHING)
        cut_back(straight, resumed)
        go(short_learner(mode, hparams, stream, given, dropout), stream, resumed, EVERYTHING)
        assert_same_end(resumed, straight)


# -- parts


def short_stream() -> Benchmark:
    """Return three rotations of a few digits, 12 steps an epoch; shifted by a pixel at random in training."""
    made: Benchmark = import_module("sequel_benchmarks").RotatedDigits(num_tasks=3, subset=60, crop_padding=1)
    return made


def short_learner(
    mode: Mode,
    hparams: AlgorithmHParams,
    benchmark: Benchmark,
    implementation: Any = None,
    dropout: float = 0.2,
) -> Learner:
    """Return a learner with momentum and dropout, whose steps depend on everything in a checkpoint."""
    package: Any = plugin(mode)
    shape = {"image_shape": benchmark.spec.x.shape} if mode == "pytorch" else {}
    net = package.MLP((12,), benchmark.num_classes, dropout=dropout, **shape)
    optimizer = package.build_optimizer(OptimizerHParams(lr=0.05, momentum=0.9))
    training = TrainingHParams(batch_size=5, seed=3, epochs_per_task=2, log_every_n_steps=5)
    made: Learner = package.make_learner(
        hparams, net, optimizer, benchmark, training, implementation=implementation
    )
    return made


def tensors(made: Any) -> dict[str, np.ndarray]:
    """Return the tensors of a learner's final state by name: weights, memory and everything else."""
    if made.mode == "pytorch":
        return {name: tensor.numpy() for name, tensor in made.module.state_dict().items()}
    trees: Any = import_module("jax").tree_util
    leaves = trees.tree_flatten_with_path((made.ts, made.state))[0]
    return {trees.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def go(made: Learner, benchmark: Benchmark, run_dir: Path, checkpoint: CheckpointHParams) -> None:
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


def cut_back(straight: Path, run_dir: Path) -> int:
    """Copy a run directory as it was in the middle of the second task; return its checkpoint's number."""
    positions = {
        int(path.parent.name): json.loads(path.read_text())["done"]
        for path in (straight / "checkpoints").glob("*/run.json")
    }
    _, *within = sorted(number for number, done in positions.items() if done == [0, "evaluate"])
    number = within[-1]
    shutil.copytree(straight, run_dir)
    for name in ("summary.json", "weights.npz"):
        (run_dir / name).unlink()
    for path in (run_dir / "checkpoints").iterdir():
        if int(path.name) > number:
            shutil.rmtree(path)
    return number


def records(run_dir: Path) -> list[dict[str, Any]]:
    """Return the records of a run without its speed."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "samples_per_second"} for line in lines]


def assert_same_arrays(path: Path, wanted: Path) -> None:
    """Raise AssertionError if two files do not hold bit-identical arrays."""
    with np.load(path, allow_pickle=False) as actual, np.load(wanted, allow_pickle=False) as arrays:
        _check_equal(sorted(actual.files), sorted(arrays.files), "arrays")
        for name in arrays.files:
            np.testing.assert_array_equal(actual[name], arrays[name], err_msg=name)


def assert_same_records(run_dir: Path, straight: Path) -> None:
    """Raise AssertionError if two runs did not end with bit-identical weights, matrices and records."""
    assert_same_arrays(run_dir / "weights.npz", straight / "weights.npz")
    (matrix,) = (path.name for path in straight.glob("*_matrix.csv"))
    _check_equal((run_dir / matrix).read_text(), (straight / matrix).read_text(), matrix)
    _check_equal(records(run_dir), records(straight), "records")
    summary = json.loads((run_dir / "summary.json").read_text())
    _check_equal(summary["status"], "finished", "status")
    _check_equal([path.name for path in run_dir.iterdir() if path.name.startswith(".lock")], [], "locks")


def assert_same_end(run_dir: Path, straight: Path) -> None:
    """Raise AssertionError if two runs of `go` ended with other records or other tensors."""
    assert_same_arrays(run_dir.with_suffix(".npz"), straight.with_suffix(".npz"))
    assert_same_records(run_dir, straight)


def _check_equal(actual: Any, wanted: Any, what: str) -> None:
    if actual != wanted:
        raise AssertionError(f"{what} of the resumed run: {actual!r}, which is not {wanted!r}")
