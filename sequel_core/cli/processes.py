"""Runs in processes of their own, several at a time."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from sequel_core.cli.run import execute, record_failure
from sequel_core.experiment.schema import ExperimentConfig
from sequel_core.runs.directory import numbered
from sequel_core.runs.learner import DivergenceError
from sequel_core.runs.signals import InterruptedRunError, Signals

DIVERGED = 3
"""Exit code of a process whose run diverged."""

THREADS = "OMP_NUM_THREADS"
"""The variable from which the numerical libraries of a new process take their number of threads."""


def call_in_processes(
    function: Callable[..., object], arguments: Sequence[tuple[Any, ...]], jobs: int
) -> Generator[tuple[int, int], None, None]:
    """Call a function once for each item, in a new process each.

    A process that fails or is killed does not stop the others. If a signal is received or the iterator is
    closed, the processes are terminated.

    Args:
        function: a function that can be pickled.
        arguments: its arguments in each process.
        jobs: number of processes at a time, >= 1.

    Yields:
        The index of the item and the exit code, in the order in which the processes end.

    Raises:
        InterruptedRunError: a signal was received.
    """
    context = multiprocessing.get_context("spawn")  # threads of the frameworks do not survive a fork
    waiting = deque(enumerate(arguments))
    running: dict[Any, tuple[int, SpawnProcess]] = {}  # by sentinel
    with Signals().recorded() as signals, _threads_per_process(jobs):
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    index, given = waiting.popleft()
                    process = context.Process(target=function, args=given)
                    process.start()
                    running[process.sentinel] = index, process
                ended = wait(list(running), timeout=1)
                signals.check()
                for sentinel in ended:
                    index, process = running.pop(sentinel)
                    process.join()
                    yield index, process.exitcode or 0
        finally:
            for _, process in running.values():
                process.terminate()
            for _, process in running.values():
                process.join()


@contextmanager
def _threads_per_process(jobs: int) -> Iterator[None]:
    """Share the cores between new processes, unless the user has set the number of threads."""
    if THREADS in os.environ:
        yield
        return
    os.environ[THREADS] = str(max(1, (os.cpu_count() or 1) // jobs))
    try:
        yield
    finally:
        del os.environ[THREADS]


class Processes:
    """Starts runs in processes of their own and waits for them.

    Args:
        folder: folder of the runs.
        runs: label and configuration by name of the run directory; they are started in this order.
        jobs: number of processes at a time, >= 1.
        say: prints a line.
    """

    def __init__(
        self,
        folder: Path,
        runs: Mapping[str, tuple[str, ExperimentConfig]],
        jobs: int,
        say: Callable[[str], None],
    ) -> None:
        self._runs = runs
        self._names = list(runs)
        self._codes: dict[str, int] = {}
        self._say = say
        arguments = [(config, folder, name) for name, (_, config) in runs.items()]
        self._ended = call_in_processes(_run, arguments, jobs)

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.close()

    def wait(self, name: str) -> str | None:
        """Wait for a run; return `finished`, `diverged` or how it failed, and None if it was not started."""
        while name in self._runs and name not in self._codes:
            index, code = next(self._ended)
            ended = self._names[index]
            self._codes[ended] = code
            self._say(f"[{len(self._codes)}/{len(self._runs)}] {self._runs[ended][0]}: {_outcome(code)}")
        return _outcome(self._codes[name]) if name in self._codes else None


def _outcome(code: int) -> str:
    if code < 0:
        return f"killed by signal {-code}"
    return {0: "finished", DIVERGED: "diverged"}.get(code, "failed")


def _run(config: ExperimentConfig, folder: Path, name: str) -> None:
    """Run an experiment in a process of its own."""
    path = new_directory(folder, name)
    try:
        execute(config, path, progress=False)
    except InterruptedRunError as error:
        sys.exit(error.exit_code)
    except Exception as error:
        record_failure(error, path)
        sys.exit(DIVERGED if isinstance(error, DivergenceError) else 1)


def new_directory(folder: Path, name: str) -> Path:
    """Make the first directory of this name that does not exist; safe for concurrent processes."""

    def made(path: Path) -> bool:
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            return False
        return True

    return next(path for path in numbered(folder / name) if made(path))
