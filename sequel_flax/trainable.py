"""Which parameters are trained: the others stay exactly as they are, and cost nothing.

A method sees a train state with the trained parameters only. Frozen ones are None in its trees, so no
gradient is taken for them, and no anchor, importance or rate is kept.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.training.train_state import TrainState

from sequel_flax.foreign import as_called

Params = Any
Selection = Any
"""What `trainable` may be: None for all parameters, a predicate over paths such as
`lambda path: path[0] == "head"`, a tree of bools in the structure of the parameters, or an NNX filter."""

Fill = Any
"""How a tree of a method begins: a function of a parameter, or a tuple of these for a tuple of trees."""


def trained_mask(trainable: Selection, params: Params, network: Any, own: tuple[str, ...] = ()) -> Any:
    """Return a tree of bools in the structure of the parameters, True for those that are trained.

    Args:
        trainable: see `Selection`; it is about the network's parameters.
        params: of the train state.
        network: an adapted NNX module, whose variables an NNX filter looks at; any other has none.
        own: names of parameters that the method adds to the network's; they are always trained.

    Raises:
        ValueError: a tree of another structure, or nothing is trained.
    """
    if trainable is None:
        return jax.tree.map(lambda _: True, params)
    plain = flax.core.unfreeze(params)
    others = {name: tree for name, tree in plain.items() if name not in own}
    if isinstance(trainable, Mapping):
        mask = _checked_tree(trainable, others)
    else:
        selects = _predicate(trainable, getattr(network, "leaves", {}))
        mask = jax.tree_util.tree_map_with_path(lambda keys, leaf: bool(selects(_path(keys), leaf)), others)
    if not any(jax.tree.leaves(mask)):
        raise ValueError(
            f"trainable must select at least one parameter of the network, got {trainable!r}, which selects "
            f"none of {', '.join(_names(others))}"
        )
    mask |= {name: jax.tree.map(lambda _: True, plain[name]) for name in own if name in plain}
    return jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(mask))


def _checked_tree(trainable: Mapping[str, Any], network: Params) -> Params:
    """Return a user's tree of bools; raise ValueError if it does not fit the network."""
    tree = flax.core.unfreeze(dict(trainable))
    found, wanted = _names(tree), _names(network)
    for name in sorted(set(found) ^ set(wanted)):
        raise ValueError(
            f"a tree given as trainable must have the structure of the parameters, got one that "
            f"{'lacks' if name in wanted else 'has'} {name}; the parameters are {', '.join(wanted)}"
        )
    for name, leaf in zip(found, jax.tree.leaves(tree), strict=True):
        if not isinstance(leaf, bool | np.bool_):
            raise ValueError(f"a tree given as trainable must hold bools, got {leaf!r} for {name}")
    return jax.tree.map(bool, tree)


def _predicate(trainable: Selection, leaves: Mapping[Any, Any]) -> Callable[[tuple[str, ...], Any], bool]:
    """Return a function of the path of a parameter and its array, from a predicate or an NNX filter."""
    if callable(trainable) and not isinstance(trainable, type) and _takes_a_path_only(trainable):
        return lambda path, leaf: trainable(path)
    try:
        selects = nnx.filterlib.to_predicate(trainable)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"trainable must be a predicate over paths, a tree of bools or an NNX filter, got {trainable!r}"
        ) from error
    variables = {tuple(map(str, path)): (path, leaf) for path, leaf in leaves.items()}
    return lambda path, leaf: selects(*variables.get(path, (path, leaf)))


