"""Callbacks of the orchestrator, called around tasks by both frameworks."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sequel_core.runs.learner import Learner
    from sequel_core.stream.arrays import FloatArray
    from sequel_core.stream.benchmark import Benchmark
    from sequel_core.stream.task import Task


class StreamCallback:
    """Base class of callbacks that `sequel_core.run` calls around the stream and around each task.

    Override the methods that you need. For events within a task, use Lightning callbacks or the hooks of
    `sequel_flax`; one object may be both. A resumed run calls `on_stream_start` again and continues with the
    next task. An exception in a callback ends the run.

    Example:
        >>> import numpy as np
        >>> from sequel_core import StreamCallback
        >>> class PrintAverage(StreamCallback):
        ...     def on_task_end(self, learner, task, matrix):
        ...         print(f"{task.name}: {np.nanmean(matrix[task.index]):.2f}")

        Pass it as `sequel_core.run(learner, benchmark, callbacks=[PrintAverage()])`.
    """

    def on_stream_start(self, learner: Learner, benchmark: Benchmark) -> None:
        """Called before the first evaluation and the first training step.

        Args:
            learner: with its initial weights, or those of the checkpoint that the run resumes from.
            benchmark: the stream.
        """

    def on_task_start(self, learner: Learner, task: Task) -> None:
        """Called before the training on a task.

        Args:
            learner: as the previous task has left it.
            task: to be trained on.
        """

    def on_task_end(self, learner: Learner, task: Task, matrix: FloatArray) -> None:
        """Called after the training on a task and the evaluation that follows it.

        Args:
            learner: after the task.
            task: that was trained on.
            matrix: a copy of the scores `[T, T]` so far, nan if not evaluated; row `task.index` is new.
        """

    def on_stream_end(self, learner: Learner, matrix: FloatArray) -> None:
        """Called after the last task, unless the run was interrupted or failed.

        Args:
            learner: after the last task.
            matrix: a copy of the scores `[T, T]`, nan if not evaluated.
        """
