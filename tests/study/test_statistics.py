"""The test and its interval give R's figures, and those of an enumeration of all assignments of signs."""

import itertools
import math

import numpy as np
import pytest
from scipy.stats import rankdata, wilcoxon

from scripts.data.checks import InputError
from scripts.study.statistics import compare, describe, quartiles, read_cases, signed_rank, signed_rank_distribution

# Hamilton depression scale before and after (Hollander & Wolfe 1973, p. 29), the example of R's help page
BEFORE = (1.83, 0.50, 1.62, 2.48, 1.68, 1.88, 1.55, 3.06, 1.30)
AFTER = (0.878, 0.647, 0.598, 2.05, 1.06, 1.29, 1.06, 3.14, 1.29)


def signs(n):
    return np.array(list(itertools.product((-1, 1), repeat=n)))


def enumerated_p(differences):
    """Share of the 2ⁿ assignments of signs whose rank sum is at least as far from its mean."""
    ranks = rankdata(np.abs(differences))
    sums, mean = (signs(len(ranks)) > 0) @ ranks, ranks.sum() / 2
    observed = ranks[np.asarray(differences) > 0].sum()
    return np.mean(np.abs(sums - mean) >= abs(observed - mean) - 1e-9)


def test_the_depression_example_of_r():
    # R: wilcox.test(BEFORE, AFTER, paired = TRUE, conf.int = TRUE): V = 40, p-value = 0.03906, (pseudo)median 0.46
    found = signed_rank(BEFORE, AFTER)
    assert wilcoxon(BEFORE, AFTER).statistic == 45 - 40
    assert found.p == pytest.approx(0.0390625, abs=1e-12)
    assert found.difference == pytest.approx(0.46, abs=1e-12)
    # R: qsignrank(0.025, 9) = 6: the 6th smallest and the 6th largest of the 45 Walsh averages, sorted by hand below
    d = [x - y for x, y in zip(BEFORE, AFTER, strict=True)]
    averages = sorted((d[i] + d[j]) / 2 for i in range(9) for j in range(i, 9))
    assert (found.low, found.high) == pytest.approx((averages[5], averages[39]), abs=1e-12)
    assert (found.low, found.high) == pytest.approx((0.01, 0.786), abs=1e-12)


def test_p_is_that_of_all_assignments_of_signs():
    random = np.random.default_rng(0)
    for n in range(1, 13):
        differences = random.normal(0.3, 1, n)
        assert signed_rank(differences, np.zeros(n)).p == pytest.approx(enumerated_p(differences), abs=1e-12)


def test_p_with_ties_is_that_of_all_assignments_of_signs():
    differences = np.array([1, 1, 2, 2, 2, -1, 3, -3, 4.0])
    assert signed_rank(differences, np.zeros(9)).p == pytest.approx(enumerated_p(differences), abs=1e-12)


