"""The metrics against scikit-learn, and against what must hold whatever the scores are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from anomaly_lab import metrics


@st.composite
def scored(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Scores with few or many ties, float32 as detectors give them, and truth with both classes."""
    n = draw(st.integers(2, 200))
    rng = np.random.RandomState(draw(st.integers(0, 2**32 - 1)))
    levels = draw(st.sampled_from([1, 2, 5, 50, 10**6]))
    score = (rng.randint(levels, size=n) * draw(st.sampled_from([1e-6, 1.0, 1e6]))).astype(np.float32)
    truth = (rng.rand(n) < draw(st.sampled_from([0.05, 0.5, 0.9]))).astype(np.uint8)
    truth[rng.choice(n, 2, replace=False)] = 0, 1
    return score, truth


def sk_fpr95(truth: np.ndarray, score: np.ndarray) -> float:
    fpr, tpr, _ = sk.roc_curve(truth, score, drop_intermediate=False)
    return fpr[tpr >= 0.95].min()


@pytest.mark.parametrize(
    ("ours", "reference"),
    [
        (metrics.auroc, sk.roc_auc_score),
        (metrics.average_precision, sk.average_precision_score),
        (metrics.fpr_at_tpr, sk_fpr95),
    ],
    ids=["auroc", "average_precision", "fpr95"],
)
@settings(deadline=None)
@given(data=scored())
def test_agrees_with_scikit_learn(ours, reference, data):
    score, truth = data
    assert ours(score, truth) == pytest.approx(reference(truth, score), abs=1e-12)


@settings(deadline=None)
@given(data=scored(), threshold=st.sampled_from([0.0, 1.0, 2.0, 3e6, -1.0]))
def test_decision_metrics_agree_with_scikit_learn(data, threshold):
    score, truth = data
    found = metrics.evaluate(score, truth, threshold=threshold)
    called = (score > threshold).astype(int)
    expected = {
        "balanced_accuracy": sk.balanced_accuracy_score(truth, called),
        "f1": sk.f1_score(truth, called, zero_division=0),
        "precision": sk.precision_score(truth, called, zero_division=0),
        "recall": sk.recall_score(truth, called),
    }
    assert {key: found[key] for key in expected} == pytest.approx(expected, abs=1e-12)


@settings(deadline=None)
@given(data=scored())
def test_roc_curve_is_scikit_learns_without_the_points_on_its_straight_pieces(data):
    score, truth = data
    fpr, tpr = metrics.roc_curve(score, truth)
    assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1)
    assert sk.auc(fpr, tpr) == pytest.approx(metrics.auroc(score, truth), abs=1e-12)
    all_fpr, all_tpr, _ = sk.roc_curve(truth, score, drop_intermediate=False)
    full = {(round(x, 12), round(y, 12)) for x, y in zip(all_fpr, all_tpr, strict=True)}
    assert {(round(x, 12), round(y, 12)) for x, y in zip(fpr, tpr, strict=True)} <= full
    turn = np.diff(fpr)[:-1] * np.diff(tpr)[1:] - np.diff(fpr)[1:] * np.diff(tpr)[:-1]
    assert np.all(np.abs(turn) > 1e-12)  # every inner point is a corner


@pytest.mark.parametrize("change", [lambda s: 3 * s + 7, np.cbrt, np.arctan], ids=["affine", "cbrt", "arctan"])
@settings(deadline=None)
@given(data=scored())
def test_only_the_order_of_the_scores_counts(change, data):
    score, truth = data
    _, rank = np.unique(score, return_inverse=True)  # a strictly rising map in exact arithmetic
    moved = change(rank.astype(float))
    for metric in (metrics.auroc, metrics.average_precision, metrics.fpr_at_tpr, metrics.auroc_interval):
        assert metric(moved, truth) == metric(score, truth)


@settings(deadline=None)
@given(data=scored())
def test_negated_scores_or_swapped_truth_mirror_the_auroc(data):
    score, truth = data
    mirrored = pytest.approx(1 - metrics.auroc(score, truth), abs=1e-15)
    assert metrics.auroc(-score, truth) == mirrored
    assert metrics.auroc(score, 1 - truth) == mirrored


