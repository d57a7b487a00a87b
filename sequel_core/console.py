"""What a run shows: a rich progress display on a terminal, a line per task, and a table at the end."""

from __future__ import annotations

import math
from types import TracebackType

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table

from sequel_core.learner import Progress
from sequel_core.results import Result
from sequel_core.task import Benchmark, FloatArray, Task


class Display:
    """Shows a run while it goes on.

    Args:
        benchmark: whose tasks are run.
        progress: False for nothing at all; None for bars on a terminal only; True for bars anywhere.
    """

    def __init__(self, benchmark: Benchmark, progress: bool | None) -> None:
        self._benchmark = benchmark
        self._console = Console(quiet=progress is False)
        bars = progress or (progress is None and self._console.is_terminal)
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self._console,
            disable=not bars,
        )
        self._bar: TaskID | None = None

    def __enter__(self) -> Display:
        """Start the display."""
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the display."""
        self._bars.stop()

    def start(self, task: Task, epochs: int) -> None:
        """Begin a task."""
        title = f"task {task.index + 1}/{len(self._benchmark)} {task.name}"
        self._bar = self._bars.add_task(
            title + (f", {epochs} epochs" if epochs > 1 else ""), total=None, note=""
        )

    def update(self, progress: Progress) -> None:
        """Move the bar of the current task."""
        if self._bar is not None:
            note = f"loss {progress.loss:.4f}" + (
                "" if math.isnan(progress.accuracy) else f"  accuracy {100 * progress.accuracy:.1f} %"
            )
            self._bars.update(self._bar, completed=progress.task_step, total=progress.task_steps, note=note)

    def finish(self, task: Task, row: FloatArray) -> None:
        """End a task with the accuracies `[T]` measured after it."""
        if self._bar is not None:
            self._bars.remove_task(self._bar)
            self._bar = None
        seen = row[: task.index + 1]
        self._console.print(
            f"task {task.index + 1}/{len(self._benchmark)} {task.name}: "
            f"accuracy {_percent(row[task.index])}, "
            f"average {_percent(float(np.mean(seen)))} over {len(seen)} seen",
            highlight=False,
        )

    def summarise(self, result: Result) -> None:
        """Print the final table."""
        summary = result.summary
        table = Table(title=f"{self._benchmark.name}, {summary['mode']}, {summary['split']} accuracy")
        table.add_column("metric")
        table.add_column("value", justify="right")
        for name in ("average_accuracy", "forgetting", "bwt", "fwt", "learning_accuracy"):
            if summary.get(name) is not None:
                table.add_row(name.replace("_", " "), _percent(summary[name]))
        for name in ("masked_average_accuracy", "validation_average_accuracy", "test_average_accuracy"):
            if summary.get(name) is not None and name != f"{summary['split']}_average_accuracy":
                table.add_row(name.replace("_", " "), _percent(summary[name]))
        seconds = summary["seconds"]
        table.add_row("steps", str(summary["steps"]))
        table.add_row(
            "seconds",
            f"{seconds['total']:.1f} (train {seconds['train']:.1f}, evaluate {seconds['evaluate']:.1f})",
        )
        table.add_row("results", str(result.run_dir))
        self._console.print(table)


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.2f} %"
