"""Random crops and flips within the training step, as planned.

Mirror: sequel_flax/augmentation.py
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sequel_core.stream.augmentation import AugmentedPlan, method_plan
from sequel_core.stream.task import Batch


def crop(x: Tensor, crops: Any) -> Tensor:
    """Return images moved up and left by so many pixels, mirrored, black where there is nothing to see.

    Args:
        x: images `[N, C, H, W]`.
        crops: rows, columns, and 1 for a mirror image, int `[N, 3]`.
    """
    crops = torch.as_tensor(crops, device=x.device)
    n, _, height, width = x.shape
    rows = torch.arange(height, device=x.device)[None] + crops[:, :1]
    place = torch.arange(width, device=x.device)[None]
    columns = torch.where(crops[:, 2:] == 1, width - 1 - place, place) + crops[:, 1:2]
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None]
    rows, columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
    sample = torch.arange(n, device=x.device)[:, None, None]
    pixels = x.movedim(1, -1)[sample, rows[:, :, None], columns[:, None]]
    return pixels.mul_(inside[..., None]).movedim(-1, 1)


def cropped(batch: Batch) -> Batch:
    """Return the batch as the network is trained on it: its images cropped, its plan the method's own."""
    if not isinstance(batch.plan, AugmentedPlan):
        return batch
    return batch._replace(x=crop(batch.x, batch.plan.batch), plan=method_plan(batch))


def cropped_draw(x: Tensor, batch: Batch, k: Any) -> Tensor:
    """Return the images of draw k from the memory `[R, C, H, W]`, cropped; R may be less than asked for."""
    return crop(x, batch.plan.reads[k][: len(x)]) if isinstance(batch.plan, AugmentedPlan) else x
