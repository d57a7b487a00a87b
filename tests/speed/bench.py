"""`make bench`: training steps per second of each algorithm, compared with hand-written loops of the method.

The speed of a machine varies from minute to minute, so only ratios within one run mean much. All contenders
take turns in one process, and their medians are compared.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from sequel_core.algorithms import ALGORITHMS
from sequel_core.algorithms.kcl import KCLHParams
from sequel_core.algorithms.naive import NaiveHParams
from sequel_core.hparams import AlgorithmHParams, OptimizerHParams, ReplayHParams, TrainingHParams
from sequel_core.runs.learner import FitMonitor, Mode, plugin
from sequel_core.runs.recording import training_numbers
from sequel_core.stream import plan
from sequel_core.stream.benchmark import Benchmark, Scenario
from sequel_core.stream.images import Normalisation
from sequel_core.stream.task import Split, Task
from tests.speed.startup import measure_starts, start_table

LOOPS: dict[Mode, str] = {"pytorch": "tests.speed.loops_lightning", "jax": "tests.speed.loops_flax"}
"""The module with the hand-written loops of each mode. Its table `LOOPS` has a row for each algorithm."""

RATE = 0.01
WIDTHS = (256, 256)
MEMORY = 1000
EVALUATED = 10_000
SILENT = FitMonitor(on_progress=lambda progress: None, on_evaluate=lambda: None)
LOGGERS = ("console", "csv", "tensorboard")
"""The loggers that `--logging` measures: those that write to the local machine."""

CONVOLUTIONAL = ("naive", "joint", "stable_sgd", "ewc", "mas", "er")
"""The algorithms whose hand-written loops also train networks other than the MLP."""

NOTE = (
    "JAX steps are dispatched one by one, as SequeL does on a CPU. Scanned steps are left out: on a CPU, XLA "
    "runs a convolution about 12 times slower within a loop."
)
LOGGING_NOTE = f"Each of {', '.join(LOGGERS)} gets one report every 50 steps."

Contenders = dict[str, Callable[[], float]]
"""From name to a function that trains on the second task and returns the seconds. SequeL is first.

