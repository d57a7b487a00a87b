"""What a loader's batch must be: `(x, y)` or `(x, y, t)`, with labels and task indices of the stream."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sequel_core.task import StreamSpec

INTEGERS = frozenset({torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})
SHOWN = 10
"""Classes of a task that a message lists."""


def are_task_indices(t: Any, y: Any) -> bool:
    """Return whether t is an integer tensor `[B]`, as long as the labels."""
    return isinstance(t, Tensor) and t.dtype in INTEGERS and t.ndim == 1 and len(t) == len(y)


def description(value: Any) -> str:
    """Return dtype and shape of a tensor, or the type of anything else."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return type(value).__name__


def unknown_batch(batch: Any) -> ValueError:
    """Return the error for a batch that is none of `(x, y)`, `(x, y, t)` and Batch."""
    several = isinstance(batch, tuple | list)
    found = f"({', '.join(map(description, batch))})" if several else type(batch).__name__
    return ValueError(
        "a batch must be (x, y) or (x, y, t), t the task index of each sample (integers [B], from 0), got "
        f"{found}; leave out other values in the loader's collate_fn, or override as_batch"
    )


def check_tasks(t: Tensor, spec: StreamSpec | None) -> None:
    """Raise ValueError if a task index of a batch `[B]` is none of the stream's."""
    if spec is None:
        return
    outside = t[(t < 0) | (t >= spec.num_tasks)]
    if len(outside):
        raise ValueError(
            f"the third element of a batch is the task index of each sample, 0 to {spec.num_tasks - 1}, got "
            f"{int(outside[0])}; leave out other values (lengths, weights) in the loader's collate_fn, or "
            "override as_batch"
        )


def check_labels(y: Any, t: Tensor, spec: StreamSpec | None) -> None:
    """Raise ValueError if the labels of a batch are not integers `[B]`, each a class of its sample's task."""
    if spec is None:
        return
    if not isinstance(y, Tensor) or y.dtype not in INTEGERS or y.ndim != 1:
        raise ValueError(f"labels must be an integer tensor [B], got {description(y)}")
    for label, task in sorted(set(zip(y.tolist(), t.tolist(), strict=True))):
        if not 0 <= label < spec.num_classes or not spec.mask[task, label]:
            raise wrong_label(label, task, spec)


def wrong_label(label: int, task: int, spec: StreamSpec) -> ValueError:
    """Return the error for a label that is not a class of its sample's task."""
    classes = spec.mask[task].nonzero()[0].tolist()
    listed = ", ".join(map(str, classes[:SHOWN])) + (", ..." if len(classes) > SHOWN else "")
    head = "" if 0 <= label < spec.num_classes else f" and outside the head, 0 to {spec.num_classes - 1}"
    return ValueError(
        f"label {label} is not among the classes of task {task}, [{listed}]{head}; relabel the samples, or, "
        "if they belong to another task, give each one's task index as (x, y, t)"
    )
