"""iCaRL as a LightningModule: own loaders, which networks it takes, and a module that is loaded or moved."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sequel_core.algorithms.icarl import ICaRLHParams
from sequel_lightning import MLP, ICaRL
from sequel_lightning.replay import stored_samples
from tests.lightning.parts import (
    BATCH,
    ICARL,
    MOMENTUM,
    STEPS,
    arrays,
    float_spec,
    learn,
    module,
    network,
    own_loader,
    stream,
    trainer,
)


def learned(tasks: int = 2, scenario: str = "class") -> ICaRL:
    benchmark = stream(scenario=scenario)  # type: ignore[arg-type]
    model = module(benchmark, ICARL)
    assert isinstance(model, ICaRL)
    for task in range(tasks):
        learn(model, benchmark, task)
    return model


def test_a_fresh_module_loads_what_another_learned() -> None:
    model = learned()
    fresh = module(stream(scenario="class"), ICARL)
    assert isinstance(fresh, ICaRL)
    x, _, t = arrays(stream(scenario="class"), 1)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.predict(x, t), model.predict(x, t))
    for a, b in zip(stored_samples(fresh.contents), stored_samples(model.contents), strict=True):
        np.testing.assert_array_equal(a, b)
    assert "classes" not in model.state_dict()
    assert fresh.memory_bytes() == model.memory_bytes()


def test_everything_moves_with_the_module() -> None:
    model = learned(1).to("meta")
    tensors = [*model.state.exemplars[:3], *model.state.old.values(), *model.state[3:]]
    assert all(tensor.device.type == "meta" for tensor in tensors)


def test_own_float_loaders_that_yield_the_exemplars_too_replay_them() -> None:
    """With and without the indices of tasks the set is the same: no class of task 0 comes back in task 1."""
    benchmark = stream(scenario="class")
    ends = []
    for with_task in (True, False):
        model = module(benchmark, ICARL, spec=float_spec(benchmark))
        assert isinstance(model, ICaRL)
        trainer().fit(model, own_loader(benchmark, 0, with_task))
        first = stored_samples(model.contents)
        assert first.x.dtype == np.float32
        assert len(first.y) == 12
        x, y, t = arrays(benchmark, 1)
        joined = TensorDataset(
            torch.cat([x, torch.from_numpy(first.x).movedim(-1, 1)]),
            torch.cat([y, torch.from_numpy(first.y)]),
            *([torch.cat([t, torch.from_numpy(first.t)])] if with_task else []),
        )
        trainer().fit(model, DataLoader(joined, BATCH))
        held = stored_samples(model.contents)
        assert np.bincount(held.y).tolist() == [3, 3, 3, 3]
        assert held.t.tolist() == [0] * 6 + [1] * 6
        kept = np.concatenate([first.x[first.y == label][:3] for label in (0, 1)])
        np.testing.assert_array_equal(held.x[:6], kept)
        ends.append(held.x)
    np.testing.assert_array_equal(ends[0], ends[1])


def test_images_of_another_dtype_raise_at_the_first_step() -> None:
    benchmark = stream()
    with pytest.raises(ValueError, match=r"holds uint8 images, the batch has float32; give a spec with"):
        trainer().fit(module(benchmark, ICARL), own_loader(benchmark, 0, with_task=True))


def test_the_exemplars_join_the_task_behind_its_samples() -> None:
    benchmark, model = stream(scenario="class"), learned(1)
    split = model.training_split(benchmark.tasks[1].train)
    x, y, t = split.take(np.arange(len(split)))
    samples, held = (
        benchmark.tasks[1].train.take(np.arange(BATCH * STEPS + 2)),
        stored_samples(model.contents),
    )
    for actual, a, b in zip((x, y, t), samples, held, strict=True):
        np.testing.assert_array_equal(actual, np.concatenate([a, b]))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_old_network_and_the_features_are_in_evaluation_mode(dropout: float) -> None:
    benchmark = stream(scenario="class")
    net = MLP((8,), benchmark.num_classes, dropout, benchmark.image_shape)
    model = ICaRL(net, MOMENTUM, ICARL, benchmark.spec)
    modes: list[bool] = []
    learn(model, benchmark, 0)
    model.old.dense_0.register_forward_hook(lambda layer, *_: modes.append(layer.training))
    learn(model, benchmark, 1)
    assert modes == [False] * ((BATCH * STEPS + 2 + 12) // BATCH)
    assert not any(p.requires_grad or p.grad is not None for p in model.old.parameters())
    x, _, t = arrays(benchmark, 1)
    model.eval()
    assert torch.equal(model.predict(x, t), model.predict(x, t))


def test_it_needs_a_spec_a_network_with_features_and_room() -> None:
    benchmark = stream()
    with pytest.raises(ValueError, match=r"ICaRL keeps samples, so it needs the stream's spec, got None"):
        ICaRL(network(benchmark), MOMENTUM, ICARL)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(9, 4))
    with pytest.raises(ValueError, match=r"icarl needs a network with a method features\(x\)"):
        ICaRL(plain, MOMENTUM, ICARL, benchmark.spec)
    with pytest.raises(
        ValueError, match="mem_size must be >= 12, one exemplar of each class of each task, got 11"
    ):
        ICaRL(network(benchmark), MOMENTUM, ICaRLHParams(mem_size=11), benchmark.spec)
