"""Networks: the checks of the constructors, and training modes that are restored."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sequel_core.hparams import AlgorithmHParams
from sequel_core.stream.benchmark import StreamSpec
from sequel_core.stream.task import Batch
from sequel_core.stream.trees import LeafSpec, Tree, shapes_text, specs_text, tree_map
from sequel_lightning.objectives import Objective, given, output_leaf, outputs_text, sample_losses
from sequel_lightning.trees import Params


def blank_input(spec: StreamSpec, like: Tensor) -> Any:
    """Return one input of zeros `[1, ...]`, as a network with weights of the dtype of `like` gets it."""

    def blank(leaf: LeafSpec) -> Tensor:
        dtype, shape = getattr(torch, leaf.dtype), leaf.shape
        if dtype.is_floating_point or (dtype == torch.uint8 and spec.images):
            dtype = torch.get_default_dtype() if is_lazy(like) else like.dtype
        if spec.images:
            shape = (shape[2], *shape[:2])
        return torch.zeros((1, *shape), dtype=dtype, device=like.device)

    return tree_map(blank, spec.x)


def start_task(net: nn.Module, task: int) -> None:
    """Call the network's `start_task(task)`, if it has such a method, which may add parameters.

    New parameters get the device and the dtype of the others.

    Raises:
        ValueError: a parameter has another shape than before.
    """
    method = getattr(net, "start_task", None)
    if not callable(method):
        return
    like = next(net.parameters())
    before = {name: p.shape for name, p in net.named_parameters()}
    method(task)
    net.to(like.device)
    for name, p in net.named_parameters():
        if name not in before:
            p.data = p.data.to(like.dtype)
        elif p.shape != before[name]:
            raise ValueError(
                f"the parameter {name} must keep its shape from task to task, got {list(p.shape)} after "
                f"{list(before[name])} in {type(net).__name__}.start_task({task}); make the network large "
                "enough for all tasks, or give a new layer a new name"
            )


def call_network(net: Any, x: Tree, t: Tensor | None = None) -> Any:
    """Return what a network or one of its methods returns; the arrays of a dict are keyword arguments.

    Args:
        net: the network or the method.
        x: its inputs.
        t: task index of each sample `[B]`, if it takes that.
    """
    named = {} if t is None else {"t": t}
    return net(x, **named) if isinstance(x, Tensor) or not isinstance(x, Mapping) else net(**x, **named)


def takes_task(net: nn.Module, hparams: AlgorithmHParams, spec: StreamSpec | None) -> bool:
    """Return whether a network is called with the task of each sample: it has an argument t, which is given.

    Raises:
        ValueError: it needs t, which is not given.
    """
    argument = inspect.signature(net.forward).parameters.get("t")
    if argument is None or (spec is not None and isinstance(spec.x, Mapping) and "t" in spec.x):
        return False
    given = hparams.task_given if spec is None else hparams.knows_task(spec)
    if not given and argument.default is argument.empty:
        raise ValueError(
            f"{type(net).__name__}.forward takes the task of each sample, t, so task_given must be true, got "
            f"false; set {type(hparams).__name__}(task_given=True), which results record, or use "
            "scenario=task or a network without t"
        )
    return given


def check_arguments(net: Any, spec: Any) -> None:
    """Raise ValueError unless the network is a module with parameters, and the spec a StreamSpec or None."""
    if not isinstance(net, nn.Module) or next(net.parameters(), None) is None:
        received = f"a {type(net).__name__}" + (" without any" if isinstance(net, nn.Module) else "")
        raise ValueError(f"net must be a torch.nn.Module with parameters, got {received}")
    if spec is not None and not isinstance(spec, StreamSpec):
        raise ValueError(
            f"spec must be a StreamSpec or None, got a {type(spec).__name__}; pass benchmark.spec"
        )


def check_network(
    net: nn.Module, spec: StreamSpec | None, objective: Objective, gives_task: bool = False
) -> None:
    """Run the network and the objective on a blank sample of the stream; this also initialises lazy layers.

    Args:
        net: the network.
        spec: of the stream; without one nothing is checked.
        objective: of the network.
        gives_task: whether the network is called with the task.

    Raises:
        ValueError: the network does not take the input, or what it returns does not fit the objective.
    """
    if spec is None:
        return
    like = next(net.parameters())
    x, t = blank_input(spec, like), torch.zeros(1, dtype=torch.int64, device=like.device)
    call = partial(call_network, net, t=t if gives_task else None)
    if spec.images:
        shape, inputs = f"images {list(x.shape)}", "[B, C, H, W]"
        advice = f"make it for images {list(spec.image_shape)}"
    else:
        shape, inputs = f"inputs {shapes_text(spec.x)}", "[B, ...]"
        inputs += ", the arrays of a dict as keyword arguments" if isinstance(x, Mapping) else ""
        advice = "make it for inputs of these shapes"
    try:
        with evaluating(net), torch.no_grad():
            outputs = call(x)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise ValueError(
            f"the network must take {shape}, the stream's, as {inputs}: "
            f"{' '.join(str(error).split())}; {advice}"
        ) from error
    if objective.classification:
        logits = output_leaf(outputs)
        returned = list(getattr(logits, "shape", ()))
        if returned != [1, spec.num_classes]:
            raise ValueError(
                f"the network must return logits [B, {spec.num_classes}] for {shape}, got "
                f"{returned} for B=1; set num_classes={spec.num_classes}"
            )
    sample = blank_sample(x, spec, like)
    try:
        with evaluating(net), torch.no_grad():
            sample_losses(objective, given(outputs, x, call), sample)
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
        raise ValueError(
            f"the objective must take what the network returns, {outputs_text(outputs)} for B=1, and targets "
            f"{specs_text(spec.y)}: {' '.join(str(error).split())}"
        ) from error


def blank_sample(x: Any, spec: StreamSpec, like: Tensor) -> Batch:
    """Return a sample with these inputs and targets of zeros, on the device of a weight."""

    def blank(leaf: LeafSpec) -> Tensor:
        return torch.zeros((1, *leaf.shape), dtype=getattr(torch, leaf.dtype), device=like.device)

    return Batch(x, tree_map(blank, spec.y), like.new_zeros(1, dtype=torch.int64))


def check_head(net: Any, spec: StreamSpec | None, objective: Objective, name: str) -> None:
    """Check that an objective takes what the last layer of a network returns.

    Args:
        net: the network.
        spec: of the stream; without one nothing is checked.
        objective: of the network.
        name: of the method, which calls `features` and then `head`.

    Raises:
        ValueError: the objective does not take it.
    """
    if spec is None:
        return
    like = next(net.parameters())
    x = blank_input(spec, like)
    with evaluating(net), torch.no_grad():
        outputs = apply_head(net, call_network(net.features, x))
        try:
            sample_losses(objective, lambda _: outputs, blank_sample(x, spec, like))
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{name} trains on head(features(x)), so the objective must take what head returns, "
                f"{outputs_text(outputs)} for B=1: {' '.join(str(error).split())}; return the same from head "
                "as from the network, or give a loss that takes it"
            ) from error


def check_features(net: nn.Module, name: str) -> None:
    """Raise ValueError if the network lacks `features` or `head`, which the method of that name needs."""
    for part, what in (("features", "a method features(x), the last hidden layer"), ("head", "a head")):
        if not callable(getattr(net, part, None)):
            raise ValueError(
                f"{name} needs a network with {what}, so that net(x) is net.head(net.features(x)); "
                f"{type(net).__name__} has no {part}"
            )
    argument = inspect.signature(net.forward).parameters.get("t")
    if argument is not None and argument.default is argument.empty:
        raise ValueError(
            f"{name} uses net.head(net.features(x)), so it cannot train a network that takes the task, got "
            f"{type(net).__name__}.forward(x, t); use another method, such as er or ewc"
        )


def check_layer(net: nn.Module, layer: str) -> None:
    """Raise ValueError if the network has no layer of that name."""
    names = [name for name, _ in net.named_modules() if name]
    if layer not in names:
        raise ValueError(
            f"layer must be the name of a layer of the network, got {layer!r}; its layers are "
            f"{', '.join(names)}"
        )


def check_layers(net: nn.Module, hparams: Any) -> None:
    """Raise ValueError if the network lacks `hparams.layer`, or a last layer `head` that is to be frozen."""
    if hparams.layer is None:
        check_features(net, hparams.name)
        return
    check_layer(net, hparams.layer)
    if hparams.freeze_head and not hasattr(net, "head"):
        names = ", ".join(name for name, _ in net.named_children())
        raise ValueError(
            f"freeze_head needs a last layer called head, got the layers {names}; set freeze_head=False"
        )


def features_of(net: Any, x: Tree, t: Tensor | None = None, layer: str | None = None) -> Any:
    """Return the output of a layer `[B, ...]`.

    Args:
        net: the network.
        x: inputs as the network takes them.
        t: see `call_network`.
        layer: the name of the layer; None for the network's method `features`, the last hidden layer.
    """
    return call_network(net.features, x) if layer is None else outputs_and_features(net, x, t, layer)[1]


def outputs_and_features(
    net: Any, x: Tree, t: Tensor | None = None, layer: str | None = None
) -> tuple[Any, Any]:
    """Return what a network returns, and the output of a layer in the same pass; see `features_of`.

    Raises:
        ValueError: the layer was not called, or its output is not a tensor.
    """
    if layer is None:
        features = call_network(net.features, x)
        return apply_head(net, features), features
    received: list[Any] = []
    hook = net.get_submodule(layer).register_forward_hook(lambda *call: received.append(call[-1]))
    try:
        outputs = call_network(net, x, t)
    finally:
        hook.remove()
    if not received or not isinstance(received[-1], Tensor):
        what = f"a {type(received[-1]).__name__}" if received else "no call"
        raise ValueError(f"the layer {layer} must return a tensor [B, ...], got {what}; choose another layer")
    return outputs, received[-1]


def check_no_batch_stats(net: nn.Module, name: str, reason: str) -> None:
    """Raise ValueError if the network has running statistics, which the method of that name cannot follow."""
    if any(getattr(module, "running_mean", None) is not None for module in net.modules()):
        raise ValueError(
            f"{name} cannot train a network with batch normalisation: {reason}; use group normalisation "
            "(backbone.norm=group) or another method"
        )


def frozen_network(net: nn.Module) -> tuple[Params, Params]:
    """Return the weights and the running statistics of a kept network, by name."""
    return dict(net.named_parameters()), dict(net.named_buffers())


def apply_head(module: Any, features: Tensor) -> Any:
    """Return the outputs of the network's last layer, such as logits, for features `[B, D]`."""
    return module.head(features)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode; afterwards every submodule has its previous mode."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for submodule, training in modes:
            submodule.training = training


@contextmanager
def modes_kept_at_errors(module: nn.Module) -> Iterator[None]:
    """After an error, give every submodule its previous mode, which Lightning's validation does not do."""
    modes = [(m, m.training) for m in module.modules()]
    try:
        yield
    except BaseException:
        for submodule, training in modes:
            submodule.training = training
        raise
