"""The life of a task: its phases, which fit may train on what, and the weights that it is consolidated at.

A task is TRAINING until its end-of-task work is done. A checkpoint from before that holds an unfinished task,
also one that ModelCheckpoint calls the best.
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
from pytorch_lightning.callbacks import Callback, ModelCheckpoint, ModelPruning, WeightAveraging
from torch import Tensor

from sequel_core.stream.task import Batch
from sequel_lightning.batches import check_batch

if TYPE_CHECKING:
    from sequel_lightning.module import ContinualModule

IDLE, TRAINING, CONSOLIDATED = 0, 1, 2

SPOILING: dict[type[Callback], str] = {
    ModelPruning: "replaces the network's parameters, which methods know by name; prune after the last task",
    WeightAveraging: "replaces buffers, in which methods keep their memory, by earlier ones; use "
    "StochasticWeightAveraging",
}
"""Callbacks that spoil what a method keeps, and what to do instead."""


class Kept(NamedTuple):
    """The state of a consolidated module, while an evaluation has put a file's state in its place."""

    state: dict[str, Any]  # the state_dict, copied
    steps_done: int
    task_start: int
    carried_optimizer: dict[str, Any] | None
    consolidated_at: str | None


def weight_names(module: ContinualModule, state: Iterable[str]) -> list[str]:
    """Return those names of a state_dict that belong to what is trained: parameters and batch statistics."""
    prefixes = tuple(f"{name or 'net'}." for name in module.trained())
    return [name for name in state if name.startswith(prefixes)]


