"""`sequel run`: run an experiment or a sweep. Everything is composed and checked before Hydra starts it."""

from __future__ import annotations

import argparse
import logging
import math
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from itertools import chain, count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.markup import escape

from sequel_core.cli.arguments import Parser
from sequel_core.cli.ranking import Job, rank
from sequel_core.cli.sweep import Combination, check_streams, combinations, varied
from sequel_core.experiment.build import build_benchmark, build_callbacks
from sequel_core.experiment.compose import compose, other_version_of
from sequel_core.experiment.overrides import CONFIGS, one_line, quoted, request
from sequel_core.experiment.schema import SPREAD, ExperimentConfig, settings
from sequel_core.objectives import ACCURACY
from sequel_core.runs import learner
from sequel_core.runs.callbacks import StreamCallback
from sequel_core.runs.directory import CONFIG, ERROR, RunDirectory, assigned, new_path
from sequel_core.runs.learner import DivergenceError, LostProcessError
from sequel_core.runs.orchestrator import Resume, Shown
from sequel_core.runs.results import Result, with_score
from sequel_core.runs.signals import InterruptedRunError
from sequel_core.runs.versions import PACKAGE
from sequel_core.stream.benchmark import Benchmark

VALIDATION = 0.1
HELD_OUT = (
    f"benchmark.validation={VALIDATION} is set, to rank the sweep on held-out samples; "
    "set benchmark.validation=0 to rank it on test samples"
)
REPEATS = {"mode", "seed", "training.seed", "benchmark.seed"}
"""Settings that only repeat an experiment: a sweep over these needs no validation samples."""

LAUNCHERS = {
    "joblib": "joblib",
    "ray": "ray",
    "slurm": "submitit",
    "submitit_local": "submitit",
    "submitit_slurm": "submitit",
}
"""Hydra's launchers, and the extra of this package that installs each."""

FULL_ERROR = "HYDRA_FULL_ERROR"  # makes hydra.main raise instead of printing and exiting
EXAMPLES = """examples:
  sequel run algo=ewc benchmark=rotateddigits mode=jax
  sequel run experiment.yaml optimizer.lr=0.1         a file in the format of the SequeL paper
  sequel run +experiment=naive_rotatedmnist           a shipped experiment; see: sequel list experiment
  sequel run -m algo=naive,ewc seed=0,1,2             a sweep: every combination, and a table at the end
  sequel run -m +experiment=ewc_rotatedmnist benchmark.batch_size=10,20,30 optimizer.lr=0.01,0.1
  sequel run resume=runs/2026-11-25_10-00-00          resume an interrupted run
  sequel run algo=ewc run_dir=results resume=auto     start the run, or resume it if it was interrupted
  sequel run algo=ewc run_dir=results --check         check settings and data, then stop
  sequel run algo=ewc run_dir=results --cfg           print the composed settings, then stop
  sequel run algo._target_=my.code.Method algo.k=2    your code: algo, benchmark, backbone, optimizer, logger
                                                      and callbacks accept a `_target_`

The command line overrides the file, and the file overrides the config groups. `sequel list` shows all
settings.
"""


