"""`sequel reproduce TABLE`: the rows of a published table with several seeds, and a verdict for each."""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sequel_core.cli.reproduce import Row, check_counts, check_pending, fingerprint, run_seeds, start_missing
from sequel_core.experiment.compose import compose
from sequel_core.experiment.measured import measured_before, metric_value, record, seconds_of
from sequel_core.experiment.published import (
    NOT_EXPRESSIBLE,
    TABLE,
    PublishedRow,
    PublishedTable,
    read_table,
)
from sequel_core.experiment.schema import ExperimentConfig
from sequel_core.runs.files import write_json
from sequel_core.runs.formatting import number
from sequel_core.runs.learner import Mode
from sequel_core.runs.metrics import summarise
from sequel_core.runs.statistics import Equivalence, interval
from sequel_core.runs.versions import loaded_versions, machine

NOT_AT_THE_END = [key for key, value in summarise([[math.nan] * 2, [0.5] * 2]).items() if math.isnan(value)]
"""Metrics that one evaluation at the end of the stream does not give."""


class Measured(NamedTuple):
    """A row of the table in one framework."""

    mode: Mode
    values: Mapping[int, float]  # by seed
    failures: Sequence[str]
    margin: float
    result: Equivalence
    seconds: float  # of all seeds
    fingerprint: str  # of the settings with seed 0


def reproduce_table(
    name: str,
    patterns: Sequence[str],
    modes: Sequence[Mode],
    seeds: int,
    results: Path,
    overrides: Sequence[str] = (),
    margin: float | None = None,
    quiet: bool = False,
    recorded: Path | None = None,
    jobs: int = 1,
    together: bool = False,
) -> int:
    """Run the rows of a published table, reuse finished runs, and write measured beside published values.

    The verdict of a row is that of the first mode: two one-sided tests at level 5 % (see `equivalence`).

    Args:
        name: a shipped table, or the path of a YAML file.
        patterns: names of rows, with `*` and `?`; empty for all.
        modes: the frameworks.
        seeds: number of seeds, >= 1; they are 0, 1, ...
        results: folder; the runs are `<table>/<mode>_seed<k>_<fingerprint>`, which rows with equal settings
            share, and the table is `<table>/table.json`.
        overrides: Hydra overrides of all rows.
        margin: largest harmless difference; None for the larger of 1.5 and the published standard deviation.
        quiet: print nothing but errors.
        recorded: JSON file to which the values per seed are added, see `sequel_core.experiment.measured`.
        jobs: number of runs at a time, >= 1. With more than one, each is in a process of its own.
        together: in JAX, run the seeds of a row at once, in one compiled program; only with jobs=1.

    Returns:
        The exit code: 1 if a run failed, or if a verified row differs and its cause is not in the file.

    Raises:
        ValueError: invalid input; nothing is run.
    """
    check_counts(seeds, jobs, together)
    if margin is not None and not margin > 0:
        raise ValueError(f"margin must be > 0, got {margin}")
    table, stem = read_table(name), Path(name).stem
    chosen = _chosen(table, patterns)
    if recorded is not None:
        measured_before(recorded, stem)
    folder = results / stem
    composed = cache(lambda settings: compose(settings).config)  # rows may share settings
    configs = {
        key: {
            mode: {s: composed(_settings(table, row, mode, s, overrides)) for s in range(seeds)}
            for mode in modes
        }
        for key, row in chosen.items()
        if not row.not_expressible
    }
    _check_runs(chosen, configs, folder)
    console = Console(quiet=quiet)
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    say(f"{table.title}, {table.source}")
    say(f"protocol: {table.protocol}")
    for what, text in table.details(chosen).items():
        say(f"{what}: {text}")
    measured: dict[str, list[Measured]] = {}
    labelled = {
        f"{key}, {mode}, seed {seed}": config
        for key, by_mode in configs.items()
        for mode, group in by_mode.items()
        for seed, config in group.items()
    }
    with start_missing(folder, labelled, jobs, say) as processes:
        for key, by_mode in configs.items():
            runs = [
                run_seeds(mode, group, folder, say, not quiet, processes, together)
                for mode, group in by_mode.items()
            ]
            prints = [fingerprint(group[0]) for group in by_mode.values()]
            row_of = partial(_measured, table=table, row=chosen[key], margin=margin)
            measured[key] = [row_of(run, fingerprint=text) for run, text in zip(runs, prints, strict=True)]
            _write(folder / TABLE, stem, table, chosen, measured)
            if recorded is not None:
                record(recorded, stem, table, {key: {run.mode: run.results for run in runs}})
    console.print(_printed(table, chosen, measured))
    for line in _notes(chosen, measured):
        say(line)
    say(f"the runs and {TABLE} are in {folder}")
    if recorded is not None:
        say(f"recorded in {recorded} and {recorded.with_suffix('.csv').name}")
    failed = any(one.failures for rows in measured.values() for one in rows)
    return 1 if failed or _unexplained(chosen, measured) else 0


