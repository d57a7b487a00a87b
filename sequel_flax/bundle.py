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

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.training.train_state import TrainState

from sequel_core.hparams import AlgorithmHParams
from sequel_core.stream.augmentation import AugmentedPlan, augmenting
from sequel_core.stream.benchmark import StreamSpec
from sequel_core.stream.planner import NoPlanner, Planner, check_steps, resumed
from sequel_core.stream.task import AnySplit, Batch, Task
from sequel_flax import augmentation
from sequel_flax.boundaries import StartPlan, given, is_traced, select
from sequel_flax.foreign import as_called, with_row_mask
from sequel_flax.optimizers import get_learning_rates, with_learning_rates
from sequel_flax.trainable import Fill, Selection, Trained

Params = Any
Stats = Any  # running statistics of batch normalisation; {} if the network has none
StepOutputs = dict[str, jax.Array]


class BatchStatsTrainState(TrainState):
    """A TrainState with the running statistics of batch normalisation, for networks that have it.

    A training step accepts any TrainState with this field.

    Args:
        batch_stats: The collection `batch_stats` of the network's variables.

    Example:
        >>> params, batch_stats = {"w": jnp.ones(2)}, {"mean": jnp.zeros(2)}
        >>> ts = BatchStatsTrainState.create(
        ...     apply_fn=None, params=params, tx=optax.sgd(0.1), batch_stats=batch_stats
        ... )
        >>> ts.batch_stats["mean"].shape
        (2,)
    """

    batch_stats: Stats


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
        augmented: () if training samples are augmented, else None.

    Example:
        >>> StreamState(jnp.int32(-1), None, 1.0, 0.0, None, (), augmented=None).augmented is None
        True
    """

    task: jax.Array
    mask: jax.Array | None
    scale: jax.Array
    shift: jax.Array
    dropout_key: jax.Array
    learning_rates: tuple[jax.Array, ...]
    augmented: tuple[()] | None


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


Init = Callable[[TrainState, StreamSpec], State]
Step = Callable[[TrainState, State, Batch], tuple[TrainState, State, StepOutputs]]
StartTask = Callable[[TrainState, State, Task], tuple[TrainState, State]]
EndTask = Callable[[TrainState, State, Iterable[Batch]], tuple[TrainState, State]]
PlanStart = Callable[[State, Task], Any]
PlanEnd = Callable[[State, Iterable[Batch]], Any]
Apply = Callable[[TrainState, State, Any], tuple[TrainState, State]]
Predict = Callable[[TrainState, State, jax.Array, jax.Array], jax.Array]
Alternatives = Callable[[TrainState, State, jax.Array, jax.Array], StepOutputs]
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
        start_task: `start_task(ts, state, task)` is called before the first step of each task.
        train_step: `train_step(ts, state, batch)` takes one step. It can be compiled and scanned. The outputs
            are `loss`, `logits` and `labels`.
        end_task: `end_task(ts, state, batches)` consolidates the task, from batches of its samples.
        predict: `predict(ts, state, x, t)` returns logits `[B, num_classes]`.
        hparams: The settings.
        planner: `planner(spec, state)` returns the planner of the steps after this state. It makes
            `Batch.plan` on the host.
        plan_start: `plan_start(state, task)` is the part of `start_task` on the host; see `boundaries`.
        apply_start: `apply_start(ts, state, plan)` is the rest. It can be compiled and mapped.
        plan_end: `plan_end(state, batches)` is the part of `end_task` on the host.
        apply_end: `apply_end(ts, state, plan)` is the rest. It can be compiled and mapped.
        prepare: `prepare(ts, spec)` adds the parameters of the method to a new train state.
        training_split: `training_split(state, split)` returns the samples that a task is trained on.
        alternatives: `alternatives(ts, state, x, t)` returns further predictions, by name.
        trained: The parameters that are trained.

    Example:
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
    train_step: Step
    end_task: EndTask
    predict: Predict
    hparams: AlgorithmHParams
    planner: Callable[[StreamSpec, State], Planner]
    plan_start: PlanStart
    apply_start: Apply
    plan_end: PlanEnd
    apply_end: Apply
    prepare: Prepare
    training_split: TrainingSplit
    alternatives: Alternatives
    trained: Trained


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
    if hparams.lr_decay != 1.0:
        rates = [
            jnp.asarray(base * hparams.learning_rate_factor(plan.task, base), base.dtype)
            for base in state.stream.learning_rates
        ]
        opt_state = with_learning_rates(opt_state, rates)
    stream = state.stream._replace(task=jnp.asarray(plan.task, jnp.int32))
    return ts.replace(opt_state=opt_state), state._replace(stream=stream)


def _structure(tree: Any) -> Any:
    return jax.tree.structure(tree)


def make_algorithm(
    hparams: AlgorithmHParams,
    seed: int,
    train_step: Step,
    *,
    trainable: Selection = None,
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
        init_memory: Returns the method's part of the state before the first task.
        fills: For each field of the memory that has the structure of the parameters, the initial value of a
            leaf: a function of the parameter, or a tuple of these for a tuple of trees.
        plan_start: The decisions on the host at the start of a task, as a tree of NumPy arrays.
        apply_start: The start of a task, a pure function; None for `apply_start` of this module.
        plan_end: The decisions on the host at the end of a task, from batches of its samples.
        apply_end: The end of a task, a pure function.
        end_task: The end of a task in one function, if it does not need all samples at once; None for
            `plan_end` followed by `apply_end`.
        predict: Logits in evaluation mode; None for those of the network.
        make_planner: Returns the planner of all steps.
        prepare: Adds the parameters of the method.
        extra_parameters: The names of these parameters. They are always trained.
        training_split: The samples that a task is trained on.
        alternatives: Further predictions that are reported.

    Returns:
        The algorithm.

    Example:
        >>> from sequel_core.algorithms.naive import NaiveHParams
        >>> from sequel_flax.bundle import train_step
        >>> make_algorithm(NaiveHParams(lr_decay=0.9), seed=0, train_step=train_step).hparams.lr_decay
        0.9
    """
    trained = Trained(trainable, fills or {}, extra_parameters)
    start = trained.changes(apply_start or partial(_apply_start, hparams=hparams))
    finish = trained.changes(apply_end)
    whole = None if end_task is None else trained.changes(end_task)
    start_plan, end_plan = _checked_start(plan_start), _checked_end(plan_end)

    def new_planner(spec: StreamSpec) -> Planner:
        return augmenting(make_planner(spec), spec, seed)

    def init(ts: TrainState, spec: StreamSpec) -> State:
        part = trained.part(ts)
        stream, position = init_stream(part, spec, hparams, seed), new_planner(spec).position
        return State(stream, init_memory(part, spec), None if position is None else jnp.asarray(position))

    def apply(ts: TrainState, state: State, plan: Any) -> Any:
        return start(ts, trained.begun(ts, state), plan)

    return Algorithm(
        init=init,
        start_task=lambda ts, state, task: apply(ts, state, start_plan(state, task)),
        train_step=_checked_step(trained.changes(train_step)),
        end_task=_checked_whole_end(whole) if whole else _end_in_parts(end_plan, finish),
        predict=trained.reads(predict or _predict),
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
    )


