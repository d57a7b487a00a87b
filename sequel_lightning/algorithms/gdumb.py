"""GDumb (Prabhu, Torr & Dokania 2020, https://www.robots.ox.ac.uk/~tvg/publications/2020/gdumb.pdf).

    theta = theta_0, trained on the memory alone at the end of each task                        (algorithm 2)

Nothing is learned from the stream itself. Its samples only go through the memory, which keeps equally many
of each class seen (`memory=greedy`, algorithm 1). The weights of a task are those at the end of its second
phase, which starts from the initial weights theta_0. During a task the network keeps the weights of the task
before, and the reported loss is that of these weights.

The second phase is SGD with momentum, a clipped gradient and a learning rate with warm restarts, see
`help(GDumbHParams)`. The defaults are those of the official code for MNIST: 128 epochs, batches of 16,
learning rates from 0.05 to 0.0005, momentum 0.9, weight decay 1e-6 and gradients of at most norm 10. For
CIFAR it has 256 epochs.

It differs from the official code in these points:

- Cutmix is left out.
- The memory goes through the stream. The official code takes the first samples of each class of the data.
- The accuracy is that of the last epoch. The official code reports the best test accuracy of all epochs.
- Weights have full precision. The official code trains in float16.

Mirror: sequel_flax/algorithms/gdumb.py
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sequel_core.algorithms.gdumb import GDumbHParams
from sequel_core.stream.phase import PhaseSteps, phase_steps
from sequel_core.stream.task import Batch
from sequel_lightning.gradients import gradients
from sequel_lightning.networks import evaluating
from sequel_lightning.placement import to_device
from sequel_lightning.replay import Memory, ReplayModule, mean_loss, one_pass, planned
from sequel_lightning.second_phase import phase_samples, sgd_step
from sequel_lightning.trees import ParameterTree, Params, StateTree, restricted


class GDumbState(NamedTuple):
    """What GDumb keeps."""

    memory: Memory  # samples of all tasks
    initial: Params  # theta_0, the initial weights
    statistics: Params  # initial running statistics of batch normalisation; empty without batch normalisation
    velocity: Params  # v of the second phase
    phase_step: Tensor  # steps of the second phase of the current task that were taken, int32 ()


class GDumb(ReplayModule):
    """GDumb; see `help(GDumbHParams)` for its settings.

    `fit` trains the network when the task ends, in `on_train_end`.

    Example:
        >>> import torch
        >>> from sequel_benchmarks import SplitDigits
        >>> from sequel_core import GDumbHParams
        >>> from sequel_lightning import MLP, GDumb
        >>> digits = SplitDigits(num_tasks=5, scenario="class")
        >>> net = MLP((16,), image_shape=digits.image_shape)
        >>> module = GDumb(net, torch.optim.SGD, GDumbHParams(mem_size=40), digits.spec)
        >>> int((module.state.memory.t >= 0).sum())  # no sample was seen yet
        0
    """

    hparams_class = GDumbHParams
    algorithm_hparams: GDumbHParams
    has_second_phase = True
    num_draws = 0

    def init_memory(self) -> None:
        """Start with an empty memory, and copies of the initial network."""
        super().init_memory()
        self.initial = ParameterTree(self.params(), torch.clone)
        self.velocity = ParameterTree(self.params(), torch.zeros_like)
        self.statistics = StateTree({name: b.clone() for name, b in self.net.named_buffers()})

    @property
    def state(self) -> GDumbState:
        """What is kept of past tasks."""
        initial, statistics, velocity = (
            tree.get() for tree in (self.initial, self.statistics, self.velocity)
        )
        return GDumbState(self.contents, initial, statistics, velocity, self.phase_step)

    def training_loss(self, batch: Batch) -> tuple[Tensor, Any]:
        """Write the batch to the memory; return its loss without a gradient, shape (), and the outputs."""
        batch = self.planned(batch)
        planned(self.contents, batch)
        with evaluating(self.net), torch.no_grad():
            outputs = self.forward(batch.x, batch.t)
            loss = self.loss(outputs, batch)
        self.write_batch(batch, outputs)
        return loss.requires_grad_(), outputs

    def phase_steps(self) -> PhaseSteps:
        """Return the steps of the second phase that are left."""
        tasks, task = self.contents.t.cpu().numpy(), int(self.task_index)
        augmentation = self.needed_spec().augmentation
        return phase_steps(self.algorithm_hparams, augmentation, tasks, task, self.seed, int(self.phase_step))

    def start_phase(self) -> None:
        """Begin at the initial weights."""
        state, params = self.state, self.params()
        self.set_params(restricted(state.initial, params))
        for name, buffer in self.net.named_buffers():
            buffer.copy_(state.statistics[name])
        self.velocity.set({name: torch.zeros_like(p) for name, p in params.items()})

    def take_phase_step(self, step: PhaseSteps) -> tuple[Tensor, Any, Batch]:
        """Train on samples of the memory; return their loss, shape (), their outputs, and the samples."""
        params = self.params()
        dtype = next(self.net.parameters()).dtype
        samples = to_device(phase_samples(self.contents, step, dtype), self.device)
        (outputs,) = one_pass(self, [samples], self.network)
        loss = mean_loss(outputs)
        (gradient,) = gradients(loss, params)
        velocity = restricted(self.velocity.get(), params)
        with torch.no_grad():
            new, velocity = sgd_step(params, velocity, gradient, step.learning_rate, self.algorithm_hparams)
        self.set_params(new)
        self.velocity.set(velocity)
        return loss, outputs.masked, Batch(*samples[:3])
