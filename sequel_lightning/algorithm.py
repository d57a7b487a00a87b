"""Algorithm: a network, and the hooks in which a continual-learning method differs from plain training.

The twin is `sequel_flax.bundle.Algorithm`. `ContinualModule` adds the hooks of Lightning that call these.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MetricCollection

from sequel_core.hparams import AlgorithmHParams
from sequel_core.stream.augmentation import augmenting
from sequel_core.stream.benchmark import StreamSpec
from sequel_core.stream.planner import NoPlanner
from sequel_core.stream.task import AnySplit, Batch
from sequel_lightning.augmentation import cropped
from sequel_lightning.batches import to_batch
from sequel_lightning.consolidation import IDLE
from sequel_lightning.lifecycle import TaskLifecycle
from sequel_lightning.networks import check_arguments, check_network
from sequel_lightning.optimizers import OptimizerFactory, check_factory
from sequel_lightning.preprocessing import Preprocessing
from sequel_lightning.reporting import Reporting, RunningMetrics
from sequel_lightning.scores import check_metrics
from sequel_lightning.settings import accept_plain_values, check_hparams, plain_hparams, plain_spec
from sequel_lightning.trees import Params


class Algorithm(pl.LightningModule):
    """A network and what a method does with it; see `ContinualModule` for the arguments."""

    hparams_class: type[AlgorithmHParams]
    clipping_setting: str = ""  # the method's setting that clips gradients, if it takes its steps itself
    has_penalty = False  # whether the method adds terms to the task's own loss, see `added`
    path_integrals: ClassVar[tuple[str, ...]] = ()  # trees that are summed over all steps of a task
    moving_trees: ClassVar[tuple[str, ...]] = ()  # other trees that change with the weights at every step
    task_index: Tensor
    phase: Tensor

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
        """Build the module.

        `hparams` and `spec` may also be dictionaries of plain values, as in checkpoints.

        Args:
            net: the network. It is called with images `[B, C, H, W]`, or whatever the loaders yield, and
                returns logits `[B, num_classes]`. Parameters with `requires_grad` are trained.
            optimizer: factory that is called with the trained parameters at the start of each task, for
                example `partial(torch.optim.SGD, lr=0.1)`. It returns an optimizer, or whatever
                `configure_optimizers` may return. If it has a parameter `named_parameters`, it gets pairs of
                name and parameter.
            hparams: settings of the method; by default those of its settings class.
            spec: of the stream, `benchmark.spec`: the shape and normalisation of images, the number of tasks
                and the classes of each. Without it, logits are not masked, images must be normalised, and
                methods that keep samples cannot be used.
            metrics: a torchmetrics.MetricCollection, updated with `(logits, labels)` at every training step.
                It is logged and reset with the loss. Copies of it score validation and test samples.
            seed: of the plan, for methods that choose samples; >= 0.

        Raises:
            ValueError: the network does not take the stream's images or does not return
                `[B, num_classes]`; the method cannot train the network; the settings are of another method
                or do not fit the stream; an argument has the wrong type.
        """
        super().__init__()
        check_factory(optimizer)
        check_metrics(metrics)
        check_arguments(net, spec)
        self.check_net(net)
        check_network(net, spec)
        self.algorithm_hparams = check_hparams(type(self), hparams, spec)
        self.net = net
        self.optimizer_factory = optimizer
        self.spec = spec
        self.metrics = metrics
        self.seed = seed
        self.lr: float | None = None  # replaces the factory's learning rate; a tuner's `lr_find` sets it
        plain = None if spec is None else plain_spec(spec)
        self.save_hyperparameters(
            {"hparams": plain_hparams(self.algorithm_hparams), "spec": plain, "seed": seed}
        )
        self.automatic_optimization = not self.clipping_setting
        self.register_buffer("task_index", torch.tensor(-1))
        self.register_buffer("phase", torch.tensor(IDLE))
        self.preprocessing = Preprocessing(spec, next(net.parameters()), self.algorithm_hparams.name)
        self.running_metrics = RunningMetrics()
        self.reporting = Reporting(self)
        self.lifecycle = TaskLifecycle(self)
        self._trained_params: Params = {}  # `params()` during a fit, as listing them is slow in deep networks
        self.init_memory()
        self.planner = NoPlanner() if spec is None else augmenting(self.make_planner(spec), spec, seed)

    # -- what subclasses override, in the order of the Flax bundle

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

    def objective(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the training loss of a batch, shape (), and its logits `[B, num_classes]`."""
        batch = self.trained_on(batch)
        logits = self.forward(batch.x, batch.t)
        return self.loss(logits, batch), logits

    def end_task(self, batches: Iterable[Batch]) -> None:
        """Consolidate the task, from batches of its training samples, each sample once."""

    def predict(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        """Return the logits `[B, num_classes]` that are evaluated."""
        return self.forward(x, t)

    def alternatives(self, x: Tensor, t: Tensor | None = None) -> dict[str, Tensor]:
        """Return the logits `[B, num_classes]` of other ways to predict, by name."""
        return {}

    def training_split(self, split: AnySplit) -> AnySplit:
        """Return what the next task trains on: its training samples, or these joined with others."""
        return split

    def make_planner(self, spec: StreamSpec) -> Any:
        """Return the planner of the method's steps, without the augmentation of samples."""
        return NoPlanner()

    def trained(self) -> dict[str, nn.Module]:
        """Return the modules that the optimizer trains, by name; the network's name is empty."""
        return {"": self.net}

    # -- batches

    def as_batch(self, batch: Any) -> Batch:
        """Return a loader's batch, `(x, y)`, `(x, y, t)` or a Batch, as a Batch.

        Raises:
            ValueError: any other batch, or a t that is not an integer tensor `[B]`.
        """
        return to_batch(batch, self.lifecycle.task_indices)

    def planned(self, batch: Batch) -> Batch:
        """Return the batch with its plan; a tuner or `fast_dev_run` leaves the planner unchanged."""
        if isinstance(self.planner, NoPlanner):
            return batch
        planner = self.planner if self.lifecycle.fitting else copy.deepcopy(self.planner)
        return batch._replace(plan=planner.next(batch.y.cpu().numpy(), batch.t.cpu().numpy()))

    def trained_on(self, batch: Batch) -> Batch:
        """Return the batch with its plan, augmented if the stream is."""
        return cropped(self.planned(batch))

    def added(self, penalty: Tensor) -> Tensor:
        """Return a penalty, shape (), unchanged, and count it for `train/penalty`."""
        self.running_metrics.penalties.append(penalty.detach())
        return penalty

    # -- the network

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        """Return the logits `[B, num_classes]`, masked to the task of each sample in the task scenario.

        Args:
            x: images `[B, C, H, W]`, or whatever the network takes; see `normalise`.
            t: task index of each sample `[B]`; needed in the task scenario only.

        Raises:
            ValueError: t is None in the task scenario.
        """
        return self.masked(self.network(x), t)

    def network(self, x: Tensor) -> Tensor:
        """Return the logits of all classes `[B, num_classes]`, unmasked."""
        logits: Tensor = self.net(self.normalise(x))
        return logits

    def normalise(self, x: Tensor) -> Tensor:
        """Return inputs as the network takes them; see `Preprocessing.normalise`."""
        return self.preprocessing.normalise(x)

    def masked(self, logits: Tensor, t: Tensor | None) -> Tensor:
        """Return the logits, masked in the task scenario; see `Preprocessing.masked`."""
        return self.preprocessing.masked(logits, t)

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
