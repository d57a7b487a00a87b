"""An algorithm as a bundle of pure functions over Flax's TrainState, after optax's GradientTransformation.

    state = algorithm.init(ts, spec)
    planner = algorithm.planner(spec, state)
    train_step = jax.jit(algorithm.train_step)
    for task in benchmark.tasks:
        ts, state = algorithm.start_task(ts, state, task)
        for x, y, t in ...:
            ts, state, outputs = train_step(ts, state, Batch(x, y, t, planner.next(y, t)))
        ts, state = algorithm.end_task(ts, state, batches)

State is always an argument, never a closure: a compiled step that closes over the anchor of task 1 keeps it
for ever. `(ts, state)` hold all that the coming steps depend on, so saving these two is enough to resume.
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
Stats = Any  # running statistics of batch normalisation; {} for a network without
StepOutputs = dict[str, jax.Array]


class BatchStatsTrainState(TrainState):
    """A TrainState with the running statistics of batch normalisation; our steps take any with the field."""

    batch_stats: Stats


NOT_BEGUN = -2
"""The task of a state that took a step with samples of a task that had not begun."""


class StreamState(NamedTuple):
    """What every algorithm keeps of the stream."""

    task: jax.Array  # index of the current task, int32 (), -1 before the first; see also NOT_BEGUN
    mask: jax.Array | None  # bool [T, num_classes]; None where logits are not masked
    scale: jax.Array  # of uint8 images, [1, 1, 1, C], in the dtype of the weights
    shift: jax.Array  # of uint8 images, [1, 1, 1, C]
    dropout_key: jax.Array  # folded with ts.step at every step
    learning_rates: tuple[jax.Array, ...]  # of the first task; () if the optimizer does not tell
    augmented: tuple[()] | None  # () where training samples are augmented, else None: structure, not data


class State(NamedTuple):
    """The state of an algorithm: the stream's part, its own, and the planner's; its shapes never change."""

    stream: StreamState
    memory: Any  # the algorithm's own, for example QuadraticState; () where there is none
    position: Any = None  # of the planner, int32 [n]; None where steps need no plan


def no_planner(spec: StreamSpec) -> Planner:
    """Return the planner of a method whose steps need nothing but their batches."""
    return NoPlanner()


def nothing(state: State, batches: Iterable[Batch]) -> tuple[()]:
    """Return `()`: what the end of a task needs to know in algorithms that keep nothing of it."""
    return ()


def unchanged(ts: TrainState, state: State, plan: Any) -> tuple[TrainState, State]:
    """Do nothing: the end of a task for algorithms that keep nothing of it."""
    return ts, state


class Algorithm(NamedTuple):
    """A continual-learning algorithm as pure functions; `make_algorithm` makes one of its own parts."""

    init: Callable[[TrainState, StreamSpec], State]
    start_task: Callable[[TrainState, State, Task], tuple[TrainState, State]]
    train_step: Callable[
        [TrainState, State, Batch], tuple[TrainState, State, StepOutputs]
    ]  # jit- and scan-able
    end_task: Callable[[TrainState, State, Iterable[Batch]], tuple[TrainState, State]]
    predict: Callable[[TrainState, State, jax.Array, jax.Array], jax.Array]  # x, t -> logits [B, num_classes]
    hparams: AlgorithmHParams
    planner: Callable[[StreamSpec, State], Planner]  # fills `Batch.plan` on the host; resumes from the state
    plan_start: Callable[[State, Task], Any]  # the part of start_task on the host; see `boundaries`
    apply_start: Callable[[TrainState, State, Any], tuple[TrainState, State]]  # the rest; jit- and vmap-able
    plan_end: Callable[[State, Iterable[Batch]], Any]
    apply_end: Callable[[TrainState, State, Any], tuple[TrainState, State]]
    prepare: Callable[[TrainState, StreamSpec], TrainState]  # adds own parameters
    training_split: Callable[[State, AnySplit], AnySplit]  # to train on
    alternatives: Callable[[TrainState, State, jax.Array, jax.Array], StepOutputs]  # as `predict`
    trained: Trained  # which parameters are trained


def plan_start(state: State, task: Task) -> StartPlan:
    """Return what the start of a task needs to know of it."""
    return StartPlan(np.asarray(task.index, np.int32))


def apply_start(
    ts: TrainState, state: State, plan: StartPlan, hparams: AlgorithmHParams
) -> tuple[TrainState, State]:
    """Begin a task: a fresh optimizer where `reset_optimizer` says so, and the decayed learning rate."""
    opt_state = ts.opt_state
    if hparams.reset_optimizer:
        fresh = ts.tx.init(ts.params)
        alike = _structure(fresh) == _structure(opt_state)  # not if another optimizer trains others
        opt_state = select(state.stream.task < 0, opt_state, fresh) if alike else fresh
    if hparams.lr_decay != 1.0:
        rates = [
            jnp.asarray(base * hparams.learning_rate_factor(plan.task, base), base.dtype)
            for base in state.stream.learning_rates
        ]
        opt_state = with_learning_rates(opt_state, rates)
    stream = state.stream._replace(task=jnp.asarray(plan.task, jnp.int32))
    return ts.replace(opt_state=opt_state), state._replace(stream=stream)


def make_algorithm(
    hparams: AlgorithmHParams,
    seed: int,
    train_step: Callable[[TrainState, State, Batch], tuple[TrainState, State, StepOutputs]],
    *,
    trainable: Selection = None,
    init_memory: Callable[[TrainState, StreamSpec], Any] = lambda ts, spec: (),
    fills: Mapping[str, Fill] | None = None,
    plan_start: Callable[[State, Task], Any] = plan_start,
    apply_start: Callable[[TrainState, State, Any], tuple[TrainState, State]] | None = None,
    plan_end: Callable[[State, Iterable[Batch]], Any] = nothing,
    apply_end: Callable[[TrainState, State, Any], tuple[TrainState, State]] = unchanged,
    end_task: Callable[[TrainState, State, Iterable[Batch]], tuple[TrainState, State]] | None = None,
    predict: Callable[[TrainState, State, jax.Array, jax.Array], jax.Array] | None = None,
    make_planner: Callable[[StreamSpec], Planner] = no_planner,
    prepare: Callable[[TrainState, StreamSpec], TrainState] = lambda ts, spec: ts,
    extra_parameters: tuple[str, ...] = (),
    training_split: Callable[[State, AnySplit], AnySplit] = lambda state, split: split,
    alternatives: Callable[[TrainState, State, jax.Array, jax.Array], StepOutputs] = lambda *_: {},
) -> Algorithm:
    """Return an algorithm made of its own parts; what all algorithms share is added here.

    That is: the stream's part of the state, the planner's position in it, the augmentation of training
    samples, and that a method sees trained parameters only.

    Args:
        hparams: settings.
        seed: of dropout and of the planner.
        train_step: one step.
        trainable: which parameters of the network are trained: None for all, a predicate over paths such as
            `lambda path: path[0] == "head"`, a tree of bools, or an NNX filter. The others stay exactly as
            they are, and nothing is kept of them.
        init_memory: the method's own part of the state before the first task.
        fills: of each field of the memory that has the structure of the parameters, how a leaf begins: a
            function of the parameter, or a tuple of these for a tuple of trees.
        plan_start: what the start of a task decides on the host, as a tree of NumPy arrays.
        apply_start: the start of a task, a pure function; None for the module's own function of that name.
        plan_end: what the end of a task decides on the host, from batches of its samples.
        apply_end: the end of a task, a pure function.
        end_task: the two in one, if that can do without all samples at once; None for one after the other.
        predict: logits in evaluation mode; None for the network's.
        make_planner: plans the steps, from the first on.
        prepare: adds parameters of the method.
        extra_parameters: their names, always trained.
        training_split: what a task is trained on.
        alternatives: further predictions that are reported.
    """
    trained = Trained(trainable, fills or {}, extra_parameters)
    start = trained.changes(apply_start or partial(_apply_start, hparams=hparams))
    finish, step = trained.changes(apply_end), trained.changes(train_step)
    whole = None if end_task is None else trained.changes(end_task)

    def fresh_planner(spec: StreamSpec) -> Planner:
        return augmenting(make_planner(spec), spec, seed)

    def init(ts: TrainState, spec: StreamSpec) -> State:
        part = trained.part(ts)
        stream, position = init_stream(part, spec, hparams, seed), fresh_planner(spec).position
        return State(stream, init_memory(part, spec), None if position is None else jnp.asarray(position))

    def planned_start(state: State, task: Task) -> Any:
        _check_steps(state)
        _check_task(state, least=-1)
        return plan_start(state, task)

    def start_now(ts: TrainState, state: State, plan: Any) -> tuple[TrainState, State]:
        begun: tuple[TrainState, State] = start(ts, trained.begun(ts, state), plan)
        return begun

    def step_now(ts: TrainState, state: State, batch: Batch) -> tuple[TrainState, State, StepOutputs]:
        check_batch(batch)
        begun = jnp.all((batch.t >= 0) & (batch.t <= state.stream.task))
        ts, after, outputs = step(ts, state, batch)
        known = (batch.y >= 0) & (batch.y < outputs["logits"].shape[-1])
        if state.stream.mask is not None:  # a label of another task, which not every loss notices
            known = known & state.stream.mask[batch.t, batch.y]
        stream = after.stream._replace(task=jnp.where(begun, after.stream.task, NOT_BEGUN))
        outputs = {**outputs, "loss": jnp.where(begun & jnp.all(known), outputs["loss"], jnp.nan)}
        position = next_position(state.position, batch.plan)
        return ts, after._replace(stream=stream, position=position), outputs

    def planned_end(state: State, batches: Iterable[Batch]) -> Any:
        _check_steps(state)
        _check_task(state, least=0)
        return plan_end(state, given(batches))

    def end_now(ts: TrainState, state: State, batches: Iterable[Batch]) -> tuple[TrainState, State]:
        _check_steps(state)
        _check_task(state, least=0)
        now: tuple[TrainState, State]
        batches = given(batches)
        now = finish(ts, state, plan_end(state, batches)) if whole is None else whole(ts, state, batches)
        return now

    return Algorithm(
        init=init,
        start_task=lambda ts, state, task: start_now(ts, state, planned_start(state, task)),
        train_step=step_now,
        end_task=end_now,
        predict=trained.reads(predict or _predict),
        hparams=hparams,
        planner=lambda spec, state: resumed(fresh_planner(spec), state.position),
        plan_start=planned_start,
        apply_start=start_now,
        plan_end=planned_end,
        apply_end=finish,
        prepare=prepare,
        training_split=training_split,
        alternatives=trained.reads(alternatives),
        trained=trained,
    )


def next_position(position: Any, plan: Any) -> Any:
    """Return the position of the planner after a step; its first number is -1 if the plan is of another step.

    Args:
        position: before the step, int32 `[n]`, or None.
        plan: of the step.

    Raises:
        ValueError: the plan is of other settings.
    """
    found = getattr(plan, "position", None)
    if _shape(position) != _shape(found):
        shapes = [_shape(p) for p in (position, found)]
        raise ValueError(
            f"the plan of a batch must have a position like the state's, {shapes[0]}, got {shapes[1]}; make "
            "the planner with algorithm.planner(spec, state) and give Batch(x, y, t, planner.next(y, t))"
        )
    if position is None:
        return None
    found = jnp.asarray(found, position.dtype)
    return found.at[0].set(jnp.where(found[0] == position[0] + 1, found[0], -1))


def _structure(tree: Any) -> Any:
    return jax.tree.structure(tree)


def _shape(position: Any) -> str:
    return "none" if position is None else str(list(np.shape(position)))


def check_batch(batch: Batch) -> None:
    """Raise ValueError unless labels and task indices are integers, one of each for every sample."""
    count = jnp.shape(batch.x)[:1]
    for name, values in (("labels y", batch.y), ("task indices t", batch.t)):
        dtype, shape = jnp.result_type(values), jnp.shape(values)
        if shape != count or not jnp.issubdtype(dtype, jnp.integer):
            raise ValueError(
                f"{name} of a batch must be integers {list(count)}, one for each of its samples, got {dtype} "
                f"{list(shape)}; give class indices, not one-hot rows, without a further axis"
            )


def _check_task(state: State, least: int) -> None:
    """Raise ValueError if a step was taken before its task had begun, or if no task has begun (`least` 0)."""
    task = state.stream.task
    if is_traced(task) or (found := int(np.min(task))) >= least:
        return
    what = "no task has begun" if found == -1 else "a step had samples of a task that had not begun"
    raise ValueError(
        f"{what}, so what was trained is of no use; call ts, state = algorithm.start_task(ts, state, task) "
        "before the first step of every task, and give each sample the index of its task as t"
    )


def _check_steps(state: State) -> None:
    if not is_traced(state.position):
        check_steps(state.position)


def init_stream(ts: TrainState, spec: StreamSpec, hparams: AlgorithmHParams, seed: int = 0) -> StreamState:
    """Return the stream's state before the first task.

    Args:
        ts: with the initial weights and a fresh optimizer state.
        spec: of the benchmark.
        hparams: of the algorithm.
        seed: of dropout.

    Raises:
        ValueError: the settings do not fit the stream; `lr_decay` is not 1 and the optimizer's learning rate
            cannot be set; or `consolidate` is "best".
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
    """Return the logits `[B, num_classes]`, masked to the task of each sample where the scenario says so.

    Args:
        ts: for the model and its running statistics; evaluation mode.
        params: weights, apart from `ts` so that they can be differentiated.
        state: of the algorithm.
        x: images `[B, H, W, C]`, or what else the network takes; see `normalise`.
        t: task index of each sample `[B]`.
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
    """Return what the network says of images in evaluation mode, unmasked; see `forward`.

    Args:
        ts: for the model.
        params: weights.
        state: of the algorithm.
        x: images `[B, H, W, C]`.
        method: of the module; None for logits `[B, num_classes]`, `features` for the last hidden layer.
        stats: running statistics, of an old network for example; None for those of `ts`.
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
    """Return what the network says of images in training mode, unmasked, and its new running statistics.

    Args:
        ts: for the model and the step, which dropout depends on.
        params: weights.
        state: of the algorithm.
        x: images `[B, H, W, C]`.
        method: as in `network`.
        stats: running statistics before the pass; None for those of `ts`.
        draw: number of the pass within the step; each drops its own units.
        counts: which samples count in the statistics of a batch, bool `[B]`; None for all.
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
    """Return the running statistics of batch normalisation; {} where the network has none."""
    return getattr(ts, "batch_stats", {})


def _collections(stats: Stats) -> dict[str, Any]:
    return {"batch_stats": stats} if jax.tree.leaves(stats) else {}


def frozen_network(ts: TrainState) -> tuple[Params, Stats]:
    """Return copies of the weights and of the running statistics, which no step reaches."""
    copies: tuple[Params, Stats] = jax.tree.map(jnp.copy, (ts.params, batch_stats(ts)))
    return copies


def empty_sum(p: jax.Array) -> jax.Array:
    """Return zeros like a parameter, for a sum of at least 32 bits: few bits lose what is small."""
    return jnp.zeros_like(p, jnp.promote_types(p.dtype, jnp.float32))


def check_no_batch_stats(ts: TrainState, name: str, reason: str) -> None:
    """Raise ValueError where the network has running statistics, which a method cannot follow."""
    if jax.tree.leaves(batch_stats(ts)):
        raise ValueError(
            f"{name} cannot train a network with batch normalisation: {reason}; use group normalisation "
            "(backbone.norm=group) or another method"
        )


def advance(ts: TrainState, gradient: Params, stats: Stats) -> TrainState:
    """Return the train state after a step of the optimizer, with new running statistics."""
    after: TrainState = ts.apply_gradients(grads=gradient, **_collections(stats))
    return after


def trained_on(state: State, batch: Batch) -> Batch:
    """Return the batch as the network is trained on it: augmented where the stream is, its plan the method's.

    Raises:
        ValueError: the stream is augmented, and the batch does not say how.
    """
    check_augmented(state, batch)
    return augmentation.cropped(batch)


def check_augmented(state: State, batch: Batch) -> None:
    """Raise ValueError where the stream is augmented, and the batch does not say how."""
    if state.stream.augmented is not None and not isinstance(batch.plan, AugmentedPlan):
        raise ValueError(
            "the stream's training samples are augmented and the batch has no plan, which says how; make one "
            "planner with algorithm.planner(spec, state) and give Batch(x, y, t, planner.next(y, t))"
        )


def masked(stream: StreamState, logits: jax.Array, t: jax.Array) -> jax.Array:
    """Return the logits `[B, num_classes]`, masked to the tasks `[B]` if the scenario is `task`.

    Raises:
        ValueError: logits or task indices of another shape.
    """
    check_logits(logits, jnp.shape(t), stream.mask)
    return logits if stream.mask is None else mask_logits(logits, stream.mask[t])


def check_logits(logits: Any, tasks: tuple[int, ...], mask: Any) -> None:
    """Raise ValueError unless logits are `[B, num_classes]` and task indices `[B]`.

    Args:
        logits: what the network returned.
        tasks: shape of the task indices.
        mask: of the stream, `[T, num_classes]`; None if logits are not masked.
    """
    found: tuple[int, ...] = getattr(logits, "shape", ())
    if len(found) == 2 and tasks == found[:1] and (mask is None or found[1] == mask.shape[1]):
        return
    shown = list(found) if found else type(logits).__name__
    classes = "num_classes" if mask is None else mask.shape[1]
    raise ValueError(
        f"the network must return one row of logits for each sample, [B, {classes}], for task indices t [B]; "
        f"got logits {shown} and t {list(tasks)}; reduce a sequence to one prediction in the network (its "
        "mean or its last position), and give one task index for each sample"
    )


def normalise(stream: StreamState, x: jax.Array) -> jax.Array:
    """Return inputs as the network takes them.

    uint8 images become `(x / 255 - mean) / std` in the dtype of the weights, floats are cast to that dtype,
    and other integers (tokens, indices) and booleans stay as they are.
    """
    if x.dtype == jnp.uint8:
        return x.astype(stream.scale.dtype) * stream.scale + stream.shift
    return x.astype(stream.scale.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x


def blank_image(spec: StreamSpec, dtype: Any) -> jax.Array:
    """Return one input of zeros `[1, H, W, C]` as `normalise` makes it for weights of a dtype."""
    kept = jnp.dtype(spec.image_dtype)
    as_weights = kept == jnp.uint8 or jnp.issubdtype(kept, jnp.floating)
    return jnp.zeros((1, *spec.image_shape), dtype if as_weights else kept)


def mask_logits(logits: jax.Array, mask: jax.Array) -> jax.Array:
    """Return the logits `[B, num_classes]` with the least number of their dtype where the mask is False."""
    return jnp.where(mask, logits, jnp.finfo(logits.dtype).min)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the mean cross-entropy of logits `[B, num_classes]` and labels `[B]`, shape ()."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def objective(
    ts: TrainState, params: Params, state: State, batch: Batch
) -> tuple[jax.Array, tuple[jax.Array, Stats]]:
    """Return the mean cross-entropy, shape (); then the logits `[B, num_classes]` and running statistics."""
    logits, stats = training_forward(ts, params, state, batch.x)
    logits = masked(state.stream, logits, batch.t)
    return cross_entropy(logits, batch.y), (logits, stats)


def train_step(
    ts: TrainState, state: State, batch: Batch, objective: Callable[..., Any] = objective
) -> tuple[TrainState, State, StepOutputs]:
    """Take one optimizer step on `objective(ts, params, state, batch)`, which returns what `objective` does.

    Args:
        ts: before the step.
        state: of the algorithm; it stays as it is.
        batch: of the stream.
        objective: the loss; by default the mean cross-entropy.
    """
    batch = trained_on(state, batch)
    loss_fn = jax.value_and_grad(lambda params: objective(ts, params, state, batch), has_aux=True)
    (loss, (logits, stats)), gradient = loss_fn(ts.params)
    return advance(ts, gradient, stats), state, {"loss": loss, "logits": logits, "labels": batch.y}


def predict(ts: TrainState, state: State, x: jax.Array, t: jax.Array) -> jax.Array:
    """Return the network's logits `[B, num_classes]` in evaluation mode."""
    return forward(ts, ts.params, state, x, t)


