"""TaskDataModule: one task for one `Trainer.fit`, in the batches of the plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import itemgetter
from typing import Any

import pytorch_lightning as pl
import torch

from sequel_core.stream import plan
from sequel_core.stream.task import AnySplit, Batch, Samples, Task
from sequel_core.stream.trees import Tree, is_image, leaves, tree_map
from sequel_lightning.batches import rows

AHEAD = 64
"""Steps that are planned at once."""


def as_batch(samples: Samples, images: bool = True) -> Batch:
    """Return samples as tensors without a copy; images are `[..., B, C, H, W]`."""
    x, y, t = (tree_map(torch.from_numpy, tree) for tree in samples)
    return Batch(x.movedim(-1, -3) if images else x, y, t)


def are_images(x: Tree) -> bool:
    """Return whether inputs `[B, ...]` are images `[B, C, H, W]`, as `is_image` decides by their spec."""
    return isinstance(x, torch.Tensor) and x.ndim == 4 and (x.dtype == torch.uint8 or x.is_floating_point())


def steps_of(tree: Tree) -> Iterable[Tree]:
    """Return the parts of tensors `[steps, B, ...]`, one for each step."""
    if isinstance(tree, torch.Tensor):
        return tree
    return [tree_map(itemgetter(k), tree) for k in range(len(leaves(tree)[0]))]


class PlannedBatches:
    """The training batches of a task in the order of the plan; resumable at any batch.

    A batch is a plain tuple `(x, y, t)`, because Lightning moves it to the device faster than a named tuple.

    Iterating yields the batches of the Trainer's current epoch, or of the first epoch without a Trainer. The
    length is never 0: a tuner may set a batch size larger than the task, which then raises ValueError instead
    of training nothing.
    """

    def __init__(self, datamodule: TaskDataModule) -> None:
        self._datamodule = datamodule
        self._joined: AnySplit | None = None
        self._epoch = 0
        self._position = 0
        self._resume: dict[str, int] | None = None

    @property
    def _split(self) -> AnySplit:
        """The samples to train on: the task's, or these and the module's exemplars."""
        if self._joined is None:
            trainer, split = self._datamodule.trainer, self._datamodule.task.train
            fitted = getattr(trainer, "lightning_module", None)
            if fitted is None:
                return split
            self._joined = fitted.training_split(split) if hasattr(fitted, "training_split") else split
        return self._joined

    def __len__(self) -> int:
        module = self._datamodule
        return max(1, plan.steps_per_epoch(len(self._split), module.batch_size, module.drop_last))

    def __iter__(self) -> Iterator[tuple[Tree, Tree, torch.Tensor]]:
        module = self._datamodule
        self._epoch = module.trainer.current_epoch if module.trainer is not None else 0
        resume, self._resume = self._resume, None
        self._position = resume["position"] if resume is not None and resume["epoch"] == self._epoch else 0
        split = self._split
        images = is_image(split.x_spec)
        for samples in plan.training_batches(
            module.seed,
            module.task.index,
            self._epoch,
            split,
            module.batch_size,
            module.drop_last,
            self._position,
        ):
            x, y, t = as_batch(samples, images)[:3]
            for k, batch in enumerate(zip(steps_of(x), steps_of(y), t, strict=True)):
                if module.plan_ahead is not None and k % AHEAD == 0:
                    module.plan_ahead(*(tree_map(itemgetter(slice(k, k + AHEAD)), a) for a in samples[1:]))
                self._position += 1
                yield batch

    def consolidation_batches(self) -> Iterator[Batch]:
        """Yield the training samples once, in the plan's order for that; the last batch may be incomplete."""
        module = self._datamodule
        images = is_image(module.task.train.x_spec)
        for samples in plan.consolidation_batches(module.seed, module.task, module.batch_size):
            yield as_batch(samples, images)

    def state_dict(self) -> dict[str, int]:
        """Return the position of the iteration in the plan."""
        return {"epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue at a position, at the next iteration of the same epoch."""
        self._resume = dict(state)


class EvaluationBatches:
    """The samples of a split in order; the last batch may be incomplete."""

    def __init__(self, split: AnySplit, batch_size: int) -> None:
        self._split = split
        self._batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self._split) // self._batch_size)

    def __iter__(self) -> Iterator[tuple[Tree, Tree, torch.Tensor]]:
        images = is_image(self._split.x_spec)
        for samples, valid in plan.evaluation_batches(self._split, self._batch_size):
            x, y, t = rows(as_batch(samples, images), slice(int(valid.sum())))[:3]
            yield x, y, t


class TaskDataModule(pl.LightningDataModule):
    """The data of one task, in the batches of the plan.

    Args:
        task: for example `benchmark.tasks[0]`.
        batch_size: training samples per step, >= 1.
        eval_batch_size: samples per validation or test step, >= 1.
        seed: of the order of batches, >= 0.
        validate_on: tasks whose validation samples are scored, for example `benchmark.tasks[: i + 1]` to
            measure forgetting during task i; by default those of the task itself.
        drop_last: whether the incomplete last batch of an epoch is dropped.

    Raises:
        ValueError: the task has fewer training samples than a batch and drop_last is true, or a task of
            `validate_on` has no validation samples.

    Example:
        >>> from sequel_benchmarks import RotatedDigits
        >>> digits = RotatedDigits(num_tasks=2)
        >>> x, y, t = next(iter(TaskDataModule(digits.tasks[1], batch_size=5).train_dataloader()))
        >>> x.shape, t.tolist()
        (torch.Size([5, 1, 8, 8]), [1, 1, 1, 1, 1])
    """

    def __init__(
        self,
        task: Task,
        batch_size: int = 10,
        eval_batch_size: int = 1000,
        seed: int = 0,
        validate_on: Sequence[Task] = (),
        drop_last: bool = True,
    ) -> None:
        super().__init__()
        for other in validate_on:
            if not len(other.validation):
                raise ValueError(
                    f"validate_on needs tasks with validation samples, got task {other.index} without; make "
                    "the benchmark with validation=0.1, for example"
                )
        self.validate_on = tuple(validate_on)
        plan.check_batch_size(task.index, len(task.train), batch_size, drop_last)
        self.task = task
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.seed = seed
        self.drop_last = drop_last
        self.plan_ahead: Callable[[Tree, Any], None] | None = None  # called with the coming targets and tasks

    def train_dataloader(self) -> Any:
        """Return the planned training batches."""
        return PlannedBatches(self)

    def val_dataloader(self) -> Any:
        """Return the validation batches; an iterator if there are none, as Lightning warns about length 0."""
        if self.validate_on:
            return [EvaluationBatches(task.validation, self.eval_batch_size) for task in self.validate_on]
        validation = self.task.validation
        return EvaluationBatches(validation, self.eval_batch_size) if len(validation) else iter(())

    def test_dataloader(self) -> Any:
        """Return the test batches."""
        return EvaluationBatches(self.task.test, self.eval_batch_size)

    def predict_dataloader(self) -> Any:
        """Return the test batches; `predict_step` does not read their labels."""
        return self.test_dataloader()
