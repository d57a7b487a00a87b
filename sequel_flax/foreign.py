"""Networks from elsewhere, called as the built-in ones are: any linen module, any NNX module.

What the rest of the plug-in asks of a network is linen's own form, with one keyword for the mode:

    variables = model.init(key, x, train=False)  # {"params": ..., "batch_stats": ... where it has any}
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

Path = tuple[Any, ...]  # of a leaf in an NNX module: names, and numbers in lists
Call = Callable[..., Any]

MODES = {
    "train": True,
    "training": True,
    "is_training": True,
    "deterministic": False,
    "use_running_average": False,
}
"""Arguments that tell a module whether it trains; those that are False then are inverted."""

_counted: ContextVar[jax.Array | None] = ContextVar("counted rows of the batch", default=None)


def adapted(model: Any) -> Any:
    """Return a network that is called as a built-in one: the model itself, or what stands in for it.

    A module is called with the images and with those of its arguments that tell the mode: `train`,
    `training`, `is_training`, or their inverse, `deterministic` and `use_running_average`. One without any is
    called with the images alone. An NNX module is put in its mode by its own `train()` and `eval()` as well,
    may take the random streams as `rngs` (None in evaluation), and starts from the values that it has; it is
    never changed itself.

    Args:
        model: a linen module or an NNX module, with images `[B, H, W, C]` as its first argument.

    Returns:
        An object with the methods `init` and `apply` of this file's docstring; `method` of `apply` is None,
        the name of a method that takes an array, or a function of the module and an array.

    Raises:
        ValueError: the model is neither, needs another argument, or is an NNX module with other state than
            parameters, batch statistics, random streams and constant arrays.
    """
    if isinstance(model, _LinenNetwork | _NNXNetwork):
        return model
    if not isinstance(model, nn.Module | nnx.Module) or not callable(model):
        what = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise ValueError(
            f"the model must be an instance of a linen or an NNX module with a __call__, got {what}"
        )
    if isinstance(model, nnx.Module):
        return _NNXNetwork(model)
    features = getattr(type(model), "features", None)
    told_alike = not callable(features) or "train" in inspect.signature(features).parameters
    conforms = _arguments(model.__call__) == ("train",) and told_alike
    return model if conforms else _LinenNetwork(model)


def as_called(apply_fn: Any) -> Call:
    """Return the function by which our steps call the network of a TrainState.

    That is its `apply_fn`, except for `net.apply` of a linen module that has no argument `train`: this is
    replaced by `adapted(net).apply`.

    Args:
        apply_fn: field of a TrainState.

    Raises:
        ValueError: a function with other arguments, or a module that `adapted` does not take.
    """
    owner = getattr(apply_fn, "__self__", None)
    if isinstance(owner, nn.Module) and apply_fn.__name__ == "apply":
        return partial(_with_statistics, adapted(owner).apply)
    try:
        inspect.signature(apply_fn).bind({}, (), train=True, rngs=None, method=None, mutable=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            "the TrainState's apply_fn must be called as apply_fn(variables, x, train=..., rngs=..., "
            f"method=..., mutable=...), got {apply_fn!r}: {error}; give "
            "apply_fn=sequel_flax.adapted(net).apply of a linen or an NNX module"
        ) from error
    return cast(Call, apply_fn)


def _with_statistics(apply: Call, *args: Any, **kwargs: Any) -> Any:
    """Call a linen module; say what to do if it keeps batch statistics that it was not given."""
    try:
        return apply(*args, **kwargs)
    except ScopeCollectionNotFound as error:
        raise ValueError(_no_statistics(str(error).partition(" (http")[0])) from error


def _no_statistics(what: str) -> str:
    return (
        f"the network keeps batch statistics, which the TrainState lacks: {what.rstrip('.')}; make it with "
        "sequel_flax.BatchStatsTrainState.create(apply_fn=model.apply, tx=tx, **variables) of variables = "
        "model.init(key, x)"
    )


def write_back(module: nnx.Module, ts: TrainState) -> None:
    """Write the parameters and batch statistics of a TrainState into the NNX module that they began as.

        model = adapted(module)
        ts = BatchStatsTrainState.create(apply_fn=model.apply, tx=tx, **model.init(key, x))
        ...  # train; after FlaxLearner, ts is learner.ts
        write_back(module, ts)

    The arrays are copies. What the module does not have, as the parameters of KCL's kernels, is left out.

    Args:
        module: given to `adapted`; changed in place.
        ts: with parameters named as `adapted(module).init` names them; numbers of lists are strings.

    Raises:
        ValueError: an array of the module is missing, or has another shape; nothing is written then.
    """
    found: dict[Path, Any] = {}
    leaves = {p: a for p, a in _leaves(module).items() if isinstance(a, nnx.Param | nnx.BatchStat)}
    for path, leaf in leaves.items():
        collection = "params" if isinstance(leaf, nnx.Param) else "batch_stats"
        value: Any = getattr(ts, collection, {})
        for part in map(str, path):
            value = value.get(part) if isinstance(value, Mapping) else None
        shape = None if value is None else jnp.shape(value)
        if shape != leaf.shape:
            got = "none" if shape is None else list(shape)
            raise ValueError(
                f"ts.{collection} must have the array {'/'.join(map(str, path))} of {type(module).__name__}, "
                f"{list(leaf.shape)}, got {got}; give the module that the TrainState was made from with "
                "sequel_flax.adapted"
            )
        found[path] = value
    for path, leaf in leaves.items():
        leaf.set_value(jnp.array(found[path]))


@contextmanager
def counting_only(mask: jax.Array) -> Iterator[None]:
    """Have every batch normalisation of a network that is applied within take its statistics of some rows.

    Where no row counts, the running statistics stay as they are, and what the network says is of no use but
    finite.

    Args:
        mask: bool `[N]`, the rows of the batch that count.

    Raises:
        ValueError: in the call, by a layer that keeps batch statistics and does not take a mask.
    """
    token = _counted.set(mask)
    try:
        with nn.intercept_methods(_count_in_linen):
            yield
    finally:
        _counted.reset(token)


class _LinenNetwork:
    """A linen module whose methods tell the mode in another way, or not at all."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __repr__(self) -> str:
        return repr(self.model)

    def init(self, key: Any, x: jax.Array, train: bool = False) -> Any:
        return self.model.init(key, x, **_mode(self.model.__call__, train))

    def apply(
        self,
        variables: Mapping[str, Any],
        x: jax.Array,
        train: bool = False,
        rngs: Mapping[str, jax.Array] | None = None,
        method: str | Call | None = None,
        mutable: bool | Sequence[str] = False,
    ) -> Any:
        called = method if callable(method) else getattr(self.model, method or "__call__")
        mode = {} if callable(method) else _mode(called, train)
        streams = dict(rngs) if rngs else None
        return self.model.apply(variables, x, **mode, rngs=streams, method=called, mutable=mutable)


