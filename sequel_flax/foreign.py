"""Adapters that let user-defined linen and NNX modules be called as the built-in networks are.

The rest of the plug-in calls every network with linen's interface and one keyword for the mode:

    variables = model.init(key, x, train=False)  # {"params": ..., "batch_stats": ..., and others}
    logits = model.apply(variables, x, train=False)
    logits, updates = model.apply(variables, x, train=True, rngs={"dropout": key}, mutable=["batch_stats"])
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.errors import ScopeCollectionNotFound
from flax.training.train_state import TrainState

Path = tuple[Any, ...]  # of a leaf in an NNX module: attribute names, and integers for list elements
Apply = Callable[..., Any]

MODES = {
    "train": True,
    "training": True,
    "is_training": True,
    "deterministic": False,
    "use_running_average": False,
}
"""Arguments that set the mode of a module, with the value that each has in training."""

TASK = "t"
"""The argument of a module that receives the task index of each sample."""

row_mask: ContextVar[jax.Array | None] = ContextVar("row_mask", default=None)


def adapted(model: Any, x: Any = ()) -> Any:
    """Return a network with the interface of this module's docstring.

    A module is called with its inputs and with the arguments for the mode that it has: `train`, `training`,
    `is_training`, or their opposites, `deterministic` and `use_running_average`. It may have none of them. If
    it has an argument `t`, it receives the task index of each sample there; see `takes_task`.

    An NNX module is also put in its mode by its `train()` and `eval()` methods. It may take its random
    streams as an argument `rngs`, which is None in evaluation. Training starts from its current values. The
    module itself is never changed; see `write_back`.

    Collections of linen and variables of NNX (caches, counters, user-defined classes) are a part of the train
    state. Calls in training mode change them, calls in evaluation mode only read them. A collection of NNX
    variables has the name of their class, for example `Cache`. Random streams of NNX are seeded again in each
    step, from the seed of the run. A parameter keeps its value if a call changes it, as `nnx.SpectralNorm`
    does; linen's does not. A draw from a memory that is not full has padding, which only the
    statistics of batch normalisation leave out.

    Args:
        model: A linen or an NNX module, with inputs such as images `[B, H, W, C]` as its first argument.
        x: The inputs. The entries of a dict are passed as keyword arguments; any other inputs are the first
            argument.

    Returns:
        The model itself if it has this interface, else an object with the methods `init` and `apply`. The
        argument `method` of `apply` may be None, the name of a method, or a function of the module and an
        array.

    Raises:
        ValueError: The model is not a module, needs another argument, or is an NNX module with state other
            than variables of one array and constant arrays, or with an `nnx.Intermediate`.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> module = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        >>> model, x = adapted(module), jnp.ones((4, 3))
        >>> variables = model.init(None, x)
        >>> sorted(variables["params"])
        ['bias', 'kernel']
        >>> model.apply(variables, x, train=True).shape
        (4, 2)
    """
    if isinstance(model, AdaptedNetwork):
        return model
    of_nnx = is_nnx(model)
    if not (of_nnx or isinstance(model, nn.Module)) or not callable(model):
        received = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise ValueError(
            f"the model must be an instance of a linen or an NNX module with a __call__, got {received}"
        )
    inputs = tuple(x) if isinstance(x, Mapping) else ()
    if of_nnx:
        from sequel_flax.nnx_network import NNXNetwork  # flax.nnx, which is slow to import

        return NNXNetwork(model, inputs)
    features = getattr(type(model), "features", None)
    features_take_train = not callable(features) or "train" in inspect.signature(features).parameters
    keywords = set(mode_keywords(model.__call__, inputs=inputs)) - {TASK}
    if keywords == {"train"} and features_take_train:
        return model
    return _LinenNetwork(model, inputs)


def is_nnx(model: Any) -> bool:
    """Return whether a model is an NNX module; this does not import `flax.nnx`, which is slow.

    Args:
        model: Any object.

    Example:
        >>> from flax import linen as nn
        >>> is_nnx(nn.Dense(2))
        False
    """
    nnx = sys.modules.get("flax.nnx")  # a module of NNX exists only after the import
    return nnx is not None and isinstance(model, nnx.Module)


def as_called(apply_fn: Any, x: Any = ()) -> Apply:
    """Return the function with which a training step calls the network of a TrainState.

    Args:
        apply_fn: The field of a TrainState.
        x: The inputs, see `adapted`.

    Returns:
        `apply_fn`, or `adapted(net).apply` if it is the method `net.apply` of a linen module.

    Raises:
        ValueError: The function does not take the arguments of `adapted(net).apply`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import linen as nn
        >>> net, x = nn.Dense(2), jnp.ones((4, 3))
        >>> apply = as_called(net.apply)
        >>> apply(net.init(jax.random.key(0), x), x, train=True).shape
        (4, 2)
    """
    owner = getattr(apply_fn, "__self__", None)
    if isinstance(owner, nn.Module) and apply_fn.__name__ == "apply":
        return partial(_with_error, adapted(owner, x).apply)
    args, inputs = ((), dict(x)) if isinstance(x, Mapping) else (((),), {})
    if task_argument(apply_fn) is not None:
        inputs.setdefault(TASK, None)
    try:
        inspect.signature(apply_fn).bind(
            {}, *args, train=True, rngs=None, method=None, mutable=False, **inputs
        )
    except (TypeError, ValueError) as error:
        raise ValueError(
            "the TrainState's apply_fn must accept apply_fn(variables, x, train=..., rngs=..., method=..., "
            f"mutable=...), got {apply_fn!r}: {error}; use apply_fn=sequel_flax.adapted(net).apply for a "
            "linen or an NNX module"
        ) from error
    return cast(Apply, apply_fn)


def task_argument(apply_fn: Any) -> inspect.Parameter | None:
    """Return the argument `t` of a network, the task index of each sample; None if it has none.

    Args:
        apply_fn: The field of a TrainState.

    Example:
        >>> from flax import linen as nn
        >>> class Net(nn.Module):
        ...     def __call__(self, x, t):
        ...         return x
        >>> task_argument(Net().apply).name, task_argument(nn.Dense(2).apply)
        ('t', None)
    """
    owner = getattr(apply_fn, "__self__", None)
    if isinstance(owner, AdaptedNetwork):
        return owner.signature.parameters.get(TASK)
    function = owner.__call__ if isinstance(owner, nn.Module) else apply_fn
    return inspect.signature(function).parameters.get(TASK) if callable(function) else None


def takes_task(apply_fn: Any, x: Any) -> bool:
    """Return whether a network has an argument `t` for the task index of each sample.

    Args:
        apply_fn: The field of a TrainState.
        x: The inputs. `t` may be one of them, if they are a dict.

    Example:
        >>> from flax import linen as nn
        >>> takes_task(nn.Dense(2).apply, ())
        False
    """
    return not (isinstance(x, Mapping) and TASK in x) and task_argument(apply_fn) is not None


@contextmanager
def recording(layer: str) -> Iterator[dict[str, Any]]:
    """Record the outputs of linen layers by their names, such as `dense_0` or `stage.conv`.

    Args:
        layer: The name of the layer whose output is kept; that of the others is None.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import linen as nn
        >>> net, x = nn.Sequential([nn.Dense(3), nn.Dense(2)]), jnp.ones((1, 4))
        >>> variables = net.init(jax.random.key(0), x)
        >>> with recording("layers_0") as outputs:
        ...     _ = net.apply(variables, x)
        >>> sorted(outputs), outputs["layers_0"].shape
        (['layers_0', 'layers_1'], (1, 3))
    """
    outputs: dict[str, Any] = {}

    def record(call: Apply, args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> Any:
        result, path = call(*args, **kwargs), context.module.path
        if context.method_name == "__call__" and path:
            name = ".".join(path)
            outputs[name] = result if name == layer else None
        return result

    with nn.intercept_methods(record):
        yield outputs


def write_back(module: Any, ts: TrainState) -> None:
    """Copy the parameters and other variables of a TrainState into an NNX module.

    Parameters that the module does not have, such as those of KCL's kernel, are ignored.

    Args:
        module: The NNX module that was passed to `adapted`. It is changed in place.
        ts: A TrainState, for example `learner.ts`, with the structure of `adapted(module).init`.

    Raises:
        ValueError: An array of the module is missing from `ts` or has another shape. The module is unchanged.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from flax import nnx
        >>> from flax.training.train_state import TrainState
        >>> module = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        >>> model = adapted(module)
        >>> params = model.init(None, jnp.ones((1, 3)))["params"]
        >>> ts = TrainState.create(apply_fn=model.apply, params=params, tx=optax.sgd(0.1))
        >>> ts = ts.apply_gradients(grads=jax.tree.map(jnp.ones_like, ts.params))
        >>> write_back(module, ts)
        >>> module.bias[...].tolist() == ts.params["bias"].tolist()
        True
    """
    from sequel_flax.nnx_network import collection, leaves_of

    values = []
    variables = {path: leaf for path, leaf in leaves_of(module).items() if collection(leaf)}
    trees = {name: getattr(ts, name, {}) for name in ("params", "batch_stats")} | getattr(
        ts, "collections", {}
    )
    for path, leaf in variables.items():
        name = collection(leaf)
        value = leaf_at(trees.get(name), path)
        shape = None if value is None else jnp.shape(value)
        if shape != leaf.shape:
            raise ValueError(
                f"ts.{name} must have the array {path_text(path)} of {type(module).__name__} with shape "
                f"{list(leaf.shape)}, got {'none' if shape is None else list(shape)}; use the module that "
                "was passed to sequel_flax.adapted to make the TrainState"
            )
        values.append(value)
    for leaf, value in zip(variables.values(), values, strict=True):
        leaf.set_value(jnp.array(value))


def with_row_mask(apply: Apply, mask: jax.Array) -> Apply:
    """Return a function that computes batch statistics from some rows of the batch only.

    If the mask selects no row, no variable changes, and the outputs are finite but meaningless.

    Args:
        apply: A network's `apply`, to be called with `mutable=["batch_stats", ...]`.
        mask: The rows that count, bool `[B]`.

    Returns:
        A function with the arguments and results of `apply`. It raises `ValueError` if a layer has batch
        statistics and does not take a mask.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import linen as nn
        >>> net, x = nn.BatchNorm(use_running_average=False, momentum=0.9), jnp.array([[1.0], [3.0], [9.0]])
        >>> variables = net.init(jax.random.key(0), x)
        >>> apply = with_row_mask(net.apply, jnp.array([True, True, False]))
        >>> _, updates = apply(variables, x, mutable=["batch_stats"])
        >>> round(float(updates["batch_stats"]["mean"][0]), 4)  # 0.1 * (1 + 3) / 2
        0.2
    """

    def masked(variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        token = row_mask.set(mask)
        try:
            with nn.intercept_methods(_mask_linen_layer):
                out, updates = apply(variables, *args, **kwargs)
        finally:
            row_mask.reset(token)

        def select(new: Any, old: Any) -> Any:
            return jnp.where(mask.any(), new, old)

        return out, {name: jax.tree.map(select, tree, variables[name]) for name, tree in updates.items()}

    return masked


class AdaptedNetwork:
    """A network with the interface of this module's docstring.

    Args:
        function: The method that is called with the inputs.
        inputs: The keywords of the inputs; empty if they are its first argument.

    Example:
        >>> AdaptedNetwork(lambda x, t: x).signature
        <Signature (x, t)>
    """

    def __init__(self, function: Apply, inputs: tuple[str, ...] = ()) -> None:
        self.signature, self.inputs = inspect.signature(function), inputs


class _LinenNetwork(AdaptedNetwork):
    """A linen module without the argument `train`."""

    def __init__(self, model: nn.Module, inputs: tuple[str, ...] = ()) -> None:
        super().__init__(model.__call__, inputs)
        self.model = model

    def __repr__(self) -> str:
        return repr(self.model)

    def init(self, key: Any, *x: Any, train: bool = False, **inputs: Any) -> Any:
        return self.model.init(
            key, *x, **inputs, **mode_arguments(self.model.__call__, train, inputs=self.inputs)
        )

    def apply(
        self,
        variables: Mapping[str, Any],
        *x: Any,
        train: bool = False,
        method: str | Apply | None = None,
        **options: Any,
    ) -> Any:
        function = method if callable(method) else getattr(self.model, method or "__call__")
        mode = {} if callable(method) else mode_arguments(function, train, inputs=self.inputs)
        return self.model.apply(variables, *x, **mode, method=function, **options)


# -- arguments


def mode_keywords(function: Apply, *others: str, inputs: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the arguments of a method that set the mode, and those of `others` that it takes.

    The inputs are its first argument, or the keywords `inputs`.
    """
    signature, accepted = inspect.signature(function), (*MODES, TASK, *others)
    named = [p.name for p in signature.parameters.values() if p.kind != p.POSITIONAL_ONLY]
    names = [name for name in named if name in accepted and name not in inputs]
    try:
        signature.bind(*([] if inputs else [()]), **dict.fromkeys((*inputs, *names)))
    except TypeError as error:
        name = getattr(function, "__qualname__", type(function).__name__)
        first = f"as keywords {', '.join(inputs)}" if inputs else "as its first argument"
        raise ValueError(
            f"{name} must accept the inputs {first} and, apart from them, may require only the "
            f"keywords {', '.join(accepted)}; got {signature}: {error}; give other arguments defaults, or "
            "wrap the module in one that passes them"
        ) from error
    return tuple(names)


