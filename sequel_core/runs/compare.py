"""Several experiments on one stream, side by side: both frameworks, several algorithms, several seeds."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console, Group
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Column, Table

from sequel_core.experiment.schema import ExperimentConfig
from sequel_core.runs import learner
from sequel_core.runs.learner import PLUGINS, Learner, Mode
from sequel_core.runs.orchestrator import Shown, check_run, run
from sequel_core.runs.results import CONFIG, TASK_GIVEN, Result, RunDirectory, load_weights
from sequel_core.runs.signals import InterruptedRunError
from sequel_core.settings import check_name
from sequel_core.stream.benchmark import Benchmark

if TYPE_CHECKING:
    from sequel_core.report.runs import Estimate

REPORT = "report.html"
SETTINGS = ("evaluate_every", "evaluate_on", "evaluate_future", "callbacks", "checkpoint")
"""What `compare` hands on to `run` with a learner; a configuration has its own."""

FLOAT32 = (
    "In float32 the two frameworks round differently, and training amplifies the differences. Compare with "
    "training.dtype=float64 to see how far the computations agree."
)
"""Caption of the differences between runs in float32."""

Experiment = Learner | ExperimentConfig


class Run(NamedTuple):
    """One of the runs."""

    label: str  # what is compared, framework and seed aside
    mode: Mode
    seed: int
    directory: Path
    result: Result | None  # None where it failed; the directory says why


class Row(NamedTuple):
    """The runs that differ in their seeds alone."""

    label: str
    mode: Mode
    seeds: tuple[int, ...]  # of the runs that finished
    failed: tuple[int, ...]  # seeds
    task_given: bool  # whether predictions were given the task of each sample: `Result.task_given`
    measures: Mapping[str, Estimate]  # by the names in `measure`: means over seeds, with 95 % intervals


class Difference(NamedTuple):
    """The largest absolute differences between the two frameworks' runs with the same label and seed."""

    label: str
    seed: int
    accuracy: float  # of the accuracy matrices, a fraction; nan where they have no entry in common
    accuracy_at: tuple[int, ...]  # (i, j): after training on task i, on task j, from 0; () for 0 and nan
    weight: float  # of the final weights; nan where the networks' arrays differ in name or shape
    weight_at: str  # "dense_0/kernel[3, 17]"; empty for 0 and nan


@dataclass(frozen=True, eq=False)
class Comparison:
    """What `compare` found; rich prints it as tables.

    Args:
        directory: holds a directory per run, and the report.
        runs: in the order in which they were started.
        rows: a row per label and framework.
        differences: one for each label and seed that finished in both frameworks.
        report: the HTML file; None where no run left anything to report on.
    """

    directory: Path
    runs: tuple[Run, ...]
    rows: tuple[Row, ...]
    differences: tuple[Difference, ...]
    report: Path | None

    def __rich__(self) -> Group:
        """Return the tables."""
        tables = [_table(self.rows)]
        if self.differences:
            tables.append(_difference_table(self.differences))
            if any(run.result and run.result.config["training"]["dtype"] == "float32" for run in self.runs):
                tables[-1].caption, tables[-1].caption_justify = FLOAT32, "left"
        return Group(*tables)


