"""Hand-written JAX loops, without optax or a train state, that `sequel bench` compares the learner with."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sequel_core.algorithms.der import DERHParams
from sequel_core.algorithms.derpp import DERppHParams
from sequel_core.algorithms.kcl import KCLHParams
from sequel_core.algorithms.lamaml import LaMAMLHParams
from sequel_core.backbones import BACKBONES as SETTINGS
from sequel_core.hparams import AlgorithmHParams, MemoryHParams, OptimizerHParams, TrainingHParams
from sequel_core.runs.learner import FitMonitor
from sequel_core.runs.orchestrator import training_numbers
from sequel_core.stream import plan
from sequel_core.stream.benchmark import Benchmark
from sequel_flax.backbones import BACKBONES, MLP
from sequel_flax.build import make_learner, use_one_thread
from sequel_flax.bundle import batch_stats
from sequel_flax.learner import FlaxLearner
from sequel_flax.optimizers import build_optimizer
from sequel_flax.writers import WRITERS, MetricWriter

WIDTHS = (256, 256)
RATE = 0.01
SILENT = FitMonitor(on_progress=lambda progress: None, on_evaluate=lambda: None)

Step = Callable[[Any, Any, jax.Array, jax.Array], tuple[Any, Any, jax.Array]]
"""layers, what the method keeps, images, labels -> layers, what it keeps, loss."""


def network(benchmark: Benchmark, backbone: str) -> Any:
    """Return the network that is measured."""
    use_one_thread()
    if backbone == "mlp":
        return MLP(WIDTHS, benchmark.num_classes)
    return BACKBONES[backbone](**vars(SETTINGS[backbone]()), num_classes=benchmark.num_classes)


def ours(
    hparams: AlgorithmHParams,
    model: Any,
    benchmark: Benchmark,
    batch_size: int,
    loggers: Sequence[MetricWriter] = (),
) -> tuple[FlaxLearner, Callable[[], float]]:
    """Return a learner, and what trains it on the second task for one epoch and returns the seconds.

    Args:
        hparams: of the algorithm.
        model: the network.
        benchmark: of two tasks.
        batch_size: of training.
        loggers: that get all that a run logs while it trains.
    """
    first, task = benchmark.tasks
    training, optimizer = TrainingHParams(batch_size=batch_size), build_optimizer(OptimizerHParams(lr=RATE))
    learner = make_learner(hparams, model, optimizer, benchmark, training, loggers=loggers)
    monitor = SILENT
    if loggers:
        learner.start_stream(learner.describe())
        monitor = SILENT._replace(on_progress=lambda told: learner.log(training_numbers(told, told.step)))
    learner.fit_task(first, monitor)
    learner.algorithm = learner.algorithm._replace(end_task=lambda ts, state, batches: (ts, state))

    def fit() -> float:
        start = time.perf_counter()
        learner.fit_task(task, monitor)
        jax.block_until_ready(learner.ts.params)
        return time.perf_counter() - start

    return learner, fit


def logging_contenders(
    hparams: AlgorithmHParams,
    benchmark: Benchmark,
    batch_size: int,
    backbone: str,
    names: Sequence[str],
    directory: Path,
) -> dict[str, Callable[[], float]]:
    """Return the learner with some loggers, which write into a directory, and without."""
    model = network(benchmark, backbone)
    loggers = [WRITERS[name](directory, {}) for name in names]
    return {
        "sequel, logging": ours(hparams, model, benchmark, batch_size, loggers)[1],
        "sequel, no logger": ours(hparams, model, benchmark, batch_size)[1],
    }


def contenders(
    hparams: AlgorithmHParams, benchmark: Benchmark, batch_size: int, backbone: str = "mlp"
) -> dict[str, Callable[[], float]]:
    """Return functions that train on the second task for one epoch and return the seconds, ours first."""
    _, task = benchmark.tasks
    model = network(benchmark, backbone)
    learner, fit = ours(hparams, model, benchmark, batch_size)
    samples = task.train.take(plan.epoch_batches(0, 0, 0, len(task.train), batch_size).reshape(-1))
    x = samples.x.reshape(-1, batch_size, *benchmark.image_shape)
    y = samples.y.astype(np.int32).reshape(-1, batch_size)
    scale, shift = benchmark.normalisation.scale, benchmark.normalisation.shift
    stored = samples if task.coreset is None else task.coreset.take(np.arange(len(task.coreset)))
    if backbone == "mlp":
        layers = jax.tree.map(jnp.copy, _layers(learner.ts.params))
        pixels = float(scale[0]), float(shift[0])
        step, kept = hand_written(hparams, layers, stored.x, stored.y, batch_size, *pixels)
    else:
        layers = jax.tree.map(jnp.copy, (learner.ts.params, batch_stats(learner.ts)))
        step, kept = of_module(hparams, model, layers, stored.x, stored.y, scale, shift)

    dispatch = jax.jit(step, donate_argnums=(0, 1))

    @partial(jax.jit, donate_argnums=(0, 1))
    def scan(layers: Any, kept: Any, x: jax.Array, y: jax.Array) -> tuple[Any, jax.Array]:
        def body(carry: Any, batch: Any) -> tuple[Any, jax.Array]:
            layers, kept, loss = step(*carry, *batch)
            return (layers, kept), loss

        return jax.lax.scan(body, (layers, kept), (x, y))

    def dispatched() -> float:
        carry = jax.tree.map(jnp.copy, (layers, kept))
        start = time.perf_counter()
        for k in range(len(x)):
            *carry, _ = dispatch(*carry, x[k], y[k])
        jax.block_until_ready(carry)
        return time.perf_counter() - start

    def scanned() -> float:
        carry = jax.tree.map(jnp.copy, (layers, kept))
        start = time.perf_counter()
        jax.block_until_ready(scan(*carry, x, y))
        return time.perf_counter() - start

    found: dict[str, Callable[[], float]] = {"sequel": fit, "JAX step, dispatched": dispatched}
    return {**found, "JAX step, scanned": scanned} if backbone == "mlp" else found


def mean_cross_entropy(logits: jax.Array, y: jax.Array) -> jax.Array:
    """Return the mean cross-entropy, shape ()."""
    loss: jax.Array = -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1).mean()
    return loss


def descend(layers: Any, gradient: Any) -> Any:
    """Take a step of SGD."""
    return jax.tree.map(lambda w, g: w - RATE * g, layers, gradient)


def anchored(layers: Any) -> Any:
    """Return what a regulariser keeps."""
    return {"anchor": layers, "ones": jax.tree.map(jnp.ones_like, layers)}


def distance(layers: Any, kept: Any) -> jax.Array:
    """Return a regulariser's penalty, shape ()."""
    terms = jax.tree.map(lambda w, a, f: jnp.sum(f * (w - a) ** 2), layers, kept["anchor"], kept["ones"])
    return 0.5 * jnp.sum(jnp.stack(jax.tree.leaves(terms)))


