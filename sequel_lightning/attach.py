"""EWC, MAS and SI as callbacks, for a LightningModule that you already have, unchanged.

    keep = attach.EWC(strength=10.0)
    for loader in tasks:
        trainer = Trainer(max_epochs=5, callbacks=[keep])
        trainer.fit(module, loader)                 # one fit is one task; keep is consolidated when it ends

The module keeps its own `training_step`, loss, optimizers and batches. The gradient of the penalty is added
in closed form once per optimizer step: after accumulation and after the unscaling of gradients, before
clipping.

The equations are those of `sequel_lightning.algorithms.ewc`, `mas` and `si`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from sequel_core.algorithms.si import SIHParams
from sequel_lightning import quadratic
from sequel_lightning.algorithms import si
from sequel_lightning.gradients import backward
from sequel_lightning.module import ContinualModule
from sequel_lightning.networks import evaluating
from sequel_lightning.quadratic import QuadraticState
from sequel_lightning.trees import Params, zero_sum

PerSample = Callable[[Any, Any], Tensor]
"""A function of the module and of a batch, which returns one number per sample `[B]`."""


class Attached(Callback):
    """A penalty on leaving the weights of past tasks. `EWC`, `MAS` and `SI` are subclasses.

    The trained parameters are those with `requires_grad`. The state is in the checkpoints of the Trainer, so
    a fit that is resumed by `ckpt_path` continues within its task.

    Attributes:
        tasks: number of tasks that were consolidated.
        trees: names of the attributes that hold a tensor for each trained parameter.

    Raises:
        ValueError: in `fit`, if the module optimizes manually or is a ContinualModule; if the Trainer has
            several processes; or if the previous fit ended with an error, so that its task was never
            consolidated.
    """

    trees: tuple[str, ...] = ("anchor", "importance")

    def __init__(self, strength: float) -> None:
        if not strength >= 0:
            raise ValueError(f"strength must be >= 0, got {strength}")
        self.strength = strength
        self.tasks = 0
        self.anchor: Params = {}
        self.importance: Params = {}
        self._open = False  # whether a task has begun and is not consolidated
        self._resumes = False
        self._params: Params = {}  # trained in this fit; listing them is slow in deep networks

    # -- hooks of Lightning

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the module and the Trainer."""
        if stage != "fit":
            return
        name = type(self).__name__
        if isinstance(pl_module, ContinualModule):
            raise ValueError(
                f"attach.{name} needs a module of your own, got a {type(pl_module).__name__}, which is a "
                "method itself; leave the callback out"
            )
        if not pl_module.automatic_optimization:
            raise ValueError(
                f"attach.{name} needs automatic optimization, got automatic_optimization=False in "
                f"{type(pl_module).__name__}: only automatic optimization says when a step is taken"
            )
        if trainer.world_size > 1:
            raise ValueError(
                f"attach.{name} needs one process, got {trainer.world_size}; set devices=1, num_nodes=1"
            )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin a task, or continue with the task of a checkpoint."""
        resumes, self._resumes = self._resumes, False
        params = self._params = trained(pl_module)
        if self._open and not resumes:
            raise ValueError(
                f"task {self.tasks} was never consolidated, because its fit ended with an error; call "
                f"consolidate(module, loader) of the callback {type(self).__name__}, or resume with ckpt_path"
            )
        self._follow(params)
        if not self._open:
            self._open = True
            self.start_task(params)

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

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Consolidate the task, at the weights that the module has now."""
        if trainer.train_dataloader is not None and not trainer.interrupted:
            self.consolidate(pl_module, trainer.train_dataloader)

    # -- the task

    def start_task(self, params: Params) -> None:
        """Begin a task with these weights."""

    def consolidate(self, module: pl.LightningModule, batches: Iterable[Any]) -> None:
        """Do the work at the end of a task; `fit` calls it, unless it ends with an error.

        Args:
            module: at the weights at which the task is consolidated.
            batches: of the task's training samples, as `fit` takes them.

        Raises:
            ValueError: no task has begun, or there are no batches.
        """
        if not self._open:
            raise ValueError("no task has begun, or it is consolidated already; call fit first")
        self._follow(trained(module))
        with isolate_rng(), evaluating(module), without_logging(module):
            self.end_task(module, batches)
        self.tasks += 1
        self._open = False

    def end_task(self, module: pl.LightningModule, batches: Iterable[Any]) -> None:
        """Update anchor and importance."""
        raise TypeError(f"{type(self).__name__} has to override end_task(module, batches)")

    # -- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the coming steps depend on."""
        trees = {name: dict(getattr(self, name)) for name in self.trees}
        return {"tasks": self.tasks, "open": self._open, **trees}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from the state of a checkpoint."""
        self.tasks, self._open = state_dict["tasks"], state_dict["open"]
        for name in self.trees:
            setattr(self, name, dict(state_dict[name]))
        self._resumes = True

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


class EWC(Attached):
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
        fisher = mean_gradients(module, prepared(module, batches), value, torch.square, self.samples)
        _add(self, module, fisher, self.separate, self.gamma)


class MAS(Attached):
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

        importance = mean_gradients(module, prepared(module, batches), norm, torch.abs, self.samples)
        _add(self, module, importance, separate=False, gamma=1.0)


class SI(Attached):
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

    def start_task(self, params: Params) -> None:
        """Set the anchor to the weights at the start of the task."""
        self.anchor = {name: p.detach().clone() for name, p in params.items()}

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


def _check_samples(samples: int | None) -> None:
    if samples is not None and samples < 1:
        raise ValueError(f"samples must be >= 1 or None, got {samples}")


def _add(
    callback: Attached, module: pl.LightningModule, importance: Params, separate: bool, gamma: float
) -> None:
    params = {name: p.detach().clone() for name, p in trained(module).items()}
    state = QuadraticState(callback.anchor, callback.importance)
    callback.anchor, callback.importance = quadratic.consolidate(params, state, importance, separate, gamma)


def trained(module: pl.LightningModule) -> Params:
    """Return the trained parameters of a module by name: those with `requires_grad`."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def training_loss(module: Any, batch: Any) -> Tensor:
    """Return the loss of the module's own training step on a batch, shape ().

    Raises:
        ValueError: the step returns no loss.
    """
    result = module.training_step(batch, 0)
    loss = result.get("loss") if isinstance(result, Mapping) else result
    if not isinstance(loss, Tensor):
        raise ValueError(
            f"training_step of {type(module).__name__} must return a loss for a batch of one sample, got "
            f"{type(result).__name__}; give nll=..., a function of the module and a batch"
        )
    return loss


