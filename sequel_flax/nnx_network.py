"""NNX modules as pure functions of their variables.

`sequel_flax.foreign` imports this module when it gets an NNX module, because `flax.nnx` is slow to import.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import unflatten_dict

from sequel_flax._compat import set_class
from sequel_flax.foreign import (
    AdaptedNetwork,
    Apply,
    Path,
    call_with_mask,
    leaf_at,
    mode_arguments,
    mode_keywords,
    no_mask,
    no_variable,
    path_text,
    row_mask,
    takes_mask,
)

STREAMS = (nnx.RngKey, nnx.RngCount)
"""Variables of random streams, which are seeded in each step."""


class NNXNetwork(AdaptedNetwork):
    """An NNX module as pure functions of its variables.

    Args:
        model: The module; it is never changed.
        inputs: The keywords of the inputs; empty if they are the first argument.

    Raises:
        ValueError: See `sequel_flax.adapted`.

    Example:
        >>> from flax import nnx
        >>> network = NNXNetwork(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
        >>> network.apply(network.init(None), jnp.ones((4, 3))).shape
        (4, 2)
    """

    # nnx.bridge.ToLinen (flax 0.12.8) cannot replace this class: it raises KeyError for list elements under
    # string keys, raises for the parameters that KCL adds, keeps subclasses of Param out of "params", uses
    # the module's own statistics if "batch_stats" is missing, and does not reseed the module's streams.

    def __init__(self, model: nnx.Module, inputs: tuple[str, ...] = ()) -> None:
        super().__init__(model.__call__, inputs)
        mode_keywords(model.__call__, "rngs", inputs=inputs)
        self.text = re.sub(r" at 0x[0-9a-f]+", "", repr(model))  # addresses differ between runs
        self.leaves = leaves_of(model)
        self.names = sorted({name for name in map(collection, self.leaves.values()) if name})
        for path, leaf in self.leaves.items():
            _check_state(model, path, leaf)
        self.unmaskable: list[Path] = []
        self.graphdefs = {}
        for train in (True, False):
            copy = nnx.clone(model)
            copy.train() if train else copy.eval()
            layers = [(path, layer) for path, layer in nnx.iter_modules(copy) if _has_statistics(layer)]
            self.unmaskable = [path for path, layer in layers if not takes_mask(layer)]
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
        """Call a method with the given variables; see `sequel_flax.foreign`."""
        if row_mask.get() is not None and self.unmaskable:
            raise ValueError(no_mask(path_text(self.unmaskable[0])))
        key = rngs["dropout"] if rngs else None
        values = self._values(variables, key)
        module = nnx.merge(self.graphdefs[train], unflatten_dict(values))
        if callable(method):
            out = method(module, *x)
        else:
            function = getattr(module, method or "__call__")
            keywords = mode_arguments(function, train, "rngs", inputs=self.inputs)
            if "rngs" in keywords and key is not None:
                keywords["rngs"] = nnx.Rngs(key)
            out = function(*x, **inputs, **keywords)
        leaves = leaves_of(module)
        for path, leaf in self.leaves.items():
            if not isinstance(leaf, nnx.Variable) and leaves[path] is not values[path]:
                raise ValueError(_no_state(module, path, "an array that changes in a call"))
        if not mutable:
            return out
        names = [name for name in self.names if name != "params" and (mutable is True or name in mutable)]
        return out, {name: self._collected(leaves, name) for name in names}

    def _collected(self, leaves: Mapping[Path, Any], name: str) -> Any:
        """Return the arrays of a collection as a tree whose keys are strings."""
        paths = [path for path, leaf in self.leaves.items() if collection(leaf) == name]
        return unflatten_dict({tuple(map(str, path)): leaves[path][...] for path in paths})

    def _values(self, variables: Mapping[str, Any], key: jax.Array | None) -> dict[Path, Any]:
        """Return an array for each leaf of the module; a key reseeds every random stream."""
        if key is not None and not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            key = jax.random.wrap_key_data(key)
        values = {}
        for i, (path, leaf) in enumerate(self.leaves.items()):
            value = leaf[...] if isinstance(leaf, nnx.Variable) else leaf
            if name := collection(leaf):
                value = leaf_at(variables.get(name), path)
                if value is None:
                    raise ValueError(no_variable(f"no array {name}/{path_text(path)}"))
            elif isinstance(leaf, nnx.RngKey) and key is not None:
                stream_key = jax.random.fold_in(key, i)
                value = jax.random.split(stream_key, value.shape) if value.shape else stream_key
            elif isinstance(leaf, nnx.RngCount) and key is not None:
                value = jnp.zeros_like(value)
            values[path] = value
        return values


def leaves_of(module: nnx.Module) -> dict[Path, Any]:
    """Return the variables and the plain arrays of an NNX module.

    Args:
        module: The module.

    Example:
        >>> from flax import nnx
        >>> sorted(leaves_of(nnx.Linear(3, 2, rngs=nnx.Rngs(0))))
        [('bias',), ('kernel',)]
    """
    state: Any = nnx.to_flat_state(nnx.state(module))
    return dict(state)


def collection(leaf: Any) -> str:
    """Return the linen collection of an NNX variable; "" for random streams and plain arrays.

    Args:
        leaf: A variable or an array.

    Example:
        >>> from flax import nnx
        >>> collection(nnx.Param(1.0)), collection(nnx.RngCount(0))
        ('params', '')
    """
    if isinstance(leaf, nnx.Param):
        return "params"
    if isinstance(leaf, nnx.BatchStat):
        return "batch_stats"
    return type(leaf).__name__ if isinstance(leaf, nnx.Variable) and not isinstance(leaf, STREAMS) else ""


def _check_state(module: nnx.Module, path: Path, leaf: Any) -> None:
    if isinstance(leaf, nnx.Intermediate):
        raise ValueError(_no_state(module, path, f"a {type(leaf).__name__}"))
    if isinstance(leaf, nnx.Variable) and not isinstance(leaf.get_value(), jax.Array | np.ndarray):
        raise ValueError(_no_state(module, path, f"a {type(leaf).__name__} that is not one array"))


def _no_state(module: nnx.Module, path: Path, problem: str) -> str:
    return (
        f"{type(module).__name__} is an NNX module with state that cannot be carried from step to step: "
        f"{path_text(path)} is {problem}; keep parameters in nnx.Param, batch statistics in nnx.BatchStat, "
        "random streams in nnx.Rngs, other state in a subclass of nnx.Variable, and constants in plain arrays"
    )


@cache
def _masked_class(layer: type[Any]) -> type[Any]:
    """Return a subclass of an NNX layer's class whose calls pass the mask."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return call_with_mask(partial(layer.__call__, self), args, kwargs)

    return type(layer.__name__, (layer,), {"__call__": call})


def _has_statistics(layer: Any) -> bool:
    is_spectral = isinstance(layer, nnx.SpectralNorm)  # its statistics are those of weights
    return not is_spectral and any(isinstance(value, nnx.BatchStat) for value in vars(layer).values())
