"""Algorithm: a network, and the hooks in which a continual-learning method differs from plain training.

The twin is `sequel_flax.bundle.Algorithm`. `ContinualModule` adds the hooks of Lightning that call these.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection

from sequel_core.hparams import AlgorithmHParams
from sequel_core.objectives import ObjectiveHParams
from sequel_core.stream.augmentation import augmenting
from sequel_core.stream.benchmark import StreamSpec
from sequel_core.stream.phase import PhaseSteps
from sequel_core.stream.planner import AheadPlanner, NoPlanner
from sequel_core.stream.task import AnySplit, Batch
from sequel_lightning.accumulation import Accumulation
from sequel_lightning.augmentation import cropped
from sequel_lightning.batches import to_batch
from sequel_lightning.consolidation import IDLE
from sequel_lightning.distributed import Ranks
from sequel_lightning.lifecycle import TaskLifecycle
from sequel_lightning.network_module import NetworkModule
from sequel_lightning.networks import (
    check_arguments,
    check_network,
    start_task,
    takes_task,
)
from sequel_lightning.objectives import (
    Objective,
    build_objective,
    cross_entropy,
    given,
    mean_of_batch,
    weight_of,
)
from sequel_lightning.optimizers import OptimizerFactory, check_factory
from sequel_lightning.preprocessing import Preprocessing
from sequel_lightning.reporting import Reporting, RunningMetrics
from sequel_lightning.scores import check_metrics
from sequel_lightning.settings import accept_plain_values, check_hparams, plain_hparams, plain_spec
from sequel_lightning.trees import Params


class Algorithm(NetworkModule):
    """A network and what a method does with it; see `ContinualModule` for the arguments."""

    hparams_class: type[AlgorithmHParams]
    clipping_setting: str = ""  # the method's setting that clips gradients, if it takes its steps itself
    has_penalty = False  # whether the method adds terms to the task's own loss, see `added`
    has_second_phase = False  # whether the method trains on samples of its memory at the end of a task
    objective_elsewhere: str = ""  # what else than the training step takes the loss from the objective
    path_integrals: ClassVar[tuple[str, ...]] = ()  # trees that are summed over all steps of a task
    moving_trees: ClassVar[tuple[str, ...]] = ()  # other trees that change with the weights at every step
    network_copies: ClassVar[tuple[str, ...]] = ()  # copies of the network that the method keeps
    phase: Tensor
    phase_step: Tensor

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
        objective: Objective | None = None,
    ) -> None:
        """Build the module.

        `hparams` and `spec` may also be dictionaries of plain values, as in checkpoints.

        Args:
            net: the network. It is called with images `[B, C, H, W]`, or whatever the loaders yield; the
                arrays of a dict are keyword arguments. It returns logits `[B, num_classes]`, or what the
                objective takes. If its `forward` has an argument t and the task is given (the task scenario
                or `task_given=True`), it is called with the task index of each sample. Parameters with
                `requires_grad` are trained. If it has a method `start_task(task)`, this is called once for
                each task, in order, before the optimizer of the task is made: for task 0 here, then at the
                start of each fit. It may add parameters.
            optimizer: factory that is called with the trained parameters at the start of each task, for
                example `partial(torch.optim.SGD, lr=0.1)`. It returns an optimizer, or whatever
                `configure_optimizers` may return. If it has a parameter `named_parameters`, it gets pairs of
                name and parameter.
            hparams: settings of the method; by default those of its settings class.
            spec: of the stream, `benchmark.spec`: the shapes of inputs and targets, the normalisation of
                images, the number of tasks and the classes of each. Without it, logits are not masked, images
                must be normalised, and methods that keep samples cannot be used.
            metrics: a torchmetrics.MetricCollection, updated with `(outputs, targets)` at every training
                step. It is logged and reset with the loss. Copies of it score validation and test samples.
            seed: of the plan, for methods that choose samples; >= 0.
            objective: the loss and the score; None for a built-in one that fits the targets of the stream:
                cross-entropy for class labels, the squared error for numbers, ...

        Raises:
            ValueError: the network does not take the stream's inputs, or its outputs do not fit the
                objective; the method cannot train the network or use the objective; the settings are of
                another method or do not fit the stream; an argument has the wrong type.
        """
        super().__init__()
        check_factory(optimizer)
        check_arguments(net, spec)
        self.algorithm_hparams = check_hparams(type(self), hparams, spec)
        self.objective = chosen_objective(objective, spec)
        check_metrics(metrics, self.objective.score.key)
        self.check_objective(self.objective)
        start_task(net, 0)
        self.check_net(net)
        self.gives_task = takes_task(net, self.algorithm_hparams, spec)
        check_network(net, spec, self.objective, self.gives_task)
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
        if self.has_second_phase:  # its steps in the current task that were taken
            self.register_buffer("phase_step", torch.tensor(0, dtype=torch.int32))
        self.preprocessing = Preprocessing(
            spec, next(net.parameters()), self.algorithm_hparams.name, self.objective.classification
        )
        self.running_metrics = RunningMetrics(self.objective)
        self.reporting = Reporting(self, self.objective)
        self.lifecycle = TaskLifecycle(self)
        self.accumulation = Accumulation()
        self.ranks = Ranks()
        self._trained_params: Params = {}  # `params()` during a fit, as listing them is slow in deep networks
        self.init_memory()
        planner = NoPlanner() if spec is None else augmenting(self.make_planner(spec), spec, seed)
        self.planner: Any = planner if isinstance(planner, NoPlanner) else AheadPlanner(planner)

    # -- what subclasses override, in the order of the Flax bundle

    def check_net(self, net: nn.Module) -> None:
        """Raise ValueError if the method cannot train this network; the settings are set by then."""

    def check_objective(self, objective: Objective) -> None:
        """Raise ValueError if the method cannot use the objective; the settings are set by then."""
        owner = next(cls for cls in type(self).__mro__ if "loss" in vars(cls))
        if self.objective_elsewhere and not owner.__module__.startswith("sequel_lightning."):
            raise ValueError(
                f"{owner.__name__} must not override loss(), because {self.algorithm_hparams.name} computes "
                f"the loss for {self.objective_elsewhere} too; pass objective=... instead"
            )

    def init_memory(self) -> None:
        """Build what the method keeps: buffers, parameter trees, copies of the network.

        The constructor calls it once. `net`, `algorithm_hparams`, `spec` and `seed` are set by then.
        """

    def start_task(self) -> None:
        """Begin task `self.task_index`."""

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """Return the training loss of a batch, shape (): the objective's mean loss; subclasses add to it.

        Args:
            outputs: what the network returned for `batch.x`.
            batch: whose loss is computed.
        """
        model = given(outputs, batch.x, lambda x: self.forward(x, batch.t))
        return mean_of_batch(self.objective, model, batch)

    def training_loss(self, batch: Batch) -> tuple[Tensor, Any]:
        """Return the training loss of a batch, shape (), and what the network returned for it."""
        batch = self.trained_on(batch)
        outputs = self.forward(batch.x, batch.t)
        return self.loss(outputs, batch), outputs

    def loss_weight(self, batch: Batch) -> Any:
        """Return the weight of a batch's training loss in a mean over accumulated batches, shape ()."""
        return weight_of(self.objective, batch, len(batch.t))

    def phase_steps(self) -> PhaseSteps:
        """Return the steps of the second phase that are left."""
        raise TypeError(f"{type(self).__name__} has a second phase, so it has to override phase_steps()")

    def start_phase(self) -> None:
        """Begin the second phase of the task."""

    def take_phase_step(self, step: PhaseSteps) -> tuple[Tensor, Any, Batch]:
        """Take a step of the second phase.

        Args:
            step: one of `phase_steps()`.

        Returns:
            The loss, shape (), the outputs of the network, and the samples of the step.
        """
        raise TypeError(f"{type(self).__name__} has a second phase, so it has to override take_phase_step()")

    def end_task(self, batches: Iterable[Batch]) -> None:
        """Consolidate the task, from batches of its training samples, each sample once."""

    def predict(self, x: Any, t: Tensor | None = None) -> Any:
        """Return the outputs that are evaluated, such as logits `[B, num_classes]`."""
        return self.forward(x, t)

    def alternatives(self, x: Any, t: Tensor | None = None) -> dict[str, Any]:
        """Return the outputs of other ways to predict, by name."""
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
        """Return a loader's batch, `(x, y)`, `(x, y, t)`, a dict or a Batch, as a Batch; see `to_batch`.

        Raises:
            ValueError: any other batch, a t that is not an integer tensor `[B]`, or an array whose shape or
                dtype is not that of the spec.
        """
        result = to_batch(batch, self.lifecycle.task_indices, self.objective.target)
        self.preprocessing.check_leaves(result)
        return result

    def planned(self, batch: Batch) -> Batch:
        """Return the batch with its plan; a tuner or `fast_dev_run` leaves the planner unchanged."""
        if isinstance(self.planner, NoPlanner):
            return batch
        planner = self.planner if self.lifecycle.fitting else copy.deepcopy(self.planner)
        y = batch.y.cpu().numpy() if self.preprocessing.labelled else None
        return batch._replace(plan=planner.next(y, batch.t.cpu().numpy()))

    def plan_ahead(self, y: Any, t: Any) -> None:
        """Plan the steps of the coming batches.

        Args:
            y: their targets `[steps, B, ...]`, on the host.
            t: their task indices `[steps, B]`, on the host.
        """
        if isinstance(self.planner, AheadPlanner):
            self.planner.prepare(y if self.preprocessing.labelled else None, t)

    def trained_on(self, batch: Batch) -> Batch:
        """Return the batch with its plan, augmented if the stream is."""
        return cropped(self.planned(batch))

    def added(self, penalty: Tensor) -> Tensor:
        """Return a penalty, shape (), unchanged, and count it for `train/penalty`."""
        self.running_metrics.penalties.append(penalty.detach())
        return penalty


def chosen_objective(objective: Objective | None, spec: StreamSpec | None) -> Objective:
    """Return the objective, by default the built-in one for the targets of the stream.

    Raises:
        ValueError: it is no Objective, or none is built in for these targets.
    """
    if objective is None:
        return cross_entropy() if spec is None else build_objective(ObjectiveHParams(), spec)
    if not isinstance(objective, Objective):
        raise ValueError(
            f"objective must be an Objective or None, got a {type(objective).__name__}; make one with "
            "from_outputs(loss)"
        )
    return objective
