"""Gradients of single samples, and gradients at weights that are not the network's current ones.

`torch.func` computes them fast, but not for every network. It fails for `nn.GRU`, control flow that depends
on data, activation checkpointing, and buffers that `forward` updates. An ordinary backward pass works for
these: the other weights are copied into the network for the time of the pass.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from sequel_core.stream.task import Batch
from sequel_core.stream.trees import Tree, tree_map
from sequel_lightning._compat import buffers_of, foreach_copy_, foreach_mul, foreach_sub, tensor_version
from sequel_lightning.batches import pieces, rows
from sequel_lightning.module import ContinualModule
from sequel_lightning.networks import evaluating
from sequel_lightning.objectives import named_outputs
from sequel_lightning.trees import Params, zero_sum

Loss = Callable[[Params, ContinualModule, Batch], Tensor]
Contribution = Callable[[Tensor], Tensor]

GRADIENTS = 1 << 24
"""Greatest count of numbers in the gradients of single samples that are in memory at a time."""


class GradientSums:
    """Sums of gradients over samples. The network stays as it is.

    Buffers have the same values at every sample. Random numbers that the network draws continue from sample
    to sample; afterwards the generators are restored.

    Args:
        params: weights at which gradients are taken.
        model: passed to the losses.
        contribution: maps a gradient array to what is added to the sum, elementwise.
        per_batch: whether to take one gradient for each batch instead of each sample.
    """

    def __init__(
        self,
        params: Params,
        model: ContinualModule,
        contribution: Contribution,
        per_batch: bool = False,
    ) -> None:
        self.total = {k: zero_sum(p) for k, p in params.items()}  # in float32 or wider
        self._params, self._model = params, model
        self._contribution, self._per_batch = contribution, per_batch
        self._follows: bool | None = None  # whether torch.func follows the network; None: not yet known
        self._width = max(1, GRADIENTS // sum(p.numel() for p in params.values()))
        self._traces = Traces(model.net)

    def add(self, batch: Batch, loss: Loss) -> None:
        """Add the gradients of a loss at a batch's samples.

        Args:
            batch: the samples.
            loss: returns the value of a batch, shape (). Unless `per_batch`, it gets one sample at a time.
        """
        with self._traces.generators():
            if self._per_batch:
                self._add(self._backward(batch, loss))
                return
            for piece in pieces(batch, self._width):
                gradients = self._vectorized(piece, loss)
                if gradients is not None:
                    self._add(gradients, summed=True)
                    continue
                for sample in pieces(piece, 1):
                    self._add(self._backward(sample, loss))

    def _add(self, gradients: Params, summed: bool = False) -> None:
        for k, gradient in gradients.items():
            contribution = self._contribution(gradient.to(self.total[k].dtype))
            self.total[k] += contribution.sum(0) if summed else contribution

    def _vectorized(self, batch: Batch, loss: Loss) -> Params | None:
        """Return the gradient of each sample `[n, ...]`; None if torch.func does not follow the network."""
        if self._follows is False:
            return None

        def of_one(params: Params, x: Tree, y: Tree, t: Tensor) -> Tensor:
            return loss(
                params, self._model, Batch(*(tree_map(lambda a: a[None], tree) for tree in (x, y, t)))
            )

        try:
            with self._traces.buffers(), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*performance drop.*")
                gradients = vmap(grad(of_one), in_dims=(None, 0, 0, 0))(self._params, *batch[:3])
            if self._follows is None:
                first = self._backward(rows(batch, slice(1)), loss)
                vectorized = {k: g[0] for k, g in gradients.items()}
                self._follows = close(
                    vectorized, first, tolerance=0.1
                )  # half precision rounds in another order
        except Exception:  # the ordinary backward pass, which follows, raises an error of the network
            self._follows = False
        return gradients if self._follows else None

    def _backward(self, batch: Batch, loss: Loss) -> Params:
        model = self._model
        with self._traces.buffers():
            return gradient_at(self._params, model, lambda params: loss(params, model, batch))


class Traces:
    """The buffers and random generators that passes through a network may change, and their values before."""

    def __init__(self, net: nn.Module) -> None:
        self._buffers = [
            (module, name, buffer, buffer.clone())
            for module in net.modules()
            for name, buffer in buffers_of(module).items()
            if buffer is not None
        ]
        self._device = next(net.parameters()).device
        self._inside: list[Tensor] | None = None  # generators after the latest pass

    @contextmanager
    def generators(self) -> Iterator[None]:
        """Continue with the random numbers after the latest pass; restore the generators at the end."""
        outside = self._states()
        if self._inside is not None:
            self._set_states(self._inside)
        try:
            yield
        finally:
            self._inside = self._states()
            self._set_states(outside)

    @contextmanager
    def buffers(self) -> Iterator[None]:
        """Restore the buffers after a pass."""
        versions = [tensor_version(buffer) for _, _, buffer, _ in self._buffers]
        try:
            yield
        finally:
            for (module, name, buffer, value), version in zip(self._buffers, versions, strict=True):
                buffers_of(module)[name] = buffer
                if tensor_version(buffer) != version:
                    with torch.no_grad():
                        buffer.copy_(value)

    def _states(self) -> list[Tensor]:
        cuda = [torch.cuda.get_rng_state(self._device)] if self._device.type == "cuda" else []
        return [torch.get_rng_state(), *cuda]

    def _set_states(self, states: Sequence[Tensor]) -> None:
        torch.set_rng_state(states[0])
        for state in states[1:]:
            torch.cuda.set_rng_state(state, self._device)


@contextmanager
def holding(model: ContinualModule, params: Params) -> Iterator[Params]:
    """Replace the values of parameters of a network within the context; yield these parameters, by name."""
    replaced: Params = {k: p for k, p in model.net.named_parameters() if k in params}
    before = [p.detach().clone() for p in replaced.values()]
    _fill(replaced, [params[k] for k in replaced])
    try:
        yield replaced
    finally:
        _fill(replaced, before)


@torch.no_grad()
def _fill(params: Params, values: list[Tensor]) -> None:
    if values:
        foreach_copy_(list(params.values()), values)
    torch.clear_autocast_cache()  # of the weights in half precision


@contextmanager
def native_rnn(net: nn.Module) -> Iterator[None]:
    """Run recurrent layers without cuDNN, which has no gradient for them in evaluation mode."""
    if any(isinstance(module, nn.RNNBase) for module in net.modules()):
        with torch.backends.cudnn.flags(enabled=False):
            yield
    else:
        yield


def gradient_at(params: Params, model: ContinualModule, loss: Callable[[Params], Tensor]) -> Params:
    """Return the gradient of a loss at the weights given.

    Args:
        params: values of trained parameters, by name.
        model: whose network holds these values while the loss is computed.
        loss: of the network's parameters, shape ().
    """
    with torch.enable_grad(), holding(model, params) as replaced, native_rnn(model.net):
        return backward(loss(replaced), replaced, model.net)


def gradients(loss: Tensor, *trees: Params, create_graph: bool = False) -> list[Params]:
    """Return the gradient of a loss by the tensors of each tree, 0 for those that it does not depend on."""
    tensors = [p for tree in trees for p in tree.values()]
    values = iter(torch.autograd.grad(loss, tensors, create_graph=create_graph, materialize_grads=True))
    return [{k: next(values) for k in tree} for tree in trees]


def backward(loss: Tensor, params: Params, model: nn.Module) -> Params:
    """Return the gradient of a loss by parameters of a model, 0 for one that it does not depend on.

    It uses `loss.backward()`, which works for every network that can be trained. `.grad` is restored.
    """
    before = [(p, p.grad) for p in model.parameters()]
    for p, _ in before:
        p.grad = None
    try:
        loss.backward()
        return {k: torch.zeros_like(p) if p.grad is None else p.grad for k, p in params.items()}
    finally:
        for p, gradient in before:
            p.grad = gradient


def clip_by_norm(gradient: Params, norm: float | None) -> Params:
    """Return the gradient, scaled down if its norm is above `norm`; unchanged if `norm` is None."""
    if norm is None:
        return gradient
    length = torch.stack([g.norm() for g in gradient.values()]).norm()
    factor = (norm / (length + 1e-6)).clamp(max=1)
    return {k: factor * g for k, g in gradient.items()}


def call_with(module: nn.Module, params: Params, *inputs: Any, **named: Any) -> Any:
    """Return what a module computes with these values of its parameters.

    If they are the parameters themselves, the module is called, with its hooks.
    """
    current = dict(module.named_parameters())
    if all(p is current[k] for k, p in params.items()):
        return module(*inputs, **named)
    return functional_call(module, params, inputs, named)


def functional_network(net: nn.Module, params: Params, x: Tree, t: Tensor | None = None) -> Any:
    """Return what a network computes for inputs with these values of its parameters; see `call_network`."""
    named: dict[str, Any] = {} if t is None else {"t": t}
    if isinstance(x, Mapping):
        return functional_call(net, params, (), {**x, **named})
    return functional_call(net, params, (x,), named)


def quadratic_penalty(
    params: Sequence[Tensor], anchors: Sequence[Tensor], importances: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Return 1/2 * sum_i F_i (theta_i - theta*_i)^2, shape (), and its gradient, F (theta - theta*)."""
    distance = foreach_sub([p.to(f.dtype) for p, f in zip(params, importances, strict=True)], anchors)
    gradient = foreach_mul(importances, distance)
    terms = [torch.dot(g.flatten(), d.flatten()) for g, d in zip(gradient, distance, strict=True)]
    return 0.5 * torch.stack(terms).sum(), gradient


