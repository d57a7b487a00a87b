"""Adapters that let user-defined linen and NNX modules be called as the built-in networks are.

The rest of the plug-in calls every network with linen's interface and one keyword for the mode:

    variables = model.init(key, x, train=False)  # {"params": ..., "batch_stats": ..., and others}
    logits = model.apply(variables, x, train=False)
    logits, updates = model.apply(variables, x, train=True, rngs={"dropout": key}, mutable=["batch_stats"])
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from flax.errors import ScopeCollectionNotFound
from flax.training.train_state import TrainState
from flax.traverse_util import unflatten_dict

from sequel_flax._compat import set_class

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

STREAMS = (nnx.RngKey, nnx.RngCount)
"""Variables of random streams, which are seeded in each step."""
TASK = "t"
"""The argument of a module that receives the task index of each sample."""

_row_mask: ContextVar[jax.Array | None] = ContextVar("row_mask", default=None)


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
    if isinstance(model, _LinenNetwork | _NNXNetwork):
        return model
    if not isinstance(model, nn.Module | nnx.Module) or not callable(model):
        received = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise ValueError(
            f"the model must be an instance of a linen or an NNX module with a __call__, got {received}"
        )
    inputs = tuple(x) if isinstance(x, Mapping) else ()
    if isinstance(model, nnx.Module):
        return _NNXNetwork(model, inputs)
    features = getattr(type(model), "features", None)
    features_take_train = not callable(features) or "train" in inspect.signature(features).parameters
    keywords = set(_keywords(model.__call__, inputs=inputs)) - {TASK}
    if keywords == {"train"} and features_take_train:
        return model
    return _LinenNetwork(model, inputs)


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
    if isinstance(owner, _NNXNetwork):
        return owner.signature.parameters.get(TASK)
    model = owner.model if isinstance(owner, _LinenNetwork) else owner
    function = model.__call__ if isinstance(model, nn.Module) else apply_fn
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


def write_back(module: nnx.Module, ts: TrainState) -> None:
    """Copy the parameters and other variables of a TrainState into an NNX module.

    Parameters that the module does not have, such as those of KCL's kernel, are ignored.

    Args:
        module: The module that was passed to `adapted`. It is changed in place.
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
    values = []
    variables = {path: leaf for path, leaf in _leaves(module).items() if _collection(leaf)}
    trees = {name: getattr(ts, name, {}) for name in ("params", "batch_stats")} | getattr(
        ts, "collections", {}
    )
    for path, leaf in variables.items():
        name = _collection(leaf)
        value = _at(trees.get(name), path)
        shape = None if value is None else jnp.shape(value)
        if shape != leaf.shape:
            raise ValueError(
                f"ts.{name} must have the array {_text(path)} of {type(module).__name__} with shape "
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
        token = _row_mask.set(mask)
        try:
            with nn.intercept_methods(_mask_linen_layer):
                out, updates = apply(variables, *args, **kwargs)
        finally:
            _row_mask.reset(token)

        def select(new: Any, old: Any) -> Any:
            return jnp.where(mask.any(), new, old)

        return out, {name: jax.tree.map(select, tree, variables[name]) for name, tree in updates.items()}

    return masked


class _LinenNetwork:
    """A linen module without the argument `train`."""

    def __init__(self, model: nn.Module, inputs: tuple[str, ...] = ()) -> None:
        self.model = model
        self.inputs = inputs

    def __repr__(self) -> str:
        return repr(self.model)

    def init(self, key: Any, *x: Any, train: bool = False, **inputs: Any) -> Any:
        return self.model.init(key, *x, **inputs, **_mode(self.model.__call__, train, inputs=self.inputs))

    def apply(
        self,
        variables: Mapping[str, Any],
        *x: Any,
        train: bool = False,
        method: str | Apply | None = None,
        **options: Any,
    ) -> Any:
        function = method if callable(method) else getattr(self.model, method or "__call__")
        mode = {} if callable(method) else _mode(function, train, inputs=self.inputs)
        return self.model.apply(variables, *x, **mode, method=function, **options)


class _NNXNetwork:
    """An NNX module as pure functions of its variables."""

    # nnx.bridge.ToLinen (flax 0.12.8) cannot replace this class: it raises KeyError for list elements under
    # string keys, raises for the parameters that KCL adds, keeps subclasses of Param out of "params", uses
    # the module's own statistics if "batch_stats" is missing, and does not reseed the module's streams.

    def __init__(self, model: nnx.Module, inputs: tuple[str, ...] = ()) -> None:
        _keywords(model.__call__, "rngs", inputs=inputs)
        self.signature = inspect.signature(model.__call__)
        self.inputs = inputs
        self.text = re.sub(r" at 0x[0-9a-f]+", "", repr(model))  # addresses differ between runs
        self.leaves = _leaves(model)
        self.names = sorted({name for name in map(_collection, self.leaves.values()) if name})
        for path, leaf in self.leaves.items():
            _check_state(model, path, leaf)
        self.unmaskable: list[Path] = []
        self.graphdefs = {}
        for train in (True, False):
            copy = nnx.clone(model)
            copy.train() if train else copy.eval()
            layers = [(path, layer) for path, layer in nnx.iter_modules(copy) if _has_statistics(layer)]
            self.unmaskable = [path for path, layer in layers if not _takes_mask(layer)]
            for path, layer in layers:
                if path not in self.unmaskable:
                    set_class(layer, _masked_class(type(layer)))
            self.graphdefs[train] = nnx.graphdef(copy)

    def __repr__(self) -> str:
        return self.text

    def init(self, key: Any, *x: Any, train: bool = False, **inputs: Any) -> dict[str, Any]:
        """Return copies of the module's current values; the key is not used."""
        names = dict.fromkeys(["params", *self.names])
        return {name: jax.tree.map(jnp.array, self._collected(self.leaves, name)) for name in names}

    def apply(
        self,
        variables: Mapping[str, Any],
        *x: Any,
        train: bool = False,
        rngs: Mapping[str, jax.Array] | None = None,
        method: str | Apply | None = None,
        mutable: bool | Sequence[str] = False,
        **inputs: Any,
    ) -> Any:
        if _row_mask.get() is not None and self.unmaskable:
            raise ValueError(_no_mask(_text(self.unmaskable[0])))
        key = rngs["dropout"] if rngs else None
        values = self._values(variables, key)
        module = nnx.merge(self.graphdefs[train], unflatten_dict(values))
        if callable(method):
            out = method(module, *x)
        else:
            function = getattr(module, method or "__call__")
            keywords = _mode(function, train, "rngs", inputs=self.inputs)
            if "rngs" in keywords and key is not None:
                keywords["rngs"] = nnx.Rngs(key)
            out = function(*x, **inputs, **keywords)
        leaves = _leaves(module)
        for path, leaf in self.leaves.items():
            if not isinstance(leaf, nnx.Variable) and leaves[path] is not values[path]:
                raise ValueError(_no_state(module, path, "an array that changes in a call"))
        if not mutable:
            return out
        names = [name for name in self.names if name != "params" and (mutable is True or name in mutable)]
        return out, {name: self._collected(leaves, name) for name in names}

    def _collected(self, leaves: Mapping[Path, Any], name: str) -> Any:
        """Return the arrays of a collection as a tree whose keys are strings."""
        paths = [path for path, leaf in self.leaves.items() if _collection(leaf) == name]
        return unflatten_dict({tuple(map(str, path)): leaves[path][...] for path in paths})

    def _values(self, variables: Mapping[str, Any], key: jax.Array | None) -> dict[Path, Any]:
        """Return an array for each leaf of the module; a key reseeds every random stream."""
        if key is not None and not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            key = jax.random.wrap_key_data(key)
        values = {}
        for i, (path, leaf) in enumerate(self.leaves.items()):
            value = leaf[...] if isinstance(leaf, nnx.Variable) else leaf
            if name := _collection(leaf):
                value = _at(variables.get(name), path)
                if value is None:
                    raise ValueError(_no_variable(f"no array {name}/{_text(path)}"))
            elif isinstance(leaf, nnx.RngKey) and key is not None:
                stream_key = jax.random.fold_in(key, i)
                value = jax.random.split(stream_key, value.shape) if value.shape else stream_key
            elif isinstance(leaf, nnx.RngCount) and key is not None:
                value = jnp.zeros_like(value)
            values[path] = value
        return values


# -- arguments


def _keywords(function: Apply, *others: str, inputs: Sequence[str] = ()) -> tuple[str, ...]:
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


def _mode(function: Apply, train: bool, *others: str, inputs: Sequence[str] = ()) -> dict[str, Any]:
    """Return the keyword arguments that set the mode of a method, and those of `others` as None."""
    names = [name for name in _keywords(function, *others, inputs=inputs) if name != TASK]
    return {name: train == MODES[name] if name in MODES else None for name in names}


# -- state


def _with_error(apply: Apply, *args: Any, **kwargs: Any) -> Any:
    """Call a linen module; raise ValueError if a collection of its variables is missing."""
    try:
        return apply(*args, **kwargs)
    except ScopeCollectionNotFound as error:
        raise ValueError(_no_variable(str(error).partition(" (http")[0])) from error


def _no_variable(reason: str) -> str:
    return (
        f"the network has variables that the TrainState lacks: {reason.rstrip('.')}; make it with "
        "sequel_flax.BatchStatsTrainState.create(apply_fn=model.apply, tx=tx, **variables), with variables = "
        "model.init(key, x)"
    )


def _leaves(module: nnx.Module) -> dict[Path, Any]:
    """Return the variables and the plain arrays of an NNX module."""
    state: Any = nnx.to_flat_state(nnx.state(module))
    return dict(state)


def _collection(leaf: Any) -> str:
    """Return the linen collection of an NNX variable; "" for random streams and plain arrays."""
    if isinstance(leaf, nnx.Param):
        return "params"
    if isinstance(leaf, nnx.BatchStat):
        return "batch_stats"
    return type(leaf).__name__ if isinstance(leaf, nnx.Variable) and not isinstance(leaf, STREAMS) else ""


def _at(tree: Any, path: Path) -> Any:
    """Return the leaf of a nested dict with string keys; None if there is none."""
    for part in path:
        tree = tree.get(str(part)) if isinstance(tree, Mapping) else None
    return tree


def _text(path: Path) -> str:
    return "/".join(map(str, path))


def _check_state(module: nnx.Module, path: Path, leaf: Any) -> None:
    if isinstance(leaf, nnx.Intermediate):
        raise ValueError(_no_state(module, path, f"a {type(leaf).__name__}"))
    if isinstance(leaf, nnx.Variable) and not isinstance(leaf.get_value(), jax.Array | np.ndarray):
        raise ValueError(_no_state(module, path, f"a {type(leaf).__name__} that is not one array"))


def _no_state(module: nnx.Module, path: Path, problem: str) -> str:
    return (
        f"{type(module).__name__} is an NNX module with state that cannot be carried from step to step: "
        f"{_text(path)} is {problem}; keep parameters in nnx.Param, batch statistics in nnx.BatchStat, "
        "random streams in nnx.Rngs, other state in a subclass of nnx.Variable, and constants in plain arrays"
    )


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
    if not _takes_mask(layer):
        raise ValueError(_no_mask(_text(layer.path) or type(layer).__name__))
    return _call_with_mask(call, args, kwargs)


@cache
def _masked_class(layer: type[Any]) -> type[Any]:
    """Return a subclass of an NNX layer's class whose calls pass the mask."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _call_with_mask(partial(layer.__call__, self), args, kwargs)

    return type(layer.__name__, (layer,), {"__call__": call})


def _call_with_mask(call: Apply, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    mask = _row_mask.get()
    if mask is not None and kwargs.get("mask") is None:
        x = args[0] if args else kwargs["x"]
        rows = mask | ~mask.any()  # never the mean of no row: its NaN would reach the gradient
        kwargs = {**kwargs, "mask": rows.reshape(-1, *[1] * (x.ndim - 1))}
    return call(*args, **kwargs)


def _has_statistics(layer: Any) -> bool:
    is_spectral = isinstance(layer, nnx.SpectralNorm)  # its statistics are those of weights
    return not is_spectral and any(isinstance(value, nnx.BatchStat) for value in vars(layer).values())


def _takes_mask(layer: Any) -> bool:
    return callable(layer) and "mask" in inspect.signature(layer).parameters


def _no_mask(layer: str) -> str:
    return (
        f"the layer {layer} has batch statistics, but its __call__ has no argument mask (the rows to count), "
        "which a replay method needs; add one, as in BatchNorm of linen and NNX"
    )
