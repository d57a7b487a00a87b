"""The learner's part of a checkpoint, `state/`, which orbax writes in the background.

Orbax alone can read it: `StandardCheckpointer().restore(path / "state")["ts"]["params"]`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from sequel_flax._compat import error_number

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

ITEM = "state"


class Saver:
    """Saves trees to numbered directories with orbax's CheckpointManager.

    Example:
        >>> import tempfile
        >>> saver = Saver()
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     wait = saver.save(Path(directory) / "1", {"w": jnp.ones(2)})
        ...     wait()
        ...     restored(Path(directory) / "1", {"w": jnp.zeros(2)})["w"].tolist()
        ...     saver.close()
        [1.0, 1.0]
    """

    def __init__(self) -> None:
        self._manager: ocp.CheckpointManager | None = None

    def save(self, path: Path, tree: Any) -> Callable[[], None]:
        """Copy a tree and write it in the background. The tree may be donated after the return.

        Args:
            path: The directory to write to; its name is a number.
            tree: A tree of arrays.

        Returns:
            A function that waits until the tree is written.

        Raises:
            OSError: The tree cannot be written. The returned function may raise it too.
        """
        import orbax.checkpoint as ocp  # imported here because it takes a while

        if self._manager is None or Path(self._manager.directory) != path.parent.absolute():
            self.close()
            options: dict[str, Any] = {}
            if jax.process_count() > 1:  # only the main process saves
                options["multiprocessing_options"] = ocp.options.MultiprocessingOptions(active_processes={0})
                options["create"] = False  # orbax cannot create the directory then; it exists
            self._manager = ocp.CheckpointManager(
                path.parent.absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=None, **options)
            )
        manager, args = self._manager, ocp.args.StandardSave(_storable(tree))
        with _system_errors(path):
            manager.save(int(path.name), args=ocp.args.Composite(**{ITEM: args}))

        def wait() -> None:
            with _system_errors(path):
                manager.wait_until_finished()

        return wait

    def close(self) -> None:
        """Wait until everything is written, and stop orbax's threads.

        Raises:
            OSError: A tree could not be written.
        """
        manager, self._manager = self._manager, None
        if manager is not None:
            with _system_errors(Path(manager.directory)):
                manager.close()


@contextmanager
def _system_errors(path: Path) -> Iterator[None]:
    """Raise an OSError that names the checkpoint in place of the errors of orbax and tensorstore."""
    try:
        yield
    except (OSError, ValueError) as error:
        code = error_number(error)
        if code is None:
            raise
        raise OSError(code, os.strerror(code), str(path)) from error


def restored(path: Path, like: Any) -> Any:
    """Return the tree in a checkpoint.

    Args:
        path: The directory of the checkpoint.
        like: A tree with the structure, shapes and dtypes of the saved one.

    Returns:
        The saved tree. Its leaves are JAX arrays if those of `like` are, else NumPy arrays.

    Raises:
        ValueError: A leaf of the checkpoint differs from that of `like`; the first one is named.

    Example:
        >>> import tempfile
        >>> saver = Saver()
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     saver.save(Path(directory) / "1", {"w": jnp.ones(2)})()
        ...     restored(Path(directory) / "1", {"w": jnp.zeros(2)})["w"].tolist()
        ...     saver.close()
        [1.0, 1.0]
    """
    import orbax.checkpoint as ocp
    from etils import epath

    folder, expected = epath.Path(path.absolute()) / ITEM, _storable(like)
    metadata = ocp.StandardCheckpointHandler().metadata(folder).tree
    check_leaves(path, _described(metadata), _described(expected))
    tree = ocp.StandardCheckpointer().restore(folder, jax.tree.map(ocp.utils.to_shape_dtype_struct, expected))
    leaves = iter(jax.tree.leaves(tree))
    return jax.tree.map(lambda old: _as_type(old, next(leaves)) if old.size else old, like)


def check_leaves(path: Path, saved: dict[str, str], expected: dict[str, str]) -> None:
    """Check that the leaves of a checkpoint have the expected shapes and dtypes.

    Args:
        path: The directory of the checkpoint, for the message.
        saved: Dtype and shape of each leaf in the checkpoint, by name.
        expected: Dtype and shape of each expected leaf, by name.

    Raises:
        ValueError: A leaf is missing, unknown or different; the first one by name is named.

    Example:
        >>> check_leaves(Path("ckpt/1"), {"w": "float32 [2]"}, {"w": "float32 [2]"})
    """
    for name in sorted(saved.keys() | expected.keys()):
        if saved.get(name) != expected.get(name):
            raise ValueError(
                f"checkpoint {path} does not fit: {name} is {saved.get(name, 'missing')} there, and "
                f"{expected.get(name, 'unknown')} here; resume with the settings of the run"
            )


def _described(tree: Any) -> dict[str, str]:
    """Return the dtype and shape of every leaf by its path."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in keys): (
            f"{leaf.dtype} {list(leaf.shape)}"
        )
        for keys, leaf in leaves
    }


def _storable(tree: Any) -> Any:
    """Return the tree with None in place of empty arrays, which orbax cannot save."""
    return jax.tree.map(lambda leaf: leaf if leaf.size else None, tree)


def _as_type(old: Any, new: Any) -> Any:
    """Return `new` like `old`: a JAX array with its dtype, on its device, or a NumPy array."""
    if not isinstance(old, jax.Array):
        return np.asarray(new)
    return jnp.asarray(np.asarray(new), old.dtype, device=old.sharding if old.committed else None)
