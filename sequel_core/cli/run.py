"""`sequel run`: one experiment, or a sweep; composed and checked first, then handed over to Hydra."""

from __future__ import annotations

import argparse
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.markup import escape

from sequel_core import learner
from sequel_core.cli.arguments import Parser
from sequel_core.cli.compose import CONFIGS, compose, one_line, quoted, request
from sequel_core.cli.ranking import Job, rank
from sequel_core.cli.sweep import check_streams, combinations, varied
from sequel_core.config import SPREAD, ExperimentConfig, build_benchmark, build_callbacks, settings
from sequel_core.console import Shown
from sequel_core.learner import DivergenceError
from sequel_core.results import Result, RunDirectory

VALIDATION = 0.1
REPEATS = {"mode", "seed", "training.seed", "benchmark.seed"}
"""Settings that repeat an experiment; a sweep over them alone chooses nothing."""

ERROR = "error.txt"
FULL_ERROR = "HYDRA_FULL_ERROR"  # makes hydra.main raise instead of printing and exiting
EXAMPLES = """examples:
  sequel run algo=ewc benchmark=rotateddigits mode=jax
  sequel run experiment.yaml optimizer.lr=0.1         a file in the format of the paper, with a change
  sequel run +experiment=naive_rotatedmnist           a shipped experiment; see: sequel list experiment
  sequel run -m algo=naive,ewc seed=0,1,2             a sweep: every combination, then one table
  sequel run -m +experiment=ewc_rotatedmnist benchmark.batch_size=10,20,30 optimizer.lr=0.01,0.1
  sequel run algo=ewc run_dir=results --cfg           show the composed settings and stop
  sequel run algo._target_=own.code.Method algo.k=2   code of your own: algo, benchmark, backbone, optimizer,
                                                      logger and callbacks take a `_target_`

A file's settings win over the groups', the command line's over both. `sequel list` shows all settings.
"""