def test_the_distribution_is_that_of_all_assignments_of_signs():
    # R: dsignrank(0:6, 3) * 8 = 1 1 1 2 1 1 1
    assert (signed_rank_distribution(3) * 8).tolist() == [1, 1, 1, 2, 1, 1, 1]
    for n in (1, 6, 11):
        sums = (signs(n) > 0) @ np.arange(1, n + 1)
        counted = np.bincount(sums, minlength=n * (n + 1) // 2 + 1) / 2**n
        assert signed_rank_distribution(n) == pytest.approx(counted, abs=1e-15)


@pytest.mark.parametrize("n", [6, 9, 12])
def test_the_interval_covers_zero_in_at_least_95_percent_of_all_assignments_of_signs_and_not_in_many_more(n):
    size = np.random.default_rng(n).uniform(0.1, 1, n)
    i, j = np.triu_indices(n)
    found = signed_rank(size, np.zeros(n))
    positive = (((signs(n)[:, i] * size[i]) + (signs(n)[:, j] * size[j])) / 2 > 0).sum(1)  # V of each assignment
    averages = np.sort((size[i] + size[j]) / 2)
    k = np.flatnonzero(averages == found.low)[0] + 1
    covered = np.mean((positive >= k) & (positive <= len(averages) - k))
    assert covered >= 0.95
    assert np.mean((positive >= k + 1) & (positive <= len(averages) - k - 1)) < 0.95  # the next narrower does not


def test_the_interval_excludes_zero_exactly_where_the_test_rejects():
    random = np.random.default_rng(1)
    rejected = []
    for _ in range(200):
        found = signed_rank(random.normal(0.5, 1, 15), np.zeros(15))
        rejected.append(found.p <= 0.05)
        assert rejected[-1] == (found.low > 0 or found.high < 0)
        assert found.low <= found.difference <= found.high
    assert 0 < sum(rejected) < 200


def test_the_paper_s_108_pairs_are_within_reach_of_the_normal_approximation():
    a, b = np.random.default_rng(2).normal(size=(2, 108))
    found = signed_rank(a, b)
    assert found.p == pytest.approx(wilcoxon(a, b, method="exact").pvalue, rel=0.02)
    # Hollander & Wolfe: k ≈ n(n+1)/4 - z √(n(n+1)(2n+1)/24)
    averages = np.sort([(a - b)[i : i + 1] / 2 + (a - b)[j] / 2 for i in range(108) for j in range(i, 108)], axis=None)
    k = round(108 * 109 / 4 - 1.959964 * math.sqrt(108 * 109 * 217 / 24))
    assert found.low == pytest.approx(averages[k - 1], abs=0.01)


def test_shifting_and_swapping_move_the_estimate_as_they_should():
    a, b = np.random.default_rng(3).normal(size=(2, 20))
    here, shifted, swapped = signed_rank(a, b), signed_rank(a + 5, b), signed_rank(b, a)
    assert shifted[1:] == pytest.approx(np.add(here[1:], 5))
    assert swapped == pytest.approx((here.p, -here.difference, -here.high, -here.low))


def test_few_pairs_have_no_95_percent_interval_and_equal_results_no_difference():
    five = signed_rank([1, 2, 3, 4, 5], [0.5] * 5)
    assert five.p == pytest.approx(2 / 2**5) and (five.low, five.high) == (-math.inf, math.inf)
    assert signed_rank([1, 2, 3, 4, 5, 6], [0.5] * 6).low == 0.5
    assert signed_rank([1.0] * 8, [1.0] * 8) == (1.0, 0.0, 0.0, 0.0)


def test_quartiles_leave_out_what_is_not_known():
    # R: quantile(c(1, 2, 3, 4, 10)) = 1 2 3 4 10
    assert quartiles([1, 2, math.nan, 3, 4, 10]) == (3, 2, 4)
    assert all(map(math.isnan, quartiles([math.nan])))


def cases_csv(path, tre, dsc=0.8, names="abcdefg"):
    lines = [f"{n},{n},{dsc},{t},{int(t == 'nan')}" for n, t in zip(names, tre, strict=False)]
    path.write_text("\n".join(["case,patient,dsc,tre_mm,empty_warped", *lines]) + "\n")
    return read_cases(path)


def test_a_case_without_tre_is_named_and_its_pair_left_out_of_the_tre_test_alone(tmp_path):
    variant = cases_csv(tmp_path / "variant.csv", (5, "nan", 3, 8, 9, 7, 4))
    baseline = cases_csv(tmp_path / "baseline.csv", (4, 1, "nan", 6, 6, 6, 2))
    row = compare(variant, baseline, "tre_mm")
    assert (row["pairs"], row["pairs_left_out"], row["left_out"]) == (5, 2, "b c")
    assert row["difference"] == signed_rank((5, 8, 9, 7, 4), (4, 6, 6, 6, 2)).difference
    assert compare(variant, baseline, "dsc")["pairs"] == 7
    described = describe(variant, "tre_mm")
    assert (described["cases"], described["median"], described["empty_warped"]) == (6, 6, 1)


def test_results_of_other_cases_are_refused(tmp_path):
    two, three = (cases_csv(tmp_path / f"{n}.csv", range(1, n + 1)) for n in (2, 3))
    with pytest.raises(InputError, match="case c is in one of two results only"):
        compare(two, three, "dsc")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "not found"),
        ("case,dsc\n", "no cases"),
        ("case,dsc\na,1\n", "no column tre_mm"),
        ("case,dsc,tre_mm,empty_warped\na,1,1,0\na,1,1,0\n", "a case is in more than one row"),
    ],
)
def test_a_file_that_is_no_cases_csv_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "cases.csv").write_text(content)
    with pytest.raises(InputError, match=message):
        read_cases(tmp_path / "cases.csv")
