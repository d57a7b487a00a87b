"""A learner's part of a checkpoint: `state/` in orbax's own format, written in the background.

Plain orbax reads it, without this package: `StandardCheckpointer().restore(path / "state")["ts"]["params"]`.
"""

from __future__ import annotations

from collections.abc import Callable
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
        """
        if self._manager is None or Path(self._manager.directory) != path.parent.absolute():
            self.close()
            self._manager = ocp.CheckpointManager(
                path.parent.absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=None)
            )
        args = ocp.args.StandardSave(_storable(tree))
        self._manager.save(int(path.name), args=ocp.args.Composite(**{ITEM: args}))
        wait: Callable[[], None] = self._manager.wait_until_finished
        return wait

    def close(self) -> None:
        """Wait for what is being written, and end orbax's threads."""
        if self._manager is not None:
            self._manager.close()
            self._manager = None


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
