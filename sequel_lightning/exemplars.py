"""Exemplars: samples of each class, chosen by herding, and classification by the nearest of their means.

    y*(x) = argmin_c ||h(x) - mu_c||, mu_c the mean of h over the exemplars of class c

h is the network's last hidden layer; h(x), that of each exemplar, and mu_c have unit length. At the end of a
task the room is shared out anew (`sequel_core.stream.exemplars.renewed_exemplars`). iCaRL is built on it.

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
from sequel_lightning.networks import blank_image, check_features, evaluating
from sequel_lightning.replay import Memory, empty_memory, stored_samples
from sequel_lightning.trees import StateTree


def embed(module: Any, x: Tensor) -> Tensor:
    """Return h of images `[B, D]`, of unit length where it is not 0, in evaluation mode."""
    with evaluating(module.net):
        features = module.net.features(module.normalise(x)).to(module.means.dtype)
    norm = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    unit: Tensor = features / norm.where(norm > 0, 1)
    return unit


def nearest_mean(features: Tensor, means: Tensor, has_mean: Tensor) -> Tensor:
    """Return -||h - mu||^2 `[B, num_classes]`, the least number of the dtype for a class without a mean."""
    squares = features.square().sum(1, keepdim=True) + means.square().sum(1)
    distance = squares - 2 * features @ means.T
    return (-distance).where(has_mean, torch.finfo(features.dtype).min)


def renew(
    module: ExemplarModule, batches: Iterable[Batch], hparams: ExemplarHParams
) -> tuple[Memory, Tensor, Tensor]:
    """Return the exemplars at the end of a task, the means of classes, and which classes have one.

    Args: the network with its weights at the end of the task, what was kept before, batches of the task's
    samples, each sample once, and the settings.
    """

    def embed_batch(x: Tensor) -> FloatArray:
        with torch.no_grad():
            features = embed(module, x).cpu()
        if features.dtype == torch.bfloat16:  # which NumPy does not have
            features = features.float()
        array: FloatArray = features.numpy()
        return array

    def embed_array(x: Any) -> FloatArray:
        return embed_batch(torch.from_numpy(np.moveaxis(x, -1, 1).copy()).to(module.means.device))

    def samples_of(batch: Batch) -> Samples:
        x, y, t = (a.cpu().numpy() for a in batch[:3])
        return Samples(np.moveaxis(x, 1, -1), y, t)

    samples = renewed_exemplars(
        hparams,
        mask=module.classes.cpu().numpy(),
        task=int(module.task_index),
        held=stored_samples(module.held),
        candidates=((samples_of(batch), embed_batch(batch.x)) for batch in batches),
    )
    means, has_mean = exemplar_means(embed_array, samples, len(module.means), hparams.flip)
    x, y, t = map(torch.from_numpy, samples)
    return Memory(x.movedim(-1, 1), y, t, None), torch.from_numpy(means), torch.from_numpy(has_mean)


class ExemplarModule(ContinualModule):
    """A module that keeps exemplars, trains on them beside each task, and classifies by their means.

    Raises:
        ValueError: without a spec, a network without `features` or `head`, or less room than classes.
    """

    algorithm_hparams: ExemplarHParams
    means: Tensor
    has_mean: Tensor
    learned: Tensor
    classes: Tensor

    def check_net(self, net: nn.Module) -> None:
        """Raise ValueError if the network lacks `features` or `head`."""
        check_features(net, self.hparams_class.name)

    def init_memory(self) -> None:
        """Make the empty memory of exemplars, and no means."""
        super().init_memory()
        net: Any = self.net
        spec = self.needed_spec()
        memory = empty_memory(spec, self.algorithm_hparams.slots(int(spec.mask.sum())), None)
        self.exemplars = StateTree({"x": memory.x, "y": memory.y, "t": memory.t})
        like = next(net.parameters())
        image = blank_image(spec, like)
        with evaluating(net), torch.no_grad():
            width = net.features(image).shape[-1]
        self.register_buffer("means", like.new_zeros(spec.num_classes, width).detach())
        self.register_buffer("has_mean", torch.zeros(spec.num_classes, dtype=torch.bool))
        self.register_buffer("learned", torch.tensor(-1, dtype=torch.int32))
        self.register_buffer("classes", torch.from_numpy(spec.mask.copy()), persistent=False)
        # a user's loader may yield exemplars together with the task's samples
        self.preprocessing.allowed_labels = self.classes.cumsum(0) > 0

    @property
    def held(self) -> Memory:
        """The exemplars, set after set from the first slot on, each in herding order."""
        return Memory(**self.exemplars.get(), logits=None)

    def end_task(self, batches: Iterable[Batch]) -> None:
        """Share out the room anew, and take the means with the new network."""
        memory, means, has_mean = renew(self, batches, self.algorithm_hparams)
        self.exemplars.set({"x": memory.x, "y": memory.y, "t": memory.t})
        self.means.copy_(means)
        self.has_mean.copy_(has_mean)
        self.learned.copy_(self.task_index)

    def predict(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        """Return minus the squared distances from the means; the head's logits where there are none."""
        if self.learned < 0 or self.learned != self.task_index:
            return self.forward(x, t)
        near = self.masked(nearest_mean(embed(self, x), self.means, self.has_mean), t)
        mask = self.preprocessing.mask
        known = (self.has_mean[None] if mask is None else self.has_mean & mask[t]).any(1, keepdim=True)
        return near if known.all() else near.where(known, self.forward(x, t))

    def alternatives(self, x: Tensor, t: Tensor | None = None) -> dict[str, Tensor]:
        """Return the logits of the head."""
        return {"head": self.forward(x, t)}

    def training_split(self, split: AnySplit) -> AnySplit:
        """Return the task's training samples and, after them, the exemplars."""
        return joined_with_samples(split, stored_samples(self.held))
