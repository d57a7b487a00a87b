"""Coresets, samples that are set aside before training: task k has the slots k * N to k * N + N - 1.

They come with the task (`Task.coreset`, from `hparams.training_tasks`) and never change.

Mirror: sequel_flax/coresets.py
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sequel_core.algorithms.kcl import KCLHParams
from sequel_core.stream.benchmark import StreamSpec
from sequel_lightning.consolidation import TRAINING
from sequel_lightning.data import as_batch
from sequel_lightning.module import ContinualModule
from sequel_lightning.objectives import Objective, check_classification
from sequel_lightning.replay import Memory, empty_memory
from sequel_lightning.trees import StateTree


def coreset_of(memory: Memory, k: Any, size: int) -> tuple[Tensor, Tensor]:
    """Return images `[N, ...]` and labels `[N]` of the coreset of task k."""
    rows = slice(k * size, (k + 1) * size)
    x = memory.x[rows]
    if x.ndim == 4 and x.shape[1] == 1:
        x = x[:, 0, :, :, None].movedim(-1, 1)  # with the strides of other images, colours last
    return x, memory.y[rows]


def with_coreset(memory: Memory, k: int, x: Any, y: Any) -> Memory:
    """Return the memory with the coreset of task k, images `[N, ...]` and labels `[N]`."""
    for a, b in zip(memory[:3], (x, y, k), strict=True):
        a[k * len(y) : (k + 1) * len(y)] = b  # in place
    return memory


class CoresetModule(ContinualModule):
    """A module that keeps the coresets of all tasks that have begun.

    Raises:
        ValueError: no spec; in `fit`, for a task without a coreset.
    """

    algorithm_hparams: KCLHParams
    spec: StreamSpec
    objective_elsewhere = "coresets"

    def check_objective(self, objective: Objective) -> None:
        """Raise ValueError if the objective is not about class labels."""
        super().check_objective(objective)
        check_classification(objective, self.algorithm_hparams.name)

    def init_memory(self) -> None:
        """Make the empty coresets."""
        super().init_memory()
        spec = self.needed_spec()
        x, y, t, _ = empty_memory(spec, spec.num_tasks * self.algorithm_hparams.core_size)
        self.coreset = StateTree({"x": x, "y": y, "t": t})

    @property
    def contents(self) -> Memory:
        """The coresets."""
        return Memory(**self.coreset.get(), outputs=None)

    def keep_coreset(self, task: int, x: Tensor, y: Tensor) -> None:
        """Store the coreset of a task. Call this before `fit` if the loaders are user-defined.

        Args:
            task: index.
            x: images `[core_size, C, H, W]`, as in the batches.
            y: labels `[core_size]`.

        Raises:
            ValueError: another number of samples, a task outside the stream, or images of another dtype than
                the spec says.
        """
        memory, size = self.contents, self.algorithm_hparams.core_size
        if x.dtype == torch.uint8 and memory.x.is_floating_point():
            x = self.normalise(x).to(memory.x.dtype)
        if len(x) != size or len(y) != size:
            raise ValueError(
                f"coresets must have core_size={size} samples, got {len(x)} with {len(y)} labels"
            )
        if not 0 <= task < len(memory.t) // size:
            raise ValueError(f"task must be >= 0 and < {len(memory.t) // size}, got {task}")
        if x.dtype != memory.x.dtype:
            name, expected = (str(a.dtype).removeprefix("torch.") for a in (x, memory.x))
            raise ValueError(
                f"the coresets hold {expected} images, got {name}; give a spec with LeafSpec(..., '{name}')"
            )
        with_coreset(memory, task, x, y)

    def coming_coreset(self) -> tuple[int, Tensor, Tensor]:
        """Return index, images and labels of the coreset of the task that a fit would begin.

        Raises:
            ValueError: the task has no coreset.
        """
        task, k, size = (
            self.lifecycle.next_task(),
            self.lifecycle.next_index(),
            self.algorithm_hparams.core_size,
        )
        memory = self.contents
        if int((memory.t == k).sum()) == size and (task is None or task.coreset is None):
            return k, *coreset_of(memory, k, size)
        if task is None:
            raise ValueError(
                f"kcl needs a coreset of task {k}; call module.keep_coreset({k}, x, y) before fit, or give "
                "TaskDataModule a task of hparams.training_tasks(benchmark, seed)"
            )
        coreset = as_batch(self.algorithm_hparams.coreset(task), self.preprocessing.images)
        batch = self.lifecycle.prepared(coreset)
        return k, batch.x, batch.y

    def current_coreset(self) -> tuple[int, Tensor, Tensor]:
        """Return index, images and labels of the current task; before it begins, of the coming task."""
        if not self.lifecycle.fitting and self.phase != TRAINING:
            return self.coming_coreset()
        k = int(self.task_index)
        return k, *coreset_of(self.contents, k, self.algorithm_hparams.core_size)

    def on_fit_start(self) -> None:
        """Check that the task has a coreset."""
        super().on_fit_start()
        if self.phase != TRAINING:
            self.coming_coreset()

    def start_task(self) -> None:
        """Store the coreset of the task, unless `keep_coreset` has stored one."""
        task = self.lifecycle.next_task()
        if task is not None and task.coreset is not None:
            self.keep_coreset(*self.coming_coreset())
