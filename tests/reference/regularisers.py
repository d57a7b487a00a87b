"""Regularisation methods in float64 NumPy, written from the papers.

EWC (Kirkpatrick 2017, eq. 3)  L = CE + sum_k lambda/2 sum_i F_{k,i} (theta_i - theta*_{k,i})^2
online EWC (Schwarz 2018)      L = CE + lambda/2 sum_i F_i (theta_i - theta*_i)^2, F <- gamma F + F_k
SI (Zenke 2017)                L = CE + c sum_i Omega_i (theta_i - theta*_i)^2
                               step: omega <- omega - (dCE/dtheta) (theta_new - theta); the code of the DER
                               paper has dL/dtheta in place of dCE/dtheta
                               task: Omega <- Omega + omega / ((theta - theta_start)^2 + xi), omega <- 0
MAS (Aljundi 2018)             L = CE + lambda sum_i Omega_i (theta_i - theta*_i)^2
                               task: Omega <- Omega + 1/N sum_n |d ||f(x_n)||^2 / dtheta|
LFL (Jung 2016)                L = CE + lambda/2 mean_n ||h(x_n; theta) - h(x_n; theta_old)||^2
LwF (Li & Hoiem 2016)          L = CE - lambda mean_n sum_c q_nc log p_nc,
                               p = softmax(f / T), q = softmax(f_old / T)
                               over the classes of each past task (heads), or of all past tasks (one head)
       any loss                L + lambda mean_n ||f(x_n) - f_old(x_n)||^2
LwF.MC (Rebuffi 2017)          L = mean_n mean_c BCE(sigmoid(f_nc), q_nc) over seen classes c,
                               q = sigmoid(f_old) for past classes, else the label
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from sequel_core.algorithms.ewc import EWCHParams
from sequel_core.algorithms.lfl import LFLHParams
from sequel_core.algorithms.lwf import LwFHParams
from sequel_core.algorithms.mas import MASHParams
from sequel_core.algorithms.si import SIHParams
from sequel_core.stream.arrays import FloatArray
from sequel_core.stream.task import Samples, Task
from tests.reference import network
from tests.reference.network import Weights
from tests.reference.streams import Reference


class Term(NamedTuple):
    """One quadratic term of EWC's penalty."""

    anchor: Weights  # theta*_k
    fisher: Weights  # F_k


class EWC(Reference):
    """Elastic weight consolidation. The minimum of the penalty is subtracted from the loss."""

    hparams: EWCHParams
    terms: list[Term]

    def start(self, theta: Weights) -> None:
        self.terms = []

    def objective(self, theta: Weights, samples: Samples) -> tuple[float, Weights]:
        loss, gradient = self.task_loss(theta, samples)
        for term in self.terms:
            weighted = {k: self.hparams.ewc_lambda * f for k, f in term.fisher.items()}
            penalty_gradient = {k: w * (theta[k] - term.anchor[k]) for k, w in weighted.items()}
            gradient = network.plus(gradient, penalty_gradient)
        return loss + self.penalty(theta), gradient

    def penalty(self, theta: Weights) -> float:
        """Return the sum of the terms minus its minimum over theta, which is constant."""

        def value(at: Weights) -> float:
            sums = [((at[k] - t.anchor[k]) ** 2 * t.fisher[k]).sum() for t in self.terms for k in at]
            return float(self.hparams.ewc_lambda / 2 * np.sum(sums))

        minimiser = {}
        for k, p in theta.items():
            total = np.sum([t.fisher[k] for t in self.terms], axis=0)
            weighted = np.sum([t.fisher[k] * t.anchor[k] for t in self.terms], axis=0)
            minimiser[k] = np.divide(weighted, total, out=p.copy(), where=total > 0) if self.terms else p
        return value(theta) - value(minimiser)

    def end_task(self, theta: Weights, task: Task) -> None:
        fisher = self.fisher(theta, task)
        if self.hparams.accumulation == "separate":
            self.terms.append(Term(theta, fisher))
            return
        past = self.terms[0].fisher if self.terms else network.zeros(theta)
        self.terms = [Term(theta, {k: self.hparams.gamma * past[k] + f for k, f in fisher.items()})]

    def fisher(self, theta: Weights, task: Task) -> Weights:
        """Return the mean over samples of the squared gradient of each, weighted by p(y | x) if asked for.

        With `fisher=mean`, return the square of the mean over samples of the gradient.
        """
        x, y, mask = self.consolidation(task, self.hparams.fisher_samples)
        total = network.zeros(theta)
        if self.hparams.fisher == "mean":
            return {k: g**2 for k, g in network.gradient(theta, x, y, mask).items()}
        log_p = -network.losses(network.logits(theta, x)[0], y, mask)
        weights = np.exp(log_p) if self.hparams.fisher == "weighted" else np.ones(len(y))
        for n in range(len(y)):
            row = slice(n, n + 1)
            g = network.gradient(theta, x[row], y[row], None if mask is None else mask[row])
            total = {k: f + weights[n] * g[k] ** 2 for k, f in total.items()}
        return {k: f / len(y) for k, f in total.items()}