def _check_runs(
    chosen: Mapping[str, PublishedRow],
    configs: Mapping[str, Mapping[Mode, Mapping[int, ExperimentConfig]]],
    folder: Path,
) -> None:
    """Raise ValueError if a row's metric needs more evaluations, or something is missing for its runs."""
    for key, by_mode in configs.items():
        group = [config for by_seed in by_mode.values() for config in by_seed.values()]
        if chosen[key].metric in NOT_AT_THE_END and any(one.evaluate_every == "end" for one in group):
            raise ValueError(
                f"rows.{key}: metric={chosen[key].metric} needs an evaluation after every task, got "
                "evaluate_every=end; use evaluate_every=task"
            )
        check_pending(folder, group)


def _unexplained(chosen: Mapping[str, PublishedRow], measured: Mapping[str, Sequence[Measured]]) -> bool:
    """Return whether a verified row differs and its cause is not in the file."""
    return any(
        rows[0].result.verdict.startswith("different")
        and chosen[key].evidence == "verified"
        and not chosen[key].cause
        for key, rows in measured.items()
    )


def print_commands(
    name: str, patterns: Sequence[str], modes: Sequence[Mode], overrides: Sequence[str]
) -> None:
    """Print the command that runs each row with seed 0, below what is known to differ.

    Args:
        name: a shipped table, or the path of a YAML file.
        patterns: names of rows, with `*` and `?`; empty for all.
        modes: the frameworks.
        overrides: Hydra overrides of all rows.

    Raises:
        ValueError: the table or a row does not exist.
    """
    table = read_table(name)
    for key, row in _chosen(table, patterns).items():
        print(f"# {key}: {row.location}")
        for note in row.notes(None):
            print(f"# {note}")
        if not row.not_expressible:
            for mode in modes:
                print("sequel run", shlex.join(_settings(table, row, mode, 0, overrides)))


def _chosen(table: PublishedTable, patterns: Sequence[str]) -> dict[str, PublishedRow]:
    """Return the rows whose names match a pattern; all without patterns."""
    for pattern in patterns:
        if not any(fnmatchcase(key, pattern) for key in table.rows):
            raise ValueError(f"--rows must match a row, got {pattern}; the rows are {', '.join(table.rows)}")
    matching = {k: row for k, row in table.rows.items() if any(fnmatchcase(k, p) for p in patterns)}
    return matching if patterns else table.rows


def _settings(
    table: PublishedTable, row: PublishedRow, mode: Mode, seed: int, overrides: Sequence[str]
) -> tuple[str, ...]:
    """Return the overrides of one run."""
    stream = [f"benchmark.seed={seed}"] if table.stream_varies else []
    return (*table.settings, *row.settings, *overrides, f"mode={mode}", f"seed={seed}", *stream)