def main(args: Sequence[str]) -> int:
    """Run the command line of `sequel run`.

    Returns:
        0, or 1 if a run of a sweep failed.

    Raises:
        ValueError: invalid input; raised before any work is done.
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
    parser.add_argument("--check", action="store_true", help="check settings, data and network, and stop")
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
    parser.add_argument("-v", "--verbose", action="store_true", help="also print how steps are taken")
    options = parser.parse_intermixed_args(args)
    quiet = options.quiet and not options.cfg
    console = Console(quiet=quiet)
    arguments, resume = resumed(options.arguments)
    try:
        with _printed_logs() if options.verbose else nullcontext():
            if options.multirun:
                return _sweep(arguments, console, options.cfg, options.check, resume)
            return _single(arguments, console, options.cfg, options.check, resume)
    except ValueError as error:
        other = other_version_of(arguments)
        if not other or f"written by {PACKAGE}" in str(error):
            raise
        raise ValueError(f"{error}{other}") from error


def _single(arguments: Sequence[str], console: Console, show: bool, test: bool, resume: Resume) -> int:
    """Run an experiment, or only print or check it."""
    quiet = console.quiet
    asked = request(arguments, sweep=False)
    if resume and asked.run_dir is None:
        raise ValueError("resume=auto needs run_dir=DIR, got none; set run_dir or use resume=DIR")
    composed = compose(asked.overrides)
    print_notes(console, composed.notes)
    if show:
        console.print(_yaml(composed.config), end="", markup=False, highlight=False, soft_wrap=True)
    if test:
        check(composed.config, console)
    if show or test:
        return 0
    failures: list[Exception] = []

    def attempt(_: DictConfig) -> float:
        try:
            folder = Path(HydraConfig.get().runtime.output_dir)
            return ranked_by(execute(composed.config, folder, not quiet, resume))
        except Exception as error:  # Hydra would print it in its own format
            failures.append(error)
            return math.nan

    with _reserved(asked.run_dir, resume) as run_dir:
        if resume and RunDirectory(run_dir).finished():
            console.print(f"the run in {run_dir} has finished", markup=False, highlight=False, soft_wrap=True)
        _launch(attempt, [*asked.overrides, *asked.hydra, f"hydra.run.dir={quoted(str(run_dir))}"])
    if failures and isinstance(failures[0], InterruptedRunError):
        argument = shlex.quote(f"resume={run_dir}")
        raise InterruptedRunError(failures[0].number, f"to go on: sequel run {argument}")
    if failures:
        raise failures[0]
    return 0


class _Printer(logging.Handler):
    """Prints to the standard error of the moment, which a progress bar replaces."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a line."""
        print(f"sequel: {record.getMessage()}", file=sys.stderr)


@contextmanager
def _printed_logs() -> Iterator[None]:
    """Print what the plug-ins log about how they run."""
    handler, loggers = _Printer(), [logging.getLogger(name) for name in learner.PLUGINS.values()]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)


def resumed(arguments: Sequence[str]) -> tuple[list[str], Resume]:
    """Return the arguments without `resume`, and how to resume; `resume=DIR` adds the settings of its run.

    Raises:
        ValueError: the directory has no run, or a file or another directory is given, too.
    """
    left = [text for text in arguments if not text.startswith("resume=")]
    values = [text.partition("=")[2] for text in arguments if text.startswith("resume=")]
    if not values or values[-1] in ("null", "auto"):
        return left, "auto" if values and values[-1] == "auto" else False
    directory = Path(values[-1])
    for text in left:
        if "=" not in text or text.lstrip("+").startswith(("run_dir=", "file=", "experiment=")):
            raise ValueError(f"resume={directory} uses the settings and directory of its run; remove {text}")
    if not (directory / CONFIG).is_file():
        raise ValueError(
            f"resume must be a run directory or auto, got {directory}, which has no {CONFIG}; if its run was "
            "ended before training began, start it again with its settings"
        )
    return [str(directory / CONFIG), *left, f"run_dir={directory}"], True


def check(config: ExperimentConfig, console: Console) -> None:
    """Build the stream, the network and the loggers of an experiment, and report that it is valid.

    Raises:
        ValueError: a setting does not fit the stream, the network or the loggers.
    """
    benchmark = build_benchmark(config)
    with learner.plugin(config.mode).process_settings(config), TemporaryDirectory() as folder:
        made = build(config, benchmark, Path(folder))[0]
        parameters = made.describe()["parameters"]
        made.close()
    console.print(
        f"valid: {made.hparams.name} on {benchmark.name} in {made.mode}, {len(benchmark)} tasks, "
        f"{parameters:,} parameters",
        highlight=False,
        soft_wrap=True,
    )


def job(_: DictConfig, quiet: bool, resume: Resume = False) -> float:
    """Run one job of a sweep: compose, build and run the experiment in the directory that Hydra chose.

    Args:
        quiet: print nothing but errors.
        resume: see `sequel_core.run`.

    Returns:
        The score by which a sweep is ranked, see `ranked_by`; nan if the run failed. Its directory then
        contains the reason.
    """
    context = HydraConfig.get()
    overrides, run_dir = list(context.overrides.task), Path(context.runtime.output_dir)
    console = Console(quiet=quiet)
    written = " ".join(text.lstrip("+") for text in overrides)
    console.rule(escape(f"run {run_dir.name}: {written}"), align="left")
    try:
        composed = compose(overrides)
        if context.runtime.choices["hydra/sweeper"] != "jobs":  # else they were printed before
            print_notes(console, composed.notes)
        return ranked_by(execute(composed.config, run_dir, not quiet, resume))
    except InterruptedRunError as error:
        if error.number != signal.SIGINT and callable(signal.getsignal(error.number)):
            signal.raise_signal(error.number)  # for a launcher that requeues the job, as submitit does
        raise KeyboardInterrupt from error  # Hydra starts the next run after an Exception
    except Exception as error:
        record_failure(error, run_dir)
        return math.nan


