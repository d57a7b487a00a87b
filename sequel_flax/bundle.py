"""An algorithm as a bundle of pure functions of Flax's TrainState, like optax's GradientTransformation.

    state = algorithm.init(ts, spec)
    planner = algorithm.planner(spec, state)
    train_step = jax.jit(algorithm.train_step)
    for task in benchmark.tasks:
        ts, state = algorithm.start_task(ts, state, task)
        for x, y, t in ...:
            ts, state, outputs = train_step(ts, state, Batch(x, y, t, planner.next(y, t)))
        ts, state = algorithm.end_task(ts, state, batches)

The state is always an argument, never a closure: a compiled step that closes over the anchor of task 1 keeps
using it. `(ts, state)` hold everything that later steps depend on, so saving these two is enough to resume.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass, field, fields
from functools import cache, partial
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.training.train_state import TrainState

from sequel_core.hparams import AlgorithmHParams
from sequel_core.objectives import ObjectiveHParams
from sequel_core.stream.augmentation import AugmentedPlan, augmenting
from sequel_core.stream.benchmark import StreamSpec
from sequel_core.stream.images import Augmentation
from sequel_core.stream.planner import NoPlanner, Planner, check_steps, resumed
from sequel_core.stream.task import AnySplit, Batch, Task
from sequel_core.stream.trees import (
    LeafSpec,
    Tree,
    is_image,
    is_label,
    leaves,
    named_leaves,
    specs_of,
    tree_map,
)
from sequel_flax import augmentation, objectives
from sequel_flax.boundaries import PhaseEnd, SecondPhase, StartPlan, given, is_traced, repeated, select
from sequel_flax.foreign import as_called, recording, takes_task, task_argument, with_row_mask
from sequel_flax.objectives import Objective, build_objective, mean_loss, output_leaf
from sequel_flax.optimizers import get_learning_rates, with_learning_rates
from sequel_flax.trainable import Fill, Selection, Trained

Params = Any
Stats = (
    Any  # collections of variables besides the parameters, by name, such as batch_stats; {} if there are none
)
StepOutputs = dict[str, Any]


class BatchStatsTrainState(TrainState):
    """A TrainState with the variables of a network besides its parameters.

    A training step accepts any TrainState with the field `batch_stats`, and one with both fields.

    Args:
        batch_stats: The collection `batch_stats`, the running statistics of batch normalisation; {} if the
            network has none.
        collections: Other collections by name, such as caches. Calls in training mode update them, calls in
            evaluation mode only read them. `create` takes them as keywords.

    Example:
        >>> import optax
        >>> variables = {"params": {"w": jnp.ones(2)}, "batch_stats": {"mean": jnp.zeros(2)}}
        >>> variables["cache"] = {"calls": jnp.zeros((), int)}
        >>> ts = BatchStatsTrainState.create(apply_fn=None, tx=optax.sgd(0.1), **variables)
        >>> ts.batch_stats["mean"].shape, list(ts.collections)
        ((2,), ['cache'])
    """

    batch_stats: Stats
    collections: Stats = flax.struct.field(default_factory=dict)

    @classmethod
    def create(cls, *, batch_stats: Stats | None = None, **variables: Any) -> BatchStatsTrainState:
        """Return a train state; see `flax.training.train_state.TrainState.create`."""
        known = {"apply_fn", "params", "tx", *(spec.name for spec in fields(cls))}
        others = {name: variables.pop(name) for name in [*variables] if name not in known}
        collections = {**variables.pop("collections", {}), **others}
        ts: BatchStatsTrainState = super().create(  # type: ignore[no-untyped-call]
            batch_stats=batch_stats or {}, collections=collections, **variables
        )
        return ts


NOT_STARTED = -2
"""The task index in the state after a step with samples of a task that was not started."""


class StreamState(NamedTuple):
    """The part of the state that all algorithms have.

    Args:
        task: The index of the current task, int32 (); -1 before the first, or `NOT_STARTED`.
        mask: The classes of each task, bool `[T, num_classes]`; None if logits are not masked.
        scale: The factor that normalises uint8 images, `[1, 1, 1, C]`, in the dtype of the parameters.
        shift: The offset that normalises uint8 images, `[1, 1, 1, C]`.
        dropout_key: A key that is folded with `ts.step` in every step.
        learning_rates: Those of the first task; () if they cannot be read from the optimizer.
        augmented: The padding of the crops of training samples, and 1 if they are flipped, int32 `[2]`; None
            if they are not augmented.
        blank: Inputs and targets of one sample, zeros in the shapes and dtypes of the stream, `[1, ...]`.
        classes: The classes of each task in every scenario, bool `[T, num_classes]`; all without labels.
        first_step: `ts.step` at the start of the current task, int32 ().
        num_steps: The number of steps of the current task, int32 (); 0 if it is not known.
        task_given: () if the network may take the task of each sample, else None; see `knows_task`.

    Example:
        >>> StreamState(jnp.int32(-1), None, 1.0, 0.0, None, (), augmented=None, blank=()).augmented is None
        True
    """

    task: jax.Array
    mask: jax.Array | None
    scale: jax.Array
    shift: jax.Array
    dropout_key: jax.Array
    learning_rates: tuple[jax.Array, ...]
    augmented: jax.Array | None
    blank: tuple[Any, Any]
    classes: Any = None
    first_step: Any = 0
    num_steps: Any = 0
    task_given: tuple[()] | None = None


class State(NamedTuple):
    """The state of an algorithm. Its shapes never change, so a step is compiled once.

    Args:
        stream: The part that all algorithms have.
        memory: The part of the method, for example a `QuadraticState`; () if it has none.
        position: The position of the planner, int32 `[n]`; None if steps need no plan.

    Example:
        >>> State(stream=None, memory=()).position is None
        True
    """

    stream: StreamState
    memory: Any
    position: Any = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Model:
    """A network with its objective, for functions of `(params, model, ...)`.

    Args:
        ts: The train state, for the network. Its parameters are not used.
        state: The state of the algorithm.
        objective: What the network is trained on.
        hparams: The settings of the algorithm, if functions need them.

    Example:
        >>> Model(None, None, objectives.cross_entropy()).objective.score.name
        'accuracy'
    """

    ts: Any
    state: Any
    objective: Objective = field(metadata={"static": True})
    hparams: Any = field(default=None, metadata={"static": True})


AnyBatch = Batch | Mapping[str, Any]  # a dict is read by `to_batch`
Init = Callable[[TrainState, StreamSpec], State]
Step = Callable[[TrainState, State, Batch], tuple[TrainState, State, StepOutputs]]
StartTask = Callable[..., tuple[TrainState, State]]
AnyStep = Callable[[TrainState, State, AnyBatch], tuple[TrainState, State, StepOutputs]]
EndTask = Callable[[TrainState, State, Iterable[Batch]], tuple[TrainState, State]]
PlanStart = Callable[[State, Task], Any]
PlanEnd = Callable[[State, Iterable[Batch]], Any]
Apply = Callable[[TrainState, State, Any], tuple[TrainState, State]]
Predict = Callable[[TrainState, State, Any, jax.Array], Any]
Alternatives = Callable[[TrainState, State, Any, jax.Array], StepOutputs]
Prepare = Callable[[TrainState, StreamSpec], TrainState]
TrainingSplit = Callable[[State, AnySplit], AnySplit]


def no_planner(spec: StreamSpec) -> Planner:
    """Return the planner of a method whose steps need no plan.

    Args:
        spec: The specification of the benchmark.

    Example:
        >>> no_planner(None).position is None
        True
    """
    return NoPlanner()


def nothing(state: State, batches: Iterable[Batch]) -> tuple[()]:
    """Return (), the plan for the end of a task of methods that keep nothing of it.

    Args:
        state: The state of the algorithm.
        batches: Batches of the task's samples.

    Example:
        >>> nothing(None, [])
        ()
    """
    return ()


def unchanged(ts: TrainState, state: State, plan: Any) -> tuple[TrainState, State]:
    """Return `(ts, state)`, the end of a task of methods that keep nothing of it.

    Args:
        ts: The train state.
        state: The state of the algorithm.
        plan: The plan for the end of the task.

    Example:
        >>> unchanged(1, 2, ())
        (1, 2)
    """
    return ts, state


class Algorithm(NamedTuple):
    """A continual-learning algorithm as pure functions; `make_algorithm` builds one from a method's parts.

    Args:
        init: `init(ts, spec)` returns the state before the first task.
        start_task: `start_task(ts, state, task, num_steps=None)` is called before the first step of each
            task. `num_steps` is the number of steps of the task, for `task_progress`.
        train_step: `train_step(ts, state, batch)` takes one step. It can be compiled and scanned. The outputs
            are `loss`, `logits` and `labels`. A batch may be a dict; see `to_batch`.
        end_task: `end_task(ts, state, batches)` consolidates the task, from batches of its samples.
        predict: `predict(ts, state, x, t)` returns the outputs of the network, most often logits
            `[B, num_classes]`.
        hparams: The settings.
        planner: `planner(spec, state)` returns the planner of the steps after this state. It makes
            `Batch.plan` on the host.
        plan_start: `plan_start(state, task, num_steps=None)` is the part of `start_task` on the host; see
            `boundaries`.
        apply_start: `apply_start(ts, state, plan)` is the rest. It can be compiled and mapped.
        plan_end: `plan_end(state, batches)` is the part of `end_task` on the host.
        apply_end: `apply_end(ts, state, plan)` is the rest. It can be compiled and mapped.
        prepare: `prepare(ts, spec)` adds the parameters of the method to a new train state.
        training_split: `training_split(state, split)` returns the samples that a task is trained on.
        alternatives: `alternatives(ts, state, x, t)` returns further predictions, by name.
        trained: The parameters that are trained.
        objective: What the network is trained and scored on; None for the built-in objective that fits the
            targets of the stream.
        second_phase: A second training phase at the end of a task, of which `end_task` takes the steps that
            are left; None for a method without one.
        mappable: Whether `plan_end` and `apply_end` do all that `end_task` does.

    Example:
        >>> import optax
        >>> from sequel_benchmarks import RotatedDigits
        >>> from sequel_core.algorithms.ewc import EWCHParams
        >>> from sequel_flax import MLP, ewc, initial_params
        >>> benchmark, model = RotatedDigits(num_tasks=2, subset=20), MLP(widths=(8,))
        >>> algorithm = ewc(EWCHParams(ewc_lambda=10))
        >>> params = initial_params(model, benchmark.spec, seed=0)
        >>> ts = TrainState.create(apply_fn=model.apply, params=params, tx=optax.sgd(0.1))
        >>> state = algorithm.init(ts, benchmark.spec)
        >>> train_step = jax.jit(algorithm.train_step)
        >>> for task in benchmark.tasks:
        ...     ts, state = algorithm.start_task(ts, state, task)
        ...     batch = Batch(*task.train.take(np.arange(10)))
        ...     ts, state, outputs = train_step(ts, state, batch)
        ...     ts, state = algorithm.end_task(ts, state, [batch])
        >>> int(ts.step), outputs["logits"].shape
        (2, (10, 10))
    """

    init: Init
    start_task: StartTask
    train_step: AnyStep
    end_task: Callable[[TrainState, State, Iterable[AnyBatch]], tuple[TrainState, State]]
    predict: Predict
    hparams: AlgorithmHParams
    planner: Callable[[StreamSpec, State], Planner]
    plan_start: Callable[..., Any]
    apply_start: Apply
    plan_end: Callable[[State, Iterable[AnyBatch]], Any]
    apply_end: Apply
    prepare: Prepare
    training_split: TrainingSplit
    alternatives: Alternatives
    trained: Trained
    objective: Objective | None = None
    second_phase: SecondPhase | None = None
    mappable: bool = True


def plan_start(state: State, task: Task) -> StartPlan:
    """Return the plan for the start of a task.

    Args:
        state: The state of the algorithm.
        task: The task.

    Example:
        >>> from sequel_benchmarks import RotatedDigits
        >>> int(plan_start(None, RotatedDigits(num_tasks=2, subset=20).tasks[1]).task)
        1
    """
    return StartPlan(np.asarray(task.index, np.int32))


def apply_start(
    ts: TrainState, state: State, plan: StartPlan, hparams: AlgorithmHParams
) -> tuple[TrainState, State]:
    """Start a task: reset the optimizer if `reset_optimizer` is set, and decay the learning rate.

    Args:
        ts: The train state.
        state: The state of the algorithm.
        plan: The result of `plan_start`.
        hparams: `reset_optimizer`, `lr_decay` and `min_lr` are used.

    Returns:
        The train state and the state.
    """
    opt_state = ts.opt_state
    if hparams.reset_optimizer:
        fresh = ts.tx.init(ts.params)
        old, new = (_structure(tree) for tree in (opt_state, fresh))  # differ if other parameters are trained
        opt_state = select(state.stream.task < 0, opt_state, fresh) if old == new else fresh
    if is_traced(hparams.lr_decay) or hparams.lr_decay != 1.0:
        rates = [
            jnp.asarray(base * hparams.learning_rate_factor(plan.task, base), base.dtype)
            for base in state.stream.learning_rates
        ]
        opt_state = with_learning_rates(opt_state, rates)
    stream = state.stream._replace(
        task=jnp.asarray(plan.task, jnp.int32),
        first_step=jnp.array(ts.step, jnp.int32),
        num_steps=jnp.asarray(plan.num_steps, jnp.int32),
    )
    return ts.replace(opt_state=opt_state), state._replace(stream=stream)


def _structure(tree: Any) -> Any:
    return jax.tree.structure(tree)


def make_algorithm(
    hparams: AlgorithmHParams,
    seed: int,
    train_step: Step,
    *,
    trainable: Selection = None,
    objective: Objective | None = None,
    check: Callable[[Objective], None] = lambda objective: None,
    init_memory: Callable[[TrainState, StreamSpec], Any] = lambda ts, spec: (),
    fills: Mapping[str, Fill] | None = None,
    plan_start: PlanStart = plan_start,
    apply_start: Apply | None = None,
    plan_end: PlanEnd = nothing,
    apply_end: Apply = unchanged,
    end_task: EndTask | None = None,
    predict: Predict | None = None,
    make_planner: Callable[[StreamSpec], Planner] = no_planner,
    prepare: Prepare = lambda ts, spec: ts,
    extra_parameters: tuple[str, ...] = (),
    training_split: TrainingSplit = lambda state, split: split,
    alternatives: Alternatives = lambda *_: {},
    second_phase: SecondPhase | None = None,
) -> Algorithm:
    """Return the algorithm of a method.

    The parts that all algorithms share are added here: the stream's part of the state, the position of the
    planner in it, checks, the augmentation of training samples, and the restriction to trained parameters.

    Args:
        hparams: The settings.
        seed: The seed of dropout and of the planner.
        train_step: One training step.
        trainable: The parameters of the network to train: None for all, a predicate over paths such as
            `lambda path: path[0] == "head"`, a tree of bools, or an NNX filter. The others stay exactly
            unchanged, and the method keeps nothing for them.
        objective: What the network is trained and scored on; None for the built-in objective that fits the
            targets of the stream.
        check: Raises ValueError if the method cannot use an objective.
        init_memory: Returns the method's part of the state before the first task.
        fills: For each field of the memory that has the structure of the parameters, the initial value of a
            leaf: a function of the parameter, or a tuple of these for a tuple of trees.
        plan_start: The decisions on the host at the start of a task, as a tree of NumPy arrays.
        apply_start: The start of a task, a pure function; None for `apply_start` of this module.
        plan_end: The decisions on the host at the end of a task, from batches of its samples.
        apply_end: The end of a task, a pure function.
        end_task: The end of a task in one function, if it does not need all samples at once; None for
            `plan_end` followed by `apply_end`.
        predict: Outputs in evaluation mode; None for those of the network.
        make_planner: Returns the planner of all steps.
        prepare: Adds the parameters of the method.
        extra_parameters: The names of these parameters. They are always trained.
        training_split: The samples that a task is trained on.
        alternatives: Further predictions that are reported.
        second_phase: A second training phase at the end of a task. The memory then has a field `phase_step`,
            the number of its steps that were taken, int32 ().

    Returns:
        The algorithm.

    Raises:
        ValueError: The method cannot use the objective. Or, in `init`, the optimizer is `optax.MultiSteps`
            and the objective has weights.

    Example:
        >>> from sequel_core.algorithms.naive import NaiveHParams
        >>> from sequel_flax.bundle import train_step
        >>> make_algorithm(NaiveHParams(lr_decay=0.9), seed=0, train_step=train_step).hparams.lr_decay
        0.9
    """
    trained = Trained(trainable, fills or {}, extra_parameters)
    start = trained.changes(apply_start or partial(_apply_start, hparams=hparams))
    finish = trained.changes(apply_end)
    if second_phase is not None:
        second_phase = second_phase._replace(
            start=trained.changes(second_phase.start), step=trained.changes(second_phase.step)
        )
        plan_end, finish = _end_after_phase(second_phase, plan_end, finish)
    whole = None if end_task is None else trained.changes(end_task)
    start_plan, end_plan = _checked_start(plan_start), _checked_end(plan_end, objective)
    if objective is not None:
        check(objective)

    def new_planner(spec: StreamSpec) -> Planner:
        return augmenting(make_planner(spec), spec, seed)

    def init(ts: TrainState, spec: StreamSpec) -> State:
        check_task_given(ts, spec, hparams)
        part = trained.part(ts)
        stream = init_stream(part, spec, hparams, seed)
        check(objective_of(objective, stream))
        _check_accumulation(ts.opt_state, objective_of(objective, stream))
        position = new_planner(spec).position
        return State(stream, init_memory(part, spec), None if position is None else jnp.asarray(position))

    def apply(ts: TrainState, state: State, plan: Any) -> Any:
        return start(ts, trained.begun(ts, state), plan)

    return Algorithm(
        init=init,
        start_task=lambda ts, state, task, num_steps=None: apply(
            ts, state, start_plan(state, task, num_steps)
        ),
        train_step=_checked_step(trained.changes(train_step), objective),
        end_task=_checked_whole_end(whole, objective) if whole else _end_in_parts(end_plan, finish),
        predict=trained.reads(predict or partial(_predict, objective=objective)),
        hparams=hparams,
        planner=lambda spec, state: resumed(new_planner(spec), state.position),
        plan_start=start_plan,
        apply_start=apply,
        plan_end=end_plan,
        apply_end=finish,
        prepare=prepare,
        training_split=training_split,
        alternatives=trained.reads(alternatives),
        trained=trained,
        objective=objective,
        second_phase=second_phase,
        mappable=second_phase is None and (end_task is None or apply_end is not unchanged),
    )


# -- checks


def _checked_step(step: Step, objective: Objective | None) -> AnyStep:
    """Return a training step whose loss is nan if a task index or a label of the batch is invalid.

    The step also records that its task was not started, and the position of the planner.
    """

    def train_step(ts: TrainState, state: State, batch: AnyBatch) -> tuple[TrainState, State, StepOutputs]:
        batch = to_batch(batch, state, objective)
        check_batch(batch, state.stream)
        started = jnp.all((batch.t >= 0) & (batch.t <= state.stream.task))
        ts, after, outputs = step(ts, state, batch)
        known: Any = True
        if objective_of(objective, state.stream).classification:
            known = (batch.y >= 0) & (batch.y < output_leaf(outputs["logits"]).shape[-1])
            if state.stream.mask is not None:  # not every loss notices a label of another task
                known = known & state.stream.mask[batch.t, batch.y]
        stream = after.stream._replace(task=jnp.where(started, after.stream.task, NOT_STARTED))
        outputs = {**outputs, "loss": jnp.where(started & jnp.all(known), outputs["loss"], jnp.nan)}
        position = next_position(state.position, batch.plan)
        return ts, after._replace(stream=stream, position=position), outputs

    return train_step


def _checked_start(plan: PlanStart) -> Callable[..., Any]:
    def plan_start(state: State, task: Task, num_steps: int | None = None) -> Any:
        _check_boundary(state, least=-1)
        start = plan(state, task)
        if num_steps is None or not isinstance(start, StartPlan):
            return start
        if num_steps < 1:
            raise ValueError(
                f"num_steps is the number of steps of a task, >= 1, got {num_steps}; leave it out if it is "
                "not known"
            )
        return start._replace(num_steps=np.asarray(num_steps, np.int32))

    return plan_start


def _checked_end(plan: PlanEnd, objective: Objective | None) -> Callable[[State, Iterable[AnyBatch]], Any]:
    def plan_end(state: State, batches: Iterable[AnyBatch]) -> Any:
        _check_boundary(state, least=0)
        return plan(state, _samples(batches, state, objective))

    return plan_end


def _checked_whole_end(end: EndTask, objective: Objective | None) -> Callable[..., Any]:
    def end_task(ts: TrainState, state: State, batches: Iterable[AnyBatch]) -> tuple[TrainState, State]:
        _check_boundary(state, least=0)
        return end(ts, state, _samples(batches, state, objective))

    return end_task


def _samples(batches: Iterable[AnyBatch], state: State, objective: Objective | None) -> Iterator[Batch]:
    """Yield the batches without their plans, which are those of training steps."""
    single = isinstance(batches, Batch | Mapping)
    converted: Any = batches if single else (to_batch(batch, state, objective) for batch in batches)
    return (batch._replace(plan=()) for batch in given(converted))


def to_batch(batch: AnyBatch, state: State, objective: Objective | None = None) -> Batch:
    """Return a batch that may be a dict, as collators yield it.

    Args:
        batch: A `Batch`, or a dict. `batch[target]` are the targets, with the key `target` of the objective;
            `batch["t"]` the task indices, by default the current task; `batch["plan"]` the plan of the step.
            The rest are the inputs.
        state: The state of the algorithm.
        objective: What the network is trained on; None for one with the key `labels`.

    Raises:
        ValueError: The dict has no targets.

    Example:
        >>> state = State(StreamState(jnp.int32(1), None, 1.0, 0.0, None, (), augmented=None, blank=()), ())
        >>> batch = to_batch({"tokens": jnp.zeros((2, 5), int), "labels": jnp.array([0, 1])}, state)
        >>> list(batch.x), batch.t.tolist()
        (['tokens'], [1, 1])
    """
    if not isinstance(batch, Mapping):
        return batch
    target = "labels" if objective is None else objective.target
    if target not in batch:
        raise ValueError(
            f"a batch that is a dict must have the target {target!r} of the objective, got the keys "
            f"{', '.join(map(repr, batch))}; give an objective with target='...'"
        )
    y = batch[target]
    t = batch["t"] if "t" in batch else jnp.full(len(leaves(y)[0]), state.stream.task)
    x = {name: value for name, value in batch.items() if name not in (target, "t", "plan")}
    return Batch(x, y, t, batch.get("plan", ()))


def _end_in_parts(plan: PlanEnd, finish: Apply) -> Callable[..., Any]:
    return lambda ts, state, batches: finish(ts, state, plan(state, batches))


def _end_after_phase(phase: SecondPhase, plan: PlanEnd, finish: Apply) -> tuple[PlanEnd, Apply]:
    """Return both parts of the end of a task, which take the steps of its second phase that are left."""
    step = jax.jit(phase.step)

    def plan_end(state: State, batches: Iterable[Batch]) -> PhaseEnd:
        return PhaseEnd(phase.steps(state), plan(state, batches))

    def apply_end(ts: TrainState, state: State, end: PhaseEnd) -> tuple[TrainState, State]:
        ts, state = select(state.memory.phase_step == 0, phase.start(ts, state), (ts, state))
        steps = jax.tree.map(jnp.asarray, end.steps)

        def take(k: Any, carry: Any) -> Any:
            return step(*carry, jax.tree.map(lambda a: a[k], steps))[:2]

        ts, state = repeated(len(steps.slots), take, (ts, state), loop=is_traced((ts, end)))
        memory = state.memory._replace(phase_step=jnp.zeros((), jnp.int32))
        return finish(ts, state._replace(memory=memory), end.plan)

    return plan_end, apply_end


def _check_accumulation(opt_state: Any, objective: Objective) -> None:
    """Raise ValueError if an optimizer averages the gradients of batches whose losses have weights."""

    def accumulates(part: Any) -> bool:
        return isinstance(part, optax.MultiStepsState)

    parts = jax.tree.leaves(opt_state, is_leaf=accumulates)
    if objective.weight is not None and any(map(accumulates, parts)):
        raise ValueError(
            "optax.MultiSteps gives each batch the same weight, but the mean loss of this objective is over "
            "tokens or class weights, of which batches have different numbers; use larger batches without "
            "MultiSteps, or an objective with reduce=samples"
        )


def _check_boundary(state: State, least: int) -> None:
    """Raise ValueError if the steps before a task boundary were not valid.

    Args:
        state: The state of the algorithm.
        least: The minimum index of the current task; 0 if a task must have been started.
    """
    if not is_traced(state.position):
        check_steps(state.position)
    if is_traced(state.stream.task):
        return
    task = int(np.min(state.stream.task))
    if task < least:
        problem = "no task was started" if task == -1 else "a step had samples of a task that was not started"
        raise ValueError(
            f"{problem}; call ts, state = algorithm.start_task(ts, state, task) before the first step of "
            "every task, and give each sample the index of its task as t"
        )


def check_batch(batch: Batch, stream: StreamState) -> None:
    """Check the shapes and dtypes of a batch.

    Args:
        batch: The batch.
        stream: The stream's part of the state.

    Raises:
        ValueError: A leaf of the inputs or targets differs from the spec of the stream, or labels or task
            indices are not integers `[B]`.

    Example:
        >>> blank = jnp.zeros((1, 4)), jnp.zeros(1, int)
        >>> stream = StreamState(jnp.int32(-1), None, 1.0, 0.0, None, (), augmented=None, blank=blank)
        >>> check_batch(Batch(np.zeros((2, 4), np.float32), np.array([0, 1]), np.array([0, 0])), stream)
    """
    count = jnp.shape(leaves(batch.x)[0])[:1]
    labelled = is_label(specs_of(stream.blank[1]))
    labels = [("labels y", batch.y)] if labelled else []
    for name, values in (*labels, ("task indices t", batch.t)):
        dtype, shape = jnp.result_type(values), jnp.shape(values)
        if shape != count or not jnp.issubdtype(dtype, jnp.integer):
            raise ValueError(
                f"{name} of a batch must be integers {list(count)}, one for each of its samples, got {dtype} "
                f"{list(shape)}; give class indices, not one-hot rows, without a further axis"
            )
    parts = [("x", batch.x, stream.blank[0])] + ([] if labelled else [("y", batch.y, stream.blank[1])])
    for name, tree, blank in parts:
        received = dict(named_leaves(tree, name))
        for leaf, zeros in named_leaves(blank, name):
            if leaf not in received:
                raise ValueError(f"a batch must have {leaf} by the stream's spec, got {', '.join(received)}")
            dtype, shape = jnp.result_type(received[leaf]), jnp.shape(received[leaf])
            if dtype != zeros.dtype or shape != (*count, *zeros.shape[1:]):
                raise ValueError(
                    f"{leaf} of a batch must be {zeros.dtype} {[*count, *zeros.shape[1:]]} by the stream's "
                    f"spec, got {dtype} {list(shape)}; convert it, or give a spec with "
                    f"LeafSpec({shape[1:]}, '{dtype}')"
                )


def objective_of(objective: Objective | None, stream: StreamState) -> Objective:
    """Return the objective, or for None the built-in one that fits the targets of the stream.

    Args:
        objective: The objective of the algorithm, or None.
        stream: The stream's part of the state.

    Raises:
        ValueError: No built-in objective fits.

    Example:
        >>> blank = jnp.zeros((1, 4)), jnp.zeros((1, 2))
        >>> stream = StreamState(jnp.int32(-1), None, 1.0, 0.0, None, (), augmented=None, blank=blank)
        >>> objective_of(None, stream).score.name
        'squared error'
    """
    if objective is not None:
        return objective
    y = specs_of(stream.blank[1])
    return _built_in(y) if isinstance(y, LeafSpec) else _built_in.__wrapped__(y)


@cache
def _built_in(y: Tree) -> Objective:
    """Return the built-in objective for targets; always the same one, so that nothing is compiled again."""
    spec = StreamSpec(LeafSpec(()), 1, 1, "domain", np.ones((1, 1), np.bool_), y=y)
    return build_objective(ObjectiveHParams(), spec)


def next_position(position: Any, plan: Any) -> Any:
    """Return the position of the planner after a step.

    Args:
        position: The position before the step, int32 `[n]`, or None.
        plan: The plan of the step.

    Returns:
        The position. Its first number is -1 if the plan is of another step.

    Raises:
        ValueError: The plan was made with other settings.

    Example:
        >>> from sequel_core.stream.memory import StepPlan
        >>> plan = StepPlan(write=None, reads=None, position=np.array([5, 40], np.int32))
        >>> next_position(jnp.array([4, 32], jnp.int32), plan).tolist()
        [5, 40]
    """
    planned = getattr(plan, "position", None)
    shapes = ["none" if p is None else str(list(np.shape(p))) for p in (position, planned)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"the plan of a batch must have a position like the state's, {shapes[0]}, got {shapes[1]}; make "
            "the planner with algorithm.planner(spec, state) and give Batch(x, y, t, planner.next(y, t))"
        )
    if position is None:
        return None
    planned = jnp.asarray(planned, position.dtype)
    return planned.at[0].set(jnp.where(planned[0] == position[0] + 1, planned[0], -1))


# -- the stream and the network


def init_stream(ts: TrainState, spec: StreamSpec, hparams: AlgorithmHParams, seed: int = 0) -> StreamState:
    """Return the stream's part of the state before the first task.

    Args:
        ts: A train state with the initial parameters and the initial state of the optimizer.
        spec: The specification of the benchmark.
        hparams: The settings of the algorithm.
        seed: The seed of dropout.

    Raises:
        ValueError: The settings do not fit the stream, `lr_decay` is not 1 and the learning rate of the
            optimizer cannot be set, or `consolidate` is "best".

    Example:
        >>> import optax
        >>> from sequel_benchmarks import RotatedDigits
        >>> from sequel_core.algorithms.naive import NaiveHParams
        >>> ts = TrainState.create(apply_fn=None, params={"w": jnp.zeros(1)}, tx=optax.sgd(0.1))
        >>> spec = RotatedDigits(num_tasks=2, subset=20).spec
        >>> int(init_stream(ts, spec, NaiveHParams()).task)
        -1
    """
    hparams.check_stream(spec)
    if hparams.consolidate == "best":
        raise ValueError('consolidate="best" needs Lightning\'s ModelCheckpoint; use consolidate="last"')
    learning_rates = get_learning_rates(ts.opt_state)
    if not learning_rates and hparams.lr_decay != 1.0:
        raise ValueError(
            f"lr_decay={hparams.lr_decay} needs an optimizer whose learning rate can be set; build it with "
            "optax.inject_hyperparams(optax.sgd)(learning_rate=0.1) and no schedule, or use lr_decay=1"
        )
    dtype, (padding, flip) = jax.tree.leaves(ts.params)[0].dtype, astuple(spec.augmentation)
    return StreamState(
        task=jnp.asarray(-1, jnp.int32),
        mask=jnp.asarray(spec.mask) if spec.masks_logits else None,
        scale=jnp.asarray(spec.normalisation.scale, dtype).reshape(1, 1, 1, -1),
        shift=jnp.asarray(spec.normalisation.shift, dtype).reshape(1, 1, 1, -1),
        dropout_key=jax.random.PRNGKey(seed),
        learning_rates=tuple(map(jnp.array, learning_rates)),
        augmented=jnp.asarray([padding, flip], jnp.int32) if padding or flip else None,
        blank=(_zeros(spec.x), _zeros(spec.y)),
        classes=jnp.array(spec.mask),
        first_step=jnp.asarray(0, jnp.int32),
        num_steps=jnp.asarray(0, jnp.int32),
        task_given=() if hparams.knows_task(spec) else None,
    )


def augmentation_of(stream: StreamState) -> Augmentation:
    """Return the augmentation of the stream's training samples.

    Args:
        stream: The stream's part of the state.

    Example:
        >>> stream = StreamState(jnp.int32(-1), None, 1.0, 0.0, None, (), augmented=None, blank=())
        >>> augmentation_of(stream._replace(augmented=jnp.array([4, 1])))
        Augmentation(padding=4, flip=True)
    """
    if stream.augmented is None:
        return Augmentation()
    padding, flip = np.asarray(stream.augmented).tolist()
    return Augmentation(padding, bool(flip))


def check_task_given(ts: TrainState, spec: StreamSpec, hparams: AlgorithmHParams) -> None:
    """Check that a network which needs the task of each sample gets it.

    Args:
        ts: The train state, for the network.
        spec: The specification of the benchmark.
        hparams: The settings of the algorithm.

    Raises:
        ValueError: The network has a required argument `t`, and `task_given` is not set.
    """
    if takes_task(ts.apply_fn, spec.x) and _requires_task(ts) and not hparams.knows_task(spec):
        raise ValueError(
            "the network takes the task of each sample, t, so task_given must be true, got false; set "
            f"{type(hparams).__name__}(task_given=True), which results record, or use scenario=task or a "
            "network without t"
        )


def _requires_task(ts: TrainState) -> bool:
    argument = task_argument(ts.apply_fn)
    return argument is not None and argument.default is argument.empty


def seen_classes(stream: StreamState) -> jax.Array:
    """Return the classes of the tasks up to the current one, bool `[num_classes]`; none before the first.

    Args:
        stream: The stream's part of the state.

    Example:
        >>> stream = StreamState(jnp.int32(1), None, 1.0, 0.0, None, (), augmented=None, blank=())
        >>> stream = stream._replace(classes=jnp.array([[1, 0, 0], [0, 1, 0], [0, 0, 1]], bool))
        >>> seen_classes(stream).tolist(), task_classes(stream).tolist()
        ([True, True, False], [False, True, False])
    """
    seen: jax.Array = (stream.classes & (jnp.arange(len(stream.classes))[:, None] <= stream.task)).any(0)
    return seen


def task_classes(stream: StreamState) -> jax.Array:
    """Return the classes of the current task, bool `[num_classes]`; none before the first task.

    Args:
        stream: The stream's part of the state.

    Example:
        >>> stream = StreamState(jnp.int32(-1), None, 1.0, 0.0, None, (), augmented=None, blank=())
        >>> task_classes(stream._replace(classes=jnp.array([[True, False]]))).tolist()
        [False, False]
    """
    current: jax.Array = (stream.classes & (jnp.arange(len(stream.classes))[:, None] == stream.task)).any(0)
    return current


def task_progress(ts: TrainState, state: State) -> jax.Array:
    """Return the fraction of the current task's steps that have been taken, in [0, 1], shape ().

    It is 0 in the first step of a task. It is nan if the number of steps is not known: a user-defined loop
    gives it as `algorithm.start_task(ts, state, task, num_steps)`.

    Args:
        ts: The train state.
        state: The state of the algorithm.

    Returns:
        The fraction, in the dtype of the parameters.

    Example:
        >>> import optax
        >>> ts = TrainState.create(apply_fn=None, params={"w": jnp.ones(1)}, tx=optax.sgd(0.1))
        >>> stream = StreamState(jnp.int32(0), None, jnp.ones(1), 0.0, None, (), augmented=None, blank=())
        >>> stream = stream._replace(first_step=jnp.int32(20), num_steps=jnp.int32(10))
        >>> float(task_progress(ts.replace(step=25), State(stream, ())))
        0.5
    """
    stream = state.stream
    done = jnp.asarray(ts.step - stream.first_step, stream.scale.dtype)
    fraction = jnp.minimum(done / jnp.maximum(stream.num_steps, 1).astype(done.dtype), 1)
    return jnp.where(stream.num_steps > 0, fraction, jnp.nan)


def _zeros(specs: Tree) -> Tree:
    """Return zeros `[1, ...]` in the shapes and dtypes of specs, with 32 bits unless JAX uses 64."""
    return tree_map(lambda leaf: jnp.zeros((1, *leaf.shape), canonical_dtype(leaf.dtype)), specs)


def canonical_dtype(dtype: Any) -> Any:
    """Return the dtype that an array has in JAX: with 32 bits instead of 64, unless JAX uses 64.

    Args:
        dtype: A NumPy dtype or its name.

    Example:
        >>> canonical_dtype("int64")
        dtype('int32')
    """
    return jax.dtypes.canonicalize_dtype(jnp.dtype(dtype))


def network(
    ts: TrainState,
    params: Params,
    state: State,
    x: Any,
    t: jax.Array | None = None,
    *,
    method: str | None = None,
    stats: Stats | None = None,
) -> Any:
    """Return the outputs of the network in evaluation mode, not masked.

    Args:
        ts: The train state, for the network.
        params: The parameters.
        state: The state of the algorithm.
        x: Inputs of the network `[B, ...]`, an array or a dict of arrays.
        t: Task indices `[B]`, for a network that takes them.
        method: The method of the module to call: None for `__call__`, `features` for the last hidden layer.
        stats: The other variables of the network; None for those of `ts`.

    Returns:
        The outputs.
    """
    variables = {"params": params, **(collections(ts) if stats is None else stats)}
    task = _task_keyword(ts, state, x, t, method)
    call = partial(as_called(ts.apply_fn, x), variables, train=False, method=method, **task)
    return called(call, normalise(state.stream, x))


def _task_keyword(ts: TrainState, state: State, x: Any, t: Any, method: str | None) -> dict[str, Any]:
    """Return the keyword arguments that give the network the task of each sample, if it takes it."""
    apply_fn = getattr(ts, "whole", ts).apply_fn
    if method is not None or state.stream.task_given is None or not takes_task(apply_fn, x):
        return {}
    if t is None:
        raise ValueError(
            "the network takes the task index of each sample, t [B], got None; pass t to the function of "
            "sequel_flax.bundle that calls the network"
        )
    return {"t": t}


def called(call: Callable[..., Any], x: Any) -> Any:
    """Return the result of a call with inputs: an array as the first argument, or a dict as keywords.

    Args:
        call: The function.
        x: The inputs.

    Example:
        >>> called(lambda a, b: a + b, {"a": 1, "b": 2})
        3
    """
    return call(**x) if isinstance(x, Mapping) else call(x)


def training_forward(
    ts: TrainState,
    params: Params,
    state: State,
    x: Any,
    t: jax.Array | None = None,
    *,
    method: str | None = None,
    stats: Stats | None = None,
    draw: int | jax.Array = 0,
    counts: jax.Array | None = None,
) -> tuple[Any, Stats]:
    """Return the outputs of the network in training mode, not masked, and its variables after the pass.

    Args:
        ts: The train state, for the network and the step, which dropout depends on.
        params: The parameters.
        state: The state of the algorithm.
        x: Inputs of the network `[B, ...]`, an array or a dict of arrays.
        t: See `network`.
        method: See `network`.
        stats: The other variables of the network before the pass; None for those of `ts`.
        draw: The index of the pass in the step. Each pass has its own dropout mask.
        counts: The samples that count in the statistics of the batch, bool `[B]`; None for all.

    Returns:
        The outputs, and the other variables of the network after the pass.
    """
    stats = collections(ts) if stats is None else stats
    key = jax.random.fold_in(state.stream.dropout_key, ts.step)
    first = isinstance(draw, int) and draw == 0
    rngs = {"dropout": key if first else jax.random.fold_in(key, draw)}
    task = _task_keyword(ts, state, x, t, method)
    apply = as_called(ts.apply_fn, x)
    call: Callable[..., Any] = partial(apply, train=True, rngs=rngs, method=method, **task)
    inputs = normalise(state.stream, x)
    if not stats:
        return called(partial(call, {"params": params}), inputs), stats
    if counts is not None:
        call = with_row_mask(call, counts)
    out, updated = called(partial(call, {"params": params, **stats}, mutable=list(stats)), inputs)
    return out, {name: updated[name] for name in stats}


def features(
    ts: TrainState,
    params: Params,
    state: State,
    x: Any,
    t: jax.Array | None = None,
    *,
    layer: str | None = None,
    stats: Stats | None = None,
) -> Any:
    """Return the output of a layer `[B, ...]`, in evaluation mode.

    Args:
        ts: The train state, for the network.
        params: The parameters.
        state: The state of the algorithm.
        x: Inputs of the network `[B, ...]`, an array or a dict of arrays.
        t: See `network`.
        layer: The name of a layer of a linen module, such as `dense_0` or `stage.conv`; None for the module's
            method `features`, the last hidden layer.
        stats: See `network`.

    Returns:
        The output of the last call of the layer.

    Raises:
        ValueError: The network has no such layer, or is not a linen module.

    Example:
        >>> import optax
        >>> from sequel_benchmarks import RotatedDigits
        >>> from sequel_core.algorithms.naive import NaiveHParams
        >>> from sequel_flax import MLP, initial_params, naive
        >>> model, spec = MLP(widths=(16, 8)), RotatedDigits(num_tasks=2, subset=20).spec
        >>> params = initial_params(model, spec, seed=0)
        >>> ts = TrainState.create(apply_fn=model.apply, params=params, tx=optax.sgd(0.1))
        >>> state, x = naive(NaiveHParams()).init(ts, spec), jnp.zeros((5, 8, 8, 1))
        >>> features(ts, params, state, x, layer="dense_0").shape, features(ts, params, state, x).shape
        ((5, 16), (5, 8))
    """
    if layer is None:
        return network(ts, params, state, x, t, method="features", stats=stats)
    with recording(layer) as outputs:
        network(ts, params, state, x, t, stats=stats)
    return _recorded(outputs, layer)


def outputs_and_features(
    ts: TrainState,
    params: Params,
    state: State,
    x: Any,
    t: jax.Array | None = None,
    *,
    layer: str | None = None,
) -> tuple[tuple[Any, Any], Stats]:
    """Return the outputs of the network and those of a layer, in training mode, and the new statistics.

    Args:
        ts: The train state, for the network and the step.
        params: The parameters.
        state: The state of the algorithm.
        x: Inputs of the network `[B, ...]`, an array or a dict of arrays.
        t: See `network`.
        layer: See `features`. Without it, the outputs are `head(features(x))`.

    Returns:
        The pair of outputs, not masked, and the running statistics.

    Raises:
        ValueError: See `features`.
    """
    if layer is None:
        h, stats = training_forward(ts, params, state, x, t, method="features")
        return (head_logits(ts, params, stats, h), h), stats
    with recording(layer) as outputs:
        out, stats = training_forward(ts, params, state, x, t)
    return (out, _recorded(outputs, layer)), stats


def _recorded(outputs: Mapping[str, Any], layer: str) -> Any:
    """Return the output of a layer; raise ValueError if there is none."""
    if outputs.get(layer) is not None:
        return outputs[layer]
    if not outputs:
        raise ValueError(
            f"layer={layer!r} needs a linen module, got a network of another type; give it a method "
            "features(x) and a last layer called head, and leave layer out"
        )
    raise ValueError(
        f"layer must be the name of a layer of the network, got {layer!r}; its layers are "
        f"{', '.join(outputs)}"
    )


def check_layer(ts: TrainState, spec: StreamSpec, hparams: Any) -> None:
    """Check that the network has the layer `hparams.layer`, and a last layer `head` if it is to be frozen.

    Args:
        ts: The train state, for the network.
        spec: The specification of the benchmark.
        hparams: The settings of the algorithm, with `layer` and `freeze_head`.

    Raises:
        ValueError: There is no such layer; see `features` and, if `layer` is None, `feature_width`.
    """
    if hparams.layer is None:
        feature_width(ts, spec, hparams.name)
        return
    with recording(hparams.layer) as outputs:
        blank_outputs(ts, spec, hparams)
    _recorded(outputs, hparams.layer)
    if hparams.freeze_head and "head" not in ts.params:
        raise ValueError(
            f"freeze_head needs a last layer called head, got the layers {', '.join(ts.params)}; set "
            "freeze_head=False"
        )


def collections(ts: TrainState) -> Stats:
    """Return the variables of the network besides its parameters, such as running statistics.

    Args:
        ts: The train state.

    Returns:
        Trees by the name of their collection, such as `batch_stats`; {} if there are none.

    Example:
        >>> import optax
        >>> collections(TrainState.create(apply_fn=None, params={"w": jnp.ones(1)}, tx=optax.sgd(0.1)))
        {}
    """
    named = {"batch_stats": getattr(ts, "batch_stats", {}), **getattr(ts, "collections", {})}
    return {name: tree for name, tree in named.items() if jax.tree.leaves(tree)}


def frozen_network(ts: TrainState) -> tuple[Params, Stats]:
    """Return copies of the parameters and of the other variables, which later steps do not change.

    Args:
        ts: The train state.

    Example:
        >>> import optax
        >>> ts = TrainState.create(apply_fn=None, params={"w": jnp.ones(1)}, tx=optax.sgd(0.1))
        >>> params, stats = frozen_network(ts)
        >>> params["w"] is ts.params["w"], stats
        (False, {})
    """
    copies: tuple[Params, Stats] = jax.tree.map(jnp.copy, (ts.params, collections(ts)))
    return copies


def empty_sum(p: jax.Array) -> jax.Array:
    """Return zeros with the shape of a parameter, of at least 32 bits, which keep small terms of a sum.

    Args:
        p: A parameter.

    Example:
        >>> str(empty_sum(jnp.ones(2, jnp.bfloat16)).dtype)
        'float32'
    """
    return jnp.zeros_like(p, jnp.promote_types(p.dtype, jnp.float32))


def check_no_batch_stats(ts: TrainState, name: str, reason: str) -> None:
    """Check that the network has no variables besides its parameters, such as running statistics.

    Args:
        ts: The train state.
        name: The name of the method.
        reason: Why the method cannot train a network with such variables.

    Raises:
        ValueError: The network has such variables.

    Example:
        >>> import optax
        >>> ts = TrainState.create(apply_fn=None, params={"w": jnp.ones(1)}, tx=optax.sgd(0.1))
        >>> check_no_batch_stats(ts, "si", "the path integral does not follow them")
    """
    others = ["batch normalisation" if key == "batch_stats" else key for key in collections(ts)]
    if others:
        raise ValueError(
            f"{name} cannot train a network with {', '.join(others)}: {reason}; use group normalisation "
            "(backbone.norm=group) or another method"
        )


def advance(ts: TrainState, gradient: Params, stats: Stats) -> TrainState:
    """Return the train state after one optimizer step.

    Args:
        ts: The train state before the step.
        gradient: The gradient of the loss.
        stats: The other variables of the network after the step.

    Example:
        >>> import optax
        >>> ts = TrainState.create(apply_fn=None, params={"w": jnp.ones(1)}, tx=optax.sgd(0.5))
        >>> advance(ts, {"w": jnp.ones(1)}, {}).params["w"].tolist()
        [0.5]
    """
    after: TrainState = ts.apply_gradients(grads=gradient, **_fields(stats))
    return after


def with_network(ts: TrainState, params: Params, stats: Stats) -> TrainState:
    """Return the train state with other parameters and variables; the optimizer's state is unchanged.

    Args:
        ts: The train state.
        params: The parameters.
        stats: The other variables of the network.

    Example:
        >>> import optax
        >>> ts = TrainState.create(apply_fn=None, params={"w": jnp.ones(1)}, tx=optax.sgd(0.5))
        >>> with_network(ts, {"w": jnp.zeros(1)}, {}).params["w"].tolist()
        [0.0]
    """
    after: TrainState = ts.replace(params=params, **_fields(stats))
    return after


def _fields(stats: Stats) -> dict[str, Any]:
    """Return the variables of a network as fields of a train state."""
    others = {name: tree for name, tree in stats.items() if name != "batch_stats"}
    changed = {"batch_stats": stats["batch_stats"]} if "batch_stats" in stats else {}
    return {**changed, "collections": others} if others else changed


def trained_on(state: State, batch: Batch) -> Batch:
    """Return the batch that the network is trained on: augmented if the stream is, with the method's plan.

    Args:
        state: The state of the algorithm.
        batch: A batch of the stream.

    Raises:
        ValueError: The stream is augmented, and the batch has no plan.
    """
    check_augmented(state, batch)
    return augmentation.cropped(batch)


def check_augmented(state: State, batch: Batch) -> None:
    """Check that a batch of an augmented stream has a plan with its crops.

    Args:
        state: The state of the algorithm.
        batch: A batch of the stream.

    Raises:
        ValueError: The stream is augmented, and the batch has no plan.
    """
    if state.stream.augmented is not None and not isinstance(batch.plan, AugmentedPlan):
        raise ValueError(
            "the stream's training samples are augmented and the batch has no plan, which says how; make one "
            "planner with algorithm.planner(spec, state) and give Batch(x, y, t, planner.next(y, t))"
        )


def masked(stream: StreamState, outputs: Any, t: jax.Array) -> Any:
    """Return outputs with the logits masked to the task of each sample, if the scenario is `task`.

    Args:
        stream: The stream's part of the state.
        outputs: Logits `[B, num_classes]`, or outputs that contain them; see `output_leaf`.
        t: Task indices `[B]`.

    Returns:
        The outputs.

    Raises:
        ValueError: Logits or task indices have another shape.
    """
    if stream.mask is None and not hasattr(outputs, "shape"):
        return outputs
    logits = output_leaf(outputs)
    check_logits(logits, jnp.shape(t), stream.mask)
    return outputs if stream.mask is None else with_masked_logits(outputs, stream.mask[t])


def with_masked_logits(outputs: Any, mask: jax.Array) -> Any:
    """Return outputs with masked logits; see `mask_logits`.

    Args:
        outputs: Logits `[B, num_classes]`, or outputs that contain them; see `output_leaf`.
        mask: bool `[B, num_classes]`.

    Example:
        >>> outputs = {"logits": jnp.array([[1.0, 2.0]]), "hidden": jnp.ones((1, 3))}
        >>> with_masked_logits(outputs, jnp.array([[True, False]]))["logits"].argmax().item()
        0
    """
    logits = output_leaf(outputs)
    masked_logits = mask_logits(logits, mask)
    return jax.tree.map(lambda leaf: masked_logits if leaf is logits else leaf, outputs)


def for_objective(
    model: Model, batch: Batch, outputs: Any, call: Callable[[Any], Any] | None = None
) -> objectives.Model:
    """Return the network as an objective calls it, with masked logits if targets are class labels.

    Args:
        model: The network and the objective.
        batch: The samples.
        outputs: The outputs of the network for `batch.x`.
        call: Returns the outputs for other inputs of the same tasks.

    Raises:
        ValueError: See `masked`.
    """
    stream, classification = model.state.stream, model.objective.classification

    def as_trained(out: Any) -> Any:
        return masked(stream, out, batch.t) if classification else out

    trained_outputs = as_trained(outputs)
    return lambda x: trained_outputs if x is batch.x or call is None else as_trained(call(x))


def loss_of_outputs(model: Model, batch: Batch, outputs: Any) -> tuple[jax.Array, Any]:
    """Return the mean loss of a batch, shape (), and the outputs, with masked logits.

    Args:
        model: The network and the objective.
        batch: The samples.
        outputs: The outputs of the network for `batch.x`.

    Raises:
        ValueError: See `masked`.
    """
    network = for_objective(model, batch, outputs)
    return mean_loss(model.objective, network, batch), network(batch.x)


def check_logits(logits: Any, tasks: tuple[int, ...], mask: Any) -> None:
    """Check that logits are `[B, num_classes]` and task indices `[B]`.

    Args:
        logits: The outputs of the network.
        tasks: The shape of the task indices.
        mask: The classes of each task, `[T, num_classes]`; None if logits are not masked.

    Raises:
        ValueError: A shape is different.

    Example:
        >>> check_logits(jnp.zeros((8, 10)), (8,), None)
    """
    shape: tuple[int, ...] = getattr(logits, "shape", ())
    if len(shape) == 2 and tasks == shape[:1] and (mask is None or shape[1] == mask.shape[1]):
        return
    received = list(shape) if shape else type(logits).__name__
    classes = "num_classes" if mask is None else mask.shape[1]
    raise ValueError(
        f"the network must return one row of logits for each sample, [B, {classes}], for task indices t [B]; "
        f"got logits {received} and t {list(tasks)}; reduce a sequence to one prediction in the network (its "
        "mean or its last position), and give one task index for each sample"
    )


def normalise(stream: StreamState, x: Any) -> Any:
    """Return inputs as the network receives them.

    Args:
        stream: The stream's part of the state.
        x: Inputs `[B, ...]`, an array or a dict of arrays.

    Returns:
        `(x / 255 - mean) / std` for uint8 images, and the same numbers for floats, both in the dtype of the
        parameters. Integers (tokens, indices) and booleans are unchanged.
    """
    images = is_image(specs_of(stream.blank[0]))

    def leaf_as_received(leaf: jax.Array) -> jax.Array:
        if images and leaf.dtype == jnp.uint8:
            return leaf.astype(stream.scale.dtype) * stream.scale + stream.shift
        return leaf.astype(stream.scale.dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(leaf_as_received, x)


def blank_input(spec: StreamSpec, dtype: Any) -> Any:
    """Return inputs of zeros for one sample, as the network receives them.

    Args:
        spec: The specification of the benchmark.
        dtype: The dtype of the parameters, which uint8 images and floats are converted to.

    Returns:
        An array `[1, ...]`, or a dict of such arrays.

    Example:
        >>> from sequel_benchmarks import RotatedDigits
        >>> blank_input(RotatedDigits(num_tasks=2, subset=20).spec, jnp.bfloat16).shape
        (1, 8, 8, 1)
    """

    def blank(leaf: LeafSpec) -> jax.Array:
        stored = canonical_dtype(leaf.dtype)
        as_parameters = spec.images or jnp.issubdtype(stored, jnp.floating)
        return jnp.zeros((1, *leaf.shape), dtype if as_parameters else stored)

    return tree_map(blank, spec.x)


def mask_logits(logits: jax.Array, mask: jax.Array) -> jax.Array:
    """Return the logits, with the lowest number of their dtype for the classes outside the mask.

    Args:
        logits: Logits `[B, num_classes]`.
        mask: bool `[B, num_classes]`.

    Example:
        >>> mask_logits(jnp.array([[1.0, 2.0]]), jnp.array([[True, False]])).argmax().item()
        0
    """
    return jnp.where(mask, logits, jnp.finfo(logits.dtype).min)


def training_loss(
    ts: TrainState, params: Params, state: State, batch: Batch, objective: Objective | None = None
) -> tuple[jax.Array, tuple[Any, Stats]]:
    """Return the mean loss of a batch.

    Args:
        ts: The train state, for the network and the step.
        params: The parameters.
        state: The state of the algorithm.
        batch: The result of `trained_on`.
        objective: What the network is trained on; see `objective_of`.

    Returns:
        The loss, shape (); then the outputs of the network, with masked logits, and its other variables.
    """
    model = Model(ts, state, objective_of(objective, state.stream))

    def call(x: Any) -> tuple[Any, Stats]:
        return training_forward(ts, params, state, x, batch.t)

    outputs, stats = call(batch.x)
    network = for_objective(model, batch, outputs, lambda x: call(x)[0])
    return mean_loss(model.objective, network, batch), (network(batch.x), stats)


def train_step(
    ts: TrainState, state: State, batch: Batch, training_loss: Callable[..., Any] = training_loss
) -> tuple[TrainState, State, StepOutputs]:
    """Take one optimizer step.

    Args:
        ts: The train state.
        state: The state of the algorithm.
        batch: A batch of the stream.
        training_loss: A function with the first four arguments and the results of `training_loss`.

    Returns:
        The train state after the step, the unchanged state, and the outputs `loss`, `logits` and `labels`.
        `logits` is what the network returns, `labels` are the targets.
    """
    batch = trained_on(state, batch)
    loss_fn = jax.value_and_grad(lambda params: training_loss(ts, params, state, batch), has_aux=True)
    (loss, (logits, stats)), gradient = loss_fn(ts.params)
    return advance(ts, gradient, stats), state, {"loss": loss, "logits": logits, "labels": batch.y}


def predict(ts: TrainState, state: State, x: Any, t: jax.Array, objective: Objective | None = None) -> Any:
    """Return the outputs of the network in evaluation mode.

    Args:
        ts: The train state.
        state: The state of the algorithm.
        x: Inputs of the network `[B, ...]`, an array or a dict of arrays.
        t: Task indices `[B]`.
        objective: What the network is trained on; see `objective_of`.

    Returns:
        The outputs, with masked logits if targets are class labels.
    """
    outputs = network(ts, ts.params, state, x, t)
    classification = objective_of(objective, state.stream).classification
    return masked(state.stream, outputs, t) if classification else outputs


def blank_output(ts: TrainState, spec: StreamSpec, hparams: Any) -> Any:
    """Return the shape and dtype of the array that a method uses of what the network returns for one sample.

    Args:
        ts: The train state.
        spec: The specification of the benchmark.
        hparams: The settings of the method. `output` is the name of the array; see `output_leaf`.

    Returns:
        A `jax.ShapeDtypeStruct` of shape `[1, ...]`.

    Raises:
        ValueError: There is no such array, or it has no floats `[1, ...]`.

    Example:
        >>> import optax
        >>> from sequel_benchmarks import RotatedDigits
        >>> from sequel_core.algorithms.der import DERHParams
        >>> from sequel_flax import MLP, initial_params
        >>> model, spec = MLP(widths=(8,)), RotatedDigits(num_tasks=2, subset=20).spec
        >>> params = initial_params(model, spec, seed=0)
        >>> ts = TrainState.create(apply_fn=model.apply, params=params, tx=optax.sgd(0.1))
        >>> blank_output(ts, spec, DERHParams()).shape
        (1, 10)
    """
    outputs = blank_outputs(ts, spec, hparams)
    leaf = output_leaf(outputs, hparams.output)
    if not jnp.issubdtype(leaf.dtype, jnp.floating) or leaf.shape[:1] != (1,):
        raise ValueError(
            f"{hparams.name} needs outputs that are floats [B, ...], got {leaf.dtype} {list(leaf.shape)} of "
            f"{objectives.outputs_text(outputs)} for B=1; set output to another array"
        )
    return leaf


def blank_outputs(ts: TrainState, spec: StreamSpec, hparams: AlgorithmHParams) -> Any:
    """Return the shapes and dtypes of what the network returns for one sample.

    Args:
        ts: The train state.
        spec: The specification of the benchmark.
        hparams: The settings of the method.

    Returns:
        A tree of `jax.ShapeDtypeStruct`.
    """
    x = blank_input(spec, jax.tree.leaves(ts.params)[0].dtype)
    variables = {"params": ts.params, **collections(ts)}
    given = hparams.knows_task(spec) and takes_task(getattr(ts, "whole", ts).apply_fn, x)
    task = {"t": jnp.zeros(1, jnp.int32)} if given else {}
    call = partial(as_called(ts.apply_fn, x), variables, train=False, **task)
    return jax.eval_shape(lambda: called(call, x))


_apply_start, _predict = apply_start, predict  # `make_algorithm` has arguments with these names


def feature_width(ts: TrainState, spec: StreamSpec, name: str) -> int:
    """Return the number of units of the last hidden layer.

    Args:
        ts: The train state.
        spec: The specification of the benchmark.
        name: The name of the method that needs the features.

    Raises:
        ValueError: The network has no method `features(x, train)`, or no last layer called `head`, or it
            takes the task.

    Example:
        >>> import optax
        >>> from sequel_benchmarks import RotatedDigits
        >>> from sequel_flax import MLP, initial_params
        >>> model, spec = MLP(widths=(8,)), RotatedDigits(num_tasks=2, subset=20).spec
        >>> params = initial_params(model, spec, seed=0)
        >>> ts = TrainState.create(apply_fn=model.apply, params=params, tx=optax.sgd(0.1))
        >>> feature_width(ts, spec, "lfl")
        8
    """
    if _requires_task(getattr(ts, "whole", ts)):
        raise ValueError(
            f"{name} uses head(features(x)), so it cannot train a network that takes the task, got one with "
            "__call__(x, t); use another method, such as er or ewc"
        )
    x = blank_input(spec, jax.tree.leaves(ts.params)[0].dtype)
    call = partial(as_called(ts.apply_fn, x), {"params": ts.params, **collections(ts)})
    try:
        features = jax.eval_shape(lambda: called(partial(call, train=False, method="features"), x))
        if "head" in ts.params:
            jax.eval_shape(partial(call, method=apply_head), features)
    except (AttributeError, TypeError) as error:
        raise ValueError(
            f"{name} needs a network with a method features(x, train), the last hidden layer, which setup's "
            f"head turns into logits; got one without: {error}"
        ) from error
    if "head" not in ts.params:
        raise ValueError(f"{name} needs a last layer called head, got the layers {', '.join(ts.params)}")
    return int(features.shape[-1])


def check_head(ts: TrainState, spec: StreamSpec, objective: Objective | None, name: str) -> None:
    """Check that an objective takes what the last layer of a network returns.

    Args:
        ts: The train state.
        spec: The specification of the benchmark.
        objective: The objective; None for the built-in one that fits the targets.
        name: The name of the method, which calls `features` and then `head`.

    Raises:
        ValueError: The objective does not take it.
    """
    objective = objective or build_objective(ObjectiveHParams(), spec)
    x, y = blank_input(spec, jax.tree.leaves(ts.params)[0].dtype), _zeros(spec.y)
    call = partial(as_called(ts.apply_fn, x), {"params": ts.params, **collections(ts)})
    features = jax.eval_shape(lambda: called(partial(call, train=False, method="features"), x))
    outputs = jax.eval_shape(partial(call, method=apply_head), features)
    batch = Batch(x, y, jnp.zeros(1, jnp.int32))
    try:
        jax.eval_shape(lambda out: objectives.losses_of(objective, lambda _: out, batch), outputs)
    except (ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{name} trains on head(features(x)), so the objective must take what head returns, "
            f"{objectives.outputs_text(outputs)} for B=1: {' '.join(str(error).split())}; return the same "
            "from head as from the network, or give a loss that takes it"
        ) from error


def apply_head(module: nn.Module, features: jax.Array) -> jax.Array:
    """Return the outputs of a network's last layer, logits `[B, num_classes]`.

    Args:
        module: A module with a layer `head`.
        features: The last hidden layer `[B, D]`.
    """
    logits: jax.Array = module.head(features)
    return logits


def head_logits(ts: TrainState, params: Params, stats: Stats, features: jax.Array) -> jax.Array:
    """Return the logits of features, not masked, `[B, num_classes]`.

    Args:
        ts: The train state, for the network.
        params: The parameters.
        stats: The other variables of the network.
        features: The last hidden layer `[B, D]`.
    """
    variables = {"params": params, **stats}
    logits: jax.Array = as_called(ts.apply_fn)(variables, features, method=apply_head)
    return logits


def without_head_gradient(params: Params, frozen: Any) -> Params:
    """Return the parameters, without a gradient for the last layer if it is frozen.

    Args:
        params: The parameters.
        frozen: Whether the last layer is frozen, a bool that may be traced.
    """
    if "head" not in params:
        return params
    return {**params, "head": select(frozen, jax.lax.stop_gradient(params["head"]), params["head"])}


def with_head_of(before: TrainState, after: TrainState, frozen: Any) -> TrainState:
    """Return the train state after a step, with the last layer from before the step if it is frozen.

    Args:
        before: The train state before the step.
        after: The train state after the step.
        frozen: Whether the last layer is frozen, a bool that may be traced.
    """
    if "head" not in after.params:
        return after
    head = select(frozen, before.params["head"], after.params["head"])
    return after.replace(params={**after.params, "head": head})
