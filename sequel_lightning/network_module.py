"""NetworkModule: the network of a LightningModule, its trained parameters, and its position in the stream."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from sequel_core.hparams import AlgorithmHParams
from sequel_core.stream.benchmark import StreamSpec
from sequel_lightning._compat import attached_trainer
from sequel_lightning.distributed import Call, Ranks
from sequel_lightning.lifecycle import TaskLifecycle
from sequel_lightning.networks import blank_input, call_network, check_layer, evaluating, features_of
from sequel_lightning.objectives import output_leaf, outputs_text
from sequel_lightning.preprocessing import Preprocessing
from sequel_lightning.reporting import RunningMetrics
from sequel_lightning.trees import Params


class NetworkModule(pl.LightningModule):
    """What a method reads of its network and of the stream; `Algorithm` sets the attributes."""

    algorithm_hparams: AlgorithmHParams
    gives_task: bool
    lifecycle: TaskLifecycle
    net: nn.Module
    preprocessing: Preprocessing
    ranks: Ranks
    running_metrics: RunningMetrics
    spec: StreamSpec | None
    task_index: Tensor

    def forward(self, x: Any, t: Tensor | None = None) -> Any:
        """Return the outputs; logits `[B, num_classes]` are masked to the tasks in the task scenario.

        Args:
            x: images `[B, C, H, W]`, or whatever the network takes; see `normalise`.
            t: task index of each sample `[B]`; needed in the task scenario, and if the network takes it.

        Raises:
            ValueError: t is needed and is None.
        """
        return self.masked(self.network(x, t), t)

    def network(self, x: Any, t: Tensor | None = None) -> Any:
        """Return what the network returns, unmasked."""
        return self.pass_through(partial(call_network, self.net), self.normalise(x), self.task_argument(t))

    def pass_through(self, call: Call, x: Any, t: Tensor | None) -> Any:
        """Return `call(x, t)`, a pass through the network, divided among the processes; see `Ranks.call`."""
        return self.ranks.call(call, self.net, x, t) if self.ranks.dividing else call(x, t)

    def task_argument(self, t: Tensor | None) -> Tensor | None:
        """Return the network's argument t `[B]`; None if it is called without it.

        Raises:
            ValueError: t is None, and the network takes it.
        """
        return self.preprocessing.needed_tasks(t) if self.gives_task else None

    def features(self, x: Any, t: Tensor | None = None, layer: str | None = None) -> Any:
        """Return the output of a layer `[B, ...]`.

        Args:
            x: see `forward`.
            t: see `forward`.
            layer: name of the layer, as in `net.named_modules()`; None for the network's method `features`.

        Raises:
            ValueError: the network has no such layer, or the layer returns no tensor.
        """
        if layer is not None:
            check_layer(self.net, layer)
        return features_of(self.net, self.normalise(x), self.task_argument(t), layer)

    def normalise(self, x: Any) -> Any:
        """Return inputs as the network takes them; see `Preprocessing.normalise`."""
        return self.preprocessing.normalise(x)

    def masked(self, outputs: Any, t: Tensor | None) -> Any:
        """Return the outputs, with logits masked in the task scenario; see `Preprocessing.masked`."""
        return self.preprocessing.masked(outputs, t)

    def blank_output(self, name: str | None) -> Tensor:
        """Return the array that a method uses of what the network returns, for a blank input, `[1, ...]`.

        Args:
            name: see `output_leaf`.

        Raises:
            ValueError: there is no such array, or it has no floats `[1, ...]`.
        """
        like = next(self.net.parameters())
        x, t = blank_input(self.needed_spec(), like), torch.zeros(1, dtype=torch.int64, device=like.device)
        with evaluating(self.net), torch.no_grad():
            outputs = call_network(self.net, x, self.task_argument(t))
        leaf = output_leaf(outputs, name)
        if not leaf.is_floating_point() or leaf.shape[:1] != (1,):
            raise ValueError(
                f"{self.algorithm_hparams.name} needs outputs that are floats [B, ...], got {leaf.dtype} "
                f"{list(leaf.shape)} of {outputs_text(outputs)} for B=1; set output to another array"
            )
        return leaf

    def needed_spec(self) -> StreamSpec:
        """Return the stream's spec, for a method that keeps samples.

        Raises:
            ValueError: the module was made without a spec.
        """
        if self.spec is None:
            raise ValueError(
                f"{type(self).__name__} keeps samples, so it needs the stream's spec, got None; "
                "construct it with spec=benchmark.spec"
            )
        return self.spec

    # -- the position in the stream

    def seen_classes(self) -> Tensor:
        """Return the classes of the tasks up to the current one, bool `[num_classes]`; none before the first.

        Before a fit has started its task, the current task is the one that it will start.

        Raises:
            ValueError: the module was made without a spec.
        """
        classes, task = self._classes_and_task()
        return classes[: task + 1].any(0)

    def task_classes(self) -> Tensor:
        """Return the classes of the current task, bool `[num_classes]`; see `seen_classes`."""
        classes, task = self._classes_and_task()
        return classes[task] if task >= 0 else torch.zeros_like(classes[0])

    def _classes_and_task(self) -> tuple[Tensor, int]:
        classes, trainer = self.preprocessing.classes, attached_trainer(self)
        if classes is None:
            raise ValueError(
                f"{type(self).__name__} needs the stream's spec for the classes of each task, got None; "
                "construct it with spec=benchmark.spec"
            )
        fits = trainer is not None and trainer.state.fn == "fit" and trainer.state.status == "running"
        return classes, self.lifecycle.current_index() if fits else int(self.task_index)

    @property
    def task_progress(self) -> float:
        """The fraction of the current task's steps that have been taken, in [0, 1].

        A step is a training batch. It is 0 in the first step of a task. It is nan before the first fit, and
        if the Trainer has no last step (`max_epochs=-1`, or a loader without a length and no `max_steps`).
        """
        if not self.lifecycle.num_steps:
            return math.nan
        running = self.running_metrics
        return min((running.steps_done - running.task_start) / self.lifecycle.num_steps, 1.0)

    def params(self) -> Params:
        """Return the trained parameters of the network by name: those with `requires_grad`."""
        return {name: p for name, p in self.net.named_parameters() if p.requires_grad}

    def frozen_params(self) -> Params:
        """Return detached copies of the trained parameters."""
        return {name: p.detach().clone() for name, p in self.params().items()}

    @torch.no_grad()
    def set_params(self, params: Params) -> None:
        """Copy new values into the trained parameters."""
        for name, p in self.params().items():
            p.copy_(params[name])
