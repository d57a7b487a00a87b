"""EWC, MAS and SI as callbacks: penalties on leaving the weights of past tasks.

The equations are those of `sequel_lightning.algorithms.ewc`, `mas` and `si`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor

from sequel_core.algorithms.si import SIHParams
from sequel_lightning import quadratic
from sequel_lightning.algorithms import si
from sequel_lightning.attach.attached import Attached
from sequel_lightning.attach.steps import PerSample, mean_gradients, trained, training_loss
from sequel_lightning.quadratic import QuadraticState
from sequel_lightning.trees import Params, zero_sum


class Penalty(Attached):
    """A penalty on leaving the weights of past tasks. `EWC`, `MAS` and `SI` are subclasses.

    The trained parameters are those with `requires_grad`.

    Attributes:
        trees: names of the attributes that hold a tensor for each trained parameter.
    """

    trees: tuple[str, ...] = ("anchor", "importance")

    def __init__(self, strength: float) -> None:
        super().__init__()
        self.strength = check_strength(strength)
        self.anchor: Params = {}
        self.importance: Params = {}
        self._params: Params = {}  # trained in this fit; listing them is slow in deep networks

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Add the gradient of the penalty."""
        if self.strength and self.tasks:
            self.add_penalty(self._params)

    @torch.no_grad()
    def add_penalty(self, params: Params) -> None:
        """Add strength * F (theta - theta*) to the gradients of the parameters."""
        for name, p in params.items():
            penalty = self.strength * self.importance[name] * (p - self.anchor[name])
            p.grad = penalty.to(p.dtype) if p.grad is None else p.grad + penalty.to(p.grad.dtype)

    def prepare(self, module: pl.LightningModule) -> None:
        """Keep numbers for the trained parameters, and no others."""
        self._params = trained(module)
        self._follow(self._params)

    def memory(self) -> dict[str, Any]:
        """Return the trees, for a checkpoint."""
        return {name: dict(getattr(self, name)) for name in self.trees}

    def _follow(self, params: Params) -> None:
        """Keep numbers for the trained parameters, and no others, on their devices."""
        for tree in self.trees:
            held: Params = getattr(self, tree)
            fresh = torch.clone if tree == "anchor" else zero_sum
            kept = {
                name: held[name].to(p.device) if name in held else fresh(p.detach())
                for name, p in params.items()
            }
            for name, p in params.items():
                if kept[name].shape != p.shape:
                    raise ValueError(
                        f"the trained parameter {name} must keep its shape from task to task, got "
                        f"{list(p.shape)} after {list(kept[name].shape)}"
                    )
            setattr(self, tree, kept)


class EWC(Penalty):
    """Elastic weight consolidation for your own module, `L + strength/2 * sum F (theta - theta*)^2`.

    F is the mean squared gradient of the loss of single samples at the end of a task, in evaluation mode.

    Args:
        strength: factor of the penalty, >= 0.
        nll: `nll(module, batch)` returns -log p(y | x) of each sample, `[B]`. None for the module's own
            `training_step` on single samples; its logging and its metrics are silenced meanwhile. Give one if
            the loss has terms that are no likelihood, such as weight decay or label smoothing.
        accumulation: `separate`, the sum of one penalty per past task (stored as a single one); `online`, one
            penalty around the latest weights.
        gamma: decay of past importances in the online variant, in [0, 1].
        samples: number of training samples for F, the first ones that the loader gives, >= 1; None for all.

    Raises:
        ValueError: an argument is out of its range; in `fit`, see `Attached`.

    Source: Kirkpatrick et al. 2017, arXiv 1612.00796; online: Schwarz et al. 2018, arXiv 1805.06370.

    Example:
        >>> import torch
        >>> from torch.nn import functional as F
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from sequel_lightning import attach
        >>> class Classifier(pl.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net = torch.nn.Linear(4, 3)
        ...
        ...     def training_step(self, batch, index):
        ...         return F.cross_entropy(self.net(batch["x"]), batch["y"])
        ...
        ...     def configure_optimizers(self):
        ...         return torch.optim.Adam(self.parameters())
        >>> _ = torch.manual_seed(0)
        >>> tasks = [[{"x": torch.rand(4), "y": k % 3} for k in range(32)] for _ in range(2)]
        >>> module, keep = Classifier(), attach.EWC(strength=10.0)
        >>> silent = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
        >>> for task in tasks:
        ...     trainer = pl.Trainer(max_epochs=1, callbacks=[keep], enable_progress_bar=False, **silent)
        ...     trainer.fit(module, DataLoader(task, batch_size=8))
        >>> keep.tasks, sorted(keep.importance)
        (2, ['net.bias', 'net.weight'])
    """

    def __init__(
        self,
        strength: float,
        nll: PerSample | None = None,
        accumulation: Literal["separate", "online"] = "separate",
        gamma: float = 1.0,
        samples: int | None = 1024,
    ) -> None:
        super().__init__(strength)
        if accumulation not in ("separate", "online"):
            raise ValueError(f"accumulation must be separate or online, got {accumulation!r}")
        if not 0 <= gamma <= 1:
            raise ValueError(f"gamma must be in [0, 1], got {gamma}")
        if gamma != 1 and accumulation == "separate":
            raise ValueError(
                f"gamma is only used with accumulation='online', got gamma={gamma}; leave it out"
            )
        _check_samples(samples)
        self.nll, self.samples = nll, samples
        self.separate, self.gamma = accumulation == "separate", gamma

    def end_task(self, module: pl.LightningModule, batches: Iterable[Any]) -> None:
        """Add the Fisher information of the task, and move the anchor."""
        value = self.nll or training_loss
        fisher = mean_gradients(module, batches, value, torch.square, self.samples, self.ranks)
        _add(self, module, fisher, self.separate, self.gamma)