def filled_memory(images: np.ndarray, labels: np.ndarray, size: int, classes: int) -> Any:
    """Return a memory of the first samples."""
    return {
        "x": jnp.asarray(images[:size]),
        "y": jnp.asarray(labels[:size], jnp.int32),
        "logits": jnp.zeros((size, classes)),
        "seen": jnp.asarray(size),
        "key": jax.random.PRNGKey(0),
    }


def draw(memory: Any, salt: int, count: int) -> Any:
    """Return images, labels and logits from the memory."""
    key = jax.random.fold_in(jax.random.fold_in(memory["key"], memory["seen"]), salt)
    slots = jax.random.randint(key, (count,), 0, len(memory["y"]))
    return memory["x"][slots], memory["y"][slots], memory["logits"][slots]


def keep(memory: Any, x: jax.Array, y: jax.Array, logits: jax.Array | None = None) -> Any:
    """Write a batch to the reservoir."""
    count = memory["seen"] + jnp.arange(len(y))
    u = jax.random.uniform(jax.random.fold_in(memory["key"], memory["seen"]), (len(y),))
    slots = (u * (count + 1)).astype(jnp.int32)
    new = {"x": x, "y": y} if logits is None else {"x": x, "y": y, "logits": logits}
    written = {k: memory[k].at[slots].set(a, mode="drop") for k, a in new.items()}
    return {**memory, **written, "seen": memory["seen"] + len(y)}