def compare(
    runs: Sequence[str] | Sequence[Experiment] | Mapping[str, Experiment | Sequence[Experiment]],
    benchmark: Benchmark | None = None,
    *,
    run_dir: str | Path | None = None,
    progress: bool = True,
    **settings: Any,
) -> Comparison:
    """Run experiments one after another and put them side by side.

    All are checked before the first starts. One that fails is told, and the others go on.

    Args:
        runs: overrides as on the command line, where values with commas mean every one of them and `mode` is
            both frameworks unless given: `["+experiment=ewc_rotateddigits", "seed=0,1,2"]`. Or new learners,
            or configurations (`ExperimentConfig`): a sequence, labelled by their algorithms, or a mapping
            from labels of one's own. What has one label is compared over frameworks and seeds.
        benchmark: the stream, for learners.
        run_dir: an empty or new directory; None for a new one under `runs/`.
        progress: False to print nothing.
        settings: for learners, of `sequel_core.run`: `evaluate_every`, `evaluate_on`, `evaluate_future`,
            `callbacks`, `checkpoint`.

    Returns:
        The runs, their means and intervals over seeds, and the largest differences between the frameworks.

    Raises:
        ValueError: something that cannot be used; nothing was run and no directory made.
        InterruptedRunError: a signal asked for the end.
    """
    from sequel_core.cli.run import print_notes, record_failure
    from sequel_core.report import write_report

    console = Console(quiet=not progress)
    notes: list[str] = []
    if isinstance(runs, str) or (not isinstance(runs, Mapping) and any(isinstance(x, str) for x in runs)):
        runs, notes, place = _composed([runs] if isinstance(runs, str) else [str(text) for text in runs])
        run_dir = place if run_dir is None else run_dir
    trials = _trials(runs, benchmark, settings, "bars" if progress else False)
    print_notes(console, notes)
    directory = RunDirectory.create(run_dir).path
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    done: list[Run] = []
    for trial in trials:
        path, result = _new_directory(directory, trial), None
        say(f"{trial.name}: running in {path}")
        try:
            result = trial.start(path)
        except InterruptedRunError:
            raise
        except Exception as error:
            record_failure(error, path)
        else:
            seconds = result.summary["seconds"]["total"]
            say(f"{trial.name}: average accuracy {_percent(result.average_accuracy)} %, {seconds:.1f} s")
        done.append(Run(trial.label, trial.mode, trial.seed, path, result))
    reported = [item.directory for item in done if (item.directory / CONFIG).is_file()]
    report = directory / REPORT if reported else None
    comparison = Comparison(directory, tuple(done), _rows(done), _differences(done), report)
    console.print(comparison)
    if report:
        write_report(reported, report)
        say(f"report: {report}")
    return comparison


class _Trial(NamedTuple):
    """A run to come."""

    label: str
    mode: Mode
    seed: int
    start: Callable[[Path], Result]

    @property
    def name(self) -> str:
        return f"{self.label}, {self.mode}, seed {self.seed}"


def _composed(overrides: Sequence[str]) -> tuple[dict[str, list[ExperimentConfig]], list[str], str | None]:
    """Return the experiments of a command line by label, what to tell of them, and `run_dir`."""
    from sequel_core.cli.sweep import combinations, key_of, varied
    from sequel_core.experiment.overrides import request

    asked = request(overrides, sweep=True)
    if asked.hydra:
        raise ValueError(f"{asked.hydra[0]} is for `sequel run -m`, whose runs Hydra starts; drop it")
    both = [] if any(key_of(text) == "mode" for text in asked.overrides) else [f"++mode={','.join(PLUGINS)}"]
    found = combinations([*asked.overrides, *both])
    keys = [key for key in varied(found) if key not in ("mode", "seed", "training.seed")]
    runs: dict[str, list[ExperimentConfig]] = {}
    for item in found:
        parts = [("" if key in ("algo", "experiment") else f"{key}=") + item.value(key) for key in keys]
        runs.setdefault(", ".join(parts) or item.config.algo.name, []).append(item.config)
    return runs, [note for item in found for note in item.notes], asked.run_dir


