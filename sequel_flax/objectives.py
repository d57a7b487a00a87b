"""Objectives: the loss that a network is trained on, its likelihood, and the score that is measured.

    objective = from_outputs(lambda outputs, y: jnp.abs(outputs - y).sum(1))
    algorithm = er(ERHParams(), objective=objective)

The same objective is used by the training step, by what a method computes of past tasks, and in evaluation.

Mirror: sequel_lightning/objectives.py
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sequel_core.objectives import SCORES, ObjectiveHParams, Score
from sequel_core.stream.benchmark import StreamSpec
from sequel_core.stream.task import Batch

Model = Callable[[Any], Any]
"""A network as an objective calls it: `model(batch.x)` returns what the network returns."""


class Objective(NamedTuple):
    """What a network is trained and scored on.

    Args:
        loss: `loss(model, batch)` returns the loss of each sample, `[B]`.
        nll: `nll(model, batch)` returns -log p(y | x) of each sample up to a constant, `[B]`; None if there
            is no such likelihood. Fisher estimates use it.
        score: The name of the score, and its direction.
        values: `values(outputs, y)` returns the score of each sample, `[B]`. The score of several samples is
            the mean of these, weighted by `score_weight`. None for the loss, or if there is a `metric`.
        metric: Returns an empty clu metric, such as `clu.metrics.Accuracy.empty`. It is updated with
            `logits=outputs, labels=y`, and used in place of `values`; `outputs` is the only array that the
            network returns, or `logits`, or all if there is neither.
        weight: `weight(batch)` returns the weight of each sample in a mean, `[B]`; None for 1. A mean loss is
            sum(loss) / sum(weight).
        mean: `mean(model, batch)` returns the same mean in fewer operations, shape (); None if there is none.
        sample: `sample(outputs, u)` returns targets drawn from the model, from uniform numbers u of the shape
            of y; None if targets cannot be drawn.
        outcomes: `outcomes(outputs)` returns targets `[K, B, ...]` and weights `[K, B]`. The weighted sum of
            the squared gradients of `nll` at these targets is the expectation over all targets of the model;
            None if there is no such sum.
        classification: Whether targets are class labels.
        score_weight: `score_weight(batch)` returns the weight of each sample in the score, `[B]`; None for 1.
        target: The key of y in batches that are dicts, as Lightning takes them.

    Example:
        >>> absolute = Objective(lambda model, batch: jnp.abs(model(batch.x) - batch.y).sum(1))
        >>> batch = Batch(jnp.ones((2, 3)), jnp.zeros((2, 3)), jnp.zeros(2, int))
        >>> absolute.loss(lambda x: 2 * x, batch).tolist()
        [6.0, 6.0]
    """

    loss: Callable[[Model, Batch], jax.Array]
    nll: Callable[[Model, Batch], jax.Array] | None = None
    score: Score = Score("loss", higher_is_better=False, fraction=False)
    values: Callable[[Any, Any], jax.Array] | None = None
    metric: Callable[[], Any] | None = None
    weight: Callable[[Batch], jax.Array] | None = None
    mean: Callable[[Model, Batch], jax.Array] | None = None
    sample: Callable[[Any, jax.Array], Any] | None = None
    outcomes: Callable[[Any], tuple[jax.Array, jax.Array]] | None = None
    classification: bool = False
    score_weight: Callable[[Batch], jax.Array] | None = None
    target: str = "labels"


def from_outputs(
    loss: Callable[[Any, Any], jax.Array],
    nll: Callable[[Any, Any], jax.Array] | None = None,
    **options: Any,
) -> Objective:
    """Return an objective whose loss depends on the outputs and the targets only.

    Args:
        loss: `loss(outputs, y)` returns the loss of each sample, `[B]`.
        nll: `nll(outputs, y)` returns the negative log-likelihood of each sample, `[B]`; the loss itself if
            it is one, None if there is none.
        **options: Further fields of `Objective`.

    Example:
        >>> absolute = from_outputs(lambda outputs, y: jnp.abs(outputs - y).sum(1))
        >>> batch = Batch(jnp.ones((2, 3)), jnp.zeros((2, 3)), jnp.zeros(2, int))
        >>> absolute.loss(lambda x: 2 * x, batch).tolist()
        [6.0, 6.0]
    """

    def called(function: Callable[[Any, Any], jax.Array]) -> Callable[[Model, Batch], jax.Array]:
        return lambda model, batch: function(model(batch.x), batch.y)

    return Objective(called(loss), None if nll is None else called(nll), **options)


def output_leaf(outputs: Any, name: str | None = None) -> Any:
    """Return one array of what a network returns.

    Args:
        outputs: An array, or a tuple, a dict or an object that holds arrays.
        name: A key, an attribute or an index; None for the only array, or the one called `logits`.

    Raises:
        ValueError: There is no such array.

    Example:
        >>> outputs = {"logits": jnp.ones((2, 3)), "hidden": jnp.ones((2, 8))}
        >>> output_leaf(outputs).shape, output_leaf(outputs, "hidden").shape
        ((2, 3), (2, 8))
    """
    if name is None and hasattr(outputs, "shape"):
        return outputs
    leaves = jax.tree.leaves(outputs)
    if name is None and len(leaves) == 1:
        return leaves[0]
    wanted = "logits" if name is None else name
    if isinstance(outputs, Mapping):
        array = outputs.get(wanted)
    elif isinstance(outputs, Sequence) and wanted.isdecimal():
        array = outputs[int(wanted)] if int(wanted) < len(outputs) else None
    else:
        array = getattr(outputs, wanted, None) if hasattr(type(outputs), "__annotations__") else None
    if hasattr(array, "shape"):
        return array
    needed = "one array, or one called logits" if name is None else f"an array {name}"
    raise ValueError(
        f"the method needs {needed} in what the network returns, got {outputs_text(outputs)}; call the array "
        "logits, give a loss by from_outputs, or set `output` if the method has that setting"
    )


def metric_outputs(outputs: Any) -> Any:
    """Return what a metric is updated with: the only array, or `logits`; all outputs if there is neither.

    Args:
        outputs: What the network returns.
    """
    try:
        return output_leaf(outputs)
    except ValueError:
        return outputs


def outputs_text(outputs: Any) -> str:
    """Return the type and the shapes of what a network returns, for messages.

    Args:
        outputs: A tree of arrays.

    Example:
        >>> outputs_text({"logits": jnp.ones((2, 3))})
        "dict of ['logits'] [2, 3]"
    """
    if hasattr(outputs, "shape"):
        return str(list(outputs.shape))
    paths = jax.tree_util.tree_flatten_with_path(outputs)[0]
    arrays = (f"{jax.tree_util.keystr(path)} {list(jnp.shape(leaf))}" for path, leaf in paths)
    return f"{type(outputs).__name__} of {', '.join(arrays) or 'nothing'}"


# -- built-in objectives


def cross_entropy(
    label_smoothing: float = 0.0, class_weights: Sequence[float] | None = None, reduce: str = "auto"
) -> Objective:
    """Return the cross-entropy of class labels, with the accuracy as the score.

    Args:
        label_smoothing: Weight of the uniform distribution in the target, in [0, 1).
        class_weights: Weight of each class in the loss; None for 1.
        reduce: A mean loss is over `samples`, or over the class `weights` of the samples, which `auto`
            chooses if there are any.

    Example:
        >>> batch = Batch(jnp.zeros((2, 4)), jnp.array([0, 3]), jnp.zeros(2, int))
        >>> cross_entropy().loss(lambda x: x, batch).round(2)
        Array([1.39, 1.39], dtype=float32)
    """
    hparams = ObjectiveHParams(
        "cross_entropy",
        label_smoothing=label_smoothing,
        class_weights=None if class_weights is None else tuple(class_weights),
        reduce=reduce,  # type: ignore[arg-type]
    )
    weights, smoothing = hparams.class_weights, hparams.label_smoothing
    by_weight = weights is not None and hparams.reduce != "samples"

    def nll(outputs: Any, y: jax.Array) -> jax.Array:
        losses: jax.Array = optax.softmax_cross_entropy_with_integer_labels(output_leaf(outputs), y)
        return losses

    def loss(outputs: Any, y: jax.Array) -> jax.Array:
        if weights is None and not smoothing:
            return nll(outputs, y)
        logits = output_leaf(outputs)
        scale = jnp.asarray(weights or [1.0] * logits.shape[1], logits.dtype)
        terms = -scale[None] * jax.nn.log_softmax(logits)
        at_label = jnp.take_along_axis(terms, y[:, None], 1)[:, 0]
        allowed = logits > jnp.finfo(logits.dtype).min  # False for masked classes
        uniform = jnp.where(allowed, terms, 0).sum(1) / allowed.sum(1)
        losses: jax.Array = (1 - smoothing) * at_label + smoothing * uniform
        return losses

    def mean(model: Model, batch: Batch) -> jax.Array:
        return jnp.mean(nll(model(batch.x), batch.y))

    def sample(outputs: Any, u: jax.Array) -> jax.Array:
        cumulative = jnp.cumsum(jax.nn.softmax(output_leaf(outputs)), 1)
        return jnp.minimum((u[:, None] >= cumulative).sum(1), cumulative.shape[1] - 1)

    def outcomes(outputs: Any) -> tuple[jax.Array, jax.Array]:
        p = jax.nn.softmax(output_leaf(outputs))
        return jnp.broadcast_to(jnp.arange(p.shape[1])[:, None], p.T.shape), p.T

    return from_outputs(
        loss,
        nll,
        score=SCORES["cross_entropy"],
        values=lambda outputs, y: (output_leaf(outputs).argmax(-1) == y).astype(jnp.float32),
        weight=(lambda batch: jnp.asarray(weights)[batch.y]) if by_weight else None,
        mean=mean if weights is None and not smoothing else None,
        sample=sample,
        outcomes=outcomes,
        classification=True,
    )


def binary_cross_entropy() -> Objective:
    """Return the sum of the binary cross-entropies of several labels, with the share of right labels.

    Targets are bool or 0 or 1 `[B, K]`, outputs are logits `[B, K]`.

    Example:
        >>> batch = Batch(jnp.zeros((2, 4)), jnp.ones((2, 4), bool), jnp.zeros(2, int))
        >>> binary_cross_entropy().loss(lambda x: x, batch).round(2)
        Array([2.77, 2.77], dtype=float32)
    """

    def loss(outputs: Any, y: jax.Array) -> jax.Array:
        logits, targets = _same_shape(outputs, y)
        losses: jax.Array = optax.sigmoid_binary_cross_entropy(logits, targets.astype(logits.dtype))
        return losses.sum(1)

    def values(outputs: Any, y: jax.Array) -> jax.Array:
        logits, targets = _same_shape(outputs, y)
        return ((logits > 0) == (targets > 0)).astype(jnp.float32).mean(1)

    def sample(outputs: Any, u: jax.Array) -> jax.Array:
        logits = output_leaf(outputs)
        return u.reshape(logits.shape) < jax.nn.sigmoid(logits)

    return from_outputs(loss, loss, score=SCORES["binary_cross_entropy"], values=values, sample=sample)


def squared_error() -> Objective:
    """Return half the squared error, summed over the values of a target, with the mean squared error.

    It is the negative log-likelihood of a normal distribution of unit variance, up to a constant. Targets are
    `[B]` or `[B, D]`, outputs `[B, 1]` or `[B, D]`.

    Example:
        >>> batch = Batch(jnp.zeros((2, 3)), jnp.ones((2, 3)), jnp.zeros(2, int))
        >>> squared_error().loss(lambda x: x, batch).tolist()
        [1.5, 1.5]
    """

    def loss(outputs: Any, y: jax.Array) -> jax.Array:
        f, targets = _same_shape(outputs, y)
        return 0.5 * ((f - targets) ** 2).sum(1)

    def values(outputs: Any, y: jax.Array) -> jax.Array:
        f, targets = _same_shape(outputs, y)
        return ((f - targets) ** 2).mean(1)

    def sample(outputs: Any, u: jax.Array) -> jax.Array:
        f = _rows(output_leaf(outputs))
        eps = jnp.finfo(f.dtype).eps
        inside = jnp.clip(u.reshape(f.shape).astype(f.dtype), eps, 1 - eps)  # 0 and 1 would be infinite
        return f + jax.scipy.special.ndtri(inside)

    def outcomes(outputs: Any) -> tuple[jax.Array, jax.Array]:
        f = _rows(output_leaf(outputs))
        unit = jnp.eye(f.shape[1], dtype=f.dtype)[:, None]
        return f[None] - unit, jnp.ones((f.shape[1], f.shape[0]), f.dtype)  # the gradients are those of f_d

    score = SCORES["squared_error"]
    return from_outputs(loss, loss, score=score, values=values, sample=sample, outcomes=outcomes)


def token_cross_entropy(
    ignore_index: int = -100, label_smoothing: float = 0.0, reduce: str = "tokens"
) -> Objective:
    """Return the cross-entropy of one class per token, with the accuracy over tokens as the score.

    Targets are integers `[B, L]`, outputs are logits `[B, L, V]`.

    Args:
        ignore_index: Target of tokens that do not count.
        label_smoothing: Weight of the uniform distribution in the target, in [0, 1).
        reduce: A mean loss is over all `tokens` that count, or over `samples`: the mean over the tokens of
            each sample, then the mean of these.

    Example:
        >>> batch = Batch(jnp.zeros((1, 3, 4)), jnp.array([[1, 2, -100]]), jnp.zeros(1, int))
        >>> token_cross_entropy().loss(lambda x: x, batch).round(2)
        Array([2.77], dtype=float32)
    """
    hparams = ObjectiveHParams(
        "token_cross_entropy",
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduce="tokens" if reduce == "auto" else reduce,  # type: ignore[arg-type]
    )
    by_token, smoothing = hparams.reduce == "tokens", hparams.label_smoothing

    def counts(y: jax.Array) -> jax.Array:
        return y != ignore_index

    def num_tokens(batch: Batch) -> jax.Array:
        return counts(batch.y).sum(1).astype(float)

    def summed(outputs: Any, y: jax.Array, smoothing: float = 0.0) -> jax.Array:
        log_p = jax.nn.log_softmax(output_leaf(outputs))
        at_label = -jnp.take_along_axis(log_p, jnp.where(counts(y), y, 0)[..., None], -1)[..., 0]
        losses = (1 - smoothing) * at_label - smoothing * log_p.mean(-1) if smoothing else at_label
        return jnp.where(counts(y), losses, 0).sum(1)

    def loss(outputs: Any, y: jax.Array) -> jax.Array:
        total = summed(outputs, y, smoothing)
        return total if by_token else total / jnp.maximum(counts(y).sum(1), 1)

    def values(outputs: Any, y: jax.Array) -> jax.Array:
        right: jax.Array = (output_leaf(outputs).argmax(-1) == y) & counts(y)
        return right.sum(1) / jnp.maximum(counts(y).sum(1), 1)

    def sample(outputs: Any, u: jax.Array) -> jax.Array:
        cumulative = jnp.cumsum(jax.nn.softmax(output_leaf(outputs)), -1)
        return jnp.minimum((u[..., None] >= cumulative).sum(-1), cumulative.shape[-1] - 1)

    return from_outputs(
        loss,
        summed,
        score=SCORES["token_cross_entropy"],
        values=values,
        weight=num_tokens if by_token else None,
        sample=sample,
        score_weight=num_tokens,
    )


# -- what methods use


def check_classification(objective: Objective, method: str) -> None:
    """Check that an objective is for class labels.

    Args:
        objective: The objective.
        method: The name of the method that needs class labels.

    Raises:
        ValueError: It is not.

    Example:
        >>> check_classification(cross_entropy(), "icarl")
    """
    if not objective.classification:
        raise ValueError(
            f"{method} needs an objective for class labels, got one with classification=False and the score "
            f"{objective.score.name!r}; use cross_entropy, or another method"
        )


def losses_of(objective: Objective, model: Model, batch: Batch) -> jax.Array:
    """Return the loss of each sample, `[B]`.

    Args:
        objective: The objective.
        model: The network.
        batch: The samples.

    Raises:
        ValueError: The objective's loss has another shape.

    Example:
        >>> batch = Batch(jnp.zeros((2, 4)), jnp.array([0, 3]), jnp.zeros(2, int))
        >>> losses_of(cross_entropy(), lambda x: x, batch).shape
        (2,)
    """
    losses = objective.loss(model, batch)
    if jnp.shape(losses) != jnp.shape(batch.t):
        raise ValueError(
            f"the loss of an objective must return one number per sample, {list(jnp.shape(batch.t))}, got "
            f"{list(jnp.shape(losses))}; do not take the mean over the batch"
        )
    return losses


def mean_loss(objective: Objective, model: Model, batch: Batch) -> jax.Array:
    """Return the mean loss of a batch, sum(loss) / sum(weight), shape (); 0 if the weights are 0.

    Args:
        objective: The objective.
        model: The network.
        batch: The samples.

    Raises:
        ValueError: The objective's loss is not one number per sample.

    Example:
        >>> batch = Batch(jnp.zeros((2, 4)), jnp.array([0, 3]), jnp.zeros(2, int))
        >>> mean_loss(cross_entropy(), lambda x: x, batch).round(2)
        Array(1.39, dtype=float32)
    """
    if objective.mean is not None:
        return objective.mean(model, batch)
    losses = losses_of(objective, model, batch)
    if objective.weight is None:
        return losses.mean()
    total = objective.weight(batch).sum()
    return losses.sum() / jnp.where(total > 0, total, 1)


def _rows(values: jax.Array) -> jax.Array:
    """Return values `[B]` as `[B, 1]`."""
    return values[:, None] if values.ndim == 1 else values


def _same_shape(outputs: Any, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return outputs and targets `[B, D]`; raise ValueError if their shapes differ."""
    f, targets = _rows(output_leaf(outputs)), _rows(y)
    if f.shape != targets.shape:
        raise ValueError(
            f"the network must return one value for each value of a target, {list(targets.shape)}, got "
            f"{list(f.shape)}; set num_classes={targets.shape[-1]}"
        )
    return f, targets


def build_objective(hparams: ObjectiveHParams, spec: StreamSpec) -> Objective:
    """Return a built-in objective.

    Args:
        hparams: The settings.
        spec: The specification of the stream, which decides what `auto` is.

    Raises:
        ValueError: The objective does not fit the targets of the stream.

    Example:
        >>> import numpy as np
        >>> from sequel_core.stream.trees import LeafSpec
        >>> spec = StreamSpec(LeafSpec((3,)), 1, 1, "domain", np.ones((1, 1), bool), y=LeafSpec(()))
        >>> build_objective(ObjectiveHParams(), spec).score.name
        'squared error'
    """
    return _built_in(hparams.resolved(spec))


@cache
def _built_in(hparams: ObjectiveHParams) -> Objective:
    """Return always the same objective for equal settings: JAX keeps what is compiled for each."""
    if hparams.type == "cross_entropy":
        return cross_entropy(hparams.label_smoothing, hparams.class_weights, hparams.reduce)
    if hparams.type == "token_cross_entropy":
        return token_cross_entropy(hparams.ignore_index, hparams.label_smoothing, hparams.reduce)
    return {"binary_cross_entropy": binary_cross_entropy, "squared_error": squared_error}[hparams.type]()
