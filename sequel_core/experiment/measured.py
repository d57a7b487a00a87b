"""Measured values of published tables: one JSON file per table, with the value of every run.

Each run has a hash of its value, its seed, the settings of its row and where it was computed, so that a file
edited by hand is detected. Settings and published values of the table are compared with those at the time of
the measurement.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from sequel_core.experiment.overrides import CONFIGS
from sequel_core.experiment.published import PublishedRow, PublishedTable
from sequel_core.experiment.schema import DOCUMENTATION
from sequel_core.runs.directory import TOGETHER
from sequel_core.runs.files import read_json, write_bytes, write_json
from sequel_core.runs.learner import Mode
from sequel_core.runs.metrics import summarise
from sequel_core.runs.results import Result

COLUMNS = (
    "table",
    "row",
    "mode",
    "seed",
    "metric",
    "value",
    "seconds",
    "threads",
    "together",
    "machine",
    "commit",
)
"""Columns of the CSV file; those of the versions follow."""


class Environment(BaseModel):
    """Where runs were computed.

    Args:
        machine: architecture and processor; None for runs that did not record it.
        threads: number of threads used for arithmetic.
        commit: git commit of this package; None if it was not a git checkout.
        versions: of Python, this package and the numerical libraries.
        together: number of runs in the compiled program that computed them; None for runs of their own.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    machine: str | None
    threads: int
    commit: str | None
    versions: dict[str, str]
    together: int | None = None


class MeasuredRun(BaseModel):
    """One run.

    Args:
        value: of the row's metric, in percent if the score is a fraction.
        seconds: of the whole run; of runs at once, each one's share.
        environment: index into `MeasuredTable.environments`.
        hash: see `run_hash`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    value: float
    seconds: float
    environment: int
    hash: str


class MeasuredRow(BaseModel):
    """A row in one framework.

    Args:
        settings: see `settings_hash`.
        published: value, spread and number of runs of the table at the time of the measurement.
        runs: by seed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    settings: str
    published: dict[str, float | int | None]
    runs: dict[int, MeasuredRun]

    @property
    def values(self) -> dict[int, float]:
        """The values by seed."""
        return {seed: run.value for seed, run in self.runs.items()}


