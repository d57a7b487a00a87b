"""ContinualModule: what every continual-learning algorithm shares as a LightningModule.

One `Trainer.fit` is one task, under any Trainer, with no orchestrator:

    module = EWC(net, partial(torch.optim.SGD, lr=0.1), EWCHParams(), benchmark.spec)
    for task in benchmark.tasks:
        Trainer(max_epochs=1).fit(module, datamodule=TaskDataModule(task))

Because Lightning's hooks also fire on resume, after an exception and within a tuner, the module keeps two
persistent buffers: the index of the task and the phase it is in. A task starts in `on_train_start` only from
a phase other than training; its end-of-task work runs once, when training ran to its end or was stopped on
purpose. With `consolidate="best"` that work is done at the weights of the best checkpoint, which are
restored first. A fit that would leave an unfinished task behind is refused: see `lifecycle.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import chain
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import LearningRateFinder
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torchmetrics import MetricCollection

from sequel_core.hparams import AlgorithmHParams
from sequel_core.stream.augmentation import augmenting
from sequel_core.stream.benchmark import StreamSpec
from sequel_core.stream.planner import NoPlanner
from sequel_core.stream.task import AnySplit, Batch, Task
from sequel_lightning.augmentation import cropped
from sequel_lightning.batches import are_task_indices, check_batch, check_tasks, unknown_batch, widened
from sequel_lightning.lifecycle import (
    CONSOLIDATED,
    IDLE,
    TRAINING,
    Kept,
    check_best_keeper,
    check_open_task,
    check_resumed_file,
    check_spoiling,
    check_task,
    checked_batches,
    consolidation_batches,
    fingerprint,
    keep,
    put_back,
    take_best,
)
from sequel_lightning.optimizers import OptimizerFactory, check_factory, make_optimizer
from sequel_lightning.reporting import Report, RunningMetrics
from sequel_lightning.scores import TaskScores, check_metrics, with_loaders_task
from sequel_lightning.settings import accept_plain_values, plain_hparams, plain_spec
from sequel_lightning.trees import ParameterTree

__all__ = [
    "CONSOLIDATED",
    "IDLE",
    "TRAINING",
    "ContinualModule",
    "OptimizerFactory",
    "Params",
    "Report",
    "RunningMetrics",
]

Params = dict[str, Tensor]


class ContinualModule(pl.LightningModule):
    """A network that learns tasks one after another; subclasses are the algorithms.

    Args:
        net: called with images `[B, C, H, W]`, returns logits `[B, num_classes]`.
        optimizer: factory over parameters, for example `partial(torch.optim.SGD, lr=0.1)`; it may return what
            `configure_optimizers` may, a scheduler included. A factory with a parameter `named_parameters`
            gets pairs of name and parameter, for parameter groups.
        hparams: settings of the algorithm.
        spec: of the stream (`benchmark.spec`): the mask of each task and the normalisation of uint8 images.
            Without one, logits are not masked and images must come normalised.
        metrics: updated with `(logits, labels)` at every training step, logged and reset with the loss.
            Copies score the validation and test samples, see `sequel_lightning.scores`.
        seed: of the plan, for methods that choose samples.

    Raises:
        ValueError: a network that the stream's images do not fit, or that returns another shape; settings
            that do not fit the stream; in `fit`, a Trainer that has nothing left to run, more than one
            process, a learning-rate decay beside a scheduler, a task before it that was never consolidated,
            batches of another kind, or a label that is not of its task.
    """

    hparams_class: type[AlgorithmHParams]
    clipping_setting: str = ""  # of a method that takes its steps itself: its setting that clips
    has_penalty = False  # whether the loss has terms beside the task's own, see `added`
    path_integrals: ClassVar[tuple[str, ...]] = ()  # trees that only the steps of a whole task can give
    moving_trees: ClassVar[tuple[str, ...]] = ()  # other trees that belong to the weights of a moment
    task_index: Tensor
    phase: Tensor
    known: Tensor | None  # the labels that samples of each task may have, bool [T, num_classes]
    mask: Tensor | None  # the classes of each task, bool [T, num_classes]; None if logits are not masked
    scale: Tensor | None  # of uint8 images, [C, 1, 1], in the dtype of the weights
    shift: Tensor | None  # of uint8 images, [C, 1, 1]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        accept_plain_values(cls)

    def __init__(
        self,
        net: nn.Module,
        optimizer: OptimizerFactory,
        hparams: AlgorithmHParams | None = None,
        spec: StreamSpec | None = None,
        metrics: MetricCollection | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        hparams = self.hparams_class() if hparams is None else hparams
        check_factory(optimizer)
        check_metrics(metrics)
        check_arguments(net, spec)
        self.check_net(net)
        if spec is not None:
            check_network(net, spec)
        if not isinstance(hparams, self.hparams_class):
            raise ValueError(
                f"{type(self).__name__} needs {self.hparams_class.__name__}, got {type(hparams).__name__}"
            )
        if spec is not None:
            hparams.check_stream(spec)
        self.net = net
        self.optimizer_factory = optimizer
        self.algorithm_hparams = hparams
        self.spec = spec
        self.metrics = metrics
        self.seed = seed
        self.lr: float | None = None  # in place of the factory's; a tuner's `lr_find` sets it
        self.save_hyperparameters(
            {
                "hparams": plain_hparams(hparams),
                "spec": None if spec is None else plain_spec(spec),
                "seed": seed,
            }
        )
        self.running_metrics = RunningMetrics()
        self.automatic_optimization = not self.clipping_setting
        self.register_buffer("task_index", torch.tensor(-1))
        self.register_buffer("phase", torch.tensor(IDLE))
        like = next(net.parameters())
        for name in ("scale", "shift"):
            value = None
            if spec is not None:
                value = torch.as_tensor(getattr(spec.normalisation, name), dtype=like.dtype).reshape(-1, 1, 1)
            self.register_buffer(name, value, persistent=False)
        known = None if spec is None else torch.from_numpy(spec.mask)
        self.register_buffer("known", known, persistent=False)
        mask = known if spec is not None and spec.masks_logits else None
        self.register_buffer("mask", mask, persistent=False)
        self.init_memory()
        self.planner = NoPlanner() if spec is None else augmenting(self.make_planner(spec), spec, seed)
        self._carried_optimizer: dict[str, Any] | None = None
        self._generators: list[Tensor] = []  # their states in the checkpoint that a fit resumes
        self._kept: Kept | None = None  # while an evaluation looks at a file
        self._consolidated_at: str | None = None  # fingerprint of the weights before the end-of-task work
        self._fitting = self._resumes = False
        self._trained_params: Params = {}  # `params()` while a fit runs: a deep network is slow to list
        self._scores = TaskScores("val", None)

    # -- the algorithm: subclasses override these, in the order of the Flax bundle

    def check_net(self, net: nn.Module) -> None:
        """Raise ValueError if the method cannot train this network; the constructor calls it first."""

    def init_memory(self) -> None:
        """Build what the method keeps: buffers, parameter trees, copies of the network.

        The constructor calls it once. `net`, `algorithm_hparams`, `spec` and `seed` are set by then.
        """

    def start_task(self) -> None:
        """Begin task `self.task_index`."""

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the training loss of a batch, shape (): the mean cross-entropy; subclasses add to it."""
        return F.cross_entropy(logits, batch.y)

    def added(self, penalty: Tensor) -> Tensor:
        """Return what a method adds to the task's own loss, shape (), and note it for `train/penalty`."""
        self.running_metrics.penalties.append(penalty.detach())
        return penalty

    def objective(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the training loss of a batch, shape (), and its logits `[B, num_classes]`."""
        batch = self.trained_on(batch)
        logits = self.forward(batch.x, batch.t)
        return self.loss(logits, batch), logits

    def end_task(self, batches: Iterable[Batch]) -> None:
        """Do the end-of-task work on batches of the task's training samples, each sample once."""

    def predict(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        """Return the logits `[B, num_classes]` that are evaluated."""
        return self.forward(x, t)

    def alternatives(self, x: Tensor, t: Tensor | None = None) -> dict[str, Tensor]:
        """Return what else can be predicted with, by name, as `predict` does: logits `[B, num_classes]`."""
        return {}

    def training_split(self, split: AnySplit) -> AnySplit:
        """Return what the coming task trains on: its training samples, or these joined with others."""
        return split

    def make_planner(self, spec: StreamSpec) -> Any:
        """Return what plans the steps, beside the augmentation of their samples."""
        return NoPlanner()

    def trained(self) -> dict[str, nn.Module]:
        """Return the network, under the empty name, and by name what else the optimizer trains."""
        return {"": self.net}

    # -- the plan

    def planned(self, batch: Batch) -> Batch:
        """Return the batch with its plan; a tuner's or `fast_dev_run`'s leaves no trace."""
        if isinstance(self.planner, NoPlanner):
            return batch
        planner = self.planner if self._fitting else copy.deepcopy(self.planner)
        return batch._replace(plan=planner.next(batch.y.cpu().numpy(), batch.t.cpu().numpy()))

    def trained_on(self, batch: Batch) -> Batch:
        """Return the batch as the network is trained on it, augmented where the stream is, with its plan."""
        return cropped(self.planned(batch))

    def get_extra_state(self) -> Tensor:
        """Return the planner's state, for `state_dict`."""
        return torch.from_numpy(self.planner.state)

    def set_extra_state(self, state: Tensor) -> None:
        """Set the planner's state, from `load_state_dict`."""
        self.planner.state = state.cpu().numpy()

    # -- the network

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        """Return the logits `[B, num_classes]`, masked to the task of each sample in the task scenario.

        Args:
            x: images `[B, C, H, W]`, or what else the network takes; see `normalise`.
            t: task index of each sample `[B]`; needed in the task scenario only.

        Raises:
            ValueError: no t in the task scenario.
        """
        return self.masked(self.network(x), t)

    def network(self, x: Tensor) -> Tensor:
        """Return the logits of all classes `[B, num_classes]`, unmasked."""
        logits: Tensor = self.net(self.normalise(x))
        return logits

    def masked(self, logits: Tensor, t: Tensor | None) -> Tensor:
        """Return the logits `[B, num_classes]`, masked to the tasks `[B]` in the task scenario.

        Raises:
            ValueError: no t in the task scenario, or logits or task indices of another shape.
        """
        mask = self._buffers["mask"]
        if mask is not None:
            t = self.needed_tasks(t)
        check_logits(logits, t, mask)
        return logits if mask is None else mask_logits(logits, mask[t])

    def needed_tasks(self, t: Tensor | None) -> Tensor:
        """Return the task index of each sample, for logits that depend on it.

        Raises:
            ValueError: there is none.
        """
        if t is None:
            raise ValueError(
                f"{self.algorithm_hparams.name} needs the task index of each sample here, because the logits "
                "depend on it, got t=None; call module(x, t), or predict from batches (x, y, t)"
            )
        return t

    def normalise(self, x: Tensor) -> Tensor:
        """Return inputs as the network takes them.

        uint8 images become `(x / 255 - mean) / std` in the dtype of the weights, floats are cast to that
        dtype, and other integers (tokens, indices) and booleans stay as they are. Without a spec nothing is
        changed.
        """
        buffers = self._buffers  # a third of the time of an attribute, at every step
        scale, shift = buffers["scale"], buffers["shift"]
        if scale is None or shift is None:
            return x
        if x.dtype == torch.uint8:
            return x.to(scale.dtype).mul_(scale).add_(shift)
        return x.to(scale.dtype) if x.is_floating_point() else x

    def needed_spec(self) -> StreamSpec:
        """Return the stream's spec, for a method that keeps samples.

        Raises:
            ValueError: the module was made without one.
        """
        if self.spec is None:
            raise ValueError(
                f"{type(self).__name__} keeps samples, so it needs the stream's spec, got None; "
                "construct it with spec=benchmark.spec"
            )
        return self.spec

    def params(self) -> Params:
        """Return the trained parameters of the network by name: those with `requires_grad`."""
        return {name: p for name, p in self.net.named_parameters() if p.requires_grad}

    def frozen_params(self) -> Params:
        """Return copies of the trained parameters, which no gradient reaches."""
        return {name: p.detach().clone() for name, p in self.params().items()}

    @torch.no_grad()
    def set_params(self, params: Params) -> None:
        """Copy new values into the trained parameters."""
        for name, p in self.params().items():
            p.copy_(params[name])

    def follow_trained(self) -> None:
        """Let each `ParameterTree` hold the parameters that are trained now.

        Newly trained parameters are added. Those that are frozen keep what is remembered of them; before the
        first task nothing is, and they are left out.

        Raises:
            ValueError: a parameter has another shape than in the tasks before.
        """
        self._trained_params = self.params()
        for tree in self.modules():
            if isinstance(tree, ParameterTree):
                tree.follow(self._trained_params, first=bool(self.phase == IDLE))

    def adopt_names(self, state_dict: Mapping[str, Tensor], prefix: str = "") -> None:
        """Let each `ParameterTree` hold the parameters that it holds in a checkpoint, before it is loaded.

        Args:
            state_dict: of the checkpoint.
            prefix: of this module's names in it.
        """
        params = dict(self.net.named_parameters())
        for name, tree in self.named_modules():
            if isinstance(tree, ParameterTree):
                start = f"{prefix}{name}."
                names = {key.removeprefix(start) for key in state_dict if key.startswith(start)}
                tree.adopt({k: p for k, p in params.items() if k.replace(".", "/") in names})

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self.adopt_names(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def memory_bytes(self) -> int:
        """Return the bytes of all that the algorithm keeps of past tasks: anchors, samples, logits, ..."""
        common = {"task_index", "phase", "known", "mask", "scale", "shift"}
        foreign = ("net.", "metrics.", *(f"{name}." for name in self.trained()))
        tensors = chain(self.named_parameters(), self.named_buffers())
        own = (a for name, a in tensors if not name.startswith(foreign) and name not in common)
        return sum(a.nbytes for a in own)

    def as_batch(self, batch: Any) -> Batch:
        """Return a loader's batch, `(x, y)`, `(x, y, t)` or a Batch, as a Batch.

        Raises:
            ValueError: any other batch, or a t that is not an integer tensor `[B]`.
        """
        planned = type(batch) is Batch
        if planned or (isinstance(batch, (tuple, list)) and len(batch) == 3):
            x, y, t = batch[:3]
            if not are_task_indices(t, y):
                raise unknown_batch(batch[:3])
            if t.dtype == torch.uint8:  # which torch would take for a mask
                t = t.long()
            y = widened(y)
            return batch._replace(y=y, t=t) if planned else Batch(x, y, t)
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise unknown_batch(batch)
        x, y = batch
        y = widened(y)
        trainer: Any = self._trainer
        ahead = (
            trainer is not None
            and trainer.state.fn == "fit"
            and (not self._fitting or trainer.sanity_checking)
        )
        if ahead and self.phase != TRAINING:  # a tuner, fast_dev_run, or the check before the task has begun
            return Batch(x, y, torch.full((len(y),), self._next_task(), device=self.device))
        return Batch(x, y, self.task_index.clamp(min=0).expand(len(y)))

    # -- Lightning: training

    def setup(self, stage: str) -> None:
        """Refuse what is not supported; let the loggers' x-axis go on where the last Trainer's ended."""
        check_single_device(self.trainer)
        self._put_back(before_fit=stage == "fit")
        first = int(stage == "fit")  # the number of a fit's first step; Lightning would begin every fit at 0
        self.trainer.fit_loop.epoch_loop._batches_that_stepped = self.running_metrics.steps_done + first
        self._fitting = False
        self._trained_params = {}

    def configure_callbacks(self) -> list[Any]:
        """Add none; raise ValueError for a Trainer or a callback that the method cannot work with."""
        trainer: Any = self.trainer
        if trainer.state.fn == "fit":
            check_spoiling(trainer.callbacks)
        clip, accumulate = trainer.gradient_clip_val, trainer.accumulate_grad_batches
        for name, value, unused in (
            ("gradient_clip_val", clip, not clip),
            ("accumulate_grad_batches", accumulate, accumulate == 1),
            ("precision", trainer.precision, getattr(trainer.precision_plugin, "scaler", None) is None),
        ):
            if not (self.automatic_optimization or unused) and trainer.state.fn == "fit":
                raise ValueError(
                    f"{self.algorithm_hparams.name} takes its steps itself: leave the Trainer's {name} out, "
                    f"got {value}; {self.clipping_setting} is what clips"
                )
        searches = any(isinstance(callback, LearningRateFinder) for callback in trainer.callbacks)
        if searches and not self.automatic_optimization:
            raise ValueError(
                f"{self.algorithm_hparams.name} takes its steps itself, so that Lightning's learning-rate "
                "finder would measure a single rate; set the rate in the optimizer factory"
            )
        return []

    def configure_optimizers(self) -> Any:
        """Return what the factory made, with the task's learning rate and, unless reset, the last state.

        Raises:
            ValueError: the fit would leave the task before it unconsolidated.
        """
        self._resumes = self.trainer.ckpt_path is not None  # here, because a tuner's search sets it later
        check_task(self, self._resumes)
        names, hparams = self._names_of_trained(), self.algorithm_hparams
        if not names:
            raise ValueError(
                f"{hparams.name} needs a parameter to train, got a network whose parameters all have "
                "requires_grad=False; call requires_grad_() on what is to be trained"
            )
        configured = make_optimizer(self.optimizer_factory, ((name, p) for p, name in names.items()))
        if not isinstance(configured, Optimizer):
            if not self.automatic_optimization:
                raise ValueError(f"{hparams.name} takes its steps itself, without a scheduler; leave it out")
            if hparams.lr_decay != 1.0:
                raise ValueError(
                    f"lr_decay={hparams.lr_decay} and a learning-rate scheduler both set the learning rate; "
                    "use lr_decay=1 or an optimizer alone"
                )
            if self.lr is not None:
                raise ValueError(
                    f"module.lr={self.lr} and a learning-rate scheduler both set the learning rate; give the "
                    "factory this rate and set module.lr=None"
                )
            return configured
        rates = [group["lr"] if self.lr is None else self.lr for group in configured.param_groups]
        if self._carried_optimizer is not None and not hparams.reset_optimizer:
            carried = copy.deepcopy(self._carried_optimizer)  # the optimizer would share the tensors
            carry_over(carried, configured, names)
        task = int(self.task_index) if self.phase == TRAINING else self._next_task()
        for group, rate in zip(configured.param_groups, rates, strict=True):
            group["lr"] = rate * hparams.learning_rate_factor(task, rate) if hparams.lr_decay != 1.0 else rate
        return configured

    def on_fit_start(self) -> None:
        """Refuse an unfit Trainer; from here on hooks belong to a real fit, before it to a tuner."""
        trainer: Any = self.trainer
        spent_epochs = trainer.max_epochs not in (None, -1) and trainer.current_epoch >= trainer.max_epochs
        spent_steps = trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps
        if trainer.ckpt_path is None and (spent_epochs or spent_steps):
            raise ValueError(
                f"this Trainer is spent: max_epochs={trainer.max_epochs} or max_steps={trainer.max_steps} is "
                "reached, so fit would train nothing; make a new Trainer for each task"
            )
        if self.phase != TRAINING:
            self._next_task()
        self._fitting = not trainer.fast_dev_run
        if self._fitting and self.algorithm_hparams.consolidate == "best":
            check_best_keeper(self, self._resumes)

    def on_train_start(self) -> None:
        """Begin the next task, unless this fit resumes one."""
        running, generators = self.running_metrics, self._generators
        running.unchecked, running.warned, self._generators, self._kept = True, False, [], None
        running.known = (
            self.known if self.next_task() is None else None
        )  # built-in streams are checked already
        if self.metrics is not None:
            self.metrics.reset()
        self.follow_trained()
        if self._fitting and self.phase == TRAINING and self._resumes:
            running.move(self.device)
            if generators:
                torch.set_rng_state(generators[0])
            for device, state in enumerate(generators[1:]):
                torch.cuda.set_rng_state(state, device)
            return
        running.clear()
        if self._fitting and self.phase != TRAINING:
            running.task_start = running.begun_at = running.steps_done
            self.task_index.fill_(self._next_task())
            self.phase.fill_(TRAINING)
            self.start_task()

    def on_train_epoch_start(self) -> None:
        """Follow the trained parameters: a callback may unfreeze some, as `BaseFinetuning` does here."""
        self.follow_trained()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch; the means of several steps are logged at the Trainer's log interval."""
        batch, running = self.as_batch(batch), self.running_metrics
        if running.unchecked:
            if self._fitting and self.phase != TRAINING:
                raise ValueError(
                    "on_train_start did not begin the task; if a subclass overrides it, call "
                    "super().on_train_start() there"
                )
            check_batch(batch, running.known)
            running.unchecked = False
        loss, logits = self.objective(batch)
        if self.metrics is not None:
            self.metrics.update(logits.detach(), batch.y)
        trainer: Any = self.trainer
        running.add(loss.detach(), logits.detach(), batch.y, batch.t)
        done, interval = trainer.fit_loop.total_batch_idx + 1, trainer.log_every_n_steps  # of the whole task
        if (interval and done % interval == 0) or batch_idx + 1 == trainer.num_training_batches:
            self._make_report()
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Let the learner look at the step, unless it is a tuner's."""
        if self.running_metrics.after_step is not None and self._fitting:
            self.running_metrics.after_step(self.trainer, batch_idx)

    def on_train_end(self) -> None:
        """Do the end-of-task work, once."""
        if self._fitting and self.phase == TRAINING:
            if self.running_metrics.waiting or self.running_metrics.counts is not None:
                self.running_metrics.make_report({})  # for a label that is not of its task
            self._consolidate()

    def on_fit_end(self) -> None:
        """Do the end-of-task work of a task that was resumed from a checkpoint made after its last step."""
        if self._fitting and self._resumes and self.phase == TRAINING:
            self._consolidate()
        self._fitting = False
        self._trained_params = {}

    def teardown(self, stage: str) -> None:
        """After an evaluation of a file, put the module's own state back if the weights are the same."""
        self._put_back(before_fit=False)

    def consolidate_task(self, batches: Iterable[Any] | pl.LightningDataModule) -> None:
        """Do the end-of-task work of a task whose fit did not, at the weights that the module has now.

        That is a task whose fit ended with an error, or the task of a checkpoint that was loaded. The next
        fit then begins the next task:

            module = EWC.load_from_checkpoint(keep.best_model_path, ...)
            module.consolidate_task(loader)

        Args:
            batches: of the task's training samples, each sample once, as `fit` takes them: a loader or any
                iterable that ends, of `(x, y)` or `(x, y, t)`; or a data module such as TaskDataModule.

        Raises:
            ValueError: no task is open, the data module is of another task, or the method sums up importances
                along the steps of the training (SI).
        """
        check_open_task(self)
        task = getattr(batches, "task", None)
        if isinstance(task, Task) and task.index != self.task_index:
            raise ValueError(
                f"consolidate_task ends task {int(self.task_index)}, got data of task {task.index}; give "
                "samples of the task that was trained last"
            )
        loader: Any = batches.train_dataloader() if isinstance(batches, pl.LightningDataModule) else batches
        self._end_task(loader.consolidation_batches() if hasattr(loader, "consolidation_batches") else loader)

    # -- Lightning: evaluation

    def on_validation_epoch_start(self) -> None:
        """Begin the scores of the validation samples."""
        self._scores = TaskScores("val", self.metrics)

    def on_test_epoch_start(self) -> None:
        """Begin the scores of the test samples."""
        self._scores = TaskScores("test", self.metrics)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int | None = None) -> None:
        """Add a batch to the scores of its tasks.

        A batch without task indices belongs to the current task. If there are several loaders, it belongs to
        the task with the index of its loader.
        """
        if dataloader_idx is not None:
            batch = with_loaders_task(batch, dataloader_idx, self.spec)
        batch = self.as_batch(batch)
        if batch_idx == 0:
            check_tasks(batch.t, self.known)
            if self.mask is not None:  # logits of other classes are masked, so the loss would be huge
                check_batch(batch, self.known)
        self._scores.update(self.predict(batch.x, batch.t), batch.y, batch.t)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int | None = None) -> None:
        """Add a batch to the scores of its tasks, as `validation_step` does."""
        self.validation_step(batch, batch_idx, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        """Log `val/accuracy`, `val/accuracy/task_<j>`, and the loss and the user's metrics alike."""
        self._log_scores()

    def on_test_epoch_end(self) -> None:
        """Log `test/accuracy`, `test/accuracy/task_<j>`, and the loss and the user's metrics alike."""
        self._log_scores()

    def _log_scores(self) -> None:
        for name, value in self._scores.compute().items():
            self.log(name, value, prog_bar="/task_" not in name)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Return what `predict` returns for a batch `x`, `(x,)`, `(x, y)`, `(x, y, t)` or a Batch."""
        if isinstance(batch, Tensor):
            return self.predict(batch)
        if isinstance(batch, Batch) or len(batch) > 2:
            batch = self.as_batch(batch)
            return self.predict(batch.x, batch.t)
        return self.predict(batch[0])

    # -- Lightning: checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what is not a buffer: the step count, what is not yet reported, the carried optimizer state."""
        checkpoint["sequel"] = {
            **self.running_metrics.state(),
            "lr": self.lr,
            "carried_optimizer": self._carried_optimizer,
            "consolidated_at": self._consolidated_at,
            "generators": self._generators or [torch.get_rng_state(), *torch.cuda.get_rng_state_all()],
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Read back what `on_save_checkpoint` added; keep a consolidated state if this is an evaluation."""
        found = checkpoint.get("sequel", {})
        if "waiting" not in found:
            raise ValueError("the checkpoint was not written by a ContinualModule of this version of sequel")
        fn = None if self._trainer is None else self._trainer.state.fn
        if fn == "fit":
            check_resumed_file(self, checkpoint)
        evaluates = fn in ("validate", "test", "predict")
        if evaluates and self._kept is None and self.phase == CONSOLIDATED:
            self._kept = keep(self)
        if not evaluates:
            self.lr = found.get("lr")
        self.running_metrics.load(found)
        self._carried_optimizer = found["carried_optimizer"]
        self._consolidated_at = found["consolidated_at"]
        self._generators = found["generators"] if fn == "fit" else []

    # -- parts of the above

    def _next_task(self) -> int:
        task = self.next_task()
        index = int(self.task_index) + 1 if task is None else task.index
        if self.spec is not None and index >= self.spec.num_tasks:
            raise ValueError(
                f"fit would begin task {index}, but the spec has tasks 0 to {self.spec.num_tasks - 1} only; "
                "make the module with the spec of the whole stream"
            )
        return index

    def next_task(self) -> Task | None:
        """Return the task that this fit trains on; None where the loaders are of another kind than ours."""
        if self.running_metrics.next_task is not None:
            return self.running_metrics.next_task
        task = getattr(getattr(self.trainer, "datamodule", None), "task", None)
        return task if isinstance(task, Task) else None

    def _make_report(self) -> None:
        extra = {k: float(v) for k, v in self.metrics.compute().items()} if self.metrics is not None else {}
        report = self.running_metrics.make_report(extra)
        if self.metrics is not None:
            self.metrics.reset()
        if self._fitting:
            self.running_metrics.warn(int(self.task_index))
        scores = {"train/loss": report.loss, "train/accuracy": report.accuracy, **extra}
        if self.has_penalty:
            scores["train/penalty"] = report.penalty
        trainer: Any = self.trainer
        if trainer.callbacks:  # the progress bar reads them; Lightning then looks at each at every step
            self.log_dict(scores, prog_bar=True, logger=False)
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in scores.items()})
        for logger in (
            self.loggers if self.running_metrics.after_step is None else ()
        ):  # else the orchestrator logs
            logger.log_metrics(scores, step=trainer.fit_loop.epoch_loop._batches_that_stepped)

    def _prepared(self, batch: Any) -> Batch:
        """Return a loader's batch as a training step gets it: converted, moved, through the batch hooks."""
        if self._trainer is not None:
            batch = self._trainer.precision_plugin.convert_input(batch)
            batch = self._trainer.strategy.batch_to_device(self._on_before_batch_transfer(batch), self.device)
        else:
            batch = self.transfer_batch_to_device(self.on_before_batch_transfer(batch, 0), self.device, 0)
            batch = self.on_after_batch_transfer(batch, 0)
        return self.as_batch(batch)

    def _put_back(self, before_fit: bool) -> None:
        if self._kept is not None and put_back(self, self._kept, before_fit):
            self._kept = None

    def _names_of_trained(self) -> dict[nn.Parameter, str]:
        """Return the name of each trained parameter, of the network and of what else is trained."""
        return {
            p: f"{part}.{name}" if part else name
            for part, module in self.trained().items()
            for name, p in module.named_parameters()
            if p.requires_grad
        }

    def _consolidate(self) -> None:
        if self.algorithm_hparams.consolidate == "best":
            take_best(self)
        read = self.running_metrics.steps_done - self.running_metrics.task_start
        self._end_task(consolidation_batches(self.trainer, read))
        optimizers = self.trainer.optimizers
        if not self.algorithm_hparams.reset_optimizer and len(optimizers) == 1:
            self._carried_optimizer = named_state(optimizers[0], self._names_of_trained())

    def _end_task(self, batches: Iterable[Any]) -> None:
        self.follow_trained()
        weights = fingerprint(self)
        plugin = None if self._trainer is None else self._trainer.precision_plugin
        with evaluating(self), torch.enable_grad(), plugin.forward_context() if plugin else nullcontext():
            self.end_task(checked_batches(map(self._prepared, batches), int(self.task_index), self.known))
        self._consolidated_at, self._kept = weights, None
        self.phase.fill_(CONSOLIDATED)


def named_state(optimizer: Optimizer, names: Mapping[nn.Parameter, str]) -> dict[str, Any]:
    """Return the state of an optimizer, with the name of each of its parameters."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return {**optimizer.state_dict(), "names": [names.get(p, str(i)) for i, p in enumerate(params)]}


def carry_over(carried: dict[str, Any], optimizer: Optimizer, names: Mapping[nn.Parameter, str]) -> None:
    """Load a state that `named_state` returned; for another set of parameters, the state of those it has."""
    own = named_state(optimizer, names)
    same_groups = len(carried["param_groups"]) == len(own["param_groups"])
    if carried.setdefault("names", own["names"]) != own["names"] or not same_groups:
        index = {name: i for i, name in enumerate(carried["names"])}
        states = {i: carried["state"].get(index.get(name)) for i, name in enumerate(own["names"])}
        carried = {**own, "state": {i: state for i, state in states.items() if state is not None}}
    optimizer.load_state_dict(carried)


def check_single_device(trainer: pl.Trainer) -> None:
    """Raise ValueError for a Trainer of more than one process: importances would differ between them."""
    if trainer.world_size > 1:
        raise ValueError(
            f"data-parallel training is not supported yet, got world_size={trainer.world_size}; use devices=1"
        )


def mask_logits(logits: Tensor, mask: Tensor) -> Tensor:
    """Return the logits `[B, num_classes]` with the least number of their dtype where the mask is False."""
    return logits.masked_fill(~mask, torch.finfo(logits.dtype).min)


def check_logits(logits: Any, t: Any, mask: Tensor | None) -> None:
    """Raise ValueError unless logits are `[B, num_classes]` and t `[B]`; `mask` is that of the stream."""
    found: tuple[int, ...] = getattr(logits, "shape", ())
    if len(found) == 2 and (mask is None or (t.shape == found[:1] and found[1] == mask.shape[1])):
        return
    shown, tasks = (list(getattr(a, "shape", ())) or type(a).__name__ for a in (logits, t))
    classes = "num_classes" if mask is None else mask.shape[1]
    raise ValueError(
        f"the network must return one row of logits for each sample, [B, {classes}], for task indices t [B]; "
        f"got logits {shown} and t {tasks}; reduce a sequence to one prediction in the network (its mean or "
        "its last position), and give one task index for each sample"
    )


def blank_image(spec: StreamSpec, like: Tensor) -> Tensor:
    """Return one input of zeros `[1, C, H, W]` as `normalise` makes it for weights of the dtype of `like`."""
    height, width, channels = spec.image_shape
    dtype = getattr(torch, spec.image_dtype)
    if dtype == torch.uint8 or dtype.is_floating_point:
        dtype = torch.get_default_dtype() if is_lazy(like) else like.dtype
    return torch.zeros((1, channels, height, width), dtype=dtype, device=like.device)


def check_arguments(net: Any, spec: Any) -> None:
    """Raise ValueError unless the network is a module with parameters, and the spec a StreamSpec or None."""
    if not isinstance(net, nn.Module) or next(net.parameters(), None) is None:
        found = f"a {type(net).__name__}" + (" without any" if isinstance(net, nn.Module) else "")
        raise ValueError(f"net must be a torch.nn.Module with parameters, got {found}")
    if spec is not None and not isinstance(spec, StreamSpec):
        raise ValueError(
            f"spec must be a StreamSpec or None, got a {type(spec).__name__}; pass benchmark.spec"
        )


def check_network(net: nn.Module, spec: StreamSpec) -> None:
    """Show the network an image of the stream, which also initialises lazy layers.

    Raises:
        ValueError: it cannot take the image, or does not return `[B, num_classes]`.
    """
    image = blank_image(spec, next(net.parameters()))
    shape = image.shape
    try:
        with evaluating(net), torch.no_grad():
            logits = net(image)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise ValueError(
            f"the network must take images {list(shape)}, the stream's, as [B, C, H, W]: "
            f"{' '.join(str(error).split())}; make it for images {list(spec.image_shape)}"
        ) from error
    found = list(getattr(logits, "shape", ()))
    if found != [1, spec.num_classes]:
        raise ValueError(
            f"the network must return logits [B, {spec.num_classes}] for images {list(shape)}, got {found} "
            f"for B=1; set num_classes={spec.num_classes}"
        )


def check_features(net: nn.Module, name: str) -> None:
    """Raise ValueError where the network lacks `features` or `head`, which a method of that name asks for."""
    for part, what in (("features", "a method features(x), the last hidden layer"), ("head", "a head")):
        if not callable(getattr(net, part, None)):
            raise ValueError(
                f"{name} needs a network with {what}, so that net(x) is net.head(net.features(x)); "
                f"{type(net).__name__} has no {part}"
            )


def frozen_network(net: nn.Module) -> tuple[Params, Params]:
    """Return the weights and the running statistics of a network that is kept, by name."""
    return dict(net.named_parameters()), dict(net.named_buffers())


def check_no_batch_stats(net: nn.Module, name: str, reason: str) -> None:
    """Raise ValueError where the network has running statistics, which a method cannot follow."""
    if any(getattr(module, "running_mean", None) is not None for module in net.modules()):
        raise ValueError(
            f"{name} cannot train a network with batch normalisation: {reason}; use group normalisation "
            "(backbone.norm=group) or another method"
        )


def apply_head(module: Any, features: Tensor) -> Tensor:
    """Return the logits `[B, num_classes]` that a network's last layer makes of features `[B, D]`."""
    logits: Tensor = module.head(features)
    return logits


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode for a while; afterwards every submodule has the mode that it had."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for submodule, training in modes:
            submodule.training = training


@contextmanager
def modes_kept_at_errors(module: nn.Module) -> Iterator[None]:
    """After an error, give every submodule the mode that it had, which Lightning's validation does not."""
    modes = [(m, m.training) for m in module.modules()]
    try:
        yield
    except BaseException:
        for submodule, training in modes:
            submodule.training = training
        raise
