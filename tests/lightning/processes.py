"""Processes of data-parallel tests: one group of gloo processes does all jobs of a test file."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
from torch import distributed

TIMEOUT = 60.0
"""Seconds that a collective operation may take."""


def free_port() -> int:
    """Return a port of this machine that is not in use."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


class Group:
    """A group of processes, each of which does the same jobs, one after the other.

    Args:
        size: number of processes.
    """

    def __init__(self, size: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["sequel_lightning", "sequel_benchmarks"])  # imported once for all
        port, self._pipes, self._processes = free_port(), [], []
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(rank, size, port, there), daemon=True)
            process.start()
            self._pipes.append(here)
            self._processes.append(process)

    def do(self, job: Callable[..., Any], *args: Any, seconds: float = 600) -> list[Any]:
        """Return what each process returns for a job; raise the first error.

        Args:
            job: a function of a module.
            args: its arguments.
            seconds: that it may take.
        """
        for pipe in self._pipes:
            pipe.send((job, args))
        received = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(seconds):
                self.close()
                raise TimeoutError(f"process {rank} was not done after {seconds} seconds")
            received.append(pipe.recv())
        for rank, (error, _) in enumerate(received):
            if error is not None:
                raise AssertionError(f"in process {rank}: {error}")
        return [result for _, result in received]

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join(10)


def groups_of_a_file() -> Any:
    """Return a fixture: a function that returns the group of a size, which all tests of a file share."""

    @pytest.fixture(scope="module")
    def groups() -> Iterator[Callable[[int], Group]]:
        made: dict[int, Group] = {}

        def group(size: int) -> Group:
            if size not in made:
                made[size] = Group(size)
            return made[size]

        yield group
        for one in made.values():
            one.close()

    return groups


def _work(rank: int, size: int, port: int, pipe: Any) -> None:
    names = {"LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    os.environ["OMP_NUM_THREADS"] = "1"
    distributed.init_process_group("gloo", "env://", timedelta(seconds=TIMEOUT), size, rank)
    while True:
        job, args = pipe.recv()
        try:
            pipe.send((None, job(*args)))
        except Exception:
            pipe.send((traceback.format_exc(), None))