def mode_arguments(function: Apply, train: bool, *others: str, inputs: Sequence[str] = ()) -> dict[str, Any]:
    """Return the keyword arguments that set the mode of a method, and those of `others` as None."""
    names = [name for name in mode_keywords(function, *others, inputs=inputs) if name != TASK]
    return {name: train == MODES[name] if name in MODES else None for name in names}


# -- state


def _with_error(apply: Apply, *args: Any, **kwargs: Any) -> Any:
    """Call a linen module; raise ValueError if a collection of its variables is missing."""
    try:
        return apply(*args, **kwargs)
    except ScopeCollectionNotFound as error:
        raise ValueError(no_variable(str(error).partition(" (http")[0])) from error


def no_variable(reason: str) -> str:
    """Return the message of an error: the TrainState lacks variables."""
    return (
        f"the network has variables that the TrainState lacks: {reason.rstrip('.')}; make it with "
        "sequel_flax.BatchStatsTrainState.create(apply_fn=model.apply, tx=tx, **variables), with variables = "
        "model.init(key, x)"
    )


def leaf_at(tree: Any, path: Path) -> Any:
    """Return the leaf of a nested dict with string keys; None if there is none."""
    for part in path:
        tree = tree.get(str(part)) if isinstance(tree, Mapping) else None
    return tree