class _NNXNetwork:
    """An NNX module as pure functions of its parameters and batch statistics."""

    def __init__(self, model: nnx.Module) -> None:
        _arguments(model.__call__, "rngs")
        # Settings hold functions, whose addresses differ from run to run.
        self.text = re.sub(r" at 0x[0-9a-f]+", "", repr(model))
        self.leaves = _leaves(model)
        for path, leaf in self.leaves.items():
            _check_state(type(model).__name__, path, leaf)
        self.without_mask = [path for path, layer in _owners_of_statistics(model) if not _takes_mask(layer)]
        self.definitions = {}
        for train in (True, False):
            copy = nnx.clone(model)
            copy.train() if train else copy.eval()
            for _, layer in _owners_of_statistics(copy):
                if _takes_mask(layer):
                    object.__setattr__(layer, "__class__", _counting(layer.__class__))
            self.definitions[train] = nnx.graphdef(copy)

    def __repr__(self) -> str:
        return self.text

    def init(self, key: Any, x: jax.Array, train: bool = False) -> dict[str, Any]:
        """Return copies of the module's own values, which are not drawn again."""
        found = {"params": self._nested(nnx.Param), "batch_stats": self._nested(nnx.BatchStat)}
        return {name: jax.tree.map(jnp.array, tree) for name, tree in found.items() if tree}

    def apply(
        self,
        variables: Mapping[str, Any],
        x: jax.Array,
        train: bool = False,
        rngs: Mapping[str, jax.Array] | None = None,
        method: str | Call | None = None,
        mutable: bool | Sequence[str] = False,
    ) -> Any:
        if _counted.get() is not None and self.without_mask:
            raise ValueError(_no_mask("/".join(map(str, self.without_mask[0]))))
        key = rngs["dropout"] if rngs else None
        values = self._values(variables, key)
        module = nnx.merge(self.definitions[train], unflatten_dict(values))
        if callable(method):
            out = method(module, x)
        else:
            called = getattr(module, method or "__call__")
            mode = _mode(called, train, "rngs")
            if "rngs" in mode:
                mode["rngs"] = None if key is None else nnx.Rngs(key)
            out = called(x, **mode)
        after = _leaves(module)
        for path, leaf in self.leaves.items():
            if not isinstance(leaf, nnx.Variable) and after[path] is not values[path]:
                raise ValueError(_no_state(type(module).__name__, path, "an array that changes in a call"))
        if not mutable:
            return out
        updates = {path: after[path] for path in self._paths(nnx.BatchStat)}
        return out, {"batch_stats": _nested(updates)} if updates else {}

    def _paths(self, kind: type[Any]) -> list[Path]:
        return [path for path, leaf in self.leaves.items() if isinstance(leaf, kind)]

    def _nested(self, kind: type[Any]) -> Any:
        return _nested({path: self.leaves[path] for path in self._paths(kind)})

    def _values(self, variables: Mapping[str, Any], key: jax.Array | None) -> dict[Path, Any]:
        """Return an array for each leaf of the module; a key starts every random stream anew."""
        if key is not None and not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            key = jax.random.wrap_key_data(key)
        values = {}
        for i, (path, leaf) in enumerate(self.leaves.items()):
            value = leaf[...] if isinstance(leaf, nnx.Variable) else leaf
            if isinstance(leaf, nnx.Param | nnx.BatchStat):
                if isinstance(leaf, nnx.BatchStat) and "batch_stats" not in variables:
                    raise ValueError(_no_statistics(f"no array {'/'.join(map(str, path))}"))
                value = variables["params" if isinstance(leaf, nnx.Param) else "batch_stats"]
                for part in path:
                    value = value[str(part)]
            elif isinstance(leaf, nnx.RngKey) and key is not None:
                own = jax.random.fold_in(key, i)
                value = jax.random.split(own, value.shape) if value.shape else own
            elif isinstance(leaf, nnx.RngCount) and key is not None:
                value = jnp.zeros_like(value)
            values[path] = value
        return values