_apply_start, _predict = apply_start, predict  # `make_algorithm` has arguments of these names


def feature_width(ts: TrainState, spec: StreamSpec, name: str) -> int:
    """Return the units of the last hidden layer, which a method of that name asks the network for.

    Raises:
        ValueError: the network has no method `features(x, train)`, or no last layer called `head`.
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
    """Return the logits `[B, num_classes]` that a network's last layer makes of features `[B, D]`."""
    logits: jax.Array = module.head(features)
    return logits


def head_logits(ts: TrainState, params: Params, stats: Stats, features: jax.Array) -> jax.Array:
    """Return the logits `[B, num_classes]` that weights make of features `[B, D]`, unmasked."""
    variables = {"params": params, **_collections(stats)}
    logits: jax.Array = as_called(ts.apply_fn)(variables, features, method=apply_head)
    return logits


def without_head_gradient(params: Params, frozen: Any) -> Params:
    """Return the parameters; where the flag `frozen` is True, no gradient reaches the last layer."""
    return {**params, "head": select(frozen, jax.lax.stop_gradient(params["head"]), params["head"])}


def with_head_of(before: TrainState, after: TrainState, frozen: Any) -> TrainState:
    """Return the train state after a step; where `frozen` is True, with the last layer of before it."""
    head = select(frozen, before.params["head"], after.params["head"])
    return after.replace(params={**after.params, "head": head})