def build(
    config: ExperimentConfig, benchmark: Benchmark, run_dir: Path
) -> tuple[learner.Learner, Sequence[StreamCallback]]:
    """Return the learner of an experiment and the callbacks of the orchestrator.

    Raises:
        ValueError: a setting does not fit the built learner.
    """
    stream_callbacks, learner_callbacks = build_callbacks(config, run_dir)
    plugin = learner.plugin(config.mode)
    made: learner.Learner = plugin.build_learner(config, benchmark, run_dir, callbacks=learner_callbacks)
    return made, stream_callbacks


def execute(
    config: ExperimentConfig, run_dir: Path, progress: Shown = True, resume: Resume = False
) -> Result:
    """Run one experiment.

    Args:
        config: a checked configuration.
        run_dir: an empty or new directory, or that of the run to resume.
        progress: see `sequel_core.run`; with True, the published results are printed at the end.
        resume: see `sequel_core.run`.

    Raises:
        ValueError: a setting does not fit the built stream or learner.
        DivergenceError: the loss became nan or infinite. The records up to then are kept.
    """
    benchmark = build_benchmark(config)
    with learner.plugin(config.mode).process_settings(config):
        model, stream_callbacks = build(config, benchmark, run_dir)
        result: Result = import_module("sequel_core.runs.orchestrator").run(
            model,
            benchmark,
            run_dir=run_dir,
            evaluate_every=config.evaluate_every,
            evaluate_on=config.evaluate_on,
            evaluate_future=config.evaluate_future,
            config=config.plain(),
            progress=progress,
            callbacks=stream_callbacks,
            resume=resume,
            checkpoint=config.checkpoint,
        )
    if progress is True:
        _print_expected(Console(), config, result)
    return result


def record_failure(error: Exception, run_dir: Path) -> None:
    """Print that a run of several failed and write the reason into its directory; the others continue."""
    expected = isinstance(error, ValueError | OSError | DivergenceError | LostProcessError)
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
    """Return the average score of a run on the validation samples, or on the test samples if it has none.

    A search, such as by Hydra's Optuna sweeper, maximises it, or minimises it if lower is better
    (`hydra.sweeper.direction`).
    """
    value = result.metric("validation_average_score")
    return result.metric("average_score") if math.isnan(value) else value


def _print_expected(console: Console, config: ExperimentConfig, result: Result) -> None:
    """Print the measured and the published results."""
    source = f" ({config.source})" if config.source else ""
    for key, value in config.expected.items():
        if key in SPREAD:
            continue
        text = f"{key}: measured {result.summary.get(key, 'not')}, expected {value}"
        if key == "avg_acc" and result.score == ACCURACY:
            measured = 100 * result.average_accuracy
            text = f"average accuracy: measured {measured:.2f} %, expected {stated(config.expected)}"
        console.print(f"{text}{source}", highlight=False, markup=False, soft_wrap=True)