# -- arguments


def _arguments(function: Call, *others: str) -> tuple[str, ...]:
    """Return the names of a method's arguments that tell the mode, and those of `others` that it takes."""
    name = getattr(function, "__qualname__", type(function).__name__)
    accepted = ", ".join([*MODES, *others])
    arguments = list(inspect.signature(function).parameters.values())
    if not arguments or arguments[0].kind in (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD):
        got = arguments[0] if arguments else "no argument"
        raise ValueError(f"{name} must take the images as its first argument, got {got}")
    found = []
    for argument in arguments[1:]:
        if argument.name in (*MODES, *others) and argument.kind is not argument.POSITIONAL_ONLY:
            found.append(argument.name)
        elif argument.default is argument.empty and argument.kind not in (
            argument.VAR_POSITIONAL,
            argument.VAR_KEYWORD,
        ):
            raise ValueError(
                f"{name} may need the images and, as keywords, {accepted}, but it needs {argument.name} too; "
                "give that argument a default, or call the module from one of your own"
            )
    return tuple(found)


def _mode(function: Call, train: bool, *others: str) -> dict[str, Any]:
    """Return the keyword arguments that tell a method whether it trains, and those of `others`, as None."""
    names = _arguments(function, *others)
    return {name: train == MODES[name] if name in MODES else None for name in names}


