"""Kernel continual learning (Derakhshani et al. 2021, https://arxiv.org/abs/2107.05757).

    f_k(x) = gamma_k K(x, C_k) (K(C_k, C_k) + (|lambda_k| + 0.01) I)^-1 Y_k + beta_k
    L = CE(f_k(x), y) + tau * KL(q || p)

C_k are samples that task k sets aside, Y_k their one-hot labels; K is of the normalised last hidden layer h.
rff: psi(a)^T psi(b), psi(h) = sqrt(2/D) cos(omega h + b), with D bases omega from q, which one network infers
from the coreset, and another p from the batch; rbf: exp(-||a - b||^2 / (2 bandwidth^2)), without KL.

The bases are new at every step; those of evaluation are fixed, where the official code draws anew. beta,
alike for all classes, has no part in a softmax: it stays 0. Quirks of the code are options: an answer
depends on the rest of its batch by `normalisation=minmax` (its MLP), and `task_parameters=current`. Its
scripts: CIFAR-100 with rff, D 2048, tau 0.01, 20 samples of each class, SGD 0.3 with momentum 0.8 and
lr_decay 0.95, batch 10, dropout 0.02; MNIST with rbf, 200 samples, SGD 0.1 with momentum 0.8 and lr_decay
0.5, dropout 0.5. A network needs `features(x)`, and a `head` that stays as it is.

Mirror: sequel_lightning/algorithms/kcl.py
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.training.train_state import TrainState

from sequel_core.algorithms.kcl import BasesPlan, BasesPlanner, KCLHParams, basis_constants
from sequel_core.stream.benchmark import StreamSpec
from sequel_core.stream.planner import NoPlanner, Planner
from sequel_core.stream.task import Batch
from sequel_flax import bundle, kernels
from sequel_flax.bundle import Algorithm, Params, State, StepOutputs, make_algorithm
from sequel_flax.coresets import apply_start, held, plan_start
from sequel_flax.replay import Memory, empty_memory
from sequel_flax.trainable import Selection


class KCLState(NamedTuple):
    """What KCL keeps; only the kernel rff has more than coresets."""

    coreset: Memory  # core_size slots for each task, filled when it begins
    noise: jax.Array | None  # normal numbers, float32 [NOISE + H - 1]
    phase: jax.Array | None  # b, [D]
    fixed: jax.Array | None  # where in the noise the bases of evaluation begin, int32 [D]


def kcl(hparams: KCLHParams, seed: int = 0, trainable: Selection = None) -> Algorithm:
    """Return kernel continual learning.

    Args:
        hparams: settings.
        seed: of dropout, of the bases, and of the networks that infer them.
        trainable: which parameters of the network are trained; see `make_algorithm`.

    Raises:
        ValueError: in `prepare`, for a network without `features` or `head`; in `init`, without `prepare`; in
            `start_task`, for a task without a coreset; in `train_step`, for a batch without a plan.
    """
    rff = hparams.kernel_type == "rff"

    def prepare(ts: TrainState, spec: StreamSpec) -> TrainState:
        width, dtype = bundle.feature_width(ts, spec, "kcl"), jax.tree.leaves(ts.params)[0].dtype
        params = {**ts.params, "kcl": kernels.extra_parameters(hparams, seed, spec.num_tasks, width, dtype)}
        return ts.replace(params=params, opt_state=ts.tx.init(params))

    def init_memory(ts: TrainState, spec: StreamSpec) -> KCLState:
        if "kcl" not in ts.params:
            raise ValueError(
                "kcl trains parameters of its own, which ts.params lacks; call "
                "ts = algorithm.prepare(ts, spec) before algorithm.init(ts, spec)"
            )
        memory = KCLState(empty_memory(spec, spec.num_tasks * hparams.core_size, None), None, None, None)
        if rff:
            width = bundle.feature_width(ts, spec, "kcl")
            noise, phase, fixed = map(jnp.asarray, basis_constants(seed, hparams.d_rn_f, width))
            phase = phase.astype(ts.params["kcl"]["lmd"].dtype)
            memory = memory._replace(noise=noise, phase=phase, fixed=fixed)
        return memory

    def features(ts: TrainState, params: Params, state: State, x: jax.Array) -> jax.Array:
        h = bundle.network(ts, params, state, x, method="features")
        return kernels.normalised(h, hparams.normalisation)

    def answer(
        ts: TrainState, state: State, own: Params, core: jax.Array, y: jax.Array, k: Any, h: Any, at: Any
    ) -> tuple[jax.Array, Any]:
        """Return the logits of features by a coreset and task k's parameters, and what was inferred of it."""
        _, noise, phase, _ = state.memory
        kernel, cross, source = kernels.compare(own, hparams, core, h, noise, phase, at)
        num_classes = jax.eval_shape(bundle.predict, ts, state, state.memory.coreset.x[: len(y)], y).shape[1]
        targets = jax.nn.one_hot(y, num_classes, dtype=core.dtype)
        return kernels.classify(own, k, kernel, cross, targets), source

    def train_step(ts: TrainState, state: State, batch: Batch) -> tuple[TrainState, State, StepOutputs]:
        batch = bundle.trained_on(state, batch)
        if rff and (not isinstance(batch.plan, BasesPlan) or batch.plan.starts.shape != (hparams.d_rn_f,)):
            raise ValueError(
                "the batch has no plan, which says where in the noise bases begin; make one planner with "
                "algorithm.planner(spec, state) and give Batch(x, y, t, planner.next(y, t))"
            )

        k, starts = state.stream.task, batch.plan.starts if rff else None
        x, y = held(state.memory.coreset, k, hparams.core_size)

        def loss_fn(params: Params) -> tuple[jax.Array, Any]:
            h, stats = bundle.training_forward(ts, params, state, batch.x, method="features")
            core, stats = bundle.training_forward(
                ts, params, state, x, method="features", stats=stats, draw=1
            )
            h, core = (kernels.normalised(a, hparams.normalisation) for a in (h, core))
            logits, source = answer(ts, state, params["kcl"], core, y, k, h, starts)
            logits = bundle.masked(state.stream, logits, batch.t)
            loss = bundle.cross_entropy(logits, batch.y)
            if rff:
                prior = kernels.infer(params["kcl"]["prior"], h)
                loss = loss + hparams.tau * kernels.gaussian_kl(source, prior)
            return loss, (logits, stats)

        (loss, (logits, stats)), gradient = jax.value_and_grad(loss_fn, has_aux=True)(ts.params)
        after = bundle.advance(ts, gradient, stats)
        after = after.replace(params={**after.params, "head": ts.params["head"]})  # which weight decay moves
        return after, state, {"loss": loss, "logits": logits, "labels": batch.y}

    def predict(ts: TrainState, state: State, x: jax.Array, t: jax.Array) -> jax.Array:
        h = features(ts, ts.params, state, x)
        owner = state.memory.coreset.t[:: hparams.core_size]
        none = jnp.zeros_like(jax.eval_shape(bundle.predict, ts, state, x, t))

        def of_task(j: Any, logits: jax.Array) -> Any:
            def answered() -> jax.Array:
                images, y = held(state.memory.coreset, j, hparams.core_size)
                core = features(ts, ts.params, state, images)
                k = j if hparams.task_parameters == "own" else state.stream.task
                found, _ = answer(ts, state, ts.params["kcl"], core, y, k, h, state.memory.fixed)
                return jnp.where((t == j)[:, None], found, logits)

            return jax.lax.cond(jnp.any(t == j) & (owner[j] == j), answered, lambda: logits)

        return bundle.masked(state.stream, jax.lax.fori_loop(0, len(owner), of_task, none), t)

    def make_planner(spec: StreamSpec) -> Planner:
        return BasesPlanner(hparams.d_rn_f, seed) if rff else NoPlanner()

    return make_algorithm(
        hparams,
        seed,
        train_step,
        trainable=trainable,
        init_memory=init_memory,
        plan_start=partial(plan_start, hparams=hparams),
        apply_start=partial(apply_start, hparams=hparams),
        predict=predict,
        make_planner=make_planner,
        prepare=prepare,
        extra_parameters=("kcl",),
    )