def _trials(
    runs: Sequence[Any] | Mapping[str, Any],
    benchmark: Benchmark | None,
    settings: Mapping[str, Any],
    progress: Shown,
) -> list[_Trial]:
    """Return what is to run, in order, after every check that can be made before the first run."""
    from sequel_core.cli.run import execute
    from sequel_core.cli.sweep import check_streams

    trials, configs, learners = [], {}, set()
    for label, some in runs.items() if isinstance(runs, Mapping) else [("", runs)]:
        for one in some if isinstance(some, Sequence) else [some]:
            if isinstance(one, ExperimentConfig):
                start = partial(execute, one, progress=progress)
                trials.append(_Trial(label or one.algo.name, one.mode, one.training.seed, start))
                configs[trials[-1].name] = one
            else:
                trials.append(_learner_trial(label, one, benchmark, settings, progress))
                if one in learners:
                    raise ValueError(
                        f"learners must be new, got that of {trials[-1].name} twice; make another"
                    )
                learners.add(one)
    if not trials:
        raise ValueError("runs must hold at least one experiment, got none")
    names = [trial.name for trial in trials]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise ValueError(
            f"runs must differ in algorithm, framework or seed, got {twice} twice; give a mapping from labels"
        )
    if configs and (settings or benchmark is not None):
        name = "benchmark" if benchmark is not None else next(iter(settings))
        raise ValueError(f"{name} is for learners, a configuration has its own; drop it")
    check_streams(configs)
    for config in configs.values():
        learner.plugin(config.mode)
    return trials


def _learner_trial(
    label: str, model: Learner, benchmark: Benchmark | None, settings: Mapping[str, Any], progress: Shown
) -> _Trial:
    if not hasattr(model, "fit_task"):
        raise ValueError(
            f"runs must hold learners, configurations or overrides, got a {type(model).__name__}; the "
            "plug-ins' make_learner makes a learner"
        )
    if benchmark is None:
        raise ValueError("benchmark must be given with learners, got None; pass the one they were made with")
    for name in settings:
        check_name("settings", name, SETTINGS)
    if model.step:
        raise ValueError(f"learners must be new, got one after {model.step} steps; make another")
    check_run(model, benchmark, settings.get("evaluate_every", "task"), settings.get("evaluate_on", "test"))

    def start(run_dir: Path) -> Result:
        return run(model, benchmark, run_dir=run_dir, progress=progress, **settings)

    return _Trial(label or model.hparams.name, model.mode, model.training.seed, start)


def _new_directory(parent: Path, trial: _Trial) -> Path:
    """Make a directory whose name tells of the run."""
    stem = re.sub(r"[^\w.=+-]+", "-", trial.label)[:100]
    stem = f"{stem}_{trial.mode}_seed{trial.seed}"
    names = (f"{stem}_{k}" if k else stem for k in count())
    path = next(parent / name for name in names if not (parent / name).exists())
    path.mkdir()
    return path


def measure(result: Result) -> dict[str, float]:
    """Return what runs are compared by; accuracies are fractions.

    `steps_per_second` is over all of the training, the framework's compilation included.
    """
    seconds, steps = result.summary["seconds"], result.summary["steps"]
    return {
        "average_accuracy": result.average_accuracy,
        "forgetting": result.forgetting,
        "learning_accuracy": result.learning_accuracy,
        "seconds": seconds["total"],
        "steps_per_second": steps / seconds["train"] if seconds["train"] else math.nan,
        "memory_bytes": result.summary["memory_bytes"],
    }


def _rows(runs: Sequence[Run]) -> tuple[Row, ...]:
    from sequel_core.report.runs import estimate

    rows = []
    for label, mode in dict.fromkeys((item.label, item.mode) for item in runs):
        members = [item for item in runs if (item.label, item.mode) == (label, mode)]
        found = {item.seed: measure(item.result) for item in members if item.result}
        names = {name: None for values in found.values() for name in values}
        measures = {name: estimate([values[name] for values in found.values()]) for name in names}
        failed = tuple(item.seed for item in members if item.seed not in found)
        given = any(item.result.task_given for item in members if item.result)
        rows.append(Row(label, mode, tuple(found), failed, given, measures))
    return tuple(rows)