# -- state


def _leaves(module: nnx.Module) -> dict[Path, Any]:
    """Return the variables and the plain arrays of an NNX module."""
    state: Any = nnx.to_flat_state(nnx.state(module))
    return dict(state)


def _nested(leaves: Mapping[Path, Any]) -> Any:
    """Return arrays or variables as a tree of arrays, every key a string."""
    return unflatten_dict({tuple(map(str, path)): leaf[...] for path, leaf in leaves.items()})


def _check_state(module: str, path: Path, leaf: Any) -> None:
    if isinstance(leaf, nnx.Param | nnx.BatchStat | nnx.RngKey | nnx.RngCount):
        if not isinstance(leaf.get_value(), jax.Array | np.ndarray):
            raise ValueError(_no_state(module, path, f"a {type(leaf).__name__} that is not one array"))
    elif isinstance(leaf, nnx.Variable):
        raise ValueError(_no_state(module, path, f"a {type(leaf).__name__}"))


def _no_state(module: str, path: Path, what: str) -> str:
    return (
        f"{module} is an NNX module with state it cannot carry from step to step: "
        f"{'/'.join(map(str, path))} is {what}; keep parameters in nnx.Param, batch statistics in "
        "nnx.BatchStat, random streams in nnx.Rngs, and constants in plain arrays"
    )


# -- rows that count


def _count_in_linen(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> Any:
    """Hand the mask to a layer that keeps batch statistics; an interceptor of linen's methods."""
    layer, mask = context.module, _counted.get()
    if mask is None or context.method_name != "__call__" or layer.scope is None:
        return call(*args, **kwargs)
    kept = layer.scope.variables().get("batch_stats", {})
    own = {name: value for name, value in kept.items() if not isinstance(value, Mapping)}
    if not own:
        return call(*args, **kwargs)
    if not _takes_mask(layer):
        raise ValueError(_no_mask("/".join(layer.path) or type(layer).__name__))
    out = _count(call, mask, args, kwargs)
    if layer.scope.is_mutable_collection("batch_stats"):
        for name, before in own.items():
            after = layer.scope.get_variable("batch_stats", name)
            layer.scope.put_variable("batch_stats", name, jnp.where(mask.any(), after, before))
    return out


@cache
def _counting(layer: type[Any]) -> type[Any]:
    """Return an NNX layer's class whose call does what linen's interceptor does."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        mask, plain = _counted.get(), partial(layer.__call__, self)
        if mask is None:
            return plain(*args, **kwargs)
        own = _own_statistics(self)
        before = [value[...] for value in own]
        out = _count(plain, mask, args, kwargs)
        for value, old in zip(own, before, strict=True):
            value[...] = jnp.where(mask.any(), value[...], old)
        return out

    return type(layer.__name__, (layer,), {"__call__": call})


def _count(call: Call, mask: jax.Array, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if kwargs.get("mask") is None:
        x = args[0] if args else kwargs["x"]
        counted = mask | ~mask.any()  # no mean over nothing: its nan would also reach the gradient
        kwargs = {**kwargs, "mask": counted.reshape(-1, *[1] * (x.ndim - 1))}
    return call(*args, **kwargs)


def _owners_of_statistics(model: nnx.Module) -> list[tuple[Path, Any]]:
    layers: list[tuple[Path, Any]] = [*nnx.iter_modules(model)]
    return [(path, layer) for path, layer in layers if _own_statistics(layer)]


def _own_statistics(layer: Any) -> list[Any]:
    return [value for value in vars(layer).values() if isinstance(value, nnx.BatchStat)]


def _takes_mask(layer: Any) -> bool:
    return callable(layer) and "mask" in inspect.signature(layer).parameters


def _no_mask(layer: str) -> str:
    return (
        f"the layer {layer} keeps batch statistics but its call has no argument mask, the rows that count, "
        "which a method that replays samples needs; add one, as BatchNorm of linen and NNX have it"
    )
