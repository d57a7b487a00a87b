"""Checks of a loader's batches: `(x, y)`, `(x, y, t)` or a dict, with arrays and tasks of the stream."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from sequel_core.stream.task import Batch
from sequel_core.stream.trees import Tree, leaves, tree_map

INTEGERS = frozenset({torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})
NARROW = INTEGERS - {torch.int64}
SHOWN = 10
"""The number of classes of a task that a message lists."""


def are_task_indices(t: Any, y: Any) -> bool:
    """Return whether t is an integer tensor `[B]`, as long as the targets, which are tensors too."""
    if not isinstance(t, Tensor) or t.dtype not in INTEGERS or t.ndim != 1:
        return False
    if isinstance(y, Tensor):
        return y.ndim > 0 and t.size(0) == y.size(0)  # len takes ten times as long
    return isinstance(y, Mapping) and all(are_task_indices(t, part) for part in y.values())


def widened(y: Any) -> Any:
    """Return labels as int64 if they are narrower integers, which cross-entropy does not support."""
    return y.long() if isinstance(y, Tensor) and y.dtype in NARROW and y.ndim == 1 else y


def to_batch(batch: Any, task_indices: Callable[[int], Tensor], target: str = "labels") -> Batch:
    """Return a loader's batch, `(x, y)`, `(x, y, t)`, a dict or a Batch, as a Batch.

    Args:
        batch: as the loader yields it. Of a dict, `batch[target]` is y, `batch["t"]` is t if it is there, and
            the rest is x.
        task_indices: returns the task index of each of so many samples, for a batch without them.
        target: the key of y.

    Raises:
        ValueError: any other batch, or a t that is not an integer tensor `[B]`.
    """
    if not isinstance(batch, tuple | list) and isinstance(batch, Mapping):
        if target not in batch:
            raise ValueError(
                f"a batch that is a dict must have the target {target!r} of the objective, got the keys "
                f"{', '.join(map(repr, batch))}; give an objective with target='...'"
            )
        t = (batch["t"],) if "t" in batch else ()
        batch = (inputs_of(batch, target), batch[target], *t)
    planned = type(batch) is Batch
    if planned or (isinstance(batch, (tuple, list)) and len(batch) == 3):
        x, y, t = batch[:3]
        if not are_task_indices(t, y):
            raise unknown_batch(batch[:3])
        if t.dtype == torch.uint8:  # torch would take it for a mask
            t = t.long()
        y = widened(y)
        return batch._replace(y=y, t=t) if planned else Batch(x, y, t)
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise unknown_batch(batch)
    x, y = batch
    y = widened(y)
    return Batch(x, y, task_indices(num_samples(y)))


def inputs_of(batch: Mapping[str, Any], target: str) -> dict[str, Any]:
    """Return the inputs of a batch that is a dict: all but the targets and the task indices."""
    return {key: value for key, value in batch.items() if key not in (target, "t")}


def num_samples(y: Tree) -> int:
    """Return the number of samples of targets `[B, ...]`."""
    return len(y if isinstance(y, Tensor) else leaves(y)[0])


def joined(batches: Iterable[Any]) -> Batch:
    """Return the samples of several batches, or replay batches, as one batch without a plan."""
    parts = zip(*(batch[:3] for batch in batches), strict=True)
    return Batch(*(tree_map(lambda *tensors: torch.cat(tensors), *trees) for trees in parts))


def rows(batch: Batch, index: Any) -> Batch:
    """Return the samples of a batch at an index, such as a slice, without a plan."""
    return Batch(*(tree_map(itemgetter(index), tree) for tree in batch[:3]))


def pieces(batch: Batch, size: int) -> Iterator[Batch]:
    """Yield the samples of a batch in order, `size` at a time; the last ones may be fewer."""
    for start in range(0, len(batch.t), size):
        yield rows(batch, slice(start, start + size))


def check_leaves(tree: Tree, specs: Tree, name: str) -> None:
    """Raise ValueError unless tensors have the shapes and dtypes of a spec; floats may have any precision.

    Args:
        tree: tensors `[B, ...]`.
        specs: of the stream.
        name: of the tree, for the message.
    """
    if isinstance(specs, Mapping):
        if not isinstance(tree, Mapping) or tree.keys() != specs.keys():
            got = f"the keys {', '.join(tree)}" if isinstance(tree, Mapping) else description(tree)
            raise ValueError(
                f"{name} must be a dict with the keys {', '.join(specs)}, as in the stream's spec, got {got}"
            )
        for key, spec in specs.items():
            check_leaves(tree[key], spec, f"{name}.{key}")
        return
    dtype = getattr(torch, specs.dtype)
    same_shape = isinstance(tree, Tensor) and tree.shape[1:] == specs.shape
    if same_shape and (tree.dtype == dtype or (dtype.is_floating_point and tree.is_floating_point())):
        return
    shape = ", ".join(map(str, ("B", *specs.shape)))
    raise ValueError(
        f"{name} must be {specs.dtype} [{shape}], as in the stream's spec, got {description(tree)}; convert "
        "it in the loader, or give the module a spec that fits"
    )


def description(value: Any) -> str:
    """Return dtype and shape of a tensor, or the type of anything else."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return type(value).__name__


