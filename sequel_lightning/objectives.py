"""Objectives: the loss that a network is trained on, its likelihood, and the score that is measured.

    objective = from_outputs(lambda outputs, y: (outputs - y).abs().sum(1))
    module = ER(net, optimizer, ERHParams(), benchmark.spec, objective=objective)

The same objective is used by the training step, by what a method computes of past tasks, and in evaluation.

Mirror: sequel_flax/objectives.py
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

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
        score: the name of the score, and its direction.
        values: `values(outputs, y)` returns the score of each sample, `[B]`. The score of several samples is
            the mean of these, weighted by `score_weight`. None for the loss, or if there is a `metric`.
        metric: returns a new torchmetrics metric, such as `partial(BinaryAUROC)`. It is updated with
            `(outputs, y)`, and used in place of `values`; `outputs` is the only array that the network
            returns, or `logits`, or all if there is neither.
        weight: `weight(batch)` returns the weight of each sample in a mean, `[B]`; None for 1. A mean loss is
            sum(loss) / sum(weight).
        mean: `mean(model, batch)` returns the same mean in fewer operations, shape (); None if there is none.
        sample: `sample(outputs, u)` returns targets drawn from the model, from uniform numbers u of the shape
            of y; None if targets cannot be drawn.
        outcomes: `outcomes(outputs)` returns targets `[K, B, ...]` and weights `[K, B]`. The weighted sum of
            the squared gradients of `nll` at these targets is the expectation over all targets of the model;
            None if there is no such sum.
        classification: whether targets are class labels.
        score_weight: `score_weight(batch)` returns the weight of each sample in the score, `[B]`; None for 1.
        target: the key of y in batches that are dicts; the key `t`, if any, has the tasks.

    Example:
        >>> absolute = Objective(lambda model, batch: (model(batch.x) - batch.y).abs().sum(1))
        >>> batch = Batch(torch.ones(2, 3), torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64))
        >>> absolute.loss(lambda x: 2 * x, batch).tolist()
        [6.0, 6.0]
    """

    loss: Callable[[Model, Batch], Tensor]
    nll: Callable[[Model, Batch], Tensor] | None = None
    score: Score = Score("loss", higher_is_better=False, fraction=False)
    values: Callable[[Any, Any], Tensor] | None = None
    metric: Callable[[], Metric] | None = None
    weight: Callable[[Batch], Tensor] | None = None
    mean: Callable[[Model, Batch], Tensor] | None = None
    sample: Callable[[Any, Tensor], Any] | None = None
    outcomes: Callable[[Any], tuple[Any, Tensor]] | None = None
    classification: bool = False
    score_weight: Callable[[Batch], Tensor] | None = None
    target: str = "labels"


def from_outputs(
    loss: Callable[[Any, Any], Tensor],
    nll: Callable[[Any, Any], Tensor] | None = None,
    **options: Any,
) -> Objective:
    """Return an objective whose loss depends on the outputs and the targets only.

    Args:
        loss: `loss(outputs, y)` returns the loss of each sample, `[B]`.
        nll: `nll(outputs, y)` returns the negative log-likelihood of each sample, `[B]`; the loss itself if
            it is one, None if there is none.
        **options: further fields of `Objective`.

    Example:
        >>> absolute = from_outputs(lambda outputs, y: (outputs - y).abs().sum(1))
        >>> batch = Batch(torch.ones(2, 3), torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64))
        >>> absolute.loss(lambda x: 2 * x, batch).tolist()
        [6.0, 6.0]
    """

    def called(function: Callable[[Any, Any], Tensor]) -> Callable[[Model, Batch], Tensor]:
        return lambda model, batch: function(model(batch.x), batch.y)

    return Objective(called(loss), None if nll is None else called(nll), **options)


# -- how methods use an objective


def check_classification(objective: Objective, name: str) -> None:
    """Raise ValueError unless the objective is about class labels, which the method of that name needs."""
    if not objective.classification:
        raise ValueError(
            f"{name} needs an objective with classification=True, got the objective of the score "
            f"{objective.score.name!r}; use cross_entropy() or another method"
        )


