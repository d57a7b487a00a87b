"""ER, DER, DER++ and A-GEM as callbacks. The memory is a list of indices into the datasets of the tasks.

Which samples are kept and drawn is decided by the planner of the replay methods of `sequel_lightning`
(`sequel_core.stream.memory`). The equations are those of `sequel_lightning.algorithms.er`, `der`, `derpp`
and `agem`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor

from sequel_core.algorithms.agem import AGEMHParams
from sequel_core.algorithms.der import DERHParams
from sequel_core.algorithms.derpp import DERppHParams
from sequel_core.algorithms.er import ERHParams
from sequel_core.hparams import MemoryPolicy, ReplayHParams
from sequel_core.stream.benchmark import StreamSpec
from sequel_core.stream.memory import MemoryPlanner
from sequel_core.stream.trees import LeafSpec
from sequel_lightning.algorithms import agem, der
from sequel_lightning.attach.attached import Attached
from sequel_lightning.attach.loaders import ReplayLoader, Row, Step, held_slots, task_dataset
from sequel_lightning.attach.steps import (
    MetricCopies,
    PerSample,
    add_gradient,
    buffers_kept,
    metric_copies,
    prepared,
    trained,
    training_loss,
    without_logging,
)
from sequel_lightning.distributed import average
from sequel_lightning.gradients import backward
from sequel_lightning.replay import Outputs
from sequel_lightning.trees import Params

Classes = Sequence[Collection[int]]
"""The labels of each task."""


class Replay(Attached):
    """Replay of samples from a memory. `ER`, `DER`, `DERpp` and `AGEM` are subclasses.

    The Trainer needs both the callback and its loader:

        trainer = Trainer(callbacks=[keep])
        trainer.fit(module, attach.with_replay(loader, keep))

    Args:
        hparams: policy and sizes of the memory.
        nll: see the subclasses.
        num_tasks: see the subclasses.
        classes: see the subclasses.
        seed: of the plan.

    Attributes:
        rows: what each slot of the memory holds, `(task, index in the dataset of the task)` or None.
        datasets: of the tasks that were consolidated.
    """

    together = False  # whether the draw is part of the batch
    num_draws = 1
    past_only = False

    def __init__(
        self,
        hparams: ReplayHParams,
        nll: PerSample | None,
        num_tasks: int | None,
        classes: Classes | None,
        seed: int,
    ) -> None:
        super().__init__()
        self.hparams, self.nll, self.seed = hparams, nll, seed
        self.num_tasks = len(classes) if classes is not None else num_tasks
        self.labelled = classes is not None
        name, memory = type(self).__name__, hparams.memory
        if memory in ("class_balanced", "class_quota") and classes is None:
            raise ValueError(f"memory={memory} of attach.{name} needs classes=..., the labels of each task")
        if memory != "reservoir" and self.num_tasks is None:
            raise ValueError(f"memory={memory} of attach.{name} needs num_tasks=..., the number of tasks")
        self.spec = memory_spec(self.num_tasks or 1, classes)
        empty = MemoryPlanner(hparams, self.spec, seed, self.num_draws, self.past_only)
        self.position: list[int] = empty.state.tolist()  # of the planner
        self.rows: list[Row | None] = [None] * empty.slots
        self.datasets: list[Any] = []
        self._step: Any = None  # the Step of the batch that is trained on
        self._draws: list[Any] = []  # batches on the device of the module; None for an empty draw
        self._metrics: MetricCopies = ()

    # -- the plan

    def planner(self) -> MemoryPlanner:
        """Return a planner of the next step."""
        planner = MemoryPlanner(self.hparams, self.spec, self.seed, self.num_draws, self.past_only)
        planner.state = np.asarray(self.position)
        return planner

    def planned_task(self) -> int:
        """Return the index of the task for the planner; a reservoir does not depend on it."""
        return self.tasks if self.num_tasks is not None else 0

    def used_draws(self) -> Sequence[bool]:
        """Return whether the loss uses each draw; the others are not read."""
        return [True] * self.num_draws

    def check_batch_size(self, batch_size: int) -> None:
        """Raise ValueError if a batch does not fit into the memory."""
        self.hparams.check_memory(self.spec, batch_size)

    def past_datasets(self) -> list[Any]:
        """Return the dataset of each past task.

        Raises:
            ValueError: they are not known, after a resume.
        """
        if len(self.datasets) != self.tasks:
            raise ValueError(
                f"attach.{type(self).__name__} has trained on {self.tasks} tasks and knows the datasets of "
                f"{len(self.datasets)}; to resume, give with_replay(loader, keep, past=[...]) the loaders of "
                "the past tasks"
            )
        return self.datasets

    # -- hooks of Lightning

    def start_task(self, module: pl.LightningModule) -> None:
        """Check the number of tasks."""
        if self.num_tasks is not None and self.tasks >= self.num_tasks:
            raise ValueError(
                f"fit would begin task {self.tasks}, but attach.{type(self).__name__} has "
                f"num_tasks={self.num_tasks}; raise it"
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the loader, and copy the metrics."""
        loader = trainer.train_dataloader
        if not (isinstance(loader, ReplayLoader) and loader.keep is self):
            raise ValueError(
                f"attach.{type(self).__name__} needs its own loader, got a {type(loader).__name__}; call "
                "trainer.fit(module, attach.with_replay(loader, keep)) with the callback as keep"
            )
        self._metrics = metric_copies(pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Take the plan and the draws of the batch."""
        self._step = trainer.train_dataloader.steps.popleft()  # type: ignore[union-attr]
        self._draws = [
            None if draw is None else next(prepared(pl_module, [draw])) for draw in self._step.draws
        ]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the batch to the memory."""
        step, self._step, self._draws = self._step, None, []
        if step is None:
            return
        self.write(step)
        self.position = step.plan.position.tolist()
        trainer.train_dataloader.finish_step()  # type: ignore[union-attr]

    def write(self, step: Step) -> None:
        """Write the rows of a batch to the memory."""
        for slot, row in zip(step.plan.write, step.rows, strict=True):
            if slot < len(self.rows):
                self.rows[slot] = row

    def loss(self, trainer: pl.Trainer, module: pl.LightningModule, k: int) -> Tensor:
        """Return the mean loss of draw k, with its weight in a mean over the processes, shape ()."""
        with without_logging(module, self._metrics), trainer.precision_plugin.train_step_context():
            draw, weight = self._draws[k], float(self._step.weights[k])
            loss = training_loss(module, draw) if self.nll is None else self.nll(module, draw).mean()
            return weight * loss

    # -- the end of a task, and checkpoints

    def end_task(self, module: pl.LightningModule, batches: Iterable[Any]) -> None:
        """Keep the dataset of the task, because the memory holds rows of it."""
        self.datasets.append(task_dataset(batches))

    def memory(self) -> dict[str, Any]:
        """Return the rows and the position of the planner, for a checkpoint."""
        return {"rows": list(self.rows), "position": self.position}


class ER(Replay):
    """Experience replay for your own module: `training_step` gets the samples of a batch and of a draw.

    Args:
        mem_size: number of samples in the memory, at least the batch size; 0 for none.
        mem_batch_size: number of samples of a draw, in all processes together, >= 1.
        memory: which samples are kept, see `help(ERHParams)`. `reservoir` needs neither tasks nor labels.
        num_tasks: number of tasks; needed unless the memory is a reservoir.
        classes: labels of each task, for a memory that is divided among classes; replaces `num_tasks`.
            `with_replay` then needs `labels`.
        seed: of the plan.

    Raises:
        ValueError: an argument is out of its range; in `fit`, without the loader, or see `Attached`.

    Source: Chaudhry et al. 2019, arXiv 1902.10486.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> from sequel_lightning import attach
        >>> class Classifier(pl.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net = torch.nn.Linear(4, 3)
        ...
        ...     def training_step(self, batch, index):
        ...         return torch.nn.functional.cross_entropy(self.net(batch["x"]), batch["y"])
        ...
        ...     def configure_optimizers(self):
        ...         return torch.optim.Adam(self.parameters())
        >>> _ = torch.manual_seed(0)
        >>> tasks = [[{"x": torch.rand(4), "y": k % 3} for k in range(32)] for _ in range(2)]
        >>> module, keep = Classifier(), attach.ER(mem_size=16, mem_batch_size=4)
        >>> silent = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
        >>> for task in tasks:
        ...     trainer = pl.Trainer(max_epochs=1, callbacks=[keep], enable_progress_bar=False, **silent)
        ...     trainer.fit(module, attach.with_replay(DataLoader(task, batch_size=8), keep))
        >>> keep.tasks, sorted({task for task, _ in keep.rows})
        (2, [0, 1])
    """

    together = True

    def __init__(
        self,
        mem_size: int = 200,
        mem_batch_size: int = 10,
        memory: MemoryPolicy = "reservoir",
        num_tasks: int | None = None,
        classes: Classes | None = None,
        seed: int = 0,
    ) -> None:
        hparams = ERHParams(memory=memory, mem_size=mem_size, mem_batch_size=mem_batch_size)
        super().__init__(hparams, None, num_tasks, classes, seed)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Give the loss of this process its weight in the mean over the processes."""
        (weight,) = self._step.weights
        if weight != 1:
            loss.register_hook(lambda gradient: gradient * weight)


class Dark(Replay):
    """Dark experience replay: `DER`, and with beta `DERpp`.

    Args:
        hparams: of the memory, and alpha and distance.
        beta: factor of the mean loss of the second draw.
        outputs: see `DER`.
        nll: see `DERpp`.
        num_tasks: see `ER`.
        classes: see `ER`.
        seed: see `ER`.
    """

    def __init__(
        self,
        hparams: DERHParams,
        beta: float,
        outputs: PerSample,
        nll: PerSample | None,
        num_tasks: int | None,
        classes: Classes | None,
        seed: int,
    ) -> None:
        super().__init__(hparams, nll, num_tasks, classes, seed)
        self.dark, self.beta, self.outputs = hparams, beta, outputs
        self.stored: Any = None  # outputs for the samples of the memory [M, ...]
        self._current: Tensor | None = None  # outputs for the batch, if samples of it are kept

    def used_draws(self) -> Sequence[bool]:
        """Return whether the loss uses each draw."""
        return [self.dark.alpha > 0, self.beta > 0][: self.num_draws]

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Take the plan and the draws, and compute the outputs for the batch, if samples of it are kept."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if not (self.dark.alpha and len(held_slots(self._step.plan.write, len(self.rows)))):
            return
        with isolate_rng(), buffers_kept(pl_module), torch.no_grad():
            self._current = self._outputs(trainer, pl_module, batch)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add the gradients of the losses of the draws."""
        for k, loss in enumerate((self.distance, self.second)[: self.num_draws]):
            if self._draws[k] is not None:
                add_gradient(trainer, loss(trainer, pl_module), self.ranks)

    def distance(self, trainer: pl.Trainer, module: pl.LightningModule) -> Tensor:
        """Return alpha times the distance of the first draw's outputs to the stored ones, shape ()."""
        slots = torch.from_numpy(self._step.reads[0]).to(self.stored.device, torch.int64)
        stored, outputs = self.stored[slots], self._outputs(trainer, module, self._draws[0])
        samples = Outputs(outputs, None, outputs, None, stored, len(stored))
        weight: float = self._step.weights[0] * self.dark.alpha
        return weight * der.output_distance(samples, self.dark)

    def _outputs(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> Tensor:
        with without_logging(module, self._metrics), trainer.precision_plugin.train_step_context():
            return self.outputs(module, batch)

    def second(self, trainer: pl.Trainer, module: pl.LightningModule) -> Tensor:
        """Return beta times the mean loss of the second draw, shape ()."""
        return self.beta * self.loss(trainer, module, 1)

    def write(self, step: Step) -> None:
        """Write the rows of a batch to the memory, and the outputs for them."""
        super().write(step)
        outputs, self._current = self._current, None
        if outputs is None:
            return
        kept = np.flatnonzero(step.plan.write < len(self.rows))
        source, slots = (
            torch.from_numpy(a).to(outputs.device, torch.int64) for a in (kept, step.plan.write[kept])
        )
        if self.stored is None:
            self.stored = outputs.new_zeros((len(self.rows), *outputs.shape[1:]))
        count = step.ranks.padded(len(step.rows)) // step.ranks.size
        if outputs.shape[1:] != self.stored.shape[1:] or len(outputs) != count:
            raise ValueError(
                f"outputs must return {[count, *self.stored.shape[1:]]} for a batch of {count} samples, got "
                f"{list(outputs.shape)}; the memory holds arrays of one shape"
            )
        self.stored[slots] = step.ranks.gather(outputs, len(step.rows))[source]

    def memory(self) -> dict[str, Any]:
        """Return also the stored outputs, for a checkpoint."""
        return {**super().memory(), "stored": self.stored}


class DER(Dark):
    """Dark experience replay for your own module, `L + alpha * E ||z - f(x')||^2`.

    z are the outputs for x' at the step at which it was a training sample: before the update, in training
    mode. The draw takes a pass of its own. One more pass, without gradients, computes the outputs of a batch
    that is kept. It uses the random numbers that `training_step` will use, and keeps running statistics.

    Args:
        outputs: `outputs(module, batch)` returns f, a tensor `[B, ...]`, usually the logits.
        alpha: factor of the squared distance to the stored outputs, >= 0.
        distance: over the outputs of a sample: `sum` (the paper's norm) or `mean` (the official code).
        mem_size: see `ER`.
        mem_batch_size: see `ER`.
        memory: see `ER`.
        num_tasks: see `ER`.
        classes: see `ER`.
        seed: see `ER`.

    Raises:
        ValueError: an argument is out of its range; in `fit`, if the outputs of batches differ in shape, and
            see `ER`.

    Source: Buzzega et al. 2020, arXiv 2004.07211.

    Example:
        >>> keep = DER(lambda module, batch: module(batch["x"]), alpha=0.3, mem_size=500)
        >>> len(keep.rows)
        500
    """

    def __init__(
        self,
        outputs: PerSample,
        alpha: float = 0.1,
        distance: Literal["sum", "mean"] = "sum",
        mem_size: int = 200,
        mem_batch_size: int = 10,
        memory: MemoryPolicy = "reservoir",
        num_tasks: int | None = None,
        classes: Classes | None = None,
        seed: int = 0,
    ) -> None:
        hparams = DERHParams(
            memory=memory,
            mem_size=mem_size,
            mem_batch_size=mem_batch_size,
            alpha=alpha,
            distance=distance,
        )
        super().__init__(hparams, 0.0, outputs, None, num_tasks, classes, seed)


class DERpp(Dark):
    """DER++ for your own module, `L + alpha * E ||z - f(x')||^2 + beta * E L(x'', y'')`.

    It adds to `DER` the loss of a second draw, which takes a pass of its own.

    Args:
        outputs: see `DER`.
        alpha: see `DER`.
        beta: factor of the mean loss of the second draw, >= 0.
        distance: see `DER`.
        nll: `nll(module, batch)` returns the loss of each sample, `[B]`. None for the module's own
            `training_step`; its logging and its metrics are silenced meanwhile.
        mem_size: see `ER`.
        mem_batch_size: see `ER`.
        memory: see `ER`.
        num_tasks: see `ER`.
        classes: see `ER`.
        seed: see `ER`.

    Raises:
        ValueError: see `DER`.

    Source: Buzzega et al. 2020, arXiv 2004.07211.

    Example:
        >>> keep = DERpp(lambda module, batch: module(batch["x"]), alpha=0.3, beta=0.8, mem_size=500)
        >>> keep.beta
        0.8
    """

    num_draws = 2

    def __init__(
        self,
        outputs: PerSample,
        alpha: float = 0.1,
        beta: float = 0.5,
        distance: Literal["sum", "mean"] = "sum",
        nll: PerSample | None = None,
        mem_size: int = 200,
        mem_batch_size: int = 10,
        memory: MemoryPolicy = "reservoir",
        num_tasks: int | None = None,
        classes: Classes | None = None,
        seed: int = 0,
    ) -> None:
        hparams = DERppHParams(
            memory=memory,
            mem_size=mem_size,
            mem_batch_size=mem_batch_size,
            alpha=alpha,
            distance=distance,
            beta=beta,
        )
        super().__init__(hparams, beta, outputs, nll, num_tasks, classes, seed)


class AGEM(Replay):
    """A-GEM for your own module: `g - (g . g_ref / g_ref . g_ref) g_ref` if `g . g_ref < 0`.

    g is the accumulated gradient, before clipping. g_ref is the gradient of the mean loss of a draw from
    past tasks, the last draw if gradients are accumulated. A callback after this one in the Trainer's list
    adds its penalty to the projected gradient.

    Args:
        nll: see `DERpp`.
        mem_size: see `ER`; it divides into the parts of the memory.
        mem_batch_size: see `ER`.
        memory: `ring`, the latest samples of each task; `task_quota`, a uniform sample of each task. With
            `classes` `ring` has a part for each class of each task, as `class_quota` has.
        num_tasks: number of tasks; `classes` replaces it.
        classes: see `ER`.
        seed: see `ER`.

    Raises:
        ValueError: see `ER`.

    Source: Chaudhry et al. 2019, arXiv 1812.00420.

    Example:
        >>> keep = AGEM(mem_size=300, num_tasks=3)
        >>> len(keep.rows)
        300
    """

    past_only = True

    def __init__(
        self,
        nll: PerSample | None = None,
        mem_size: int = 1000,
        mem_batch_size: int = 256,
        memory: Literal["ring", "task_quota", "class_quota"] = "ring",
        num_tasks: int | None = None,
        classes: Classes | None = None,
        seed: int = 0,
    ) -> None:
        hparams = AGEMHParams(memory=memory, mem_size=mem_size, mem_batch_size=mem_batch_size)
        super().__init__(hparams, nll, num_tasks, classes, seed)
        self._params: Params = {}

    def prepare(self, module: pl.LightningModule) -> None:
        """List the trained parameters."""
        self._params = trained(module)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Project the gradient."""
        if not self._draws or self._draws[0] is None:
            return
        params = self._params
        with torch.enable_grad():
            reference = backward(self.loss(trainer, pl_module, 0), params, pl_module)
        if self.ranks.size > 1:
            average(list(reference.values()), self.ranks.size)
        gradient = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in params.items()}
        projected = agem.project(gradient, reference)
        if projected is not gradient:
            for name, p in params.items():
                p.grad = projected[name]


def memory_spec(num_tasks: int, classes: Classes | None) -> StreamSpec:
    """Return a spec for the planner of a memory: which labels each task has; without labels, one group."""
    if classes is None:
        mask = np.ones((num_tasks, 1), np.bool_)
        return StreamSpec(LeafSpec(()), 1, num_tasks, "domain", mask, y=LeafSpec((), "float32"))
    width = 1 + max(max(labels) for labels in classes)
    mask = np.zeros((num_tasks, width), np.bool_)
    for task, labels in enumerate(classes):
        mask[task, list(labels)] = True
    return StreamSpec(LeafSpec(()), width, num_tasks, "class", mask)