def _sweep(arguments: Sequence[str], console: Console, show: bool, test: bool, resume: Resume) -> int:
    """Compose and check all jobs, run them through Hydra and print a table."""
    asked = request(arguments, sweep=True)
    launcher = _launcher(asked.hydra, check=not show)
    other_sweeper = any(text.lstrip("+").startswith("hydra/sweeper=") for text in asked.hydra)
    overrides = list(asked.overrides)
    jobs = [] if other_sweeper else combinations(overrides)
    if set(varied(jobs)) - REPEATS and not any(_validates(item.config) for item in jobs):
        overrides.append(f"++benchmark.validation={VALIDATION}")
        jobs = combinations(overrides)
        print_notes(console, [HELD_OUT])
    print_notes(console, [note for item in jobs for note in item.notes])
    for item in jobs:
        if show:
            text = f"# {' '.join(item.overrides)}\n{_yaml(item.config)}"
            console.print(text, markup=False, highlight=False, soft_wrap=True)
        if test:
            check(item.config, console)
    if show or test:
        return 0
    if resume is True or (resume and asked.run_dir is None):
        raise ValueError("resume must be auto for a sweep, with run_dir=DIR; it resumes all runs there")
    scores = check_streams({str(item): item.config for item in jobs})
    quiet = console.quiet

    def start(given: DictConfig) -> float:  # launchers pickle it, and a console cannot be pickled
        return job(given, quiet, resume)

    vars(start)["together"] = partial(_together, quiet=quiet, resume=resume)  # for hydra/launcher=vmap
    together = launcher == "vmap"
    if together:
        import_module("sequel_core.cli.together").check_together([item.config for item in jobs])

    with _reserved(asked.run_dir or str(new_path("_sweep")), resume) as directory:
        configs = [with_score(item.config.plain(), score) for item, score in zip(jobs, scores, strict=True)]
        free = map(str, count(len(jobs)))
        places = assigned(directory, configs, [chain([str(k)], free) for k in range(len(jobs))])
        missing = [k for k, path in enumerate(places) if together or not RunDirectory(path).finished()]
        if len(missing) < len(jobs):
            print_notes(console, [f"{len(jobs) - len(missing)} of {len(jobs)} runs are finished"])
        if not other_sweeper:
            vars(start)["jobs"] = [_of_launcher(jobs[k], places[k]) for k in missing]
            overrides.append("hydra/sweeper=jobs")
        arguments = [*overrides, *asked.hydra, f"hydra.sweep.dir={quoted(str(directory))}", "--multirun"]
        if missing or other_sweeper:
            _launch_sweep(start, arguments, directory)
        directory.joinpath("multirun.yaml").unlink(missing_ok=True)
        shown = varied(jobs)
        rows = [
            Job(path, {key: item.value(key) for key in shown})
            for path, item in zip(places, jobs, strict=True)
        ]
        if other_sweeper:
            paths = [path for path in sorted(directory.iterdir()) if path.is_dir() and path.name[0] != "."]
            rows = [Job(path, {}) for path in paths]
        return rank(rows, directory, console)


def _launcher(hydra_overrides: Sequence[str], check: bool) -> str:
    """Return the name of the launcher; with `check`, raise ValueError if its package is not installed."""
    given = [
        text.partition("=")[2] for text in hydra_overrides if text.lstrip("+").startswith("hydra/launcher=")
    ]
    name = given[-1] if given else "basic"
    extra = LAUNCHERS.get(name)
    if check and extra and find_spec(f"hydra_plugins.hydra_{extra}_launcher") is None:
        raise ValueError(f"hydra/launcher={name} needs a package; run: pip install 'sequel-cl[{extra}]'")
    return name


def _of_launcher(item: Combination, run_dir: Path) -> list[str]:
    """Return the overrides of a job in the given directory, without the error of an earlier start."""
    run_dir.joinpath(ERROR).unlink(missing_ok=True)
    return [*item.overrides, f"hydra.sweep.subdir={quoted(run_dir.name)}"]


def _launch_sweep(task: Callable[[DictConfig], float], arguments: Sequence[str], directory: Path) -> None:
    """Let Hydra start a sweep, and print an error of its launcher, such as that a worker was killed."""
    try:
        _launch(task, arguments)
    except ValueError:
        raise
    except Exception as error:
        print(
            f"sequel: the launcher failed: {type(error).__name__}: {one_line(error)}; repeat the command "
            f"with run_dir={directory} resume=auto to run what is missing",
            file=sys.stderr,
        )


def _together(jobs: Any, width: int | None, quiet: bool, resume: Resume) -> Any:
    return import_module("sequel_core.cli.together").run_jobs(jobs, width, quiet=quiet, resume=resume)


def _validates(config: ExperimentConfig) -> bool:
    """Return whether `benchmark.validation` is given or the benchmark has no such setting."""
    choice = config.user_code.get("benchmark", config.benchmark.name)
    known = {spec.key for spec in settings("benchmark", choice)}
    return "validation" in config.benchmark.arguments or "validation" not in known


@contextmanager
def _reserved(run_dir: str | None, resume: Resume = False) -> Iterator[Path]:
    """Make the directory of a run; remove the new directories again if nothing was written into them."""
    requested = None if run_dir is None else Path(run_dir)
    if resume and requested is not None and requested.is_dir():
        yield requested.absolute()
        return
    made = [path for path in (requested, Path("runs")) if path is not None and not path.exists()]
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
    """Let Hydra start a task for the overrides; errors are raised unchanged."""
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


def print_notes(console: Console, notes: Sequence[str]) -> None:
    """Print each note of a composition once."""
    for note in dict.fromkeys(notes):
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)


def _yaml(config: ExperimentConfig) -> str:
    return str(yaml.safe_dump(config.plain(), sort_keys=False))
