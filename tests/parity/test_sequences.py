"""The networks for tokens in both frameworks and in NumPy: equal outputs, losses and gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

import sequel_flax.backbones
import sequel_lightning.backbones
from sequel_core.backbones import BACKBONES
from sequel_core.stream.arrays import FloatArray, IntArray
from sequel_core.stream.benchmark import StreamSpec
from sequel_core.stream.plan import Init
from sequel_core.stream.task import Batch
from sequel_core.stream.trees import LeafSpec
from sequel_flax.backbones import initial_variables
from sequel_flax.objectives import token_cross_entropy as flax_objective
from sequel_lightning.backbones import canonical_weights, initialise
from sequel_lightning.objectives import token_cross_entropy as torch_objective
from tests.reference import sequences
from tests.reference.network import Weights, log_softmax

Settings = Mapping[str, Any]

TOKENS, LENGTH, SAMPLES, CLASSES, PADDED = 11, 7, 4, 5, -100
SMALL: dict[str, Any] = {"vocab_size": TOKENS, "hidden_size": 8, "num_layers": 2}
TRANSFORMER: dict[str, Any] = {**SMALL, "max_length": 9, "num_heads": 2, "feed_forward_size": 12}
CASES: list[tuple[str, dict[str, Any]]] = [
    *(
        ("transformer", {**TRANSFORMER, "causal": causal, "per_token": per_token})
        for causal in (True, False)
        for per_token in (True, False)
    ),
    *(("gru", {**SMALL, "per_token": per_token}) for per_token in (True, False)),
]


def text(case: tuple[str, Settings]) -> str:
    name, settings = case
    return "-".join([name, *(f"{key}={settings[key]}" for key in ("causal", "per_token") if key in settings)])


DEFAULT = (CASES[0], CASES[3], CASES[5])  # causal of each token, of the whole sequence; GRU of the latter
cases = pytest.mark.parametrize(
    ("name", "settings"),
    [
        pytest.param(*case, id=text(case), marks=[] if case in DEFAULT else [pytest.mark.slow])
        for case in CASES
    ],
)


def samples(per_token: bool) -> tuple[IntArray, IntArray, IntArray]:
    """Return token ids, an attention mask (one sample is padded in front) and targets."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(TOKENS, size=(SAMPLES, LENGTH))
    mask = (np.arange(LENGTH) < np.array([7, 4, 1, 7])[:, None]).astype(np.int64)
    mask[3, :3] = 0
    y = np.where(mask, rng.integers(CLASSES, size=mask.shape), PADDED)
    return tokens, mask, y if per_token else rng.integers(CLASSES, size=SAMPLES)


def torch_network(name: str, settings: Settings) -> torch.nn.Module:
    """Return a network whose norms no longer have the weights that they begin with."""
    net = sequel_lightning.backbones.BACKBONES[name](**settings, num_classes=CLASSES)
    initialise(net.double(), seed=3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return net


def torch_side(net: torch.nn.Module, per_token: bool) -> tuple[FloatArray, float, Weights]:
    """Return outputs, the mean loss, and its gradient in the canonical layout."""
    tokens, mask, y = map(torch.from_numpy, samples(per_token))
    outputs = net(input_ids=tokens, attention_mask=mask)
    if per_token:
        objective = torch_objective()
        batch = Batch(tokens, y, torch.zeros(SAMPLES))
        loss = objective.loss(lambda x: outputs, batch).sum() / objective.weight(batch).sum()  # type: ignore[misc]
    else:
        loss = torch.nn.functional.cross_entropy(outputs, y)
    loss.backward()
    values = outputs.detach().numpy(), loss.item()
    for p in net.parameters():
        assert p.grad is not None
        p.data = p.grad
    return *values, canonical_weights(net)


def flax_side(name: str, settings: Settings, weights: Weights) -> tuple[FloatArray, float, Weights]:
    """Do what `torch_side` does, from weights in the canonical layout."""
    model = sequel_flax.backbones.BACKBONES[name](**settings, num_classes=CLASSES)
    tokens, mask, y = map(jnp.asarray, samples(settings["per_token"]))

    def loss_fn(params: Any) -> tuple[jax.Array, jax.Array]:
        outputs: Any = model.apply({"params": params}, input_ids=tokens, attention_mask=mask)
        if settings["per_token"]:
            objective, batch = flax_objective(), Batch(tokens, y, jnp.zeros(SAMPLES, int))
            total = objective.weight(batch).sum()  # type: ignore[misc]
            return objective.loss(lambda x: outputs, batch).sum() / total, outputs
        return -jax.nn.log_softmax(outputs)[jnp.arange(SAMPLES), y].mean(), outputs

    params = unflatten_dict(weights, sep="/")
    (loss, outputs), gradient = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params)
    flat = flatten_dict(gradient, sep="/")
    return np.asarray(outputs), float(loss), {path: np.asarray(a) for path, a in flat.items()}


