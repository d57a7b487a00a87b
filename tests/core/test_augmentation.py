"""Random crops and flips: the plan is uniform, independent of chunk sizes, and can be resumed."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from sequel_core.algorithms.derpp import DERppHParams
from sequel_core.algorithms.er import ERHParams
from sequel_core.stream.augmentation import AugmentingPlanner, augmenting
from sequel_core.stream.benchmark import StreamSpec
from sequel_core.stream.images import Augmentation, Normalisation
from sequel_core.stream.memory import MemoryPlanner
from sequel_core.stream.planner import AheadPlanner, NoPlanner
from sequel_core.stream.trees import LeafSpec

MASK = np.ones((2, 3), np.bool_)
SPEC = StreamSpec(
    LeafSpec((8, 8, 1), "uint8"), 3, 2, "domain", MASK, Normalisation(), augmentation=Augmentation(2, True)
)
ZEROS = np.zeros((40, 5), np.int64)


def test_no_augmentation_returns_the_planner() -> None:
    planner = NoPlanner()
    assert augmenting(planner, SPEC._replace(augmentation=Augmentation()), 0) is planner
    assert isinstance(augmenting(planner, SPEC, 0), AugmentingPlanner)


def test_offsets_and_flips_are_uniform_and_independent() -> None:
    crops = augmenting(NoPlanner(), SPEC, 3).next(np.zeros((4000, 5)), np.zeros((4000, 5))).batch
    assert crops.shape == (4000, 5, 3)
    assert crops.dtype == np.int32
    cells, counts = np.unique(crops.reshape(-1, 3), axis=0, return_counts=True)
    assert len(cells) == 5 * 5 * 2
    assert cells.min(0).tolist() == [-2, -2, 0]
    assert cells.max(0).tolist() == [2, 2, 1]
    assert stats.chisquare(counts).pvalue > 0.01


@pytest.mark.parametrize(("padding", "flip"), [(3, False), (0, True)])
def test_crops_only_and_flips_only(padding: int, flip: bool) -> None:
    planner = AugmentingPlanner(NoPlanner(), Augmentation(padding, flip), 0)
    crops = planner.next(ZEROS, ZEROS).batch
    assert np.abs(crops[..., :2]).max() == padding
    assert crops[..., 2].max() == flip


def test_chunks_of_any_length_and_a_restored_state_give_the_same_plan() -> None:
    hparams = DERppHParams(mem_size=20, mem_batch_size=4)

    def planner() -> AugmentingPlanner:
        made = augmenting(MemoryPlanner(hparams, SPEC, 7, draws=2), SPEC, 7)
        assert isinstance(made, AugmentingPlanner)
        return made

    whole, other, resumed = planner(), planner(), planner()
    expected = whole.next(ZEROS, ZEROS)
    assert expected.reads.shape == (40, 2, 4, 3)
    parts = [other.next(ZEROS[:1], ZEROS[:1]), other.next(ZEROS[1:18], ZEROS[1:18])]
    state = other.state
    resumed.state = state
    parts.append(resumed.next(ZEROS[18:], ZEROS[18:]))
    for k, name in ((1, "batch"), (2, "reads")):
        np.testing.assert_array_equal(np.concatenate([p[k] for p in parts]), expected[k], err_msg=name)
    np.testing.assert_array_equal(np.concatenate([p.plan.write for p in parts]), expected.plan.write)
    np.testing.assert_array_equal(resumed.state, whole.state)
    ahead = AheadPlanner(planner())
    ahead.prepare(ZEROS, ZEROS)
    steps = [ahead.next(zeros, zeros) for zeros in ZEROS]
    np.testing.assert_array_equal(np.stack([step.reads for step in steps]), expected.reads)
    np.testing.assert_array_equal(np.stack([step.plan.reads for step in steps]), expected.plan.reads)
    np.testing.assert_array_equal(ahead.state, whole.state)


def test_a_sample_that_is_drawn_again_gets_new_crops() -> None:
    hparams = ERHParams(mem_size=5, mem_batch_size=5)
    planned = augmenting(MemoryPlanner(hparams, SPEC, 0), SPEC, 0).next(ZEROS, ZEROS)
    later = planned.reads[1:, 0]  # the same five slots at every step
    assert (planned.plan.reads[1:] == np.arange(5)).all()
    assert len(np.unique(later.reshape(len(later), -1), axis=0)) == len(later)


def test_negative_padding_raises() -> None:
    with pytest.raises(ValueError, match="padding must be >= 0, got -1"):
        Augmentation(-1)


def test_the_state_of_another_stream_raises() -> None:
    planner = augmenting(NoPlanner(), SPEC, 0)
    with pytest.raises(ValueError, match="state must have 2 numbers, got 0; it comes from a stream without"):
        planner.state = NoPlanner().state
