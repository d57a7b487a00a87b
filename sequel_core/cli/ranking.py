"""The table at the end of a sweep: its runs, ranked by accuracy."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sequel_core.runs.results import Result, load_result

VALIDATION, TEST = "validation_average_accuracy", "test_average_accuracy"
FILE = "sweep.csv"


class Job(NamedTuple):
    """One run of a sweep."""

    directory: Path
    overrides: Mapping[str, str]  # the settings that the sweep varies


class _Row(NamedTuple):
    job: Job
    validation: float  # average accuracy, a fraction; nan if not measured
    test: float
    seconds: float
    status: str


def rank(jobs: Sequence[Job], directory: Path, console: Console) -> int:
    """Print the runs in a table, best first, and write the table to `sweep.csv`.

    Runs are ranked by validation accuracy if every finished run has it, else by test accuracy; the title
    says which. Failed runs are last.

    Args:
        jobs: the runs, in the order in which they were started.
        directory: folder of `sweep.csv`.
        console: prints the table.

    Returns:
        The exit code: 1 if a run failed, else 0.
    """
    rows = [_row(job) for job in jobs]
    finished = [row for row in rows if row.status == "finished"]
    validated = bool(finished) and not any(math.isnan(row.validation) for row in finished)

    def score(row: _Row) -> tuple[bool, float]:
        value = row.validation if validated else row.test
        return row.status != "finished", math.inf if math.isnan(value) else -value

    rows.sort(key=score)
    keys = list(dict.fromkeys(key for job in jobs for key in job.overrides))
    _write_csv(directory / FILE, rows, keys)
    console.print(_table(f"ranked by {'validation' if validated else 'test'} accuracy", rows, keys))
    console.print(f"written to {directory / FILE}", highlight=False, markup=False, soft_wrap=True)
    return 0 if len(finished) == len(rows) else 1


def _write_csv(path: Path, rows: Sequence[_Row], keys: Sequence[str]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["rank", "run", *keys, VALIDATION, TEST, "seconds", "status"])
        for place, row in enumerate(rows, 1):
            numbers = [repr(value) if math.isfinite(value) else "" for value in row[1:4]]
            values = [row.job.overrides.get(key, "") for key in keys]
            writer.writerow([place, row.job.directory.name, *values, *numbers, row.status])


def _table(title: str, rows: Sequence[_Row], keys: Sequence[str]) -> Table:
    shown = [
        name for name in ("validation", "test") if any(math.isfinite(getattr(row, name)) for row in rows)
    ]
    table = Table(title=title, title_justify="left")
    for column in ("run", *keys):
        table.add_column(column, overflow="fold")
    for column in (*(f"{name} accuracy" for name in shown), "seconds"):
        table.add_column(column, justify="right")
    table.add_column("status", overflow="fold")
    for row in rows:
        accuracies = [getattr(row, name) for name in shown]
        percent = [f"{100 * value:.2f} %" if math.isfinite(value) else "" for value in accuracies]
        seconds = f"{row.seconds:.1f}" if math.isfinite(row.seconds) else ""
        values = [escape(row.job.overrides.get(key, "")) for key in keys]
        table.add_row(escape(row.job.directory.name), *values, *percent, seconds, escape(row.status))
    return table


def _row(job: Job) -> _Row:
    """Read the result of a run from its directory."""
    try:
        result: Result | None = load_result(job.directory)
    except ValueError:
        result = None
    error = job.directory / "error.txt"
    failure = error.read_text(encoding="utf-8").strip().splitlines() if error.is_file() else []
    if result is None:
        return _Row(job, math.nan, math.nan, math.nan, f"failed: {failure[-1]}" if failure else "not started")
    status = str(result.summary.get("status", "unfinished"))
    if failure and status not in ("finished", "diverged"):
        status = f"failed: {failure[-1]}"
    seconds = result.summary.get("seconds") or {}
    accuracies = [result.summary.get(key) for key in (VALIDATION, TEST)]
    validation, test = (math.nan if value is None else float(value) for value in accuracies)
    return _Row(job, validation, test, float(seconds.get("total", math.nan)), status)