Training is one epoch, without the work at the end of the task.
"""


class Network(NamedTuple):
    """A network, and the images that it is measured on: random ones, shaped like MNIST or CIFAR-100."""

    title: str
    steps: dict[Mode, int]  # per turn
    shape: tuple[int, int, int] = (32, 32, 3)
    num_classes: int = 100
    normalisation: Normalisation = Normalisation((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
    algos: tuple[str, ...] = CONVOLUTIONAL

    @property
    def images(self) -> str:
        """The images in words."""
        return f"{'x'.join(map(str, self.shape))} pixels in {self.num_classes} classes"


MNIST = ((28, 28, 1), 10, Normalisation((0.1307,), (0.3081,)))
NETWORKS = {
    "mlp": Network("MLP 256-256", {"pytorch": 1000, "jax": 2000}, *MNIST, tuple(ALGORITHMS)),
    "cnn": Network("CNN 32-64-128", {"pytorch": 200, "jax": 200}),
    "resnet18": Network("ResNet-18", {"pytorch": 5, "jax": 5}),
    "resnet18_thin": Network("ResNet-18 thin", {"pytorch": 20, "jax": 20}),
}


class Row(NamedTuple):
    """One comparison."""

    algo: str
    mode: Mode
    batch_size: int
    steps_per_second: float
    reference: str
    ratio: float  # SequeL / the reference


def main(args: Sequence[str] | None = None) -> None:
    """Measure, print a table and, with `--json`, write its rows to a file."""
    parser = argparse.ArgumentParser("make bench", 'make bench ARGS="[options]"', __doc__)
    add = parser.add_argument
    add("--algo", nargs="+", choices=list(ALGORITHMS), metavar="NAME", help="default: all of --backbone")
    add(
        "--backbone",
        choices=list(NETWORKS),
        default="mlp",
        help=f"default: mlp; the others train on {NETWORKS['cnn'].images}, and are measured with "
        f"{', '.join(CONVOLUTIONAL)}",
    )
    add("--mode", nargs="+", choices=list(LOOPS), default=list(LOOPS), help="default: both")
    add("--batch-size", nargs="+", type=positive, default=[10, 64], metavar="N", help="default: 10 64")
    add("--rounds", type=positive, default=7, metavar="N", help="turns of each contender (default: 7)")
    defaults = "; ".join(f"{name} {network.steps}" for name, network in NETWORKS.items())
    add("--steps", type=positive, metavar="N", help=f"steps per turn (default: {defaults})")
    add(
        "--logging",
        action="store_true",
        help=f"measure what the loggers {', '.join(LOGGERS)} cost: compare with no logger, instead of with "
        "hand-written loops",
    )
    add("--evaluation", action="store_true", help="measure images per second of evaluation instead")
    add("--together", action="store_true", help="measure what 1, 4 and 10 runs at once cost in JAX instead")
    add("--startup", action="store_true", help="measure first and second starts of `sequel run` instead")
    add("--json", type=Path, metavar="FILE", help="file to write the rows to")
    options = parser.parse_args(args)
    network = NETWORKS[options.backbone]
    rows: list[Row]
    for algo in options.algo or ():
        if algo not in network.algos:
            parser.error(
                f"--algo must be one of {', '.join(network.algos)} with --backbone {options.backbone}, got "
                f"{algo!r}; for the others choose --backbone mlp"
            )
    if options.json is not None and not options.json.parent.is_dir():
        parser.error(f"--json must be in a directory that exists, got {options.json}")
    if options.startup:
        starts = measure_starts(options.mode, options.rounds)
        Console().print(start_table(starts, options.rounds))
        write(options.json, starts)
        return
    if options.together:
        many = import_module("tests.speed.many")
        for algo in options.algo or ():
            if algo not in many.TOGETHER:
                allowed = ", ".join(many.TOGETHER)
                parser.error(f"--algo must be one of {allowed} with --together, got {algo!r}")
        chosen = [(algo, size) for size in options.batch_size for algo in options.algo or many.TOGETHER]
        steps = options.steps or network.steps["jax"]
        of_many = [
            row
            for algo, size in track(chosen, "measuring", transient=True)
            for row in many.measure_together(algo, size, steps, options.rounds)
        ]
        Console().print(many.many_table(of_many, options.rounds))
        write(options.json, of_many)
        return
    if options.evaluation:
        pairs = [(algo, mode) for mode in options.mode for algo in options.algo or ("naive",)]
        rows = [row for algo, mode in pairs for row in measure_evaluation(algo, mode, options.rounds)]
        Console().print(evaluation_table(rows, options.rounds))
        write(options.json, rows)
        return
    algos = options.algo or network.algos
    cases = [(algo, mode, size) for mode in options.mode for size in options.batch_size for algo in algos]
    rows = []
    for algo, mode, size in track(cases, "measuring", transient=True):
        steps = options.steps or network.steps[mode]
        rows += measure(algo, mode, size, steps, options.rounds, options.backbone, options.logging)
    Console().print(table(rows, options.rounds, options.backbone, options.logging))
    write(options.json, rows)


def write(file: Path | None, rows: Sequence[Any]) -> None:
    """Write rows to a JSON file, if there is one."""
    if file is not None:
        file.write_text(json.dumps([row._asdict() for row in rows], indent=2) + "\n")


def positive(text: str) -> int:
    """Return a number of the command line, at least 1."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def measure(
    algo: str, mode: Mode, batch_size: int, steps: int, rounds: int, backbone: str, logging: bool
) -> list[Row]:
    """Return one row per reference: medians of `rounds` turns of `steps` steps each."""
    hparams = settings(algo, batch_size)
    benchmark = stream(hparams, batch_size * steps, backbone)
    with TemporaryDirectory() as folder:
        directory = Path(folder) if logging else None
        contenders = make_contenders(hparams, mode, benchmark, batch_size, backbone, directory)
        for train in contenders.values():
            train()  # compiles and warms up
        turns = [{name: train() for name, train in contenders.items()} for _ in range(rounds)]
    rates = {name: steps / median(turn[name] for turn in turns) for name in contenders}
    sequel, *references = rates
    return [
        Row(algo, mode, batch_size, rates[sequel], name, rates[sequel] / rates[name]) for name in references
    ]


