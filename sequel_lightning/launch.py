"""The processes of an experiment that is trained on several devices with Lightning's strategy `ddp`.

Lightning starts a script again, with the same command line, once for each further device. A command line may
be that of a sweep, or of a program in which experiments are only a part. Here the other processes run one
experiment, whose settings they read from a file.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytorch_lightning as pl
import torch
import yaml
from torch import distributed

from sequel_core._compat import end_process
from sequel_core.runs.learner import LostProcessError

PROGRAM = "sequel_core.cli.rank"
PATIENCE = 30.0
"""Seconds in which a process notices by itself that another one has ended; after that it is ended."""


def starts_processes(strategy: Any) -> bool:
    """Return whether a strategy starts processes, and none of them runs yet."""
    environment = getattr(strategy, "cluster_environment", None)
    return environment is not None and not environment.creates_processes_externally


@contextmanager
def started(settings: Mapping[str, Any], trainer: pl.Trainer) -> Iterator[None]:
    """Run an experiment in the other processes of this machine within the context.

    Args:
        settings: of the experiment, plain values.
        trainer: whose strategy says how many processes there are.
    """
    strategy: Any = trainer.strategy
    environment, num_processes = strategy.cluster_environment, strategy.num_processes
    num_threads = torch.get_num_threads()
    names = {
        "MASTER_ADDR": environment.main_address,
        "MASTER_PORT": environment.main_port,
        "NODE_RANK": environment.node_rank(),
        "WORLD_SIZE": trainer.world_size,
        "LOCAL_RANK": 0,
    }
    before = {name: os.environ.get(name) for name in names}
    children: list[subprocess.Popen[bytes]] = []
    with TemporaryDirectory() as folder:
        file = Path(folder) / "experiment.yaml"
        file.write_text(yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True))
        try:
            os.environ.update({name: str(value) for name, value in names.items()})
            torch.set_num_threads(max(1, num_threads // num_processes))
            for rank in range(1, num_processes):
                command = [sys.executable, "-m", PROGRAM, str(file), trainer.default_root_dir]
                threads = str(torch.get_num_threads())
                changes = {"LOCAL_RANK": str(rank), "OMP_NUM_THREADS": threads}
                children.append(subprocess.Popen(command, env={**os.environ, **changes}))
            with ended_if(lambda: any(child.poll() for child in children)):
                yield
                for child in children:
                    child.wait(PATIENCE)
        except LostProcessError as error:
            for reason in Path(folder).glob("error_*"):
                raise ValueError(reason.read_text()) from error
            raise
        finally:
            for child in children:
                child.kill()
                child.wait()
            if distributed.is_initialized():
                distributed.destroy_process_group()
            torch.set_num_threads(num_threads)
            restore(before)


@contextmanager
def ended_if(lost: Callable[[], Any]) -> Iterator[None]:
    """End this process some time after `lost()` has become true, even if it waits for another process."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(1.0):
            if lost() and not done.wait(PATIENCE):
                print("sequel: a process of the run has ended; resume the run", file=sys.stderr, flush=True)
                end_process(1)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()


def restore(environment: Mapping[str, str | None]) -> None:
    """Set variables of the environment to earlier values; None for one that was not set."""
    for name, value in environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