# -- checks


def _checked_step(step: Step) -> Step:
    """Return a training step whose loss is nan if a task index or a label of the batch is invalid.

    The step also records that its task was not started, and the position of the planner.
    """

    def train_step(ts: TrainState, state: State, batch: Batch) -> tuple[TrainState, State, StepOutputs]:
        check_batch(batch)
        started = jnp.all((batch.t >= 0) & (batch.t <= state.stream.task))
        ts, after, outputs = step(ts, state, batch)
        known = (batch.y >= 0) & (batch.y < outputs["logits"].shape[-1])
        if state.stream.mask is not None:  # not every loss notices a label of another task
            known = known & state.stream.mask[batch.t, batch.y]
        stream = after.stream._replace(task=jnp.where(started, after.stream.task, NOT_STARTED))
        outputs = {**outputs, "loss": jnp.where(started & jnp.all(known), outputs["loss"], jnp.nan)}
        position = next_position(state.position, batch.plan)
        return ts, after._replace(stream=stream, position=position), outputs

    return train_step


def _checked_start(plan: PlanStart) -> PlanStart:
    def plan_start(state: State, task: Task) -> Any:
        _check_boundary(state, least=-1)
        return plan(state, task)

    return plan_start


def _checked_end(plan: PlanEnd) -> PlanEnd:
    def plan_end(state: State, batches: Iterable[Batch]) -> Any:
        _check_boundary(state, least=0)
        return plan(state, given(batches))

    return plan_end


def _checked_whole_end(end: EndTask) -> EndTask:
    def end_task(ts: TrainState, state: State, batches: Iterable[Batch]) -> tuple[TrainState, State]:
        _check_boundary(state, least=0)
        return end(ts, state, given(batches))

    return end_task


