"""Kernel continual learning (Derakhshani et al. 2021, https://arxiv.org/abs/2107.05757).

    f_k(x) = gamma_k K(x, C_k) (K(C_k, C_k) + (|lambda_k| + 0.01) I)^-1 Y_k + beta_k
    L = loss(f_k(x), y) + tau * KL(q || p)

C_k is the coreset of task k, samples that are set aside before training. Y_k are their one-hot labels. K
compares the normalised last hidden layer h of two samples:

- `rff`: K(a, b) = psi(a)^T psi(b) with psi(h) = sqrt(2/D) cos(omega h + b) and D random bases omega. The
  bases are drawn from q, which a network infers from the coreset. Another network infers p from the batch.
- `rbf`: K(a, b) = exp(-||a - b||^2 / (2 bandwidth^2)), without the KL term.

Every training step draws new bases. Evaluation always uses the same bases; the official code draws new ones.
beta adds the same number to all classes, which a softmax ignores, so it stays 0. Two quirks of the official
code are options: with `normalisation=minmax` (its MLP), the logits of a sample depend on the rest of its
batch; `task_parameters=current` evaluates every task with the parameters of the latest one.

The official scripts use, for CIFAR-100: rff, D 2048, tau 0.01, 20 samples of each class, SGD 0.3 with
momentum 0.8 and lr_decay 0.95, batch 10, dropout 0.02. For MNIST: rbf, 200 samples, SGD 0.1 with momentum
0.8 and lr_decay 0.5, dropout 0.5. The network needs `features(x)`, and a `head`, which is not trained.

Mirror: sequel_lightning/algorithms/kcl.py
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.training.train_state import TrainState

from sequel_core.algorithms.kcl import BasesPlan, BasesPlanner, KCLHParams, basis_constants
from sequel_core.stream.augmentation import method_plan
from sequel_core.stream.benchmark import StreamSpec
from sequel_core.stream.planner import NoPlanner
from sequel_core.stream.task import Batch
from sequel_flax import bundle, kernels
from sequel_flax.bundle import Algorithm, Params, State, Stats, StepOutputs, make_algorithm
from sequel_flax.coresets import apply_start, coreset_of, plan_start
from sequel_flax.objectives import Objective, check_classification
from sequel_flax.replay import Memory, empty_memory
from sequel_flax.trainable import Selection


class KCLState(NamedTuple):
    """What KCL keeps; `noise`, `phase` and `fixed` are None for the kernel rbf."""

    coreset: Memory  # core_size slots for each task, filled when the task begins
    noise: jax.Array | None  # standard normal numbers, float32 [NOISE + H - 1]
    phase: jax.Array | None  # b, [D]
    fixed: jax.Array | None  # where in `noise` the bases of evaluation begin, int32 [D]


def init_state(hparams: KCLHParams, spec: StreamSpec, seed: int, width: int, dtype: Any) -> KCLState:
    """Return the state before the first task.

    Args:
        hparams: settings.
        spec: of the stream.
        seed: of the bases.
        width: units of the last hidden layer, H.
        dtype: of the weights.
    """
    coreset = empty_memory(spec, spec.num_tasks * hparams.core_size)
    if hparams.kernel_type == "rbf":
        return KCLState(coreset, None, None, None)
    noise, phase, fixed = map(jnp.asarray, basis_constants(seed, hparams.d_rn_f, width))
    return KCLState(coreset, noise, phase.astype(dtype), fixed)


def task_logits(
    extra: Any,
    state: KCLState,
    hparams: KCLHParams,
    core: jax.Array,
    y: jax.Array,
    k: Any,
    h: jax.Array,
    starts: Any,
    classes: int,
) -> tuple[jax.Array, Any]:
    """Return the logits of task k's classifier `[n, classes]`, and the distribution of its bases.

    Args:
        extra: see `kernels.extra_parameters`.
        state: what KCL keeps.
        hparams: settings.
        core: normalised features of a coreset `[N, H]`.
        y: its labels `[N]`.
        k: task whose lambda, gamma and beta are used.
        h: normalised features `[n, H]`.
        starts: where in `state.noise` each basis begins, int `[D]`; None for the kernel rbf.
        classes: outputs of the classifier.
    """
    kernel, cross, source = kernels.compare(extra, hparams, core, h, state.noise, state.phase, starts)
    targets = jax.nn.one_hot(y, classes, dtype=core.dtype)
    return kernels.classify(extra, k, kernel, cross, targets), source


def divergence(extra: Any, hparams: KCLHParams, source: kernels.Gaussian, h: jax.Array) -> jax.Array:
    """Return tau * KL(q || p), q inferred from the coreset and p from features `[n, H]`, shape ()."""
    prior = kernels.infer(extra["prior"], h)
    return hparams.tau * kernels.gaussian_kl(source, prior)


def training_loss(
    params: Params, model: bundle.Model, batch: Batch, hparams: KCLHParams
) -> tuple[jax.Array, tuple[jax.Array, Stats]]:
    """Return the training loss of a batch, shape (), and its logits `[B, num_classes]`."""
    ts, state, rff = model.ts, model.state, hparams.kernel_type == "rff"
    k, memory, extra = state.stream.task, state.memory, params["kcl"]
    x, y = coreset_of(memory.coreset, k, hparams.core_size)
    h, stats = bundle.training_forward(ts, params, state, batch.x, method="features")
    core, stats = bundle.training_forward(ts, params, state, x, method="features", stats=stats, draw=1)
    h, core = (kernels.normalised(a, hparams.normalisation) for a in (h, core))
    starts = batch.plan.starts if rff else None
    classes = jax.eval_shape(bundle.predict, ts, state, batch.x, batch.t).shape[1]
    logits, source = task_logits(extra, memory, hparams, core, y, k, h, starts, classes)
    loss, logits = bundle.loss_of_outputs(model, batch, logits)
    if rff:
        loss = loss + divergence(extra, hparams, source, h)
    return loss, (logits, stats)


def predict(ts: TrainState, state: State, x: jax.Array, t: jax.Array, hparams: KCLHParams) -> jax.Array:
    """Return the logits `[B, num_classes]` by the coreset of each sample's task, 0 if it has not begun."""

    def features(x: jax.Array) -> jax.Array:
        return kernels.normalised(
            bundle.network(ts, ts.params, state, x, method="features"), hparams.normalisation
        )

    memory, extra, h = state.memory, ts.params["kcl"], features(x)
    owners = memory.coreset.t[:: hparams.core_size]
    empty = jnp.zeros_like(jax.eval_shape(bundle.predict, ts, state, x, t))

    def add_task(j: Any, logits: jax.Array) -> Any:
        def classified() -> jax.Array:
            images, y = coreset_of(memory.coreset, j, hparams.core_size)
            k = j if hparams.task_parameters == "own" else state.stream.task
            core, classes = features(images), empty.shape[1]
            new, _ = task_logits(extra, memory, hparams, core, y, k, h, memory.fixed, classes)
            return jnp.where((t == j)[:, None], new, logits)

        return jax.lax.cond(jnp.any(t == j) & (owners[j] == j), classified, lambda: logits)

    logits: jax.Array = jax.lax.fori_loop(0, len(owners), add_task, empty)
    masked_logits: jax.Array = bundle.masked(state.stream, logits, t)
    return masked_logits


