"""Methods that replay samples of the stream, in float64 NumPy, written from the papers.

    A-GEM (Chaudhry 2019a)  g <- g - (g.g_ref / g_ref.g_ref) g_ref where g.g_ref < 0,
                            g_ref the gradient of CE on samples of past tasks
    ER (Chaudhry 2019b)     L = CE(batch and drawn samples, one mean)
    DER (Buzzega 2020)      L = CE(batch) + alpha mean_r ||z_r - f(x_r)||^2, z_r = f(x_r) when seen
    DER++ (Buzzega 2020)    L = DER + beta CE(second draw)

Slots are those of the library's plan; what they hold is kept here.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from sequel_core.algorithms.agem import AGEMHParams
from sequel_core.algorithms.der import DERHParams
from sequel_core.algorithms.derpp import DERppHParams
from sequel_core.algorithms.er import ERHParams
from sequel_core.algorithms.lamaml import MetaPlan, MetaPlanner
from sequel_core.hparams import MemoryHParams
from sequel_core.stream.arrays import FloatArray, IntArray
from sequel_core.stream.memory import MemoryPlanner, StepPlan
from sequel_core.stream.task import Samples
from tests.reference import network
from tests.reference.network import Weights
from tests.reference.streams import Reference, rows, together


class Replay(Reference):
    """Keeps a memory: read as before the step, written after it."""

    hparams: MemoryHParams
    draws: ClassVar[int] = 1
    past_only: ClassVar[bool] = False

    planner: MemoryPlanner | MetaPlanner
    step_plan: StepPlan | MetaPlan
    held: Samples  # by slot; y is -1 where a slot is empty
    held_logits: FloatArray  # [slots, C], as emitted before the step that wrote them, not masked

    def make_planner(self) -> MemoryPlanner | MetaPlanner:
        """Return what decides on slots."""
        spec, seed = self.benchmark.spec, self.training.seed
        return MemoryPlanner(self.hparams, spec, seed, draws=self.draws, past_only=self.past_only)

    def start(self, theta: Weights) -> None:
        self.planner, spec = self.make_planner(), self.benchmark.spec
        n = self.planner.slots
        self.held = Samples(np.zeros((n, *spec.image_shape), np.uint8), np.full(n, -1), np.full(n, -1))
        self.held_logits = np.zeros((n, spec.num_classes))

    def start_step(self, samples: Samples) -> None:
        self.step_plan = self.planner.next(samples.y, samples.t)

    def end_step(self, theta: Weights, new: Weights, samples: Samples) -> None:
        self.write(theta, samples)

    def write(self, theta: Weights, samples: Samples) -> None:
        """Write a batch to the memory, with the logits that `theta` gives it."""
        emitted, _ = network.logits(theta, self.inputs(samples).x)
        for n, slot in enumerate(self.step_plan.write):
            if slot < self.planner.slots:
                self.held.x[slot], self.held.y[slot], self.held.t[slot] = (array[n] for array in samples)
                self.held_logits[slot] = emitted[n]

    def drawn(self, draw: int) -> IntArray:
        """Return the slots that a draw of this step reads; none where there is nothing to read."""
        slots = self.step_plan.reads[draw]
        return np.asarray(slots[slots < self.planner.slots])

    def contents(self, slots: IntArray) -> Samples:
        """Return what slots hold."""
        return rows(self.held, slots)

    def memory_samples(self) -> Samples:
        """Return what the memory holds, slot by slot."""
        return self.contents(np.flatnonzero(self.held.y >= 0))


class AGEM(Replay):
    """Averaged gradient episodic memory."""

    hparams: AGEMHParams
    past_only = True

    def objective(self, theta: Weights, samples: Samples) -> tuple[float, Weights]:
        loss, gradient = self.cross_entropy(theta, samples)
        slots = self.drawn(0)
        if len(slots) == 0:
            return loss, gradient
        return loss, project(gradient, self.cross_entropy(theta, self.contents(slots))[1])


def project(g: Weights, g_ref: Weights) -> Weights:
    """Return g without what it has against g_ref."""
    if network.dot(g, g_ref) >= 0:
        return g
    share = network.dot(g, g_ref) / network.dot(g_ref, g_ref)
    return {k: a - share * g_ref[k] for k, a in g.items()}


class ER(Replay):
    """Experience replay."""

    hparams: ERHParams

    def objective(self, theta: Weights, samples: Samples) -> tuple[float, Weights]:
        return self.cross_entropy(theta, together(samples, self.contents(self.drawn(0))))


class DER(Replay):
    """Dark experience replay."""

    hparams: DERHParams

    def objective(self, theta: Weights, samples: Samples) -> tuple[float, Weights]:
        loss, gradient = self.cross_entropy(theta, samples)
        slots = self.drawn(0)
        if len(slots) == 0:
            return loss, gradient
        f, inputs = network.logits(theta, self.inputs(self.contents(slots)).x)
        away = f - self.held_logits[slots]
        count = len(slots) if self.hparams.distance == "sum" else away.size
        share = self.hparams.alpha / count
        pull = network.backward(theta, inputs, 2 * share * away)
        return loss + share * float((away**2).sum()), network.plus(gradient, pull)


class DERpp(DER):
    """DER++: dark experience replay with labels."""

    hparams: DERppHParams
    draws = 2

    def objective(self, theta: Weights, samples: Samples) -> tuple[float, Weights]:
        loss, gradient = super().objective(theta, samples)
        slots = self.drawn(1)
        if len(slots) == 0:
            return loss, gradient
        replayed, slope = self.cross_entropy(theta, self.contents(slots))
        pull = {k: self.hparams.beta * g for k, g in slope.items()}
        return loss + self.hparams.beta * replayed, network.plus(gradient, pull)