def given(outputs: Any, x: Any, model: Model) -> Model:
    """Return a model that returns `outputs` for the inputs `x`, and calls `model` for others."""
    return lambda inputs: outputs if inputs is x else model(inputs)


def sample_losses(objective: Objective, model: Model, batch: Batch) -> Tensor:
    """Return the loss of each sample, `[B]`.

    Raises:
        ValueError: the objective returns anything else.
    """
    losses = objective.loss(model, batch)
    if not isinstance(losses, Tensor) or losses.shape != batch.t.shape:
        got = list(losses.shape) if isinstance(losses, Tensor) else f"a {type(losses).__name__}"
        raise ValueError(
            f"the loss of the objective must return one number for each sample, {list(batch.t.shape)}, got "
            f"{got}; leave out the mean over the samples, and sum over all other axes"
        )
    return losses


def mean_of_batch(objective: Objective, model: Model, batch: Batch) -> Tensor:
    """Return the mean loss of a batch, shape ()."""
    if objective.mean is not None:
        return objective.mean(model, batch)
    losses = sample_losses(objective, model, batch)
    total = torch.as_tensor(weight_of(objective, batch, len(losses)))
    return losses.sum() / total.where(total > 0, 1).to(losses)


def weight_of(objective: Objective, batch: Batch, count: int) -> Any:
    """Return the sum of the weights of the losses of the first `count` samples."""
    return count if objective.weight is None else objective.weight(batch)[:count].sum()