class Quadratic(Reference):
    """L = CE + strength sum_i Omega_i (theta_i - theta*_i)^2, without a factor 1/2."""

    anchor: Weights  # theta*
    importance: Weights  # Omega

    @property
    def strength(self) -> float:
        """Factor of the penalty."""
        raise NotImplementedError

    def start(self, theta: Weights) -> None:
        self.anchor, self.importance = theta, network.zeros(theta)

    def objective(self, theta: Weights, samples: Samples) -> tuple[float, Weights]:
        loss, gradient = self.task_loss(theta, samples)
        difference = {k: p - self.anchor[k] for k, p in theta.items()}
        weighted = {k: self.strength * self.importance[k] * d for k, d in difference.items()}
        penalty_gradient = {k: 2 * d for k, d in weighted.items()}
        return loss + network.dot(weighted, difference), network.plus(gradient, penalty_gradient)


class SI(Quadratic):
    """Synaptic intelligence."""

    hparams: SIHParams
    path: Weights  # omega, the path integral of this task
    theta_start: Weights

    @property
    def strength(self) -> float:
        return self.hparams.si_lambda

    def start(self, theta: Weights) -> None:
        super().start(theta)
        self.path, self.theta_start = network.zeros(theta), theta

    def end_step(self, theta: Weights, new: Weights, samples: Samples) -> None:
        total = self.hparams.path_gradient == "total"
        _, g = (self.objective if total else self.task_loss)(theta, samples)
        self.path = {k: w - g[k] * (new[k] - theta[k]) for k, w in self.path.items()}

    def end_task(self, theta: Weights, task: Task) -> None:
        for k, w in self.path.items():
            change = theta[k] - self.theta_start[k]
            self.importance[k] = self.importance[k] + w / (change**2 + self.hparams.xi)
            if self.hparams.clamp:
                self.importance[k] = np.maximum(self.importance[k], 0)
        self.anchor, self.theta_start, self.path = theta, theta, network.zeros(theta)


class MAS(Quadratic):
    """Memory aware synapses. With `gradients=batch`, absolute values are taken of the sum over each batch."""

    hparams: MASHParams

    @property
    def strength(self) -> float:
        return self.hparams.mas_lambda

    def end_task(self, theta: Weights, task: Task) -> None:
        self.anchor = theta
        self.importance = network.plus(self.importance, self.sensitivity(theta, task))

    def sensitivity(self, theta: Weights, task: Task) -> Weights:
        """Return the importance of one task. Logits are not masked and labels are not used."""
        x, _, _ = self.consolidation(task, self.hparams.mas_samples)
        size = 1 if self.hparams.gradients == "sample" else self.training.batch_size
        total = network.zeros(theta)
        for n in range(0, len(x), size):
            f, inputs = network.logits(theta, x[n : n + size])
            g = network.backward(theta, inputs, 2 * f)
            total = {k: s + abs(g[k]) for k, s in total.items()}
        return {k: s / len(x) for k, s in total.items()}