def _end_in_parts(plan: PlanEnd, finish: Apply) -> EndTask:
    return lambda ts, state, batches: finish(ts, state, plan(state, batches))


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


def check_batch(batch: Batch) -> None:
    """Check that each sample of a batch has an integer label and an integer task index.

    Args:
        batch: The batch.

    Raises:
        ValueError: Labels or task indices are not integers `[B]`.

    Example:
        >>> check_batch(Batch(np.zeros((2, 4)), np.array([0, 1]), np.array([0, 0])))
    """
    count = jnp.shape(batch.x)[:1]
    for name, values in (("labels y", batch.y), ("task indices t", batch.t)):
        dtype, shape = jnp.result_type(values), jnp.shape(values)
        if shape != count or not jnp.issubdtype(dtype, jnp.integer):
            raise ValueError(
                f"{name} of a batch must be integers {list(count)}, one for each of its samples, got {dtype} "
                f"{list(shape)}; give class indices, not one-hot rows, without a further axis"
            )


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
    dtype = jax.tree.leaves(ts.params)[0].dtype
    return StreamState(
        task=jnp.asarray(-1, jnp.int32),
        mask=jnp.asarray(spec.mask) if spec.masks_logits else None,
        scale=jnp.asarray(spec.normalisation.scale, dtype).reshape(1, 1, 1, -1),
        shift=jnp.asarray(spec.normalisation.shift, dtype).reshape(1, 1, 1, -1),
        dropout_key=jax.random.PRNGKey(seed),
        learning_rates=tuple(map(jnp.array, learning_rates)),
        augmented=() if spec.augmentation else None,
    )


def forward(ts: TrainState, params: Params, state: State, x: jax.Array, t: jax.Array) -> jax.Array:
    """Return the logits of the network in evaluation mode, masked if the scenario masks them.

    Args:
        ts: The train state, for the network and its running statistics.
        params: The parameters, separate from `ts` so that they can be differentiated.
        state: The state of the algorithm.
        x: Images `[B, H, W, C]`, or other inputs of the network; see `normalise`.
        t: Task indices `[B]`.

    Returns:
        Logits `[B, num_classes]`.
    """
    return masked(state.stream, network(ts, params, state, x), t)


def network(
    ts: TrainState,
    params: Params,
    state: State,
    x: jax.Array,
    *,
    method: str | None = None,
    stats: Stats | None = None,
) -> jax.Array:
    """Return the outputs of the network in evaluation mode, not masked.

    Args:
        ts: The train state, for the network.
        params: The parameters.
        state: The state of the algorithm.
        x: Images `[B, H, W, C]`, or other inputs of the network.
        method: The method of the module to call: None for logits `[B, num_classes]`, `features` for the last
            hidden layer.
        stats: The running statistics; None for those of `ts`.

    Returns:
        The outputs.
    """
    variables = {"params": params, **_collections(batch_stats(ts) if stats is None else stats)}
    call = as_called(ts.apply_fn)
    out: jax.Array = call(variables, normalise(state.stream, x), train=False, method=method)
    return out


def training_forward(
    ts: TrainState,
    params: Params,
    state: State,
    x: jax.Array,
    *,
    method: str | None = None,
    stats: Stats | None = None,
    draw: int | jax.Array = 0,
    counts: jax.Array | None = None,
) -> tuple[jax.Array, Stats]:
    """Return the outputs of the network in training mode, not masked, and the new running statistics.

    Args:
        ts: The train state, for the network and the step, which dropout depends on.
        params: The parameters.
        state: The state of the algorithm.
        x: Images `[B, H, W, C]`, or other inputs of the network.
        method: See `network`.
        stats: The running statistics before the pass; None for those of `ts`.
        draw: The index of the pass in the step. Each pass has its own dropout mask.
        counts: The samples that count in the statistics of the batch, bool `[B]`; None for all.

    Returns:
        The outputs and the running statistics.
    """
    stats = batch_stats(ts) if stats is None else stats
    key = jax.random.fold_in(state.stream.dropout_key, ts.step)
    first = isinstance(draw, int) and draw == 0
    rngs = {"dropout": key if first else jax.random.fold_in(key, draw)}
    call: Callable[..., Any] = partial(as_called(ts.apply_fn), train=True, rngs=rngs, method=method)
    images = normalise(state.stream, x)
    if not jax.tree.leaves(stats):
        return call({"params": params}, images), stats
    if counts is not None:
        call = with_row_mask(call, counts)
    out, updated = call({"params": params, "batch_stats": stats}, images, mutable=["batch_stats"])
    return out, updated["batch_stats"]