def main(args: Sequence[str]) -> int:
    """Run the command line of `sequel run`.

    Returns:
        0, or 1 where a run of a sweep failed.

    Raises:
        ValueError: input that cannot be used, before any work is done.
        DivergenceError: the training loss became nan or infinite.
    """
    parser = Parser(
        prog="sequel run",
        description="Run an experiment or a sweep.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("arguments", nargs="*", metavar="FILE|KEY=VALUE", help="a file and Hydra overrides")
    parser.add_argument(
        "-m", "--multirun", action="store_true", help="run every combination of comma-separated values"
    )
    parser.add_argument("--cfg", action="store_true", help="print the composed settings and stop")
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
    options = parser.parse_intermixed_args(args)
    quiet = options.quiet and not options.cfg
    console = Console(quiet=quiet)
    if options.multirun:
        return _sweep(options.arguments, console, options.cfg)
    asked = request(options.arguments, sweep=False)
    composed = compose(asked.overrides)
    tell(console, composed.notes)
    if options.cfg:
        console.print(_yaml(composed.config), end="", markup=False, highlight=False, soft_wrap=True)
        return 0
    failures: list[Exception] = []

    def attempt(given: DictConfig) -> float:
        try:
            return job(given, quiet)
        except Exception as error:  # Hydra would print its own account of it
            failures.append(error)
            return math.nan

    with _reserved(asked.run_dir) as run_dir:
        _launch(attempt, [*asked.overrides, *asked.hydra, f"hydra.run.dir={quoted(str(run_dir))}"])
    if failures:
        raise failures[0]
    return 0


def job(_: DictConfig, quiet: bool) -> float:
    """Run one job that Hydra starts: compose, build, run, in the directory that Hydra gives it.

    Args:
        quiet: print nothing but errors.

    Returns:
        What a sweep is ranked by, a fraction; nan for a run of a sweep that failed, whose directory says why.

    Raises:
        ValueError: something wrong that only the built stream or learner could tell (single runs).
        DivergenceError: the loss became nan or infinite (single runs).
    """
    context = HydraConfig.get()
    overrides, run_dir = list(context.overrides.task), Path(context.runtime.output_dir)
    if context.mode != RunMode.MULTIRUN:
        return ranked_by(execute(compose(overrides).config, run_dir, not quiet))
    console = Console(quiet=quiet)
    written = " ".join(text.lstrip("+") for text in overrides)
    console.rule(escape(f"run {run_dir.name}: {written}"), align="left")
    try:
        composed = compose(overrides)
        if context.runtime.choices["hydra/sweeper"] != "basic":  # else all were told before the first started
            tell(console, composed.notes)
        return ranked_by(execute(composed.config, run_dir, not quiet))
    except Exception as error:
        record_failure(error, run_dir)
        return math.nan


def execute(config: ExperimentConfig, run_dir: Path, progress: Shown = True) -> Result:
    """Run one experiment.

    Args:
        config: checked.
        run_dir: an empty or new directory.
        progress: what to show of the run; all of it ends with the published results beside the measured ones.

    Raises:
        ValueError: something wrong that only the built stream or learner could tell.
        DivergenceError: the loss became nan or infinite; what was recorded until then is kept.
    """
    benchmark = build_benchmark(config)
    plugin = learner.plugin(config.mode)
    stream_callbacks, own = build_callbacks(config, run_dir)
    model = plugin.build_learner(config, benchmark, run_dir, **({"callbacks": own} if own else {}))
    result: Result = import_module("sequel_core.sequencer").run(
        model,
        benchmark,
        run_dir=run_dir,
        evaluate_every=config.evaluate_every,
        evaluate_on=config.evaluate_on,
        evaluate_future=config.evaluate_future,
        config=config.plain(),
        progress=progress,
        callbacks=stream_callbacks,
    )
    if progress is True:
        _tell_expected(Console(), config, result)
    return result


def record_failure(error: Exception, run_dir: Path) -> None:
    """Say that one run of several failed, and write why into its directory; the others go on."""
    expected = isinstance(error, ValueError | OSError | DivergenceError)
    text = one_line(error) if expected else "".join(traceback.format_exception(error)).rstrip()
    run_dir.joinpath(ERROR).write_text(f"{text}\n")
    print(f"sequel: run {run_dir.name} failed: {one_line(error)}", file=sys.stderr)


def stated(expected: Mapping[str, Any]) -> str:
    """Return the published accuracy with its spread: `46.3 % (std 1.37, 5 runs)`."""
    std, runs = expected.get("std"), expected.get("runs")
    spread = [] if std is None else [f"std {std:g}"]
    spread += [] if runs is None else [f"{runs:g} runs"]
    return f"{expected['avg_acc']:g} %" + (f" ({', '.join(spread)})" if spread else "")


def ranked_by(result: Result) -> float:
    """Return a run's accuracy on validation samples, on test samples where there are none; a fraction."""
    value = result.summary.get("validation_average_accuracy")
    return float(result.average_accuracy if value is None else value)


def _tell_expected(console: Console, config: ExperimentConfig, result: Result) -> None:
    """Print the published results beside the measured ones."""
    source = f" ({config.source})" if config.source else ""
    for key, value in config.expected.items():
        if key in SPREAD:
            continue
        text = f"{key}: measured {result.summary.get(key, 'not')}, expected {value}"
        if key == "avg_acc":
            measured = 100 * result.average_accuracy
            text = f"average accuracy: measured {measured:.2f} %, expected {stated(config.expected)}"
        console.print(f"{text}{source}", highlight=False, markup=False, soft_wrap=True)


def _sweep(arguments: Sequence[str], console: Console, show: bool) -> int:
    """Compose and check every job, then run all of them through Hydra and print one table."""
    asked = request(arguments, sweep=True)
    own_sweeper = any(text.lstrip("+").startswith("hydra/sweeper=") for text in asked.hydra)
    overrides = list(asked.overrides)
    found = [] if own_sweeper else combinations(overrides)
    if set(varied(found)) - REPEATS and not any(_validates(item.config) for item in found):
        overrides.append(f"++benchmark.validation={VALIDATION}")
        found = combinations(overrides)
        console.print(
            f"note: benchmark.validation={VALIDATION}, to rank the sweep on held-out training samples; "
            "set benchmark.validation=0 to rank it on test samples",
            highlight=False,
            soft_wrap=True,
        )
    tell(console, [note for item in found for note in item.notes])
    if show:
        for item in found:
            text = f"# {' '.join(item.overrides)}\n{_yaml(item.config)}"
            console.print(text, markup=False, highlight=False, soft_wrap=True)
        return 0
    check_streams({str(item): item.config for item in found})
    quiet = console.quiet

    def start(given: DictConfig) -> float:  # launchers pickle it, which a console cannot be
        return job(given, quiet)

    with _reserved(asked.run_dir or _sweep_directory()) as directory:
        _launch(start, [*overrides, *asked.hydra, f"hydra.sweep.dir={quoted(str(directory))}", "--multirun"])
        directory.joinpath("multirun.yaml").unlink(missing_ok=True)
    shown = varied(found)
    rows = [Job(directory / str(i), {key: item.value(key) for key in shown}) for i, item in enumerate(found)]
    if own_sweeper:
        rows = [Job(path, {}) for path in sorted(directory.iterdir()) if path.is_dir()]
    return rank(rows, directory, console)


def _validates(config: ExperimentConfig) -> bool:
    """Whether `benchmark.validation` is given, or the benchmark has no such setting."""
    choice = config.own.get("benchmark", config.benchmark.name)
    known = {spec.key for spec in settings("benchmark", choice)}
    return "validation" in config.benchmark.arguments or "validation" not in known


def _sweep_directory() -> str:
    stem = f"{datetime.now():%Y-%m-%d_%H-%M-%S}_sweep"
    names = (Path("runs") / (f"{stem}_{k}" if k else stem) for k in count())
    return str(next(name for name in names if not name.exists()))


@contextmanager
def _reserved(run_dir: str | None) -> Iterator[Path]:
    """Make the directory of a run, and take away again what was made where nothing was written into it."""
    wanted = None if run_dir is None else Path(run_dir)
    made = [path for path in (wanted, Path("runs")) if path is not None and not path.exists()]
    path = RunDirectory.create(run_dir).path.absolute()
    if run_dir is None:
        made.insert(0, path)
    try:
        yield path
    finally:
        for folder in made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def _launch(task: Callable[[DictConfig], float], arguments: Sequence[str]) -> None:
    """Let Hydra start a task for the overrides; errors come out as they were raised."""
    program = hydra.main(config_path=f"pkg://{CONFIGS}", config_name="config", version_base="1.3")(task)
    before, full_error = sys.argv, os.environ.get(FULL_ERROR)
    sys.argv, os.environ[FULL_ERROR] = ["sequel", *arguments], "1"
    try:
        program()
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(one_line(error)) from error
    finally:
        sys.argv = before
        if full_error is None:
            del os.environ[FULL_ERROR]
        else:
            os.environ[FULL_ERROR] = full_error


def tell(console: Console, notes: Sequence[str]) -> None:
    """Print the notes of a composition, each once."""
    for note in dict.fromkeys(notes):
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)


def _yaml(config: ExperimentConfig) -> str:
    return str(yaml.safe_dump(config.plain(), sort_keys=False))
