"""The lifecycle of tasks: which task a fit trains on, when it starts and ends, and what a Trainer must be.

One `Trainer.fit` is one task. Lightning also calls its hooks on resume, after an error and within a tuner, so
the module keeps two persistent buffers: `task_index` and `phase`. A task starts in `on_train_start`, unless
the phase is TRAINING already. It is consolidated once, when the training ended or was stopped on purpose. A
checkpoint from before that, even the best one, holds an unfinished task. A fit that would leave an unfinished
task behind raises ValueError.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from pytorch_lightning.callbacks import Callback, LearningRateFinder, ModelPruning, WeightAveraging
from torch import Tensor, nn

from sequel_core.runs.learner import check_same_settings
from sequel_core.stream.phase import PhaseSteps
from sequel_core.stream.task import Batch, Task
from sequel_lightning._compat import attached_trainer, before_batch_transfer, set_logging_step
from sequel_lightning.consolidation import (
    CONSOLIDATED,
    IDLE,
    TRAINING,
    SavedState,
    check_best_keeper,
    checked_batches,
    consolidation_batches,
    fingerprint,
    restore_state,
    save_state,
    take_best,
)
from sequel_lightning.distributed import check_batch_norm, without_wrapper
from sequel_lightning.networks import evaluating, start_task
from sequel_lightning.objectives import map_outputs
from sequel_lightning.optimizers import named_state
from sequel_lightning.trees import ParameterTree

if TYPE_CHECKING:
    from sequel_lightning.algorithm import Algorithm

DAMAGING: dict[type[Callback], str] = {
    ModelPruning: "replaces the network's parameters, which methods know by name; prune after the last task",
    WeightAveraging: "replaces buffers, in which methods keep their memory, by earlier ones; use "
    "StochasticWeightAveraging",
}
"""Callbacks that damage what a method keeps, and what to do instead."""


class TaskLifecycle:
    """Starts and ends the tasks of a module. The module's Lightning hooks call it.

    Args:
        module: the module. Its `task_index` and `phase` are updated.
    """

    def __init__(self, module: Algorithm) -> None:
        self.module = module
        self.fitting = False  # whether a fit runs; False for those of a tuner and of fast_dev_run
        self.resumes = False  # whether the fit was given a checkpoint
        self.started_at: int | None = None  # steps done when the task started, if in this process
        self.num_steps = 0  # of the current task; 0 if it is not known
        self.network_tasks = 1  # tasks for which the network's `start_task` was called, from 0
        self.carried_optimizer: dict[str, Any] | None = None  # its state, for the next task
        self.consolidated_at: str | None = None  # fingerprint of the weights before the end-of-task work
        self.saved: SavedState | None = None  # during the evaluation of a checkpoint
        self.generators: list[Tensor] = []  # states of the random generators in the resumed checkpoint

    # -- which task

    def next_task(self) -> Task | None:
        """Return the task of this fit: the observer's or the data module's; None for a user's loaders."""
        observer = self.module.reporting.observer
        if observer is not None:
            return observer.task
        task = getattr(getattr(self.module.trainer, "datamodule", None), "task", None)
        return task if isinstance(task, Task) else None

    def next_index(self) -> int:
        """Return the index of the task that this fit starts.

        Raises:
            ValueError: the spec has no such task.
        """
        task, spec = self.next_task(), self.module.spec
        index = int(self.module.task_index) + 1 if task is None else task.index
        if spec is not None and index >= spec.num_tasks:
            raise ValueError(
                f"fit would begin task {index}, but the spec has tasks 0 to {spec.num_tasks - 1} only; "
                "make the module with the spec of the whole stream"
            )
        return index

    def current_index(self) -> int:
        """Return the index of the task that is trained or, before it has started, of the next one."""
        return int(self.module.task_index) if self.module.phase == TRAINING else self.next_index()

    def task_indices(self, count: int) -> Tensor:
        """Return the task index of each of `count` samples whose loader does not give it `[count]`."""
        module = self.module
        trainer = attached_trainer(module)
        in_fit = trainer is not None and trainer.state.fn == "fit"
        if in_fit and (not self.fitting or trainer.sanity_checking) and module.phase != TRAINING:
            return torch.full((count,), self.next_index(), device=module.device)  # not yet started
        return module.task_index.clamp(min=0).expand(count)

    # -- the start of a fit

    def setup(self, stage: str) -> None:
        """Check the Trainer, and continue the x-axis of its loggers where the last Trainer's ended."""
        self.module.ranks.follow(self.module.trainer)
        without_wrapper(self.module.trainer)
        self.restore_saved(before_fit=stage == "fit")
        first = int(stage == "fit")  # the number of a fit's first step; Lightning starts every fit at 0
        set_logging_step(self.module.trainer, self.module.running_metrics.steps_done + first)
        self.end_fit()

    def check_unfinished(self) -> None:
        """Raise ValueError if this fit would leave a task unconsolidated.

        A task whose fit failed before its first step has not started.
        """
        module = self.module
        self.resumes = module.trainer.ckpt_path is not None  # read early: a tuner's search sets it later
        if module.phase != TRAINING:
            return
        index, coming = int(module.task_index), self.next_task()
        if not self.resumes and self.started_at == module.running_metrics.steps_done:
            module.task_index.fill_(index - 1)
            module.phase.fill_(CONSOLIDATED if index else IDLE)
            return
        if not (self.resumes if coming is None else coming.index == index):
            raise unfinished_task(
                module, "another fit" if coming is None else f"a fit on task {coming.index}"
            )

    def start_network(self, index: int) -> None:
        """Call the network's `start_task` for each task up to this one for which it was not called."""
        module = self.module
        for task in range(self.network_tasks, index + 1):
            start_task(module.net, task)
            for name in module.network_copies:
                copied: nn.Module = getattr(module, name)
                start_task(copied, task)
                copied.requires_grad_(False)
        self.network_tasks = max(self.network_tasks, index + 1)

    def start_fit(self) -> None:
        """Check the Trainer and the task; hooks that Lightning called earlier may belong to a tuner."""
        module, trainer = self.module, self.module.trainer
        check_unspent(trainer)
        check_batch_norm(module.net, module.device)
        settings = {"algo": asdict(module.algorithm_hparams), "network": repr(module.net)}
        check_same_settings(module.ranks.gather_objects, settings)
        module.ranks.copy_from_first(module)
        if module.phase != TRAINING:
            self.next_index()
        self.fitting = not trainer.fast_dev_run  # type: ignore[attr-defined]
        if self.fitting and module.algorithm_hparams.consolidate == "best":
            check_best_keeper(module, self.resumes)
        if self.resumes and self.phase_steps_taken():
            trainer.should_stop = True  # the steps before the second phase may have been stopped early

    def start_task(self) -> None:
        """Start the next task, unless this fit resumes one."""
        module, running = self.module, self.module.running_metrics
        generators, self.generators, self.saved = self.generators, [], None
        self.num_steps = num_steps(module.trainer)
        self.follow_trained()
        if self.fitting and module.phase == TRAINING and self.resumes:
            running.move(module.device)
            set_generators(generators)
            return
        running.clear()
        if self.fitting and module.phase != TRAINING:
            running.task_start = self.started_at = running.steps_done
            module.task_index.fill_(self.next_index())
            module.phase.fill_(TRAINING)
            module.start_task()

    def check_started(self) -> None:
        """Raise ValueError if a subclass has kept the task from starting."""
        if self.fitting and self.module.phase != TRAINING:
            raise ValueError(
                "on_train_start did not begin the task; if a subclass overrides it, call "
                "super().on_train_start() there"
            )

    def follow_trained(self) -> None:
        """Let each `ParameterTree` hold the parameters that are trained now.

        Newly trained parameters are added. The state of those that are frozen now is kept; before the first
        task there is no such state, and they are left out.

        Raises:
            ValueError: a parameter has another shape than in the tasks before.
        """
        module = self.module
        module._trained_params = module.params()
        for tree in module.modules():
            if isinstance(tree, ParameterTree):
                tree.follow(module._trained_params, first=bool(module.phase == IDLE))

    # -- the end of a task

    def end_training(self) -> None:
        """Consolidate the task whose training has ended."""
        if self.fitting and self.module.phase == TRAINING:
            if not self.phase_steps_taken():
                self.module.reporting.check_labels()
            self.consolidate()

    def end_fit(self) -> None:
        """Leave the fit."""
        self.fitting = False
        self.module._trained_params = {}

    def consolidate(self) -> None:
        """Do the end-of-task work on the Trainer's data, and keep the optimizer's state if asked for."""
        module, taken = self.module, self.phase_steps_taken()
        if module.algorithm_hparams.consolidate == "best" and not taken:
            take_best(module)
        read = module.running_metrics.steps_done - module.running_metrics.task_start - taken
        self.end_task(consolidation_batches(module.trainer, read), module.trainer.train_dataloader)
        optimizers = module.trainer.optimizers
        if not module.algorithm_hparams.reset_optimizer and len(optimizers) == 1:
            self.carried_optimizer = named_state(optimizers[0], self.names_of_trained())

    def end_task(self, batches: Iterable[Any], loader: Any = None) -> None:
        """Do the end-of-task work on batches as a loader yields them, from its first batch on."""
        module, trainer = self.module, attached_trainer(self.module)
        self.follow_trained()
        weights = self.consolidated_at if self.phase_steps_taken() else fingerprint(module)
        self.consolidated_at = weights  # for checkpoints of the second phase
        context = nullcontext if trainer is None else trainer.precision_plugin.forward_context
        if module.has_second_phase:
            with torch.enable_grad(), context(), module.ranks.divided():
                self.fit_second_phase()
        with evaluating(module), torch.enable_grad(), context(), module.ranks.divided():
            prepared = (
                module.ranks.whole(self.prepared(batch), loader, k) for k, batch in enumerate(batches)
            )
            labels, labelled = module.preprocessing.allowed_labels, module.preprocessing.labelled
            module.end_task(checked_batches(prepared, int(module.task_index), labels, labelled))
        module.ranks.copy_from_first(module)
        self.saved = None
        module.phase.fill_(CONSOLIDATED)

    def fit_second_phase(self) -> None:
        """Take the steps of the second phase that are left."""
        module, running, done = self.module, self.module.running_metrics, self.phase_steps_taken()
        set_generators(self.generators)  # of a checkpoint from after the last step before the phase
        self.generators = []
        if done:
            running.move(module.device)
        else:
            running.clear()
            module.start_phase()
        steps = module.phase_steps()
        count = done + len(steps.slots)
        for k, (slots, rate) in enumerate(zip(steps.slots, steps.learning_rate, strict=True)):
            crops = () if isinstance(steps.crops, tuple) else steps.crops[k]
            loss, outputs, samples = module.take_phase_step(PhaseSteps(slots, rate, crops))
            running.add(loss.detach(), map_outputs(Tensor.detach, outputs), samples)
            module.phase_step.add_(1)
            module.reporting.after_phase_step(done + k + 1, count, float(rate))
        module.phase_step.zero_()

    def phase_steps_taken(self) -> int:
        """Return the number of steps of the current task's second phase that were taken."""
        return int(self.module.phase_step) if self.module.has_second_phase else 0

    def prepared(self, batch: Any) -> Batch:
        """Return a loader's batch as a training step gets it: after the batch hooks, on the device."""
        module, trainer = self.module, attached_trainer(self.module)
        if trainer is not None:
            batch = before_batch_transfer(module, trainer.precision_plugin.convert_input(batch))
            batch = trainer.strategy.batch_to_device(batch, module.device)
        else:
            batch = module.transfer_batch_to_device(
                module.on_before_batch_transfer(batch, 0), module.device, 0
            )
            batch = module.on_after_batch_transfer(batch, 0)
        return module.as_batch(batch)

    def names_of_trained(self) -> dict[nn.Parameter, str]:
        """Return the name of each trained parameter, of the network and of other trained modules."""
        return {
            p: f"{part}.{name}" if part else name
            for part, module in self.module.trained().items()
            for name, p in module.named_parameters()
            if p.requires_grad
        }

    # -- checkpoints

    def restore_saved(self, before_fit: bool) -> None:
        """After the evaluation of a checkpoint, restore the module's state if the weights are the same."""
        if self.saved is not None and restore_state(self.module, self.saved, before_fit):
            self.saved = None

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {
            "carried_optimizer": self.carried_optimizer,
            "consolidated_at": self.consolidated_at,
            "generators": self.generators or [torch.get_rng_state(), *torch.cuda.get_rng_state_all()],
        }

    def load(self, checkpoint: Mapping[str, Any]) -> None:
        """Restore what `state` returned; before an evaluation, save the state of a consolidated module.

        Args:
            checkpoint: Lightning's, with the state of the module under `sequel`.
        """
        module, trainer = self.module, attached_trainer(self.module)
        stage = None if trainer is None else trainer.state.fn
        if stage == "fit":
            check_resumed_file(module, checkpoint)
        evaluates = stage in ("validate", "test", "predict")
        if evaluates and self.saved is None and module.phase == CONSOLIDATED:
            self.saved = save_state(module)
        state = checkpoint["sequel"]
        if not evaluates:
            module.lr = state.get("lr")
        module.running_metrics.load(state)
        self.started_at = None
        self.carried_optimizer = state["carried_optimizer"]
        self.consolidated_at = state["consolidated_at"]
        self.generators = state["generators"] if stage == "fit" else []


