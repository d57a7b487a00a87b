"""What loggers of both frameworks share: failures, files, the console, TensorBoard's HParams dashboard."""

from __future__ import annotations

import csv
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from sequel_core.experiment.aliases import flatten
from sequel_core.runs.directory import METRICS, RunDirectory
from sequel_core.runs.results import read_metrics, recorded_score
from sequel_core.runs.services import abandon_wandb

CSV = "metrics.csv"
STEP = "step"
SPLITS = ("test", "validation", "val")
FLUSH_SECONDS = 10
"""Seconds between writes to TensorBoard's event files."""


class LoggerWarning(RuntimeWarning):
    """A logger failed; the run continues without it."""


class Loggers:
    """A group of loggers that receive the same calls; one that fails is dropped with a warning.

    Args:
        loggers: objects of either framework.
    """

    def __init__(self, loggers: Iterable[Any]) -> None:
        self._loggers = list(loggers)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._loggers)

    def __len__(self) -> int:
        return len(self._loggers)

    def each(self, call: Callable[[Any], Any]) -> None:
        """Call a function with every logger that has not failed."""
        for logger in list(self._loggers):
            self.attempt(logger, call, logger)

    def attempt(self, logger: Any, call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Call a function on behalf of a logger; if the call fails, warn and drop the logger.

        Nothing is called for a logger that was dropped.
        """
        if not any(logger is other for other in self._loggers):
            return
        try:
            call(*args, **kwargs)
        except Exception as error:  # services and full disks raise errors of any type
            self._loggers = [other for other in self._loggers if other is not logger]
            cause: BaseException = error
            while cause.__cause__ is not None:  # Lightning and clu wrap the error of the disk
                cause = cause.__cause__
            if isinstance(cause, ConnectionError) and type(logger).__name__.startswith("Wandb"):
                abandon_wandb()
            reason = " ".join(str(cause).split()) or type(cause).__name__
            warnings.warn(
                f"{type(logger).__name__} failed ({reason}); the run continues without it",
                LoggerWarning,
                stacklevel=4,
            )


def number(value: Any) -> float:
    """Convert a number of any library to a Python int or float."""
    return value if isinstance(value, int | float) else np.asarray(value).item()


class ConsoleTable:
    """Prints a table of the newest value of every metric after each evaluation."""

    def __init__(self) -> None:
        self._newest: dict[str, float] = {}

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Store numbers by name; print the table if some belong to an evaluation."""
        self._newest |= {name: number(value) for name, value in values.items()}
        if not any(name.partition("/")[0] in SPLITS for name in values):
            return
        rows: dict[str, list[str]] = {}
        for name, value in sorted(self._newest.items(), key=lambda item: _natural(item[0])):
            series, _, task = name.rpartition("/task_")
            rows.setdefault(f"{series}/task_*" if task.isdigit() else name, []).append(_short(value))
        table = Table(title=f"step {step}", title_justify="left")
        for heading in ("metric", "newest value"):
            table.add_column(heading, overflow="fold")
        for name, texts in rows.items():
            table.add_row(name, " ".join(texts))
        Console(highlight=False, markup=False).print(table)


def _natural(name: str) -> tuple[str, int]:
    """Return a sort key that puts task_10 after task_9."""
    series, _, task = name.rpartition("_")
    return (series, int(task)) if task.isdigit() else (name, -1)


def _short(value: float) -> str:
    if isinstance(value, int):
        return str(value)
    if abs(value) >= 1e4:
        return f"{value:.0f}"
    return f"{value:.4f}" if value == 0 or abs(value) >= 1e-3 else f"{value:.4g}"


class JsonLines:
    """Writes `metrics.jsonl`: one JSON object per line, with a step and numbers, flushed after each line.

    The first write replaces the file of an earlier run, unless `resume` was called.

    Args:
        directory: created at the first write.
    """

    def __init__(self, directory: str | Path) -> None:
        self._directory = Path(directory)
        self._started = False

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a record; nan and infinity become null."""
        if not self._started:
            self._directory.mkdir(parents=True, exist_ok=True)
            (self._directory / METRICS).unlink(missing_ok=True)
            self._started = True
        RunDirectory(self._directory).append_metrics(record)

    def write_numbers(self, step: int, values: Mapping[str, Any]) -> None:
        """Append numbers by name."""
        self.write({STEP: step, **{name: number(value) for name, value in values.items()}})

    def write_table(
        self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]
    ) -> None:
        """Append a table."""
        self.write({STEP: step, name: {"columns": columns, "rows": rows}})

    def resume(self, step: int) -> None:
        """Delete the records after a step and continue the file."""
        kept = [record for record in read_metrics(self._directory) if record.get(STEP, 0) <= step]
        for record in kept:
            self.write(record)


class CsvTable:
    """Writes `metrics.csv` in the format of Lightning's CSVLogger: one row per call, columns sorted by name.

    A new name adds a column: the file is then rewritten. The first write replaces the file of an earlier run,
    unless `resume` was called.

    Args:
        directory: created at the first write.
    """

    def __init__(self, directory: str | Path) -> None:
        self.path = Path(directory) / CSV
        self.columns: list[str] = []

    def write_numbers(self, step: int, values: Mapping[str, Any]) -> None:
        """Append a row of numbers by name."""
        row: dict[str, Any] = {STEP: step, **{name: number(value) for name, value in values.items()}}
        if row.keys() <= set(self.columns):
            with open(self.path, "a", newline="", encoding="utf-8") as file:
                csv.writer(file).writerow([row.get(name, "") for name in self.columns])
            return
        rows = read_csv(self.path) if self.columns else []
        self.columns = sorted({*self.columns, *row})
        self._replace([*rows, row])

    def resume(self, step: int) -> None:
        """Delete the rows after a step and continue the file."""
        kept = [row for row in read_csv(self.path) if int(row[STEP]) <= step]
        self.columns = list(kept[0]) if kept else []
        if self.path.is_file():
            self._replace(kept)

    def _replace(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write the whole file under a temporary name, then rename it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        with part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(rows)
        part.replace(self.path)


def read_csv(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file with a header; an empty list if there is no such file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def hparams_summaries(config: Mapping[str, Any]) -> list[Any]:
    """Return the summaries that TensorBoard's HParams dashboard reads: settings, and metrics to show.

    Args:
        config: of the run; nested settings get dotted names.
    """
    from tensorboard.plugins.hparams import api_pb2 as api
    from tensorboard.plugins.hparams.plugin_data_pb2 import SessionStartInfo

    infos, start = [], SessionStartInfo(start_time_secs=time.time())
    for name, value in flatten(config).items():
        if isinstance(value, bool):
            start.hparams[name].bool_value, data_type = value, api.DATA_TYPE_BOOL
        elif isinstance(value, int | float):
            start.hparams[name].number_value, data_type = value, api.DATA_TYPE_FLOAT64
        else:
            start.hparams[name].string_value, data_type = str(value), api.DATA_TYPE_STRING
        infos.append(api.HParamInfo(name=name, type=data_type))
    split = config.get("evaluate_on", "test")
    average = recorded_score(config, {}).of("average_score")
    names = [api.MetricName(tag=f"{split}/{metric}") for metric in (average, "forgetting")]
    metrics = [api.MetricInfo(name=name) for name in names]
    experiment = api.Experiment(hparam_infos=infos, metric_infos=metrics)
    return [
        _hparams_summary("EXPERIMENT_TAG", experiment=experiment),
        _hparams_summary("SESSION_START_INFO_TAG", session_start_info=start),
    ]


def end_summary(failed: bool) -> Any:
    """Return the summary from which the HParams dashboard reads how a run ended."""
    from tensorboard.plugins.hparams import api_pb2 as api
    from tensorboard.plugins.hparams.plugin_data_pb2 import SessionEndInfo

    status = api.STATUS_FAILURE if failed else api.STATUS_SUCCESS
    end = SessionEndInfo(status=status, end_time_secs=time.time())
    return _hparams_summary("SESSION_END_INFO_TAG", session_end_info=end)


def _hparams_summary(tag: str, **data: Any) -> Any:
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import metadata
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    about = metadata.create_summary_metadata(HParamsPluginData(**data))
    value = Summary.Value(tag=getattr(metadata, tag), metadata=about, tensor=metadata.NULL_TENSOR)
    return Summary(value=[value])
