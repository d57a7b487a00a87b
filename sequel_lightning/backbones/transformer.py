"""Transformer encoder for token ids (Vaswani et al. 2017), normalised first (Xiong et al. 2020).

    attention(q, k, v) = softmax(q k^T / sqrt(d) + M) v, M = -inf at tokens that a token does not attend to
    h <- token_embedding(ids) + position_embedding(0, 1, ...)
    h <- h + output([attention of each head of norm(h)])        for each block
    h <- h + contract(gelu(expand(norm(h))))
    outputs = head(norm(h)), of each token or of the mean over the tokens

Papers: https://arxiv.org/abs/1706.03762 and https://arxiv.org/abs/2002.04745

Mirror: sequel_flax/backbones/transformer.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sequel_core.backbones import TransformerHParams


def valid_tokens(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Return which tokens are not padding, bool `[B, L]`."""
    return torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask != 0


def attended(valid: Tensor, causal: bool) -> Tensor:
    """Return which tokens each token attends to, bool `[B, 1, 1, L]`, or `[B, 1, L, L]` if causal."""
    mask = valid[:, None, None, :]
    length = valid.shape[1]
    return (
        mask & torch.ones((length, length), dtype=torch.bool, device=mask.device).tril() if causal else mask
    )


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(d)) v over the tokens of the mask, `[B, H, L, d]`.

    Args:
        query: `[B, H, L, d]`, for H heads of d units.
        key: `[B, H, L, d]`.
        value: `[B, H, L, d]`.
        mask: see `attended`.
    """
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    outputs: Tensor = scores.softmax(-1) @ value
    return outputs


class EncoderBlock(nn.Module):
    """Attention and feed-forward layers, each after a layer normalisation and added to its input.

    Args:
        hidden_size: Units of each token.
        num_heads: Attention heads; it divides hidden_size.
        feed_forward_size: Hidden units of the feed-forward layers.
        dropout: Probability of dropping an output unit of both parts, in [0, 1).
    """

    def __init__(self, hidden_size: int, num_heads: int, feed_forward_size: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_0, self.norm_1 = nn.LayerNorm(hidden_size), nn.LayerNorm(hidden_size)
        self.query, self.key, self.value, self.output = (
            nn.Linear(hidden_size, hidden_size) for _ in range(4)
        )
        self.expand = nn.Linear(hidden_size, feed_forward_size)
        self.contract = nn.Linear(feed_forward_size, hidden_size)
        self.drop = nn.Dropout(dropout)

    def forward(self, h: Tensor, mask: Tensor) -> Tensor:
        """Return hidden units `[B, L, D]` of hidden units `[B, L, D]`; mask: see `attended`."""
        x = self.norm_0(h)
        query, key, value = (self._heads(layer(x)) for layer in (self.query, self.key, self.value))
        x = attention(query, key, value, mask).transpose(1, 2).flatten(2)
        h = h + self.drop(self.output(x))
        x = self.contract(F.gelu(self.expand(self.norm_1(h))))
        outputs: Tensor = h + self.drop(x)
        return outputs

    def _heads(self, x: Tensor) -> Tensor:
        """Return `[B, L, D]` as `[B, H, L, d]`."""
        heads: Tensor = x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        return heads


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
        >>> import torch
        >>> from sequel_lightning import Transformer
        >>> Transformer(per_token=True)(torch.zeros((2, 8), dtype=torch.int64)).shape
        torch.Size([2, 8, 10])
    """

    def __init__(
        self,
        vocab_size: int = 256,
        max_length: int = 128,
        hidden_size: int = 64,
        num_layers: int = 2,
        num_heads: int = 4,
        feed_forward_size: int = 128,
        causal: bool = True,
        num_classes: int = 10,
        per_token: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.settings = TransformerHParams(
            vocab_size, max_length, hidden_size, num_layers, num_heads, feed_forward_size, causal, dropout
        )
        self.per_token = per_token
        self.token_embedding = nn.Embedding(vocab_size, hidden_size)
        self.position_embedding = nn.Embedding(max_length, hidden_size)
        for i in range(num_layers):
            self.add_module(f"block_{i}", EncoderBlock(hidden_size, num_heads, feed_forward_size, dropout))
        self.norm = nn.LayerNorm(hidden_size)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(hidden_size, num_classes)

    def features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the last hidden layer: `[B, D]`, the mean over tokens, or `[B, L, D]`, 0 at padding."""
        length, longest = input_ids.shape[1], self.settings.max_length
        if length > longest:
            raise ValueError(f"max_length must be >= the {length} tokens of a sequence, got {longest}")
        valid = valid_tokens(input_ids, attention_mask)
        mask = attended(valid, self.settings.causal)
        positions = torch.arange(length, device=input_ids.device)
        h = self.token_embedding(input_ids.long()) + self.position_embedding(positions)
        h = self.drop(h)
        for i in range(self.settings.num_layers):
            h = self.get_submodule(f"block_{i}")(h, mask)
        features: Tensor = self.norm(h).masked_fill(~valid[..., None], 0)
        return features if self.per_token else features.sum(1) / valid.sum(1, keepdim=True).clamp(min=1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return outputs `[B, num_classes]`, or `[B, L, num_classes]`, of token ids `[B, L]`.

        Args:
            input_ids: Integers in [0, vocab_size), `[B, L]`.
            attention_mask: 0 at padding, `[B, L]`; None if there is none.
        """
        outputs: Tensor = self.head(self.features(input_ids, attention_mask))
        return outputs
