"""Statistics over seeds, compared with published examples, closed forms and SciPy's own tests."""

import math

import numpy as np
import pytest
from scipy import stats

from sequel_core.objectives import Score
from sequel_core.runs import statistics
from sequel_core.runs.statistics import (
    PairedTest,
    bootstrap_interval,
    compare_pairs,
    equivalence,
    holm,
    interval,
    pairs_needed,
    ranks,
)

ACCURACY, LOSS = Score("accuracy"), Score("loss", higher_is_better=False, fraction=False)

SLEEP = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
"""Additional hours of sleep (Student 1908): mean 1.58, t = 4.0621, p = 0.002833, interval 0.70 to 2.46."""

MAIZE = [6.125, -8.375, 1, 2, 0.75, 2.875, 3.5, 5.125, 1.75, 3.625, 7, 3, 9.375, 7.5, -6]
"""Darwin's maize, crossed minus self-fertilised: Fisher (1935) counted 863 of 32,768 sums >= 39.25."""

AUC = [
    [0.763, 0.768, 0.771, 0.798], [0.599, 0.591, 0.590, 0.569], [0.954, 0.971, 0.968, 0.967],
    [0.628, 0.661, 0.654, 0.657], [0.882, 0.888, 0.886, 0.898], [0.936, 0.931, 0.916, 0.931],
    [0.661, 0.668, 0.609, 0.685], [0.583, 0.583, 0.563, 0.625], [0.775, 0.838, 0.866, 0.875],
    [1.000, 1.000, 1.000, 1.000], [0.940, 0.962, 0.965, 0.962], [0.619, 0.666, 0.614, 0.669],
    [0.972, 0.981, 0.9751, 0.975], [0.957, 0.978, 0.946, 0.970],
]  # fmt: skip
"""Table 6 of Demsar (2006): mean ranks 3.143, 2.000, 2.893, 1.964, chi-square 9.28, critical difference 1.25.

The paper ranks 0.975 and 0.975 as 2 and 3, from digits that it does not print.
"""


def paired(differences: list[float]) -> PairedTest:
    [test] = compare_pairs(
        {"a": dict(enumerate(differences)), "b": dict.fromkeys(range(len(differences)), 0.0)}
    )
    return test


def test_students_sleep_data() -> None:
    test = paired(SLEEP)
    assert test.difference == pytest.approx(1.58)
    assert test.student == pytest.approx(0.002833, abs=5e-7)
    assert test.interval == pytest.approx((0.7001142, 2.4598858), abs=1e-6)
    assert test.effect_size == pytest.approx(4.0621 / math.sqrt(10), abs=1e-4)
    assert (
        test.permutation == 4 / 1024
    )  # 9 positive differences and a zero: only the two extremes, twice each
    low, high = test.bootstrap
    assert 0.9 < low < 1.58 < high < 3.1


def test_fishers_permutations_of_darwins_maize() -> None:
    test = paired(MAIZE)
    assert test.permutation == 2 * 863 / 2**15
    assert test.student == pytest.approx(0.0497, abs=5e-5)
    assert test.wilcoxon == pytest.approx(stats.wilcoxon(MAIZE, method="exact").pvalue)


def test_the_bootstrap_interval_is_scipys_and_covers_the_mean() -> None:
    expected = stats.bootstrap((np.array(MAIZE),), np.mean, random_state=np.random.default_rng(3))
    assert bootstrap_interval(MAIZE, seed=3) == tuple(expected.confidence_interval)
    rng = np.random.default_rng(0)
    bounds = [bootstrap_interval(list(rng.normal(size=25)), seed) for seed in range(60)]
    assert sum(low < 0 < high for low, high in bounds) >= stats.binom.ppf(0.001, 60, 0.9)


