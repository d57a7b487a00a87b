"""Replay of samples from a memory: the shared part of A-GEM, ER, DER and DER++.

    L = loss(batch, draws), with draws from the memory before the step; then the batch is written to it

The plan of a batch says to which slots it is written and which slots the step reads (`Batch.plan`, from
`sequel_core.stream.memory`). A new replay method defines only its loss.

Mirror: sequel_lightning/replay.py
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.training.train_state import TrainState

from sequel_core.hparams import MemoryHParams
from sequel_core.stream.augmentation import method_plan
from sequel_core.stream.benchmark import StreamSpec
from sequel_core.stream.memory import MemoryPlanner, StepPlan
from sequel_core.stream.planner import Planner
from sequel_core.stream.task import Batch, Samples
from sequel_core.stream.trees import LeafSpec, Tree, is_image, is_label, leaves, specs_of, tree_map
from sequel_flax.augmentation import cropped, cropped_draw
from sequel_flax.bundle import (
    Algorithm,
    Model,
    Params,
    State,
    Stats,
    StepOutputs,
    advance,
    blank_output,
    canonical_dtype,
    check_augmented,
    check_logits,
    collections,
    for_objective,
    make_algorithm,
    objective_of,
    training_forward,
    with_masked_logits,
)
from sequel_flax.objectives import Objective, losses_of, output_leaf
from sequel_flax.placement import placed
from sequel_flax.trainable import Selection


class Memory(NamedTuple):
    """Copies of samples; M slots."""

    x: Tree  # inputs [M, ...], in the dtype of the stream, or floats in mem_dtype
    y: Tree  # targets [M, ...]; labels are int32
    t: jax.Array  # task indices, int32 [M]; -1 for an empty slot
    outputs: jax.Array | None  # [M, ...], of the network when it was trained on the sample


class ReplayBatch(NamedTuple):
    """Samples of a step: its batch, or a draw from the memory."""

    x: Tree  # inputs [N, ...]
    y: Tree  # targets [N, ...]
    t: jax.Array  # task indices [N]
    stored: Any  # outputs that the memory holds [N, ...]; None where it holds none
    count: Any  # number of samples that count; the samples after them are padding
    classes: Any = None  # classes whose logits the loss is over, bool [num_classes]; None for all


class Outputs(NamedTuple):
    """The outputs of the network for samples, and their losses."""

    outputs: Any  # what the network returns [N, ...]; logits are those of all classes
    masked: Any  # the same; logits are masked to the task of each sample in the task scenario
    losses: jax.Array  # [N]
    weights: Any  # of the samples in a mean [N]; None for 1
    stored: Any  # outputs that the memory holds [N, ...]; None where it holds none
    count: Any  # number of samples that count, the first ones


Loss = Callable[[Outputs, Sequence[Outputs]], jax.Array]
Choice = Callable[[Params, Model, list[ReplayBatch]], list[ReplayBatch]]


def empty_memory(
    spec: StreamSpec, slots: int, output: Any = None, hparams: MemoryHParams | None = None
) -> Memory:
    """Return a memory of empty slots, for outputs like `output` `[1, ...]`; None to keep no outputs.

    The settings give the dtype of inputs and outputs that are floats, and the device.
    """
    slots = max(slots, 1)  # no array of a state is empty: orbax does not store such arrays
    device = jax.devices("cpu")[0] if hparams is not None and hparams.mem_device == "cpu" else None

    def zeros(shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jnp.zeros((slots, *shape), dtype, device=device)

    def empty(leaf: LeafSpec) -> jax.Array:
        return zeros(leaf.shape, canonical_dtype(leaf.dtype))

    def stored(leaf: LeafSpec) -> jax.Array:
        return zeros(leaf.shape, memory_dtype(canonical_dtype(leaf.dtype), hparams))

    return Memory(
        x=tree_map(stored, spec.x),
        y=zeros((), jnp.int32) if spec.labelled else tree_map(empty, spec.y),
        t=jnp.full(slots, -1, jnp.int32, device=device),
        outputs=None if output is None else zeros(output.shape[1:], memory_dtype(output.dtype, hparams)),
    )


def memory_dtype(dtype: Any, hparams: MemoryHParams | None) -> Any:
    """Return the dtype in which a memory holds inputs or outputs of a dtype; integers keep theirs."""
    if hparams is None or hparams.mem_dtype == "auto" or not jnp.issubdtype(dtype, jnp.floating):
        return dtype
    return jnp.dtype(hparams.mem_dtype)


def read(memory: Memory, slots: jax.Array) -> ReplayBatch:
    """Return the samples in these slots `[N]`; a slot beyond the last one is padding and does not count."""
    x, y, t, stored = jax.tree.map(lambda a: a.at[slots].get(mode="clip"), memory)
    return ReplayBatch(x, y, jnp.maximum(t, 0), stored, jnp.sum(slots < len(memory.t)))


def write(memory: Memory, slots: jax.Array, batch: Batch, outputs: Any) -> Memory:
    """Return the memory with the batch in these slots `[B]`, without samples for slots beyond the last."""
    new = Memory(batch.x, batch.y, batch.t, None if memory.outputs is None else outputs)
    stored: Memory = jax.tree.map(lambda a, b: a.at[slots].set(b.astype(a.dtype), mode="drop"), memory, new)
    return stored


def stored_samples(memory: Memory) -> Samples:
    """Return copies of the samples that the memory holds, in the order of slots; images `[n, H, W, C]`.

    Floats of 16 bits are returned as float32.
    """
    x, y, t = jax.tree.map(np.asarray, jax.device_get(tuple(memory[:3])))

    def stored(a: Any) -> Any:
        return a[t >= 0].astype(np.float32 if a.dtype in (jnp.float16, jnp.bfloat16) else a.dtype)

    x, y, t = (tree_map(stored, tree) for tree in (x, y, t))
    return Samples(x, y.astype(np.int64) if is_label(specs_of(y)) else y, t.astype(np.int64))


def mean_loss(*outputs: Outputs) -> jax.Array:
    """Return the mean loss of all samples that count, 0 without any, shape ()."""
    total = sum_of_first(outputs[0].losses, outputs[0].count)
    for s in outputs[1:]:
        total = total + sum_of_first(s.losses, s.count)
    if outputs[0].weights is None:
        return total / jnp.maximum(sum(s.count for s in outputs), 1)
    weight: Any = sum(sum_of_first(s.weights, s.count) for s in outputs)
    return total / jnp.where(weight > 0, weight, 1)


def sum_of_first(values: jax.Array, count: Any) -> jax.Array:
    """Return the sum of the first `count` of the values `[N]`, shape ()."""
    return jnp.sum(jnp.where(jnp.arange(len(values)) < count, values, 0))


def forward(
    params: Params, model: Model, samples: Sequence[ReplayBatch], together: bool
) -> tuple[list[Outputs], Stats]:
    """Return outputs and losses of samples in training mode, which updates running statistics.

    With `together`, all samples go through the network in one pass; otherwise the first batch has a pass, and
    the others together have another.
    """
    outputs: list[Outputs] = []
    stats = collections(model.ts)
    for k, part in enumerate([samples] if together else [samples[:1], samples[1:]]):
        if sum(len(s.t) for s in part):  # there is no pass for an empty draw
            new, stats = one_pass(params, model, part, stats, k)
            outputs += new
        else:
            outputs += [no_outputs(outputs[0], s) for s in part]
    return outputs, stats


def one_pass(
    params: Params, model: Model, samples: Sequence[ReplayBatch], stats: Stats, draw: Any
) -> tuple[list[Outputs], Stats]:
    """Return outputs and losses of samples, at least one, that go through the network in one pass."""
    sizes = np.cumsum([len(s.t) for s in samples])[:-1]
    counts = [None if isinstance(s.count, int) else jnp.arange(len(s.t)) < s.count for s in samples]
    full = all(c is None for c in counts)  # a batch, not a draw
    of_all = None if full else jnp.concatenate([jnp.arange(len(s.t)) < s.count for s in samples])

    def call(x: Any, t: jax.Array, counts: jax.Array | None) -> tuple[Any, Stats]:
        options: dict[str, Any] = {"stats": stats, "draw": draw, "counts": counts}
        return training_forward(model.ts, params, model.state, x, t, **options)

    out, after = call(joined([s.x for s in samples]), joined([s.t for s in samples]), of_all)
    total = sum(len(s.t) for s in samples)
    if model.objective.classification and hasattr(out, "shape"):
        check_logits(out, (total,), model.state.stream.mask)
    arrays, structure = jax.tree.flatten(out)
    parts = zip(*(jnp.split(a, sizes) for a in arrays), strict=True)
    outputs = []
    for s, mask, part_arrays in zip(samples, counts, parts, strict=True):
        part, batch = jax.tree.unflatten(structure, part_arrays), Batch(s.x, s.y, s.t)
        net = for_objective(model, batch, part, partial(_outputs_of, call, s.t, mask))
        losses = losses_of(model.objective, over_classes(net, s.classes), batch)
        weights = None if model.objective.weight is None else model.objective.weight(batch)
        outputs.append(Outputs(part, net(s.x), losses, weights, s.stored, s.count))
    return outputs, after


def over_classes(model: Callable[[Any], Any], classes: Any) -> Callable[[Any], Any]:
    """Return a model whose logits are masked to some classes, bool `[num_classes]`; None for all classes."""
    return model if classes is None else lambda x: with_masked_logits(model(x), classes[None])


def _outputs_of(call: Callable[..., Any], t: Any, counts: Any, x: Any) -> Any:
    return call(x, t, counts)[0]


def joined(trees: Sequence[Any]) -> Any:
    """Return trees of arrays `[n, ...]` as one, along the first axis."""
    return jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *trees)


def no_outputs(like: Outputs, samples: ReplayBatch) -> Outputs:
    """Return the outputs for an empty draw, in the structure of others."""
    outputs, masked, losses, weights = jax.tree.map(lambda a: a[:0], like[:4])
    return Outputs(outputs, masked, losses, weights, samples.stored, samples.count)


def total_weight(objective: Objective, samples: Sequence[ReplayBatch]) -> jax.Array:
    """Return the sum of the weights of the samples that count, 1 for none, shape ()."""
    if objective.weight is None:
        return jnp.maximum(sum(s.count for s in samples), 1)
    weight_of = objective.weight
    total: Any = sum(sum_of_first(weight_of(Batch(*s[:3])), s.count) for s in samples)
    return jnp.where(total > 0, total, 1)


def planned(memory: Memory, batch: Batch, plan_type: type[Any] = StepPlan) -> Any:
    """Return the plan of a batch.

    Raises:
        ValueError: the batch has no plan, or its inputs have another dtype than the memory, unless both are
            floats.
    """
    plan = method_plan(batch)
    if not isinstance(plan, plan_type):
        raise ValueError(
            "the batch has no plan, which says what to write to the memory and what to read; make one "
            "planner with algorithm.planner(spec, state) and give Batch(x, y, t, planner.next(y, t))"
        )
    for a, b in zip(leaves(batch.x), leaves(memory.x), strict=True):
        floats = jnp.issubdtype(a.dtype, jnp.floating) and jnp.issubdtype(b.dtype, jnp.floating)
        if jnp.result_type(a) != b.dtype and not floats:
            what = "images" if is_image(specs_of(memory.x)) else "inputs"
            raise ValueError(
                f"the memory holds {b.dtype} {what}, the batch has {a.dtype}; "
                f"give a spec with LeafSpec(..., '{a.dtype}')"
            )
    return plan


def draws(memory: Memory, batch: Batch) -> list[ReplayBatch]:
    """Return the batch, then each draw of its plan from the memory, augmented; see `planned`."""
    reads = planned(memory, batch).reads
    current = ReplayBatch(cropped(batch).x, batch.y, batch.t, None, len(batch.t))
    return [current, *(drawn(memory, batch, reads[k], k) for k in range(len(reads)))]


def drawn(memory: Memory, batch: Batch, slots: jax.Array, k: Any) -> ReplayBatch:
    """Return draw k of a batch's plan, the samples in these slots `[R]`, augmented."""
    samples = read(memory, slots)

    def padded(a: jax.Array, b: jax.Array) -> jax.Array:  # by a sample, as an empty slot may have no tokens
        counts = jnp.arange(len(a)) < samples.count
        return jnp.where(counts.reshape(-1, *[1] * (a.ndim - 1)), a, b[:1].astype(a.dtype))

    x = tree_map(lambda a, b: a.astype(jnp.result_type(b)), samples.x, batch.x)
    x, y = (tree_map(padded, *trees) for trees in ((x, batch.x), (samples.y, batch.y)))
    return samples._replace(x=cropped_draw(x, batch, k), y=y)


