"""Gated recurrent units for token ids (Cho et al. 2014, https://arxiv.org/abs/1406.1078).

As in torch and cuDNN, the reset gate is applied after the product with the state:

    r = sigmoid(W_r x + U_r h), z = sigmoid(W_z x + U_z h), n = tanh(W_n x + r * (U_n h)), each with biases
    h <- (1 - z) * n + z * h, or unchanged at padding
    outputs = head(h), of each token or of the last one

Mirror: sequel_lightning/backbones/gru.py.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from sequel_core.backbones import GRUHParams
from sequel_flax.backbones.transformer import valid_tokens


def next_state(state: jax.Array, inputs: jax.Array, recurrent: jax.Array) -> jax.Array:
    """Return the state after a token, `[B, D]`.

    Args:
        state: h, the state before it, `[B, D]`.
        inputs: W_r x, W_z x and W_n x with their biases, `[B, 3 D]`.
        recurrent: U_r h, U_z h and U_n h with their biases, `[B, 3 D]`.
    """
    (r_x, z_x, n_x), (r_h, z_h, n_h) = (jnp.split(part, 3, axis=1) for part in (inputs, recurrent))
    r, z = nn.sigmoid(r_x + r_h), nn.sigmoid(z_x + z_h)
    n = jnp.tanh(n_x + r * n_h)
    return (1 - z) * n + z * state


class GRU(nn.Module):
    """Recurrent layers on embedded tokens and a linear head; see `sequel_core.GRUHParams`.

    Padding is what `attention_mask` has as 0. It does not change the state.

    Args:
        vocab_size: Number of different token ids.
        hidden_size: Units of the embedding and of each layer.
        num_layers: Number of recurrent layers.
        num_classes: Number of outputs.
        per_token: Whether there are outputs for each token, rather than for the sequence.
        dropout: Probability of dropping an output unit of each layer, in [0, 1).

    Raises:
        ValueError: A setting is out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> model, ids = GRU(per_token=True), jnp.zeros((2, 8), int)
        >>> model.init_with_output(jax.random.key(0), ids)[0].shape
        (2, 8, 10)
    """

    vocab_size: int = 256
    hidden_size: int = 64
    num_layers: int = 1
    num_classes: int = 10
    per_token: bool = False
    dropout: float = 0.0

    def setup(self) -> None:
        """Create the layers, with the names of the Lightning network."""
        GRUHParams(**{name: getattr(self, name) for name in GRUHParams().arguments()})
        self.token_embedding = nn.Embed(self.vocab_size, self.hidden_size)
        for i in range(self.num_layers):
            setattr(self, f"input_{i}", nn.Dense(3 * self.hidden_size))
            setattr(self, f"recurrent_{i}", nn.Dense(3 * self.hidden_size))
        self.drop = nn.Dropout(self.dropout)
        self.head = nn.Dense(self.num_classes)

    def features(
        self, input_ids: jax.Array, attention_mask: jax.Array | None = None, train: bool = False
    ) -> jax.Array:
        """Return the last hidden layer: `[B, D]`, the last state, or all states `[B, L, D]`, 0 at padding."""
        valid = valid_tokens(input_ids, attention_mask)

        def step(
            layer: nn.Dense, state: jax.Array, token: tuple[jax.Array, jax.Array]
        ) -> tuple[jax.Array, jax.Array]:
            inputs, is_valid = token
            state = jnp.where(is_valid[:, None], next_state(state, inputs, layer(state)), state)
            return state, state

        scan = nn.scan(step, variable_broadcast="params", split_rngs={"params": False}, in_axes=1, out_axes=1)
        h = self.token_embedding(input_ids)
        for i in range(self.num_layers):
            inputs = getattr(self, f"input_{i}")(h)
            state = jnp.zeros_like(h[:, 0])
            _, h = scan(getattr(self, f"recurrent_{i}"), state, (inputs, valid))
            h = self.drop(h, deterministic=not train)
        return jnp.where(valid[..., None], h, 0) if self.per_token else h[:, -1]

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
