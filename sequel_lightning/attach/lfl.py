"""LFL as a callback: a penalty on leaving the features of the network at the end of the last task.

The equation is that of `sequel_lightning.algorithms.lfl`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from itertools import chain
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from sequel_lightning.algorithms.lfl import feature_distance
from sequel_lightning.attach.attached import Attached
from sequel_lightning.attach.penalties import check_strength
from sequel_lightning.attach.steps import PerSample, add_gradient, buffers_kept
from sequel_lightning.trees import Params


class LFL(Attached):
    """Less-forgetting learning for your own module, `L + strength/2 * mean_n ||h(x_n) - h_old(x_n)||^2`.

    h_old is from a copy of the module at the end of the last task, in evaluation mode. From the second task
    on, each batch takes one more pass through the module and one through the copy. The passes do not change
    running statistics.

    Args:
        strength: factor of the penalty, >= 0.
        features: `features(module, batch)` returns h, a tensor `[B, ...]`, usually the last hidden layer.
        head: name of a submodule that does not change after the first task, usually the last layer, for
            example `net.head`: it gets no gradient. None to train all.

    Raises:
        ValueError: strength is negative; in `fit`, if the module has no submodule `head`, or see `Attached`.

    Source: Jung et al. 2016, arXiv 1607.00122, which does not train the last layer after the first task.

    Example:
        >>> keep = LFL(strength=0.1, features=lambda module, batch: module.body(batch["x"]), head="head")
        >>> keep.tasks
        0
    """

    def __init__(self, strength: float, features: PerSample, head: str | None = None) -> None:
        super().__init__()
        self.strength = check_strength(strength)
        self.features, self.head = features, head
        self.anchor: Params = {}  # parameters and buffers at the end of the last task
        self._old: Any = None  # a module with the anchor's values
        self._batch: Any = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the module and the Trainer."""
        super().setup(trainer, pl_module, stage)
        if self.head is not None and self.head not in dict(pl_module.named_modules()):
            raise ValueError(
                f"head must be the name of a submodule of {type(pl_module).__name__}, got {self.head!r}; "
                f"it has {', '.join(name for name, _ in pl_module.named_children())}"
            )

    @torch.no_grad()
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make the copy of the module at the end of the last task."""
        if not (self.tasks and self.strength):
            return
        self._old = copy.deepcopy(pl_module).requires_grad_(False).eval()
        for name, value in named_state(self._old):
            if name in self.anchor:
                value.copy_(self.anchor[name])

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep the batch for the penalty."""
        self._batch = batch

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add the gradient of the penalty."""
        if self._old is None:
            return
        with buffers_kept(pl_module):
            with trainer.precision_plugin.train_step_context():
                features = self.features(pl_module, self._batch)
                with torch.no_grad():
                    old = self.features(self._old, self._batch)
                penalty = self.strength * feature_distance(features, old)
            add_gradient(trainer, penalty, self.ranks)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Remove the gradient of the head, so that clipping and the optimizer skip it."""
        if self.tasks and self.head is not None:
            pl_module.get_submodule(self.head).zero_grad()

    def end_task(self, module: pl.LightningModule, batches: Iterable[Any]) -> None:
        """Keep the weights and the running statistics."""
        self.anchor = {name: value.detach().clone() for name, value in named_state(module)}
        self._old = self._batch = None

    def memory(self) -> dict[str, Any]:
        """Return the weights and the running statistics, for a checkpoint."""
        return {"anchor": dict(self.anchor)}


def named_state(module: torch.nn.Module) -> Iterable[tuple[str, Tensor]]:
    """Return the parameters and the buffers of a module, with their names."""
    return chain(module.named_parameters(), module.named_buffers())