def num_steps(trainer: Any) -> int:
    """Return the number of batches that a fit trains on; 0 if the Trainer does not know it."""
    epochs = math.inf if trainer.max_epochs in (None, -1) else trainer.max_epochs
    most = math.inf if trainer.max_steps == -1 else trainer.max_steps * trainer.accumulate_grad_batches
    steps = min(epochs * trainer.num_training_batches, most)
    return int(steps) if steps < math.inf else 0


def set_generators(states: list[Tensor]) -> None:
    """Set the states of the random generators: the CPU's first, then each CUDA device's; none if empty."""
    if states:
        torch.set_rng_state(states[0])
    for device, state in enumerate(states[1:]):
        torch.cuda.set_rng_state(state, device)


def unfinished_task(module: Algorithm, fit: str) -> ValueError:
    """Return the error for a fit that would leave the current task unconsolidated; `fit` describes it."""
    index = int(module.task_index)
    if module.lifecycle.saved is None:
        reason = (
            f"task {index} was never consolidated: an error ended its fit, or a checkpoint of it was loaded"
        )
    else:
        reason = (
            f"task {index} was consolidated at other weights than those that were loaded for an evaluation"
        )
    call = "call module.consolidate_task(loader) to consolidate it at the weights it has now"
    if module.path_integrals:
        call = f"{module.algorithm_hparams.name} cannot consolidate it at other weights later"
    return ValueError(
        f"{reason}; {fit} would start without what the method remembers of it. Train with "
        f'consolidate="best" to consolidate tasks at the weights of the best checkpoint; {call}; or go on '
        "with it: fit(..., ckpt_path=...), or the TaskDataModule of the same task"
    )


