"""Methods that replay samples of the stream, in float64 NumPy, written from the papers.

    A-GEM (Chaudhry 2019a)  g <- g - (g.g_ref / g_ref.g_ref) g_ref if g.g_ref < 0,
                            g_ref the gradient of CE on samples of past tasks
    GEM (Lopez-Paz 2017)    g <- g + sum_k v_k g_k if some g.g_k < 0, g_k the gradient of CE on samples
                            of past task k; v >= 0 minimises |g + sum_k v_k g_k|, plus margin
    ER (Chaudhry 2019b)     L = CE(batch and replayed samples, averaged together)
    ER-ACE (Caccia 2022)    L = CE(batch; softmax over the classes of the batch) + CE(replayed samples)
    MIR (Aljundi 2019)      theta_v = theta - lr dCE(batch)/dtheta; of the read samples, the k with
                            the largest CE(x; theta_v) - CE(x; theta) are replayed:
                            L = CE(batch and these together)
    DER (Buzzega 2020)      L = CE(batch) + alpha mean_r ||z_r - f(x_r)||^2, z_r = f(x_r) when it was stored
    DER++ (Buzzega 2020)    L = DER + beta CE(second draw)

The plan of the library decides which slots are written and read. Their contents are computed here.
"""

from __future__ import annotations

from itertools import combinations
from typing import ClassVar

import numpy as np

from sequel_core.algorithms.agem import AGEMHParams
from sequel_core.algorithms.der import DERHParams
from sequel_core.algorithms.derpp import DERppHParams
from sequel_core.algorithms.er import ERHParams
from sequel_core.algorithms.er_ace import ERACEHParams
from sequel_core.algorithms.gem import GEMHParams
from sequel_core.algorithms.lamaml import MetaPlan, MetaPlanner
from sequel_core.algorithms.mir import MIRHParams
from sequel_core.hparams import MemoryHParams
from sequel_core.stream.arrays import FloatArray, IntArray
from sequel_core.stream.memory import MemoryPlanner, StepPlan
from sequel_core.stream.task import Samples
from tests.reference import network
from tests.reference.network import Weights
from tests.reference.streams import Reference, concatenate, rows


class Replay(Reference):
    """A memory that is read before the step and written after it."""

    hparams: MemoryHParams
    draws: ClassVar[int] = 1
    past_only: ClassVar[bool] = False

    planner: MemoryPlanner | MetaPlanner
    step_plan: StepPlan | MetaPlan
    memory: Samples  # one row per slot; t is -1 in an empty slot
    memory_logits: FloatArray  # [slots, C], from the weights before the step that wrote them, not masked

    def make_planner(self) -> MemoryPlanner | MetaPlanner:
        """Return the planner of the slots that are written and read."""
        spec, seed = self.benchmark.spec, self.training.seed
        return MemoryPlanner(self.hparams, spec, seed, draws=self.draws, past_only=self.past_only)

    def start(self, theta: Weights) -> None:
        self.planner, spec = self.make_planner(), self.benchmark.spec
        n = self.planner.slots
        x, y = (np.zeros((n, *leaf.shape), leaf.dtype) for leaf in (spec.x, spec.y))
        self.memory = Samples(x, y, np.full(n, -1))
        self.memory_logits = np.zeros((n, spec.num_classes))

    def start_step(self, samples: Samples) -> None:
        self.step_plan = self.planner.next(samples.y, samples.t)

    def end_step(self, theta: Weights, new: Weights, samples: Samples) -> None:
        self.write(theta, samples)

    def write(self, theta: Weights, samples: Samples) -> None:
        """Write a batch and its logits under `theta` to the memory."""
        logits, _ = network.logits(theta, self.inputs(samples).x)
        for n, slot in enumerate(self.step_plan.write):
            if slot < self.planner.slots:
                for stored, array in zip(self.memory, samples, strict=True):
                    stored[slot] = array[n]
                self.memory_logits[slot] = logits[n]

    def read_slots(self, draw: int) -> IntArray:
        """Return the slots that a draw of this step reads, without padding."""
        slots = self.step_plan.reads[draw]
        return np.asarray(slots[slots < self.planner.slots])

    def contents(self, slots: IntArray) -> Samples:
        """Return the contents of the slots."""
        return rows(self.memory, slots)

    def memory_samples(self) -> Samples:
        """Return the contents of the memory in the order of the slots."""
        return self.contents(np.flatnonzero(self.memory.t >= 0))


class AGEM(Replay):
    """Averaged gradient episodic memory."""

    hparams: AGEMHParams
    past_only = True

    def objective(self, theta: Weights, samples: Samples) -> tuple[float, Weights]:
        loss, gradient = self.task_loss(theta, samples)
        slots = self.read_slots(0)
        if len(slots) == 0:
            return loss, gradient
        return loss, project(gradient, self.task_loss(theta, self.contents(slots))[1])


def project(g: Weights, g_ref: Weights) -> Weights:
    """Return g without its component against g_ref."""
    if network.dot(g, g_ref) >= 0:
        return g
    scale = network.dot(g, g_ref) / network.dot(g_ref, g_ref)
    return {k: a - scale * g_ref[k] for k, a in g.items()}


