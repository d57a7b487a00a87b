"""Processes of a run notice how the others end; each test has three real processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import pytest

from sequel_core.runs import watch
from sequel_core.runs.learner import LostProcessError
from sequel_core.runs.signals import InterruptedRunError
from sequel_core.runs.watch import Watch, connected

SIZE = 3
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["pytest", "sequel_core.runs.watch"])
AGAIN = "start all processes again with resume='auto'"


def process(k: int, pipes: Any, folder: Path, job: Callable[[int], None], patience: float) -> None:
    """Do a job as process k of a run; what it prints goes to a file."""
    sys.stderr = (folder / str(k)).open("w", buffering=1)

    def agree(value: Any) -> Any:
        if k:
            return pipes[k][0].recv()
        for _, there in pipes[1:]:
            there.send(value)
        return value

    with Watch(k, connected(k, SIZE, "localhost", agree), patience=patience):
        agree(None)  # all are connected
        job(k)


def ended(
    job: Callable[[int], None], folder: Path, patience: float = 0.1
) -> tuple[list[int | None], list[list[str]]]:
    """Return the exit codes of three processes that do a job, and the lines that each prints."""
    pipes = [CONTEXT.Pipe(duplex=False) for _ in range(SIZE)]
    processes = [CONTEXT.Process(target=process, args=(k, pipes, folder, job, patience)) for k in range(SIZE)]
    for one in processes:
        one.start()
    try:
        for one in processes:
            one.join(120)
    finally:
        for one in processes:
            one.kill()
            one.join(10)
    return [one.exitcode for one in processes], [(folder / str(k)).read_text().splitlines() for k in range(3)]


def wait() -> NoReturn:
    """Wait for ever, as for a process that does not answer."""
    while True:
        signal.pause()


def killed(which: int, k: int) -> None:
    if k == which:
        os.kill(os.getpid(), signal.SIGKILL)
    wait()


def failed(error: BaseException, k: int) -> None:
    if k == 1:
        raise error
    wait()


def interrupted(error: Callable[[], BaseException], k: int) -> None:
    if k == 0:
        raise error()
    wait()


def failed_everywhere(k: int) -> None:
    raise ValueError(f"the same error, process {k}")


def finished(k: int) -> None:
    print("done", file=sys.stderr)


@pytest.mark.parametrize("which", [0, 2])
def test_a_killed_process_ends_the_others_with_one_line(which: int, tmp_path: Path) -> None:
    codes, lines = ended(partial(killed, which), tmp_path)
    line = f"sequel: process {which} of the run has ended or cannot be reached; {AGAIN}"
    assert codes == [-signal.SIGKILL if k == which else 1 for k in range(SIZE)]
    assert lines == [[] if k == which else [line] for k in range(SIZE)]


def test_an_error_in_one_process_ends_the_others(tmp_path: Path) -> None:
    codes, lines = ended(partial(failed, OSError(28, "No space left on device")), tmp_path)
    line = "sequel: process 1 of the run has ended with an error (OSError), which it has printed"
    assert codes == [1, 1, 1]
    assert (lines[0], lines[2]) == ([line], [line])
    assert lines[1][-1] == "OSError: [Errno 28] No space left on device"


@pytest.mark.parametrize(
    ("error", "text", "code"),
    [
        (partial(InterruptedRunError, signal.SIGTERM), "ended by SIGTERM", 143),
        (KeyboardInterrupt, "interrupted", 130),
    ],
    ids=["signal", "second Ctrl-C"],
)
def test_a_signal_to_the_first_process_ends_the_others(
    error: Callable[[], BaseException], text: str, code: int, tmp_path: Path
) -> None:
    codes, lines = ended(partial(interrupted, error), tmp_path)
    line = f"sequel: process 0 of the run was {text}; {AGAIN}"
    assert codes == [1, code, code]
    assert lines[1:] == [[line], [line]]
    assert not any(text.startswith("sequel:") for text in lines[0])


def test_an_error_of_all_processes_is_theirs(tmp_path: Path) -> None:
    codes, lines = ended(failed_everywhere, tmp_path, watch.PATIENCE)
    assert codes == [1, 1, 1]
    assert [text[-1] for text in lines] == [f"ValueError: the same error, process {k}" for k in range(3)]
    assert not any(line.startswith("sequel:") for text in lines for line in text)


def test_a_run_that_finishes(tmp_path: Path) -> None:
    assert ended(finished, tmp_path) == ([0, 0, 0], [["done"]] * 3)


def test_a_process_that_does_not_connect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "CONNECTING", 0.1)
    with pytest.raises(LostProcessError, match=r"process 0 could not connect to the others: timed out"):
        connected(0, 2, "localhost", lambda value: value)
    with pytest.raises(LostProcessError, match=r"process 1 could not connect to the others"):
        connected(1, 2, "localhost", lambda value: (1, "token"))
