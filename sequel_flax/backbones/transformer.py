"""Transformer encoder for token ids (Vaswani et al. 2017), normalised first (Xiong et al. 2020).

    attention(q, k, v) = softmax(q k^T / sqrt(d) + M) v, M = -inf at tokens that a token does not attend to
    h <- token_embedding(ids) + position_embedding(0, 1, ...)
    h <- h + output([attention of each head of norm(h)])        for each block
    h <- h + contract(gelu(expand(norm(h))))
    outputs = head(norm(h)), of each token or of the mean over the tokens

Papers: https://arxiv.org/abs/1706.03762 and https://arxiv.org/abs/2002.04745

Mirror: sequel_lightning/backbones/transformer.py.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn

from sequel_core.backbones import TransformerHParams

layer_norm = partial(nn.LayerNorm, epsilon=1e-5, use_fast_variance=False)
"""Layer normalisation as in torch."""


def valid_tokens(input_ids: jax.Array, attention_mask: jax.Array | None) -> jax.Array:
    """Return which tokens are not padding, bool `[B, L]`."""
    return jnp.ones(input_ids.shape, bool) if attention_mask is None else attention_mask != 0


def attended(valid: jax.Array, causal: bool) -> jax.Array:
    """Return which tokens each token attends to, bool `[B, 1, 1, L]`, or `[B, 1, L, L]` if causal."""
    mask = valid[:, None, None, :]
    return mask & jnp.tri(valid.shape[1], dtype=bool)[None, None] if causal else mask


def attention(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> jax.Array:
    """Return softmax(q k^T / sqrt(d)) v over the tokens of the mask, `[B, H, L, d]`.

    Args:
        query: `[B, H, L, d]`, for H heads of d units.
        key: `[B, H, L, d]`.
        value: `[B, H, L, d]`.
        mask: see `attended`.
    """
    scores = query @ key.swapaxes(-1, -2) / query.shape[-1] ** 0.5
    scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    return nn.softmax(scores) @ value


class EncoderBlock(nn.Module):
    """Attention and feed-forward layers, each after a layer normalisation and added to its input.

    Args:
        hidden_size: Units of each token.
        num_heads: Attention heads; it divides hidden_size.
        feed_forward_size: Hidden units of the feed-forward layers.
        dropout: Probability of dropping an output unit of both parts, in [0, 1).
    """

    hidden_size: int
    num_heads: int
    feed_forward_size: int
    dropout: float

    def setup(self) -> None:
        """Create the layers, with the names of the Lightning network."""
        self.norm_0, self.norm_1 = layer_norm(), layer_norm()
        self.query, self.key, self.value, self.output = (nn.Dense(self.hidden_size) for _ in range(4))
        self.expand, self.contract = nn.Dense(self.feed_forward_size), nn.Dense(self.hidden_size)
        self.drop = nn.Dropout(self.dropout)

    def __call__(self, h: jax.Array, mask: jax.Array, train: bool = False) -> jax.Array:
        """Return hidden units `[B, L, D]` of hidden units `[B, L, D]`; mask: see `attended`."""
        x = self.norm_0(h)
        query, key, value = (self._heads(layer(x)) for layer in (self.query, self.key, self.value))
        x = attention(query, key, value, mask).swapaxes(1, 2).reshape(h.shape)
        h = h + self.drop(self.output(x), deterministic=not train)
        x = self.contract(nn.gelu(self.expand(self.norm_1(h)), approximate=False))
        outputs: jax.Array = h + self.drop(x, deterministic=not train)
        return outputs

    def _heads(self, x: jax.Array) -> jax.Array:
        """Return `[B, L, D]` as `[B, H, L, d]`."""
        return x.reshape(*x.shape[:2], self.num_heads, -1).swapaxes(1, 2)


class Transformer(nn.Module):
    """A transformer encoder with learned positions and a linear head; see `sequel_core.TransformerHParams`.

    Padding is what `attention_mask` has as 0. It changes neither the other tokens nor the mean over tokens.

    Args:
        vocab_size: Number of different token ids.
        max_length: Largest number of tokens of a sequence.
        hidden_size: Units of each token.
        num_layers: Number of blocks.
        num_heads: Attention heads; it divides hidden_size.
        feed_forward_size: Hidden units of the feed-forward layers.
        causal: Whether a token attends only to itself and to earlier tokens.
        num_classes: Number of outputs.
        per_token: Whether there are outputs for each token, rather than for the sequence.
        dropout: Probability of dropping a unit, in [0, 1).

    Raises:
        ValueError: A setting is out of range, or a sequence is longer than max_length.

    Example:
        >>> import jax.numpy as jnp
        >>> model, ids = Transformer(per_token=True), jnp.zeros((2, 8), int)
        >>> model.init_with_output(jax.random.key(0), ids)[0].shape
        (2, 8, 10)
    """

    vocab_size: int = 256
    max_length: int = 128
    hidden_size: int = 64
    num_layers: int = 2
    num_heads: int = 4
    feed_forward_size: int = 128
    causal: bool = True
    num_classes: int = 10
    per_token: bool = False
    dropout: float = 0.0

    def setup(self) -> None:
        """Create the layers, with the names of the Lightning network."""
        TransformerHParams(**{name: getattr(self, name) for name in TransformerHParams().arguments()})
        self.token_embedding = nn.Embed(self.vocab_size, self.hidden_size)
        self.position_embedding = nn.Embed(self.max_length, self.hidden_size)
        for i in range(self.num_layers):
            block = EncoderBlock(self.hidden_size, self.num_heads, self.feed_forward_size, self.dropout)
            setattr(self, f"block_{i}", block)
        self.norm = layer_norm()
        self.drop = nn.Dropout(self.dropout)
        self.head = nn.Dense(self.num_classes)

    def features(
        self, input_ids: jax.Array, attention_mask: jax.Array | None = None, train: bool = False
    ) -> jax.Array:
        """Return the last hidden layer: `[B, D]`, the mean over tokens, or `[B, L, D]`, 0 at padding."""
        length = input_ids.shape[1]
        if length > self.max_length:
            raise ValueError(
                f"max_length must be >= the {length} tokens of a sequence, got {self.max_length}"
            )
        valid = valid_tokens(input_ids, attention_mask)
        mask = attended(valid, self.causal)
        h = self.token_embedding(input_ids) + self.position_embedding(jnp.arange(length)[None])
        h = self.drop(h, deterministic=not train)
        for i in range(self.num_layers):
            h = getattr(self, f"block_{i}")(h, mask, train)
        features = jnp.where(valid[..., None], self.norm(h), 0)
        return features if self.per_token else features.sum(1) / jnp.maximum(valid.sum(1, keepdims=True), 1)

    def __call__(
        self, input_ids: jax.Array, attention_mask: jax.Array | None = None, train: bool = False
    ) -> jax.Array:
        """Return outputs `[B, num_classes]`, or `[B, L, num_classes]`, of token ids `[B, L]`.

        Args:
            input_ids: Integers in [0, vocab_size), `[B, L]`.
            attention_mask: 0 at padding, `[B, L]`; None if there is none.
            train: Whether to drop units.
        """
        outputs: jax.Array = self.head(self.features(input_ids, attention_mask, train))
        return outputs