def replay(
    hparams: MemoryHParams,
    seed: int,
    loss: Loss,
    num_draws: int = 1,
    past_only: bool = False,
    together: bool = False,
    keep_outputs: bool = False,
    choose: Choice = lambda params, model, samples: samples,
    trainable: Selection = None,
    objective: Objective | None = None,
    **parts: Any,
) -> Algorithm:
    """Return the algorithm that trains on `loss(batch, draws)`.

    Args:
        hparams: settings of the method and of its memory.
        seed: of dropout and of the memory, >= 0.
        loss: of the outputs for the batch and for each draw, shape ().
        num_draws: independent draws of a step, >= 0.
        past_only: whether draws are from past tasks only.
        together: whether the batch and the draws have one pass; see `forward`.
        keep_outputs: whether the memory holds the outputs for its samples; see the setting `output`.
        choose: what a step trains on, from its batch and its draws.
        trainable: which parameters are trained; see `make_algorithm`.
        objective: what the network is trained on; see `make_algorithm`.
        parts: arguments of `make_algorithm` that replace those of this function.
    """

    def init_memory(ts: TrainState, spec: StreamSpec) -> Memory:
        output = blank_output(ts, spec, hparams) if keep_outputs else None
        return empty_memory(spec, hparams.slots(spec.num_tasks), output, hparams)

    def train_step(ts: TrainState, state: State, batch: Batch) -> tuple[TrainState, State, StepOutputs]:
        check_augmented(state, batch)
        model = Model(ts, state, objective_of(objective, state.stream), hparams)
        samples = choose(ts.params, model, draws(state.memory, batch))

        def loss_fn(params: Params) -> tuple[jax.Array, tuple[Outputs, Stats]]:
            (current, *others), stats = forward(params, model, samples, together)
            return loss(current, others), (current, stats)

        (value, (current, stats)), gradient = jax.value_and_grad(loss_fn, has_aux=True)(ts.params)
        return written(model, batch, value, current, advance(ts, gradient, stats))

    def make_planner(spec: StreamSpec) -> Planner:
        return MemoryPlanner(hparams, spec, seed, num_draws, past_only)

    usual: dict[str, Any] = {"init_memory": init_memory, "make_planner": make_planner}
    options = {"trainable": trainable, "objective": objective, **usual, **parts}
    step = options.pop("train_step", train_step)
    return placed(make_algorithm(hparams, seed, step, **options))


def written(
    model: Model, batch: Batch, loss: jax.Array, outputs: Outputs, after: TrainState
) -> tuple[TrainState, State, StepOutputs]:
    """Return the results of a step, which writes its batch to the memory.

    Args:
        model: The network before the step.
        batch: The batch, not augmented.
        loss: The loss of the step.
        outputs: The outputs for the batch.
        after: The train state after the step.
    """
    state = model.state
    keep_outputs = state.memory.outputs is not None
    kept = output_leaf(outputs.outputs, model.hparams.output) if keep_outputs else None
    memory = write(state.memory, method_plan(batch).write, batch, kept)
    step_outputs = {"loss": loss, "logits": outputs.masked, "labels": batch.y}
    return after, state._replace(memory=memory), step_outputs
