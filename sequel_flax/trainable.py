"""Training some of the parameters: the others stay exactly unchanged and cost no memory.

A method receives a train state with the trained parameters only. Frozen ones are None in its trees. They have
no gradient, and the method keeps no anchor, importance or learning rate for them.
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
from flax.training.train_state import TrainState

from sequel_flax.foreign import as_called

Params = Any
Selection = Any
"""The values of `trainable`: None for all parameters, a predicate over paths such as
`lambda path: path[0] == "head"`, a tree of bools with the structure of the parameters, or an NNX filter."""

Fill = Any
"""The initial value of a method's tree: a function of a parameter, or one for each of a tuple of trees."""


def trained_mask(
    trainable: Selection,
    params: Params,
    network: Any,
    extra_parameters: tuple[str, ...] = (),
    name: str = "trainable",
) -> Any:
    """Return a tree of bools with the structure of the parameters, True for those that are trained.

    Args:
        trainable: The parameters of the network to train; see `Selection`.
        params: The parameters of the train state.
        network: An adapted NNX module, for NNX filters, which match its variables. Any other object is
            ignored.
        extra_parameters: Names of the parameters that the method adds to those of the network. They are
            always trained.
        name: The name of the argument in errors.

    Returns:
        A tree of bools.

    Raises:
        ValueError: The structure of a tree of bools is wrong, or no parameter is selected.

    Example:
        >>> params = {"stem": {"kernel": 1.0}, "head": {"kernel": 2.0, "bias": 3.0}}
        >>> trained_mask(lambda path: path[0] == "head", params, None)
        {'head': {'bias': True, 'kernel': True}, 'stem': {'kernel': False}}
    """
    if trainable is None:
        return jax.tree.map(lambda _: True, params)
    plain = flax.core.unfreeze(params)
    extra = {key: plain[key] for key in extra_parameters if key in plain}
    of_network = {key: tree for key, tree in plain.items() if key not in extra} if extra else plain
    if isinstance(trainable, Mapping):
        mask = _checked_tree(trainable, of_network, name)
    else:
        selects = _predicate(trainable, getattr(network, "leaves", {}), name)
        mask = jax.tree_util.tree_map_with_path(
            lambda keys, leaf: bool(selects(_path(keys), leaf)), of_network
        )
    if not any(jax.tree.leaves(mask)):
        raise ValueError(
            f"{name} must select at least one parameter of the network, got {trainable!r}, which selects "
            f"none of {', '.join(_names(of_network))}"
        )
    if extra:
        mask |= jax.tree.map(lambda _: True, extra)
    return jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(mask))


def _checked_tree(trainable: Mapping[str, Any], params: Params, name: str) -> Params:
    """Return a user's tree of bools; raise ValueError if its structure is not that of the parameters."""
    tree = flax.core.unfreeze(dict(trainable))
    names, expected = _names(tree), _names(params)
    for path in sorted(set(names) ^ set(expected)):
        raise ValueError(
            f"a tree given as {name} must have the structure of the parameters, got one that "
            f"{'lacks' if path in expected else 'has'} {path}; the parameters are {', '.join(expected)}"
        )
    for path, leaf in zip(names, jax.tree.leaves(tree), strict=True):
        if not isinstance(leaf, bool | np.bool_):
            raise ValueError(f"a tree given as {name} must hold bools, got {leaf!r} for {path}")
    return jax.tree.map(bool, tree)


def _predicate(
    trainable: Selection, leaves: Mapping[Any, Any], name: str
) -> Callable[[tuple[str, ...], Any], bool]:
    """Return a function of a parameter's path and array, from a predicate over paths or an NNX filter."""
    if callable(trainable) and not isinstance(trainable, type) and _takes_a_path_only(trainable):
        return lambda path, leaf: trainable(path)
    from flax import nnx  # slow to import

    try:
        selects = nnx.filterlib.to_predicate(trainable)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{name} must be a predicate over paths, a tree of bools or an NNX filter, got {trainable!r}"
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


