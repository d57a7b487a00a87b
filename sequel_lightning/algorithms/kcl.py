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

Mirror: sequel_flax/algorithms/kcl.py
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sequel_core.algorithms.kcl import BasesPlanner, KCLHParams, basis_constants
from sequel_core.stream.benchmark import StreamSpec
from sequel_core.stream.planner import NoPlanner
from sequel_core.stream.task import Batch
from sequel_lightning import kernels
from sequel_lightning.coresets import CoresetModule, coreset_of
from sequel_lightning.networks import blank_input, check_features, evaluating
from sequel_lightning.replay import Memory, empty_memory


class KCLState(NamedTuple):
    """What KCL keeps; `noise`, `phase` and `fixed` are None for the kernel rbf."""

    coreset: Memory  # core_size slots for each task, filled when the task begins
    noise: Tensor | None  # standard normal numbers, float32 [NOISE + H - 1]
    phase: Tensor | None  # b, [D]
    fixed: Tensor | None  # where in `noise` the bases of evaluation begin, int32 [D]


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
    noise, phase, fixed = map(torch.from_numpy, basis_constants(seed, hparams.d_rn_f, width))
    return KCLState(coreset, noise, phase.to(dtype), fixed)


def task_logits(
    extra: Any,
    state: KCLState,
    hparams: KCLHParams,
    core: Tensor,
    y: Tensor,
    k: Any,
    h: Tensor,
    starts: Any,
    classes: int,
) -> tuple[Tensor, Any]:
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
    targets = F.one_hot(y.long(), classes).to(core.dtype)
    return kernels.classify(extra, k, kernel, cross, targets), source


def divergence(extra: Any, hparams: KCLHParams, source: kernels.Gaussian, h: Tensor) -> Tensor:
    """Return tau * KL(q || p), q inferred from the coreset and p from features `[n, H]`, shape ()."""
    prior = kernels.infer(extra.prior, h)
    return hparams.tau * kernels.gaussian_kl(source, prior)


def training_loss(module: KCL, batch: Batch, hparams: KCLHParams) -> tuple[Tensor, Tensor]:
    """Return the training loss of a batch, shape (), and its logits `[B, num_classes]`."""
    k, x, y = module.current_coreset()
    memory, extra, rff = module.state, module.kcl, hparams.kernel_type == "rff"
    h, core = module.kernel_features(batch.x), module.kernel_features(x)
    starts = torch.from_numpy(batch.plan.starts).to(h.device) if rff else None
    with torch.autocast(h.device.type, enabled=False):
        classes = module.spec.num_classes
        logits, source = task_logits(extra, memory, hparams, core, y, k, h, starts, classes)
        logits = module.masked(logits, batch.t)
        loss = module.loss(logits, batch)
        if rff:
            loss = loss + module.added(divergence(extra, hparams, source, h))
    return loss, logits


def predict(module: KCL, x: Tensor, t: Tensor, hparams: KCLHParams) -> Tensor:
    """Return the logits `[B, num_classes]` by the coreset of each sample's task, 0 if it has not begun."""
    memory, extra, h = module.state, module.kcl, module.kernel_features(x)
    owners = memory.coreset.t[:: hparams.core_size]
    logits = h.new_zeros(len(x), module.spec.num_classes)
    for j in t.unique().tolist():
        if owners[j] == j:
            images, y = coreset_of(memory.coreset, j, hparams.core_size)
            k = j if hparams.task_parameters == "own" else int(module.task_index)
            core, classes, rows = module.kernel_features(images), logits.shape[1], t == j
            with torch.autocast(h.device.type, enabled=False):
                new, _ = task_logits(extra, memory, hparams, core, y, k, h[rows], memory.fixed, classes)
            logits[rows] = new
    masked_logits: Tensor = module.masked(logits, t)
    return masked_logits


class KCL(CoresetModule):
    """Kernel continual learning; see `help(KCLHParams)` for its settings.

    Raises:
        ValueError: no spec, or the network has no `features` or `head`; in `fit`, a task has no coreset.

    Example:
        >>> import torch
        >>> from sequel_benchmarks import RotatedDigits
        >>> from sequel_core import KCLHParams
        >>> from sequel_lightning import MLP, KCL
        >>> digits = RotatedDigits(num_tasks=2)
        >>> net = MLP(image_shape=digits.image_shape)
        >>> module = KCL(net, torch.optim.SGD, KCLHParams(core_size=20, task_given=True), digits.spec)
        >>> module.state.coreset.y.shape
        torch.Size([40])
    """

    hparams_class = KCLHParams
    has_penalty = True
    net: Any
    noise: Tensor | None
    basis_phase: Tensor | None
    fixed: Any

    def check_net(self, net: nn.Module) -> None:
        """Raise ValueError if the network lacks `features` or `head`."""
        check_features(net, "kcl")

    def init_memory(self) -> None:
        """Start with empty coresets, and the parameters of every task."""
        super().init_memory()
        hparams, net, spec = self.algorithm_hparams, self.net, self.spec
        like = next(net.parameters())
        with evaluating(net), torch.no_grad():
            width = int(net.features(blank_input(spec, like)).shape[1])
        self.kcl: Any = kernels.extra_parameters(hparams, self.seed, spec.num_tasks, width, like.dtype)
        _, noise, phase, fixed = init_state(hparams, spec, self.seed, width, like.dtype)
        for name, value in {"noise": noise, "basis_phase": phase, "fixed": fixed}.items():
            self.register_buffer(name, value, persistent=name != "noise")
        self.to(like.device)

    def make_planner(self, spec: StreamSpec) -> Any:
        """Return the planner: of the bases, for the kernel rff."""
        hparams = self.algorithm_hparams
        return BasesPlanner(hparams.d_rn_f, self.seed) if hparams.kernel_type == "rff" else NoPlanner()

    def trained(self) -> dict[str, nn.Module]:
        """Return the network, and lambda, gamma and beta of all tasks with the networks that infer bases."""
        return {"": self.net, "kcl": self.kcl}

    @property
    def state(self) -> KCLState:
        """What is kept of all tasks."""
        return KCLState(self.contents, self.noise, self.basis_phase, self.fixed)

    def kernel_features(self, x: Tensor) -> Tensor:
        """Return the normalised features `[n, H]` of images."""
        h = self.net.features(self.normalise(x)).to(self.kcl.lmd.dtype)
        return kernels.normalised(h, self.algorithm_hparams.normalisation)

    def training_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the training loss of a batch, shape (), and its logits `[B, num_classes]`."""
        return training_loss(self, self.trained_on(batch), self.algorithm_hparams)

    def predict(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        """Return the logits `[B, num_classes]` by the coresets of the samples' tasks; see `predict`."""
        return predict(self, x, self.preprocessing.needed_tasks(t), self.algorithm_hparams)
