"""The committed measured tables: hashes, the generated pages, and a row of each table that is run again."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

import sequel_lightning  # noqa: F401 - declares the operators of torchvision, which Lightning imports
from sequel_core.cli.run import execute
from sequel_core.experiment.compose import compose
from sequel_core.experiment.measured import MeasuredRow, MeasuredTable, metric_value, read_measured
from sequel_core.experiment.published import read_table, tables
from tests.measured import FOLDER, files

PATHS = sorted(FOLDER.glob("*.json"))
TABLES = [path.stem for path in PATHS]
SLOW = {"mcsgd", "sequel", "si"}
"""Tables whose cheapest row takes more than 30 seconds on one core: 50 for mcsgd, up to 140 for sequel."""


def test_every_file_is_that_of_a_shipped_table_and_as_its_runs_recorded_it() -> None:
    assert TABLES
    assert set(TABLES) <= set(tables())
    for path in PATHS:
        measured = read_measured(path)
        assert measured.table == path.stem
        measured.check(read_table(path.stem))


def test_the_generated_files_are_up_to_date() -> None:
    for path, text in files().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run `make tables`"


@pytest.mark.parametrize("name", TABLES)
def test_files_edited_by_hand_are_detected(name: str) -> None:
    """Every number of a run, the settings and the published value."""
    table, measured = read_table(name), read_measured(FOLDER / f"{name}.json")
    key, by_mode = next(iter(measured.rows.items()))
    mode, row = next(iter(by_mode.items()))
    seed, run = next(iter(row.runs.items()))

    def with_run(**changes: Any) -> MeasuredTable:
        runs = {**row.runs, seed: run.model_copy(update=changes)}
        rows = {**measured.rows, key: {**by_mode, mode: row.model_copy(update={"runs": runs})}}
        return measured.model_copy(update={"rows": rows})

    with_run().check(table)
    message = rf"{name}: {key}, {mode}, seed {seed} must be as the run recorded it"
    for changes in ({"value": run.value + 1e-9}, {"seconds": run.seconds + 1}):
        with pytest.raises(ValueError, match=message):
            with_run(**changes).check(table)
    elsewhere = measured.environments[run.environment].model_copy(update={"machine": "another"})
    environments = [*measured.environments[: run.environment], elsewhere]
    environments += measured.environments[run.environment + 1 :]
    with pytest.raises(ValueError, match=message):
        measured.model_copy(update={"environments": environments}).check(table)
    other_seeds = {seed + 1000 if s == seed else s: one for s, one in row.runs.items()}
    rows = {**measured.rows, key: {mode: row.model_copy(update={"runs": other_seeds})}}
    with pytest.raises(ValueError, match=rf"seed {seed + 1000} must be as the run recorded it"):
        measured.model_copy(update={"rows": rows}).check(table)
    published = table.rows[key]
    for edits, part in (
        ({"value": 1.0}, rf"the published value of {key} must be that at the time"),
        ({"settings": (*published.settings, "seed=1")}, rf"the settings of {key} have changed"),
        ({"metric": "forgetting"}, rf"the settings of {key} have changed"),
    ):
        edited = {**table.rows, key: published.model_copy(update=edits)}
        with pytest.raises(ValueError, match=part):
            measured.check(table.model_copy(update={"rows": edited}))


def cheapest(measured: MeasuredTable) -> tuple[str, MeasuredRow]:
    """Return the row whose first run took least time in JAX, of those with enough seeds for an interval."""
    rows = {key: by_mode["jax"] for key, by_mode in measured.rows.items() if "jax" in by_mode}
    rows = {key: row for key, row in rows.items() if len(row.runs) > 2}
    return min(rows.items(), key=lambda item: next(iter(item[1].runs.values())).seconds)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in TABLES]
)
def test_a_row_that_is_run_again_is_within_the_prediction_interval(name: str, tmp_path: Path) -> None:
    """99 %: mean -+ t(0.995, n - 1) s sqrt(1 + 1 / n). With equal versions and machines it is bit-equal."""
    table, measured = read_table(name), read_measured(FOLDER / f"{name}.json")
    key, recorded = cheapest(measured)
    row, (seed, run) = table.rows[key], next(iter(recorded.runs.items()))
    stream = [f"benchmark.seed={seed}"] if table.stream_varies else []
    settings = [*table.settings, *row.settings, "mode=jax", f"seed={seed}", *stream]
    result = execute(compose(settings).config, tmp_path / "run", progress=False)
    value, values = metric_value(result, row), list(recorded.values.values())
    half = stats.t.ppf(0.995, len(values) - 1) * np.std(values, ddof=1) * math.sqrt(1 + 1 / len(values))
    assert abs(value - np.mean(values)) <= half
    recorded_in, here = measured.environments[run.environment], result.summary
    versions = {name: here["versions"].get(name) for name in recorded_in.versions}
    same = recorded_in.model_copy(
        update={
            "machine": here["machine"],
            "threads": here["threads"],
            "versions": versions,
            "together": None,
        }
    )
    if same == recorded_in:
        assert value == run.value
