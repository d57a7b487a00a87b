"""The transformer and the gated recurrent units in float64 NumPy, one sample at a time.

Vaswani et al. 2017 (https://arxiv.org/abs/1706.03762), equation 1 and section 3.2.2, with d = D / H:

    attention(Q, K, V) = softmax(Q K^T / sqrt(d)) V; the heads are concatenated and multiplied by W_O
    FFN(x) = W_2 gelu(W_1 x + b_1) + b_2, with the gelu of Hendrycks & Gimpel 2016

Xiong et al. 2020 (https://arxiv.org/abs/2002.04745), table 1, pre-LN: x <- x + f(LN(x)), and LN at the end.
LN(x) = (x - mean) / sqrt(var + 1e-5) * scale + bias (Ba et al. 2016).

Cho et al. 2014 (https://arxiv.org/abs/1406.1078), equations 5 to 8, with the reset after the product as in
cuDNN:

    r = sigmoid(W_r x + U_r h), z = sigmoid(W_z x + U_z h)
    h <- (1 - z) * tanh(W_n x + r * (U_n h)) + z * h

Padding is left out here, rather than masked.
"""

from __future__ import annotations

import numpy as np
from scipy.special import erf, expit

from sequel_core.stream.arrays import BoolArray, FloatArray, IntArray
from tests.reference.network import Weights


def dense(weights: Weights, name: str, x: FloatArray) -> FloatArray:
    return x @ weights[f"{name}/kernel"] + weights[f"{name}/bias"]


def layer_norm(weights: Weights, name: str, x: FloatArray) -> FloatArray:
    centred = x - x.mean(-1, keepdims=True)
    deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    normalised: FloatArray = centred / deviation * weights[f"{name}/scale"] + weights[f"{name}/bias"]
    return normalised


def transformer(
    weights: Weights, ids: IntArray, positions: IntArray, num_heads: int, causal: bool
) -> FloatArray:
    """Return the last hidden layer `[L, D]` of the tokens of one sample that are not padding.

    Args:
        weights: in the canonical layout.
        ids: token ids `[L]`.
        positions: their positions in the padded sequence `[L]`.
        num_heads: attention heads.
        causal: whether a token attends only to itself and to earlier tokens.
    """
    h = weights["token_embedding/embedding"][ids] + weights["position_embedding/embedding"][positions]
    size = h.shape[1] // num_heads
    for i in range(sum(name.endswith("expand/bias") for name in weights)):
        block = f"block_{i}"
        x = layer_norm(weights, f"{block}/norm_0", h)
        query, key, value = (dense(weights, f"{block}/{name}", x) for name in ("query", "key", "value"))
        heads = np.empty_like(h)
        for k in range(num_heads):
            columns = slice(k * size, (k + 1) * size)
            for row in range(len(h)):
                seen = slice(0, row + 1) if causal else slice(None)
                scores = np.exp(key[seen, columns] @ query[row, columns] / np.sqrt(size))
                heads[row, columns] = scores @ value[seen, columns] / scores.sum()
        h = h + dense(weights, f"{block}/output", heads)
        a = dense(weights, f"{block}/expand", layer_norm(weights, f"{block}/norm_1", h))
        h = h + dense(weights, f"{block}/contract", 0.5 * a * (1 + erf(a / np.sqrt(2))))
    return layer_norm(weights, "norm", h)


def gru(weights: Weights, ids: IntArray) -> FloatArray:
    """Return the states `[L, D]` of the last layer for the token ids `[L]` of one sample without padding."""
    x = weights["token_embedding/embedding"][ids]
    for i in range(sum(name.startswith("recurrent") and name.endswith("bias") for name in weights)):
        h, states = np.zeros(x.shape[1]), []
        for token in x:
            w_r, w_z, w_n = np.split(dense(weights, f"input_{i}", token), 3)
            u_r, u_z, u_n = np.split(dense(weights, f"recurrent_{i}", h), 3)
            z = expit(w_z + u_z)
            h = (1 - z) * np.tanh(w_n + expit(w_r + u_r) * u_n) + z * h
            states.append(h)
        x = np.stack(states)
    return x


def outputs(
    weights: Weights,
    ids: IntArray,
    valid: BoolArray,
    per_token: bool,
    num_heads: int = 0,
    causal: bool = True,
) -> FloatArray:
    """Return `[B, K]` or, per token, `[B, L, K]`, for token ids `[B, L]`; `num_heads` is 0 for the GRU.

    The features of the whole sequence are the mean over the tokens (transformer) or the last state. Padding
    has features 0.
    """
    rows = []
    for row, counted in zip(ids, valid, strict=True):
        positions = np.flatnonzero(counted)
        if num_heads:
            h = transformer(weights, row[positions], positions, num_heads, causal)
        else:
            h = gru(weights, row[positions])
        features = np.zeros((len(row), h.shape[1]))
        features[positions] = h
        rows.append(features if per_token else h.mean(0) if num_heads else h[-1])
    return dense(weights, "head", np.stack(rows))
