"""Display of a run: a line at its start, progress bars on a terminal, a line per task, and a final table."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Column, Table
from rich.text import Text

from sequel_core.runs.formatting import score_text
from sequel_core.runs.learner import Learner, Progress
from sequel_core.runs.orchestrator import Shown
from sequel_core.runs.results import TASK_GIVEN, Result
from sequel_core.stream.arrays import FloatArray
from sequel_core.stream.benchmark import Benchmark
from sequel_core.stream.task import Task

REFRESHES_PER_SECOND = 2  # drawing takes 3 ms
ESTIMATE_SECONDS = 3600.0  # long enough that the estimated time left includes evaluations
WIDEST_TITLE, WIDEST_BAR = 32, 40
OTHER_COLUMNS = 26  # width of the count, the time left and the spaces


class Display:
    """Shows progress bars on a terminal while a run is in progress, and prints lines about it and its tasks.

    Args:
        benchmark: the stream.
        learner: if it shows a progress bar itself, there are none here.
        progress: what to show.
        console: to print on; None for standard output.
    """

    def __init__(
        self, benchmark: Benchmark, learner: Learner, progress: Shown, console: Console | None = None
    ) -> None:
        self._benchmark, self._learner, self._score = benchmark, learner, learner.score
        terminal = console or Console()
        self._console = terminal if progress is True else Console(quiet=True)
        self._epochs = 1
        self._last: Progress | None = None
        self._average = math.nan
        self._bars = _bars(terminal)
        self._stream = self._bars.add_task("stream", total=None, count="")
        self._task = self._bars.add_task("", total=None, count="")
        self._live = Live(
            get_renderable=self._picture,
            console=terminal,
            refresh_per_second=REFRESHES_PER_SECOND,
            transient=True,
        )
        self._shown = progress is not False and terminal.is_interactive and not learner.shows_progress
        self._handlers: list[tuple[logging.StreamHandler[Any], Any]] = []

    def __enter__(self) -> Display:
        """Start the progress bars; output, warnings and log messages appear above them."""
        if self._shown:
            self._handlers = [(h, h.stream) for h in _handlers() if h.stream in (sys.stdout, sys.stderr)]
            self._live.start()
            for handler, _ in self._handlers:
                handler.setStream(sys.stderr)  # which rich has replaced
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Remove the progress bars."""
        if self._shown:
            self._live.stop()
        for handler, stream in self._handlers:
            handler.setStream(stream)

    def announce(self, run_dir: Path, resumed: bool) -> None:
        """Print a line about the run, before it starts."""
        name, tasks = self._learner.hparams.name, len(self._benchmark)
        line = f"{'resuming ' * resumed}{name} on {self._benchmark.name}, {self._learner.mode}, "
        line += f"{tasks} task{'s' * (tasks > 1)}; results in {_relative(run_dir)}"
        self._print(line)

    def start(self, task: Task, epochs: int) -> None:
        """Add the progress bar of a task."""
        self._epochs, self._last = epochs, None
        self._move_stream(task, 0)
        self._bars.remove_task(self._task)
        self._task = self._bars.add_task(task.name, total=None, count="")

    def update(self, task: Task, progress: Progress) -> None:
        """Update the progress bars from a learner's report."""
        self._last = progress
        if self._shown:
            step, steps = progress.task_step, progress.task_steps
            self._bars.update(self._task, total=steps, completed=step, count=f"{step}/{steps} steps")
            self._move_stream(task, step / steps)

    def evaluated(self, after: int, row: FloatArray) -> None:
        """Show the mean of the scores `[T]` measured during or after the training on task `after`."""
        self._average = float(np.mean(row[: after + 1]))

    def finish(self, task: Task, row: FloatArray) -> None:
        """Print a line with the scores `[T]` measured after a task; nan if it was not evaluated."""
        self.evaluated(task.index, row)
        number, value, average = task.index + 1, self._text(row[task.index]), self._text(self._average)
        line = f"task {number}/{len(self._benchmark)} {task.name}: "
        measured = f"{self._score.name} {value}, average {average} over {number} seen"
        line += "trained" if math.isnan(row[task.index]) else measured
        if self._last and self._last.task_step < self._last.task_steps:
            line += ", stopped early" + (f" in {self._epoch(self._last)}" if self._epochs > 1 else "")
        self._print(line)

    def summarise(self, result: Result) -> None:
        """Print the final table."""
        summary = result.summary
        title = f"{escape(self._benchmark.name)}, {summary['mode']}, {summary['split']} {self._score.name}"
        title += f", {TASK_GIVEN}" if result.task_given else ""
        table = Table("metric", Column("value", justify="right", overflow="fold"), title=title)
        shown = ["average_score", "forgetting", "bwt", "fwt", "learning_score", "masked_average_score"]
        shown += [f"{split}_average_score" for split in ("validation", "test") if split != summary["split"]]
        for name in map(self._score.of, shown):
            if summary.get(name) is not None:
                table.add_row(name.replace("_", " "), self._text(summary[name]))
        seconds = summary["seconds"]
        table.add_row("steps", str(summary["steps"]))
        table.add_row(
            "seconds",
            f"{seconds['total']:.1f} (train {seconds['train']:.1f}, evaluate {seconds['evaluate']:.1f})",
        )
        table.add_row("results", escape(str(result.run_dir and _relative(result.run_dir))))
        self._console.print(table)

    def _print(self, line: str) -> None:
        to_file = not self._console.is_terminal  # lines in a file are not wrapped
        self._console.print(line, markup=False, highlight=False, soft_wrap=to_file)

    def _move_stream(self, task: Task, fraction: float) -> None:
        tasks = len(self._benchmark)
        count = f"task {task.index + 1}/{tasks}"
        self._bars.update(self._stream, total=tasks, completed=task.index + fraction, count=count)

    def _text(self, value: float) -> str:
        return score_text(value, self._score)

    def _epoch(self, progress: Progress) -> str:
        return f"epoch {progress.epoch + 1}/{self._epochs}"

    def _picture(self) -> Group:
        """Return the bars with a line of text below."""
        parts = []
        if self._last:
            rate = self._bars.tasks[-1].speed
            parts += [self._epoch(self._last)] if self._epochs > 1 else []
            parts += [] if rate is None else [f"{rate:,.0f} steps/s"]
            parts += [f"loss {self._last.loss:.4f}"]
            if not math.isnan(self._last.score):
                parts.append(f"{self._score.name} {self._text(self._last.score)}")
        if not math.isnan(self._average):
            parts.append(f"average {self._text(self._average)}")
        return Group(self._bars.make_tasks_table(self._bars.tasks), Text(", ".join(parts)))


def _relative(folder: Path) -> Path:
    """Return a folder relative to the working directory, if it lies there."""
    here = Path.cwd()
    return folder.relative_to(here) if folder.is_relative_to(here) else folder


def _bars(console: Console) -> Bars:
    title = min(WIDEST_TITLE, console.width // 3)
    return Bars(
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, max_width=title)),
        BarColumn(max(1, min(WIDEST_BAR, console.width - title - OTHER_COLUMNS))),
        TextColumn("{task.fields[count]}"),
        TimeRemainingColumn(),
        console=console,
        speed_estimate_period=ESTIMATE_SECONDS,
    )


def _handlers() -> Iterator[logging.StreamHandler[Any]]:
    """Yield the handlers of all loggers that write to a stream."""
    for logger in (logging.root, *logging.root.manager.loggerDict.values()):
        if isinstance(logger, logging.Logger):
            yield from (h for h in logger.handlers if isinstance(h, logging.StreamHandler))