def prepared(module: pl.LightningModule, batches: Iterable[Any]) -> Iterator[Any]:
    """Yield batches on the device of a module, after its own hooks for the transfer."""
    for batch in batches:
        batch = module.on_before_batch_transfer(batch, 0)
        batch = module.transfer_batch_to_device(batch, module.device, 0)
        yield module.on_after_batch_transfer(batch, 0)


def mean_gradients(
    module: pl.LightningModule,
    batches: Iterable[Any],
    value: PerSample,
    contribution: Callable[[Tensor], Tensor],
    samples: int | None,
) -> Params:
    """Return 1/N sum_n contribution(d value(x_n) / d theta), with one backward pass per sample.

    Args:
        module: in evaluation mode.
        batches: of samples, as `training_step` takes them.
        value: of a batch of one sample.
        contribution: of a gradient array to the sum, elementwise.
        samples: N, the first so many samples; None for all.

    Raises:
        ValueError: there are no batches.
    """
    params = trained(module)
    total, count = {name: zero_sum(p) for name, p in params.items()}, 0
    for batch in batches:
        for sample in single_samples(batch):
            if count == samples:
                break
            with torch.enable_grad():
                gradient = backward(value(module, sample).sum(), params, module)
            for name, g in gradient.items():
                total[name] += contribution(g.to(total[name].dtype))
            count += 1
        if count == samples:
            break
    if not count:
        raise ValueError(
            "the loader gave no batch for the end of the task (an iterator can be read only once)"
        )
    return {name: t / count for name, t in total.items()}


def single_samples(batch: Any) -> Iterator[Any]:
    """Yield the samples of a batch as batches of one sample.

    Every tensor and list with as many rows as the batch's first tensor is split; other values are repeated.

    Args:
        batch: a tensor, or a tuple, list or mapping of batches.

    Raises:
        ValueError: there is no tensor in the batch.

    Example:
        >>> batch = {"x": torch.tensor([[1.0], [2.0]]), "names": ["a", "b"], "epoch": 3}
        >>> list(single_samples(batch))[1]
        {'x': tensor([[2.]]), 'names': ['b'], 'epoch': 3}
    """
    first = next(_tensors(batch), None)
    if first is None:
        raise ValueError(
            f"a batch must hold tensors whose first axis is the batch, got {type(batch).__name__}; the "
            "samples of a task are taken one by one"
        )
    for k in range(len(first)):
        yield _row(batch, k, len(first))


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        if batch.ndim:
            yield batch
    elif isinstance(batch, Mapping):
        for part in batch.values():
            yield from _tensors(part)
    elif isinstance(batch, (tuple, list)):
        for part in batch:
            yield from _tensors(part)


def _row(batch: Any, k: int, count: int) -> Any:
    if isinstance(batch, Tensor):
        return batch[k : k + 1] if batch.ndim and len(batch) == count else batch
    if isinstance(batch, Mapping):
        return type(batch)({key: _row(part, k, count) for key, part in batch.items()})  # type: ignore[call-arg]
    if isinstance(batch, (tuple, list)):
        if next(_tensors(batch), None) is None:
            return batch[k : k + 1] if len(batch) == count else batch
        parts = [_row(part, k, count) for part in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch


@contextmanager
def without_logging(module: pl.LightningModule) -> Iterator[None]:
    """Silence `log` and `log_dict` of a module, and let copies of its metrics be updated."""
    metrics = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent.named_children()
        if isinstance(child, Metric | MetricCollection) and not isinstance(parent, MetricCollection)
    ]
    for parent, name, child in metrics:
        setattr(parent, name, copy.deepcopy(child))
    silenced: Any = vars(module)
    silenced |= {"log": _nothing, "log_dict": _nothing}
    try:
        yield
    finally:
        for name in ("log", "log_dict"):
            del silenced[name]
        for parent, name, child in metrics:
            setattr(parent, name, child)


def _nothing(*args: Any, **options: Any) -> None:
    """Do nothing."""
