"""Processes of `sequel reproduce --jobs`: with Python's built-in functions in place of a run."""

import os
import signal
from pathlib import Path

import pytest

from sequel_core.cli.processes import THREADS, call_in_processes
from sequel_core.runs.signals import InterruptedRunError


def test_a_process_that_fails_or_is_killed_does_not_stop_the_others(tmp_path: Path) -> None:
    codes = [
        "pass",
        "import sys; sys.exit(3)",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "pass",
    ]
    ended = dict(call_in_processes(exec, [(code,) for code in codes], jobs=2))
    assert ended == {0: 0, 1: 3, 2: -signal.SIGKILL, 3: 0}


def test_two_at_a_time_with_their_share_of_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process opens one end of a pipe, which waits for the other end, at most two minutes."""
    monkeypatch.delenv(THREADS, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    pipe = str(tmp_path / "pipe")
    os.mkfifo(pipe)
    write = f"import os, signal; signal.alarm(120); open({pipe!r}, 'w').write(os.environ[{THREADS!r}])"
    read = f"import signal; signal.alarm(120); assert open({pipe!r}).read() == '3'"
    assert dict(call_in_processes(exec, [(write,), (read,)], jobs=2)) == {0: 0, 1: 0}
    assert THREADS not in os.environ


def test_a_signal_terminates_the_processes(tmp_path: Path) -> None:
    """The process sends the signal to this one, then waits for two minutes."""
    pid = os.getpid()
    code = f"import os, signal; signal.alarm(120); os.kill({pid}, signal.SIGTERM); signal.pause()"
    with pytest.raises(InterruptedRunError, match="ended by SIGTERM"):
        list(call_in_processes(exec, [(code,)], jobs=1))
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