def scores_of(objective: Objective, model: Model, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the score of each sample, and the weight of each, `[B]`; see `Objective.values`."""
    if objective.values is not None:
        values = objective.values(model(batch.x), batch.y)
    else:
        values = objective.loss(model, batch)
    weight = objective.score_weight
    return values, torch.ones_like(values) if weight is None else weight(batch)


# -- what a network returns


def output_leaf(outputs: Any, name: str | None = None) -> Tensor:
    """Return one array of what a network returns.

    Args:
        outputs: an array, or a tuple, a dict or an object that holds arrays.
        name: a key, an attribute or an index; None for the only array, or the one called `logits`.

    Raises:
        ValueError: there is no such array.

    Example:
        >>> outputs = {"logits": torch.ones(2, 3), "hidden": torch.ones(2, 8)}
        >>> output_leaf(outputs).shape, output_leaf(outputs, "hidden").shape
        (torch.Size([2, 3]), torch.Size([2, 8]))
    """
    if name is None and isinstance(outputs, Tensor):
        return outputs
    tensors = dict(named_outputs(outputs))
    if name is None and len(tensors) == 1:
        return next(iter(tensors.values()))
    wanted = "logits" if name is None else name
    if wanted in tensors:
        return tensors[wanted]
    needed = "one array, or one called logits" if name is None else f"an array {name}"
    raise ValueError(
        f"the method needs {needed} in what the network returns, got {outputs_text(outputs)}; call the array "
        "logits, give a loss by from_outputs, or set `output` if the method has that setting"
    )


def metric_outputs(outputs: Any) -> Any:
    """Return what a metric is updated with: the only array, or `logits`; all outputs if there is neither.

    Args:
        outputs: what the network returns.
    """
    try:
        return output_leaf(outputs)
    except ValueError:
        return outputs


def named_outputs(outputs: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the arrays of what a network returns, with their keys, attributes or indices.

    Args:
        outputs: an array, or a tuple, a dict or an object that holds arrays.
        name: of the outputs; that of a nested array is `name.key`.

    Example:
        >>> [name for name, _ in named_outputs({"a": torch.ones(1), "b": (torch.ones(1), torch.ones(1))})]
        ['a', 'b.0', 'b.1']
    """
    if isinstance(outputs, Tensor):
        yield name, outputs
    for key, part in _parts(outputs).items():
        yield from named_outputs(part, f"{name}.{key}" if name else key)


def map_outputs(function: Callable[[Tensor], Any], outputs: Any) -> Any:
    """Return outputs of the same structure with the results of a function of each array.

    Args:
        function: of one array.
        outputs: an array, or a tuple, a dict or an object that holds arrays.

    Example:
        >>> map_outputs(lambda a: a.shape[0], {"logits": torch.ones(2, 3), "hidden": None})
        {'logits': 2, 'hidden': None}
    """
    if isinstance(outputs, Tensor):
        return function(outputs)
    parts = {key: map_outputs(function, part) for key, part in _parts(outputs).items()}
    if isinstance(outputs, tuple):
        return type(outputs)(*parts.values()) if hasattr(outputs, "_fields") else tuple(parts.values())
    if isinstance(outputs, list):
        return list(parts.values())
    new = copy.copy(outputs)
    for key, part in parts.items():
        if isinstance(outputs, Mapping):
            new[key] = part  # also sets the attribute of a ModelOutput
        else:
            object.__setattr__(new, key, part)
    return new


def _parts(outputs: Any) -> dict[str, Any]:
    """Return the parts of a tuple, a dict or an object of a class with annotated fields, by name."""
    if isinstance(outputs, Mapping):
        return {str(key): part for key, part in outputs.items()}
    if isinstance(outputs, tuple) and hasattr(outputs, "_fields"):
        return dict(zip(outputs._fields, outputs, strict=True))
    if isinstance(outputs, (tuple, list)):
        return {str(k): part for k, part in enumerate(outputs)}
    return dict(vars(outputs)) if hasattr(type(outputs), "__annotations__") else {}


def outputs_text(outputs: Any) -> str:
    """Return the type and the shapes of what a network returns, for messages.

    Args:
        outputs: an array, or a tuple, a dict or an object that holds arrays.

    Example:
        >>> outputs_text({"logits": torch.ones(2, 3)})
        'dict of logits [2, 3]'
    """
    if isinstance(outputs, Tensor):
        return str(list(outputs.shape))
    arrays = (f"{name} {list(a.shape)}" for name, a in named_outputs(outputs))
    return f"{type(outputs).__name__} of {', '.join(arrays) or 'nothing'}"


# -- built-in objectives


def cross_entropy(
    label_smoothing: float = 0.0, class_weights: Sequence[float] | None = None, reduce: str = "auto"
) -> Objective:
    """Return the cross-entropy of class labels, with the accuracy as the score.

    Args:
        label_smoothing: weight of the uniform distribution in the target, in [0, 1).
        class_weights: weight of each class in the loss; None for 1.
        reduce: a mean loss is over `samples`, or over the class `weights` of the samples, which `auto`
            chooses if there are any.

    Example:
        >>> batch = Batch(torch.zeros(2, 4), torch.tensor([0, 3]), torch.zeros(2, dtype=torch.int64))
        >>> cross_entropy().loss(lambda x: x, batch)
        tensor([1.3863, 1.3863])
    """
    hparams = ObjectiveHParams(
        "cross_entropy",
        label_smoothing=label_smoothing,
        class_weights=None if class_weights is None else tuple(class_weights),
        reduce=reduce,  # type: ignore[arg-type]
    )
    weights, smoothing = hparams.class_weights, hparams.label_smoothing
    by_weight = weights is not None and hparams.reduce != "samples"

    def nll(outputs: Any, y: Tensor) -> Tensor:
        return F.cross_entropy(output_leaf(outputs), y, reduction="none")

    def loss(outputs: Any, y: Tensor) -> Tensor:
        if weights is None and not smoothing:
            return nll(outputs, y)
        logits = output_leaf(outputs)
        scale = logits.new_tensor(weights or [1.0] * logits.shape[1])
        terms = -scale[None] * logits.log_softmax(1)
        of_label = terms.gather(1, y[:, None])[:, 0]
        allowed = logits > torch.finfo(logits.dtype).min  # False for masked classes
        uniform = torch.where(allowed, terms, 0).sum(1) / allowed.sum(1)
        return (1 - smoothing) * of_label + smoothing * uniform

    def class_weight(batch: Batch) -> Tensor:
        dtype = torch.float32 if batch.y.device.type == "mps" else torch.float64  # it has no float64
        return torch.tensor(weights, dtype=dtype, device=batch.y.device)[batch.y]

    def mean(model: Model, batch: Batch) -> Tensor:
        return F.cross_entropy(output_leaf(model(batch.x)), batch.y)

    def sample(outputs: Any, u: Tensor) -> Tensor:
        cumulative = output_leaf(outputs).softmax(1).cumsum(1)
        return (u[:, None] >= cumulative).sum(1).clamp(max=cumulative.shape[1] - 1)

    def outcomes(outputs: Any) -> tuple[Tensor, Tensor]:
        p = output_leaf(outputs).softmax(1)
        return torch.arange(p.shape[1], device=p.device)[:, None].expand(p.T.shape), p.T

    return from_outputs(
        loss,
        nll,
        score=SCORES["cross_entropy"],
        values=lambda outputs, y: (output_leaf(outputs).argmax(-1) == y).float(),
        weight=class_weight if by_weight else None,
        mean=mean if weights is None and not smoothing else None,
        sample=sample,
        outcomes=outcomes,
        classification=True,
    )


def binary_cross_entropy() -> Objective:
    """Return the sum of the binary cross-entropies of several labels, with the share of right labels.

    Targets are bool or 0 or 1 `[B, K]`, outputs are logits `[B, K]`.

    Example:
        >>> batch = Batch(torch.zeros(2, 4), torch.ones(2, 4).bool(), torch.zeros(2, dtype=torch.int64))
        >>> binary_cross_entropy().loss(lambda x: x, batch)
        tensor([2.7726, 2.7726])
    """

    def loss(outputs: Any, y: Tensor) -> Tensor:
        logits, targets = _same_shape(outputs, y)
        return F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="none").sum(1)

    def values(outputs: Any, y: Tensor) -> Tensor:
        logits, targets = _same_shape(outputs, y)
        return ((logits > 0) == (targets > 0)).float().mean(1)

    def sample(outputs: Any, u: Tensor) -> Tensor:
        logits = output_leaf(outputs)
        return u.reshape(logits.shape) < logits.sigmoid()

    return from_outputs(loss, loss, score=SCORES["binary_cross_entropy"], values=values, sample=sample)