def numpy_side(name: str, settings: Settings, weights: Weights) -> tuple[FloatArray, float]:
    """Return outputs and the mean loss."""
    tokens, mask, y = samples(settings["per_token"])
    heads = {"num_heads": settings["num_heads"], "causal": settings["causal"]} if "causal" in settings else {}
    outputs = sequences.outputs(weights, tokens, mask > 0, settings["per_token"], **heads)
    rows = y != PADDED
    losses = -log_softmax(outputs[rows], None)[np.arange(rows.sum()), y[rows]]
    return outputs, float(losses.mean())


def relative(a: FloatArray, b: FloatArray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@cases
def test_both_frameworks_agree_with_numpy(name: str, settings: Settings) -> None:
    net = torch_network(name, settings)
    weights = canonical_weights(net)
    expected, expected_loss = numpy_side(name, settings, weights)
    outputs, loss, gradient = torch_side(net, settings["per_token"])
    flax_outputs, flax_loss, flax_gradient = flax_side(name, settings, weights)
    assert relative(outputs, expected) < 1e-10
    assert relative(flax_outputs, expected) < 1e-10
    assert loss == pytest.approx(expected_loss, rel=1e-10)
    assert flax_loss == pytest.approx(expected_loss, rel=1e-10)
    assert flax_gradient.keys() == gradient.keys()
    # The softmax does not depend on the bias of the keys, so its gradient is 0 up to rounding.
    paths = [path for path in gradient if not path.endswith("key/bias")]
    assert [path for path in paths if not relative(flax_gradient[path], gradient[path]) < 1e-10] == []


@cases
def test_the_gradient_is_that_of_the_reference(name: str, settings: Settings) -> None:
    net = torch_network(name, settings)
    weights = canonical_weights(net)
    _, _, gradient = torch_side(net, settings["per_token"])
    rng = np.random.default_rng(1)
    direction = {path: rng.normal(size=array.shape) for path, array in weights.items()}

    def loss(step: float) -> float:
        shifted = {path: a + step * direction[path] for path, a in weights.items()}
        return numpy_side(name, settings, shifted)[1]

    derivative = sum(float((gradient[path] * direction[path]).sum()) for path in weights)
    assert (loss(1e-5) - loss(-1e-5)) / 2e-5 == pytest.approx(derivative, rel=1e-6)


Call = Callable[..., FloatArray]


def calls(name: str, settings: Settings) -> list[Call]:
    """Return the network in both frameworks as functions of arrays, positional or by name."""
    net = torch_network(name, settings)
    model = sequel_flax.backbones.BACKBONES[name](**settings, num_classes=CLASSES)
    params = unflatten_dict(canonical_weights(net), sep="/")

    def torch_call(*x: Any, **named: Any) -> FloatArray:
        tensors = {key: torch.from_numpy(a) for key, a in named.items()}
        outputs: FloatArray = net(*map(torch.from_numpy, x), **tensors).detach().numpy()
        return outputs

    jitted = jax.jit(partial(model.apply, {"params": params}))

    def flax_call(*x: Any, **named: Any) -> FloatArray:
        return np.asarray(jitted(*x, **named))

    return [torch_call, flax_call]


@pytest.mark.parametrize(("name", "settings"), [CASES[0], CASES[4]], ids=["transformer", "gru"])
def test_later_tokens_and_padding_change_nothing(name: str, settings: Settings) -> None:
    tokens, mask, _ = samples(True)
    others = np.where(mask, tokens, (tokens + 1) % TOKENS)
    later = tokens.copy()
    later[:, 4:] = (tokens[:, 4:] + 1) % TOKENS
    for call in calls(name, settings):
        outputs = call(input_ids=tokens, attention_mask=mask)
        np.testing.assert_array_equal(call(input_ids=others, attention_mask=mask), outputs)
        np.testing.assert_allclose(
            call(input_ids=later, attention_mask=mask)[:, :4], outputs[:, :4], rtol=1e-12, atol=1e-14
        )
        whole = call(tokens.astype(np.uint8))  # one array, without padding
        masked = call(input_ids=tokens, attention_mask=np.ones_like(mask))
        np.testing.assert_allclose(masked, whole, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(whole[0], outputs[0], rtol=1e-12, atol=1e-14)
        assert np.isfinite(call(input_ids=tokens, attention_mask=np.zeros_like(mask))).all()


def spec(per_token: bool, length: int = LENGTH) -> StreamSpec:
    leaf = LeafSpec((length,), "int64")
    x = {"input_ids": leaf, "attention_mask": leaf}
    y = leaf if per_token else LeafSpec((), "int64")
    return StreamSpec(x, CLASSES, 1, "domain", np.ones((1, CLASSES), np.bool_), y=y)


@pytest.mark.parametrize(("name", "settings"), [CASES[0], CASES[4]], ids=["transformer", "gru"])
def test_the_same_initial_weights(name: str, settings: Settings) -> None:
    net = sequel_lightning.backbones.BACKBONES[name](**settings, num_classes=CLASSES)
    weights = canonical_weights(initialise(net.double(), seed=5))
    model = sequel_flax.backbones.BACKBONES[name](**settings, num_classes=CLASSES)
    flat = flatten_dict(initial_variables(model, spec(True), 5, "float64")["params"], sep="/")
    assert flat.keys() == weights.keys()
    for path, values in weights.items():
        np.testing.assert_array_equal(values, flat[path])
        if path.endswith(("/kernel", "/embedding")):
            fan_in = values.shape[1] if path.endswith("/embedding") else values.shape[0]
            assert 0.3 < np.abs(values).mean() * np.sqrt(fan_in) < 0.7
            assert np.abs(values).max() * np.sqrt(fan_in) <= 1
        elif "norm" in path:
            assert (values == path.endswith("/scale")).all()


@pytest.mark.parametrize("init", ["xavier", "kaiming"])
@pytest.mark.parametrize(("name", "settings"), [CASES[0], CASES[4]], ids=["transformer", "gru"])
def test_other_initial_weights(name: str, settings: Settings, init: Init) -> None:
    """The same in both frameworks; the bounds of the papers; zero biases, and the usual embeddings."""
    networks = [sequel_lightning.backbones.BACKBONES[name](**settings, num_classes=CLASSES) for _ in range(2)]
    usual = canonical_weights(initialise(networks[0].double(), seed=5))
    weights = canonical_weights(initialise(networks[1].double(), 5, init))
    model = sequel_flax.backbones.BACKBONES[name](**settings, num_classes=CLASSES)
    flat = flatten_dict(initial_variables(model, spec(True), 5, "float64", init)["params"], sep="/")
    assert flat.keys() == weights.keys()
    for path, values in weights.items():
        np.testing.assert_array_equal(values, flat[path])
        if path.endswith("/kernel"):
            fan_in, fan_out = values.shape
            bound = np.sqrt(6 / (fan_in + fan_out if init == "xavier" else fan_in))
            assert 0.8 * bound < np.abs(values).max() <= bound
        elif path.endswith("/bias"):
            assert not values.any()
        else:
            np.testing.assert_array_equal(values, usual[path])


# -- dropout


@pytest.mark.parametrize(
    ("name", "settings", "count"),
    [
        pytest.param(*CASES[0], 3, id="transformer", marks=pytest.mark.slow),
        pytest.param(*CASES[4], 1, id="gru"),
    ],
)
def test_dropout_is_applied_to_the_share_of_units_in_training_only(
    name: str, settings: Settings, count: int
) -> None:
    """Of the embeddings and of both parts of a block; of a recurrent layer."""
    changed = {**settings, "num_layers": 1, "hidden_size": 64, "dropout": 0.4}
    tokens = np.random.default_rng(0).integers(TOKENS, size=(30, LENGTH))
    net = sequel_lightning.backbones.BACKBONES[name](**changed, num_classes=CLASSES).double()
    pairs: list[tuple[Any, Any]] = []
    for layer in net.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.register_forward_hook(lambda _, args, out: pairs.append((args[0].detach(), out.detach())))
    torch.manual_seed(0)
    with torch.no_grad():
        net(torch.from_numpy(tokens))
        evaluated = [net.eval()(torch.from_numpy(tokens)) for _ in range(2)]
    assert torch.equal(*evaluated)
    check_shares([(np.asarray(a), np.asarray(b)) for a, b in pairs[:count]], count)

    model: Any = sequel_flax.backbones.BACKBONES[name](**changed, num_classes=CLASSES)
    params = unflatten_dict(canonical_weights(net), sep="/")
    noted: list[tuple[Any, Any]] = []

    def note(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        out = call(*args, **kwargs)
        if isinstance(context.module, nn.Dropout) and context.method_name == "__call__":
            noted.append((args[0], out))
        return out

    @jax.jit
    def run() -> Any:
        with nn.intercept_methods(note):
            model.apply({"params": params}, tokens, train=True, rngs={"dropout": jax.random.key(1)})
        return noted

    check_shares([(np.asarray(a), np.asarray(b)) for a, b in run()], count)
    outputs = jax.jit(model.apply)({"params": params}, tokens)
    np.testing.assert_allclose(outputs, evaluated[0], rtol=1e-10, atol=1e-12)


def check_shares(pairs: list[tuple[FloatArray, FloatArray]], count: int) -> None:
    assert len(pairs) == count
    for before, after in pairs:
        dropped = after == 0
        assert abs(dropped.mean() - 0.4) < 4 * np.sqrt(0.24 / dropped.size)
        np.testing.assert_allclose(after[~dropped], before[~dropped] / 0.6, rtol=1e-5)
    masks = [after == 0 for _, after in pairs]
    for one, other in pairwise(masks):
        assert abs((one == other).mean() - 0.52) < 0.03


# -- what does not fit


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("transformer", {"hidden_size": 6, "num_heads": 4}, r"must divide.*num_heads=4 with hidden_size=6"),
        ("transformer", {"vocab_size": 0}, r"vocab_size must be >= 1"),
        ("transformer", {"max_length": 6}, r"max_length must be >= the 7 tokens of a sequence, got 6"),
        ("gru", {"num_layers": 0}, r"num_layers must be >= 1 .*got 0"),
    ],
)
def test_settings_that_no_network_can_have(name: str, settings: Settings, words: str) -> None:
    tokens = np.zeros((2, LENGTH), np.int64)
    with pytest.raises(ValueError, match=words):
        sequel_lightning.backbones.BACKBONES[name](**settings)(torch.from_numpy(tokens))
    with pytest.raises(ValueError, match=words):
        initial_variables(sequel_flax.backbones.BACKBONES[name](**settings), spec(True), 0)
    if "tokens" not in words:
        with pytest.raises(ValueError, match=words):
            BACKBONES[name](**settings)