def kcl(
    hparams: KCLHParams, seed: int = 0, trainable: Selection = None, objective: Objective | None = None
) -> Algorithm:
    """Return kernel continual learning as pure functions.

    KCL adds parameters to the network's, so call `algorithm.prepare(ts, spec)` before `algorithm.init`. Its
    tasks have a coreset: iterate over `hparams.training_tasks(benchmark, seed)`. Prediction needs the task of
    each sample; in the domain scenario set `task_given=True`.

    Args:
        hparams: settings; see `help(KCLHParams)`.
        seed: of dropout, of the bases and of the networks that infer them, >= 0.
        trainable: which parameters of the network are trained; None for all. See `make_algorithm`.
        objective: what the network is trained and scored on; None for the one that fits the targets.

    Raises:
        ValueError: in `prepare`, if the network has no method `features` or no last layer `head`; in `init`,
            if `prepare` was not called; in `start_task`, if the task has no coreset; in `train_step`, if the
            batch has no plan.

    Example:
        >>> import jax, optax
        >>> from sequel_benchmarks import SplitDigits
        >>> from sequel_core import Batch, KCLHParams
        >>> from sequel_flax import MLP, initial_params, kcl
        >>> digits, net = SplitDigits(num_tasks=5), MLP(widths=(16,), num_classes=10)
        >>> params = initial_params(net, digits.spec, seed=0)
        >>> ts = TrainState.create(apply_fn=net.apply, params=params, tx=optax.sgd(0.1))
        >>> algorithm = kcl(KCLHParams(core_size=10, d_rn_f=32))
        >>> ts = algorithm.prepare(ts, digits.spec)
        >>> state = algorithm.init(ts, digits.spec)
        >>> planner, train_step = algorithm.planner(digits.spec, state), jax.jit(algorithm.train_step)
        >>> for task in algorithm.hparams.training_tasks(digits):
        ...     ts, state = algorithm.start_task(ts, state, task)
        ...     batch = Batch(*task.train.take(range(20)))
        ...     batch = batch._replace(plan=planner.next(batch.y, batch.t))
        ...     ts, state, outputs = train_step(ts, state, batch)
        ...     ts, state = algorithm.end_task(ts, state, [batch])
        >>> jax.jit(algorithm.predict)(ts, state, batch.x, batch.t).shape
        (20, 10)
    """
    rff = hparams.kernel_type == "rff"

    def prepare(ts: TrainState, spec: StreamSpec) -> TrainState:
        width, dtype = bundle.feature_width(ts, spec, "kcl"), jax.tree.leaves(ts.params)[0].dtype
        params = {**ts.params, "kcl": kernels.extra_parameters(hparams, seed, spec.num_tasks, width, dtype)}
        return ts.replace(params=params, opt_state=ts.tx.init(params))

    def init_memory(ts: TrainState, spec: StreamSpec) -> KCLState:
        if "kcl" not in ts.params:
            raise ValueError(
                "kcl adds parameters to the network's, which ts.params lacks; call "
                "ts = algorithm.prepare(ts, spec) before algorithm.init(ts, spec)"
            )
        width = bundle.feature_width(ts, spec, "kcl")
        return init_state(hparams, spec, seed, width, ts.params["kcl"]["lmd"].dtype)

    def loss(ts: TrainState, params: Params, state: State, batch: Batch) -> tuple[jax.Array, Any]:
        model = bundle.Model(ts, state, bundle.objective_of(objective, state.stream))
        return training_loss(params, model, batch, hparams)

    def step(ts: TrainState, state: State, batch: Batch) -> tuple[TrainState, State, StepOutputs]:
        plan = method_plan(batch)
        if rff and (not isinstance(plan, BasesPlan) or plan.starts.shape != (hparams.d_rn_f,)):
            raise ValueError(
                "the batch has no plan, which says where in the noise bases begin; make one planner with "
                "algorithm.planner(spec, state) and give Batch(x, y, t, planner.next(y, t))"
            )
        after, state, outputs = bundle.train_step(ts, state, batch, loss)
        return bundle.with_head_of(ts, after, True), state, outputs  # weight decay has changed the head

    return make_algorithm(
        hparams,
        seed,
        step,
        trainable=trainable,
        objective=objective,
        check=partial(check_classification, method="kcl"),
        init_memory=init_memory,
        plan_start=partial(plan_start, hparams=hparams),
        apply_start=partial(apply_start, hparams=hparams),
        predict=partial(predict, hparams=hparams),
        make_planner=lambda spec: BasesPlanner(hparams.d_rn_f, seed) if rff else NoPlanner(),
        prepare=prepare,
        extra_parameters=("kcl",),
    )
