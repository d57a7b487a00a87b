"""`sequel bench`: training steps per second of each algorithm, beside hand-written loops of the same method.

With `--logging` beside the same learner without loggers.

Machines are noisy, so only ratios within one run mean much: all contenders take turns in one process, and
medians are compared.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from sequel_core.algorithms import ALGORITHMS
from sequel_core.algorithms.icarl import ICaRLHParams
from sequel_core.algorithms.kcl import KCLHParams
from sequel_core.cli.arguments import Parser
from sequel_core.experiment.config import check_name
from sequel_core.hparams import AlgorithmHParams, ReplayHParams
from sequel_core.runs.learner import PLUGINS, Mode, plugin
from sequel_core.stream.benchmark import Benchmark, Scenario
from sequel_core.stream.images import Normalisation
from sequel_core.stream.plan import words
from sequel_core.stream.task import Split, Task

ROUNDS = 7
MEMORY = 1000
CONVOLUTIONAL = ("naive", "joint", "stable_sgd", "ewc", "mas", "er")
"""The methods that there are hand-written steps of for networks other than the multi-layer perceptron."""

NOTE = (
    "JAX steps are dispatched one by one, as ours are on a CPU; scanned ones are left out: there XLA runs a "
    "convolution about 12 times slower within a loop."
)

LOGGED = ("console", "csv", "tensorboard")
"""The loggers that `--logging` measures: those that write on this machine."""

LOGGING_NOTE = f"With {', '.join(LOGGED)} at every report, which is every 50 steps."

Contenders = Mapping[str, Callable[[], float]]
"""Name: a function that trains for all steps and returns the seconds; the first is ours.

