"""The table at the end of a sweep: its runs, ranked by their average score."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sequel_core.objectives import Score
from sequel_core.runs.formatting import score_text
from sequel_core.runs.results import Result, common_score, load_result

FILE = "sweep.csv"
MEASURED = ("validation_average_score", "test_average_score")


class Job(NamedTuple):
    """One run of a sweep."""

    directory: Path
    overrides: Mapping[str, str]  # the settings that the sweep varies


class _Row(NamedTuple):
    job: Job
    score: Score | None  # None if the run has recorded nothing
    validation: float  # average score; nan if not measured
    test: float
    seconds: float
    status: str


def rank(jobs: Sequence[Job], directory: Path, console: Console) -> int:
    """Print the runs in a table, best first, and write the table to `sweep.csv`.

    Runs are ranked by the average score on the validation samples if every finished run has it, else by that
    on the test samples; the title says which. Failed runs are last.

    Args:
        jobs: the runs, in the order in which they were started.
        directory: folder of `sweep.csv`.
        console: prints the table.

    Returns:
        The exit code: 1 if a run failed, else 0.

    Raises:
        ValueError: the runs have different scores.
    """
    rows = [_row(job) for job in jobs]
    score = common_score(row.score for row in rows if row.score)
    finished = [row for row in rows if row.status == "finished"]
    validated = bool(finished) and not any(math.isnan(row.validation) for row in finished)

    def place(row: _Row) -> tuple[bool, float]:
        value = row.validation if validated else row.test
        cost = -value if score.higher_is_better else value
        return row.status != "finished", math.inf if math.isnan(value) else cost

    rows.sort(key=place)
    keys = list(dict.fromkeys(key for job in jobs for key in job.overrides))
    _write_csv(directory / FILE, rows, keys, score)
    title = f"ranked by {'validation' if validated else 'test'} {score.name}"
    console.print(_table(title, rows, keys, score))
    console.print(f"written to {directory / FILE}", highlight=False, markup=False, soft_wrap=True)
    return 0 if len(finished) == len(rows) else 1


def _write_csv(path: Path, rows: Sequence[_Row], keys: Sequence[str], score: Score) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["rank", "run", *keys, *map(score.of, MEASURED), "seconds", "status"])
        for place, row in enumerate(rows, 1):
            numbers = [repr(value) if math.isfinite(value) else "" for value in row[2:5]]
            values = [row.job.overrides.get(key, "") for key in keys]
            writer.writerow([place, row.job.directory.name, *values, *numbers, row.status])


def _table(title: str, rows: Sequence[_Row], keys: Sequence[str], score: Score) -> Table:
    shown = [
        name for name in ("validation", "test") if any(math.isfinite(getattr(row, name)) for row in rows)
    ]
    table = Table(title=title, title_justify="left")
    for column in ("run", *keys):
        table.add_column(column, overflow="fold")
    for column in (*(f"{name} {score.name}" for name in shown), "seconds"):
        table.add_column(column, justify="right")
    table.add_column("status", overflow="fold")
    for row in rows:
        values = [getattr(row, name) for name in shown]
        scores = [score_text(value, score) if math.isfinite(value) else "" for value in values]
        seconds = f"{row.seconds:.1f}" if math.isfinite(row.seconds) else ""
        settings = [escape(row.job.overrides.get(key, "")) for key in keys]
        table.add_row(escape(row.job.directory.name), *settings, *scores, seconds, escape(row.status))
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
        status = f"failed: {failure[-1]}" if failure else "not started"
        return _Row(job, None, math.nan, math.nan, math.nan, status)
    status = str(result.summary.get("status", "unfinished"))
    if failure and status not in ("finished", "diverged"):
        status = f"failed: {failure[-1]}"
    validation, test = map(result.metric, MEASURED)
    return _Row(job, result.score, validation, test, result.number("seconds", "total"), status)
