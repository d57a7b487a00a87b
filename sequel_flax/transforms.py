"""EWC, MAS, SI and L2 towards the initial weights as optax transformations, for your own training loops.

    tx = optax.chain(ewc_penalty(10.0), optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    ...                                                       # train on a task
    opt_state = consolidate(opt_state, params, diagonal_fisher(nll, params, batches))

A penalty adds its gradient to that of the loss, so its place in the chain decides what is clipped. The state
is in the state of the optimizer. `consolidate` finds it there, also within `optax.MultiSteps`,
`optax.multi_transform` or `optax.inject_hyperparams`, and in the state of an `nnx.Optimizer`.

`wrt` restricts a penalty to some of the parameters. The others have no penalty and no state:

    tx = optax.chain(ewc_penalty(10.0, wrt=lambda path: path[0] != "head"), optax.sgd(0.1))

The equations are those of `sequel_flax.algorithms.ewc`, `mas` and `si`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sequel_flax.bundle import empty_sum
from sequel_flax.trainable import Selection, trained_mask

Params = Any
Loss = Callable[[Params, Any], jax.Array]
"""A function of the parameters and of a batch, which returns one number per sample `[B]`."""


class PenaltyState(NamedTuple):
    """The state of `ewc_penalty` and `mas_penalty`: two trees with the structure of the parameters.

    Parameters that `wrt` leaves out have an `optax.MaskedNode` there, which holds no array.

    Args:
        anchor: The weights at which the penalty is least.
        importance: The importance F of each weight, 0 before the end of the first task.
        separate: Whether each past task keeps a term around its own weights, bool ().
        gamma: The decay of past importances at the end of a task, a float ().

    Example:
        >>> state = ewc_penalty(10.0).init({"w": jnp.ones(2)})
        >>> state.importance["w"].tolist(), bool(state.separate)
        ([0.0, 0.0], True)
    """

    anchor: Params
    importance: Params
    separate: jax.Array
    gamma: jax.Array


class L2InitState(NamedTuple):
    """The state of `l2_init_penalty`.

    Args:
        anchor: The initial weights.

    Example:
        >>> l2_init_penalty(0.1).init({"w": jnp.ones(2)}).anchor["w"].tolist()
        [1.0, 1.0]
    """

    anchor: Params


class SIState(NamedTuple):
    """The state of `si`.

    Args:
        anchor: The weights at the start of the current task.
        importance: The importance Omega of each weight, 0 before the end of the first task.
        path: The path integral omega of the current task.
        xi: The damping of the importances, a float ().
        clamp: Whether importances are kept >= 0, bool ().
        inner: The state of the inner transformation.

    Example:
        >>> state = si(optax.sgd(0.1), 0.5).init({"w": jnp.ones(2)})
        >>> state.path["w"].tolist()
        [0.0, 0.0]
    """

    anchor: Params
    importance: Params
    path: Params
    xi: jax.Array
    clamp: jax.Array
    inner: Any


def ewc_penalty(
    strength: float | jax.Array,
    accumulation: Literal["separate", "online"] = "separate",
    gamma: float = 1.0,
    wrt: Selection = None,
) -> optax.GradientTransformation:
    """Return the penalty of elastic weight consolidation, `strength/2 * sum F (theta - theta*)^2`.

    Args:
        strength: The factor lambda, >= 0; it may be traced, as in `optax.inject_hyperparams`.
        accumulation: `separate`, the sum of one penalty per past task (stored as a single one); `online`, one
            penalty around the latest weights, with past importances decayed by gamma.
        gamma: The decay of past importances, in [0, 1].
        wrt: The parameters with a penalty: a predicate over paths, a tree of bools, or an NNX filter; None
            for all. With `optax.inject_hyperparams`, name it in `static_args`.

    Returns:
        A transformation with a `PenaltyState`; `update` needs the parameters.

    Raises:
        ValueError: An argument is out of its range.

    Source: Kirkpatrick et al. 2017, arXiv 1612.00796; online: Schwarz et al. 2018, arXiv 1805.06370.

    Example:
        >>> params = {"w": jnp.array([1.0, 2.0])}
        >>> tx = optax.chain(ewc_penalty(10.0), optax.sgd(0.1))
        >>> opt_state = tx.init(params)
        >>> opt_state = consolidate(opt_state, params, {"w": jnp.array([0.0, 1.0])})
        >>> moved = {"w": jnp.array([2.0, 3.0])}
        >>> updates, opt_state = tx.update({"w": jnp.zeros(2)}, opt_state, moved)
        >>> updates["w"].tolist()  # -0.1 * 10 * importance * distance
        [-0.0, -1.0]
    """
    _check_strength(strength)
    if accumulation not in ("separate", "online"):
        raise ValueError(f"accumulation must be separate or online, got {accumulation!r}")
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must be in [0, 1], got {gamma}")
    if gamma != 1 and accumulation == "separate":
        raise ValueError(f"gamma is only used with accumulation=online, got gamma={gamma}; leave it out")
    return _quadratic_penalty(strength, accumulation == "separate", gamma, wrt)


def mas_penalty(strength: float | jax.Array, wrt: Selection = None) -> optax.GradientTransformation:
    """Return the penalty of memory aware synapses, `strength * sum Omega (theta - theta*)^2`.

    Args:
        strength: The factor lambda, >= 0; it may be traced.
        wrt: The parameters with a penalty, see `ewc_penalty`.

    Returns:
        A transformation with a `PenaltyState`; give `consolidate` the importances of `output_sensitivity`.

    Raises:
        ValueError: The strength is negative.

    Source: Aljundi et al. 2018, arXiv 1711.09601.

    Example:
        >>> params = {"w": jnp.array([1.0])}
        >>> tx = mas_penalty(0.5)
        >>> state = consolidate(tx.init(params), params, {"w": jnp.array([3.0])})
        >>> tx.update({"w": jnp.zeros(1)}, state, {"w": jnp.array([2.0])})[0]["w"].tolist()
        [3.0]
    """
    _check_strength(strength)
    return _quadratic_penalty(2 * strength, separate=False, gamma=1.0, wrt=wrt)


def l2_init_penalty(strength: float | jax.Array, wrt: Selection = None) -> optax.GradientTransformation:
    """Return the penalty `strength/2 * sum (theta - theta_0)^2` on leaving the initial weights.

    Args:
        strength: The factor, >= 0; it may be traced.
        wrt: The parameters with a penalty, see `ewc_penalty`.

    Returns:
        A transformation with an `L2InitState`, which `consolidate` leaves as it is.

    Raises:
        ValueError: The strength is negative.

    Source: Kumar, Marklund & Van Roy 2023, arXiv 2308.11958.

    Example:
        >>> tx = l2_init_penalty(0.5)
        >>> state = tx.init({"w": jnp.array([1.0])})
        >>> tx.update({"w": jnp.zeros(1)}, state, {"w": jnp.array([3.0])})[0]["w"].tolist()
        [1.0]
    """
    _check_strength(strength)

    def init(params: Params) -> L2InitState:
        return L2InitState(jax.tree.map(jnp.copy, selected(wrt, params)))

    def update(updates: Params, state: L2InitState, params: Params | None = None) -> Any:
        def add(a: jax.Array, g: jax.Array, p: jax.Array) -> jax.Array:
            return g + strength * (p - a)

        return _changed(updates, add, [state.anchor], [updates, _given(params)]), state

    return optax.GradientTransformation(init, update)


def si(
    inner: optax.GradientTransformation,
    strength: float | jax.Array,
    xi: float = 1e-3,
    clamp: bool = False,
    wrt: Selection = None,
) -> optax.GradientTransformation:
    """Return an optimizer with the penalty of synaptic intelligence, `c sum Omega (theta - theta*)^2`.

    It wraps an optimizer, because the path integral needs the gradient without the penalty and the real step.

    Args:
        inner: The optimizer, with clipping and schedules. The gradient that it gets includes the penalty.
        strength: The factor c, >= 0; it may be traced.
        xi: The damping of the importances, > 0.
        clamp: Keep the importances >= 0, as the official code does.
        wrt: The parameters with a penalty, see `ewc_penalty`. The inner optimizer gets all parameters.

    Returns:
        A transformation with an `SIState`. At the end of a task, call `consolidate(opt_state, params)`.

    Raises:
        ValueError: An argument is out of its range.

    Source: Zenke, Poole & Ganguli 2017, arXiv 1703.04200.

    Example:
        >>> params = {"w": jnp.array([1.0])}
        >>> tx = si(optax.sgd(0.5), strength=1.0, xi=0.5)
        >>> opt_state = tx.init(params)
        >>> updates, opt_state = tx.update({"w": jnp.array([1.0])}, opt_state, params)
        >>> params = optax.apply_updates(params, updates)
        >>> float(consolidate(opt_state, params).importance["w"][0])  # 0.5 / (0.5^2 + 0.5)
        0.6666666865348816
    """
    _check_strength(strength)
    if not xi > 0:
        raise ValueError(f"xi must be > 0, got {xi}")

    def init(params: Params) -> SIState:
        part = selected(wrt, params)
        anchor = jax.tree.map(jnp.copy, part)
        importance, path = (jax.tree.map(empty_sum, part) for _ in range(2))
        return SIState(
            anchor, importance, path, jnp.asarray(xi, float), jnp.asarray(clamp), inner.init(params)
        )

    def update(updates: Params, state: SIState, params: Params | None = None) -> Any:
        def add(w: jax.Array, g: jax.Array, d: jax.Array) -> jax.Array:
            return w - g.astype(w.dtype) * d.astype(w.dtype)

        params = _given(params)
        total = _with_penalty(updates, params, state.anchor, state.importance, 2 * strength)
        step, inner_state = inner.update(total, state.inner, params)
        path = _changed(state.path, add, [state.path], [updates, step])
        return step, state._replace(path=path, inner=inner_state)

    return optax.GradientTransformation(init, update)


def consolidate(opt_state: Any, params: Params, importance: Params | None = None) -> Any:
    """Return the state of an optimizer after the end of a task.

    Args:
        opt_state: The state, with the state of `ewc_penalty`, `mas_penalty` or `si` anywhere in it.
        params: The parameters at the end of the task, as the optimizer gets them; for an `nnx.Optimizer`,
            `nnx.state(model, wrt)`.
        importance: The importances of the task, with the structure of the parameters, for `ewc_penalty` and
            `mas_penalty`; see `diagonal_fisher` and `output_sensitivity`. SI has its own.

    Returns:
        The state, with the same structure.

    Raises:
        ValueError: There is no such state; importances are missing or given to SI alone; or the parameters
            are not those of the state.

    Example:
        >>> params = {"w": jnp.array([1.0, 2.0])}
        >>> tx = optax.MultiSteps(optax.chain(ewc_penalty(1.0), optax.sgd(0.1)), every_k_schedule=2)
        >>> opt_state = consolidate(tx.init(params), params, {"w": jnp.array([0.5, 0.0])})
        >>> opt_state.inner_opt_state[0].importance["w"].tolist()
        [0.5, 0.0]
    """
    states = [s for s in jax.tree.leaves(opt_state, is_leaf=_is_ours) if _is_ours(s)]
    if not states:
        raise ValueError(
            "opt_state has no state of ewc_penalty, mas_penalty or si; build the optimizer with one of them, "
            "for example optax.chain(ewc_penalty(10.0), optax.adam(1e-3))"
        )
    needs = any(isinstance(state, PenaltyState) for state in states)
    if needs != (importance is not None):
        raise ValueError(
            "importance must be given for ewc_penalty and mas_penalty, got None; use diagonal_fisher(...)"
            if needs
            else "importance must be left out for si, which computes its own along the steps"
        )

    def end(state: Any) -> Any:
        if isinstance(state, PenaltyState):
            return _consolidated_penalty(state, params, importance)
        return _consolidated_si(state, params) if isinstance(state, SIState) else state

    return jax.tree.map(end, opt_state, is_leaf=_is_ours)


def diagonal_fisher(
    nll: Loss,
    params: Params,
    batches: Iterable[Any],
    samples: int | None = None,
    wrt: Selection = None,
) -> Params:
    """Return the diagonal of the empirical Fisher information, 1/N sum_n (d nll_n / d theta)^2.

    Args:
        nll: Returns -log p(y | x) of each sample of a batch, `[B]`, in evaluation mode.
        params: The parameters.
        batches: Batches of the task's samples, trees of arrays `[B, ...]`.
        samples: The number N of samples to use, the first ones, >= 1; None for all.
        wrt: The parameters with a penalty, see `ewc_penalty`; the others have an `optax.MaskedNode`.

    Returns:
        A tree with the structure of the parameters, of at least 32 bits.

    Raises:
        ValueError: There are no batches, or N is below 1.

    Source: Kirkpatrick et al. 2017, arXiv 1612.00796.

    Example:
        >>> nll = lambda params, batch: 0.5 * (batch["x"] * params["w"] - batch["y"]) ** 2
        >>> batch = {"x": jnp.array([1.0, 2.0]), "y": jnp.array([0.0, 0.0])}
        >>> diagonal_fisher(nll, {"w": jnp.array(1.0)}, [batch])["w"].item()  # (1 + 16) / 2
        8.5
    """
    return _mean_over_samples(nll, jnp.square, params, batches, samples, wrt)


def output_sensitivity(
    outputs: Callable[[Params, Any], jax.Array],
    params: Params,
    batches: Iterable[Any],
    samples: int | None = None,
    wrt: Selection = None,
) -> Params:
    """Return the importances of MAS, 1/N sum_n |d ||f(x_n)||^2 / d theta|.

    Args:
        outputs: Returns the outputs f of a batch `[B, ...]`, in evaluation mode.
        params: The parameters.
        batches: Batches of the task's samples, trees of arrays `[B, ...]`.
        samples: The number N of samples to use, the first ones, >= 1; None for all.
        wrt: The parameters with a penalty, see `ewc_penalty`; the others have an `optax.MaskedNode`.

    Returns:
        A tree with the structure of the parameters, of at least 32 bits.

    Raises:
        ValueError: There are no batches, or N is below 1.

    Source: Aljundi et al. 2018, arXiv 1711.09601.

    Example:
        >>> outputs = lambda params, x: x * params["w"]
        >>> output_sensitivity(outputs, {"w": jnp.array(3.0)}, [jnp.array([[1.0], [2.0]])])["w"].item()
        15.0
    """
    return _mean_over_samples(_squared_norm(outputs), jnp.abs, params, batches, samples, wrt)


# -- parts


def _check_strength(strength: Any) -> None:
    if isinstance(strength, int | float) and not strength >= 0:
        raise ValueError(f"strength must be >= 0, got {strength}")


def _given(params: Params | None) -> Params:
    if params is None:
        raise ValueError("the penalty needs the parameters; call tx.update(gradient, opt_state, params)")
    return params


def _is_ours(node: Any) -> bool:
    return isinstance(node, PenaltyState | SIState | L2InitState)


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def selected(wrt: Selection, params: Params) -> Params:
    """Return the parameters that `wrt` selects, with an `optax.MaskedNode` in place of each other one.

    Args:
        wrt: A predicate over paths, a tree of bools, an NNX filter, or None for all.
        params: A tree of arrays, or the `nnx.State` that an `nnx.Optimizer` or `nnx.split` gives.

    Raises:
        ValueError: Nothing is selected, or `wrt` is none of these.

    Example:
        >>> selected(lambda path: path[0] == "head", {"stem": 1.0, "head": 2.0})
        {'head': 2.0, 'stem': MaskedNode()}
    """
    if wrt is None:
        return params
    nnx = sys.modules.get("flax.nnx")  # a state of NNX exists only after this slow import
    if nnx is not None and isinstance(params, nnx.State):
        network = SimpleNamespace(leaves=dict(nnx.to_flat_state(params)))
        mask = trained_mask(wrt, nnx.to_pure_dict(params), network, name="wrt")
        mask = jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(mask))
    else:
        mask = trained_mask(wrt, params, None, name="wrt")
    return jax.tree.map(lambda is_selected, p: p if is_selected else optax.MaskedNode(), mask, params)


def _leaves(tree: Params) -> list[Any]:
    """Return the leaves of a tree, of which those that are masked have no array."""
    return jax.tree.leaves(tree, is_leaf=_is_masked)


def _changed(
    tree: Params, function: Callable[..., Any], state_trees: list[Params], others: list[Params]
) -> Params:
    """Return a tree with the leaves that `function` returns; those that are masked in the state stay.

    Leaves are matched by their order, because nnx.Optimizer wraps those of a state.
    """
    rows = zip(*map(_leaves, [tree, *state_trees, *others]), strict=True)
    new = [leaf if _is_masked(row[0]) else function(*row) for leaf, *row in rows]
    return jax.tree.unflatten(jax.tree.structure(tree, is_leaf=_is_masked), new)


def _with_penalty(updates: Params, params: Params, anchor: Params, importance: Params, factor: Any) -> Params:
    def add(a: jax.Array, f: jax.Array, g: jax.Array, p: jax.Array) -> jax.Array:
        return jnp.asarray(g + factor * f * (p - a), g.dtype)

    return _changed(updates, add, [anchor, importance], [updates, params])


def _quadratic_penalty(
    strength: Any, separate: bool, gamma: float, wrt: Selection
) -> optax.GradientTransformation:
    def init(params: Params) -> PenaltyState:
        part = selected(wrt, params)
        anchor, importance = jax.tree.map(jnp.copy, part), jax.tree.map(empty_sum, part)
        return PenaltyState(anchor, importance, jnp.asarray(separate), jnp.asarray(gamma, float))

    def update(updates: Params, state: PenaltyState, params: Params | None = None) -> Any:
        return _with_penalty(updates, _given(params), state.anchor, state.importance, strength), state

    return optax.GradientTransformation(init, update)


def _rows(state_trees: list[Params], others: list[Params]) -> list[tuple[Any, ...]]:
    """Return the leaves of trees of a state, which may be masked, beside those of other trees."""
    columns = [*map(_leaves, state_trees), *map(_leaves, others)]
    shapes = [[getattr(leaf, "shape", None) for leaf in column] for column in columns]
    if any(len(column) != len(columns[0]) for column in columns) or any(
        a != b for other in shapes[1:] for a, b in zip(shapes[0], other, strict=True) if a is not None
    ):
        raise ValueError(
            "params and importance must have the structure of the parameters that the optimizer was "
            "initialised with; for an nnx.Optimizer give nnx.state(model, wrt) with the same wrt, and give "
            "diagonal_fisher the wrt of the penalty"
        )
    return list(zip(*columns, strict=True))


def _mapped(
    function: Callable[..., Any], state_trees: list[Params], others: list[Params]
) -> Iterator[Params]:
    """Yield new trees of a state: `function` returns the new leaves of one row; masked leaves stay."""
    rows = _rows(state_trees, others)
    results = [row[: len(state_trees)] if _is_masked(row[0]) else function(*row) for row in rows]
    for tree, column in zip(state_trees, zip(*results, strict=True), strict=True):
        yield jax.tree.unflatten(jax.tree.structure(tree, is_leaf=_is_masked), column)


def _consolidated_penalty(state: PenaltyState, params: Params, importance: Params) -> PenaltyState:
    separate, gamma = jax.tree.leaves((state.separate, state.gamma))

    def end(a: Any, f: Any, p: Any, new: Any) -> tuple[Any, Any]:
        total = jnp.where(separate, f, gamma.astype(f.dtype) * f) + new
        share = f / jnp.where(total > 0, total, 1)  # the anchor of an unchanged weight is exactly its value
        return jnp.where(separate, p + share * (a - p), p).astype(a.dtype), total.astype(f.dtype)

    anchor, total = _mapped(end, [state.anchor, state.importance], [params, importance])
    return state._replace(anchor=anchor, importance=total)


def _consolidated_si(state: SIState, params: Params) -> SIState:
    xi, clamp = jax.tree.leaves((state.xi, state.clamp))

    def end(a: Any, f: Any, w: Any, p: Any) -> tuple[Any, Any, Any]:
        total = f + w / ((p.astype(f.dtype) - a.astype(f.dtype)) ** 2 + xi.astype(f.dtype))
        return jnp.asarray(p, a.dtype), jnp.where(clamp, jnp.maximum(total, 0), total), jnp.zeros_like(w)

    anchor, importance, path = _mapped(end, [state.anchor, state.importance, state.path], [params])
    return state._replace(anchor=anchor, importance=importance, path=path)


def _squared_norm(outputs: Callable[[Params, Any], jax.Array]) -> Loss:
    return lambda params, batch: jnp.sum(outputs(params, batch) ** 2)


@partial(jax.jit, static_argnames=("function", "contribution"), donate_argnums=0)
def _add_sample(
    total: Params,
    part: Params,
    params: Params,
    batch: Any,
    k: int,
    function: Loss,
    contribution: Callable[[jax.Array], jax.Array],
) -> Params:
    """Add the contribution of sample k of a batch to the sums of the selected parameters."""
    one = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(jnp.asarray(a), k, 1), batch)

    def value(at: Params) -> jax.Array:
        return jnp.sum(function(_changed(params, lambda p: p, [at], []), one))

    gradient = jax.grad(value)(part)
    return jax.tree.map(lambda f, g: f + contribution(g.astype(f.dtype)), total, gradient)


def _mean_over_samples(
    function: Loss,
    contribution: Callable[[jax.Array], jax.Array],
    params: Params,
    batches: Iterable[Any],
    samples: int | None,
    wrt: Selection,
) -> Params:
    """Return 1/N sum_n contribution(d function(x_n) / d theta): separate calls are fastest on a CPU."""
    if samples is not None and samples < 1:
        raise ValueError(f"samples must be >= 1 or None, got {samples}")

    part = selected(wrt, params)
    total, count = jax.tree.map(empty_sum, part), 0
    for batch in batches:
        size = len(jax.tree.leaves(batch)[0])
        for k in range(size if samples is None else min(size, samples - count)):
            total = _add_sample(total, part, params, batch, k, function, contribution)
            count += 1
        if count == samples:
            break
    if not count:
        raise ValueError("batches must hold at least one sample of the task, got none")
    return jax.tree.map(lambda f: f / count, total)