def test_holms_correction() -> None:
    """The example of Holm (1979) in closed form: factors 4, 3, 2, 1 and the running maximum."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_seeds_needed() -> None:
    assert [pairs_needed(m) for m in (1, 2, 3, 9, 45)] == [6, 7, 7, 9, 11]
    for comparisons in range(1, 50):
        n = pairs_needed(comparisons)
        assert comparisons * 2 / 2**n <= 0.05 < comparisons * 2 / 2 ** (n - 1)


def test_pairs_are_common_seeds_and_corrected_together() -> None:
    scores = {
        "er": {seed: 0.8 + 0.01 * seed for seed in range(8)},
        "der": {seed: 0.9 + 0.01 * seed + 0.001 * (seed % 3) for seed in (2, 3, 4, 5, 6, 7, 8, 9)},
        "naive": {0: 0.5, 1: math.nan, 2: 0.45},
        "alone": {30: 0.5},
    }
    tests = {(test.first, test.second): test for test in compare_pairs(scores)}
    assert {names: test.num_pairs for names, test in tests.items()} == {("er", "der"): 6, ("er", "naive"): 2}
    test = tests["er", "der"]
    assert test.difference == pytest.approx(-0.101)
    assert (test.permutation, test.corrected, test.pairs_needed) == (2 / 64, 4 / 64, 7)
    assert tests["er", "naive"].corrected == 0.5


def test_equal_differences_are_ties_in_floating_point() -> None:
    """0.9 - 0.8 and 0.4 - 0.3 differ in floating point; the test of constant differences is exact."""
    ours = {k: value + 0.1 for k, value in enumerate([0.8, 0.3, 0.7, 0.15, 0.55])}
    test = compare_pairs({"a": ours, "b": dict(enumerate([0.8, 0.3, 0.7, 0.15, 0.55]))})[0]
    assert (test.permutation, test.student, test.effect_size) == (2 / 32, 0.0, math.inf)
    assert test.interval == test.bootstrap == pytest.approx((0.1, 0.1))
    equal = compare_pairs({"a": ours, "b": ours})[0]
    assert (equal.difference, equal.wilcoxon, equal.corrected, equal.effect_size) == (0.0, 1.0, 1.0, 0.0)


def test_sentences() -> None:
    test = PairedTest("er", "der", 10, -0.0885, (-0.106, -0.071), (0, 0), 1, 0, 0, 0.002, 0.0039, 7)
    assert test.sentence(ACCURACY) == (
        "der beats er by 8.85 points, 95 % interval 7.10 to 10.60, 10 paired seeds, corrected p = 0.0039"
    )
    assert test._replace(num_pairs=5, corrected=0.25).sentence(LOSS) == (
        "er is ahead of der by 0.0885 in loss, 95 % interval 0.071 to 0.106, 5 paired seeds, corrected "
        "p = 0.25, not significant: at least 7 paired seeds are needed"
    )
    equal = test._replace(difference=0.0, interval=(-0.01, 0.01), corrected=1.0)
    assert equal.sentence(ACCURACY).startswith("er and der are equal on average, 95 % interval -1.00 to 1.00")


@pytest.mark.parametrize(("std", "runs"), [(0.0, 0), (1.2, 5), (8.53, 10)])
def test_equivalence_is_scipys_welch_test(std: float, runs: int) -> None:
    values, published, margin = [81.0, 82.5, 79.6, 81.2, 80.3], 82.0, 2.5
    result = equivalence(values, published, margin, std, runs)
    ours = (float(np.mean(values)), float(np.std(values, ddof=1)), 5)
    sides = []
    for bound, side in ((-margin, "greater"), (margin, "less")):
        if runs:
            shifted = stats.ttest_ind_from_stats(*ours, published + bound, std, runs, False, alternative=side)
        else:
            shifted = stats.ttest_1samp(values, published + bound, alternative=side)
        sides.append(shifted.pvalue)
    assert result.p == pytest.approx(max(sides), rel=1e-9)
    assert (result.verdict == "equivalent") == (max(sides) < 0.05)
    assert result.difference == pytest.approx(ours[0] - published)
    if not runs:
        assert result.interval == pytest.approx(np.subtract(interval(values, 0.9) or (), published))


def test_verdicts() -> None:
    assert equivalence([80.0, 80.2, 79.9], 80.0, 1.5).verdict == "equivalent"
    assert equivalence([84.0, 84.2, 83.9], 80.0, 1.5).verdict == "different, above"
    assert equivalence([76.0, 76.2, 75.9], 80.0, 1.5).verdict == "different, below"
    assert equivalence([84.0, 78.2, 81.9], 80.0, 1.5).verdict == "inconclusive"
    assert equivalence([84.0, 84.2, 83.9], 80.0, 1.5, std=9.0, runs=3).verdict == "inconclusive"
    assert equivalence([80.0], 80.0, 1.5).verdict == "inconclusive"
    assert math.isnan(equivalence([], 80.0, 1.5).difference)
    assert equivalence([80.5, 80.5], 80.0, 0.5)[:2] == ("inconclusive", 0.5)
    assert equivalence([80.5, 80.5], 80.0, 1.0).verdict == "equivalent"
    with pytest.raises(ValueError, match=r"margin must be > 0, got 0"):
        equivalence([80.0, 81.0], 80.0, 0)


def test_seeds_needed_by_an_inconclusive_row() -> None:
    """The least n with t(0.95, n - 1) s / sqrt(n) < | |difference| - margin |."""
    values = [80.0, 83.0, 81.0, 79.0]
    std = float(np.std(values, ddof=1))
    for published in (80.0, 82.5, 79.0):
        excess = abs(abs(np.mean(values) - published) - 1.5)
        fits = (n for n in range(2, 1001) if stats.t.ppf(0.95, n - 1) * std / math.sqrt(n) < excess)
        assert equivalence(values, published, 1.5).seeds_needed == next(fits, None)
    assert equivalence(values, 79.25, 1.5).seeds_needed is None  # exactly on the margin
    assert (
        equivalence(values, 80.0, 1.5, std=20.0, runs=3).seeds_needed is None
    )  # the published mean is vague
    assert equivalence([80.0], 80.0, 1.5).seeds_needed is None


def test_ranks_of_demsar() -> None:
    result = ranks(AUC)
    assert result.mean == pytest.approx((3.143, 2.000, 2.893, 1.964), abs=5e-4)
    assert result.critical_difference == pytest.approx(1.25, abs=5e-3)
    squares = np.square(result.mean).sum() - 4 * 5**2 / 4
    assert 12 * 14 / (4 * 5) * squares == pytest.approx(9.28, abs=5e-3)
    assert result.p == stats.friedmanchisquare(*np.transpose(AUC)).pvalue  # corrected for ties
    assert ranks(np.negative(AUC).tolist(), higher_is_better=False).mean == result.mean
    with pytest.raises(ValueError, match=r"at least 2 benchmarks and 3 methods, got shape \(1, 3\)"):
        ranks([[1, 2, 3]])


def without_bootstrap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "bootstrap_interval", lambda values: (0.0, 0.0))


def at_most(count: int, rate: float, trials: int) -> bool:
    """Whether a count is not significantly above a rate (binomial test, 99.9 %)."""
    return bool(stats.binomtest(count, trials, rate, alternative="greater").pvalue > 0.001)


@pytest.mark.parametrize("trials", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_the_family_wise_false_positive_rate(trials: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three configurations that differ by chance only, eight seeds."""
    without_bootstrap(monkeypatch)
    rng, rejected = np.random.default_rng(0), 0
    for _ in range(trials):
        scores = rng.normal(size=(3, 8))
        rejected += any(
            test.significant
            for test in compare_pairs({str(k): dict(enumerate(s)) for k, s in enumerate(scores)})
        )
    assert at_most(rejected, 0.05, trials)


