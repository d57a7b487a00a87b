"""torchvision's models by name: outputs, initial weights and errors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sequel_core.backbones import TorchvisionHParams
from sequel_core.experiment.schema import BenchmarkConfig, ExperimentConfig
from sequel_lightning.backbones import TorchvisionModel, initialise
from sequel_lightning.backbones.torchvision import load_models

NAME = "mobilenet_v3_small"


def test_the_logits_are_those_of_the_model_with_another_last_layer() -> None:
    net = initialise(TorchvisionModel(NAME, num_classes=7), seed=0).eval()
    original = load_models().get_model(NAME, num_classes=7).eval()
    assert isinstance(net, TorchvisionModel)
    original.load_state_dict(
        {key.removeprefix("net."): p for key, p in net.state_dict().items() if not key.startswith("head.")}
        | {f"classifier.3.{key}": p for key, p in net.head.state_dict().items()}
    )
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(net(x), original(x), rtol=0, atol=0)
    assert net.features(x).shape == (2, 1024)
    assert nn.functional.linear(net.features(x), net.head.weight, net.head.bias).equal(net(x))


def test_the_seed_decides_the_initial_weights_and_nothing_else_does() -> None:
    nets = []
    for seed in (0, 0, 1):
        torch.rand(3)
        nets.append(initialise(TorchvisionModel(NAME, num_classes=5).double(), seed).state_dict())
        after = torch.rand(3)
    assert all(p.equal(nets[1][key]) for key, p in nets[0].items())
    assert not nets[0]["head.weight"].equal(nets[2]["head.weight"])
    assert nets[0]["head.weight"].dtype == torch.float64
    assert (nets[0]["net.features.0.1.running_mean"] == 0).all()
    assert not after.equal(torch.rand(3))


@pytest.mark.parametrize(
    ("model", "weights", "shape", "words"),
    [
        ("resnet81", None, (32, 32, 3), r"got 'resnet81'; did you mean resnet18\?"),
        (NAME, "IMAGENET", (32, 32, 3), r"weights must be null, DEFAULT or IMAGENET1K_V1 .* got 'IMAGENET'"),
        (NAME, None, (28, 28, 1), r"3 channels, got images of shape \[28, 28, 1\]"),
        ("squeezenet1_1", None, (32, 32, 3), r"last layer is dense.* got 'squeezenet1_1'"),
        ("alexnet", None, (32, 32, 3), r"\[32, 32, 3\] do not fit torchvision's alexnet"),
    ],
)
def test_what_does_not_fit(model: str, weights: str | None, shape: tuple[int, int, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TorchvisionModel(model, weights, image_shape=shape)


def test_flax_has_none() -> None:
    with pytest.raises(ValueError, match=r"backbone=torchvision needs mode=pytorch.* got mode=jax; choose"):
        ExperimentConfig("jax", benchmark=BenchmarkConfig("rotateddigits", {}), backbone=TorchvisionHParams())