def of_module(
    hparams: AlgorithmHParams,
    model: Any,
    layers: Any,
    images: np.ndarray,
    labels: np.ndarray,
    scale: np.ndarray,
    shift: np.ndarray,
) -> tuple[Step, Any]:
    """Return the step for a linen module, and what it keeps at first; see `hand_written`.

    The step's layers are the parameters and the running statistics, `{}` where there are none.
    """
    factor, offset = (jnp.asarray(a, jnp.float32).reshape(1, 1, 1, -1) for a in (scale, shift))
    pulled, replays = hparams.name in ("ewc", "mas"), isinstance(hparams, MemoryHParams)

    def step(layers: Any, kept: Any, x: jax.Array, y: jax.Array) -> Any:
        params, stats = layers
        seen = x, y
        if replays:
            old = draw(kept, 1, len(y))
            seen = jnp.concatenate([x, old[0]]), jnp.concatenate([y, old[1]])

        def loss_fn(params: Any) -> tuple[jax.Array, Any]:
            variables = {"params": params, "batch_stats": stats}
            pixels = seen[0].astype(jnp.float32) * factor + offset
            logits, after = model.apply(variables, pixels, train=True, mutable=["batch_stats"])
            loss = mean_cross_entropy(logits, seen[1])
            return loss + distance(params, kept) if pulled else loss, after.get("batch_stats", {})

        (loss, stats), gradient = jax.value_and_grad(loss_fn, has_aux=True)(params)
        return (descend(params, gradient), stats), keep(kept, x, y) if replays else kept, loss

    if isinstance(hparams, MemoryHParams):
        return step, filled_memory(images, labels, hparams.mem_size, model.num_classes)
    return step, anchored(layers[0]) if pulled else ()