def _differences(runs: Sequence[Run]) -> tuple[Difference, ...]:
    finished = {(item.label, item.seed, item.mode): item for item in runs if item.result}
    found = []
    for label, seed in dict.fromkeys(key[:2] for key in finished):
        pair = [finished[label, seed, mode] for mode in PLUGINS if (label, seed, mode) in finished]
        if len(pair) == len(PLUGINS):
            matrices = [{"": item.result.matrix} for item in pair if item.result]
            accuracy, _, at = _largest(*matrices)
            weight, name, index = _largest(*(load_weights(item.directory) for item in pair))
            where = f"{name}[{', '.join(map(str, index))}]" if name else ""
            found.append(Difference(label, seed, accuracy, at, weight, where))
    return tuple(found)


def _largest(
    first: Mapping[str, NDArray[Any]], second: Mapping[str, NDArray[Any]]
) -> tuple[float, str, tuple[int, ...]]:
    """Return the largest absolute difference, the name of its array and the place in it.

    Entries that are nan in both do not count. No name and no place where there is no difference, and with
    nan where names or shapes are not the same.
    """
    found = []
    if {name: a.shape for name, a in first.items()} == {name: a.shape for name, a in second.items()}:
        for name, a in first.items():
            gap = np.abs(np.subtract(a, second[name], dtype=np.float64))
            gap = np.where(np.isnan(a) & np.isnan(second[name]), -1.0, gap)
            if gap.size and gap.max() != -1:  # nan is the greatest
                place = np.unravel_index(gap.argmax(), gap.shape)
                found.append((float(gap[place]), name, tuple(map(int, place))))
    nowhere = (math.nan, "", ())
    largest = max(found, key=lambda item: math.inf if math.isnan(item[0]) else item[0], default=nowhere)
    return largest if largest[0] else (0.0, "", ())


_left, _right = partial(Column, overflow="fold"), partial(Column, overflow="fold", justify="right")


def _table(rows: Sequence[Row]) -> Table:
    several = any(len(row.seeds) > 1 for row in rows)
    columns = [
        *map(_left, ("run", "mode", "seeds")),
        *map(_right, ("average\naccuracy\n%", "\nforget-\nting %", "learning\naccuracy\n%")),
        *map(_right, ("\n\nseconds", "\n\nsteps/s", "\n\nmemory")),
    ]
    title = "mean over seeds ± half of the 95 % confidence interval" if several else None
    table = Table(*columns, title=title, title_justify="left", padding=0)  # to fit into 80 columns
    for k, row in enumerate(rows):
        seeds = ", ".join(map(str, row.seeds)) or "-"
        seeds += f"; failed: {', '.join(map(str, row.failed))}" if row.failed else ""
        cells = ["-"] * 6
        if row.seeds:
            accuracy, forgetting, learning, seconds, rate, memory = row.measures.values()
            cells = [estimate.text(100) for estimate in (accuracy, forgetting, learning)]
            cells += [seconds.text(digits=1), rate.text(digits=0), decimal(round(memory.mean))]
        last = k + 1 == len(rows) or rows[k + 1].label != row.label
        cells = [cell.replace(" ± ", "\n± ") for cell in cells]
        label = escape(row.label) + (f", {TASK_GIVEN}" if row.task_given else "")
        table.add_row(label, row.mode, seeds, *cells, end_section=last)
    return table


def _difference_table(differences: Sequence[Difference]) -> Table:
    columns = [_left("run"), _left("seed"), _right("accuracy %"), _left("at"), _right("weights"), _left("at")]
    title = f"largest differences between {' and '.join(PLUGINS)}"
    table = Table(*columns, title=title, title_justify="left", padding=0)
    for found in differences:
        at = f"R[{', '.join(map(str, found.accuracy_at))}]" if found.accuracy_at else ""
        weight = "-" if math.isnan(found.weight) else f"{found.weight:.1e}"
        accuracy = _percent(found.accuracy)
        table.add_row(escape(found.label), str(found.seed), accuracy, at, weight, escape(found.weight_at))
    return table


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.2f}"