class GEM(Replay):
    """Gradient episodic memory."""

    hparams: GEMHParams

    def make_planner(self) -> MemoryPlanner:
        return MemoryPlanner(self.hparams, self.benchmark.spec, self.training.seed, per_task=True)

    def objective(self, theta: Weights, samples: Samples) -> tuple[float, Weights]:
        loss, gradient = self.task_loss(theta, samples)
        slots = [self.read_slots(k) for k in range(len(self.step_plan.reads))]
        past = [self.task_loss(theta, self.contents(s))[1] for s in slots if len(s)]
        products = np.array([network.dot(gradient, g) for g in past])
        if not (products < 0).any():
            return loss, gradient
        gram = np.array([[network.dot(a, b) for b in past] for a in past])
        gram += self.hparams.ridge * np.eye(len(past))
        margin = np.full(len(past), self.hparams.margin)
        shift = margin if self.hparams.margin_rule == "bound" else 0 * margin
        v = margin + nonnegative_minimum(gram, products + gram @ shift)
        for weight, g in zip(v, past, strict=True):
            gradient = network.plus(gradient, {k: weight * a for k, a in g.items()})
        return loss, gradient


def nonnegative_minimum(a: FloatArray, b: FloatArray) -> FloatArray:
    """Return the v >= 0 that minimises 1/2 v^T A v + b^T v, by trying each set of positive numbers."""
    best = np.zeros(len(b))
    for size in range(1, len(b) + 1):
        for some in map(list, combinations(range(len(b)), size)):
            v = np.zeros(len(b))
            v[some] = -np.linalg.lstsq(a[np.ix_(some, some)], b[some])[0]
            if (v >= 0).all() and 0.5 * v @ a @ v + b @ v < 0.5 * best @ a @ best + b @ best:
                best = v
    return best


class ER(Replay):
    """Experience replay."""

    hparams: ERHParams

    def objective(self, theta: Weights, samples: Samples) -> tuple[float, Weights]:
        return self.task_loss(theta, concatenate(samples, self.contents(self.read_slots(0))))


class ERACE(Replay):
    """Experience replay with asymmetric cross-entropy."""

    hparams: ERACEHParams

    def objective(self, theta: Weights, samples: Samples) -> tuple[float, Weights]:
        x, y, task_mask = self.inputs(samples)
        mask = np.zeros((len(y), self.benchmark.num_classes), np.bool_)
        mask[:, y] = True
        if self.hparams.classes == "unseen":
            mask[:, ~self.benchmark.mask[: samples.t[0] + 1].any(axis=0)] = True
        if task_mask is not None:
            mask &= task_mask
        loss, gradient = network.loss(theta, x, y, mask), network.gradient(theta, x, y, mask)
        slots = self.read_slots(0)
        if len(slots) == 0:
            return loss, gradient
        replay_loss, replay_gradient = self.task_loss(theta, self.contents(slots))
        return loss + replay_loss, network.plus(gradient, replay_gradient)


class MIR(Replay):
    """Maximally interfered retrieval."""

    hparams: MIRHParams

    def objective(self, theta: Weights, samples: Samples) -> tuple[float, Weights]:
        loss, gradient = self.task_loss(theta, samples)
        slots = self.read_slots(0)
        if len(slots) == 0:
            return loss, gradient
        rate = self.hparams.virtual_lr or self.learning_rate(int(samples.t[0]))
        virtual = {k: p - rate * gradient[k] for k, p in theta.items()}
        x, y, mask = self.inputs(self.contents(slots))
        after, before = (network.losses(network.logits(w, x)[0], y, mask) for w in (virtual, theta))
        best = np.argsort(-(after - before), kind="stable")[: self.hparams.mem_batch_size]
        replayed = self.contents(slots[np.sort(best)])
        if self.hparams.loss == "mean":
            return self.task_loss(theta, concatenate(samples, replayed))
        replay_loss, replay_gradient = self.task_loss(theta, replayed)
        return loss + replay_loss, network.plus(gradient, replay_gradient)


class DER(Replay):
    """Dark experience replay."""

    hparams: DERHParams

    def objective(self, theta: Weights, samples: Samples) -> tuple[float, Weights]:
        loss, gradient = self.task_loss(theta, samples)
        slots = self.read_slots(0)
        if len(slots) == 0:
            return loss, gradient
        f, inputs = network.logits(theta, self.inputs(self.contents(slots)).x)
        difference = f - self.memory_logits[slots]
        count = len(slots) if self.hparams.distance == "sum" else difference.size
        scale = self.hparams.alpha / count
        distance_gradient = network.backward(theta, inputs, 2 * scale * difference)
        return loss + scale * float((difference**2).sum()), network.plus(gradient, distance_gradient)


class DERpp(DER):
    """DER++: dark experience replay with labels."""

    hparams: DERppHParams
    draws = 2

    def objective(self, theta: Weights, samples: Samples) -> tuple[float, Weights]:
        loss, gradient = super().objective(theta, samples)
        slots = self.read_slots(1)
        if len(slots) == 0:
            return loss, gradient
        replay_loss, replay_gradient = self.task_loss(theta, self.contents(slots))
        weighted = {k: self.hparams.beta * g for k, g in replay_gradient.items()}
        return loss + self.hparams.beta * replay_loss, network.plus(gradient, weighted)
