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
from sequel_lightning.coresets import CoresetModule, held
from sequel_lightning.networks import blank_image, check_features, evaluating
from sequel_lightning.replay import Memory


class KCLState(NamedTuple):
    """What KCL keeps; only the kernel rff has more than coresets."""

    coreset: Memory  # core_size slots for each task, filled when it begins
    noise: Tensor | None  # normal numbers, float32 [NOISE + H - 1]
    phase: Tensor | None  # b, [D]
    fixed: Tensor | None  # where in the noise the bases of evaluation begin, int32 [D]


class KCL(CoresetModule):
    """Kernel continual learning.

    Raises:
        ValueError: no spec, or a network without `features` or `head`; in `fit`, a task without a coreset.
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
        hparams, net, seed = self.algorithm_hparams, self.net, self.seed
        like = next(net.parameters())
        with evaluating(net), torch.no_grad():
            width = int(net.features(blank_image(self.spec, like)).shape[1])
        self.kcl: Any = kernels.extra_parameters(hparams, seed, self.spec.num_tasks, width, like.dtype)
        self.rff = hparams.kernel_type == "rff"
        noise, phase, fixed = map(torch.from_numpy, basis_constants(seed, hparams.d_rn_f, width))
        constants = {"noise": noise, "basis_phase": phase.to(like.dtype), "fixed": fixed}
        for name, value in constants.items():
            self.register_buffer(name, value if self.rff else None, persistent=name != "noise")
        self.to(like.device)

    def make_planner(self, spec: StreamSpec) -> Any:
        """Return the planner."""
        hparams = self.algorithm_hparams
        return BasesPlanner(hparams.d_rn_f, self.seed) if hparams.kernel_type == "rff" else NoPlanner()

    def trained(self) -> dict[str, nn.Module]:
        """Return the network, and the parameters of all tasks with the networks that infer bases."""
        return {"": self.net, "kcl": self.kcl}

    @property
    def state(self) -> KCLState:
        """What is kept."""
        return KCLState(self.kept, self.noise, self.basis_phase, self.fixed)

    def features(self, x: Tensor) -> Tensor:
        """Return the normalised features `[n, H]` of images."""
        h = self.net.features(self.normalise(x)).to(self.kcl.lmd.dtype)
        return kernels.normalised(h, self.algorithm_hparams.normalisation)

    def answer(self, core: Tensor, y: Tensor, k: int, h: Tensor, positions: Any) -> tuple[Tensor, Any]:
        """Return the logits of features by a coreset and task k's parameters, and what was inferred of it."""
        own, hparams, (_, noise, phase, _) = self.kcl, self.algorithm_hparams, self.state
        kernel, cross, source = kernels.compare(own, hparams, core, h, noise, phase, positions)
        targets = F.one_hot(y.long(), self.spec.num_classes).to(core.dtype)
        return kernels.classify(own, k, kernel, cross, targets), source

    def objective(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy of a batch, with the divergence of the bases, and its logits."""
        batch = self.trained_on(batch)
        positions = torch.from_numpy(batch.plan.starts).to(batch.x.device) if self.rff else None
        k, x, y = self.current_coreset()
        h, core = self.features(batch.x), self.features(x)
        with torch.autocast(h.device.type, enabled=False):
            logits, source = self.answer(core, y, k, h, positions)
            logits = self.masked(logits, batch.t)
            loss = self.loss(logits, batch)
            if self.rff:
                prior = kernels.infer(self.kcl.prior, h)
                loss = loss + self.added(self.algorithm_hparams.tau * kernels.gaussian_kl(source, prior))
        return loss, logits

    def predict(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        """Return the logits by the coreset of each sample's task, 0 where it has none yet."""
        t = self.preprocessing.needed_tasks(t)
        hparams, kept, h = self.algorithm_hparams, self.kept, self.features(x)
        logits = h.new_zeros(len(x), self.spec.num_classes)
        for j in t.unique().tolist():
            if kept.t[j * hparams.core_size] == j:
                images, y = held(kept, j, hparams.core_size)
                core, here = self.features(images), t == j
                k = j if hparams.task_parameters == "own" else int(self.task_index)
                with torch.autocast(h.device.type, enabled=False):
                    logits[here], _ = self.answer(core, y, k, h[here], self.fixed)
        return self.masked(logits, t)