class QuadraticPenalty(torch.autograd.Function):
    """1/2 * sum_i F_i (theta_i - theta*_i)^2 with an explicit gradient, F (theta - theta*).

    It takes half of the time of autograd.

    Arguments of `apply`: the number n of parameters, then n parameters, n anchors and n importances.
    """

    @staticmethod
    def forward(ctx: Any, n: int, *tensors: Tensor) -> Tensor:
        """Return the penalty, shape ()."""
        penalty, ctx.gradient = quadratic_penalty(tensors[:n], tensors[n : 2 * n], tensors[2 * n :])
        return penalty

    @staticmethod
    def backward(ctx: Any, *factors: Tensor) -> Any:
        """Return the gradient of the parameters; anchors and importances get none."""
        gradient = foreach_mul(ctx.gradient, factors[0])
        return None, *gradient, *[None] * (2 * len(gradient))


def close(actual: Params, expected: Params, tolerance: float) -> bool:
    """Return whether two gradients are equal up to a relative difference in each array."""
    length = torch.stack([g.float().norm() for g in expected.values()]).norm()
    return all(
        bool((actual[k].float() - g.float()).norm() <= tolerance * (g.float().norm() + 0.01 * length))
        for k, g in expected.items()
    )


def check_functional_call(model: ContinualModule, x: Tree, t: Tensor) -> None:
    """Check that `functional_call` and the network with other weights have the same gradients.

    Args:
        model: its network is checked in evaluation mode, and stays as it is.
        x: inputs `[B, ...]`.
        t: task indices `[B]`.

    Raises:
        ValueError: the gradients differ, as with activation checkpointing, or `functional_call` fails.
    """
    other = {k: (1.2 * p.detach() + 0.05).requires_grad_() for k, p in model.params().items()}
    traces, first = Traces(model.net), tree_map(lambda a: a[:1], x)
    reason = "its gradients are not those of the network with these weights"
    with evaluating(model), traces.generators(), native_rnn(model.net):
        with traces.buffers(), holding(model, other) as params:
            expected = backward(_sum_of_squares(model.network(first, t[:1])), params, model)
        try:
            with traces.buffers():
                task = model.task_argument(t[:1])
                outputs = functional_network(model.net, other, model.normalise(first), task)
                loss = _sum_of_squares(outputs)
                (actual,) = gradients(loss, other)
            if close(actual, expected, tolerance=0.01):
                return
        except Exception as error:
            reason = " ".join(str(error).split())
    raise ValueError(
        f"{model.algorithm_hparams.name} takes gradients at weights that the network does not hold, with "
        f"torch.func.functional_call, which does not follow {type(model.net).__name__}: {reason}; leave "
        "activation checkpointing out of the network, or use another method"
    )


def _sum_of_squares(outputs: Any) -> Tensor:
    arrays = (a for _, a in named_outputs(outputs) if a.is_floating_point())
    return torch.stack([a.square().sum() for a in arrays]).sum()
