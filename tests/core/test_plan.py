import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2

from sequel_core.stream import plan
from sequel_core.stream.images import PixelMap
from sequel_core.stream.task import JoinedSplit, Samples, Split, Task

MASK = (1 << 64) - 1


def _philox4x64(counter: list[int], key: list[int]) -> list[int]:
    """Return a block of Philox-4x64-10, Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"."""
    for _ in range(10):
        high0, low0 = divmod(0xD2E7470EE14C6C93 * counter[0], 1 << 64)
        high1, low1 = divmod(0xCA5A826395121157 * counter[2], 1 << 64)
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B97F4A7C15) & MASK, (key[1] + 0xBB67AE8584CAA73B) & MASK]
    return counter


def _reference_words(key: tuple[object, ...], count: int) -> list[int]:
    """Return the stream in plain Python; block n has counter n + 1, because NumPy counts before it draws."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    philox_key = [int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")]
    out: list[int] = []
    for block in range(-(-count // 4)):
        out += _philox4x64([block + 1, 0, 0, 0], philox_key)
    return out[:count]


def chi_square(observed: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> float:
    expected = observed.sum() / observed.size
    return float(((observed - expected) ** 2 / expected).sum())


def split_of(count: int, task: int = 0, pixel_map: PixelMap | None = None) -> Split:
    """Return `count` images of 2 x 2; image k has the pixels 4 k to 4 k + 3."""
    images = np.arange(count * 4, dtype=np.uint8).reshape(count, 2, 2, 1)
    return Split(images, np.arange(count) % 3, task, pixel_map=pixel_map)


def test_the_reference_is_the_published_generator() -> None:
    # known answer of Random123's kat_vectors: philox4x64, 10 rounds, counter and key zero
    assert _philox4x64([0, 0, 0, 0], [0, 0]) == [
        0x16554D9ECA36314C,
        0xDB20FE9D672D0FDC,
        0xD7E772CEE186176B,
        0x7E68B68AEC7BA23B,
    ]


@pytest.mark.parametrize("key", [(0, "batches", 0, 0), (7, "initial weights", "dense_0/kernel")])
def test_words_are_philox_words(key: tuple[object, ...]) -> None:
    assert plan.words(*key, count=11).tolist() == _reference_words(key, 11)


@given(start=st.integers(0, 50), count=st.integers(0, 50))
def test_any_part_of_a_stream_can_be_computed_directly(start: int, count: int) -> None:
    whole = plan.words(3, "stream", count=100)
    np.testing.assert_array_equal(
        plan.words(3, "stream", count=count, start=start), whole[start : start + count]
    )


def test_streams_of_different_keys_differ() -> None:
    keys: list[tuple[object, ...]] = [
        (0, "a", 0),
        (0, "a", 1),
        (1, "a", 0),
        (0, "b", 0),
        (0, "a", "0"),
        (0, "a"),
    ]
    first = {int(plan.words(*key, count=1)[0]) for key in keys}
    assert len(first) == len(keys)


def test_uniform_is_uniform() -> None:
    draws = plan.uniform(0, "chi-square", count=64_000)
    assert draws.min() >= 0
    assert draws.max() < 1
    counts = np.bincount((draws * 64).astype(int), minlength=64)
    assert chi_square(counts) < chi2.ppf(0.999, 63)
    pairs = np.bincount((draws[::2] * 8).astype(int) * 8 + (draws[1::2] * 8).astype(int), minlength=64)
    assert chi_square(pairs) < chi2.ppf(0.999, 63)


def test_uniform_uses_the_high_53_bits() -> None:
    expected = [word // 2**11 / 2**53 for word in _reference_words((5,), 6)]
    assert plan.uniform(5, count=6).tolist() == expected


@given(count=st.integers(0, 200), seed=st.integers(0, 2**40))
def test_a_permutation_contains_each_index_once(count: int, seed: int) -> None:
    order = plan.permutation(seed, "p", count=count)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(count))


def test_permutations_are_uniform() -> None:
    orders = [tuple(plan.permutation(seed, "p", count=4).tolist()) for seed in range(4800)]
    _, counts = np.unique(np.array(orders), axis=0, return_counts=True)
    assert counts.size == 24
    assert chi_square(counts) < chi2.ppf(0.999, 23)


@given(samples=st.integers(1, 300), batch=st.integers(1, 64), epoch=st.integers(0, 3))
def test_an_epoch_contains_each_sample_at_most_once(samples: int, batch: int, epoch: int) -> None:
    if batch > samples:
        with pytest.raises(
            ValueError, match=f"batch_size must be <= .*got {batch} with {samples} training samples"
        ):
            plan.epoch_batches(0, 2, epoch, samples, batch)
        return
    batches = plan.epoch_batches(0, 2, epoch, samples, batch)
    assert batches.shape == (samples // batch, batch)
    seen = batches.reshape(-1)
    assert len(set(seen.tolist())) == samples // batch * batch
    assert set(seen.tolist()) <= set(range(samples))


def test_the_order_depends_on_seed_task_and_epoch() -> None:
    orders = {
        tuple(plan.epoch_batches(seed, task, epoch, 50, 10).reshape(-1).tolist())
        for seed in (0, 1)
        for task in (0, 1)
        for epoch in (0, 1)
    }
    assert len(orders) == 8
    again = plan.epoch_batches(1, 1, 1, 50, 10).reshape(-1).tolist()
    assert tuple(again) in orders


def test_each_epoch_drops_other_samples() -> None:
    dropped = [
        set(range(11)) - set(plan.epoch_batches(0, 0, e, 11, 10).reshape(-1).tolist()) for e in range(40)
    ]
    assert len(set.union(*dropped)) >= 9  # of 11; a given one is never dropped with probability 0.02


def test_take_in_chunks_equals_take(monkeypatch: pytest.MonkeyPatch) -> None:
    flip = PixelMap(np.array([[3], [2], [1], [0]], np.int32))
    split = JoinedSplit((split_of(9, 0), split_of(8, 1, flip)))
    positions = plan.epoch_batches(0, 0, 0, len(split), 3)
    expected = split.take(positions.reshape(-1))
    for chunk_bytes, chunks in ((1, 5), (24, 3), (1 << 22, 1)):
        monkeypatch.setattr(plan, "CHUNK_BYTES", chunk_bytes)
        got = list(plan.take_in_chunks(split, positions))
        assert len(got) == chunks
        assert np.concatenate([samples.x for samples in got]).shape == (5, 3, 2, 2, 1)
        for name in Samples._fields:
            joined, want = (
                np.concatenate([getattr(samples, name) for samples in got]),
                getattr(expected, name),
            )
            np.testing.assert_array_equal(joined.reshape(want.shape), want)


def test_consolidation_reads_every_sample_once_in_random_order() -> None:
    split = split_of(23)
    task = Task(1, "t", (0, 1, 2), split, split, split.head(0))
    batches = list(plan.consolidation_batches(0, task, 5))
    assert [len(batch.y) for batch in batches] == [5, 5, 5, 5, 3]
    first_pixels = np.concatenate([batch.x[:, 0, 0, 0] for batch in batches]) // 4
    assert sorted(first_pixels.tolist()) == list(range(23))
    assert first_pixels.tolist() != list(range(23))


def test_evaluation_reads_every_sample_once_in_order_and_pads() -> None:
    split = split_of(11)
    batches = list(plan.evaluation_batches(split, 4))
    assert [len(samples.y) for samples, _ in batches] == [4, 4, 4]
    assert [valid.tolist() for _, valid in batches] == [[True] * 4, [True] * 4, [True, True, True, False]]
    counted = np.concatenate([samples.x[valid] for samples, valid in batches])
    np.testing.assert_array_equal(counted, split.x)


@pytest.mark.parametrize(("count", "sizes"), [(23, [10, 10, 3]), (20, [10, 10]), (4, [4])])
def test_the_incomplete_last_batch_is_a_chunk_of_its_own(count: int, sizes: list[int]) -> None:
    """Its samples are the end of the order of the epoch; the whole batches are those of `drop_last`."""
    split = Split(np.arange(count)[:, None] * 1.0, np.zeros(count, np.int64))
    batches = [
        x[:, 0].astype(int).tolist()
        for samples in plan.training_batches(1, 2, 3, split, 10, drop_last=False)
        for x in samples.x
    ]
    assert [len(batch) for batch in batches] == sizes
    assert len(sizes) == plan.steps_per_epoch(count, 10, drop_last=False)
    order = np.argsort(plan.words(1, "batches", 2, 3, count=count), kind="stable").tolist()
    assert [i for batch in batches for i in batch] == order
    if count >= 10:
        assert batches[: count // 10] == plan.epoch_batches(1, 2, 3, count, 10).tolist()
        resumed = [x for s in plan.training_batches(1, 2, 3, split, 10, False, start=1) for x in s.x]
        assert [x[:, 0].astype(int).tolist() for x in resumed] == batches[1:]
    else:
        with pytest.raises(ValueError, match="lower batch_size, raise subset or set drop_last=false"):
            next(plan.training_batches(1, 2, 3, split, 10))


def test_initial_weights_have_the_distribution_of_torch() -> None:
    weights = plan.initial_weights(0, "dense_0/kernel", (100, 200), fan_in=100)
    assert weights.shape == (100, 200)
    assert weights.dtype == np.float64
    bound = 0.1  # 1 / sqrt(100)
    assert np.abs(weights).max() < bound
    assert np.abs(weights).max() > 0.999 * bound
    assert weights.var() == pytest.approx(bound**2 / 3, rel=0.02)
    assert abs(weights.mean()) < 4 * bound / np.sqrt(3 * weights.size)
    assert not np.array_equal(weights, plan.initial_weights(0, "dense_1/kernel", (100, 200), 100))
    assert not np.array_equal(weights, plan.initial_weights(1, "dense_0/kernel", (100, 200), 100))