def check_trainer(module: Algorithm, trainer: Any) -> None:
    """Raise ValueError for a setting or a callback of the Trainer that the method cannot work with."""
    fits = trainer.state.fn == "fit"
    if fits:
        check_spoiling(trainer.callbacks)
    if module.automatic_optimization:
        return
    name, scaler = module.algorithm_hparams.name, getattr(trainer.precision_plugin, "scaler", None)
    clip, accumulate = trainer.gradient_clip_val, trainer.accumulate_grad_batches
    for setting, value, used in (
        ("gradient_clip_val", clip, clip),
        ("accumulate_grad_batches", accumulate, accumulate != 1),
        ("precision", trainer.precision, scaler is not None),
    ):
        if used and fits:
            raise ValueError(
                f"{name} takes its steps itself: leave the Trainer's {setting} out, got {value}; "
                f"{module.clipping_setting} is what clips"
            )
    if any(isinstance(callback, LearningRateFinder) for callback in trainer.callbacks):
        raise ValueError(
            f"{name} takes its steps itself, so that Lightning's learning-rate finder would measure a single "
            "rate; set the rate in the optimizer factory"
        )


def check_unspent(trainer: Any) -> None:
    """Raise ValueError for a Trainer whose epochs or steps are used up."""
    spent_epochs = trainer.max_epochs not in (None, -1) and trainer.current_epoch >= trainer.max_epochs
    spent_steps = trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps
    if trainer.ckpt_path is None and (spent_epochs or spent_steps):
        raise ValueError(
            f"this Trainer is spent: max_epochs={trainer.max_epochs} or max_steps={trainer.max_steps} is "
            "reached, so fit would train nothing; make a new Trainer for each task"
        )