def unknown_batch(batch: Any) -> ValueError:
    """Return the error for a batch that is not `(x, y)`, `(x, y, t)`, a dict or a Batch."""
    several = isinstance(batch, tuple | list)
    received = f"({', '.join(map(description, batch))})" if several else type(batch).__name__
    return ValueError(
        "a batch must be (x, y) or (x, y, t), t the task index of each sample (integers [B], from 0), got "
        f"{received}; leave out other values in the loader's collate_fn, or override as_batch"
    )


def check_tasks(t: Tensor, known: Tensor | None) -> None:
    """Raise ValueError if a task index of a batch `[B]` is not in the stream; see `check_batch`."""
    if known is None:
        return
    outside = t[(t < 0) | (t >= len(known))]
    if len(outside):
        raise ValueError(
            f"the third element of a batch is the task index of each sample, 0 to {len(known) - 1}, got "
            f"{int(outside[0])}; leave out other values (lengths, weights) in the loader's collate_fn, or "
            "override as_batch"
        )


def check_batch(batch: Batch, known: Tensor | None, labelled: bool = True) -> None:
    """Raise ValueError if a batch has no labels, or a task index or label that the stream does not have.

    Args:
        batch: with task indices `[B]`.
        known: the labels that samples of each task may have, bool `[T, num_classes]`; None for any.
        labelled: whether targets are class labels; if not, only the task indices are checked.
    """
    y, t = batch.y, batch.t
    check_tasks(t, known)
    if not labelled:
        return
    if not isinstance(y, Tensor) or y.dtype not in INTEGERS or y.ndim != 1:
        raise ValueError(
            f"labels must be an integer tensor [B], got {description(y)}; for other targets give a spec, or "
            "an objective such as squared_error()"
        )
    if known is None:
        return
    wrong, label, task = first_wrong(y, t, known).tolist()
    if wrong:
        raise wrong_label(label, task, known)


def first_wrong(y: Tensor, t: Tensor, known: Tensor) -> Tensor:
    """Return 1, label and task of the first sample whose label its task does not have, else 0, int64 `[3]`.

    Args:
        y: labels, integers `[N]`, N > 0.
        t: task indices, integers `[N]`.
        known: the labels that samples of each task may have, bool `[T, num_classes]`.
    """
    tasks, classes = known.shape
    inside = (y >= 0) & (y < classes) & (t >= 0) & (t < tasks)
    wrong = ~(inside & known[t.long().clamp(0, tasks - 1), y.long().clamp(0, classes - 1)])
    first = wrong.int().argmax()
    values = torch.stack([wrong[first], y[first], t[first]])
    return values.long() * wrong[first]


def wrong_label(label: int, task: int, known: Tensor) -> ValueError:
    """Return the error for a label that samples of a task cannot have."""
    classes = known[task].nonzero()[:, 0].tolist()
    listed = ", ".join(map(str, classes[:SHOWN])) + (", ..." if len(classes) > SHOWN else "")
    head = "" if 0 <= label < known.shape[1] else f" and outside the head, 0 to {known.shape[1] - 1}"
    return ValueError(
        f"label {label} is not among the classes of task {task}, [{listed}]{head}; relabel the samples, or, "
        "if they belong to another task, give each one's task index as (x, y, t)"
    )