def settings(algo: str, batch_size: int) -> AlgorithmHParams:
    """Return the settings that are measured.

    They are the defaults, with replay batches as large as the training batches. La-MAML takes
    up to 5 inner steps. iCaRL and BiC keep so few exemplars that they hardly add a step. BiC holds out no
    samples.
    """
    chosen: dict[str, Any] = {}
    if issubclass(ALGORITHMS[algo], ReplayHParams):
        chosen = {"mem_size": MEMORY, "mem_batch_size": batch_size}
    if algo == "lamaml":
        chosen["n_inner_updates"] = max(k for k in range(1, 6) if batch_size % k == 0)
    if algo in ("icarl", "bic"):
        chosen["mem_size"] = NETWORKS["mlp"].num_classes
    if algo == "kcl":
        chosen["task_given"] = True
    if algo == "bic":
        chosen["val_fraction"] = 0.0
    return ALGORITHMS[algo](**chosen)


def stream(hparams: AlgorithmHParams, num_samples: int, backbone: str = "mlp") -> Benchmark:
    """Return two tasks of the same random images; the second task is the one that is timed.

    Tasks of iCaRL and BiC have half of the classes each, so that the old network has classes to distil. KCL's
    tasks have a coreset in addition.
    """
    network = NETWORKS[backbone]
    shape, classes = network.shape, range(network.num_classes)
    if isinstance(hparams, KCLHParams):
        num_samples += hparams.core_size
    num_pixels = num_samples * int(np.prod(shape))
    pixels = plan.words("bench", "images", count=-(-num_pixels // 8)).view(np.uint8)
    images = pixels[:num_pixels].reshape(num_samples, *shape)
    half = len(classes) // 2
    halves = hparams.name in ("icarl", "bic")
    tasks = []
    for i, part in enumerate((classes[:half], classes[half:]) if halves else (classes, classes)):
        split = Split(images, np.resize(part, num_samples), i)
        tasks.append(Task(i, "random images", tuple(part), split, split.head(1), split.head(0)))
    scenario: Scenario = "class" if halves else "domain"
    benchmark = Benchmark("bench", tuple(tasks), len(classes), scenario, network.normalisation)
    if isinstance(hparams, KCLHParams):
        return replace(benchmark, tasks=tuple(hparams.training_tasks(benchmark)))
    return benchmark


def make_contenders(
    hparams: AlgorithmHParams,
    mode: Mode,
    benchmark: Benchmark,
    batch_size: int,
    backbone: str,
    directory: Path | None = None,
) -> Contenders:
    """Return SequeL and the hand-written loops; with a directory, SequeL with and without loggers."""
    plugin(mode)  # before the loops: nothing may import torchvision before sequel_lightning
    loops = import_module(LOOPS[mode])
    task = benchmark.tasks[1]

    def make_learner(
        hparams: AlgorithmHParams, log_to: Path | None = None, **options: Any
    ) -> tuple[Any, Callable[[], float]]:
        """Return a learner after the first task, and the function that trains it on the second."""
        loggers = [loops.LOGGERS[name](log_to, {}) for name in LOGGERS] if log_to else []
        training = TrainingHParams(batch_size=batch_size)
        optimizer = loops.build_optimizer(OptimizerHParams(lr=RATE))
        network = loops.make_network(benchmark, backbone)
        options["loggers"] = loggers
        learner = loops.make_learner(hparams, network, optimizer, benchmark, training, **options)
        monitor = SILENT
        if loggers:
            learner.start_stream(learner.describe())
            monitor = SILENT._replace(on_progress=lambda p: learner.log(training_numbers(p, p.step)))
        learner.fit_task(benchmark.tasks[0], monitor)
        loops.skip_end_task(learner)

        def fit() -> float:
            start = time.perf_counter()
            learner.fit_task(task, monitor)
            loops.wait_for(learner)
            return time.perf_counter() - start

        return learner, fit

    if directory is not None:
        return {
            "sequel, logging": make_learner(hparams, directory)[1],
            "sequel, no logger": make_learner(hparams)[1],
        }
    samples = task.train.take(plan.epoch_batches(0, 0, 0, len(task.train), batch_size).reshape(-1))
    stored = samples if task.coreset is None else task.coreset.take(np.arange(len(task.coreset)))
    learner, fit = make_learner(hparams)
    contenders = {"sequel": fit, **loops.contenders(learner, benchmark, samples, stored, backbone == "mlp")}
    if mode == "pytorch":
        callbacks = import_module("pytorch_lightning.callbacks")
        observer = callbacks.LambdaCallback(on_train_batch_end=lambda *_: None)  # sees single steps
        contenders["sequel, step by step"] = make_learner(hparams, callbacks=[observer])[1]
    if mode == "pytorch" and hparams.name != "naive":
        contenders["sequel, naive"] = make_learner(NaiveHParams())[1]
    return contenders


def measure_evaluation(algo: str, mode: Mode, rounds: int) -> list[Row]:
    """Return images per second of evaluation, beside a loop over batches of the same size."""
    plugin(mode)
    loops = import_module(LOOPS[mode])
    hparams, size = settings(algo, 10), 1000
    benchmark = stream(hparams, EVALUATED)
    task = replace(benchmark.tasks[1], test=benchmark.tasks[1].train)
    network, optimizer = (
        loops.make_network(benchmark, "mlp"),
        loops.build_optimizer(OptimizerHParams(lr=RATE)),
    )
    learner = loops.make_learner(
        hparams, network, optimizer, benchmark, TrainingHParams(eval_batch_size=size)
    )
    plain = loops.evaluation(learner, benchmark, task.test.take(np.arange(len(task.test))), size)
    contenders: Contenders = {"sequel": lambda: learner.evaluate(task, "test").score, "loop": plain}
    if len({round(score() * len(task.test)) for score in contenders.values()}) > 1:  # compiles and warms up
        raise RuntimeError("the loop and the learner have different scores")
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, evaluate in contenders.items():
            start = time.perf_counter()
            evaluate()
            times[name].append(time.perf_counter() - start)
    rates = {name: len(task.test) / median(turns) for name, turns in times.items()}
    return [Row(algo, mode, size, rates["sequel"], "hand-written", rates["sequel"] / rates["loop"])]


def evaluation_table(rows: Sequence[Row], rounds: int) -> Table:
    """Return rows of `measure_evaluation` as a table for the terminal."""
    title = f"Images per second of evaluation, {NETWORKS['mlp'].title}, batches of 1000, median of {rounds}"
    made = Table(title=title)
    for name in ("algorithm", "mode", "images/s", "to a hand-written loop"):
        made.add_column(name)
    for row in rows:
        made.add_row(row.algo, row.mode, f"{row.steps_per_second:,.0f}", f"{row.ratio:.2f}")
    return made


def table(rows: Sequence[Row], rounds: int, backbone: str, logging: bool = False) -> Table:
    """Return the rows as a table for the terminal."""
    network, is_mlp = NETWORKS[backbone], backbone == "mlp"
    name = network.title if is_mlp else f"{network.title}, {network.images}"
    title = f"Training steps per second, {name}, median of {rounds}"
    scans = is_mlp or all(row.mode != "jax" for row in rows)
    made = Table(title=title, caption=LOGGING_NOTE if logging else None if scans else NOTE)
    numbers = ("batch", "steps/s", "reference steps/s", "ratio")
    for name in ("algorithm", "mode", "batch", "steps/s", "reference", "reference steps/s", "ratio"):
        made.add_column(name, justify="right" if name in numbers else "left")
    digits = 0 if is_mlp else 1  # the others are slow
    for row in rows:
        rate, reference = (
            f"{r:,.{digits}f}" for r in (row.steps_per_second, row.steps_per_second / row.ratio)
        )
        made.add_row(
            row.algo, row.mode, str(row.batch_size), rate, row.reference, reference, f"{row.ratio:.2f}"
        )
    return made