@settings(deadline=None)
@given(data=scored(), seed=st.integers(0, 2**32 - 1))
def test_order_of_the_images_does_not_count(data, seed):
    score, truth = data
    order = np.random.RandomState(seed).permutation(len(score))
    for metric in (metrics.auroc, metrics.average_precision, metrics.fpr_at_tpr):
        assert metric(score[order], truth[order]) == metric(score, truth)


def test_scores_outside_the_unit_interval_need_no_scaling():
    # A sigmoid in float32 would tie the first two of these at 1.
    assert metrics.auroc([200.0, 100.0, -5.0, -300.0], [1, 0, 1, 0]) == 0.75


@pytest.mark.parametrize(
    ("tpr", "expected"), [(0.5, 0.0), (0.51, 0.5), (1.0, 0.5)], ids=["reached", "just missed", "all"]
)
def test_fpr_at_tpr_takes_the_whole_tie(tpr, expected):
    # Below the best anomaly, an anomaly and a normal share one score: no threshold parts them.
    assert metrics.fpr_at_tpr([3, 2, 2, 1], [1, 1, 0, 0], tpr) == expected


@pytest.mark.parametrize("n_anomalous", [20, 40, 100])
def test_fpr95_counts_exactly_95_percent_as_reached(n_anomalous):
    # The weakest 5 % of the anomalies lie below all normals.
    missed = n_anomalous // 20
    score = np.r_[np.full(n_anomalous - missed, 3.0), np.full(missed, 1.0), np.full(10, 2.0)]
    truth = np.r_[np.ones(n_anomalous), np.zeros(10)]
    assert metrics.fpr_at_tpr(score, truth) == 0
    assert metrics.fpr_at_tpr(score, truth, 0.951) == 1


@pytest.mark.parametrize(
    ("score", "truth", "message"),
    [
        ([0.1, np.nan, np.inf], [0, 1, 1], "test image 1 is nan"),
        ([0.1, 0.2, -np.inf], [0, 1, 1], "test image 2 is -inf"),
        ([0.1, 0.2], [0, 0], "all 2 test images are normal"),
        ([0.1, 0.2], [1, 1], "all 2 test images are anomalous"),
        ([], [], "all 0 test images"),
        ([0.1, 0.2, 0.3], [0, 1], "3 scores but truth of shape"),
        ([[0.1], [0.2]], [[0], [1]], "one number an image"),
        ([0.1, 0.2, 0.3], [0, 1, 2], "truth must be 0 or 1, got 2"),
    ],
)
@pytest.mark.parametrize(
    "metric",
    [
        metrics.auroc,
        metrics.average_precision,
        metrics.fpr_at_tpr,
        metrics.roc_curve,
        metrics.auroc_interval,
        lambda score, truth: metrics.evaluate(score, truth, threshold=None),
    ],
    ids=["auroc", "average_precision", "fpr_at_tpr", "roc_curve", "auroc_interval", "evaluate"],
)
def test_what_has_no_answer_is_refused_in_one_line(metric, score, truth, message):
    with pytest.raises(ValueError, match=message) as error:
        metric(score, truth)
    assert "\n" not in str(error.value)


def newcombe_equation(true, found, m, n):
    """How far the AUROC found is from a true one, in quantiles of its standard error there; Newcombe 2006, method 5."""
    variance = true * (1 - true) / (m * n) * (1 + ((m + n) / 2 - 1) * ((1 - true) / (2 - true) + true / (1 + true)))
    return abs(found - true) / (1.959963984540054 * np.sqrt(variance))


def delong(score, truth):
    """DeLong's variance by its definition over all pairs, on the logit scale."""
    normals, anomalies = score[truth == 0], score[truth == 1]
    wins = (anomalies[:, None] > normals) + 0.5 * (anomalies[:, None] == normals)
    area = wins.mean()
    variance = wins.mean(1).var(ddof=1) / len(anomalies) + wins.mean(0).var(ddof=1) / len(normals)
    ends = np.log(area / (1 - area)) + np.array([-1, 1]) * 1.959963984540054 * np.sqrt(variance) / (area * (1 - area))
    return 1 / (1 + np.exp(-ends))


