"""Every method on a convolutional network whose gradients are not contiguous in memory."""

from __future__ import annotations

import copy

import torch
from torch import nn

from sequel_core.hparams import AlgorithmHParams
from sequel_lightning import ALGORITHMS, CNN, initialise
from tests.lightning.parts import MOMENTUM, assert_close, every_algorithm, learn, own_stream


@every_algorithm
def test_channels_last_changes_nothing(hparams: AlgorithmHParams) -> None:
    benchmark = own_stream(hparams, num_tasks=2)
    net: nn.Module = CNN(
        channels=(4, 6),
        num_classes=benchmark.num_classes,
        linear_widths=(8,),
        image_shape=benchmark.image_shape,
    )
    contiguous = initialise(net, seed=0)
    channels_last = copy.deepcopy(contiguous).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    models = [
        ALGORITHMS[hparams.name](net, MOMENTUM, hparams, benchmark.spec)
        for net in (contiguous, channels_last)
    ]
    for model in models:
        for task in range(2):
            learn(model, benchmark, task)
    weight = next(p for p in channels_last.parameters() if p.ndim == 4 and p.shape[1] > 1)
    assert not weight.is_contiguous()
    assert_close(*models)
    state = [*models[0].parameters(), *models[0].buffers()]
    for a in state:
        if not any(a.dtype == b.dtype for b in state if a is not b):  # torch joins those before it sends them
            a.copy_(a.contiguous().view(-1).view(a.shape))  # an error if only the strides differ
