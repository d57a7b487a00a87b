"""A multi-layer perceptron and its backward pass in float64 NumPy.

h_0 = x, a_l = h_l W_l + b_l, h_{l+1} = max(a_l, 0), p = softmax(a_L)
CE = -mean_n log p_{n, y_n};  dCE/da_L = (p - onehot(y)) / N
binary labels y: L = -mean_n sum_k log p_nk(y_nk), p_nk(1) = 1 / (1 + exp(-a_nk)); dL/da_L = (p(1) - y) / N
values y: L = mean_n 1/2 sum_k (a_nk - y_nk)^2; dL/da_L = (a_L - y) / N
for any L: dL/dW_l = h_l^T dL/da_l, dL/db_l = sum_n dL/da_l, dL/da_{l-1} = (dL/da_l W_l^T) * [a_{l-1} > 0]
Hessian of CE times v: d/ds of the above at theta + s v, s = 0 (Pearlmutter 1994, the R operator)
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sequel_core.stream.arrays import BoolArray, FloatArray
from sequel_core.stream.plan import initial_weights

Weights = dict[str, FloatArray]  # layer/kernel [in, out], layer/bias [out]
Targets = NDArray[Any]  # integers [N], bools [N, C] or floats [N, C]; they decide which loss it is


def initial(seed: int, sizes: list[int]) -> Weights:
    """Return the planned initial weights for these layer sizes, input and output included."""
    names = [*(f"dense_{i}" for i in range(len(sizes) - 2)), "head"]
    weights = {}
    for name, fan_in, fan_out in zip(names, sizes[:-1], sizes[1:], strict=True):
        for path, shape in ((f"{name}/kernel", (fan_in, fan_out)), (f"{name}/bias", (fan_out,))):
            weights[path] = initial_weights(seed, path, shape, fan_in)
    return weights


def layers(weights: Weights) -> list[str]:
    """Return the names of the layers from input to output."""
    return [*(f"dense_{i}" for i in range(len(weights) // 2 - 1)), "head"]


def zeros(weights: Weights) -> Weights:
    """Return zeros of the same shapes."""
    return {k: np.zeros_like(p) for k, p in weights.items()}


def plus(a: Weights, b: Weights) -> Weights:
    """Return the sum."""
    return {k: p + b[k] for k, p in a.items()}


def dot(a: Weights, b: Weights) -> float:
    """Return the inner product over all arrays together."""
    return float(sum((p * b[k]).sum() for k, p in a.items()))


def logits(weights: Weights, x: FloatArray) -> tuple[FloatArray, list[FloatArray]]:
    """Return the outputs `[N, C]` and the inputs of each layer, for pixels `[N, D]`."""
    names, inputs = layers(weights), [x]
    for name in names[:-1]:
        inputs.append(np.maximum(inputs[-1] @ weights[f"{name}/kernel"] + weights[f"{name}/bias"], 0))
    return inputs[-1] @ weights["head/kernel"] + weights["head/bias"], inputs


def backward(
    weights: Weights, inputs: list[FloatArray], d_logits: FloatArray, d_features: FloatArray | float = 0.0
) -> Weights:
    """Return dL/dweights for any L.

    Args:
        weights: the weights of the network.
        inputs: the inputs of each layer, as returned by `logits`.
        d_logits: dL/dlogits `[N, C]`.
        d_features: dL/dh of the inputs h `[N, H]` of the last layer, beside the part through the logits.
    """
    gradient: Weights = {}
    delta, extra = d_logits, d_features
    for name, h in zip(reversed(layers(weights)), reversed(inputs), strict=True):
        gradient[f"{name}/kernel"] = h.T @ delta
        gradient[f"{name}/bias"] = delta.sum(axis=0)
        delta = (delta @ weights[f"{name}/kernel"].T + extra) * (h > 0)
        extra = 0.0
    return gradient


def log_softmax(a: FloatArray, mask: BoolArray | None) -> FloatArray:
    """Return log p `[N, C]`. Classes outside the mask have probability 0."""
    if mask is not None:
        a = np.where(mask, a, -np.inf)
    a = a - a.max(axis=1, keepdims=True)
    return np.asarray(a - np.log(np.exp(a).sum(axis=1, keepdims=True)))


def losses(a: FloatArray, y: Targets, mask: BoolArray | None = None) -> FloatArray:
    """Return the loss of each sample `[N]`, given the outputs `[N, C]`."""
    if y.dtype == np.bool_:
        return np.asarray(np.logaddexp(0, np.where(y, -a, a)).sum(axis=1))
    if y.dtype.kind == "f":
        return np.asarray(0.5 * ((a - y) ** 2).sum(axis=1))
    return np.asarray(-log_softmax(a, mask)[np.arange(len(y)), y])


def loss(weights: Weights, x: FloatArray, y: Targets, mask: BoolArray | None = None) -> float:
    """Return the mean loss."""
    return float(losses(logits(weights, x)[0], y, mask).mean())


def gradient(weights: Weights, x: FloatArray, y: Targets, mask: BoolArray | None = None) -> Weights:
    """Return the gradient of the mean loss."""
    a, inputs = logits(weights, x)
    if y.dtype == np.bool_:
        delta = 1 / (1 + np.exp(-a)) - y
    elif y.dtype.kind == "f":
        delta = a - y
    else:
        delta = np.exp(log_softmax(a, mask))
        delta[np.arange(len(y)), y] -= 1
    return backward(weights, inputs, delta / len(y))


def hessian_product(
    weights: Weights, v: Weights, x: FloatArray, y: Targets, mask: BoolArray | None = None
) -> Weights:
    """Return the Hessian of the mean cross-entropy times v; `r_x` is the derivative dx/ds."""
    a, inputs = logits(weights, x)
    r_inputs = [np.zeros_like(x)]
    names = layers(weights)
    for i, name in enumerate(names):
        r_a = r_inputs[i] @ weights[f"{name}/kernel"] + inputs[i] @ v[f"{name}/kernel"] + v[f"{name}/bias"]
        if name != "head":
            r_inputs.append(r_a * (inputs[i + 1] > 0))
    p = np.exp(log_softmax(a, mask))
    delta, r_delta = p.copy(), p * (r_a - (p * r_a).sum(axis=1, keepdims=True))
    delta[np.arange(len(y)), y] -= 1
    delta, r_delta = delta / len(y), r_delta / len(y)
    product: Weights = {}
    for i, name in reversed(list(enumerate(names))):
        kernel, h, r_h = weights[f"{name}/kernel"], inputs[i], r_inputs[i]
        product[f"{name}/kernel"] = r_h.T @ delta + h.T @ r_delta
        product[f"{name}/bias"] = r_delta.sum(axis=0)
        r_delta = (r_delta @ kernel.T + delta @ v[f"{name}/kernel"].T) * (h > 0)
        delta = (delta @ kernel.T) * (h > 0)
    return product
