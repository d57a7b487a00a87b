"""iCaRL in float64 NumPy, written from the paper (Rebuffi 2017, algorithms 1 to 5).

    L = -mean_n mean_c [q_nc log g_nc + (1 - q_nc) log(1 - g_nc)], g_nc = sigmoid(f(x_n))_c, c a seen class;
        q_nc = g_old(x_n)_c if only past tasks have class c, else [c = y_n]
    phi(x) = h(x) / |h(x)|
    herding  p_k = argmin_x |mu - (phi(x) + phi(p_1) + ... + phi(p_{k-1})) / k|, mu a class's mean phi
    predict  argmin_c |phi(x) - mu_c / |mu_c||, mu_c the mean of phi over the exemplars of c
    flip     mu_c is averaged with the same mean over mirror images (official code)

With normalise_features=False phi(x) = h(x), and mu_c is not scaled. Each class of each task has its own set
of exemplars.
"""

from __future__ import annotations

import numpy as np

from sequel_core.algorithms.icarl import ICaRLHParams
from sequel_core.stream.arrays import FloatArray
from sequel_core.stream.task import AnySplit, JoinedSplit, Samples, Split, Task
from tests.reference import network
from tests.reference.network import Weights
from tests.reference.streams import Reference, concatenate, rows


def herd(phi: FloatArray, count: int) -> list[int]:
    """Return the rows of phi `[n, H]` in the order of herding, at most `count`, each at most once."""
    mean, chosen = phi.mean(axis=0), list[int]()
    for k in range(1, min(count, len(phi)) + 1):
        distance = np.linalg.norm(mean - (phi + phi[chosen].sum(axis=0)) / k, axis=1)
        distance[chosen] = np.inf
        chosen.append(int(np.argmin(distance)))
    return chosen


def log_sigmoid(f: FloatArray) -> FloatArray:
    """Return log(1 / (1 + e^-f))."""
    return -np.logaddexp(0, -f)


class ICaRL(Reference):
    """Incremental classifier and representation learning."""

    hparams: ICaRLHParams

    task: int
    last_ended: int  # index of the last task that ended, -1 before the first
    old: Weights
    sets: dict[tuple[int, int], Samples]  # exemplars by task and class, in the order of herding
    means: dict[int, FloatArray]  # mu_c / |mu_c|

    def start(self, theta: Weights) -> None:
        self.last_ended, self.sets, self.means = -1, {}, {}

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
        d_logits = np.where(counted, np.exp(log_sigmoid(f)) - target, 0) / terms.size
        return float(terms.mean()), network.backward(theta, inputs, d_logits)

    def end_task(self, theta: Weights, task: Task) -> None:
        sets = int(self.benchmark.mask[: task.index + 1].sum())
        exact = self.hparams.mem_size / sets
        quota = int(np.ceil(exact) if self.hparams.quota == "ceil" else np.floor(exact))
        self.sets = {key: rows(exemplars, slice(quota)) for key, exemplars in self.sets.items()}
        order = self.consolidation_order(task)
        for c in task.classes:
            samples = task.train.take(order[task.train.targets[order] == c])
            chosen = herd(self.phi(theta, samples), quota)
            self.sets[task.index, c] = rows(samples, np.asarray(chosen))
        self.old, self.last_ended = theta, task.index
        self.means = {c: self.mean(theta, c) for c in sorted({c for _, c in self.sets})}

    def phi(self, theta: Weights, samples: Samples) -> FloatArray:
        """Return the features `[N, H]`, scaled to unit length unless they are all 0."""
        h = network.logits(theta, self.inputs(samples).x)[1][-1]
        if not self.hparams.normalise_features:
            return h
        lengths = np.linalg.norm(h, axis=1, keepdims=True)
        return np.asarray(np.divide(h, lengths, out=np.zeros_like(h), where=lengths > 0))

    def mean(self, theta: Weights, label: int) -> FloatArray:
        """Return the mean feature of the exemplars of a class, scaled to unit length, `[H]`."""
        samples = concatenate(*(self.sets[key] for key in sorted(self.sets) if key[1] == label))
        mean = self.phi(theta, samples).mean(axis=0)
        if self.hparams.flip:
            mean = (mean + self.phi(theta, samples._replace(x=samples.x[:, :, ::-1])).mean(axis=0)) / 2
        return np.asarray(mean / np.linalg.norm(mean)) if self.hparams.normalise_features else mean

    def predict(self, theta: Weights, samples: Samples) -> FloatArray:
        if self.last_ended != self.task:
            return super().predict(theta, samples)
        phi = self.phi(theta, samples)
        scores = np.full((len(phi), self.benchmark.num_classes), -np.inf)
        for c, mean in self.means.items():
            scores[:, c] = -((phi - mean) ** 2).sum(axis=1)
        return scores

    def alternatives(self, theta: Weights, samples: Samples) -> dict[str, FloatArray]:
        return {"head": super().predict(theta, samples)}

    def memory_samples(self) -> Samples:
        return concatenate(*(self.sets[key] for key in sorted(self.sets)))
