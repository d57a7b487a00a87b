"""Statistics over seeds: intervals, tests of paired runs, equivalence, ranks over benchmarks."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from sequel_core.objectives import Score
from sequel_core.runs.formatting import number, scaling
from sequel_core.stream.arrays import FloatArray

LEVEL = 0.05
"""Level of all tests; intervals have confidence 1 - LEVEL."""

EXACT = 2**16
"""A permutation test of up to 16 pairs is exact; with more pairs it draws this many sign patterns."""

RESAMPLES = 9999
"""Number of bootstrap samples."""

DECIMALS = 12
"""Differences are rounded to these decimals: equal ones are ties, although floats round differently."""

Interval = tuple[float, float]


def interval(values: Sequence[float], confidence: float = 1 - LEVEL) -> Interval | None:
    """Return Student's confidence interval of the mean: mean -+ t((1 + confidence) / 2, n - 1) * s / sqrt(n).

    t is the quantile of Student's distribution, s the sample standard deviation (divided by n - 1).

    Args:
        values: one per seed.
        confidence: of the interval, in (0, 1).

    Returns:
        Lower and upper bound; None for fewer than two values.

    Example:
        >>> low, high = interval([0.80, 0.82, 0.84])
        >>> round(low, 3), round(high, 3)
        (0.77, 0.87)
    """
    n = len(values)
    if n < 2:
        return None
    from scipy.special import stdtrit  # slow to import

    half = float(stdtrit(n - 1, (1 + confidence) / 2)) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return float(np.mean(values)) - half, float(np.mean(values)) + half


def bootstrap_interval(values: Sequence[float], seed: int = 0) -> Interval:
    """Return the 95 % bootstrap interval of the mean (BCa, Efron 1987).

    Args:
        values: at least two.
        seed: of the 9,999 bootstrap samples.

    Returns:
        Lower and upper bound.

    Example:
        >>> bootstrap_interval([1.0, 1.0, 1.0])
        (1.0, 1.0)
    """
    if len(set(values)) == 1:
        return values[0], values[0]
    from scipy import stats  # slow to import

    bounds = stats.bootstrap(
        (np.asarray(values),),
        np.mean,
        n_resamples=RESAMPLES,
        method="BCa",
        random_state=np.random.default_rng(seed),
    ).confidence_interval
    return float(bounds.low), float(bounds.high)


class PairedTest(NamedTuple):
    """The comparison of two configurations over their common seeds.

    Differences are those of the scores with equal seeds, first minus second, in the unit of the scores:
    fractions for accuracies.

    Args:
        first: label of a configuration.
        second: label of the other one.
        num_pairs: number of common seeds.
        difference: mean of the differences.
        interval: 95 % confidence interval of the mean (Student).
        bootstrap: 95 % confidence interval of the mean (BCa bootstrap).
        effect_size: mean / standard deviation of the differences (Cohen's d_z); +-inf if they are equal.
        student: p of the paired t test.
        wilcoxon: p of the signed-rank test.
        permutation: p of the test that flips the signs of the differences.
        corrected: p of the permutation test, corrected for all comparisons made (Holm).
        pairs_needed: least number of pairs with which the corrected p can be <= 0.05.
    """

    first: str
    second: str
    num_pairs: int
    difference: float
    interval: Interval
    bootstrap: Interval
    effect_size: float
    student: float
    wilcoxon: float
    permutation: float
    corrected: float
    pairs_needed: int

    @property
    def significant(self) -> bool:
        """Whether the corrected p is at most 0.05."""
        return self.corrected <= LEVEL

    def sentence(self, score: Score) -> str:
        """Return the result in words.

        For example "der beats er by 8.90 points, 95 % interval 7.10 to 10.60, 10 paired seeds, corrected
        p = 0.004".

        Args:
            score: what was measured; its direction says which configuration is better.
        """
        scale, sign = scaling(score), math.copysign(1, self.difference)
        ahead, behind = self.first, self.second
        if (self.difference < 0) == score.higher_is_better:
            ahead, behind = behind, ahead
        unit = "points" if score.fraction else f"in {score.name}"
        verb = "beats" if self.significant else "is ahead of"
        claim = f"{ahead} {verb} {behind} by {number(abs(self.difference), *scale)} {unit}"
        if not self.difference:
            claim = f"{self.first} and {self.second} are equal on average"
        low, high = (number(bound, *scale) for bound in sorted(sign * bound for bound in self.interval))
        text = f"{claim}, 95 % interval {low} to {high}, {self.num_pairs} paired seeds"
        text += f", corrected p = {self.corrected:.2g}"
        if not self.significant:
            text += ", not significant"
        if self.num_pairs < self.pairs_needed:
            text += f": at least {self.pairs_needed} paired seeds are needed"
        return text


def compare_pairs(scores: Mapping[str, Mapping[Any, float]]) -> list[PairedTest]:
    """Compare every two configurations over the seeds that both have.

    Args:
        scores: for each configuration its scores by seed. Values that are not finite are ignored.

    Returns:
        A test for every two configurations with at least two common seeds, in their order. The p values are
        two-sided. `corrected` takes all of these tests as one family.

    Example:
        >>> der = {seed: 0.90 + 0.001 * seed for seed in range(6)}
        >>> er = {seed: 0.80 + 0.002 * seed for seed in range(6)}
        >>> [test] = compare_pairs({"der": der, "er": er})
        >>> test.num_pairs, round(test.difference, 4), test.permutation, test.significant
        (6, 0.0975, 0.03125, True)
    """
    differences = {}
    for first, second in itertools.combinations(scores, 2):
        ours, theirs = scores[first], scores[second]
        gaps = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
        finite = [round(gap, DECIMALS) for gap in gaps if math.isfinite(gap)]
        if len(finite) > 1:
            differences[first, second] = finite
    tests = [_test(first, second, gaps) for (first, second), gaps in differences.items()]
    corrected = holm([test.permutation for test in tests])
    needed = pairs_needed(max(len(tests), 1))
    return [test._replace(corrected=p, pairs_needed=needed) for test, p in zip(tests, corrected, strict=True)]


def _test(first: str, second: str, differences: Sequence[float]) -> PairedTest:
    """Test whether the differences are 0; p is not corrected."""
    from scipy import stats

    gaps, mean = np.asarray(differences), float(np.mean(differences))
    deviation = float(np.std(gaps, ddof=1))
    student = wilcoxon = permutation = 1.0
    effect_size = 0.0
    if gaps.any():
        constant = gaps.min() == gaps.max()
        effect_size = math.copysign(math.inf, mean) if constant else mean / deviation
        student = 0.0 if constant else float(stats.ttest_1samp(gaps, 0).pvalue)
        wilcoxon = float(stats.wilcoxon(gaps).pvalue)
        permutation = _permutation(gaps)
    bounds = interval(differences) or (mean, mean)
    return PairedTest(
        first,
        second,
        len(gaps),
        mean,
        bounds,
        bootstrap_interval(differences),
        effect_size,
        student,
        wilcoxon,
        permutation,
        corrected=permutation,
        pairs_needed=pairs_needed(),
    )


def _permutation(differences: FloatArray) -> float:
    """Return p of the test that flips the signs of the differences and compares their mean."""
    from scipy import stats

    generator = np.random.default_rng(0)
    return float(
        stats.permutation_test(
            (differences,), np.mean, permutation_type="samples", n_resamples=EXACT, random_state=generator
        ).pvalue
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p values corrected for their number (Holm 1979), in the given order.

    The k-th smallest of m becomes the largest of (m - l + 1) p_l for l <= k, at most 1.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    order = np.argsort(p_values, kind="stable")
    factors = np.arange(len(p_values), 0, -1)
    corrected = np.empty(len(p_values))
    corrected[order] = np.minimum(np.maximum.accumulate(factors * np.asarray(p_values)[order]), 1)
    return [float(p) for p in corrected]


def pairs_needed(num_comparisons: int = 1, level: float = LEVEL) -> int:
    """Return the least number of pairs n with which an exact two-sided test can reach the level.

    Its p is at least 2 / 2^n, and the smallest p is multiplied by the number of comparisons.

    Args:
        num_comparisons: >= 1.
        level: in (0, 1).

    Example:
        >>> pairs_needed(), pairs_needed(9)
        (6, 9)
    """
    return math.ceil(math.log2(2 * num_comparisons / level))


Verdict = Literal["equivalent", "different, above", "different, below", "inconclusive"]

MAX_SEEDS = 1000
"""More seeds than that are no remedy."""


class Equivalence(NamedTuple):
    """The comparison of a measured mean with a published one."""

    verdict: Verdict
    difference: float  # measured - published
    interval: Interval  # 90 % of the difference
    p: float  # of the two one-sided tests (TOST): the larger one
    seeds_needed: int | None  # least number of seeds with which it is not inconclusive, see `equivalence`


def equivalence(
    values: Sequence[float], published: float, margin: float, std: float = 0.0, runs: int = 0
) -> Equivalence:
    """Test whether the mean of the values is equivalent to a published mean.

    Two one-sided tests (Schuirmann 1987), with Welch's standard error if the spread of the published mean is
    known. All verdicts follow from the 90 % interval of the difference:

    - equivalent: it lies within (-margin, margin), so p < 0.05;
    - different, above or below: it lies outside of [-margin, margin];
    - inconclusive: it contains a bound of the margin, or there are fewer than two values.

    `seeds_needed` assumes that mean and standard deviation stay what they are. It is None with fewer than two
    values, and if more than 1,000 seeds were needed, for example because of the spread of the published runs.

    Args:
        values: measured, one per seed.
        published: the published mean.
        margin: largest difference that does not matter, > 0.
        std: standard deviation of the published runs, >= 0.
        runs: number of published runs. With fewer than two, the published mean is taken as exact.

    Returns:
        The verdict; difference, interval and p are nan without values, interval and p also with one value.

    Raises:
        ValueError: margin is not positive.

    Example:
        >>> equivalence([81.0, 82.0, 81.5, 81.2], published=81.3, margin=1.5).verdict
        'equivalent'
    """
    if not margin > 0:
        raise ValueError(f"margin must be > 0, got {margin}; give the largest harmless difference")
    difference = float(np.mean(values)) - published if len(values) else math.nan
    if len(values) < 2:
        return Equivalence("inconclusive", difference, (math.nan, math.nan), math.nan, None)
    from scipy.special import stdtr, stdtrit

    def welch(seeds: int) -> tuple[float, float, float]:
        """Return the standard error, the degrees of freedom and half of the 90 % interval."""
        squares = [float(np.var(values, ddof=1)) / seeds, std**2 / runs if runs > 1 else 0.0]
        error, freedom = math.sqrt(sum(squares)), seeds - 1.0
        if error:
            freedom = sum(squares) ** 2 / (squares[0] ** 2 / freedom + squares[1] ** 2 / max(runs - 1, 1))
        return error, freedom, error * float(stdtrit(freedom, 1 - LEVEL))

    error, freedom, half = welch(len(values))
    low, high = difference - half, difference + half
    excess = abs(difference) - margin
    p = float(stdtr(freedom, excess / error)) if error else float(excess >= 0)
    verdict: Verdict = "inconclusive"
    if -margin < low and high < margin:
        verdict = "equivalent"
    elif low > margin or high < -margin:
        verdict = "different, above" if difference > 0 else "different, below"
    seeds = range(2, MAX_SEEDS + 1)
    at = bisect_left(seeds, True, key=lambda n: welch(n)[2] < abs(excess))
    needed = seeds[at] if at < len(seeds) else None
    return Equivalence(verdict, difference, (low, high), p, needed)


class Ranks(NamedTuple):
    """Ranks of methods over benchmarks; see `ranks`."""

    mean: tuple[float, ...]  # per method; 1 is best
    p: float  # of Friedman's test that all methods are equal
    critical_difference: float  # of mean ranks, at level 0.05 (Nemenyi)


def ranks(scores: Sequence[Sequence[float]], higher_is_better: bool = True) -> Ranks:
    """Rank methods over benchmarks (Demsar 2006, https://jmlr.org/papers/v7/demsar06a.html).

    The benchmarks must be independent: never give seeds of one benchmark as rows.

    Args:
        scores: `[num_benchmarks, num_methods]`, at least two rows and three columns; means over seeds.
        higher_is_better: False for losses.

    Returns:
        The mean ranks, p of Friedman's test, and the critical difference
        q(0.05, k, inf) sqrt(k (k + 1) / (12 N)) of k methods on N benchmarks.

    Raises:
        ValueError: there are too few rows or columns.

    Example:
        >>> ranks([[0.9, 0.8, 0.7], [0.6, 0.5, 0.4]]).mean
        (1.0, 2.0, 3.0)
    """
    table = np.asarray(scores, dtype=np.float64)
    if table.ndim != 2 or table.shape[0] < 2 or table.shape[1] < 3:
        raise ValueError(
            f"scores must have at least 2 benchmarks and 3 methods, got shape {table.shape}; compare fewer "
            "methods with compare_pairs"
        )
    from scipy import stats

    count, k = table.shape
    ranked = stats.rankdata(-table if higher_is_better else table, axis=1)
    p = float(stats.friedmanchisquare(*table.T).pvalue)
    quantile = float(stats.studentized_range.ppf(1 - LEVEL, k, math.inf))
    return Ranks(
        tuple(float(r) for r in ranked.mean(axis=0)), p, quantile * math.sqrt(k * (k + 1) / (12 * count))
    )