def hand_written(
    hparams: AlgorithmHParams,
    layers: Any,
    images: np.ndarray,
    labels: np.ndarray,
    batch_size: int,
    scale: float,
    shift: float,
) -> tuple[Step, Any]:
    """Return the step of the same method as one would write it alone, and what it keeps at first.

    Past tasks are stood in for by ones (importances), the present weights (anchors), half the classes and the
    first samples (memories, drawn from with JAX's own generator, with replacement; for KCL the coreset).
    """

    def hidden(layers: Any, x: jax.Array) -> jax.Array:
        h = x.reshape(x.shape[0], -1).astype(jnp.float32) * scale + shift
        for w, b in layers[:-1]:
            h = jax.nn.relu(h @ w + b[None])
        return h

    def network(layers: Any, x: jax.Array) -> jax.Array:
        logits: jax.Array = hidden(layers, x) @ layers[-1][0] + layers[-1][1][None]
        return logits

    def plain(layers: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return mean_cross_entropy(network(layers, x), y)

    def sgd(loss_of: Callable[..., jax.Array]) -> Step:
        def step(layers: Any, kept: Any, x: jax.Array, y: jax.Array) -> Any:
            loss, gradient = jax.value_and_grad(loss_of)(layers, kept, x, y)
            return descend(layers, gradient), kept, loss

        return step

    name = hparams.name
    if name in ("naive", "joint", "stable_sgd"):
        return sgd(lambda w, kept, x, y: plain(w, x, y)), ()
    if name in ("ewc", "mas"):
        return sgd(lambda w, kept, x, y: plain(w, x, y) + distance(w, kept)), anchored(layers)
    if name == "si":

        def si(layers: Any, kept: Any, x: jax.Array, y: jax.Array) -> Any:
            loss, gradient = jax.value_and_grad(plain)(layers, x, y)
            pull = jax.grad(distance)(layers, kept)
            after = descend(layers, jax.tree.map(jnp.add, gradient, pull))
            path = jax.tree.map(lambda p, g, a, b: p - g * (a - b), kept["path"], gradient, after, layers)
            return after, {**kept, "path": path}, loss

        return si, {**anchored(layers), "path": jax.tree.map(jnp.zeros_like, layers)}
    if name == "lfl":

        def lfl(layers: Any, kept: Any, x: jax.Array, y: jax.Array) -> Any:
            old = hidden(kept, x)

            def loss_fn(layers: Any) -> jax.Array:
                h = hidden(layers, x)
                pull = 0.0005 * jnp.mean(jnp.sum((h - old) ** 2, 1))
                return mean_cross_entropy(h @ layers[-1][0] + layers[-1][1][None], y) + pull

            loss, gradient = jax.value_and_grad(loss_fn)(layers)
            return [*descend(layers[:-1], gradient[:-1]), layers[-1]], kept, loss

        return lfl, layers

    if name == "icarl":

        def binary(layers: Any, kept: Any, x: jax.Array, y: jax.Array) -> jax.Array:
            logits, old = network(layers, x), jax.nn.sigmoid(network(kept, x))
            past = jnp.arange(old.shape[1]) < old.shape[1] // 2
            target = jnp.where(past[None], old, jax.nn.one_hot(y, old.shape[1]))
            return jnp.mean(jax.nn.softplus(logits) - logits * target)

        return sgd(binary), layers
    if isinstance(hparams, KCLHParams):
        d, (width, classes) = hparams.d_rn_f, layers[0][-1][0].shape
        phase = jax.random.uniform(jax.random.PRNGKey(1), (1, d), maxval=2 * jnp.pi)

        def infer(net: Any, h: jax.Array) -> Any:
            for w, b in net[:-1]:
                h = jax.nn.elu(h @ w + b)
            return jnp.split(h @ net[-1][0] + net[-1][1], 2)

        def variational(layers: Any, kept: Any, x: jax.Array, y: jax.Array) -> jax.Array:
            net, own = layers
            h, core = (hidden(net, a) for a in (x, kept["x"]))
            h, core = (a / jnp.linalg.norm(a, axis=1, keepdims=True) for a in (h, core))
            (m, v), (m0, v0) = infer(own["posterior"], core.mean(0)), infer(own["prior"], h.mean(0))
            bases = m[None] + jnp.exp(v / 2)[None] * jax.random.normal(kept["key"], (d, width))
            psi, psi_core = ((2 / d) ** 0.5 * jnp.cos(a @ bases.T + phase) for a in (h, core))
            matrix = psi_core @ psi_core.T + (jnp.abs(own["lmd"][1]) + 0.01) * jnp.eye(len(core))
            found = jax.scipy.linalg.solve(matrix, jax.nn.one_hot(kept["y"], classes), assume_a="pos")
            logits = own["gain"][1] * (psi @ psi_core.T @ found) + own["offset"][1]
            divergence = 0.5 * jnp.sum(v0 - v + (jnp.exp(v) + (m - m0) ** 2) / jnp.exp(v0) - 1)
            return mean_cross_entropy(logits, y) + hparams.tau * divergence

        def kcl(layers: Any, kept: Any, x: jax.Array, y: jax.Array) -> Any:
            layers, kept, loss = sgd(variational)(layers, kept, x, y)
            return layers, {**kept, "key": jax.random.split(kept["key"])[0]}, loss

        core = {"x": jnp.asarray(images), "y": jnp.asarray(labels, jnp.int32)}
        return kcl, {**core, "key": jax.random.PRNGKey(0)}

    memory = filled_memory(images, labels, vars(hparams)["mem_size"], layers[-1][1].size)

    def er(layers: Any, kept: Any, x: jax.Array, y: jax.Array) -> Any:
        old_x, old_y, _ = draw(kept, 1, batch_size)
        both = jnp.concatenate([x, old_x]), jnp.concatenate([y, old_y])
        loss, gradient = jax.value_and_grad(plain)(layers, *both)
        return descend(layers, gradient), keep(kept, x, y), loss

    def der(layers: Any, kept: Any, x: jax.Array, y: jax.Array) -> Any:
        old_x, _, old_logits = draw(kept, 1, batch_size)

        def loss_fn(layers: Any) -> tuple[jax.Array, jax.Array]:
            logits = network(layers, x)
            pull = jnp.mean(jnp.sum((network(layers, old_x) - old_logits) ** 2, 1))
            loss = mean_cross_entropy(logits, y) + vars(hparams)["alpha"] * pull
            if isinstance(hparams, DERppHParams):
                more_x, more_y, _ = draw(kept, 2, batch_size)
                loss = loss + hparams.beta * plain(layers, more_x, more_y)
            return loss, logits

        (loss, logits), gradient = jax.value_and_grad(loss_fn, has_aux=True)(layers)
        return descend(layers, gradient), keep(kept, x, y, logits), loss

    def agem(layers: Any, kept: Any, x: jax.Array, y: jax.Array) -> Any:
        loss, gradient = jax.value_and_grad(plain)(layers, x, y)
        reference = jax.grad(plain)(layers, *draw(kept, 1, batch_size)[:2])
        along, norm = (
            sum(jax.tree.leaves(jax.tree.map(jnp.vdot, a, reference))) for a in (gradient, reference)
        )
        factor = jnp.where(along < 0, along / norm, 0.0)
        gradient = jax.tree.map(lambda g, r: g - factor * r, gradient, reference)
        return descend(layers, gradient), keep(kept, x, y), loss

    def mcsgd(layers: Any, kept: Any, x: jax.Array, y: jax.Array) -> Any:
        layers, kept, loss = sgd(lambda w, kept, x, y: plain(w, x, y))(layers, kept, x, y)
        return layers, keep(kept, x, y), loss

    if isinstance(hparams, LaMAMLHParams):
        parts = hparams.n_inner_updates or batch_size

        def follow(layers: Any, rates: Any, gradient: Any) -> Any:
            return jax.tree.map(lambda w, a, g: w - jax.nn.relu(a) * g, layers, rates, gradient)

        def mean(gradient: Any) -> Any:
            found = jax.tree.map(lambda g: g / parts, gradient)
            norm = jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(found)))
            factor = jnp.minimum(1, (hparams.grad_clip_norm or jnp.inf) / (norm + 1e-6))
            return jax.tree.map(lambda g: factor * g, found)

        def glance(layers: Any, rates: Any, own: Any, both: Any) -> Any:
            def inner(carry: Any, part: Any) -> Any:
                fast, total, slope, rates_slope = carry
                gradient = jax.grad(plain)(fast, *part)
                fast, total = follow(fast, rates, gradient), jax.tree.map(jnp.add, total, gradient)
                loss, after = jax.value_and_grad(plain)(fast, *both)
                rates_slope = jax.tree.map(lambda s, g, t: s - g * t, rates_slope, after, total)
                return (fast, total, jax.tree.map(jnp.add, slope, after), rates_slope), loss

            zero = jax.tree.map(jnp.zeros_like, layers)
            cut = tuple(a.reshape(parts, -1, *a.shape[1:]) for a in own)
            (_, _, slope, rates_slope), losses = jax.lax.scan(
                inner, (layers, zero, zero, zero), cut, unroll=True
            )
            rates_slope = mean(jax.tree.map(lambda g, a: g * (a > 0), rates_slope, rates))
            rates = jax.tree.map(lambda a, g: a - hparams.lr_alpha * g, rates, rates_slope)
            return follow(layers, rates, mean(slope)), rates, losses.mean()

        def lamaml(layers: Any, kept: Any, x: jax.Array, y: jax.Array) -> Any:
            (memory, rates), losses = kept, []
            for k in range(hparams.glances):
                old = draw(memory, k, batch_size)
                order = jax.random.permutation(jax.random.fold_in(memory["key"], k), batch_size)
                both = tuple(jnp.concatenate(pair) for pair in zip((x, y), old[:2], strict=True))
                layers, rates, loss = glance(layers, rates, (x[order], y[order]), both)
                memory = memory if k else keep(memory, x, y)
                losses.append(loss)
            return layers, (memory, rates), losses[0]

        return lamaml, (memory, jax.tree.map(lambda w: jnp.full_like(w, hparams.alpha_init), layers))
    if isinstance(hparams, DERHParams):
        return der, memory
    return {"er": er, "agem": agem, "mcsgd": mcsgd}[name], memory


def _layers(params: Any) -> Any:
    """Return kernels and biases; for KCL these and, by name, its own parameters."""
    names = (*(f"dense_{i}" for i in range(len(WIDTHS))), "head")
    layers = [(params[name]["kernel"], params[name]["bias"]) for name in names]
    own = params.get("kcl", {})
    return (layers, {k: _layers(w) if isinstance(w, dict) else w for k, w in own.items()}) if own else layers
