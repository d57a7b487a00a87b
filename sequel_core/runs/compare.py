"""Comparison of several experiments on one stream: frameworks, algorithms, settings and seeds."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console, Group
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Column, Table

from sequel_core.experiment.schema import ExperimentConfig
from sequel_core.objectives import Score
from sequel_core.runs import learner
from sequel_core.runs.budget import Budget, parse_budget, within_budget
from sequel_core.runs.directory import CONFIG, ERROR, RunDirectory, assigned, numbered
from sequel_core.runs.formatting import number, scaling, score_text
from sequel_core.runs.learner import PLUGINS, Learner, Mode
from sequel_core.runs.orchestrator import Resume, Shown, check_run, recorded_settings, run
from sequel_core.runs.results import TASK_GIVEN, Result, common_score, load_result, load_weights, with_score
from sequel_core.runs.signals import InterruptedRunError
from sequel_core.runs.statistics import PairedTest, compare_pairs
from sequel_core.settings import check_name
from sequel_core.stream.benchmark import Benchmark

if TYPE_CHECKING:
    from sequel_core.report.runs import Estimate

REPORT = "report.html"
SETTINGS = ("evaluate_every", "evaluate_on", "evaluate_future", "callbacks", "checkpoint")
"""Arguments of `run` that `compare` accepts together with learners; configurations contain them."""

FLOAT32 = (
    "In float32 the two frameworks round differently, and training amplifies the differences. Compare with "
    "training.dtype=float64 to see how far the computations agree."
)
"""Caption of the differences between runs in float32."""

MEASURED = ("average_score", "forgetting", "learning_score")

Experiment = Learner | ExperimentConfig


class Run(NamedTuple):
    """One run of a comparison."""

    label: str  # of the row that it belongs to
    mode: Mode
    seed: int
    directory: Path
    result: Result | None  # None if the run failed; `error.txt` in the directory says why


class Row(NamedTuple):
    """Runs that differ only in their seeds.

    Args:
        label: of the configuration.
        mode: `pytorch` or `jax`.
        seeds: of the runs that finished.
        failed: seeds of the runs that failed.
        task_given: whether predictions used the task of each sample, see `Result.task_given`.
        measures: means over seeds with 95 % intervals, by name, such as `average_accuracy` and `forgetting`.
    """

    label: str
    mode: Mode
    seeds: tuple[int, ...]
    failed: tuple[int, ...]
    task_given: bool
    measures: Mapping[str, Estimate]


class Difference(NamedTuple):
    """Largest absolute differences between the runs of the two frameworks with equal label and seed.

    Args:
        label: of the two runs.
        seed: of the two runs.
        score: of the matrices of scores; nan if no entry is in both.
        score_at: (i, j), on task j after training on task i; () if the difference is 0 or nan.
        weight: of the final weights; nan if the arrays differ in name or shape.
        weight_at: such as `dense_0/kernel[3, 17]`; empty if the difference is 0 or nan.
    """

    label: str
    seed: int
    score: float
    score_at: tuple[int, ...]
    weight: float
    weight_at: str


@dataclass(frozen=True, eq=False)
class Comparison:
    """The result of `compare`; `rich.print` shows it as tables.

    Args:
        directory: of the comparison; it contains one directory per run, and the report.
        runs: in the order of the labels.
        rows: one per label and framework.
        differences: one per label and seed that finished in both frameworks.
        tests: by framework, the comparison of every two labels with at least two common seeds.
        report: the HTML file; None if no run has recorded anything.
        budget: what every run could use; None without a budget.

    Example:
        >>> from pathlib import Path
        >>> from sequel_core import Comparison
        >>> comparison = Comparison(Path("runs/all"), runs=(), rows=(), differences=(), tests={}, report=None)
        >>> [(row.label, row.mode, row.measures["average_accuracy"].mean) for row in comparison.rows]
        []
    """

    directory: Path
    runs: tuple[Run, ...]
    rows: tuple[Row, ...]
    differences: tuple[Difference, ...]
    tests: Mapping[Mode, Sequence[PairedTest]]
    report: Path | None
    budget: Budget | None = None

    def __rich__(self) -> Group:
        """Return the tables."""
        score = common_score(run.result.score for run in self.runs if run.result)
        tables = [_table(self.rows, score, self.budget)]
        if self.differences:
            tables.append(_difference_table(self.differences, score))
            if any(run.result and run.result.config["training"]["dtype"] == "float32" for run in self.runs):
                tables[-1].caption, tables[-1].caption_justify = FLOAT32, "left"
        lines = [f"{mode}: {test.sentence(score)}." for mode, tests in self.tests.items() for test in tests]
        return Group(*tables, *map(escape, lines))


def compare(
    runs: Sequence[str] | Sequence[Experiment] | Mapping[str, Experiment | Sequence[Experiment]],
    benchmark: Benchmark | None = None,
    *,
    run_dir: str | Path | None = None,
    progress: bool = True,
    budget: str | None = None,
    together: bool = False,
    resume: Literal[False, "auto"] = False,
    **settings: Any,
) -> Comparison:
    """Run experiments one after another and compare their results.

    All of them are checked before the first one starts. If one fails, the error is reported and the others
    still run.

    Args:
        runs: one of

            - overrides as on the command line, in which several values separated by commas are combined and
              `mode` defaults to both frameworks: `["+experiment=ewc_rotateddigits", "seed=0,1,2"]`;
            - new learners or configurations (`ExperimentConfig`), labelled by their algorithms;
            - a mapping from user-defined labels to learners or configurations.

            Runs with the same label are compared over frameworks and seeds.
        benchmark: the stream; only for learners.
        run_dir: an empty or new directory, or with `resume` that of an earlier comparison; None for a new one
            under `runs/`.
        progress: False to print nothing.
        budget: only for overrides and configurations, what every run may use: `steps=N`, `seconds=S` or
            `memory=SIZE`, see `sequel_core.runs.budget.within_budget`. Tables and report state it.
        together: run all experiments in JAX at once, see `sequel_flax.run_together`; not with a budget of
            seconds.
        resume: `"auto"` to run only what `run_dir` lacks: finished runs with the same settings are read, and
            interrupted ones are resumed. Runs with other settings stay there, but are not part of the
            comparison. Not with a budget of seconds.
        settings: only for learners, arguments of `sequel_core.run`: `evaluate_every`, `evaluate_on`,
            `evaluate_future`, `callbacks`, `checkpoint`.

    Returns:
        The runs, their means and intervals over seeds, the largest differences between the frameworks, and
        tests of the average score, paired by seed.

    Raises:
        ValueError: an argument cannot be used, or the runs have different scores; nothing was run and no
            directory was made.
        InterruptedRunError: a signal was received.

    Example:
        >>> from sequel_core import compare
        >>> small = ["benchmark=rotateddigits", "benchmark.num_tasks=2", "benchmark.subset=20"]
        >>> overrides = ["algo=naive,ewc", "mode=pytorch", *small]
        >>> comparison = compare(overrides, run_dir="runs/two", progress=False)
        >>> [(row.label, row.mode, row.seeds) for row in comparison.rows]
        [('naive', 'pytorch', (0,)), ('ewc', 'pytorch', (0,))]
    """
    from sequel_core.cli.run import print_notes
    from sequel_core.report import write_report

    console = Console(quiet=not progress)
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    notes: list[str] = []
    if isinstance(runs, str) or (not isinstance(runs, Mapping) and any(isinstance(x, str) for x in runs)):
        overrides = [runs] if isinstance(runs, str) else [str(text) for text in runs]
        runs, notes, composed_run_dir = _composed(overrides)
        run_dir = composed_run_dir if run_dir is None else run_dir
    shown: Shown = "bars" if progress else False
    allowed = None if budget is None else parse_budget(budget)
    _check_resume(resume, run_dir, allowed)
    trials = _trials(runs, benchmark, settings, shown, resume)
    if together:
        _check_together(trials, allowed)
    print_notes(console, notes)
    if allowed is not None:
        trials = _trials(within_budget(_by_label(runs), allowed, say), benchmark, settings, shown, resume)
    existing = resume and run_dir is not None and Path(run_dir).is_dir()
    directory = Path(str(run_dir)) if existing else RunDirectory.create(run_dir).path
    done = _run_all(trials, directory, benchmark, settings, say, together, resume)
    recorded = [item.directory for item in done if (item.directory / CONFIG).is_file()]
    report = directory / REPORT if recorded else None
    for item in done:
        missed = allowed.missed(item.result) if allowed is not None and item.result else ""
        if missed:
            say(f"note: {item.label}, {item.mode}, seed {item.seed} {missed}, which is not {allowed}")
    differences = () if allowed is not None and allowed.quantity == "seconds" else _differences(done)
    comparison = Comparison(
        directory, tuple(done), _rows(done), differences, _tests(done), report, budget=allowed
    )
    console.print(comparison)
    if report:
        write_report(recorded, report, budget="" if allowed is None else str(allowed))
        say(f"report: {report}")
    return comparison


def _by_label(runs: Sequence[Any] | Mapping[str, Any]) -> dict[str, list[ExperimentConfig]]:
    """Return the configurations of a comparison by label."""
    labelled: dict[str, list[ExperimentConfig]] = {}
    for label, group in runs.items() if isinstance(runs, Mapping) else [("", runs)]:
        for one in group if isinstance(group, Sequence) else [group]:
            if not isinstance(one, ExperimentConfig):
                raise ValueError(
                    f"budget is for overrides and configurations, got a {type(one).__name__}; a learner is "
                    "already built: set its epochs or its memory yourself"
                )
            labelled.setdefault(label or one.algo.name, []).append(one)
    return labelled


class _Trial(NamedTuple):
    """A run that has been checked and not yet started."""

    label: str
    mode: Mode
    seed: int
    experiment: Experiment
    config: Mapping[str, Any]  # as the run records it
    start: Callable[[Path], Result]

    @property
    def name(self) -> str:
        return f"{self.label}, {self.mode}, seed {self.seed}"

    @property
    def directory(self) -> str:
        stem = re.sub(r"[^\w.=+-]+", "-", self.label)[:100]
        return f"{stem}_{self.mode}_seed{self.seed}"


def _run_all(
    trials: Sequence[_Trial],
    parent: Path,
    benchmark: Benchmark | None,
    settings: Mapping[str, Any],
    say: Callable[[str], None],
    together: bool,
    resume: Resume,
) -> list[Run]:
    """Run the trials, or read the finished runs of an earlier comparison."""
    names = [map(str, numbered(Path(trial.directory))) for trial in trials]
    paths = assigned(parent, [trial.config for trial in trials], names)
    ended = {
        trial.name: Run(trial.label, trial.mode, trial.seed, path, load_result(path))
        for trial, path in zip(trials, paths, strict=True)
        if isinstance(trial.experiment, ExperimentConfig) and RunDirectory(path).finished()
    }
    at_once = []
    remedy = f"to go on: repeat it with {shlex.quote(f'run_dir={parent}')} resume=auto"
    try:
        for trial, path in zip(trials, paths, strict=True):
            if trial.name in ended:
                say(f"{trial.name}: reused from {path}")
                continue
            path.mkdir(exist_ok=True)
            path.joinpath(ERROR).unlink(missing_ok=True)
            if together and trial.mode == "jax":
                at_once.append((trial, path))
            else:
                ended[trial.name] = _run_trial(trial, path, say)
        if at_once:
            ended |= _run_together(at_once, parent, benchmark, settings, say, resume)
    except InterruptedRunError as error:
        raise InterruptedRunError(error.number, remedy) from error
    except KeyboardInterrupt:  # between two runs
        say(remedy)
        raise
    return [ended[trial.name] for trial in trials]


def _run_trial(trial: _Trial, path: Path, say: Callable[[str], None]) -> Run:
    """Run a trial; report and record an error instead of raising it."""
    say(f"{trial.name}: running in {path}")
    outcome: Result | Exception
    try:
        outcome = trial.start(path)
    except InterruptedRunError:
        raise
    except Exception as error:
        outcome = error
    return _ended(trial, path, outcome, say)


def _ended(trial: _Trial, path: Path, outcome: Result | Exception, say: Callable[[str], None]) -> Run:
    """Report how a trial ended; record an error in its directory."""
    from sequel_core.cli.run import record_failure

    if isinstance(outcome, Exception):
        record_failure(outcome, path)
        return Run(trial.label, trial.mode, trial.seed, path, None)
    seconds = outcome.summary["seconds"]["total"]
    average = score_text(outcome.metric("average_score"), outcome.score)
    say(f"{trial.name}: average {outcome.score.name} {average}, {seconds:.1f} s")
    return Run(trial.label, trial.mode, trial.seed, path, outcome)


def _check_together(trials: Sequence[_Trial], budget: Budget | None) -> None:
    """Raise ValueError if runs cannot be started at once."""
    from sequel_core.cli.together import check_together

    in_jax = [trial.experiment for trial in trials if trial.mode == "jax"]
    if not in_jax:
        raise ValueError("together is for runs in JAX, got none; add mode=jax, or leave together out")
    if budget is not None and budget.quantity == "seconds":
        raise ValueError(
            f"together needs a budget of steps or memory, got {budget}; runs at once share their seconds"
        )
    check_together([experiment for experiment in in_jax if isinstance(experiment, ExperimentConfig)])


def _check_resume(resume: Resume, run_dir: str | Path | None, budget: Budget | None) -> None:
    """Raise ValueError if a comparison cannot be resumed."""
    if resume not in (False, "auto"):
        raise ValueError(
            f"resume must be auto for a comparison, got {resume!r}; it resumes all runs of run_dir"
        )
    if resume and run_dir is None:
        raise ValueError("resume=auto needs run_dir, got none; set it to the directory of the comparison")
    if resume and budget is not None and budget.quantity == "seconds":
        raise ValueError(
            f"resume needs a budget of steps or memory, got {budget}; how many epochs fit is measured anew "
            "each time"
        )


def _run_together(
    trials: Sequence[tuple[_Trial, Path]],
    parent: Path,
    benchmark: Benchmark | None,
    settings: Mapping[str, Any],
    say: Callable[[str], None],
    resume: Resume,
) -> dict[str, Run]:
    """Run trials at once; return the runs by name."""
    from sequel_core.cli.together import execute_together

    say(f"{len(trials)} runs in JAX: running at once in {parent}")
    experiments: list[Any] = [trial.experiment for trial, _ in trials]
    paths = [path for _, path in trials]
    if benchmark is None:
        outcomes = execute_together(experiments, paths, progress=False, resume=resume)
    else:
        run_together = learner.plugin("jax").run_together
        outcomes = run_together(experiments, benchmark, paths, progress=False, resume=resume, **settings)
    return {
        trial.name: _ended(trial, path, outcome, say)
        for (trial, path), outcome in zip(trials, outcomes, strict=True)
    }


def _composed(overrides: Sequence[str]) -> tuple[dict[str, list[ExperimentConfig]], list[str], str | None]:
    """Return the experiments of a command line by label, notes on their composition, and `run_dir`."""
    from sequel_core.cli.sweep import combinations, key_of, varied
    from sequel_core.experiment.overrides import request

    asked = request(overrides, sweep=True)
    if asked.hydra:
        raise ValueError(f"{asked.hydra[0]} is for `sequel run -m`, whose runs Hydra starts; drop it")
    both = [] if any(key_of(text) == "mode" for text in asked.overrides) else [f"++mode={','.join(PLUGINS)}"]
    experiments = combinations([*asked.overrides, *both])
    keys = [key for key in varied(experiments) if key not in ("mode", "seed", "training.seed")]
    runs: dict[str, list[ExperimentConfig]] = {}
    for item in experiments:
        parts = [("" if key in ("algo", "experiment") else f"{key}=") + item.value(key) for key in keys]
        runs.setdefault(", ".join(parts) or item.config.algo.name, []).append(item.config)
    return runs, [note for item in experiments for note in item.notes], asked.run_dir


def _trials(
    runs: Sequence[Any] | Mapping[str, Any],
    benchmark: Benchmark | None,
    settings: Mapping[str, Any],
    progress: Shown,
    resume: Resume,
) -> list[_Trial]:
    """Return the runs to start, in order; all checks that are possible before the first run are made."""
    from sequel_core.cli.run import execute
    from sequel_core.cli.sweep import check_streams

    trials, configs, learners = list[_Trial](), {}, dict[Learner, Score]()
    for label, group in runs.items() if isinstance(runs, Mapping) else [("", runs)]:
        for experiment in group if isinstance(group, Sequence) else [group]:
            if isinstance(experiment, ExperimentConfig):
                start = partial(execute, experiment, progress=progress, resume=resume)
                key = label or experiment.algo.name, experiment.mode, experiment.training.seed
                trials.append(_Trial(*key, experiment, experiment.plain(), start))
                configs[trials[-1].name] = experiment
            else:
                trials.append(_learner_trial(label, experiment, benchmark, settings, progress, resume))
                if experiment in learners:
                    raise ValueError(
                        f"learners must be new, got that of {trials[-1].name} twice; make another"
                    )
                learners[experiment] = experiment.score
    _check_names([trial.name for trial in trials])
    if configs and (settings or benchmark is not None):
        name = "benchmark" if benchmark is not None else next(iter(settings))
        raise ValueError(f"{name} is for learners, a configuration has its own; drop it")
    for config in configs.values():
        learner.plugin(config.mode)
    scores = dict(zip(configs, check_streams(configs), strict=True))
    common_score([*learners.values(), *scores.values()])
    return [
        trial._replace(config=with_score(trial.config, scores[trial.name])) if trial.name in scores else trial
        for trial in trials
    ]


def _check_names(names: Sequence[str]) -> None:
    if not names:
        raise ValueError("runs must hold at least one experiment, got none")
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated:
        raise ValueError(
            f"runs must differ in algorithm, framework or seed, got {repeated} twice; give a mapping from "
            "labels"
        )


def _learner_trial(
    label: str,
    model: Learner,
    benchmark: Benchmark | None,
    settings: Mapping[str, Any],
    progress: Shown,
    resume: Resume,
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
    check_run(
        model,
        benchmark,
        settings.get("evaluate_every", "task"),
        settings.get("evaluate_on", "test"),
        settings.get("evaluate_future", False),
    )

    def start(run_dir: Path) -> Result:
        return run(model, benchmark, run_dir=run_dir, progress=progress, resume=resume, **settings)

    config = recorded_settings(model, benchmark)
    return _Trial(label or model.hparams.name, model.mode, model.training.seed, model, config, start)


def measure(result: Result) -> dict[str, float]:
    """Return the quantities by which runs are compared.

    Args:
        result: of a finished run.

    Returns:
        The average, forgetting and learning score, named as in the summary; `seconds` in total;
        `steps_per_second` over all training, including the framework's compilation; `memory_bytes` of the
        algorithm.
    """
    seconds, steps = result.summary["seconds"], result.summary["steps"]
    return {
        **{result.score.of(name): result.metric(name) for name in MEASURED},
        "seconds": seconds["total"],
        "steps_per_second": steps / seconds["train"] if seconds["train"] else math.nan,
        "memory_bytes": result.summary["memory_bytes"],
    }


def _rows(runs: Sequence[Run]) -> tuple[Row, ...]:
    from sequel_core.report.runs import estimate

    rows = []
    for label, mode in dict.fromkeys((item.label, item.mode) for item in runs):
        members = [item for item in runs if (item.label, item.mode) == (label, mode)]
        by_seed = {item.seed: measure(item.result) for item in members if item.result}
        names = {name: None for values in by_seed.values() for name in values}
        measures = {name: estimate([values[name] for values in by_seed.values()]) for name in names}
        failed = tuple(item.seed for item in members if item.seed not in by_seed)
        given = any(item.result.task_given for item in members if item.result)
        rows.append(Row(label, mode, tuple(by_seed), failed, given, measures))
    return tuple(rows)


def _differences(runs: Sequence[Run]) -> tuple[Difference, ...]:
    finished = {(item.label, item.seed, item.mode): item for item in runs if item.result}
    differences = []
    for label, seed in dict.fromkeys(key[:2] for key in finished):
        pair = [finished[label, seed, mode] for mode in PLUGINS if (label, seed, mode) in finished]
        if len(pair) == len(PLUGINS):
            matrices = [{"": item.result.matrix} for item in pair if item.result]
            score, _, score_at = _largest(*matrices)
            weight, name, index = _largest(*(load_weights(item.directory) for item in pair))
            weight_at = f"{name}[{', '.join(map(str, index))}]" if name else ""
            differences.append(Difference(label, seed, score, score_at, weight, weight_at))
    return tuple(differences)


def _tests(runs: Sequence[Run]) -> dict[Mode, list[PairedTest]]:
    """Compare the average scores of every two labels within each framework."""
    scores: dict[Mode, dict[str, dict[int, float]]] = {}
    for item in runs:
        if item.result:
            by_seed = scores.setdefault(item.mode, {}).setdefault(item.label, {})
            by_seed[item.seed] = item.result.metric("average_score")
    return {mode: tests for mode, labels in scores.items() if (tests := compare_pairs(labels))}


def _largest(
    first: Mapping[str, NDArray[Any]], second: Mapping[str, NDArray[Any]]
) -> tuple[float, str, tuple[int, ...]]:
    """Return the largest absolute difference between arrays with the same names.

    Entries that are nan in both are ignored; an entry that is nan in one counts as the largest.

    Returns:
        The difference, the name of its array and its index. Name and index are empty if the arrays are equal;
        also if their names or shapes differ, in which case the difference is nan.
    """
    candidates = []
    if {name: a.shape for name, a in first.items()} == {name: a.shape for name, a in second.items()}:
        for name, a in first.items():
            gap = np.abs(np.subtract(a, second[name], dtype=np.float64))
            gap = np.where(np.isnan(a) & np.isnan(second[name]), -1.0, gap)
            if gap.size and gap.max() != -1:  # nan is the greatest
                index = np.unravel_index(gap.argmax(), gap.shape)
                candidates.append((float(gap[index]), name, tuple(map(int, index))))
    undefined = (math.nan, "", ())
    largest = max(candidates, key=lambda c: math.inf if math.isnan(c[0]) else c[0], default=undefined)
    return largest if largest[0] else (0.0, "", ())


_left, _right = partial(Column, overflow="fold"), partial(Column, overflow="fold", justify="right")


def _table(rows: Sequence[Row], score: Score, budget: Budget | None = None) -> Table:
    several, unit = any(len(row.seeds) > 1 for row in rows), "%" if score.fraction else ""
    heads = (f"average\n{score.name}\n{unit}", f"\nforget-\nting {unit}", f"learning\n{score.name}\n{unit}")
    columns = [
        *map(_left, ("run", "mode", "seeds")),
        *map(_right, (*heads, "\n\nseconds", "\n\nsteps/s", "\n\nmemory")),
    ]
    titles = [] if budget is None else [str(budget)]
    titles += ["mean over seeds ± half of the 95 % confidence interval"] if several else []
    table = Table(
        *columns, title="\n".join(titles) or None, title_justify="left", padding=0
    )  # fits into 80 columns
    for k, row in enumerate(rows):
        seeds = ", ".join(map(str, row.seeds)) or "-"
        seeds += f"; failed: {', '.join(map(str, row.failed))}" if row.failed else ""
        cells = ["-"] * 6
        if row.seeds:
            *scores, seconds, rate, memory = row.measures.values()
            cells = [estimate.text(*scaling(score)) for estimate in scores]
            cells += [seconds.text(digits=1), rate.text(digits=0), decimal(round(memory.mean))]
        last = k + 1 == len(rows) or rows[k + 1].label != row.label
        cells = [cell.replace(" ± ", "\n± ") for cell in cells]
        label = escape(row.label) + (f", {TASK_GIVEN}" if row.task_given else "")
        table.add_row(label, row.mode, seeds, *cells, end_section=last)
    return table


def _difference_table(differences: Sequence[Difference], score: Score) -> Table:
    name = f"{score.name} %" if score.fraction else score.name
    columns = [_left("run"), _left("seed"), _right(name), _left("at"), _right("weights"), _left("at")]
    title = f"largest differences between {' and '.join(PLUGINS)}"
    table = Table(*columns, title=title, title_justify="left", padding=0)
    for one in differences:
        at = f"R[{', '.join(map(str, one.score_at))}]" if one.score_at else ""
        weight = "-" if math.isnan(one.weight) else f"{one.weight:.1e}"
        gap = number(one.score, *scaling(score))
        table.add_row(escape(one.label), str(one.seed), gap, at, weight, escape(one.weight_at))
    return table