@pytest.mark.parametrize("trials", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_power_for_a_difference_of_one_standard_deviation(
    trials: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten seeds: power 1 - F(t(0.975, 9)) + F(-t(0.975, 9)) of the noncentral t with sqrt(10), 0.803."""
    without_bootstrap(monkeypatch)
    bound, law = stats.t.ppf(0.975, 9), stats.nct(9, math.sqrt(10))
    power = law.sf(bound) + law.cdf(-bound)
    assert power == pytest.approx(0.803, abs=5e-4)
    rng = np.random.default_rng(1)
    rejected = sum(paired(list(rng.normal(1, 1, size=10))).student <= 0.05 for _ in range(trials))
    assert stats.binomtest(rejected, trials, power).pvalue > 0.001


@pytest.mark.parametrize(("std", "runs"), [(0.0, 0), (1.0, 10)])
def test_the_false_positive_rate_of_equivalence(std: float, runs: int) -> None:
    """The true difference equals the margin: neither `equivalent` nor `above` may occur in over 5 %."""
    rng, trials, verdicts = np.random.default_rng(2), 3000, []
    for _ in range(trials):
        published = rng.normal(0, std, size=runs) if runs else np.zeros(1)
        spread = float(np.std(published, ddof=1)) if runs else 0.0
        values = list(rng.normal(1.5, 1, size=10))
        verdicts.append(equivalence(values, float(published.mean()), 1.5, spread, runs).verdict)
    assert at_most(verdicts.count("equivalent"), 0.05, trials)
    assert at_most(verdicts.count("different, above"), 0.05, trials)
    assert verdicts.count("equivalent") > 0.03 * trials