def _takes_a_path_only(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind(())
    except TypeError:
        return False
    return True


def _path(keys: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in keys)


def _paths(tree: Any) -> list[tuple[str, ...]]:
    return [_path(keys) for keys, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


def _names(tree: Any) -> list[str]:
    return ["/".join(path) for path in _paths(tree)]


# -- trees with None in place of frozen parameters


def chosen(mask: Any, tree: Any) -> Any:
    """Return the tree with None in place of leaves that the mask leaves out."""
    return jax.tree.map(lambda on, leaf: leaf if on else None, mask, tree)


def merged(trained: Any, whole: Any) -> Any:
    """Return `whole` with the leaves of `trained` that are not None."""
    return jax.tree.map(lambda old, new: old if new is None else new, whole, trained)


def _like(trained: Any, tree: Any) -> Any:
    """Return the tree with None where `trained` has None."""
    return jax.tree.map(lambda leaf, on: None if on is None else leaf, tree, trained)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainedPart:
    """A train state whose parameters are the trained ones; the network has the others as constants."""

    whole: TrainState
    params: Params  # None in place of frozen ones; `whole` has older values of them

    @property
    def step(self) -> Any:
        """Of the train state."""
        return self.whole.step

    @property
    def opt_state(self) -> Any:
        """Of the train state: of all its parameters."""
        return self.whole.opt_state

    @property
    def batch_stats(self) -> Any:
        """Of the train state; {} without."""
        return getattr(self.whole, "batch_stats", {})

    @property
    def tx(self) -> optax.GradientTransformation:
        """The optimizer, given zeros as the gradient of frozen parameters."""
        tx, params = self.whole.tx, self.whole.params

        def update(gradient: Any, state: Any, trained: Any = None) -> tuple[Any, Any]:
            updates, state = tx.update(self._filled(gradient), state, merged(trained, params))
            return _like(self.params, updates), state

        return optax.GradientTransformation(lambda trained: tx.init(merged(trained, params)), update)

    def apply_fn(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Call the network with the trained parameters given and the frozen ones."""
        params = merged(variables["params"], self.whole.params)
        return as_called(self.whole.apply_fn)({**variables, "params": params}, *args, **kwargs)

    def replace(self, **changes: Any) -> TrainedPart:
        """Return the train state with other fields."""
        params = changes.pop("params", self.params)
        return TrainedPart(self.whole.replace(**changes) if changes else self.whole, params)

    def apply_gradients(self, *, grads: Any, **changes: Any) -> TrainedPart:
        """Return the train state after a step of the optimizer."""
        before = self.joined()
        after = before.apply_gradients(grads=self._filled(grads), **changes)
        return TrainedPart(after.replace(params=before.params), _like(self.params, after.params))

    def joined(self) -> TrainState:
        """Return the train state with all parameters."""
        whole: TrainState = self.whole.replace(params=merged(self.params, self.whole.params))
        return whole

    def _filled(self, gradient: Any) -> Any:
        return jax.tree.map(lambda p, g: jnp.zeros_like(p) if g is None else g, self.whole.params, gradient)


# -- methods


@dataclass(frozen=True)
class Trained:
    """Has the functions of a method see trained parameters only.

    Args:
        trainable: which; see `Selection`.
        fills: of each field of the method's memory that has the structure of the parameters, how it begins.
        own: names of the method's own parameters.
    """

    trainable: Selection
    fills: Mapping[str, Fill]
    own: tuple[str, ...] = ()

    def mask(self, ts: TrainState) -> Any:
        """Return which parameters are trained; see `trained_mask`."""
        return self.mask_of(ts.params, getattr(ts.apply_fn, "__self__", None))

    def mask_of(self, params: Params, network: Any) -> Any:
        """Return which of these parameters are trained; see `trained_mask`."""
        return trained_mask(self.trainable, params, network, self.own)

    def part(self, ts: TrainState) -> Any:
        """Return the train state as the method sees it."""
        return ts if self.trainable is None else TrainedPart(ts, chosen(self.mask(ts), ts.params))

    def begun(self, ts: TrainState, state: Any) -> Any:
        """Return the state with what it lacks of the parameters that are trained from now on."""
        mask = self.mask(ts)

        def fill(tree: Any, how: Fill) -> Any:
            return jax.tree.map(
                lambda on, old, p: how(p) if on and old is None else old, mask, tree, ts.params
            )

        return state._replace(memory=self._each(fill, state.memory))

    def reads(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function of `(ts, state, ...)` that sees trained parameters only."""
        if self.trainable is None:
            return function

        def call(ts: TrainState, state: Any, *rest: Any) -> Any:
            return function(self.part(ts), self._seen(self.mask(ts), state), *rest)

        return call

    def changes(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function from `(ts, state, ...)` to `(ts, state, ...)` that changes these only."""
        if self.trainable is None:
            return function

        def call(ts: TrainState, state: Any, *rest: Any) -> Any:
            mask = self.mask(ts)
            after, new, *others = function(self.part(ts), self._seen(mask, state), *rest)

            def joined(old: Any, how: Fill, new: Any) -> Any:
                return jax.tree.map(lambda on, a, b: b if on else a, mask, old, new)

            return after.joined(), new._replace(memory=self._each(joined, state.memory, new.memory)), *others

        return call

    def _seen(self, mask: Any, state: Any) -> Any:
        def seen(tree: Any, how: Fill) -> Any:
            def pick(on: bool, leaf: Any) -> Any:
                if on and leaf is None:
                    raise ValueError(
                        "the state lacks what the method remembers of a parameter that is trained now; call "
                        "ts, state = algorithm.start_task(ts, state, task) with the algorithm that trains it"
                    )
                return leaf if on else None

            return jax.tree.map(pick, mask, tree)

        return state._replace(memory=self._each(seen, state.memory))

    def _each(self, function: Callable[..., Any], memory: Any, new: Any = None) -> Any:
        """Return the memory (`new` if given) with the function applied to each tree of parameters."""
        result = memory if new is None else new
        changed = {}
        for name, how in self.fills.items():
            trees = [getattr(m, name) for m in (memory, new) if m is not None]
            if isinstance(how, tuple):
                parts = zip(how, *trees, strict=True)
                changed[name] = tuple(function(tree, each, *more) for each, tree, *more in parts)
            else:
                changed[name] = function(trees[0], how, *trees[1:])
        return result._replace(**changed) if changed else result
