"""Process-wide hooks that a run replaces and restores."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def event_errors_left_to_the_caller() -> Iterator[None]:
    """Print no traceback of TensorBoard's writer thread, whose next call raises the same error.

    `threading.excepthook` is replaced while the context is active and restored at its end.
    """
    previous = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if type(args.thread).__module__ != "tensorboard.summary.writer.event_file_writer":
            previous(args)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = previous