def _measured(
    run: Row, table: PublishedTable, row: PublishedRow, margin: float | None, fingerprint: str
) -> Measured:
    """Compare the runs of a row in one framework with the published value."""
    values = {seed: metric_value(result, row) for seed, result in run.results.items()}
    bound, result = table.compare(row, list(values.values()), margin)
    seconds = sum(map(seconds_of, run.results.values()))
    return Measured(run.mode, values, run.failures, bound, result, seconds, fingerprint)


def _printed(
    table: PublishedTable, chosen: Mapping[str, PublishedRow], measured: Mapping[str, Sequence[Measured]]
) -> Table:
    """Return the measured values beside the published ones, in 80 columns."""
    printed = Table(
        title="measured: mean (standard deviation) and 95 % interval; verdict: 90 % interval of the "
        f"difference against the margin; published: mean ({table.spread})",
        title_justify="left",
        padding=0,
        show_lines=True,
    )
    printed.add_column("row", overflow="fold")
    printed.add_column("mode")
    for column in ("measured", "published", "difference", "seconds"):
        printed.add_column(column, justify="right")
    printed.add_column("verdict")
    for key, row in chosen.items():
        label = escape(key) + ("" if row.evidence == "verified" else "\nrecalled")
        for one in measured.get(key, ()):
            values = list(one.values.values())
            bounds = interval(values)
            mean = number(float(np.mean(values)) if values else math.nan)
            if bounds is not None:
                mean += f" ({np.std(values, ddof=1):.2f})\n{bounds[0]:.2f} to {bounds[1]:.2f}"
            printed.add_row(
                label,
                f"{one.mode}\n{len(values)} seed" + ("" if len(values) == 1 else "s"),
                mean,
                row.published,
                f"{number(one.result.difference)}\nmargin {one.margin:g}",
                f"{one.seconds:.0f}",
                "\n".join(one.failures) or one.result.verdict.replace(", ", ",\n"),
            )
        if row.not_expressible:
            printed.add_row(label, "-", "-", row.published, "-", "-", NOT_EXPRESSIBLE)
    return printed


def _notes(chosen: Mapping[str, PublishedRow], measured: Mapping[str, Sequence[Measured]]) -> list[str]:
    """Return the counts of the verdicts, and what is known of rows that are not equivalent."""
    verdicts = {key: rows[0].result.verdict for key, rows in measured.items()}
    words = {key: verdicts.get(key, NOT_EXPRESSIBLE) for key in chosen}
    lines: list[str] = []
    for evidence in ("verified", "recalled"):
        counts = Counter(words[key] for key, row in chosen.items() if row.evidence == evidence)
        if counts:
            counted = "" if evidence == "verified" else ", which do not count until the paper is read"
            text = "; ".join(f"{count} {word}" for word, count in counts.items())
            lines.append(f"{evidence} rows{counted}: {text}")
    for key, row in chosen.items():
        result = measured[key][0].result if key in measured else None
        lines += [f"{key}: {note}" for note in row.notes(result)]
    return lines


def _write(
    path: Path,
    stem: str,
    table: PublishedTable,
    chosen: Mapping[str, PublishedRow],
    measured: Mapping[str, Sequence[Measured]],
) -> None:
    """Write the table as JSON."""

    def of(one: Measured) -> dict[str, Any]:
        values = {str(seed): value for seed, value in one.values.items()}
        numbers = {"margin": one.margin, "seconds": one.seconds, "fingerprint": one.fingerprint}
        result = one.result._asdict() | {"interval": list(one.result.interval)}
        return {"values": values, "failures": list(one.failures), **numbers, **result}

    rows = {
        key: {**row.model_dump(mode="json"), "measured": {one.mode: of(one) for one in measured.get(key, ())}}
        for key, row in chosen.items()
    }
    plain = {
        "table": stem,
        **table.model_dump(mode="json", exclude={"rows"}),
        "versions": loaded_versions(),
        "machine": machine(),
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, plain)