class LwF(Reference):
    """Learning without forgetting, and LwF.MC. Samples are not augmented here."""

    hparams: LwFHParams
    old: Weights | None

    def start(self, theta: Weights) -> None:
        self.old = None

    def objective(self, theta: Weights, samples: Samples) -> tuple[float, Weights]:
        inputs, task = self.inputs(samples), int(samples.t[0])
        f, layers = network.logits(theta, inputs.x)
        old = None if self.old is None else network.logits(self.old, inputs.x)[0]
        if self.hparams.distillation == "sigmoid":
            value, d_logits = self.sigmoid_term(f, old, inputs.y, task)
            return value, network.backward(theta, layers, d_logits)
        loss, gradient = self.task_loss(theta, samples)
        if old is None:
            return loss, gradient
        labels = inputs.y.dtype.kind in "iu"
        if self.hparams.distillation == "distance" or not labels:
            value, d_logits = float(((f - old) ** 2).sum()) / len(f), 2 * (f - old) / len(f)
        else:
            value, d_logits = self.softmax_terms(f, old, task)
        penalty_gradient = network.backward(theta, layers, self.hparams.lwf_lambda * d_logits)
        return loss + self.hparams.lwf_lambda * value, network.plus(gradient, penalty_gradient)

    def softmax_terms(self, f: FloatArray, old: FloatArray, task: int) -> tuple[float, FloatArray]:
        """Return L_d summed over the heads, and its gradient by the logits."""
        past, scale = self.benchmark.mask[:task], self.hparams.temperature
        heads = past if self.benchmark.scenario == "task" else np.any(past, axis=0)[None]
        value, d_logits = 0.0, np.zeros_like(f)
        for head in heads:
            log_p, log_q = (network.log_softmax(a[:, head] / scale, None) for a in (f, old))
            value -= float((np.exp(log_q) * log_p).sum()) / len(f)
            d_logits[:, head] += (np.exp(log_p) - np.exp(log_q)) / scale / len(f)
        return value, d_logits

    def sigmoid_term(
        self, f: FloatArray, old: FloatArray | None, y: Any, task: int
    ) -> tuple[float, FloatArray]:
        """Return the mean binary cross-entropy over seen classes, and its gradient by the logits."""
        current, seen = self.benchmark.mask[task], self.benchmark.mask[: task + 1].any(axis=0)
        target = np.eye(f.shape[1])[y]
        past = seen & ~current
        if old is not None:
            target[:, past] = 1 / (1 + np.exp(-old[:, past]))
        terms = np.logaddexp(0, f) - target * f
        count = len(f) * seen.sum()
        d_logits = np.where(seen, 1 / (1 + np.exp(-f)) - target, 0) / count
        return float(terms[:, seen].sum()) / count, d_logits

    def end_task(self, theta: Weights, task: Task) -> None:
        self.old = theta


class LFL(Reference):
    """Less-forgetting learning. h is the input of the last layer, which is frozen after the first task."""

    hparams: LFLHParams
    old: Weights | None

    def start(self, theta: Weights) -> None:
        self.old = None

    def objective(self, theta: Weights, samples: Samples) -> tuple[float, Weights]:
        loss, gradient = self.task_loss(theta, samples)
        if self.old is None:
            return loss, gradient
        x = self.inputs(samples).x
        a, inputs = network.logits(theta, x)
        difference = inputs[-1] - network.logits(self.old, x)[1][-1]
        scale = self.hparams.lfl_lambda / len(x)
        penalty_gradient = network.backward(theta, inputs, np.zeros_like(a), scale * difference)
        gradient = network.plus(gradient, penalty_gradient)
        if self.hparams.freeze_head:
            gradient = {k: g for k, g in gradient.items() if k not in ("head/kernel", "head/bias")}
        return loss + scale / 2 * float((difference**2).sum()), gradient

    def end_task(self, theta: Weights, task: Task) -> None:
        self.old = theta
