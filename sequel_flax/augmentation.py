"""Random crops and horizontal flips in the training step, as decided by the plan.

Mirror: sequel_lightning/augmentation.py
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from sequel_core.stream.augmentation import AugmentedPlan, method_plan
from sequel_core.stream.task import Batch


def crop(x: jax.Array, crops: jax.Array) -> jax.Array:
    """Shift images, flip some of them horizontally, and pad with zeros.

    Args:
        x: Images `[N, H, W, C]`.
        crops: int `[N, 3]`: the number of rows and of columns by which each image moves up and left, and 1 if
            it is flipped.

    Returns:
        Images `[N, H, W, C]`.

    Example:
        >>> x = jnp.array([[1, 2], [3, 4]]).reshape(1, 2, 2, 1)
        >>> crop(x, jnp.array([[1, 0, 1]]))[0, ..., 0].tolist()
        [[4, 3], [0, 0]]
    """
    x = jnp.asarray(x)  # NumPy would not clip indices
    n, height, width, _ = x.shape
    rows = jnp.arange(height)[None] + crops[:, :1]
    column = jnp.arange(width)[None]
    columns = jnp.where(crops[:, 2:] == 1, width - 1 - column, column) + crops[:, 1:2]
    pixels = x[jnp.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]  # clipped to the image
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None]
    return jnp.where(inside[..., None], pixels, jnp.zeros((), x.dtype))


def cropped(batch: Batch) -> Batch:
    """Return the batch with cropped images and the plan of the method.

    Args:
        batch: A batch; if its plan has no crops, the images are unchanged.

    Returns:
        The batch that the network is trained on.

    Example:
        >>> batch = Batch(jnp.zeros((1, 2, 2, 1)), jnp.zeros(1, int), jnp.zeros(1, int))
        >>> cropped(batch).x.shape
        (1, 2, 2, 1)
    """
    x = crop(batch.x, batch.plan.batch) if isinstance(batch.plan, AugmentedPlan) else batch.x
    return batch._replace(x=x, plan=method_plan(batch))


def without_draws(batch: Batch) -> Batch:
    """Return the batch with a plan that reads nothing from the memory.

    Args:
        batch: A batch whose plan reads from the memory.

    Returns:
        The batch with a plan without reads.

    Example:
        >>> from sequel_core.stream.memory import StepPlan
        >>> plan = StepPlan(write=jnp.zeros(2, int), reads=jnp.zeros((1, 4), int), position=None)
        >>> without_draws(Batch(None, None, None, plan)).plan.reads.shape
        (0, 4)
    """
    plan = method_plan(batch)
    plan = plan._replace(reads=plan.reads[:0])
    if isinstance(batch.plan, AugmentedPlan):
        plan = batch.plan._replace(plan=plan, reads=batch.plan.reads[:0])
    return batch._replace(plan=plan)


def cropped_draw(x: jax.Array, batch: Batch, k: Any) -> jax.Array:
    """Return the images of one draw from the memory, cropped as the plan says.

    Args:
        x: Images `[R, H, W, C]`.
        batch: The batch whose plan has the crops.
        k: The index of the draw.

    Returns:
        Images `[R, H, W, C]`.

    Example:
        >>> batch = Batch(None, None, None)
        >>> cropped_draw(jnp.zeros((3, 2, 2, 1)), batch, 0).shape  # a plan without crops
        (3, 2, 2, 1)
    """
    return crop(x, jnp.asarray(batch.plan.reads)[k]) if isinstance(batch.plan, AugmentedPlan) else x
