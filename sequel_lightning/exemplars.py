"""Exemplars: samples of each class, chosen by herding, and classification by the nearest of their means.

    y*(x) = argmin_c ||h(x) - mu_c||, mu_c the mean of h over the exemplars of class c

h is the network's last hidden layer; h(x), h of each exemplar and mu_c are scaled to unit length if
normalise_features is true. At the end of a task the memory is divided among the classes again
(`sequel_core.stream.exemplars.renewed_exemplars`). iCaRL uses these functions.

Mirror: sequel_flax/exemplars.py
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sequel_core.hparams import ExemplarHParams
from sequel_core.stream.arrays import FloatArray
from sequel_core.stream.exemplars import exemplar_means, joined_with_samples, renewed_exemplars
from sequel_core.stream.task import AnySplit, Batch, Samples
from sequel_lightning.module import ContinualModule
from sequel_lightning.networks import blank_input, check_features, evaluating
from sequel_lightning.objectives import Objective, check_classification
from sequel_lightning.replay import Memory, empty_memory, stored_samples
from sequel_lightning.trees import StateTree


def embed(module: Any, x: Tensor, normalise: bool) -> Tensor:
    """Return h of images `[B, D]` in evaluation mode; scaled to unit length, unless it is 0, to normalise."""
    with evaluating(module.net):
        features: Tensor = module.net.features(module.normalise(x)).to(module.means.dtype)
    if not normalise:
        return features
    norm = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    unit: Tensor = features / norm.where(norm > 0, 1)
    return unit


def nearest_mean(features: Tensor, means: Tensor, has_mean: Tensor) -> Tensor:
    """Return -||h - mu||^2 `[B, num_classes]`; for a class without a mean, the least number of the dtype."""
    squares = (features**2).sum(1, keepdim=True) + (means**2).sum(1)
    distance = squares - 2 * features @ means.T
    return (-distance).where(has_mean, torch.finfo(features.dtype).min)


def renew(
    module: ExemplarModule, batches: Iterable[Batch], hparams: ExemplarHParams
) -> tuple[Memory, Tensor, Tensor]:
    """Return the exemplars after a task, the means of classes, and which classes have a mean.

    The network has the weights at the end of the task, and the exemplars of past tasks. `batches` are those
    of the task, with each sample once.
    """
    images = module.preprocessing.images

    def embed_batch(x: Tensor) -> FloatArray:
        with torch.no_grad():
            features = embed(module, x, hparams.normalise_features).cpu()
        if features.dtype == torch.bfloat16:  # which NumPy does not have
            features = features.float()
        array: FloatArray = features.numpy()
        return array

    def embed_array(x: Any) -> FloatArray:
        inputs = np.moveaxis(x, -1, 1) if images else x
        return embed_batch(torch.from_numpy(inputs.copy()).to(module.means.device))

    def samples_of(batch: Batch) -> Samples:
        x, y, t = (a.cpu().numpy() for a in batch[:3])
        return Samples(np.moveaxis(x, 1, -1) if images else x, y, t)

    samples = renewed_exemplars(
        hparams,
        mask=module.needed_spec().mask,
        task=int(module.task_index),
        held=stored_samples(module.contents),
        candidates=((samples_of(batch), embed_batch(batch.x)) for batch in batches),
    )
    means, has_mean = exemplar_means(
        embed_array, samples, len(module.means), hparams.flip, hparams.normalise_features
    )
    x, y, t = map(torch.from_numpy, samples)
    return (
        Memory(x.movedim(-1, 1) if images else x, y, t, None),
        torch.from_numpy(means),
        torch.from_numpy(has_mean),
    )


def predict(module: ExemplarModule, x: Tensor, t: Tensor | None, hparams: ExemplarHParams) -> Tensor:
    """Return the nearest-mean scores, or the logits of the head for a task without means.

    The head also predicts during a task, because the means belong to the weights at its end.
    """
    if module.learned < 0 or module.learned != module.task_index:
        head: Tensor = module.forward(x, t)
        return head
    features = embed(module, x, hparams.normalise_features)
    near: Tensor = module.masked(nearest_mean(features, module.means, module.has_mean), t)
    mask = module.preprocessing.mask
    known = (module.has_mean[None] if mask is None else module.has_mean & mask[t]).any(1, keepdim=True)
    return near if known.all() else near.where(known, module.forward(x, t))


class ExemplarModule(ContinualModule):
    """A module that keeps exemplars, trains on them together with each task, and classifies by their means.

    Raises:
        ValueError: no spec; the network has no `features` or `head`; `mem_size` is less than the number of
            classes.
    """

    algorithm_hparams: ExemplarHParams
    means: Tensor
    has_mean: Tensor
    learned: Tensor
    objective_elsewhere = "exemplars"

    def check_objective(self, objective: Objective) -> None:
        """Raise ValueError if the objective is not about class labels."""
        super().check_objective(objective)
        check_classification(objective, self.algorithm_hparams.name)

    def check_net(self, net: nn.Module) -> None:
        """Raise ValueError if the network lacks `features` or `head`."""
        check_features(net, self.hparams_class.name)

    def init_memory(self) -> None:
        """Make the empty memory of exemplars, and no means."""
        super().init_memory()
        net: Any = self.net
        spec = self.needed_spec()
        memory = empty_memory(spec, self.algorithm_hparams.slots(int(spec.mask.sum())))
        self.exemplars = StateTree({"x": memory.x, "y": memory.y, "t": memory.t})
        like = next(net.parameters())
        image = blank_input(spec, like)
        with evaluating(net), torch.no_grad():
            width = net.features(image).shape[-1]
        self.register_buffer("means", like.new_zeros(spec.num_classes, width).detach())
        self.register_buffer("has_mean", torch.zeros(spec.num_classes, dtype=torch.bool))
        self.register_buffer("learned", torch.tensor(-1, dtype=torch.int32))
        # a user's loader may yield exemplars together with the task's samples
        self.preprocessing.allowed_labels = torch.from_numpy(spec.mask.cumsum(0) > 0)

    @property
    def contents(self) -> Memory:
        """The exemplars, set after set from the first slot on, each in herding order."""
        return Memory(**self.exemplars.get(), outputs=None)

    def end_task(self, batches: Iterable[Batch]) -> None:
        """Divide the memory among the classes again, and take the means with the new network."""
        memory, means, has_mean = renew(self, batches, self.algorithm_hparams)
        self.exemplars.set({"x": memory.x, "y": memory.y, "t": memory.t})
        self.means.copy_(means)
        self.has_mean.copy_(has_mean)
        self.learned.copy_(self.task_index)

    def predict(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        """Return the nearest-mean scores, or the logits of the head for a task without means."""
        return predict(self, x, t, self.algorithm_hparams)

    def alternatives(self, x: Tensor, t: Tensor | None = None) -> dict[str, Tensor]:
        """Return the logits of the head."""
        return {"head": self.forward(x, t)}

    def training_split(self, split: AnySplit) -> AnySplit:
        """Return the task's training samples and, after them, the exemplars."""
        return joined_with_samples(split, stored_samples(self.contents))