def check_resumed_file(module: Algorithm, checkpoint: Mapping[str, Any]) -> None:
    """Raise ValueError for a fit with a checkpoint from after the end of another task.

    Lightning would continue to count the epochs of the checkpoint, and would train the next task too briefly
    or not at all. A checkpoint from before the first step of the next task is accepted.
    """
    index, phase = (int(checkpoint["state_dict"][name]) for name in ("task_index", "phase"))
    coming = module.lifecycle.next_task()
    if phase == CONSOLIDATED and checkpoint["global_step"] and (coming is None or coming.index != index):
        raise finished_task(index, "read it with load_from_checkpoint")


def finished_task(index: int, read: str) -> ValueError:
    """Return the error for a fit with a checkpoint of a finished task; `read` says how to read it."""
    return ValueError(
        f"ckpt_path is a checkpoint from after the end of task {index}, so nothing is left to resume; to "
        f"begin the next task, {read} and call fit without ckpt_path"
    )


def check_spoiling(callbacks: Iterable[Any]) -> None:
    """Raise ValueError for a callback that damages what a method keeps."""
    for callback in callbacks:
        for callback_class, reason in DAMAGING.items():
            if isinstance(callback, callback_class):
                raise ValueError(f"callbacks: {type(callback).__name__} {reason}")


def check_open_task(module: Algorithm) -> None:
    """Raise ValueError if `consolidate_task` cannot consolidate the task, or there is none."""
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