def path_text(path: Path) -> str:
    """Return the name of a leaf, such as `layers/0/kernel`."""
    return "/".join(map(str, path))


# -- row masks


def _mask_linen_layer(call: Apply, args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> Any:
    """Pass the mask to a layer that has batch statistics; an interceptor of linen's methods."""
    layer = context.module
    if context.method_name != "__call__" or layer.scope is None:
        return call(*args, **kwargs)
    statistics = layer.scope.variables().get("batch_stats", {})
    if all(isinstance(value, Mapping) for value in statistics.values()):  # those of its sublayers
        return call(*args, **kwargs)
    if isinstance(layer, nn.SpectralNorm):  # its statistics are those of weights
        return call(*args, **kwargs)
    if not takes_mask(layer):
        raise ValueError(no_mask(path_text(layer.path) or type(layer).__name__))
    return call_with_mask(call, args, kwargs)


def call_with_mask(call: Apply, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a layer with the mask of `with_row_mask`, if there is one."""
    mask = row_mask.get()
    if mask is not None and kwargs.get("mask") is None:
        x = args[0] if args else kwargs["x"]
        rows = mask | ~mask.any()  # never the mean of no row: its NaN would reach the gradient
        kwargs = {**kwargs, "mask": rows.reshape(-1, *[1] * (x.ndim - 1))}
    return call(*args, **kwargs)


def takes_mask(layer: Any) -> bool:
    """Return whether a layer has an argument `mask`."""
    return callable(layer) and "mask" in inspect.signature(layer).parameters


def no_mask(layer: str) -> str:
    """Return the message of an error: a layer has no argument `mask`."""
    return (
        f"the layer {layer} has batch statistics, but its __call__ has no argument mask (the rows to count), "
        "which a replay method needs; add one, as in BatchNorm of linen and NNX"
    )