@pytest.mark.parametrize("levels", [6, 10**9], ids=["ties", "no ties"])
@pytest.mark.parametrize(("m", "n"), [(15, 15), (200, 40), (40, 200)])
def test_interval_spans_those_of_delong_and_newcombe(m, n, levels):
    rng = np.random.RandomState(m)
    truth = np.arange(m + n) < m
    score = np.floor((rng.randn(m + n) + 1.5 * truth) * levels / 4)
    low, high = metrics.auroc_interval(score, truth)
    area, (delong_low, delong_high) = metrics.auroc(score, truth), delong(score, truth)
    assert low <= delong_low + 1e-12 and high >= delong_high - 1e-12
    for end, other in ((low, delong_low), (high, delong_high)):
        assert end == pytest.approx(other, abs=1e-9) or newcombe_equation(end, area, m, n) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(("m", "n"), [(15, 15), (9000, 1000)])
def test_interval_of_a_perfect_separation_does_not_collapse(m, n):
    truth = np.arange(m + n) < m
    low, high = metrics.auroc_interval(1.0 * truth, truth)
    assert high == 1 and newcombe_equation(low, 1, m, n) == pytest.approx(1, abs=1e-6)
    mirrored = metrics.auroc_interval(-1.0 * truth, truth)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_interval_covers_the_auroc_of_the_population_near_one_on_small_sets():
    """15 + 15 images, where the percentiles of a bootstrap cover it in 58 to 75 of 100 cases."""
    rng = np.random.RandomState(0)
    truth = np.arange(30) < 15
    for true, distance in ((0.99, 3.28995), (0.95, 2.32617)):  # sqrt(2) times the quantile
        ends = [metrics.auroc_interval(rng.randn(30) + distance * truth, truth) for _ in range(400)]
        assert 0.93 < np.mean([low <= true <= high for low, high in ends]) < 1


@settings(deadline=None)
@given(
    n=st.integers(20, 300),
    quantile=st.sampled_from([0.5, 0.9, 0.95, 0.99]),
    levels=st.sampled_from([3, 100, 10**6]),
    seed=st.integers(0, 1000),
)
def test_threshold_is_a_score_that_few_held_out_normals_exceed(n, quantile, levels, seed):
    val = np.random.RandomState(seed).randint(levels, size=n).astype(np.float32)
    threshold = metrics.threshold_from_normals(val, quantile)
    assert threshold in val
    assert np.sum(val > threshold) <= (1 - quantile) * n
    assert np.sum(val >= threshold) >= (1 - quantile) * (n - 1) - 1e-9  # and not needlessly high


def test_threshold_needs_twenty_images():
    assert metrics.threshold_from_normals(np.arange(19.0)) is None
    assert metrics.threshold_from_normals(np.arange(20.0)) == 19
    assert metrics.threshold_from_normals(np.arange(101.0)) == 95


def test_threshold_of_a_bad_score_names_the_image():
    with pytest.raises(ValueError, match="held-out image 3 is nan"):
        metrics.threshold_from_normals([1.0, 2.0, 3.0, np.nan])


def test_evaluate_without_a_threshold_leaves_decisions_open():
    found = metrics.evaluate([0.1, 0.4, 0.3, 0.9], [0, 0, 1, 1], threshold=None)
    assert list(found) == [
        *("auroc", "auroc_low", "auroc_high", "average_precision", "fpr95"),
        *("balanced_accuracy", "f1", "precision", "recall"),
    ]
    assert found["auroc"] == 0.75
    assert {found[key] for key in ("balanced_accuracy", "f1", "precision", "recall")} == {None}


@settings(max_examples=20, deadline=None)  # the first example pays for the import
@given(data=scored())
def test_agrees_with_torchmetrics_on_ranks(data):
    classification = pytest.importorskip("torchmetrics.functional.classification")
    torch = pytest.importorskip("torch")
    score, truth = data
    # torchmetrics sends anything outside [0, 1] through a sigmoid; ranks keep the order and stay inside.
    distinct, rank = np.unique(score, return_inverse=True)
    ranks, target = torch.tensor(rank / max(1, len(distinct) - 1)), torch.tensor(truth).long()
    assert metrics.auroc(score, truth) == pytest.approx(classification.binary_auroc(ranks, target).item(), abs=1e-6)
    assert metrics.average_precision(score, truth) == pytest.approx(
        classification.binary_average_precision(ranks, target).item(), abs=1e-6
    )