def squared_error() -> Objective:
    """Return half the squared error, summed over the values of a target, with the mean squared error.

    It is the negative log-likelihood of a normal distribution of unit variance, up to a constant. Targets are
    `[B]` or `[B, D]`, outputs `[B, 1]` or `[B, D]`.

    Example:
        >>> batch = Batch(torch.zeros(2, 3), torch.ones(2, 3), torch.zeros(2, dtype=torch.int64))
        >>> squared_error().loss(lambda x: x, batch).tolist()
        [1.5, 1.5]
    """

    def loss(outputs: Any, y: Tensor) -> Tensor:
        f, targets = _same_shape(outputs, y)
        return 0.5 * ((f - targets) ** 2).sum(1)

    def values(outputs: Any, y: Tensor) -> Tensor:
        f, targets = _same_shape(outputs, y)
        return ((f - targets) ** 2).mean(1)

    def sample(outputs: Any, u: Tensor) -> Tensor:
        f = _rows(output_leaf(outputs))
        eps = torch.finfo(f.dtype).eps
        inside = u.reshape(f.shape).to(f.dtype).clamp(eps, 1 - eps)  # 0 and 1 would be infinite
        normal: Tensor = torch.special.ndtri(inside)
        return f + normal

    def outcomes(outputs: Any) -> tuple[Tensor, Tensor]:
        f = _rows(output_leaf(outputs))
        unit = torch.eye(f.shape[1], dtype=f.dtype, device=f.device)[:, None]
        return f[None] - unit, f.new_ones(f.shape[1], f.shape[0])  # the gradients are those of f_d

    score = SCORES["squared_error"]
    return from_outputs(loss, loss, score=score, values=values, sample=sample, outcomes=outcomes)


