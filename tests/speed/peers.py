"""`make peers`: training steps per second of SequeL and of Avalanche, which take turns in one process.

Both train the same MLP on the same random images, on the second of two tasks, without the work at its end. In
favour of Avalanche, its images are tensors that were normalised before, and it computes no metrics.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from collections.abc import Callable, Sequence
from datetime import date
from importlib import import_module
from importlib.metadata import version
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch

import sequel_flax  # noqa: F401
import sequel_lightning  # noqa: F401  before torchvision, which Avalanche imports
from sequel_core.runs.formatting import markdown_table
from sequel_core.runs.learner import Mode
from sequel_core.runs.versions import machine
from sequel_core.stream.benchmark import Benchmark
from sequel_core.stream.task import Task
from tests.pages import ROOT
from tests.speed.bench import MEMORY, NETWORKS, RATE, WIDTHS, make_contenders, positive, settings, stream

STRATEGIES = {"naive": "Naive", "ewc": "EWC", "er": "Replay"}
"""Our methods, and the strategy of Avalanche that is the same."""

MODES: dict[Mode, str] = {"pytorch": "SequeL, PyTorch", "jax": "SequeL, JAX"}
PEER = "Avalanche"
BATCH_SIZE = 10
FILE = ROOT / "docs" / "trust" / "peers.json"
PAGE = ROOT / "docs" / "trust" / "speed.md"
START, END = "<!-- peers -->\n", "<!-- /peers -->"


class PeerRow(NamedTuple):
    """One method."""

    algo: str
    steps_per_second: dict[str, float]  # by library: medians
    ratios: dict[str, float]  # to Avalanche, by library: medians over the rounds


def main(args: Sequence[str] | None = None) -> None:
    """Measure, and write a JSON file and the table of the documentation."""
    parser = argparse.ArgumentParser("make peers", 'make peers ARGS="[options]"', __doc__)
    parser.add_argument("--rounds", type=positive, default=7, help="turns of each library (default: 7)")
    parser.add_argument("--steps", type=positive, default=500, help="steps per turn (default: 500)")
    options = parser.parse_args(args)
    rows = [measure(algo, options.steps, options.rounds) for algo in STRATEGIES]
    packages = ("sequel-cl", "avalanche-lib", "torch", "jax", "pytorch-lightning")
    measured = {
        "date": date.today().isoformat(),
        "machine": machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "network": NETWORKS["mlp"].title,
        "batch_size": BATCH_SIZE,
        "steps": options.steps,
        "rounds": options.rounds,
        "versions": {name: version(name) for name in packages},
        "rows": [row._asdict() for row in rows],
    }
    FILE.write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    PAGE.write_text(f"{before}{START}{table(measured)}{END}{rest.partition(END)[2]}", encoding="utf-8")
    print(table(measured))


def table(measured: dict[str, Any]) -> str:
    """Return the rows as Markdown, ratios first, and a line on how they were measured."""
    libraries = list(MODES.values())
    head = ["method", *(f"{name}, to {PEER}" for name in libraries)]
    head += [f"{name}, steps/s" for name in (*libraries, PEER)]
    cells = [
        [
            STRATEGIES[row["algo"]],
            *(f"{row['ratios'][name]:.1f}" for name in libraries),
            *(f"{row['steps_per_second'][name]:,.0f}" for name in (*libraries, PEER)),
        ]
        for row in measured["rows"]
    ]
    versions = ", ".join(f"{name} {number}" for name, number in measured["versions"].items())
    place = f"{measured['machine']}, {measured['cores']} cores, PyTorch threads: {measured['threads']}"
    turns = f"medians of {measured['rounds']} turns of {measured['steps']} steps"
    return f"{markdown_table(head, cells)}\n\n{measured['date']}, {place}; {turns}; {versions}.\n"


def measure(algo: str, steps: int, rounds: int) -> PeerRow:
    """Let the libraries take turns, after one turn each that compiles and warms up."""
    hparams = settings(algo, BATCH_SIZE)
    benchmark = stream(hparams, BATCH_SIZE * steps)
    contenders: dict[str, Callable[[], float]] = {
        name: make_contenders(hparams, mode, benchmark, BATCH_SIZE, "mlp")["sequel"]
        for mode, name in MODES.items()
    }
    contenders[PEER] = avalanche(algo, benchmark, steps)
    for train in contenders.values():
        train()
    turns = [{name: train() for name, train in contenders.items()} for _ in range(rounds)]
    return PeerRow(
        algo,
        {name: steps / median(turn[name] for turn in turns) for name in contenders},
        {name: median(turn[PEER] / turn[name] for turn in turns) for name in MODES.values()},
    )


def avalanche(algo: str, benchmark: Benchmark, steps: int) -> Callable[[], float]:
    """Return a function that trains a strategy of Avalanche on the second task, and returns the seconds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        benchmarks, strategies, plugins = (
            import_module(f"avalanche.{name}")
            for name in ("benchmarks", "training.supervised", "training.plugins")
        )
    widths = (int(np.prod(benchmark.image_shape)), *WIDTHS, benchmark.num_classes)
    layers = [layer for ends in pairwise(widths) for layer in (torch.nn.Linear(*ends), torch.nn.ReLU())]
    network = torch.nn.Sequential(torch.nn.Flatten(), *layers[:-1])
    given: dict[str, dict[str, float]] = {"ewc": {"ewc_lambda": 1.0}, "er": {"mem_size": MEMORY}}
    strategy = getattr(strategies, STRATEGIES[algo])(
        model=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=RATE),
        criterion=torch.nn.CrossEntropyLoss(),
        train_mb_size=BATCH_SIZE,
        evaluator=plugins.EvaluationPlugin(),  # no metrics
        **given.get(algo, {}),
    )
    counter = Counter()
    strategy.plugins.append(counter)
    data = [tensors(task) for task in benchmark.tasks]
    made = benchmarks.tensors_benchmark(train_tensors=data, test_tensors=data, task_labels=[0, 0])
    first, second = made.train_stream
    strategy.train(first)
    for plugin in strategy.plugins:  # the second task is repeated: its end must change nothing
        plugin.after_training_exp = lambda *_, **__: None

    def fit() -> float:
        counter.steps = 0
        start = time.perf_counter()
        strategy.train(second)
        seconds = time.perf_counter() - start
        if counter.steps != steps:
            raise RuntimeError(f"{PEER} took {counter.steps} steps, expected {steps}")
        return seconds

    return fit


class Counter:
    """A plug-in of Avalanche that counts steps."""

    def __init__(self) -> None:
        self.steps = 0

    def after_training_iteration(self, *_: Any, **__: Any) -> None:
        """Count a step."""
        self.steps += 1


def tensors(task: Task) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the normalised images and the labels of a task."""
    samples = task.train.take(np.arange(len(task.train)))
    images = torch.from_numpy(np.asarray(samples.x)).permute(0, 3, 1, 2).float() / 255
    scale = NETWORKS["mlp"].normalisation
    return (images - scale.mean[0]) / scale.std[0], torch.from_numpy(np.asarray(samples.y))


if __name__ == "__main__":
    main()
