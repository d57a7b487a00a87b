"""Random crops and mirror images inside the step, as the plan has them.

Mirror: sequel_lightning/augmentation.py
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from sequel_core.stream.augmentation import AugmentedPlan, method_plan
from sequel_core.stream.task import Batch


def crop(x: jax.Array, crops: jax.Array) -> jax.Array:
    """Return images moved up and left by so many pixels, mirrored, black where there is nothing to see.

    Args:
        x: images `[N, H, W, C]`.
        crops: rows, columns, and 1 for a mirror image, int `[N, 3]`.
    """
    x = jnp.asarray(x)  # NumPy would not clip indices
    n, height, width, _ = x.shape
    rows = jnp.arange(height)[None] + crops[:, :1]
    place = jnp.arange(width)[None]
    columns = jnp.where(crops[:, 2:] == 1, width - 1 - place, place) + crops[:, 1:2]
    found = x[jnp.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]  # clipped to the image
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None]
    return jnp.where(inside[..., None], found, jnp.zeros((), x.dtype))


def cropped(batch: Batch) -> Batch:
    """Return the batch as the network is trained on it: its images cropped, its plan the method's own."""
    x = crop(batch.x, batch.plan.batch) if isinstance(batch.plan, AugmentedPlan) else batch.x
    return batch._replace(x=x, plan=method_plan(batch))


def without_draws(batch: Batch) -> Batch:
    """Return the batch with a plan that reads nothing from the memory."""
    own = method_plan(batch)
    own = own._replace(reads=own.reads[:0])
    if isinstance(batch.plan, AugmentedPlan):
        own = batch.plan._replace(plan=own, reads=batch.plan.reads[:0])
    return batch._replace(plan=own)


def cropped_draw(x: jax.Array, batch: Batch, k: Any) -> jax.Array:
    """Return the images of draw k from the memory `[R, H, W, C]`, cropped."""
    return crop(x, jnp.asarray(batch.plan.reads)[k]) if isinstance(batch.plan, AugmentedPlan) else x