def _names(tree: Any) -> list[str]:
    return ["/".join(_path(keys)) for keys, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


# -- trees with None in place of frozen parameters


def chosen(mask: Any, tree: Any) -> Any:
    """Return the tree with None in place of the leaves that the mask leaves out.

    Args:
        mask: A tree of bools.
        tree: A tree with the structure of the mask.

    Returns:
        A tree with the structure of the mask.

    Example:
        >>> chosen({"a": True, "b": False}, {"a": 1, "b": 2})
        {'a': 1, 'b': None}
    """
    return jax.tree.map(lambda is_trained, leaf: leaf if is_trained else None, mask, tree)


def merged(trained: Any, whole: Any) -> Any:
    """Return `whole` with the leaves of `trained` that are not None.

    Args:
        trained: A tree that may have None in place of leaves.
        whole: A tree without None.

    Returns:
        A tree with the structure of `whole`.

    Example:
        >>> merged({"a": 1, "b": None}, {"a": 0, "b": 2})
        {'a': 1, 'b': 2}
    """
    return jax.tree.map(lambda old, new: old if new is None else new, whole, trained)


def _like(trained: Any, tree: Any) -> Any:
    """Return the tree with None wherever `trained` has None."""
    return jax.tree.map(lambda leaf, p: None if p is None else leaf, tree, trained)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainedPart:
    """A train state whose parameters are the trained ones; the network uses the others as constants.

    It has the fields and methods of a TrainState.

    Args:
        whole: The train state with all parameters. Its values of the trained ones may be out of date.
        params: The parameters, with None in place of frozen ones.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"stem": jnp.ones(1), "head": jnp.ones(1)}
        >>> ts = TrainState.create(apply_fn=None, params=params, tx=optax.sgd(0.5))
        >>> part = TrainedPart(ts, chosen({"stem": False, "head": True}, params))
        >>> after = part.apply_gradients(grads={"stem": None, "head": jnp.ones(1)}).joined()
        >>> jax.tree.map(float, jax.tree.map(jnp.sum, after.params))
        {'head': 0.5, 'stem': 1.0}
    """

    whole: TrainState
    params: Params

    @property
    def step(self) -> Any:
        """The number of steps taken."""
        return self.whole.step

    @property
    def opt_state(self) -> Any:
        """The state of the optimizer, for all parameters."""
        return self.whole.opt_state

    @property
    def batch_stats(self) -> Any:
        """The running statistics of batch normalisation; {} if there are none."""
        return getattr(self.whole, "batch_stats", {})

    @property
    def collections(self) -> Any:
        """Other collections of the network's variables, by name; {} if there are none."""
        return getattr(self.whole, "collections", {})

    @property
    def tx(self) -> optax.GradientTransformation:
        """The optimizer; it receives zeros as the gradient of frozen parameters."""
        tx, params = self.whole.tx, self.whole.params

        def update(gradient: Any, state: Any, trained: Any = None) -> tuple[Any, Any]:
            updates, state = tx.update(self._with_zeros(gradient), state, merged(trained, params))
            return _like(self.params, updates), state

        return optax.GradientTransformation(lambda trained: tx.init(merged(trained, params)), update)

    def apply_fn(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Call the network with the given trained parameters and the frozen ones.

        Args:
            variables: The collections of the network, `params` with None in place of frozen parameters.
            *args: The inputs.
            **kwargs: The keywords of the network's `apply`, and the inputs if they are a dict.

        Returns:
            The outputs of the network's `apply`.
        """
        params = merged(variables["params"], self.whole.params)
        options = ("train", "rngs", "method", "mutable", "t")
        inputs = {name: value for name, value in kwargs.items() if name not in options}
        call = as_called(self.whole.apply_fn, () if args else inputs)
        return call({**variables, "params": params}, *args, **kwargs)

    def replace(self, **changes: Any) -> TrainedPart:
        """Return a copy with other fields.

        Args:
            **changes: Fields of the train state. `params` has None in place of frozen parameters.
        """
        params = changes.pop("params", self.params)
        return TrainedPart(self.whole.replace(**changes) if changes else self.whole, params)

    def apply_gradients(self, *, grads: Any, **changes: Any) -> TrainedPart:
        """Return the train state after one optimizer step.

        Args:
            grads: The gradient, with None for frozen parameters.
            **changes: Other fields of the train state.
        """
        before = self.joined()
        after = before.apply_gradients(grads=self._with_zeros(grads), **changes)
        return TrainedPart(after.replace(params=before.params), _like(self.params, after.params))

    def joined(self) -> TrainState:
        """Return the train state with all parameters."""
        whole: TrainState = self.whole.replace(params=merged(self.params, self.whole.params))
        return whole

    def _with_zeros(self, gradient: Any) -> Any:
        return jax.tree.map(lambda p, g: jnp.zeros_like(p) if g is None else g, self.whole.params, gradient)


# -- methods


@dataclass(frozen=True)
class Trained:
    """Restricts the functions of a method to the trained parameters.

    Args:
        trainable: The parameters to train; see `Selection`.
        fills: For each field of the memory that has the structure of the parameters, the initial value of
            a leaf; see `Fill`.
        extra_parameters: Names of the parameters that the method adds. They are always trained.

    Example:
        >>> import jax.numpy as jnp
        >>> trained = Trained(lambda path: path == ("head",), {})
        >>> trained.mask_of({"stem": jnp.ones(1), "head": jnp.ones(1)}, None)
        {'head': True, 'stem': False}
    """

    trainable: Selection
    fills: Mapping[str, Fill]
    extra_parameters: tuple[str, ...] = ()

    def mask(self, ts: TrainState) -> Any:
        """Return a tree of bools, True for trained parameters; see `trained_mask`."""
        return self.mask_of(ts.params, getattr(ts.apply_fn, "__self__", None))

    def mask_of(self, params: Params, network: Any) -> Any:
        """Return a tree of bools, True for trained parameters; see `trained_mask`."""
        return trained_mask(self.trainable, params, network, self.extra_parameters)

    def part(self, ts: TrainState) -> Any:
        """Return the train state that the method receives."""
        return ts if self.trainable is None else TrainedPart(ts, chosen(self.mask(ts), ts.params))

    def begun(self, ts: TrainState, state: Any) -> Any:
        """Return the state with initial values for parameters that are trained from now on.

        They may also be new: a network may grow at the start of a task.

        Args:
            ts: The train state with all parameters.
            state: The state of the algorithm.

        Raises:
            ValueError: A parameter has another shape than in the tasks before.
        """
        mask = self.mask(ts)

        def fill(tree: Any, initial: Fill) -> Any:
            kept = {_path(keys): leaf for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}

            def value(keys: tuple[Any, ...], is_trained: bool, p: Any) -> Any:
                old = kept.get(_path(keys))
                if old is None:
                    return initial(p) if is_trained else None
                if old.shape != p.shape:
                    raise ValueError(
                        f"the parameter {'/'.join(_path(keys))} must keep its shape from task to task, got "
                        f"{list(p.shape)} after {list(old.shape)}; make the network large enough for all "
                        "tasks, or give a new layer a new name"
                    )
                return old

            return jax.tree_util.tree_map_with_path(value, mask, ts.params)

        return state._replace(memory=self._map(fill, state.memory))

    def reads(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function of `(ts, state, ...)` that receives the trained parameters only.

        Args:
            function: It takes `(ts, state, ...)` and returns neither of the two.
        """
        if self.trainable is None:
            return function

        def call(ts: TrainState, state: Any, *rest: Any) -> Any:
            return function(self.part(ts), self._restricted(self.mask(ts), state), *rest)

        return call

    def changes(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function of `(ts, state, ...)` that changes the trained parameters only.

        Args:
            function: It takes `(ts, state, ...)` and returns `(ts, state, ...)`.
        """
        if self.trainable is None:
            return function

        def call(ts: TrainState, state: Any, *rest: Any) -> Any:
            mask = self.mask(ts)
            after, new, *outputs = function(self.part(ts), self._restricted(mask, state), *rest)

            def join(old: Any, initial: Fill, new: Any) -> Any:
                return jax.tree.map(lambda is_trained, a, b: b if is_trained else a, mask, old, new)

            return after.joined(), new._replace(memory=self._map(join, state.memory, new.memory)), *outputs

        return call

    def _restricted(self, mask: Any, state: Any) -> Any:
        """Return the state with None for frozen parameters."""

        def restrict(tree: Any, initial: Fill) -> Any:
            def pick(is_trained: bool, leaf: Any) -> Any:
                if is_trained and leaf is None:
                    raise ValueError(
                        "the state has no entry for a parameter that is trained now; call ts, state = "
                        "algorithm.start_task(ts, state, task) with the algorithm that trains it"
                    )
                return leaf if is_trained else None

            return jax.tree.map(pick, mask, tree)

        return state._replace(memory=self._map(restrict, state.memory))

    def _map(self, function: Callable[..., Any], memory: Any, new: Any = None) -> Any:
        """Return the memory (`new` if given) with the function applied to each tree of parameters."""
        result = memory if new is None else new
        changed = {}
        for name, initial in self.fills.items():
            trees = [getattr(m, name) for m in (memory, new) if m is not None]
            if isinstance(initial, tuple):
                parts = zip(initial, *trees, strict=True)
                changed[name] = tuple(function(tree, each, *more) for each, tree, *more in parts)
            else:
                changed[name] = function(trees[0], initial, *trees[1:])
        return result._replace(**changed) if changed else result
