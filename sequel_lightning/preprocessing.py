"""Preprocessing: the normalisation of images, and the masks of logits in the task scenario."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sequel_core.stream.benchmark import StreamSpec
from sequel_core.stream.task import Batch
from sequel_core.stream.trees import Tree, tree_map
from sequel_lightning._compat import buffers_of
from sequel_lightning.batches import check_leaves
from sequel_lightning.objectives import map_outputs, output_leaf


class Preprocessing(nn.Module):
    """What a stream's spec says about inputs and outputs; the tensors move with the module that has it.

    Args:
        spec: of the stream; None if nothing is normalised, masked or checked.
        like: a weight of the network, for the dtype of normalised images.
        name: of the method, for errors.
        classification: whether the objective is about class labels, so that the network returns logits.
    """

    classes: Tensor | None  # the classes of each task in every scenario, bool [T, num_classes]
    allowed_labels: Tensor | None  # the labels that samples of each task may have, bool [T, num_classes]
    mask: Tensor | None  # the classes of each task, bool [T, num_classes]; None if logits are not masked
    scale: Tensor | None  # of uint8 images, [C, 1, 1], in the dtype of the weights
    shift: Tensor | None  # of uint8 images, [C, 1, 1]

    def __init__(self, spec: StreamSpec | None, like: Tensor, name: str, classification: bool = True) -> None:
        super().__init__()
        self.name = name
        self.classification = classification
        self.labelled = classification if spec is None else spec.labelled
        self.spec = spec
        self.images = spec is not None and spec.images
        self.checks_leaves = spec is not None and not (spec.images and spec.labelled)
        for attribute in ("scale", "shift"):
            value = None
            if spec is not None:
                value = torch.as_tensor(getattr(spec.normalisation, attribute), dtype=like.dtype)
                value = value.reshape(-1, 1, 1)
            self.register_buffer(attribute, value, persistent=False)
        labels = None if spec is None else torch.from_numpy(spec.groups)
        self.register_buffer("allowed_labels", labels, persistent=False)
        classes = None if spec is None else torch.from_numpy(spec.mask.copy())
        self.register_buffer("classes", classes, persistent=False)
        mask = labels if spec is not None and spec.masks_logits and classification else None
        self.register_buffer("mask", mask, persistent=False)

    def check_leaves(self, batch: Batch) -> None:
        """Raise ValueError unless the arrays of a batch have the shapes and dtypes of the spec.

        Images may also be floats that are normalised already, and labels any integers.
        """
        if self.spec is not None and self.checks_leaves:
            if not self.images:
                check_leaves(batch.x, self.spec.x, "x")
            if not self.labelled:
                check_leaves(batch.y, self.spec.y, "y")

    def normalise(self, x: Tree) -> Any:
        """Return inputs as the network takes them.

        uint8 images become `(x / 255 - mean) / std` in the dtype of the weights. Floats are cast to that
        dtype. Other integers (tokens, indices) and booleans stay as they are. Without a spec nothing is
        changed.
        """
        buffers = buffers_of(self)  # three times as fast as an attribute, at every step
        scale, shift = buffers["scale"], buffers["shift"]
        if scale is None or shift is None:
            return x
        if isinstance(x, Tensor):
            if x.dtype == torch.uint8 and self.images:
                return x.to(scale.dtype).mul_(scale).add_(shift)
            return x.to(scale.dtype) if x.is_floating_point() else x
        return tree_map(lambda a: a.to(scale.dtype) if a.is_floating_point() else a, x)

    def masked(self, outputs: Any, t: Tensor | None) -> Any:
        """Return the outputs; logits `[B, num_classes]` are masked to the tasks `[B]` in the task scenario.

        Raises:
            ValueError: t is None in the task scenario, or logits or task indices have another shape.
        """
        if not self.classification:
            return outputs
        mask = buffers_of(self)["mask"]
        if mask is not None:
            t = self.needed_tasks(t)
        logits = outputs if isinstance(outputs, Tensor) else output_leaf(outputs)
        check_logits(logits, t, mask)
        return outputs if mask is None else mask_outputs(outputs, mask[t])

    def needed_tasks(self, t: Tensor | None) -> Tensor:
        """Return the task index of each sample, for logits that depend on it.

        Raises:
            ValueError: t is None.
        """
        if t is None:
            raise ValueError(
                f"{self.name} needs the task index of each sample here, because the logits depend on it, got "
                "t=None; call module(x, t), or predict from batches (x, y, t)"
            )
        return t


def mask_logits(logits: Tensor, mask: Tensor) -> Tensor:
    """Return the logits `[B, num_classes]`, with the lowest number of their dtype at masked classes.

    Args:
        logits: of all classes.
        mask: bool, True for the classes that are kept; it broadcasts to the logits.
    """
    return logits.masked_fill(~mask, torch.finfo(logits.dtype).min)


def mask_outputs(outputs: Any, mask: Tensor) -> Any:
    """Return what a network returns, with its logits masked; see `mask_logits`."""
    if isinstance(outputs, Tensor):
        return mask_logits(outputs, mask)
    logits = output_leaf(outputs)
    return map_outputs(lambda a: mask_logits(a, mask) if a is logits else a, outputs)


def check_logits(logits: Any, t: Any, mask: Tensor | None) -> None:
    """Raise ValueError unless logits are `[B, num_classes]` and t `[B]`; `mask` is that of the stream."""
    shape: tuple[int, ...] = getattr(logits, "shape", ())
    if len(shape) == 2 and (mask is None or (t.shape == shape[:1] and shape[1] == mask.shape[1])):
        return
    logits_text, t_text = (list(getattr(a, "shape", ())) or type(a).__name__ for a in (logits, t))
    classes = "num_classes" if mask is None else mask.shape[1]
    raise ValueError(
        f"the network must return one row of logits for each sample, [B, {classes}], for task indices t [B]; "
        f"got logits {logits_text} and t {t_text}; reduce a sequence to one prediction in the network (its "
        "mean or its last position), and give one task index for each sample"
    )