The work at the end of a task is left out: it is not what is measured.
"""


class Network(NamedTuple):
    """A network that is measured, on random images of the shape of MNIST or CIFAR-100."""

    title: str
    steps: Mapping[str, int]  # of a turn, by mode
    shape: tuple[int, int, int] = (32, 32, 3)
    classes: int = 100
    normalisation: Normalisation = Normalisation((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
    algos: tuple[str, ...] = CONVOLUTIONAL


NETWORKS = {
    "mlp": Network(
        "MLP 256-256",
        {"pytorch": 1000, "jax": 2000},
        (28, 28, 1),
        10,
        Normalisation((0.1307,), (0.3081,)),
        tuple(ALGORITHMS),
    ),
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
    ratio: float  # ours / the reference


def main(args: Sequence[str]) -> int:
    """Run the command line of `sequel bench`.

    Returns:
        0.

    Raises:
        ValueError: an unknown algorithm, mode or network, an algorithm that is not measured with the
            network, or a number out of range.
    """
    parser = Parser(prog="sequel bench", description="Training steps per second beside hand-written loops.")
    parser.add_argument("--algo", nargs="+", help="algorithms (default: all that --backbone has)")
    parser.add_argument(
        "--backbone",
        default="mlp",
        metavar="NAME",
        help=f"the network, one of {', '.join(NETWORKS)} (default: mlp); all but mlp see images of "
        f"{_size('cnn')} and are measured with {', '.join(CONVOLUTIONAL)}",
    )
    parser.add_argument("--mode", nargs="+", default=list(PLUGINS), help="pytorch, jax (default: both)")
    parser.add_argument("--batch-size", nargs="+", type=int, default=[10, 64], help="default: 10 64")
    parser.add_argument(
        "--rounds", type=int, default=ROUNDS, help=f"turns of each contender (default: {ROUNDS})"
    )
    defaults = "; ".join(f"{name} {dict(network.steps)}" for name, network in NETWORKS.items())
    parser.add_argument("--steps", type=int, help=f"steps of a turn (default: {defaults})")
    parser.add_argument(
        "--logging",
        action="store_true",
        help=f"compare with no logger, instead of with hand-written loops: what {', '.join(LOGGED)} cost",
    )
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    options = parser.parse_args(args)
    check_name("backbone", options.backbone, NETWORKS)
    network = NETWORKS[options.backbone]
    algos = options.algo or network.algos
    for name in algos:
        check_name("algo", name, ALGORITHMS)
        if name not in network.algos:
            raise ValueError(
                f"--algo must be one of {', '.join(network.algos)} with --backbone {options.backbone}, got "
                f"{name!r}; for the others choose --backbone mlp"
            )
    for mode in options.mode:
        check_name("mode", mode, PLUGINS)
        plugin(mode)
    for name in ("rounds", "steps"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ValueError(f"--{name} must be >= 1, got {getattr(options, name)}")
    if min(options.batch_size) < 1:
        raise ValueError(f"--batch-size must be >= 1, got {min(options.batch_size)}")
    if options.json is not None and not options.json.parent.is_dir():
        raise ValueError(f"--json must lie in a directory that exists, got {options.json}")

    console = Console()
    rows: list[Row] = []
    cases = [(mode, size, algo) for mode in options.mode for size in options.batch_size for algo in algos]
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        for mode, size, algo in progress.track(cases, description="measuring"):
            steps = options.steps or network.steps[mode]
            rows += measure(algo, mode, size, steps, options.rounds, options.backbone, options.logging)
    console.print(_table(rows, options.rounds, options.backbone, options.logging))
    if options.json is not None:
        options.json.write_text(json.dumps([row._asdict() for row in rows], indent=2) + "\n")
    return 0


def measure(
    algo: str,
    mode: Mode,
    batch_size: int,
    steps: int,
    rounds: int,
    backbone: str = "mlp",
    logging: bool = False,
) -> list[Row]:
    """Return one row per reference: medians of `rounds` turns, taken alternately, of `steps` steps each.

    With `logging` the reference is the same learner without loggers.
    """
    bench = import_module(f"{PLUGINS[mode]}.bench")
    hparams = benched(algo, batch_size)
    benchmark = stream(hparams, batch_size * steps, backbone)
    with TemporaryDirectory() as folder:
        contenders: Contenders
        if logging:
            contenders = bench.logging_contenders(
                hparams, benchmark, batch_size, backbone, LOGGED, Path(folder)
            )
        else:
            contenders = bench.contenders(hparams, benchmark, batch_size, backbone)
        for contender in contenders.values():
            contender()  # compiles and warms up
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(rounds):
            for name, contender in contenders.items():
                seconds[name].append(contender())
    ours, *references = seconds
    rate = {name: steps / median(taken) for name, taken in seconds.items()}
    return [Row(algo, mode, batch_size, rate[ours], name, rate[ours] / rate[name]) for name in references]


def benched(algo: str, batch_size: int) -> AlgorithmHParams:
    """Return the settings that are measured.

    They are the defaults, and draws from the memory as large as a batch. La-MAML takes up to 5 inner steps;
    iCaRL keeps so few exemplars that they hardly add a step.
    """
    cls = ALGORITHMS[algo]
    settings: dict[str, Any] = {}
    if issubclass(cls, ReplayHParams):
        settings = {"mem_size": MEMORY, "mem_batch_size": batch_size}
    if algo == "lamaml":
        settings["n_inner_updates"] = max(k for k in range(1, 6) if batch_size % k == 0)
    if algo == "icarl":
        settings["mem_size"] = NETWORKS["mlp"].classes
    if algo == "kcl":
        settings["task_given"] = True
    return cls(**settings)


def stream(hparams: AlgorithmHParams, samples: int, backbone: str = "mlp") -> Benchmark:
    """Return two tasks of random images of the network's shape, the same ones; the second is what is timed.

    iCaRL's have half the classes each, so that it has an old network to follow; KCL's have a coreset besides.
    """
    halves = isinstance(hparams, ICaRLHParams)
    _, _, shape, classes, normalisation, _ = NETWORKS[backbone]
    count = samples + (hparams.core_size if isinstance(hparams, KCLHParams) else 0)
    pixels = words("bench", "images", count=-(-count * int(np.prod(shape)) // 8)).view(np.uint8)
    images = pixels[: count * int(np.prod(shape))].reshape(count, *shape)
    tasks = []
    for t in range(2):
        own = tuple(range(classes))[classes // 2 * t :][: classes // 2] if halves else tuple(range(classes))
        split = Split(images, np.resize(own, count), t)
        tasks.append(Task(t, "random images", own, split, split.head(1), split.head(0)))
    scenario: Scenario = "class" if halves else "domain"
    benchmark = Benchmark("bench", tuple(tasks), classes, scenario, normalisation)
    if isinstance(hparams, KCLHParams):
        return replace(benchmark, tasks=tuple(hparams.training_tasks(benchmark)))
    return benchmark


def _size(backbone: str) -> str:
    """Return the images and classes of a network in words."""
    _, _, shape, classes, _, _ = NETWORKS[backbone]
    return f"{'x'.join(map(str, shape))} pixels in {classes} classes"


def _table(rows: Sequence[Row], rounds: int, backbone: str, logging: bool = False) -> Table:
    title = NETWORKS[backbone].title + ("" if backbone == "mlp" else f", {_size(backbone)}")
    scans = backbone == "mlp" or all(row.mode != "jax" for row in rows)
    caption = LOGGING_NOTE if logging else None if scans else NOTE
    table = Table(title=f"Training steps per second, {title}, median of {rounds}", caption=caption)
    columns: dict[str, dict[str, Any]] = {
        "algorithm": {}, "mode": {}, "batch": {"justify": "right"}, "steps/s": {"justify": "right"},
        "reference": {}, "reference steps/s": {"justify": "right"}, "ratio": {"justify": "right"},
    }  # fmt: skip
    for name, style in columns.items():
        table.add_column(name, **style)
    digits = 0 if backbone == "mlp" else 1  # the others are slow
    for row in rows:
        reference = row.steps_per_second / row.ratio
        table.add_row(
            row.algo, row.mode, str(row.batch_size), f"{row.steps_per_second:,.{digits}f}", row.reference,
            f"{reference:,.{digits}f}", f"{row.ratio:.2f}",
        )  # fmt: skip
    return table
