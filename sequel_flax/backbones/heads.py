"""Last layers of the built-in networks.

    linear: z_c = w_c . h + b_c
    cosine: z_c = 10 cos(w_c, h), without a bias

Mirror: sequel_lightning/backbones/heads.py
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

SCALE = 10.0
EPS = 1e-12


def unit(a: jax.Array, axis: int) -> jax.Array:
    """Return vectors along an axis, scaled to unit length; a vector of zeros stays one."""
    return a * jax.lax.rsqrt((a * a).sum(axis, keepdims=True) + EPS)


class CosineLinear(nn.Module):
    """Ten times the cosines of the angles between features and the weights of each class."""

    num_classes: int

    @nn.compact
    def __call__(self, h: jax.Array) -> jax.Array:
        """Return logits `[B, num_classes]` of features `[B, D]`."""
        shape = (h.shape[-1], self.num_classes)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        return SCALE * jnp.matmul(unit(h, -1), unit(kernel, 0))


CLASSIFIERS: dict[str, type[nn.Module]] = {"linear": nn.Dense, "cosine": CosineLinear}