def fingerprint(module: ContinualModule, state: Mapping[str, Any] | None = None) -> str:
    """Return a hash of all bits of the weights and batch statistics, of the module or of a state_dict."""
    state = module.state_dict() if state is None else state
    found = hashlib.blake2b(digest_size=16)
    for name in weight_names(module, state):
        if isinstance(state[name], Tensor):
            values = state[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            found.update(name.encode() + values.numpy().tobytes())
    return found.hexdigest()


def keep(module: ContinualModule) -> Kept:
    """Return copies, on the CPU, of all that `on_load_checkpoint` and `load_state_dict` are to replace."""
    return Kept(
        {name: copied(value) for name, value in module.state_dict().items()},
        module.running_metrics.steps_done,
        module.running_metrics.task_start,
        module._carried_optimizer,
        module._consolidated_at,
    )


def copied(value: Any) -> Any:
    """Return a copy of a value of a state_dict; a tensor's is on the CPU."""
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else copy.deepcopy(value)


def put_back(module: ContinualModule, kept: Kept, before_fit: bool) -> bool:
    """Put a kept state back if the file's weights are those that it was consolidated at, bit for bit.

    Args:
        module: with the file's state.
        kept: its own.
        before_fit: whether weights that the end-of-task work has replaced, as MC-SGD does, count too.

    Returns:
        Whether it was put back.
    """
    found = fingerprint(module)
    if found != fingerprint(module, kept.state) and not (before_fit and found == kept.consolidated_at):
        return False
    module.load_state_dict(kept.state)
    module.running_metrics.steps_done, module.running_metrics.task_start = kept.steps_done, kept.task_start
    module._carried_optimizer, module._consolidated_at = kept.carried_optimizer, kept.consolidated_at
    return True


def check_task(module: ContinualModule, resumes: bool) -> None:
    """Raise ValueError if a fit would leave the task that the module is in the middle of unconsolidated.

    A task whose fit failed before its first step has not begun.

    Args:
        module: attached to the Trainer of the fit.
        resumes: whether the fit was given a checkpoint.
    """
    if module.phase != TRAINING:
        return
    index, coming = int(module.task_index), module.next_task()
    if not resumes and module.running_metrics.begun_at == module.running_metrics.steps_done:
        module.task_index.fill_(index - 1)
        module.phase.fill_(CONSOLIDATED if index else IDLE)
        return
    if resumes if coming is None else coming.index == index:
        return
    if module._kept is None:
        found = (
            f"task {index} was never consolidated: an error ended its fit, or a checkpoint of it was loaded"
        )
    else:
        found = (
            f"task {index} was consolidated at other weights than those that were loaded for an evaluation"
        )
    wanted = "another fit" if coming is None else f"a fit on task {coming.index}"
    call = "call module.consolidate_task(loader) to consolidate it at the weights it has now"
    if module.path_integrals:
        call = f"{module.algorithm_hparams.name} cannot consolidate it at other weights later"
    raise ValueError(
        f"{found}; {wanted} would start without what the method remembers of it. Train with "
        f'consolidate="best" to consolidate tasks at the weights of the best checkpoint; {call}; or go on '
        "with it: fit(..., ckpt_path=...), or the TaskDataModule of the same task"
    )


def check_resumed_file(module: ContinualModule, checkpoint: Mapping[str, Any]) -> None:
    """Raise ValueError for a fit with the checkpoint of a task that has ended, unless it is on that task.

    Lightning would continue to count its epochs, and would train the next task too briefly or not at all.
    A checkpoint from before the first step of the next task is fine.
    """
    index, phase = (int(checkpoint["state_dict"][name]) for name in ("task_index", "phase"))
    coming = module.next_task()
    if phase == CONSOLIDATED and checkpoint["global_step"] and (coming is None or coming.index != index):
        raise ValueError(
            f"ckpt_path is a checkpoint from after the end of task {index}, so nothing is left to resume; to "
            "begin the next task, read it with load_from_checkpoint and call fit without ckpt_path"
        )


def check_spoiling(callbacks: Iterable[Any]) -> None:
    """Raise ValueError for a callback that would spoil what a method keeps."""
    for callback in callbacks:
        for kind, reason in SPOILING.items():
            if isinstance(callback, kind):
                raise ValueError(f"callbacks: {type(callback).__name__} {reason}")


def check_open_task(module: ContinualModule) -> None:
    """Raise ValueError if `consolidate_task` has nothing to consolidate, or cannot do it."""
    index, phase = int(module.task_index), int(module.phase)
    if phase != TRAINING:
        state = "no task was trained yet" if phase == IDLE else f"task {index} is consolidated already"
        raise ValueError(f"consolidate_task ends a task whose fit did not; {state}")
    if module.path_integrals:
        raise ValueError(
            f"{module.algorithm_hparams.name} cannot consolidate task {index} from a loader: its importances "
            "are sums over the steps of the training; go on with the task by fit(..., ckpt_path=...), or "
            'train it anew, with consolidate="best" if the best weights are wanted'
        )


def consolidation_batches(trainer: pl.Trainer, read: int) -> Iterable[Any]:
    """Return what the end-of-task work reads: the training data once, no more than the training has read.

    Args:
        trainer: of the fit that ends.
        read: batches that the task was trained on.
    """
    loader: Any = trainer.train_dataloader
    count = int(min(trainer.num_training_batches, read))
    if not hasattr(loader, "consolidation_batches"):
        return islice(loader, count)
    batches: Iterable[Any] = loader.consolidation_batches()
    return batches if count >= len(loader) else islice(batches, count)


def checked_batches(batches: Iterable[Batch], task: int, known: Tensor | None) -> Iterator[Batch]:
    """Yield the batches of the end-of-task work.

    Raises:
        ValueError: there is none, or one has a label that the task does not have; see `check_batch`.
    """
    empty = True
    for batch in batches:
        check_batch(batch, known)
        empty = False
        yield batch
    if empty:
        raise ValueError(
            f"the loader gave no batch for the end of task {task} (an iterator can be read only once); the "
            "trained weights are kept: call module.consolidate_task(loader) with samples of the task"
        )


def best_keeper(callbacks: Iterable[Any]) -> ModelCheckpoint:
    """Return the callback that says which weights are the best.

    Raises:
        ValueError: there is none, or more than one.
    """
    found = [
        callback
        for callback in callbacks
        if isinstance(callback, ModelCheckpoint) and callback.monitor is not None and callback.save_top_k
    ]
    if len(found) != 1:
        raise ValueError(
            'consolidate="best" needs exactly one ModelCheckpoint with a monitor and save_top_k != 0, '
            f"got {len(found)}; give the Trainer "
            'callbacks=[ModelCheckpoint(monitor="val/accuracy", mode="max")]'
        )
    return found[0]


def check_best_keeper(module: ContinualModule, resumes: bool) -> None:
    """Raise ValueError if no callback will keep the best weights of the task that a fit begins."""
    path = best_keeper(module.trainer.checkpoint_callbacks).best_model_path
    if path and not resumes and module.phase != TRAINING:
        raise ValueError(
            f"the ModelCheckpoint of this fit already has a best file of an earlier one, {path}, which the "
            "task could be consolidated at; make a new ModelCheckpoint for each task"
        )


def take_best(module: ContinualModule) -> None:
    """Read the best weights of the task, and all that goes with them, from the file that was kept.

    These are the parameters, batch statistics and what the method sums up along the steps. If there is no
    such file, warn and leave everything as it is.
    """
    trainer, index = module.trainer, int(module.task_index)
    own = module.state_dict()
    along = tuple(f"{name}." for name in (*module.path_integrals, *module.moving_trees))
    path = best_keeper(trainer.checkpoint_callbacks).best_model_path
    try:
        if not path:
            raise ValueError("no checkpoint was written")
        found = trainer.strategy.load_checkpoint(path, weights_only=True)["state_dict"]
        if (int(found["task_index"]), int(found["phase"])) != (index, TRAINING):
            raise ValueError("it is of another task")
        sums = [name for name in found if name.startswith(along)]  # of what was trained then
        if {name.split(".")[0] for name in own if name.startswith(along)} - {s.split(".")[0] for s in sums}:
            raise ValueError("it is of another method")
        best = {name: found[name] for name in (*weight_names(module, own), *sums)}
        tensors = {name: value for name, value in best.items() if isinstance(value, Tensor) and name in own}
        if any(own[name].shape != value.shape for name, value in tensors.items()):
            raise ValueError("it is of another network")
    except Exception as error:  # whatever a file that is missing or broken raises: the task is not lost
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        warnings.warn(
            f'consolidate="best" found no best weights of task {index} ({path or "no file"}: {reason}); the '
            "task is consolidated at its last weights",
            stacklevel=2,
        )
        return
    module.load_state_dict(best, strict=False)
