"""Callbacks of the orchestrator: what happens around tasks, the same object with either framework."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sequel_core.runs.learner import Learner
    from sequel_core.stream.arrays import FloatArray
    from sequel_core.stream.benchmark import Benchmark
    from sequel_core.stream.task import Task


class StreamCallback:
    """Called by `sequel_core.run` around the stream and each of its tasks; override what is of use.

    What happens within a task belongs to Lightning's callbacks and to the hooks of `sequel_flax`; an object
    may be of both kinds. A resumed run calls `on_stream_start` again and then goes on where it was. An error
    ends the run.
    """

    def on_stream_start(self, learner: Learner, benchmark: Benchmark) -> None:
        """Before anything is evaluated or trained on."""

    def on_task_start(self, learner: Learner, task: Task) -> None:
        """Before the training on a task."""

    def on_task_end(self, learner: Learner, task: Task, matrix: FloatArray) -> None:
        """After the training on a task and the evaluation that follows it.

        Args:
            learner: as it is then.
            task: the one just trained on.
            matrix: accuracies `[T, T]` so far, nan where not evaluated; row `task.index` is the new one.
        """

    def on_stream_end(self, learner: Learner, matrix: FloatArray) -> None:
        """After the last task; not where the run was broken off.

        Args:
            learner: as it is then.
            matrix: accuracies `[T, T]`, nan where not evaluated.
        """