def batch_stats(ts: TrainState) -> Stats:
    """Return the running statistics of batch normalisation.

    Args:
        ts: The train state.

    Returns:
        A tree; {} if the network has none.

    Example:
        >>> batch_stats(TrainState.create(apply_fn=None, params={"w": jnp.ones(1)}, tx=optax.sgd(0.1)))
        {}
    """
    return getattr(ts, "batch_stats", {})


def _collections(stats: Stats) -> dict[str, Any]:
    return {"batch_stats": stats} if jax.tree.leaves(stats) else {}


def frozen_network(ts: TrainState) -> tuple[Params, Stats]:
    """Return copies of the parameters and of the running statistics, which later steps do not change.

    Args:
        ts: The train state.

    Example:
        >>> ts = TrainState.create(apply_fn=None, params={"w": jnp.ones(1)}, tx=optax.sgd(0.1))
        >>> params, stats = frozen_network(ts)
        >>> params["w"] is ts.params["w"], stats
        (False, {})
    """
    copies: tuple[Params, Stats] = jax.tree.map(jnp.copy, (ts.params, batch_stats(ts)))
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
    """Check that the network has no running statistics.

    Args:
        ts: The train state.
        name: The name of the method.
        reason: Why the method cannot train a network with batch normalisation.

    Raises:
        ValueError: The network has running statistics.

    Example:
        >>> ts = TrainState.create(apply_fn=None, params={"w": jnp.ones(1)}, tx=optax.sgd(0.1))
        >>> check_no_batch_stats(ts, "si", "the path integral does not follow them")
    """
    if jax.tree.leaves(batch_stats(ts)):
        raise ValueError(
            f"{name} cannot train a network with batch normalisation: {reason}; use group normalisation "
            "(backbone.norm=group) or another method"
        )


def advance(ts: TrainState, gradient: Params, stats: Stats) -> TrainState:
    """Return the train state after one optimizer step.

    Args:
        ts: The train state before the step.
        gradient: The gradient of the loss.
        stats: The new running statistics.

    Example:
        >>> ts = TrainState.create(apply_fn=None, params={"w": jnp.ones(1)}, tx=optax.sgd(0.5))
        >>> advance(ts, {"w": jnp.ones(1)}, {}).params["w"].tolist()
        [0.5]
    """
    after: TrainState = ts.apply_gradients(grads=gradient, **_collections(stats))
    return after


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


def masked(stream: StreamState, logits: jax.Array, t: jax.Array) -> jax.Array:
    """Return the logits, masked to the task of each sample if the scenario is `task`.

    Args:
        stream: The stream's part of the state.
        logits: Logits `[B, num_classes]`.
        t: Task indices `[B]`.

    Returns:
        Logits `[B, num_classes]`.

    Raises:
        ValueError: Logits or task indices have another shape.
    """
    check_logits(logits, jnp.shape(t), stream.mask)
    return logits if stream.mask is None else mask_logits(logits, stream.mask[t])


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


