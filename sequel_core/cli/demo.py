"""`sequel demo`: naive finetuning against EWC in both frameworks on bundled digits, in one table."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from sequel_core.cli.arguments import Parser
from sequel_core.cli.compose import compose
from sequel_core.config import build_benchmark
from sequel_core.learner import PLUGINS, plugin
from sequel_core.results import Result, load_weights
from sequel_core.sequencer import run

ALGORITHMS = ("naive", "ewc")


def main(args: Sequence[str]) -> int:
    """Run the command line of `sequel demo`.

    Returns:
        0.

    Raises:
        ValueError: a framework that is not installed, or a directory that cannot be used.
    """
    parser = Parser(prog="sequel demo", description="Naive finetuning against EWC in both frameworks.")
    parser.add_argument(
        "--run-dir", type=Path, help="where to keep the four runs (default: a new one under runs/)"
    )
    options = parser.parse_args(args)
    for mode in PLUGINS:
        plugin(mode)  # both or none
    directory = options.run_dir or Path("runs") / f"{datetime.now():%Y-%m-%d_%H-%M-%S}_demo"
    console = Console()
    results: dict[tuple[str, str], Result] = {}
    for algorithm in ALGORITHMS:
        for mode in PLUGINS:
            with console.status(f"{algorithm} in {mode}"):
                results[algorithm, mode] = _run(algorithm, mode, directory / f"{algorithm}_{mode}")
            summary = results[algorithm, mode].summary
            console.print(
                f"{algorithm} in {mode}: {summary['steps']} steps in {summary['seconds']['total']:.1f} s"
            )
    console.print(_table(results))
    console.print(f"The four runs are in {directory}; their settings: sequel list experiment")
    return 0


def _run(algorithm: str, mode: str, directory: Path) -> Result:
    config = compose([f"+experiment={algorithm}_rotateddigits", f"mode={mode}"]).config
    benchmark = build_benchmark(config)
    learner = plugin(config.mode).build_learner(config, benchmark, directory)
    return run(learner, benchmark, run_dir=directory, config=config.plain(), progress=False)


def _table(results: dict[tuple[str, str], Result]) -> Table:
    table = Table(title="RotatedDigits: five rotations of real handwritten digits, learned one after another")
    table.add_column("algorithm")
    for column in ("average accuracy", "forgetting"):
        for mode in PLUGINS:
            table.add_column(f"{column}\n{mode}", justify="right")
    table.add_column("largest weight\ndifference", justify="right")
    for algorithm in ALGORITHMS:
        runs = [results[algorithm, mode] for mode in PLUGINS]
        weights = [load_weights(result.run_dir) for result in runs if result.run_dir is not None]
        largest = max(float(np.abs(weights[0][name] - weights[1][name]).max()) for name in weights[0])
        table.add_row(
            algorithm,
            *(f"{100 * result.average_accuracy:.2f} %" for result in runs),
            *(f"{100 * result.forgetting:.2f} %" for result in runs),
            f"{largest:.1e}",
        )
    return table
