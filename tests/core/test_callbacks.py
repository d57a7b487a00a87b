"""StreamCallback: what is called around tasks, by the same object in both modes."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sequel_benchmarks import RotatedDigits
from sequel_core import Benchmark, load_result, run
from sequel_core.algorithms.naive import NaiveHParams
from sequel_core.hparams import TrainingHParams
from sequel_core.runs.callbacks import StreamCallback
from sequel_core.runs.learner import Learner, Mode, plugin
from sequel_core.stream.arrays import FloatArray
from sequel_core.stream.task import Task

BATCH, STEPS = 10, 4
BOTH = pytest.mark.parametrize("mode", ["pytorch", "jax"])


@cache
def stream() -> Benchmark:
    return RotatedDigits(num_tasks=3, subset=BATCH * STEPS)


def learner(mode: Mode) -> Any:
    framework = plugin(mode)
    if mode == "pytorch":
        import torch

        model = framework.MLP((8,), 10, image_shape=stream().image_shape)
        optimizer: Any = partial(torch.optim.SGD, lr=0.1)
    else:
        import optax

        model, optimizer = framework.MLP((8,), 10), optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)
    return framework.make_learner(
        NaiveHParams(), model, optimizer, stream(), TrainingHParams(batch_size=BATCH)
    )


class Notes(StreamCallback):
    """Records its calls, and changes the matrix that it receives."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, int]] = []  # what, step, and the task or the accuracies known

    def on_stream_start(self, learner: Learner, benchmark: Benchmark) -> None:
        self.calls.append(("stream start", learner.step, len(benchmark)))

    def on_task_start(self, learner: Learner, task: Task) -> None:
        self.calls.append(("task start", learner.step, task.index))

    def on_task_end(self, learner: Learner, task: Task, matrix: FloatArray) -> None:
        assert matrix[task.index, 0] == learner.evaluate(stream().tasks[0], "test").score
        self.calls.append(("task end", learner.step, int(np.isfinite(matrix).sum())))
        matrix[:] = 0

    def on_stream_end(self, learner: Learner, matrix: FloatArray) -> None:
        self.calls.append(("stream end", learner.step, int(np.isfinite(matrix).sum())))


def test_one_object_is_told_the_same_in_both_modes(tmp_path: Path) -> None:
    notes = Notes()
    for mode in ("pytorch", "jax"):
        result = run(learner(mode), stream(), run_dir=tmp_path / mode, progress=False, callbacks=[notes])
        assert np.nanmin(result.matrix) > 0
    once = [
        ("stream start", 0, 3),
        ("task start", 0, 0),
        ("task end", 4, 1),
        ("task start", 4, 1),
        ("task end", 8, 3),
        ("task start", 8, 2),
        ("task end", 12, 6),
        ("stream end", 12, 6),
    ]
    assert notes.calls == once * 2


@BOTH
def test_an_error_ends_the_run_and_keeps_what_was_measured(mode: Mode, tmp_path: Path) -> None:
    class Stops(StreamCallback):
        def on_task_end(self, learner: Learner, task: Task, matrix: FloatArray) -> None:
            if task.index == 1:
                raise KeyboardInterrupt

    notes = Notes()
    with pytest.raises(KeyboardInterrupt):
        run(learner(mode), stream(), run_dir=tmp_path, progress=False, callbacks=[Stops(), notes])
    assert notes.calls[-1] == ("task start", 4, 1)
    result = load_result(tmp_path)
    assert result.summary["status"] == "interrupted"
    assert np.isfinite(result.matrix).sum() == 3
