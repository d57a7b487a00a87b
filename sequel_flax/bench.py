"""Hand-written JAX loops, without Flax or optax, that `sequel bench` compares the learner with."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sequel_core import plan
from sequel_core.hparams import AlgorithmHParams, EWCHParams, OptimizerHParams, TrainingHParams
from sequel_core.learner import FitMonitor
from sequel_core.task import Benchmark
from sequel_flax.backbones import MLP
from sequel_flax.build import make_learner
from sequel_flax.optimizers import build_optimizer

WIDTHS = (256, 256)
RATE = 0.01
SILENT = FitMonitor(on_progress=lambda progress: None, on_evaluate=lambda: None)


def contenders(
    hparams: AlgorithmHParams, benchmark: Benchmark, batch_size: int
) -> dict[str, Callable[[], float]]:
    """Return functions that train on the first task for one epoch and return the seconds, ours first."""
    model = MLP(WIDTHS, benchmark.num_classes)
    learner = make_learner(
        hparams,
        model,
        build_optimizer(OptimizerHParams(lr=RATE)),
        benchmark,
        TrainingHParams(batch_size=batch_size),
    )
    task = benchmark.tasks[0]

    def ours() -> float:
        start = time.perf_counter()
        learner.fit_task(task, SILENT)
        jax.block_until_ready(learner.ts.params)
        return time.perf_counter() - start

    samples = task.train.take(plan.epoch_batches(0, 0, 0, len(task.train), batch_size).reshape(-1))
    x = samples.x.reshape(-1, batch_size, *benchmark.image_shape)
    y = samples.y.astype(np.int32).reshape(-1, batch_size)
    layers = [(jnp.array(w["kernel"]), jnp.array(w["bias"])) for w in _layers(learner.ts.params)]
    penalised = isinstance(hparams, EWCHParams)
    past = [(jnp.copy(a), jnp.ones_like(a)) for layer in layers for a in layer] if penalised else []
    scale, shift = (float(a[0]) for a in (benchmark.normalisation.scale, benchmark.normalisation.shift))

    def loss(layers: Any, past: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        h = x.reshape(x.shape[0], -1).astype(jnp.float32) * scale + shift
        for w, b in layers[:-1]:
            h = jax.nn.relu(h @ w + b[None])
        logits = h @ layers[-1][0] + layers[-1][1][None]
        flat = [a for layer in layers for a in layer]
        penalty = sum(jnp.sum(f * (a - anchor) ** 2) for a, (anchor, f) in zip(flat, past, strict=False))
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1).mean() + 0.5 * penalty

    def step(layers: Any, past: Any, x: jax.Array, y: jax.Array) -> tuple[Any, jax.Array]:
        value, gradient = jax.value_and_grad(loss)(layers, past, x, y)
        return jax.tree.map(lambda w, g: w - RATE * g, layers, gradient), value

    dispatch = jax.jit(step, donate_argnums=0)

    @partial(jax.jit, donate_argnums=0)
    def scan(layers: Any, past: Any, x: jax.Array, y: jax.Array) -> tuple[Any, jax.Array]:
        return jax.lax.scan(lambda layers, batch: step(layers, past, *batch), layers, (x, y))

    def dispatched() -> float:
        weights = jax.tree.map(jnp.copy, layers)
        start = time.perf_counter()
        for k in range(len(x)):
            weights, _ = dispatch(weights, past, x[k], y[k])
        jax.block_until_ready(weights)
        return time.perf_counter() - start

    def scanned() -> float:
        weights = jax.tree.map(jnp.copy, layers)
        start = time.perf_counter()
        jax.block_until_ready(scan(weights, past, x, y))
        return time.perf_counter() - start

    return {"sequel": ours, "JAX step, dispatched": dispatched, "JAX step, scanned": scanned}


def _layers(params: Any) -> list[Any]:
    return [params[name] for name in (*(f"dense_{i}" for i in range(len(WIDTHS))), "head")]
