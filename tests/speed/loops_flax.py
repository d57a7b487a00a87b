"""Hand-written JAX loops, without optax or a train state: what one would write for a single method.

Each takes what the past tasks would have left from the start of the task:
- importances are ones, and anchors the present weights;
- half of the classes are old ones;
- a memory holds the first samples, and is read at random, with replacement.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from threadpoolctl import threadpool_limits

from sequel_core.backbones import BACKBONES as BACKBONE_HPARAMS
from sequel_core.stream.benchmark import Benchmark
from sequel_core.stream.images import Normalisation
from sequel_core.stream.task import Samples
from sequel_flax.backbones import BACKBONES, MLP
from sequel_flax.build import make_learner
from sequel_flax.bundle import collections
from sequel_flax.learner import FlaxLearner
from sequel_flax.optimizers import build_optimizer
from sequel_flax.writers import WRITERS as LOGGERS
from tests.speed.bench import RATE, WIDTHS, Contenders

__all__ = ["LOGGERS", "LOOPS", "build_optimizer", "make_learner"]

Loss = Callable[[Any, Any, Any, Any], tuple[jax.Array, Any]]
"""params, kept, x, y -> the loss, kept after the step."""

Step = Callable[[Any, Any, Any, Any], tuple[Any, Any, jax.Array]]
"""params, kept, x, y -> params and kept after the step, the loss.

`kept` is all else that a step changes or needs.
"""


def make_network(benchmark: Benchmark, backbone: str) -> Any:
    """Return the network that is measured."""
    threadpool_limits(1, "blas")  # as in a run
    if backbone == "mlp":
        return MLP(WIDTHS, benchmark.num_classes)
    return BACKBONES[backbone](**BACKBONE_HPARAMS[backbone]().arguments(), num_classes=benchmark.num_classes)


def skip_end_task(learner: FlaxLearner) -> None:
    """Let the tasks that follow end without the work of the algorithm."""
    learner.algorithm = learner.algorithm._replace(end_task=lambda ts, state, batches: (ts, state))


def wait_for(learner: FlaxLearner) -> None:
    """Wait until all steps are computed."""
    jax.block_until_ready(learner.ts.params)


def contenders(
    learner: FlaxLearner, benchmark: Benchmark, samples: Samples, stored: Samples, scans: bool
) -> Contenders:
    """Return the step of the learner's method, dispatched one by one and, with `scans`, in one `lax.scan`."""
    batch_size = learner.training.batch_size
    x = samples.x.reshape(-1, batch_size, *benchmark.image_shape)
    y = samples.y.astype(np.int32).reshape(-1, batch_size)
    step, *start = hand_written(learner, benchmark.normalisation, stored)
    start = jax.tree.map(jnp.copy, start)
    dispatch = jax.jit(step, donate_argnums=(0, 1))

    @partial(jax.jit, donate_argnums=0)
    def scan(carry: Any, batches: Any) -> tuple[Any, jax.Array]:
        def body(carry: Any, batch: Any) -> tuple[Any, jax.Array]:
            *carry, loss = step(*carry, *batch)
            return carry, loss

        return jax.lax.scan(body, carry, batches)

    def dispatched() -> float:
        carry = jax.tree.map(jnp.copy, start)
        begin = time.perf_counter()
        for batch in zip(x, y, strict=True):
            *carry, _ = dispatch(*carry, *batch)
        jax.block_until_ready(carry)
        return time.perf_counter() - begin

    def scanned() -> float:
        carry = jax.tree.map(jnp.copy, start)
        begin = time.perf_counter()
        jax.block_until_ready(scan(carry, (x, y)))
        return time.perf_counter() - begin

    return {"JAX step, dispatched": dispatched} | ({"JAX step, scanned": scanned} if scans else {})


