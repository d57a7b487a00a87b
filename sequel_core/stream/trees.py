"""Trees of arrays: an array, or a dict of trees. Samples and targets have this form."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Tree = Any  # an array, or a dict of trees


@dataclass(frozen=True)
class LeafSpec:
    """Shape and dtype of one array of a sample.

    Args:
        shape: without the batch axis.
        dtype: name of a NumPy dtype.

    Example:
        >>> LeafSpec((28, 28, 1), "uint8").shape
        (28, 28, 1)
    """

    shape: tuple[int, ...]
    dtype: str = "float32"


def tree_map(function: Callable[..., Any], tree: Tree, *others: Tree) -> Tree:
    """Return the tree of the results of a function of each leaf, and of the same leaves of other trees.

    Example:
        >>> tree_map(lambda a, b: a + b, {"a": 1, "b": {"c": 2}}, {"a": 10, "b": {"c": 20}})
        {'a': 11, 'b': {'c': 22}}
    """
    if isinstance(tree, Mapping):
        return {k: tree_map(function, v, *(other[k] for other in others)) for k, v in tree.items()}
    return function(tree, *others)


def named_leaves(tree: Tree, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of a tree with their names.

    Args:
        tree: an array, or a dict of trees.
        name: of the tree; the name of a nested leaf is `name.key`.

    Example:
        >>> list(named_leaves({"a": 1, "b": {"c": 2}}, "x"))
        [('x.a', 1), ('x.b.c', 2)]
    """
    if isinstance(tree, Mapping):
        for k, v in tree.items():
            yield from named_leaves(v, f"{name}.{k}" if name else str(k))
    else:
        yield name, tree


def named_map(function: Callable[[str, Any], Any], tree: Tree, name: str = "") -> Tree:
    """Return the tree of the results of a function of the name and the value of each leaf.

    Example:
        >>> named_map(lambda name, value: f"{name}={value}", {"a": 1, "b": {"c": 2}}, "x")
        {'a': 'x.a=1', 'b': {'c': 'x.b.c=2'}}
    """
    if isinstance(tree, Mapping):
        return {k: named_map(function, v, f"{name}.{k}" if name else str(k)) for k, v in tree.items()}
    return function(name, tree)


def leaves(tree: Tree) -> list[Any]:
    """Return the leaves of a tree.

    Example:
        >>> leaves({"a": 1, "b": {"c": 2}})
        [1, 2]
    """
    return [leaf for _, leaf in named_leaves(tree)]


def specs_of(arrays: Tree) -> Tree:
    """Return the specs of a tree of arrays `[N, ...]`; float64 arrays are read as float32.

    Example:
        >>> specs_of(np.zeros((5, 3), np.int32))
        LeafSpec(shape=(3,), dtype='int32')
    """
    return tree_map(lambda a: LeafSpec(tuple(map(int, a.shape[1:])), str(read_dtype(a.dtype))), arrays)


def read_dtype(dtype: Any) -> Any:
    """Return the dtype of an array's samples: its own, but float32 for float64.

    Example:
        >>> read_dtype(np.dtype("float64")), read_dtype(np.dtype("int64"))
        (dtype('float32'), dtype('int64'))
    """
    return np.dtype(np.float32) if dtype == np.float64 else dtype


def is_image(spec: Tree) -> bool:
    """Return whether inputs with this spec are images: one array of uint8 or float32 `[H, W, C]`."""
    return isinstance(spec, LeafSpec) and len(spec.shape) == 3 and spec.dtype in ("uint8", "float32")


def is_label(spec: Tree) -> bool:
    """Return whether targets with this spec are class labels, one integer per sample."""
    return isinstance(spec, LeafSpec) and spec.shape == () and np.dtype(spec.dtype).kind in "iu"


def specs_text(specs: Tree) -> str:
    """Return the dtypes and shapes of a tree of specs for a message.

    Example:
        >>> specs_text({"a": LeafSpec((3,)), "b": LeafSpec((), "int64")})
        'a float32 [3], b int64 []'
    """
    return ", ".join(f"{name} {leaf.dtype} {list(leaf.shape)}".strip() for name, leaf in named_leaves(specs))


def shapes_text(specs: Tree) -> str:
    """Return the shapes of a tree of specs for a message.

    Example:
        >>> shapes_text({"a": LeafSpec((3,)), "b": LeafSpec(())})
        'a [3], b []'
    """
    return ", ".join(f"{name} {list(leaf.shape)}".strip() for name, leaf in named_leaves(specs))