class MeasuredTable(BaseModel):
    """The measured values of a table.

    Args:
        table: its name.
        environments: where the runs were computed.
        rows: by name and mode.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    table: str
    environments: list[Environment] = []
    rows: dict[str, dict[Mode, MeasuredRow]] = {}

    def check(self, table: PublishedTable) -> None:
        """Raise ValueError if a value, a setting or a published value has changed since it was measured.

        Args:
            table: with the rows that were measured.

        Raises:
            ValueError: the error names the row.
        """
        for key, by_mode in self.rows.items():
            if key not in table.rows:
                raise ValueError(f"{self.table}: measured row {key} is not in the table; delete it")
            row = table.rows[key]
            for mode, measured in by_mode.items():
                again = f"measure it again: sequel reproduce {self.table} --rows {key} --mode {mode} --record"
                if measured.settings != settings_hash(table, row):
                    raise ValueError(f"{self.table}: the settings of {key} have changed; {again}")
                if measured.published != _published(row):
                    raise ValueError(
                        f"{self.table}: the published value of {key} must be that at the time of the "
                        f"measurement, {measured.published}, got {_published(row)}; {again}"
                    )
                for seed, run in measured.runs.items():
                    environment = self.environments[run.environment]
                    if run.hash != run_hash(measured.settings, mode, seed, run, environment):
                        raise ValueError(
                            f"{self.table}: {key}, {mode}, seed {seed} must be as the run recorded it, got "
                            f"{run.value:g} with another hash; {again}"
                        )


def _hash(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def settings_hash(table: PublishedTable, row: PublishedRow) -> str:
    """Return a hash of the metric and the settings of a row, including those of the experiment it names."""
    settings = [*table.settings, *row.settings]
    folder = resources.files(CONFIGS).joinpath("experiment")
    names = [text.partition("=")[2] for text in settings if text.startswith("+experiment=")]
    files = [yaml.safe_load(folder.joinpath(f"{name}.yaml").read_text(encoding="utf-8")) for name in names]
    experiments = [{k: v for k, v in values.items() if k not in DOCUMENTATION} for values in files]
    tasks = [] if row.tasks is None else [row.tasks]
    return _hash([settings, row.metric, table.stream_varies, experiments, *tasks])


def run_hash(settings: str, mode: Mode, seed: int, run: MeasuredRun, environment: Environment) -> str:
    """Return a hash of everything that is recorded of a run."""
    return _hash(
        [settings, mode, seed, run.value, run.seconds, environment.model_dump(exclude_defaults=True)]
    )


def _published(row: PublishedRow) -> dict[str, float | int | None]:
    return {"value": row.value, "spread": row.spread, "runs": row.runs}


def read_measured(path: Path) -> MeasuredTable:
    """Read the measured values of a table.

    Args:
        path: a JSON file that `record` wrote.

    Raises:
        OSError: there is no such file.
        ValueError: the file is damaged.
    """
    try:
        return MeasuredTable.model_validate(read_json(path.read_bytes()))
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{path} is damaged: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def measured_before(path: Path, name: str) -> MeasuredTable:
    """Return the measured values of a table; without any if there is no file yet.

    Raises:
        ValueError: the file is damaged or is that of another table.
    """
    measured = read_measured(path) if path.exists() else MeasuredTable(table=name)
    if measured.table != name:
        raise ValueError(f"{path} must be a file of the table {name}, got one of {measured.table}")
    return measured


def record(
    path: Path,
    name: str,
    table: PublishedTable,
    results: Mapping[str, Mapping[Mode, Mapping[int, Result]]],
) -> MeasuredTable:
    """Write the values of runs to a JSON file and, with the suffix `.csv`, to a CSV file beside it.

    Runs that the file has already are kept, unless they have the row, mode and seed of a new one or the
    settings of their row have changed.

    Args:
        path: the JSON file.
        name: of the table.
        table: with the rows that were measured.
        results: finished runs by row, mode and seed.

    Returns:
        What the file now holds.

    Raises:
        ValueError: the file is damaged or is that of another table.
    """
    before = measured_before(path, name)
    environments = list(before.environments)
    rows = {key: dict(by_mode) for key, by_mode in before.rows.items() if key in table.rows}
    for key, by_mode in results.items():
        row = table.rows[key]
        settings = settings_hash(table, row)
        for mode, by_seed in by_mode.items():
            earlier = rows.get(key, {}).get(mode)
            runs = dict(earlier.runs) if earlier and earlier.settings == settings else {}
            for seed, result in by_seed.items():
                environment = _environment(result)
                if environment not in environments:
                    environments.append(environment)
                runs[seed] = MeasuredRun(
                    value=metric_value(result, row),
                    seconds=round(seconds_of(result), 2),
                    environment=environments.index(environment),
                    hash="",
                )
                value = run_hash(settings, mode, seed, runs[seed], environment)
                runs[seed] = runs[seed].model_copy(update={"hash": value})
            if runs:
                rows.setdefault(key, {})[mode] = MeasuredRow(
                    settings=settings, published=_published(row), runs=dict(sorted(runs.items()))
                )
    ordered = {key: rows[key] for key in table.rows if key in rows}
    measured = _without_unused(MeasuredTable(table=name, environments=environments, rows=ordered))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, measured.model_dump(mode="json"))
    write_bytes(path.with_suffix(".csv"), as_csv(measured, table).encode())
    return measured


def _environment(result: Result) -> Environment:
    summary = result.summary
    return Environment(
        machine=summary.get("machine"),
        threads=summary["threads"],
        commit=summary.get("commit"),
        versions=summary["versions"],
        together=_together(result),
    )


def _together(result: Result) -> int | None:
    """Return the number of runs that a run was computed with, in one compiled program; None if alone."""
    path = None if result.run_dir is None else result.run_dir / TOGETHER
    return None if path is None or not path.is_file() else len(read_json(path.read_bytes())["members"])


def seconds_of(result: Result) -> float:
    """Return the seconds of a run; of runs at once, its share of the time that all of them took."""
    return result.number("seconds", "total") / (_together(result) or 1)


def _without_unused(table: MeasuredTable) -> MeasuredTable:
    """Return the table without environments in which no run was computed."""
    rows = [row for by_mode in table.rows.values() for row in by_mode.values()]
    used = sorted({run.environment for row in rows for run in row.runs.values()})
    plain = table.model_dump()
    for by_mode in plain["rows"].values():
        for row in by_mode.values():
            for run in row["runs"].values():
                run["environment"] = used.index(run["environment"])
    return MeasuredTable.model_validate(plain | {"environments": [plain["environments"][i] for i in used]})


def metric_value(result: Result, row: PublishedRow) -> float:
    """Return the metric of a row, in percent if the score is a fraction.

    Raises:
        ValueError: the run has no such number or no such task.
    """
    metric, tasks = row.metric, row.tasks
    value = result.number(metric)
    if tasks is not None:
        count = len(result.matrix)
        if not (tasks and min(tasks) >= 0 and max(tasks) < count):
            raise ValueError(f"tasks must be numbers from 0 to {count - 1}, got {list(tasks)}")
        part = result.matrix[np.ix_(tasks, tasks)]
        value = summarise(part, score=result.score).get(metric, math.nan)
    if value != value:
        raise ValueError(
            f"metric must be a number of the summary, got {metric}, which {result.run_dir} lacks; correct "
            "the table, finished runs are kept"
        )
    return 100 * value if result.score.fraction else value


def as_csv(measured: MeasuredTable, table: PublishedTable) -> str:
    """Return the runs as CSV, one line each."""
    names = list(dict.fromkeys(name for one in measured.environments for name in one.versions))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*COLUMNS, *names])
    for key, by_mode in measured.rows.items():
        for mode, row in by_mode.items():
            for seed, run in row.runs.items():
                environment = measured.environments[run.environment]
                cells = (measured.table, key, mode, seed, table.rows[key].metric, run.value, run.seconds)
                place = (environment.threads, environment.together, environment.machine, environment.commit)
                versions = [environment.versions.get(name, "") for name in names]
                writer.writerow([*cells, *place, *versions])
    return text.getvalue()
