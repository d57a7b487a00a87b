"""Private names and undocumented behaviour of other packages; nothing else in `sequel_flax` relies on any.

Each function says what it uses and in which version that was seen. `tests/flax/test_compat.py` tests each.
The packages have upper bounds in `pyproject.toml`.
"""

from __future__ import annotations

import logging
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jax._src.distributed import global_state


def coordinator_host() -> str | None:
    """Return the machine of process 0 of `jax.distributed`: `coordinator_address` (jax 0.10.2).

    Returns:
        A name or an address; None without `jax.distributed`.
    """
    address = global_state.coordinator_address
    return None if address is None else address.rpartition(":")[0].strip("[]")


def set_class(module: Any, new: type[Any]) -> None:
    """Replace the class of an NNX module (flax 0.12.8).

    `__class__` is assigned without the `__setattr__` of NNX, which would record it in the module's graph. A
    new module of this class would have to repeat the constructor's arguments, which a module does not keep.

    Args:
        module: The module, which is changed in place.
        new: A subclass of its class.

    Example:
        >>> from flax import nnx
        >>> module = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        >>> set_class(module, type("Scaled", (nnx.Linear,), {}))
        >>> type(module).__name__
        'Scaled'
    """
    object.__setattr__(module, "__class__", new)


def error_number(error: BaseException) -> int | None:
    """Return the error number of the operating system, for example 28 for a full disk (tensorstore 0.1.86).

    Tensorstore raises a ValueError that gives the number in its message only.

    Args:
        error: An exception.

    Returns:
        The number; None if the exception has none.

    Example:
        >>> error_number(ValueError("Error writing local file [os_error_code='28']"))
        28
    """
    if isinstance(error, OSError):
        return error.errno
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return int(code[1]) if code else None


@contextmanager
def write_errors_left_to_the_caller() -> Iterator[None]:
    """Stop orbax's threads from logging failed writes, which are raised as exceptions as well.

    Orbax logs such a failure with its traceback to the loggers absl and asyncio, partly during garbage
    collection (orbax-checkpoint 0.12.8). Tensorstore then calls closed event loops, which Python reports as
    ignored exceptions. The log filters and `sys.unraisablehook` are restored at the end.

    Example:
        >>> with write_errors_left_to_the_caller():
        ...     pass
    """
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    previous = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if unraisable.object is not None or str(unraisable.exc_value) != "Event loop is closed":
            previous(unraisable)

    for logger in loggers:
        logger.addFilter(_is_unrelated)
    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = previous
        for logger in loggers:
            logger.removeFilter(_is_unrelated)


def _is_unrelated(record: logging.LogRecord) -> bool:
    """Return whether a log record is about something else than a failed write of orbax."""
    error = record.exc_info[1] if record.exc_info else None
    if not isinstance(error, OSError):
        return error is None or error_number(error) is None
    return not any("orbax" in frame.filename for frame in traceback.extract_tb(error.__traceback__))