def token_cross_entropy(
    ignore_index: int = -100, label_smoothing: float = 0.0, reduce: str = "tokens"
) -> Objective:
    """Return the cross-entropy of one class per token, with the accuracy over tokens as the score.

    Targets are integers `[B, L]`, outputs are logits `[B, L, V]`.

    Args:
        ignore_index: target of tokens that do not count.
        label_smoothing: weight of the uniform distribution in the target, in [0, 1).
        reduce: a mean loss is over all `tokens` that count, or over `samples`: the mean over the tokens of
            each sample, then the mean of these.

    Example:
        >>> batch = Batch(torch.zeros(1, 3, 4), torch.tensor([[1, 2, -100]]), torch.tensor([0]))
        >>> token_cross_entropy().loss(lambda x: x, batch)
        tensor([2.7726])
    """
    hparams = ObjectiveHParams(
        "token_cross_entropy",
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduce="tokens" if reduce == "auto" else reduce,  # type: ignore[arg-type]
    )
    by_token, smoothing = hparams.reduce == "tokens", hparams.label_smoothing

    def counts(y: Tensor) -> Tensor:
        return y != ignore_index

    def num_tokens(batch: Batch) -> Tensor:
        return counts(batch.y).sum(1).float()

    def summed(outputs: Any, y: Tensor, smoothing: float = 0.0) -> Tensor:
        log_p = output_leaf(outputs).log_softmax(-1)
        of_label = -log_p.gather(-1, torch.where(counts(y), y, 0).long()[..., None])[..., 0]
        losses = (1 - smoothing) * of_label - smoothing * log_p.mean(-1) if smoothing else of_label
        return torch.where(counts(y), losses, 0).sum(1)

    def loss(outputs: Any, y: Tensor) -> Tensor:
        total = summed(outputs, y, smoothing)
        return total if by_token else total / counts(y).sum(1).clamp(min=1)

    def values(outputs: Any, y: Tensor) -> Tensor:
        right = (output_leaf(outputs).argmax(-1) == y) & counts(y)
        return right.sum(1) / counts(y).sum(1).clamp(min=1)

    def sample(outputs: Any, u: Tensor) -> Tensor:
        cumulative = output_leaf(outputs).softmax(-1).cumsum(-1)
        return (u[..., None] >= cumulative).sum(-1).clamp(max=cumulative.shape[-1] - 1)

    return from_outputs(
        loss,
        summed,
        score=SCORES["token_cross_entropy"],
        values=values,
        weight=num_tokens if by_token else None,
        sample=sample,
        score_weight=num_tokens,
    )


def _rows(values: Tensor) -> Tensor:
    """Return values `[B]` as `[B, 1]`."""
    return values[:, None] if values.ndim == 1 else values


def _same_shape(outputs: Any, y: Tensor) -> tuple[Tensor, Tensor]:
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
        hparams: the settings.
        spec: the specification of the stream, which decides what `auto` is.

    Raises:
        ValueError: the objective does not fit the targets of the stream.

    Example:
        >>> import numpy as np
        >>> from sequel_core.stream.trees import LeafSpec
        >>> spec = StreamSpec(LeafSpec((3,)), 1, 1, "domain", np.ones((1, 1), bool), y=LeafSpec(()))
        >>> build_objective(ObjectiveHParams(), spec).score.name
        'squared error'
    """
    hparams = hparams.resolved(spec)
    if hparams.type == "cross_entropy":
        return cross_entropy(hparams.label_smoothing, hparams.class_weights, hparams.reduce)
    if hparams.type == "token_cross_entropy":
        return token_cross_entropy(hparams.ignore_index, hparams.label_smoothing, hparams.reduce)
    return {"binary_cross_entropy": binary_cross_entropy, "squared_error": squared_error}[hparams.type]()
