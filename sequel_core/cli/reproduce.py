"""`sequel reproduce`: an experiment, or the rows of a table, compared with the published numbers."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from importlib import import_module, metadata, resources
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import yaml
from rich.console import Console
from rich.table import Table

from sequel_core.cli.arguments import Parser
from sequel_core.cli.processes import Processes, new_directory
from sequel_core.cli.run import execute, record_failure, stated
from sequel_core.experiment.aliases import SECTIONS, alias
from sequel_core.experiment.build import build_benchmark
from sequel_core.experiment.compose import compose
from sequel_core.experiment.overrides import CONFIGS, experiments, quoted
from sequel_core.experiment.published import tables
from sequel_core.experiment.schema import CLASSES, DOCUMENTATION, ExperimentConfig, settings
from sequel_core.runs import learner
from sequel_core.runs.files import plain
from sequel_core.runs.formatting import number
from sequel_core.runs.learner import PLUGINS, DivergenceError, Mode
from sequel_core.runs.results import TASK_GIVEN, Result, load_result
from sequel_core.runs.signals import InterruptedRunError
from sequel_core.runs.statistics import interval
from sequel_core.settings import check_name

RESULTS = Path("reproduced")
SUFFIX = "_rotatedmnist"
"""Suffix that short names of experiments omit."""


class Row(NamedTuple):
    """Runs of one mode."""

    mode: Mode
    results: Mapping[int, Result]  # finished runs by seed
    failures: Sequence[str]  # for example "seed 1 diverged"


def main(args: Sequence[str]) -> int:
    """Run the command line of `sequel reproduce`.

    Returns:
        0 if every mode reached the published number, or the table has no unexplained difference; else 1.

    Raises:
        ValueError: invalid input; raised before any work is done.
    """
    known = published()
    short = {name.removesuffix(SUFFIX): name for name in known if name.endswith(SUFFIX)}
    options = _parser(known, short).parse_args(args)
    place = [] if options.data_dir is None else [f"benchmark.data_dir={quoted(options.data_dir)}"]
    if options.name in tables() or options.name.endswith((".yaml", ".yml")):
        return _main_table(options, place)
    check_name("NAME", options.name, [*short, *known, *tables()])
    for flag in ("rows", "margin", "record", "commands"):
        if getattr(options, flag) not in ("", None, False):
            raise ValueError(f"--{flag} is for tables, got the experiment {options.name}; drop it")
    return reproduce(
        short.get(options.name, options.name),
        _modes(options.mode or "both"),
        options.seeds,
        options.results,
        place,
        options.quiet,
        options.jobs,
        options.together,
    )


def _parser(known: Mapping[str, Mapping[str, Any]], short: Mapping[str, str]) -> Parser:
    """Return the parser of the command line; its help lists the experiments and the tables."""
    width = max(map(len, known))
    lines = [f"  {name:<{width}}  {stated(expected)}" for name, expected in known.items()]
    parser = Parser(
        prog="sequel reproduce",
        description="Run a shipped experiment, or the rows of a published table, over several seeds and\n"
        "compare them with the published numbers. Finished runs are kept and reused.",
        epilog="experiments, with the published average accuracy:\n"
        + "\n".join(lines)
        + f"\ntables: {', '.join(tables())}, or a YAML file of yours",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = f"an experiment or a table, see below; short: {', '.join(short)}"
    parser.add_argument("name", nargs="?", default="", metavar="NAME", help=names)
    parser.add_argument("--mode", help="pytorch, jax or both (default: both; jax for a table)")
    parser.add_argument("--rows", default="", help="rows of a table, separated by commas; * and ? match")
    margin = "largest harmless difference (default: 1.5, or the published standard deviation if larger)"
    parser.add_argument("--margin", type=float, help=f"of a table: {margin}")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from 0 (default: 3)")
    jobs = "number of runs at a time, each in a process of its own (default: 1, in this process)"
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help=jobs)
    together = "in JAX, run the seeds of a row at once, in one compiled program"
    parser.add_argument("--together", action="store_true", help=together)
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"folder (default: {RESULTS})")
    recorded = "of a table: JSON file to which the values per seed are added; a CSV file is written beside it"
    parser.add_argument("--record", type=Path, metavar="FILE", help=recorded)
    commands = "of a table: print the command `sequel run` of each row for seed 0, and stop"
    parser.add_argument("--commands", action="store_true", help=commands)
    parser.add_argument("--data-dir", help="folder (default: SEQUEL_DATA_DIR, or the user's cache directory)")
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
    return parser


def _main_table(options: argparse.Namespace, place: Sequence[str]) -> int:
    """Run `sequel reproduce TABLE`; `sequel_core.cli.tables` imports this module, so it is imported here."""
    table_rows = import_module("sequel_core.cli.tables")
    rows = [text.strip() for text in options.rows.split(",") if text.strip()]
    modes = _modes(options.mode or "jax")[::-1]  # the verdict is that of JAX
    if options.commands:
        table_rows.print_commands(options.name, rows, modes, place)
        return 0
    exit_code: int = table_rows.reproduce_table(
        options.name,
        rows,
        modes,
        options.seeds,
        options.results,
        place,
        options.margin,
        options.quiet,
        options.record,
        options.jobs,
        options.together,
    )
    return exit_code


def _modes(text: str) -> list[Mode]:
    """Return the frameworks that `--mode` names."""
    mode = alias("mode", text)
    check_name("--mode", mode, [*PLUGINS, "both"])
    return list(PLUGINS) if mode == "both" else [cast(Mode, mode)]


def published() -> dict[str, Mapping[str, Any]]:
    """Return `expected` of the shipped experiments that give an accuracy with its spread, by name."""
    folder = resources.files(CONFIGS).joinpath("experiment")
    entries = {}
    for name in experiments():
        values = yaml.safe_load(folder.joinpath(f"{name}.yaml").read_text(encoding="utf-8"))
        entries[name] = values.get("expected") or {}
    return {name: expected for name, expected in entries.items() if {"avg_acc", "std"} <= expected.keys()}


def reproduce(
    experiment: str,
    modes: Sequence[Mode],
    seeds: int,
    results: Path,
    overrides: Sequence[str] = (),
    quiet: bool = False,
    jobs: int = 1,
    together: bool = False,
) -> int:
    """Run an experiment with several seeds, reuse finished runs, and compare them with the published number.

    Args:
        experiment: a shipped experiment with `expected.avg_acc` and `expected.std`.
        modes: the frameworks.
        seeds: number of training seeds, >= 1; they are 0, 1, ...
        results: folder of the runs, `<experiment>/<mode>_seed<k>_<fingerprint>`.
        overrides: Hydra overrides, for example for a smaller stream.
        quiet: print nothing but errors.
        jobs: number of runs at a time, >= 1. With more than one, each is in a process of its own.
        together: in JAX, run the seeds at once, in one compiled program; only with jobs=1.

    Returns:
        The exit code: 1 if a mode missed the number or a run failed, else 0.

    Raises:
        ValueError: invalid input; nothing is run.
    """
    check_counts(seeds, jobs, together)
    if results.exists() and not results.is_dir():
        raise ValueError(f"results must be a directory, got the file {results}; choose another path")
    folder = results / experiment
    runs = _composed(experiment, modes, seeds, overrides)
    check_pending(folder, list(runs.values()))
    config = next(iter(runs.values()))
    expected = config.expected

    console = Console(quiet=quiet)
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    say(f"{experiment}, compared with: {config.source or 'no source given'}")
    say(f"protocol: {config.comment or 'none given'}")
    say(f"expected average accuracy: {stated(expected)}, reached if at least {_floor(expected):g} %")
    by_mode = {mode: {s: runs[mode, s] for s in range(seeds)} for mode in modes}
    labelled = {f"{mode}, seed {seed}": config for (mode, seed), config in runs.items()}
    with start_missing(folder, labelled, jobs, say) as processes:
        rows = [
            run_seeds(mode, group, folder, say, not quiet, processes, together)
            for mode, group in by_mode.items()
        ]
    console.print(_table(experiment, rows, expected))
    verdicts = {row.mode: verdict(measured(row), expected) for row in rows}
    above = [mode for mode, outcome in verdicts.items() if outcome == "above"]
    if above:
        why = config.comment or "the experiment gives no reason"
        say(f"above the published number in {', '.join(above)}: {why}")
    say(f"the runs are in {folder}")
    failed = "missed" in verdicts.values() or any(row.failures for row in rows)
    return 1 if failed else 0


def _composed(
    experiment: str, modes: Sequence[Mode], seeds: int, overrides: Sequence[str]
) -> dict[tuple[Mode, int], ExperimentConfig]:
    """Return the configuration of each mode and seed; raise ValueError without a published number."""
    common = [f"+experiment={experiment}", *overrides]
    runs = {
        (mode, seed): compose([*common, f"mode={mode}", f"seed={seed}"]).config
        for mode in modes
        for seed in range(seeds)
    }
    expected = next(iter(runs.values())).expected
    if not {"avg_acc", "std"} <= expected.keys():
        raise ValueError(
            f"experiment must have expected.avg_acc and expected.std, got {experiment} with "
            f"{dict(expected)}; use one of {', '.join(published())}"
        )
    return runs


def check_counts(seeds: int, jobs: int, together: bool) -> None:
    """Raise ValueError unless both numbers are at least 1, and jobs is 1 for runs at once."""
    for name, value in (("seeds", seeds), ("jobs", jobs)):
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    if together and jobs > 1:
        raise ValueError(f"jobs must be 1 with --together, got {jobs}; use one of the two")


def check_pending(folder: Path, configs: Sequence[ExperimentConfig]) -> None:
    """Raise ValueError if a framework or the data of the runs to start is missing."""
    pending = [config for config in configs if kept(folder, _stem(config)) is None]
    for mode in dict.fromkeys(config.mode for config in pending):
        learner.plugin(mode)
    if pending:
        build_benchmark(pending[0])


def fingerprint(config: ExperimentConfig) -> str:
    """Return eight hexadecimal digits that identify a run: a hash of its settings and the library version.

    The data folder, fields that only document the experiment and settings with their default value are
    ignored, so that a setting which a later version adds does not invalidate a finished run.
    """
    values = {key: value for key, value in config.plain().items() if key not in DOCUMENTATION}
    values["benchmark"].pop("data_dir", None)
    for section, key in {**dict.fromkeys(CLASSES, ""), **SECTIONS}.items():
        if section in values and section not in config.user_code:
            known = settings(section, values[section].get(key, ""))
            defaults = {one.key: plain(one.key, one.default) for one in known}
            values[section] = {k: v for k, v in values[section].items() if k == key or v != defaults.get(k)}
    defaults = {spec.name: spec.default for spec in fields(ExperimentConfig)}
    values = {key: value for key, value in values.items() if value != defaults.get(key)}
    if not values.get("jax"):  # a section that version 0.1.0 did not have
        values.pop("jax", None)
    text = json.dumps([metadata.version("sequel-cl"), values], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def kept(folder: Path, stem: str) -> Result | None:
    """Return the finished run of this name, or None; unfinished, failed and damaged runs do not count."""
    for path in sorted(folder.glob(f"{stem}*")):
        try:
            result = load_result(path)
        except ValueError:
            continue
        if result.summary.get("status") == "finished" and math.isfinite(result.average_accuracy):
            return result
    return None


def verdict(mean: float, expected: Mapping[str, Any]) -> str:
    """Return `reached`, `missed` (also for nan) or `above`: higher than chance explains.

    Args:
        mean: measured average accuracy in percent.
        expected: `avg_acc`, `std` and optionally `tolerance`, in percent.
    """
    if mean > expected["avg_acc"] + max(expected.get("tolerance", 0), 2 * expected["std"]):
        return "above"
    return "reached" if mean >= _floor(expected) else "missed"


def measured(row: Row) -> float:
    """Return the mean accuracy of the finished runs in percent; nan if there are none."""
    return 100 * _mean([result.average_accuracy for result in row.results.values()])


def _floor(expected: Mapping[str, Any]) -> float:
    return float(expected["avg_acc"] - expected.get("tolerance", 0))


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.nan


def _stem(config: ExperimentConfig) -> str:
    return f"{config.mode}_seed{config.training.seed}_{fingerprint(config)}"


@contextmanager
def start_missing(
    folder: Path, labelled: Mapping[str, ExperimentConfig], jobs: int, say: Callable[[str], None]
) -> Iterator[Processes | None]:
    """Start the runs that have not finished in processes of their own; None with one job."""
    if jobs == 1:
        yield None
        return
    missing: dict[str, tuple[str, ExperimentConfig]] = {}
    for label, config in labelled.items():
        if kept(folder, _stem(config)) is None:
            missing.setdefault(_stem(config), (label, config))
    with Processes(folder, missing, jobs, say) as processes:
        yield processes


def run_seeds(
    mode: Mode,
    runs: Mapping[int, ExperimentConfig],
    folder: Path,
    say: Callable[[str], None],
    progress: bool,
    processes: Processes | None = None,
    together: bool = False,
) -> Row:
    """Run the seeds of a mode, or read finished runs; a failed run does not stop the others.

    Args:
        mode: the framework.
        runs: configurations by seed.
        folder: of the runs.
        say: prints a line.
        progress: see `sequel_core.run`.
        processes: in which the missing runs were started, if they were.
        together: run the missing seeds at once, if the mode is `jax`.
    """
    results, failures = {}, []
    at_once = _run_together(runs, folder, say, progress) if together and mode == "jax" else {}
    for seed, config in runs.items():
        name = _stem(config)
        outcome = processes.wait(name) if processes else at_once.get(seed)
        result = kept(folder, name)
        if result is not None and outcome is None:
            say(f"{mode}, seed {seed}: reused from {result.run_dir}")
        elif result is None and outcome is not None:
            failures.append(f"seed {seed} {outcome}")
            continue
        elif result is None:
            path = new_directory(folder, name)
            say(f"{mode}, seed {seed}: running in {path}")
            try:
                result = execute(config, path, progress)
            except InterruptedRunError:
                raise
            except Exception as error:
                failures.append(f"seed {seed} {_failure(error, path)}")
                continue
        results[seed] = result
    return Row(mode, results, failures)


def _run_together(
    runs: Mapping[int, ExperimentConfig], folder: Path, say: Callable[[str], None], progress: bool
) -> dict[int, str]:
    """Run the missing seeds of a row at once, if there are several; return how each one ended, by seed."""
    missing = {seed: config for seed, config in runs.items() if kept(folder, _stem(config)) is None}
    if len(missing) < 2:
        return {}
    paths = [new_directory(folder, _stem(config)) for config in missing.values()]
    say(f"jax, seeds {', '.join(map(str, missing))}: running at once in {folder}")
    execute_together = import_module("sequel_core.cli.together").execute_together
    outcomes = execute_together(list(missing.values()), paths, progress=progress)
    return {
        seed: _failure(outcome, path) if isinstance(outcome, Exception) else "finished"
        for seed, outcome, path in zip(missing, outcomes, paths, strict=True)
    }


def _failure(error: Exception, path: Path) -> str:
    """Write the reason into the directory of a run; return `diverged` or `failed`."""
    record_failure(error, path)
    return "diverged" if isinstance(error, DivergenceError) else "failed"


def _table(experiment: str, rows: Sequence[Row], expected: Mapping[str, Any]) -> Table:
    """Return a table of the runs and the published number, in percent."""
    given = any(result.task_given for row in rows for result in row.results.values())
    title = f"{experiment}, average accuracy in percent" + (f", {TASK_GIVEN}" if given else "")
    table = Table(title=title, title_justify="left", padding=0)  # 79 columns wide for three seeds
    table.add_column("mode", no_wrap=True)
    table.add_column("seeds")
    for column in ("measured", "95 % interval", "forgetting", "expected", "tolerance"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("verdict")
    for row in rows:
        accuracies = [100 * result.average_accuracy for result in row.results.values()]
        bounds = interval(accuracies)
        table.add_row(
            row.mode,
            ", ".join(map(str, row.results)) or "-",
            number(measured(row)),
            "-" if bounds is None else f"{bounds[0]:.2f} to {bounds[1]:.2f}",
            number(_mean([result.forgetting for result in row.results.values()]), 100),
            f"{expected['avg_acc']:g}",
            f"{expected.get('tolerance', 0):g}",
            ", ".join(row.failures) or verdict(measured(row), expected),
        )
    return table