def evaluation(
    learner: FlaxLearner, benchmark: Benchmark, samples: Samples, size: int
) -> Callable[[], float]:
    """Return a function that computes the accuracy on samples, whose number is a multiple of `size`."""
    pixels = Network(learner.model, benchmark.normalisation).pixels
    x = samples.x.reshape(-1, size, *benchmark.image_shape)
    y = samples.y.astype(np.int32).reshape(-1, size)

    @jax.jit
    def count(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        logits: jax.Array = learner.model.apply({"params": params}, pixels(x))
        return (logits.argmax(1) == y).sum()

    def accuracy() -> float:
        counts = [count(learner.ts.params, *batch) for batch in zip(x, y, strict=True)]
        return float(sum(map(int, counts))) / len(samples.y)

    return accuracy


def hand_written(
    learner: FlaxLearner, normalisation: Normalisation, stored: Samples
) -> tuple[Step, Any, Any]:
    """Return the step of the learner's method, the parameters and what is kept at first."""
    network = Network(learner.model, normalisation)
    step, kept = LOOPS[learner.hparams.name](network, learner.ts.params, vars(learner.hparams), stored)
    return step, learner.ts.params, {"stats": collections(learner.ts).get("batch_stats", {}), **kept}


class Network:
    """A linen module, applied to images of unsigned bytes."""

    def __init__(self, model: Any, normalisation: Normalisation) -> None:
        self.model = model
        self.scale, self.shift = (
            jnp.asarray(a, jnp.float32)[None, None, None] for a in (normalisation.scale, normalisation.shift)
        )

    def pixels(self, x: jax.Array) -> jax.Array:
        """Return normalised images."""
        return x.astype(jnp.float32) * self.scale + self.shift

    def __call__(self, params: Any, x: jax.Array) -> jax.Array:
        """Return the logits."""
        logits: jax.Array = self.model.apply({"params": params}, self.pixels(x))
        return logits

    def features(self, params: Any, x: jax.Array) -> jax.Array:
        """Return the last hidden layer."""
        h: jax.Array = self.model.apply({"params": params}, self.pixels(x), method="features")
        return h

    def train(self, params: Any, kept: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        """Return the logits, and `kept` with the running statistics after the batch."""
        variables = {"params": params, "batch_stats": kept["stats"]}
        logits, after = self.model.apply(variables, self.pixels(x), train=True, mutable=["batch_stats"])
        return logits, {**kept, "stats": after.get("batch_stats", {})}

    def loss(self, params: Any, kept: Any, x: jax.Array, y: jax.Array) -> tuple[jax.Array, Any]:
        """Return the mean cross-entropy, and `kept` after the batch."""
        logits, kept = self.train(params, kept, x)
        return cross_entropy(logits, y), kept


def cross_entropy(logits: jax.Array, y: jax.Array) -> jax.Array:
    """Return the mean cross-entropy, shape ()."""
    loss: jax.Array = -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1).mean()
    return loss


def descend(params: Any, gradient: Any) -> Any:
    """Return the parameters after a step of SGD."""
    return jax.tree.map(lambda p, g: p - RATE * g, params, gradient)


def sgd(loss_fn: Loss) -> Step:
    """Return the step that follows the gradient of a loss."""

    def step(params: Any, kept: Any, x: jax.Array, y: jax.Array) -> Any:
        (loss, kept), gradient = jax.value_and_grad(loss_fn, has_aux=True)(params, kept, x, y)
        return descend(params, gradient), kept, loss

    return step


def naive(network: Network, params: Any, hparams: Any, stored: Samples) -> tuple[Step, Any]:
    return sgd(network.loss), {}


# Regularisers.


def ones_at(params: Any) -> Any:
    """Return a regulariser's importances and anchor."""
    return {"importance": jax.tree.map(jnp.ones_like, params), "anchor": params}


def penalty(params: Any, kept: Any) -> jax.Array:
    """Return 1/2 * sum_i F_i (theta_i - theta*_i)^2, shape ()."""
    terms = jax.tree.map(
        lambda p, f, a: jnp.sum(f * (p - a) ** 2), params, kept["importance"], kept["anchor"]
    )
    return 0.5 * jnp.sum(jnp.stack(jax.tree.leaves(terms)))


def ewc(network: Network, params: Any, hparams: Any, stored: Samples) -> tuple[Step, Any]:
    def loss_fn(params: Any, kept: Any, x: jax.Array, y: jax.Array) -> tuple[jax.Array, Any]:
        loss, after = network.loss(params, kept, x, y)
        return loss + penalty(params, kept), after

    return sgd(loss_fn), ones_at(params)


def si(network: Network, params: Any, hparams: Any, stored: Samples) -> tuple[Step, Any]:
    def step(params: Any, kept: Any, x: jax.Array, y: jax.Array) -> Any:
        (loss, kept), gradient = jax.value_and_grad(network.loss, has_aux=True)(params, kept, x, y)
        after = descend(params, jax.tree.map(jnp.add, gradient, jax.grad(penalty)(params, kept)))
        path = jax.tree.map(lambda w, g, p, q: w - g * (q - p), kept["path"], gradient, params, after)
        return after, {**kept, "path": path}, loss

    return step, {**ones_at(params), "path": jax.tree.map(jnp.zeros_like, params)}


def lfl(network: Network, params: Any, hparams: Any, stored: Samples) -> tuple[Step, Any]:
    def loss_fn(params: Any, kept: Any, x: jax.Array, y: jax.Array) -> tuple[jax.Array, Any]:
        h = network.features(params, x)
        head = jax.lax.stop_gradient(params["head"])
        distance = jnp.mean(jnp.sum((h - network.features(kept["old"], x)) ** 2, 1))
        loss = cross_entropy(h @ head["kernel"] + head["bias"][None], y)
        return loss + hparams["lfl_lambda"] / 2 * distance, kept

    return sgd(loss_fn), {"old": params}


def lwf(network: Network, params: Any, hparams: Any, stored: Samples) -> tuple[Step, Any]:
    def loss_fn(params: Any, kept: Any, x: jax.Array, y: jax.Array) -> tuple[jax.Array, Any]:
        logits, temperature = network(params, x), hparams["temperature"]
        q = jax.nn.softmax(network(kept["old"], x) / temperature)
        distillation = -jnp.mean(jnp.sum(q * jax.nn.log_softmax(logits / temperature), 1))
        return cross_entropy(logits, y) + hparams["lwf_lambda"] * distillation, kept

    return sgd(loss_fn), {"old": params}


# Methods that keep samples.


def memory(params: Any, hparams: Any, stored: Samples) -> Any:
    """Return a memory of the first samples."""
    size = hparams["mem_size"]
    return {
        "x": jnp.asarray(stored.x[:size]),
        "y": jnp.asarray(stored.y[:size], jnp.int32),
        "logits": jnp.zeros((size, params["head"]["bias"].size)),
        "seen": jnp.asarray(size),
        "key": jax.random.PRNGKey(0),
    }


def read(kept: Any, draw: int, count: int) -> Any:
    """Return images, labels and logits from the memory."""
    key = jax.random.fold_in(jax.random.fold_in(kept["key"], kept["seen"]), draw)
    slots = jax.random.randint(key, (count,), 0, len(kept["y"]))
    return kept["x"][slots], kept["y"][slots], kept["logits"][slots]


def write(kept: Any, **batch: jax.Array) -> Any:
    """Return the memory after reservoir sampling of a batch."""
    n = len(batch["y"])
    u = jax.random.uniform(jax.random.fold_in(kept["key"], kept["seen"]), (n,))
    slots = (u * (kept["seen"] + 1 + jnp.arange(n))).astype(jnp.int32)
    written = {name: kept[name].at[slots].set(a, mode="drop") for name, a in batch.items()}
    return {**kept, **written, "seen": kept["seen"] + n}


def er(network: Network, params: Any, hparams: Any, stored: Samples) -> tuple[Step, Any]:
    def loss_fn(params: Any, kept: Any, x: jax.Array, y: jax.Array) -> tuple[jax.Array, Any]:
        old_x, old_y, _ = read(kept, 1, len(y))
        both = jnp.concatenate([x, old_x]), jnp.concatenate([y, old_y])
        loss, after = network.loss(params, kept, *both)
        return loss, write(after, x=x, y=y)

    return sgd(loss_fn), memory(params, hparams, stored)


def er_ace(network: Network, params: Any, hparams: Any, stored: Samples) -> tuple[Step, Any]:
    def loss_fn(params: Any, kept: Any, x: jax.Array, y: jax.Array) -> tuple[jax.Array, Any]:
        logits = network(params, x)
        present = jax.nn.one_hot(y, logits.shape[1], dtype=bool).any(0)
        old_x, old_y, _ = read(kept, 1, len(y))
        loss = cross_entropy(jnp.where(present[None], logits, -1e9), y)
        return loss + cross_entropy(network(params, old_x), old_y), write(kept, x=x, y=y)

    return sgd(loss_fn), memory(params, hparams, stored)


def mir(network: Network, params: Any, hparams: Any, stored: Samples) -> tuple[Step, Any]:
    def losses(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return -jnp.take_along_axis(jax.nn.log_softmax(network(params, x)), y[:, None], 1)[:, 0]

    def loss_fn(params: Any, kept: Any, x: jax.Array, y: jax.Array) -> tuple[jax.Array, Any]:
        old_x, old_y, _ = read(kept, 1, hparams["num_candidates"])
        now = jax.lax.stop_gradient(params)
        virtual = descend(now, jax.grad(lambda p: losses(p, x, y).mean())(now))
        scores = losses(virtual, old_x, old_y) - losses(now, old_x, old_y)
        best = jax.lax.top_k(scores, hparams["mem_batch_size"])[1]
        both = jnp.concatenate([x, old_x[best]]), jnp.concatenate([y, old_y[best]])
        loss, after = network.loss(params, kept, *both)
        return loss, write(after, x=x, y=y)

    return sgd(loss_fn), memory(params, hparams, stored)


def der(network: Network, params: Any, hparams: Any, stored: Samples) -> tuple[Step, Any]:
    def loss_fn(params: Any, kept: Any, x: jax.Array, y: jax.Array) -> tuple[jax.Array, Any]:
        old_x, _, old_logits = read(kept, 1, len(y))
        logits = network(params, x)
        distance = jnp.mean(jnp.sum((network(params, old_x) - old_logits) ** 2, 1))
        loss = cross_entropy(logits, y) + hparams["alpha"] * distance
        if "beta" in hparams:  # DER++
            old_x, old_y, _ = read(kept, 2, len(y))
            loss = loss + hparams["beta"] * cross_entropy(network(params, old_x), old_y)
        return loss, write(kept, x=x, y=y, logits=logits)

    return sgd(loss_fn), memory(params, hparams, stored)


def agem(network: Network, params: Any, hparams: Any, stored: Samples) -> tuple[Step, Any]:
    def step(params: Any, kept: Any, x: jax.Array, y: jax.Array) -> Any:
        (loss, _), gradient = jax.value_and_grad(network.loss, has_aux=True)(params, kept, x, y)
        old_x, old_y, _ = read(kept, 1, len(y))
        reference, _ = jax.grad(network.loss, has_aux=True)(params, kept, old_x, old_y)
        along, square = (
            sum(jax.tree.leaves(jax.tree.map(jnp.vdot, a, reference))) for a in (gradient, reference)
        )
        factor = jnp.where(along < 0, along / square, 0.0)
        gradient = jax.tree.map(lambda g, r: g - factor * r, gradient, reference)
        return descend(params, gradient), write(kept, x=x, y=y), loss

    return step, memory(params, hparams, stored)


def mcsgd(network: Network, params: Any, hparams: Any, stored: Samples) -> tuple[Step, Any]:
    def loss_fn(params: Any, kept: Any, x: jax.Array, y: jax.Array) -> tuple[jax.Array, Any]:
        loss, kept = network.loss(params, kept, x, y)
        return loss, write(kept, x=x, y=y)

    return sgd(loss_fn), memory(params, hparams, stored)


def gdumb(network: Network, params: Any, hparams: Any, stored: Samples) -> tuple[Step, Any]:
    def step(params: Any, kept: Any, x: jax.Array, y: jax.Array) -> tuple[Any, Any, jax.Array]:
        return params, write(kept, x=x, y=y), cross_entropy(network(params, x), y)

    return step, memory(params, hparams, stored)


def bic(network: Network, params: Any, hparams: Any, stored: Samples) -> tuple[Step, Any]:
    def loss_fn(params: Any, kept: Any, x: jax.Array, y: jax.Array) -> tuple[jax.Array, Any]:
        logits, old = network(params, x), network(kept["old"], x)
        half, temperature = old.shape[1] // 2, hparams["temperature"]
        target = jax.nn.softmax(old[:, :half] / temperature, axis=1)
        distance = -(target * jax.nn.log_softmax(logits[:, :half] / temperature, axis=1)).sum(1).mean()
        return 0.5 * distance + 0.5 * cross_entropy(logits, y), kept

    return sgd(loss_fn), {"old": params}


def icarl(network: Network, params: Any, hparams: Any, stored: Samples) -> tuple[Step, Any]:
    def loss_fn(params: Any, kept: Any, x: jax.Array, y: jax.Array) -> tuple[jax.Array, Any]:
        logits, old = network(params, x), jax.nn.sigmoid(network(kept["old"], x))
        num_classes = old.shape[1]
        is_old = jnp.arange(num_classes) < num_classes // 2
        target = jnp.where(is_old[None], old, jax.nn.one_hot(y, num_classes))
        return jnp.mean(jax.nn.softplus(logits) - logits * target), kept

    return sgd(loss_fn), {"old": params}


def kcl(network: Network, params: Any, hparams: Any, stored: Samples) -> tuple[Step, Any]:
    d, (width, num_classes) = hparams["d_rn_f"], params["head"]["kernel"].shape
    phase = jax.random.uniform(jax.random.PRNGKey(1), (1, d), maxval=2 * jnp.pi)

    def infer(net: Any, h: jax.Array) -> Any:
        """Return the mean and the logarithm of the variance of the bases."""
        for layer in (net["dense_0"], net["dense_1"]):
            h = jax.nn.elu(h @ layer["kernel"] + layer["bias"])
        return jnp.split(h @ net["head"]["kernel"] + net["head"]["bias"], 2)

    def loss_fn(params: Any, kept: Any, x: jax.Array, y: jax.Array) -> tuple[jax.Array, Any]:
        learned = params["kcl"]
        h, core = (network.features(params, a) for a in (x, kept["x"]))
        h, core = (a / jnp.linalg.norm(a, axis=1, keepdims=True) for a in (h, core))
        (m, v), (m0, v0) = infer(learned["posterior"], core.mean(0)), infer(learned["prior"], h.mean(0))
        key, noise = jax.random.split(kept["key"])
        bases = m[None] + jnp.exp(v / 2)[None] * jax.random.normal(noise, (d, width))
        psi, psi_core = ((2 / d) ** 0.5 * jnp.cos(a @ bases.T + phase) for a in (h, core))
        matrix = psi_core @ psi_core.T + (jnp.abs(learned["lmd"][1]) + 0.01) * jnp.eye(len(core))
        targets = jax.nn.one_hot(kept["y"], num_classes)
        coefficients = jax.scipy.linalg.solve(matrix, targets, assume_a="pos")
        logits = learned["gain"][1] * (psi @ psi_core.T @ coefficients) + learned["offset"][1]
        divergence = 0.5 * jnp.sum(v0 - v + (jnp.exp(v) + (m - m0) ** 2) / jnp.exp(v0) - 1)
        return cross_entropy(logits, y) + hparams["tau"] * divergence, {**kept, "key": key}

    core = {"x": jnp.asarray(stored.x), "y": jnp.asarray(stored.y, jnp.int32)}
    return sgd(loss_fn), {**core, "key": jax.random.PRNGKey(0)}


def lamaml(network: Network, params: Any, hparams: Any, stored: Samples) -> tuple[Step, Any]:
    parts = hparams["n_inner_updates"]

    def loss_fn(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return cross_entropy(network(params, x), y)

    def follow(params: Any, rates: Any, gradient: Any) -> Any:
        return jax.tree.map(lambda p, a, g: p - jax.nn.relu(a) * g, params, rates, gradient)

    def mean(total: Any) -> Any:
        """Return the mean over the inner steps, clipped by norm."""
        gradient = jax.tree.map(lambda g: g / parts, total)
        norm = jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(gradient)))
        factor = jnp.minimum(1, hparams["grad_clip_norm"] / (norm + 1e-6))
        return jax.tree.map(lambda g: factor * g, gradient)

    def glance(params: Any, rates: Any, batch: Any, both: Any) -> Any:
        def inner(carry: Any, part: Any) -> Any:
            fast, inner_total, total, rates_total = carry
            gradient = jax.grad(loss_fn)(fast, *part)
            fast = follow(fast, rates, gradient)
            inner_total = jax.tree.map(jnp.add, inner_total, gradient)
            loss, outer = jax.value_and_grad(loss_fn)(fast, *both)
            rates_total = jax.tree.map(lambda s, g, t: s - g * t, rates_total, outer, inner_total)
            return (fast, inner_total, jax.tree.map(jnp.add, total, outer), rates_total), loss

        zero = jax.tree.map(jnp.zeros_like, params)
        pieces = tuple(a.reshape(parts, -1, *a.shape[1:]) for a in batch)
        carry, losses = jax.lax.scan(inner, (params, zero, zero, zero), pieces, unroll=True)
        _, _, total, rates_total = carry
        rates_gradient = mean(jax.tree.map(lambda g, a: g * (a > 0), rates_total, rates))
        rates = jax.tree.map(lambda a, g: a - hparams["lr_alpha"] * g, rates, rates_gradient)
        return follow(params, rates, mean(total)), rates, losses.mean()

    def step(params: Any, kept: Any, x: jax.Array, y: jax.Array) -> Any:
        rates, losses = kept["rates"], []
        for k in range(hparams["glances"]):
            old_x, old_y, _ = read(kept, k, len(y))
            order = jax.random.permutation(jax.random.fold_in(kept["key"], k), len(y))
            both = jnp.concatenate([x, old_x]), jnp.concatenate([y, old_y])
            params, rates, loss = glance(params, rates, (x[order], y[order]), both)
            kept = kept if k else write(kept, x=x, y=y)
            losses.append(loss)
        return params, {**kept, "rates": rates}, losses[0]

    rates = jax.tree.map(lambda p: jnp.full_like(p, hparams["alpha_init"]), params)
    return step, {**memory(params, hparams, stored), "rates": rates}


LOOPS: dict[str, Callable[..., tuple[Step, Any]]] = {
    "naive": naive,
    "joint": naive,
    "stable_sgd": naive,
    "ewc": ewc,
    "mas": ewc,
    "si": si,
    "lfl": lfl,
    "lwf": lwf,
    "er": er,
    "er_ace": er_ace,
    "mir": mir,
    "der": der,
    "derpp": der,
    "agem": agem,
    "gem": agem,
    "mcsgd": mcsgd,
    "bic": bic,
    "gdumb": gdumb,
    "icarl": icarl,
    "kcl": kcl,
    "lamaml": lamaml,
}
"""From algorithm to a function that returns its step, and what the step keeps at first."""
