"""A learner's part of a checkpoint: `state/` in orbax's own format, written in the background.

Plain orbax reads it, without this package: `StandardCheckpointer().restore(path / "state")["ts"]["params"]`.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

ITEM = "state"


class Saver:
    """Saves trees into numbered directories of one folder, through orbax's CheckpointManager."""

    def __init__(self) -> None:
        self._manager: ocp.CheckpointManager | None = None

    def save(self, path: Path, tree: Any) -> Callable[[], None]:
        """Copy a tree and write it to `path`, whose name is a number; return what waits for the end of that.

        The tree may be donated as soon as this returns.

        Raises:
            OSError: it could not be written; what is returned raises it, too.
        """
        leave_errors_to_the_caller()
        if self._manager is None or Path(self._manager.directory) != path.parent.absolute():
            self.close()
            self._manager = ocp.CheckpointManager(
                path.parent.absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=None)
            )
        manager, args = self._manager, ocp.args.StandardSave(_storable(tree))
        with _system_errors(path):
            manager.save(int(path.name), args=ocp.args.Composite(**{ITEM: args}))

        def wait() -> None:
            with _system_errors(path):
                manager.wait_until_finished()

        return wait

    def close(self) -> None:
        """Wait for what is being written, and end orbax's threads.

        Raises:
            OSError: it could not be written.
        """
        manager, self._manager = self._manager, None
        if manager is not None:
            with _system_errors(Path(manager.directory)):
                manager.close()


@cache
def leave_errors_to_the_caller() -> None:
    """Keep orbax's threads from telling at length of a failure that is raised besides; done once, for good.

    They log it with its traceback, some of it when garbage is collected, and tensorstore calls back into
    event loops that the failure has closed, which Python reports as an ignored exception.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_is_news)
    report = sys.unraisablehook

    def of_other_things(unraisable: Any) -> None:
        if unraisable.object is not None or str(unraisable.exc_value) != "Event loop is closed":
            report(unraisable)

    sys.unraisablehook = of_other_things


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a record tells of something other than a write of orbax's that failed."""
    error = record.exc_info[1] if record.exc_info else None
    if not isinstance(error, OSError):
        return error is None or _number(error) is None
    return not any("orbax" in frame.filename for frame in traceback.extract_tb(error.__traceback__))


def _number(error: BaseException) -> int | None:
    """Return the system's number for what went wrong, where an error tells it: 28 where a disk is full."""
    if isinstance(error, OSError):
        return error.errno
    told = re.search(r"os_error_code='(\d+)'", str(error))  # tensorstore's, as a ValueError
    return int(told[1]) if told else None


@contextmanager
def _system_errors(path: Path) -> Iterator[None]:
    """Raise an OSError that names the checkpoint for what orbax and tensorstore raise."""
    try:
        yield
    except (OSError, ValueError) as error:
        number = _number(error)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def restored(path: Path, like: Any) -> Any:
    """Return the tree that a checkpoint holds.

    Args:
        path: of the checkpoint.
        like: a tree of the same structure, shapes and dtypes.

    Raises:
        ValueError: the checkpoint holds something else; the first leaf that differs is named.
    """
    folder, wanted = epath.Path(path.absolute()) / ITEM, _storable(like)
    check_leaves(path, _described(ocp.StandardCheckpointHandler().metadata(folder).tree), _described(wanted))
    found = ocp.StandardCheckpointer().restore(folder, jax.tree.map(ocp.utils.to_shape_dtype_struct, wanted))
    leaves = iter(jax.tree.leaves(found))
    return jax.tree.map(lambda old: _of_kind(old, next(leaves)) if old.size else old, like)


def check_leaves(path: Path, found: dict[str, str], wanted: dict[str, str]) -> None:
    """Raise ValueError at the first leaf, by name, whose shape and dtype are not the wanted ones."""
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise ValueError(
                f"checkpoint {path} does not fit: {name} is {found.get(name, 'missing')} there, and "
                f"{wanted.get(name, 'unknown')} here; resume with the settings of the run"
            )


def _described(tree: Any) -> dict[str, str]:
    """Return dtype and shape of every leaf by its path."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in keys): (
            f"{leaf.dtype} {list(leaf.shape)}"
        )
        for keys, leaf in leaves
    }


def _storable(tree: Any) -> Any:
    """Return the tree with None for arrays without elements, which orbax refuses and which say nothing."""
    return jax.tree.map(lambda leaf: leaf if leaf.size else None, tree)


def _of_kind(old: Any, new: Any) -> Any:
    return jnp.asarray(np.asarray(new), old.dtype) if isinstance(old, jax.Array) else np.asarray(new)
