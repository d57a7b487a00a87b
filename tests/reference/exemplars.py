"""iCaRL in float64 NumPy, written from the paper (Rebuffi 2017, algorithms 1 to 5).

    L = -mean_n mean_c [q_nc log g_nc + (1 - q_nc) log(1 - g_nc)], g_nc = sigmoid(f(x_n))_c, c a seen class;
        q_nc = g_old(x_n)_c of classes that only past tasks have, [c = y_n] of all others
    phi(x) = h(x) / |h(x)|
    herding  p_k = argmin_x |mu - (phi(x) + phi(p_1) + ... + phi(p_{k-1})) / k|, mu the mean of a class's phi
    predict  argmin_c |phi(x) - mu_c / |mu_c||, mu_c the mean of phi over the exemplars of c
    flip     mu_c is the mean of that and of the same over mirror images (official code)

There is one set of exemplars for each class of each task.
"""

from __future__ import annotations

import numpy as np

from sequel_core.algorithms.icarl import ICaRLHParams
from sequel_core.stream.arrays import FloatArray
from sequel_core.stream.task import AnySplit, JoinedSplit, Samples, Split, Task
from tests.reference import network
from tests.reference.network import Weights
from tests.reference.streams import Reference, rows, together


def herd(phi: FloatArray, count: int) -> list[int]:
    """Return the rows of phi `[n, H]` that are chosen, none twice, at most `count`, in the order chosen."""
    mean, chosen = phi.mean(axis=0), list[int]()
    for k in range(1, min(count, len(phi)) + 1):
        away = np.linalg.norm(mean - (phi + phi[chosen].sum(axis=0)) / k, axis=1)
        away[chosen] = np.inf
        chosen.append(int(np.argmin(away)))
    return chosen


def log_sigmoid(f: FloatArray) -> FloatArray:
    """Return log(1 / (1 + e^-f))."""
    return -np.logaddexp(0, -f)


class ICaRL(Reference):
    """Incremental classifier and representation learning."""

    hparams: ICaRLHParams

    task: int
    learned: int  # the last task that has ended; -1 at first
    old: Weights
    sets: dict[tuple[int, int], Samples]  # exemplars of task and class, in the order chosen
    means: dict[int, FloatArray]  # mu_c / |mu_c|

    def start(self, theta: Weights) -> None:
        self.learned, self.sets, self.means = -1, {}, {}

    def start_task(self, theta: Weights, task: Task) -> Weights:
        self.task = task.index
        return theta

    def training_split(self, task: Task) -> AnySplit:
        splits = [Split(self.sets[t, c].x, self.sets[t, c].y, t) for t, c in sorted(self.sets)]
        return JoinedSplit((*task.train.parts, *splits))

    def objective(self, theta: Weights, samples: Samples) -> tuple[float, Weights]:
        x, y, _ = self.inputs(samples)
        f, inputs = network.logits(theta, x)
        current = self.benchmark.mask[self.task]
        seen = np.asarray(self.benchmark.mask[: self.task + 1].any(axis=0))
        target = np.eye(len(seen))[y]
        for c in np.flatnonzero(seen & ~current):
            target[:, c] = np.exp(log_sigmoid(network.logits(self.old, x)[0][:, c]))
        counted = seen if self.hparams.outputs == "seen" else np.ones_like(seen)
        terms = -(target * log_sigmoid(f) + (1 - target) * log_sigmoid(-f))[:, counted]
        slope = np.where(counted, np.exp(log_sigmoid(f)) - target, 0) / terms.size
        return float(terms.mean()), network.backward(theta, inputs, slope)

    def end_task(self, theta: Weights, task: Task) -> None:
        sets = int(self.benchmark.mask[: task.index + 1].sum())
        exact = self.hparams.mem_size / sets
        quota = int(np.ceil(exact) if self.hparams.quota == "ceil" else np.floor(exact))
        self.sets = {key: rows(held, slice(quota)) for key, held in self.sets.items()}
        order = self.consolidation_order(task)
        for c in task.classes:
            own = task.train.take(order[task.train.targets[order] == c])
            chosen = herd(self.phi(theta, own), quota)
            self.sets[task.index, c] = rows(own, np.asarray(chosen))
        self.old, self.learned = theta, task.index
        self.means = {c: self.mean(theta, c) for c in sorted({c for _, c in self.sets})}

    def phi(self, theta: Weights, samples: Samples) -> FloatArray:
        """Return the features `[N, H]`, of unit length unless they are all 0."""
        h = network.logits(theta, self.inputs(samples).x)[1][-1]
        lengths = np.linalg.norm(h, axis=1, keepdims=True)
        return np.asarray(np.divide(h, lengths, out=np.zeros_like(h), where=lengths > 0))

    def mean(self, theta: Weights, label: int) -> FloatArray:
        """Return the direction of the mean of a class's exemplars `[H]`."""
        samples = together(*(self.sets[key] for key in sorted(self.sets) if key[1] == label))
        mean = self.phi(theta, samples).mean(axis=0)
        if self.hparams.flip:
            mean = (mean + self.phi(theta, samples._replace(x=samples.x[:, :, ::-1])).mean(axis=0)) / 2
        return np.asarray(mean / np.linalg.norm(mean))

    def predict(self, theta: Weights, samples: Samples) -> FloatArray:
        if self.learned != self.task:
            return super().predict(theta, samples)
        phi = self.phi(theta, samples)
        scores = np.full((len(phi), self.benchmark.num_classes), -np.inf)
        for c, mean in self.means.items():
            scores[:, c] = -((phi - mean) ** 2).sum(axis=1)
        return scores

    def alternatives(self, theta: Weights, samples: Samples) -> dict[str, FloatArray]:
        return {"head": super().predict(theta, samples)}

    def memory_samples(self) -> Samples:
        return together(*(self.sets[key] for key in sorted(self.sets)))
