"""Connections between the processes of a run, by which each of them notices how the others end.

Process 0 listens, the others connect to it, and it forwards what it receives. A process that leaves the run
sends an `Ending`. If its connection closes without one, the process was killed.

A process may wait for another one inside a compiled program, which no exception can interrupt. It is then
ended, with one line that says why.
"""

from __future__ import annotations

import json
import secrets
import selectors
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any, NamedTuple, Self

from sequel_core._compat import end_process
from sequel_core.runs.learner import LostProcessError
from sequel_core.runs.signals import InterruptedRunError

PATIENCE = 30.0
"""Seconds in which a process may raise the error of another one by itself; after that it is ended."""
CONNECTING = 60.0
"""Seconds that the connections may take."""
LEAVING = 10.0
"""Seconds that a process waits for the others to leave the run, too."""
SIZE = struct.Struct("!I")
REMEDY = "start all processes again with resume='auto'"


class Ending(NamedTuple):
    """How a process left a run."""

    process: int
    line: str = ""  # what the others print if they end because of it; empty if the run has finished
    code: int = 1  # their exit code
    seconds: float = 0.0  # after which they end
    lost: bool = False  # whether it left without a message


class Watch:
    """The connections of one process, and the thread that reads them.

    Args:
        process: index of this process.
        peers: connections; of process 0, one to each other process, and of another process, one to process 0.
        release: called, for a limited time, before this process is ended because another one has failed.
        patience: seconds in which the others may raise an error of this process by themselves.
    """

    def __init__(
        self,
        process: int,
        peers: Mapping[int, socket.socket],
        release: Callable[[], None] = lambda: None,
        patience: float = PATIENCE,
    ) -> None:
        self._process, self._peers, self._release = process, dict(peers), release
        self._patience, self._left, self._lock = patience, False, threading.Lock()
        self._thread = threading.Thread(target=self._read, daemon=True, name="watch")

    def __enter__(self) -> Self:
        """Take part in a run."""
        self._thread.start()
        return self

    def __exit__(self, error_type: Any, error: BaseException | None, traceback: TracebackType | None) -> None:
        """Leave the run, with the error that ends it; this process is not ended any more."""
        with self._lock:
            self._left = True
        ending = Ending(self._process)
        if error is not None:
            ending = ending_of(error, self._process, self._patience)
        for peer in self._peers.values():
            send(peer, ending)
        if error is None:
            self._thread.join(LEAVING)

    def settle(self) -> None:
        """Wait for a moment: if a process was lost, this one is ended now."""
        self._thread.join(LEAVING / 2)

    def _read(self) -> None:
        """Read the connections until all are closed."""
        due: list[tuple[float, Ending]] = []
        with selectors.DefaultSelector() as selector:
            for process, peer in self._peers.items():
                selector.register(peer, selectors.EVENT_READ, process)
            while selector.get_map() or (due and not self._left):
                for key, _ in selector.select(1.0):
                    connection: Any = key.fileobj
                    ending = receive(connection) or lost(key.data)
                    if ending.process == key.data:
                        selector.unregister(connection)
                    for process, peer in self._peers.items():
                        if self._process == 0 and process != ending.process:
                            send(peer, ending)
                    if ending.line:
                        due.append((time.monotonic() + ending.seconds, ending))
                for at, ending in due:
                    if time.monotonic() >= at:
                        self._end(ending)

    def _end(self, ending: Ending) -> None:
        """End this process, unless it has left the run; process 0, by which the others communicate, last."""
        with self._lock:
            if self._left:
                return
            print(f"sequel: {ending.line}", file=sys.stderr, flush=True)
            if not ending.lost:
                release = threading.Thread(target=self._release, daemon=True)
                release.start()
                release.join(LEAVING)
            if self._process == 0:
                for process, peer in self._peers.items():
                    if process != ending.process:
                        closed(peer)
            end_process(ending.code)


def ending_of(error: BaseException, process: int, patience: float) -> Ending:
    """Return how a process leaves a run that an error ends.

    The other processes ignore signals, so that they end at once if this one was interrupted.
    """
    if isinstance(error, InterruptedRunError):
        return Ending(process, f"process {process} of the run was {error}; {REMEDY}", error.exit_code)
    if isinstance(error, KeyboardInterrupt):
        return Ending(process, f"process {process} of the run was interrupted; {REMEDY}", 130)
    name = type(error).__name__
    line = f"process {process} of the run has ended with an error ({name}), which it has printed"
    return Ending(process, line, 1, patience)


def lost(process: int) -> Ending:
    """Return the ending of a process that has sent none."""
    line = f"process {process} of the run has ended or cannot be reached; {REMEDY}"
    return Ending(process, line, lost=True)


def connected(
    process: int, num_processes: int, host: str, agree: Callable[[Any], Any]
) -> dict[int, socket.socket]:
    """Return the connections of a process, by the index of the other process.

    Args:
        process: index of this process.
        num_processes: of the run.
        host: name or address of the machine of process 0.
        agree: returns the value that process 0 calls it with, in every process.

    Raises:
        LostProcessError: a process does not connect in time.
    """
    try:
        return _accepted(num_processes, agree) if process == 0 else {0: _joined(process, host, agree)}
    except OSError as error:
        raise LostProcessError(f"process {process} could not connect to the others: {error}") from error


def _accepted(num_processes: int, agree: Callable[[Any], Any]) -> dict[int, socket.socket]:
    """Return the connections of process 0."""
    peers: dict[int, socket.socket] = {}
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    with socket.create_server(
        ("", 0), family=family, dualstack_ipv6=family == socket.AF_INET6, backlog=num_processes
    ) as server:
        _, token = agree((server.getsockname()[1], secrets.token_hex()))
        server.settimeout(CONNECTING)
        while len(peers) < num_processes - 1:
            peer, _ = server.accept()
            peer.settimeout(CONNECTING)
            hello = receive(peer)
            if hello is None or not secrets.compare_digest(hello.line, token):
                peer.close()  # of another program
                continue
            peer.settimeout(None)
            peers[hello.process] = peer
    return peers


def _joined(process: int, host: str, agree: Callable[[Any], Any]) -> socket.socket:
    """Return the connection of another process."""
    port, token = agree(None)
    peer = socket.create_connection((host, port), CONNECTING)
    peer.settimeout(None)
    send(peer, Ending(process, token))
    return peer


def send(peer: socket.socket, message: Ending) -> None:
    """Send a message; a closed connection is not an error, since its end is read."""
    content = json.dumps(message).encode()
    with suppress(OSError):
        peer.sendall(SIZE.pack(len(content)) + content)


def receive(peer: socket.socket) -> Ending | None:
    """Return a message; None if the connection is closed, or another program writes to it."""
    try:
        (size,) = SIZE.unpack(peer.recv(SIZE.size, socket.MSG_WAITALL))
        return Ending(*json.loads(peer.recv(min(size, 2**16), socket.MSG_WAITALL)))
    except (OSError, ValueError, TypeError, struct.error):
        return None


def closed(peer: socket.socket) -> None:
    """Wait, for a limited time, until the other process has closed a connection."""
    peer.settimeout(LEAVING)
    with suppress(OSError):
        while peer.recv(2**16):
            pass
