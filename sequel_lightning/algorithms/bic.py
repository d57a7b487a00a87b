"""Bias correction, BiC (Wu et al. 2019, https://arxiv.org/abs/1905.13260).

    L = lambda L_d + (1 - lambda) CE,  lambda = n_old / (n_old + n_new)                           (equation 1)
    L_d = CE(softmax(z_old / T), softmax(z / T)) over the classes of past tasks, T = temperature  (equation 2)
    f_c(x) = beta z_c + gamma for the classes that are new in the task, else z_c                  (equation 4)

z are the outputs of the network, and z_old the corrected outputs f of the network after the last task. n_old
and n_new are the numbers of classes of past tasks and of the current one.

A task trains on its samples and on the exemplars of past tasks. A user-defined loop or loader has to join
them (`training_split`). Then the second phase fits beta and gamma to held-out samples of all classes seen, by
the cross-entropy of f (equation 5); the network is fixed. There is no second phase after the first task. f
predicts between tasks, and z during a task. The accuracy of z between tasks is reported as `head`.

The memory is divided among the classes again in each task. If classes come back in later tasks, it is divided
among the classes of each task, and only classes that are new in a task are corrected. The held-out samples of
a task are set aside before it starts: `hparams.training_tasks(benchmark, seed)`.

It differs from the official code in these points:

- The exemplars are a random choice. The official code chooses them by herding.
- The learning rate of the second phase is constant, and gamma has no penalty of its own.

Mirror: sequel_flax/algorithms/bic.py
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sequel_core.algorithms.bic import BiCHParams
from sequel_core.stream.exemplars import joined_with_samples, renewed_samples
from sequel_core.stream.images import Augmentation
from sequel_core.stream.phase import PhaseSteps, phase_steps
from sequel_core.stream.task import AnySplit, Batch, Samples
from sequel_lightning.gradients import gradients
from sequel_lightning.module import ContinualModule
from sequel_lightning.networks import call_network, evaluating, frozen_network
from sequel_lightning.objectives import Objective, check_classification
from sequel_lightning.preprocessing import mask_logits
from sequel_lightning.replay import Memory, empty_memory, planned, stored_samples
from sequel_lightning.second_phase import phase_samples, sgd_step
from sequel_lightning.trees import Params, StateTree


class BiCState(NamedTuple):
    """What BiC remembers of past tasks."""

    exemplars: Memory  # samples of past tasks that are trained on, one set after the other
    held_out: Memory  # samples of all tasks so far that the second phase reads
    old: Params  # weights at the end of the last task
    statistics: Params  # running statistics of batch normalisation then; empty without batch normalisation
    correction: Params  # beta and gamma, (); 1 and 0 before the second phase of the task
    block: Tensor  # classes that are corrected, bool [num_classes]
    old_correction: Params  # beta and gamma of the last task, ()
    old_block: Tensor  # classes that the last task corrects, bool [num_classes]
    velocity: Params  # v of the second phase, of beta and gamma
    phase_step: Tensor  # steps of the second phase of the current task that were taken, int32 ()


def corrected(logits: Tensor, correction: Params, block: Tensor) -> Tensor:
    """Return f: logits `[B, num_classes]`, those of the block `[num_classes]` times beta plus gamma."""
    return torch.where(block, correction["beta"] * logits + correction["gamma"], logits)


def distillation(logits: Tensor, old: Tensor, past: Tensor, temperature: float) -> Tensor:
    """Return L_d of logits and corrected logits of the old network `[B, num_classes]`, shape ()."""
    ours, theirs = (mask_logits(z, past) / temperature for z in (logits, old))
    target = F.softmax(theirs, dim=1)
    return -(target * F.log_softmax(ours, dim=1)).sum(1).mean()


def correction_loss(
    correction: Params, logits: Tensor, y: Tensor, block: Tensor, masked: Callable[..., Tensor]
) -> Tensor:
    """Return the cross-entropy of corrected and masked logits `[B, num_classes]` of each sample, `[B]`."""
    f = masked(corrected(logits, correction, block))
    losses: Tensor = F.cross_entropy(f, y, reduction="none")
    return losses


def training_loss(module: BiC, batch: Batch, hparams: BiCHParams, objective: Any) -> tuple[Tensor, Tensor]:
    """Return the training loss of a batch, shape (), and its logits `[B, num_classes]`."""
    memory, classes = module.state, module.classes_of_tasks()
    before = classes[: int(module.task_index)]
    past, sets = before.any(0), before.sum()
    weight = sets / (sets + module.task_classes().sum())
    logits = module.network(batch.x, batch.t)
    with evaluating(module.old), torch.no_grad():
        old = call_network(module.old, module.normalise(batch.x), module.task_argument(batch.t))
    old = corrected(old, memory.old_correction, memory.old_block)
    shown = module.masked(logits, batch.t)
    loss = module.loss(shown, batch)
    weight = weight.to(loss.dtype)
    distance = distillation(logits, old, past, hparams.temperature)
    return weight * distance + (1 - weight) * loss, shown


def identity(like: Tensor) -> Params:
    """Return beta = 1 and gamma = 0."""
    return {"beta": like.new_ones(()), "gamma": like.new_zeros(())}


def renewed(memory: Memory, quota: Any, mask: Any, task: int, new: Iterable[Samples]) -> tuple[Any, ...]:
    """Return inputs, labels and tasks of the slots of a memory that is divided among the classes again."""
    return tuple(renewed_samples(quota, np.asarray(mask), task, stored_samples(memory), new))


class BiC(ContinualModule):
    """BiC; see `help(BiCHParams)` for its settings.

    The second phase of a task is in `on_train_end` of `fit`.

    Raises:
        ValueError: no spec; `mem_size` is too small; in `fit`, for a task without held-out samples.

    Example:
        >>> import torch
        >>> from sequel_benchmarks import SplitDigits
        >>> from sequel_core import BiCHParams
        >>> from sequel_lightning import MLP, BiC
        >>> digits = SplitDigits(num_tasks=5, scenario="class")
        >>> net = MLP((16,), image_shape=digits.image_shape)
        >>> module = BiC(net, torch.optim.SGD, BiCHParams(mem_size=40), digits.spec)
        >>> {name: float(value) for name, value in module.state.correction.items()}
        {'beta': 1.0, 'gamma': 0.0}
    """

    hparams_class = BiCHParams
    algorithm_hparams: BiCHParams
    has_second_phase = True
    network_copies = ("old",)
    block: Tensor
    exemplars: StateTree
    held_out: StateTree
    old: Any
    old_block: Tensor

    def check_objective(self, objective: Objective) -> None:
        """Raise ValueError if the objective is not about class labels."""
        super().check_objective(objective)
        check_classification(objective, self.algorithm_hparams.name)

    def init_memory(self) -> None:
        """Start with empty memories, without a correction, and with a copy of the network."""
        spec, like = self.needed_spec(), next(self.net.parameters()).detach()
        sets, hparams = int(spec.mask.sum()), self.algorithm_hparams
        for name, part in (("exemplars", hparams.exemplars(sets)), ("held_out", hparams.held_out(sets))):
            memory = empty_memory(spec, part.slots(sets))
            setattr(self, name, StateTree({"x": memory.x, "y": memory.y, "t": memory.t}))
        self.correction, self.old_correction = StateTree(identity(like)), StateTree(identity(like))
        self.velocity = StateTree({name: torch.zeros_like(v) for name, v in identity(like).items()})
        self.old = copy.deepcopy(self.net).requires_grad_(False)
        for name in ("block", "old_block"):
            self.register_buffer(name, torch.zeros(spec.num_classes, dtype=torch.bool))
        # a user's loader may yield exemplars together with the task's samples
        self.preprocessing.allowed_labels = torch.from_numpy(spec.mask.cumsum(0) > 0)

    @property
    def state(self) -> BiCState:
        """What is remembered of past tasks."""
        exemplars, held_out = (Memory(**tree.get(), outputs=None) for tree in (self.exemplars, self.held_out))
        correction, last, velocity = (
            tree.get() for tree in (self.correction, self.old_correction, self.velocity)
        )
        old, statistics = frozen_network(self.old)
        return BiCState(
            exemplars,
            held_out,
            old,
            statistics,
            correction,
            self.block,
            last,
            self.old_block,
            velocity,
            self.phase_step,
        )

    def classes_of_tasks(self) -> Tensor:
        """Return the classes of each task, bool `[T, num_classes]`."""
        return torch.from_numpy(self.needed_spec().mask).to(self.block.device)

    def start_task(self) -> None:
        """Begin without a correction, and keep the held-out samples of the task."""
        state, task, index = self.state, self.lifecycle.next_task(), int(self.task_index)
        hparams, mask = self.algorithm_hparams, self.needed_spec().mask
        if task is None and hparams.val_fraction:
            raise ValueError(
                f"bic needs held-out samples of task {index}, which loaders do not give; give TaskDataModule "
                "a task of hparams.training_tasks(benchmark, seed), or set val_fraction=0 for no correction"
            )
        new = [] if task is None else [hparams.held_out_samples(task)]
        quota = hparams.held_out(int(mask.sum()))
        self.set_memory(self.held_out, renewed(state.held_out, quota, mask, index, new))
        self.correction.set(identity(state.correction["beta"]))
        before = self.classes_of_tasks()[:index].any(0)
        self.block.copy_(self.task_classes() & ~before)

    def set_memory(self, tree: StateTree, samples: Any) -> None:
        """Replace a memory by inputs, labels and tasks as NumPy arrays."""
        x, y, t = map(torch.from_numpy, samples)
        tree.set({"x": x.movedim(-1, 1) if self.preprocessing.images else x, "y": y, "t": t})

    def training_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the training loss of a batch, shape (), and its logits `[B, num_classes]`."""
        planned(self.state.exemplars, batch, tuple)  # checks the dtype of the images; needs no plan
        return training_loss(self, self.trained_on(batch), self.algorithm_hparams, self.objective)

    def phase_steps(self) -> PhaseSteps:
        """Return the steps of the second phase that are left; none after the first task."""
        task, tasks = int(self.task_index), self.state.held_out.t.cpu().numpy()
        used = tasks if task > 0 else np.full_like(tasks, -1)
        done = int(self.phase_step)
        return phase_steps(self.algorithm_hparams, Augmentation(), used, task, self.seed, done)

    def start_phase(self) -> None:
        """Begin without momentum."""
        self.velocity.set({name: torch.zeros_like(v) for name, v in self.velocity.get().items()})

    def take_phase_step(self, step: PhaseSteps) -> tuple[Tensor, Any, Batch]:
        """Fit the correction to held-out samples; return their loss, shape (), their f, and the samples."""
        state = self.state
        samples = phase_samples(state.held_out, step, state.correction["beta"].dtype)
        with evaluating(self.net), torch.no_grad():
            logits = self.network(samples.x, samples.t)
        correction = {name: v.clone().requires_grad_() for name, v in state.correction.items()}
        masked = partial(self.masked, t=samples.t)
        loss = correction_loss(correction, logits, samples.y, state.block, masked).mean()
        (gradient,) = gradients(loss, correction)
        shown = masked(corrected(logits, state.correction, state.block))
        new, velocity = sgd_step(
            state.correction, state.velocity, gradient, step.learning_rate, self.algorithm_hparams
        )
        self.correction.set(new)
        self.velocity.set(velocity)
        return loss, shown, Batch(*samples[:3])

    def end_task(self, batches: Iterable[Batch]) -> None:
        """Divide the exemplars among the classes again; keep the network and its correction."""
        mask, images = self.needed_spec().mask, self.preprocessing.images

        def samples_of(batch: Batch) -> Samples:
            x, y, t = (a.cpu().numpy() for a in batch[:3])
            return Samples(np.moveaxis(x, 1, -1) if images else x, y, t)

        quota, new = self.algorithm_hparams.exemplars(int(mask.sum())), map(samples_of, batches)
        samples = renewed(self.state.exemplars, quota, mask, int(self.task_index), new)
        self.set_memory(self.exemplars, samples)
        self.old.load_state_dict(self.net.state_dict())
        self.old_correction.set(self.state.correction)
        self.old_block.copy_(self.block)

    def predict(self, x: Any, t: Tensor | None = None) -> Tensor:
        """Return f, masked in the task scenario."""
        state = self.state
        result: Tensor = self.masked(corrected(self.network(x, t), state.correction, state.block), t)
        return result

    def alternatives(self, x: Any, t: Tensor | None = None) -> dict[str, Any]:
        """Return the outputs of the network, without the correction."""
        return {"head": self.forward(x, t)}

    def training_split(self, split: AnySplit) -> AnySplit:
        """Return the task's training samples and, after them, the exemplars of past tasks."""
        return joined_with_samples(split, stored_samples(self.state.exemplars))
