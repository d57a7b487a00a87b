"""`make bench ARGS=--startup`: seconds from the start of a process to its first training step.

Each round starts two processes: one with an empty cache of compiled programs, and one with the cache that the
first has written.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from statistics import median
from tempfile import TemporaryDirectory
from typing import NamedTuple

from rich.table import Table

from sequel_core.runs.learner import Mode

FIRST_STEP = """
import os, sys
from sequel_core.cli import main
from sequel_core.runs.recording import Recorder

Recorder.progress = lambda *_: os._exit(42)  # the first report, after the first step
main(["run", "-q", "training.log_every_n_steps=1", *sys.argv[1:]])
"""


class StartRow(NamedTuple):
    """One comparison."""

    mode: Mode
    first: float  # seconds
    second: float  # seconds
    ratio: float  # second / first


def measure_starts(modes: Sequence[Mode], rounds: int) -> list[StartRow]:
    """Return medians of `rounds` first and second starts of `sequel run` in each mode."""
    times: dict[Mode, list[list[float]]] = {mode: [] for mode in modes}
    for _ in range(rounds):
        for mode in modes:
            with TemporaryDirectory() as folder:
                times[mode].append([seconds_to_first_step(mode, folder, name) for name in ("a", "b")])
    medians = {mode: [median(column) for column in zip(*pairs, strict=True)] for mode, pairs in times.items()}
    return [StartRow(mode, first, second, second / first) for mode, (first, second) in medians.items()]


def seconds_to_first_step(mode: Mode, cache: str, name: str) -> float:
    """Return the seconds that a process takes; its cache directory is a folder of its own."""
    settings = {key: value for key, value in os.environ.items() if not key.startswith("JAX_")}
    command = [sys.executable, "-c", FIRST_STEP, f"mode={mode}", f"run_dir={cache}/{name}"]
    start = time.perf_counter()
    child = subprocess.run(
        command,
        env={**settings, "XDG_CACHE_HOME": cache},
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.perf_counter() - start
    if child.returncode != 42:
        raise RuntimeError(f"the run ended before its first step: {child.stderr}")
    return seconds


def start_table(rows: Sequence[StartRow], rounds: int) -> Table:
    """Return the rows as a table for the terminal."""
    made = Table(title=f"Seconds from the start of sequel run to its first step, median of {rounds}")
    for name in ("mode", "first start", "second start", "ratio"):
        made.add_column(name, justify="left" if name == "mode" else "right")
    for row in rows:
        made.add_row(row.mode, *(f"{value:.2f}" for value in row[1:]))
    return made
