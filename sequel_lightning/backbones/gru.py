"""Gated recurrent units for token ids (Cho et al. 2014, https://arxiv.org/abs/1406.1078).

As in torch and cuDNN, the reset gate is applied after the product with the state:

    r = sigmoid(W_r x + U_r h), z = sigmoid(W_z x + U_z h), n = tanh(W_n x + r * (U_n h)), each with biases
    h <- (1 - z) * n + z * h, or unchanged at padding
    outputs = head(h), of each token or of the last one

Mirror: sequel_flax/backbones/gru.py.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sequel_core.backbones import GRUHParams
from sequel_lightning.backbones.transformer import valid_tokens


def next_state(state: Tensor, inputs: Tensor, recurrent: Tensor) -> Tensor:
    """Return the state after a token, `[B, D]`.

    Args:
        state: h, the state before it, `[B, D]`.
        inputs: W_r x, W_z x and W_n x with their biases, `[B, 3 D]`.
        recurrent: U_r h, U_z h and U_n h with their biases, `[B, 3 D]`.
    """
    (r_x, z_x, n_x), (r_h, z_h, n_h) = (part.chunk(3, dim=1) for part in (inputs, recurrent))
    r, z = torch.sigmoid(r_x + r_h), torch.sigmoid(z_x + z_h)
    n = torch.tanh(n_x + r * n_h)
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
        >>> import torch
        >>> from sequel_lightning import GRU
        >>> GRU(per_token=True)(torch.zeros((2, 8), dtype=torch.int64)).shape
        torch.Size([2, 8, 10])
    """

    def __init__(
        self,
        vocab_size: int = 256,
        hidden_size: int = 64,
        num_layers: int = 1,
        num_classes: int = 10,
        per_token: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.settings = GRUHParams(vocab_size, hidden_size, num_layers, dropout)
        self.per_token = per_token
        self.token_embedding = nn.Embedding(vocab_size, hidden_size)
        for i in range(num_layers):
            self.add_module(f"input_{i}", nn.Linear(hidden_size, 3 * hidden_size))
            self.add_module(f"recurrent_{i}", nn.Linear(hidden_size, 3 * hidden_size))
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(hidden_size, num_classes)

    def features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the last hidden layer: `[B, D]`, the last state, or all states `[B, L, D]`, 0 at padding."""
        valid = valid_tokens(input_ids, attention_mask)[..., None]
        h: Tensor = self.token_embedding(input_ids.long())
        for i in range(self.settings.num_layers):
            inputs = self.get_submodule(f"input_{i}")(h)
            layer = self.get_submodule(f"recurrent_{i}")
            state = torch.zeros_like(h[:, 0])
            states = []
            for token, is_valid in zip(inputs.unbind(1), valid.unbind(1), strict=True):
                state = torch.where(is_valid, next_state(state, token, layer(state)), state)
                states.append(state)
            h = self.drop(torch.stack(states, 1))
        return h.masked_fill(~valid, 0) if self.per_token else h[:, -1]

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return outputs `[B, num_classes]`, or `[B, L, num_classes]`, of token ids `[B, L]`.

        Args:
            input_ids: Integers in [0, vocab_size), `[B, L]`.
            attention_mask: 0 at padding, `[B, L]`; None if there is none.
        """
        outputs: Tensor = self.head(self.features(input_ids, attention_mask))
        return outputs
