"""Consolidation: the batches of the end-of-task work, and the weights at which it is done.

These are the last weights or, with `consolidate="best"`, those of the best checkpoint. An evaluation of a
checkpoint replaces a consolidated state for a while, which is then put back.
"""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor

from sequel_core.stream.task import Batch
from sequel_lightning.batches import check_batch

if TYPE_CHECKING:
    from sequel_lightning.algorithm import Algorithm

IDLE, TRAINING, CONSOLIDATED = 0, 1, 2
"""Phases of a module: before the first task, within a task, after the end-of-task work."""


class SavedState(NamedTuple):
    """The state of a consolidated module, during the evaluation of a checkpoint with another state."""

    state: dict[str, Any]  # copy of the state_dict
    steps_done: int
    task_start: int
    carried_optimizer: dict[str, Any] | None
    consolidated_at: str | None


def weight_names(module: Algorithm, state: Iterable[str]) -> list[str]:
    """Return the names in a state_dict of the trained parameters and batch statistics."""
    prefixes = tuple(f"{name or 'net'}." for name in module.trained())
    return [name for name in state if name.startswith(prefixes)]


def fingerprint(module: Algorithm, state: Mapping[str, Any] | None = None) -> str:
    """Return a hash of all bits of the weights and batch statistics, of the module or of a state_dict."""
    state = module.state_dict() if state is None else state
    digest = hashlib.blake2b(digest_size=16)
    for name in weight_names(module, state):
        if isinstance(state[name], Tensor):
            values = state[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(name.encode() + values.numpy().tobytes())
    return digest.hexdigest()


def save_state(module: Algorithm) -> SavedState:
    """Return copies, on the CPU, of what `on_load_checkpoint` and `load_state_dict` replace."""
    return SavedState(
        {name: copied(value) for name, value in module.state_dict().items()},
        module.running_metrics.steps_done,
        module.running_metrics.task_start,
        module.lifecycle.carried_optimizer,
        module.lifecycle.consolidated_at,
    )


def copied(value: Any) -> Any:
    """Return a copy of a value of a state_dict, on the CPU if it is a tensor."""
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else copy.deepcopy(value)


def restore_state(module: Algorithm, saved: SavedState, before_fit: bool) -> bool:
    """Restore a saved state if the task was consolidated at the checkpoint's weights, bit for bit.

    Args:
        module: with the checkpoint's state.
        saved: the module's previous state.
        before_fit: whether weights that the end-of-task work has replaced, as MC-SGD does, count too.

    Returns:
        Whether the state was restored.
    """
    weights = fingerprint(module)
    same = weights == fingerprint(module, saved.state)
    if not same and not (before_fit and weights == saved.consolidated_at):
        return False
    module.load_state_dict(saved.state)
    running, lifecycle = module.running_metrics, module.lifecycle
    running.steps_done, running.task_start = saved.steps_done, saved.task_start
    lifecycle.carried_optimizer, lifecycle.consolidated_at = saved.carried_optimizer, saved.consolidated_at
    return True


def consolidation_batches(trainer: pl.Trainer, read: int) -> Iterable[Any]:
    """Return the batches for the end-of-task work: one epoch, or fewer if the training read fewer.

    Args:
        trainer: of the fit that ends.
        read: number of batches that the task was trained on.

    Returns:
        Batches as the loader yields them.
    """
    loader: Any = trainer.train_dataloader
    count = int(min(trainer.num_training_batches, read))
    if not hasattr(loader, "consolidation_batches"):
        return islice(loader, count)
    batches: Iterable[Any] = loader.consolidation_batches()
    return batches if count >= len(loader) else islice(batches, count)


def checked_batches(
    batches: Iterable[Batch], task: int, allowed_labels: Tensor | None, labelled: bool
) -> Iterator[Batch]:
    """Yield the batches of the end-of-task work.

    Raises:
        ValueError: there is no batch, or one has a label that the task does not have; see `check_batch`.
    """
    empty = True
    for batch in batches:
        check_batch(batch, allowed_labels, labelled)
        empty = False
        yield batch
    if empty:
        raise ValueError(
            f"the loader gave no batch for the end of task {task} (an iterator can be read only once); the "
            "trained weights are kept: call module.consolidate_task(loader) with samples of the task"
        )


def best_keeper(callbacks: Iterable[Any]) -> ModelCheckpoint:
    """Return the callback that keeps the best weights.

    Raises:
        ValueError: there is no such callback, or more than one.
    """
    keepers = [
        callback
        for callback in callbacks
        if isinstance(callback, ModelCheckpoint) and callback.monitor is not None and callback.save_top_k
    ]
    if len(keepers) != 1:
        raise ValueError(
            'consolidate="best" needs exactly one ModelCheckpoint with a monitor and save_top_k != 0, '
            f"got {len(keepers)}; give the Trainer "
            'callbacks=[ModelCheckpoint(monitor="val/accuracy", mode="max")]'
        )
    return keepers[0]


def check_best_keeper(module: Algorithm, resumes: bool) -> None:
    """Raise ValueError if no callback keeps the best weights of the task that a fit starts."""
    path = best_keeper(module.trainer.checkpoint_callbacks).best_model_path
    if path and not resumes and module.phase != TRAINING:
        raise ValueError(
            f"the ModelCheckpoint of this fit already has a best file of an earlier one, {path}, which the "
            "task could be consolidated at; make a new ModelCheckpoint for each task"
        )


def take_best(module: Algorithm) -> None:
    """Load the best weights of the task from the checkpoint of the ModelCheckpoint.

    Batch statistics and what the method sums up along the steps are loaded with them. If there is no such
    checkpoint, warn and leave everything as it is.
    """
    index, path = int(module.task_index), best_keeper(module.trainer.checkpoint_callbacks).best_model_path
    try:
        best = best_state(module, path)
    except Exception as error:  # whatever a missing or damaged file raises: the task is not lost
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        warnings.warn(
            f'consolidate="best" found no best weights of task {index} ({path or "no file"}: {reason}); the '
            "task is consolidated at its last weights",
            stacklevel=2,
        )
        return
    module.load_state_dict(best, strict=False)


def best_state(module: Algorithm, path: str) -> dict[str, Any]:
    """Return the part of a checkpoint that belongs to the best weights.

    Raises:
        ValueError: the path is empty, or the checkpoint is of another task, method or network.
    """
    if not path:
        raise ValueError("no checkpoint was written")
    state = module.trainer.strategy.load_checkpoint(path, weights_only=True)["state_dict"]
    if (int(state["task_index"]), int(state["phase"])) != (int(module.task_index), TRAINING):
        raise ValueError("it is of another task")
    current = module.state_dict()
    prefixes = tuple(f"{name}." for name in (*module.path_integrals, *module.moving_trees))
    sums = [name for name in state if name.startswith(prefixes)]  # of the parameters trained at that time
    trees = {name.split(".")[0] for name in current if name.startswith(prefixes)}
    if trees - {name.split(".")[0] for name in sums}:
        raise ValueError("it is of another method")
    best = {name: state[name] for name in (*weight_names(module, current), *sums)}
    if any(
        current[name].shape != value.shape
        for name, value in best.items()
        if isinstance(value, Tensor) and name in current
    ):
        raise ValueError("it is of another network")
    return best