def normalise(stream: StreamState, x: jax.Array) -> jax.Array:
    """Return inputs as the network receives them.

    Args:
        stream: The stream's part of the state.
        x: Inputs `[B, ...]`.

    Returns:
        `(x / 255 - mean) / std` for uint8 images and the same numbers for other floats, both in the dtype of
        the parameters. Other integers (tokens, indices) and booleans are unchanged.
    """
    if x.dtype == jnp.uint8:
        return x.astype(stream.scale.dtype) * stream.scale + stream.shift
    return x.astype(stream.scale.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x


def blank_image(spec: StreamSpec, dtype: Any) -> jax.Array:
    """Return one input of zeros, as the network receives it.

    Args:
        spec: The specification of the benchmark.
        dtype: The dtype of the parameters.

    Returns:
        An array `[1, H, W, C]`.

    Example:
        >>> from sequel_benchmarks import RotatedDigits
        >>> blank_image(RotatedDigits(num_tasks=2, subset=20).spec, jnp.bfloat16).shape
        (1, 8, 8, 1)
    """
    image_dtype = jnp.dtype(spec.x.dtype)
    as_parameters = image_dtype == jnp.uint8 or jnp.issubdtype(image_dtype, jnp.floating)
    return jnp.zeros((1, *spec.image_shape), dtype if as_parameters else image_dtype)


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


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the mean cross-entropy, shape ().

    Args:
        logits: Logits `[B, num_classes]`.
        labels: Labels `[B]`.

    Example:
        >>> float(cross_entropy(jnp.array([[0.0, 1e4]]), jnp.array([1])))
        0.0
    """
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def objective(
    ts: TrainState, params: Params, state: State, batch: Batch
) -> tuple[jax.Array, tuple[jax.Array, Stats]]:
    """Return the mean cross-entropy of a batch.

    Args:
        ts: The train state, for the network and the step.
        params: The parameters.
        state: The state of the algorithm.
        batch: The result of `trained_on`.

    Returns:
        The loss, shape (); then the logits `[B, num_classes]` and the running statistics.
    """
    logits, stats = training_forward(ts, params, state, batch.x)
    logits = masked(state.stream, logits, batch.t)
    return cross_entropy(logits, batch.y), (logits, stats)


def train_step(
    ts: TrainState, state: State, batch: Batch, objective: Callable[..., Any] = objective
) -> tuple[TrainState, State, StepOutputs]:
    """Take one optimizer step.

    Args:
        ts: The train state.
        state: The state of the algorithm.
        batch: A batch of the stream.
        objective: The loss, a function with the arguments and results of `objective`; by default the mean
            cross-entropy.

    Returns:
        The train state after the step, the unchanged state, and the outputs `loss`, `logits` and `labels`.
    """
    batch = trained_on(state, batch)
    loss_fn = jax.value_and_grad(lambda params: objective(ts, params, state, batch), has_aux=True)
    (loss, (logits, stats)), gradient = loss_fn(ts.params)
    return advance(ts, gradient, stats), state, {"loss": loss, "logits": logits, "labels": batch.y}


def predict(ts: TrainState, state: State, x: jax.Array, t: jax.Array) -> jax.Array:
    """Return the logits of the network in evaluation mode.

    Args:
        ts: The train state.
        state: The state of the algorithm.
        x: Images `[B, H, W, C]`, or other inputs of the network.
        t: Task indices `[B]`.

    Returns:
        Logits `[B, num_classes]`.
    """
    return forward(ts, ts.params, state, x, t)


_apply_start, _predict = apply_start, predict  # `make_algorithm` has arguments with these names


def feature_width(ts: TrainState, spec: StreamSpec, name: str) -> int:
    """Return the number of units of the last hidden layer.

    Args:
        ts: The train state.
        spec: The specification of the benchmark.
        name: The name of the method that needs the features.

    Raises:
        ValueError: The network has no method `features(x, train)`, or no last layer called `head`.

    Example:
        >>> from sequel_benchmarks import RotatedDigits
        >>> from sequel_flax import MLP, initial_params
        >>> model, spec = MLP(widths=(8,)), RotatedDigits(num_tasks=2, subset=20).spec
        >>> params = initial_params(model, spec, seed=0)
        >>> ts = TrainState.create(apply_fn=model.apply, params=params, tx=optax.sgd(0.1))
        >>> feature_width(ts, spec, "lfl")
        8
    """
    image = blank_image(spec, jax.tree.leaves(ts.params)[0].dtype)
    call = partial(as_called(ts.apply_fn), {"params": ts.params, **_collections(batch_stats(ts))})
    try:
        features = jax.eval_shape(partial(call, train=False, method="features"), image)
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
        stats: The running statistics.
        features: The last hidden layer `[B, D]`.
    """
    variables = {"params": params, **_collections(stats)}
    logits: jax.Array = as_called(ts.apply_fn)(variables, features, method=apply_head)
    return logits


def without_head_gradient(params: Params, frozen: Any) -> Params:
    """Return the parameters, without a gradient for the last layer if it is frozen.

    Args:
        params: The parameters.
        frozen: Whether the last layer is frozen, a bool that may be traced.
    """
    return {**params, "head": select(frozen, jax.lax.stop_gradient(params["head"]), params["head"])}


def with_head_of(before: TrainState, after: TrainState, frozen: Any) -> TrainState:
    """Return the train state after a step, with the last layer from before the step if it is frozen.

    Args:
        before: The train state before the step.
        after: The train state after the step.
        frozen: Whether the last layer is frozen, a bool that may be traced.
    """
    head = select(frozen, before.params["head"], after.params["head"])
    return after.replace(params={**after.params, "head": head})