class MAS(Penalty):
    """Memory aware synapses for your own module, `L + strength * sum Omega (theta - theta*)^2`.

    Omega is the mean of |d ||f(x)||^2 / d theta| over the samples of past tasks, in evaluation mode.

    Args:
        strength: factor of the penalty, >= 0.
        outputs: `outputs(module, batch)` returns f, a tensor `[B, ...]`.
        samples: number of training samples for Omega, the first ones that the loader gives; None for all.

    Raises:
        ValueError: an argument is out of its range; in `fit`, see `Attached`.

    Source: Aljundi et al. 2018, arXiv 1711.09601.

    Example:
        >>> keep = MAS(strength=0.1, outputs=lambda module, batch: module(batch[0]))
        >>> keep.tasks
        0
    """

    def __init__(self, strength: float, outputs: PerSample, samples: int | None = None) -> None:
        super().__init__(2 * strength)
        _check_samples(samples)
        self.outputs, self.samples = outputs, samples

    def end_task(self, module: pl.LightningModule, batches: Iterable[Any]) -> None:
        """Add the importances of the task, and set the anchor to the weights at its end."""

        def norm(module: Any, batch: Any) -> Tensor:
            return self.outputs(module, batch).square().sum()

        importance = mean_gradients(module, batches, norm, torch.abs, self.samples, self.ranks)
        _add(self, module, importance, separate=False, gamma=1.0)


class SI(Penalty):
    """Synaptic intelligence for your own module, `L + strength * sum Omega (theta - theta*)^2`.

    The path integral takes the gradient of the loss without the penalty, before clipping, and the real step
    of the optimizer. A step that a gradient scaler skips adds nothing.

    Args:
        strength: factor c of the penalty, >= 0.
        xi: damping of the importances, > 0.
        clamp: keep the importances >= 0, as the official code does.

    Raises:
        ValueError: an argument is out of its range; in `fit`, see `Attached`.

    Source: Zenke, Poole & Ganguli 2017, arXiv 1703.04200.

    Example:
        >>> SI(strength=0.1, xi=0.001).strength  # of F/2 (theta - theta*)^2
        0.2
    """

    trees = ("anchor", "importance", "path")

    def __init__(self, strength: float, xi: float = 1e-3, clamp: bool = False) -> None:
        super().__init__(2 * strength)
        self.hparams = SIHParams(si_lambda=strength, xi=xi, clamp=clamp)
        self.path: Params = {}
        self._gradient: Params = {}
        self._before: Params = {}

    def start_task(self, module: pl.LightningModule) -> None:
        """Set the anchor to the weights at the start of the task."""
        self.anchor = {name: p.detach().clone() for name, p in self._params.items()}

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Store the gradient of the loss and the weights, then add the gradient of the penalty."""
        params = self._params
        self._gradient = {name: p.grad.clone() for name, p in params.items() if p.grad is not None}
        self._before = {name: params[name].detach().clone() for name in self._gradient}
        super().on_before_optimizer_step(trainer, pl_module, optimizer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the step to the path, if the batch ended with one."""
        if not self._gradient:
            return
        params = self._params
        after = {name: params[name].detach() for name in self._gradient}
        path = {name: self.path[name] for name in self._gradient}
        self.path |= si.accumulate_path_integral(path, self._gradient, self._before, after)
        self._gradient, self._before = {}, {}

    def end_task(self, module: pl.LightningModule, batches: Iterable[Any]) -> None:
        """Add the importances of the task; the anchor becomes the weights at its end."""
        params = {name: p.detach().clone() for name, p in trained(module).items()}
        state = si.SIState(self.anchor, self.importance, self.path)
        self.anchor, self.importance, self.path = si.consolidate(params, state, self.hparams)


# -- parts


def check_strength(strength: float) -> float:
    """Return the factor of a penalty; raise ValueError unless it is >= 0."""
    if not strength >= 0:
        raise ValueError(f"strength must be >= 0, got {strength}")
    return strength


def _check_samples(samples: int | None) -> None:
    if samples is not None and samples < 1:
        raise ValueError(f"samples must be >= 1 or None, got {samples}")


def _add(
    callback: Penalty, module: pl.LightningModule, importance: Params, separate: bool, gamma: float
) -> None:
    params = {name: p.detach().clone() for name, p in trained(module).items()}
    state = QuadraticState(callback.anchor, callback.importance)
    callback.anchor, callback.importance = quadratic.consolidate(params, state, importance, separate, gamma)
