"""Exact image-level metrics over raw anomaly scores, and the threshold that comes from normals only.

Scores are raw: any scale, higher is more anomalous. Truth is 0 (normal) or 1 (anomalous), and the anomalies
are the positives everywhere. Every metric is computed in float64 from the integer numbers of normals and
anomalies at each distinct score, so tied scores count as ties and the order of the images cannot matter.

Wrong input is a `ValueError`: scores and truth of unequal length, a score that is NaN or infinite (the
index of the first such image is named), truth other than 0 and 1, or a single class, for which none of
these numbers is defined.

N is the number of images, K the number of distinct scores.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

# The 95 % quantile of fewer values than this is about the largest of them, and says nothing of the tail.
FEWEST_FOR_A_THRESHOLD = 20


def auroc(score: ArrayLike, truth: ArrayLike) -> float:
    """Probability that an anomaly scores above a normal image, ties counting one half."""
    return float(_auroc_of_counts(*_counts(*_checked(score, truth))))


def average_precision(score: ArrayLike, truth: ArrayLike) -> float:
    """Mean of the precision at each distinct score, weighted by the recall gained there; not interpolated."""
    anomalous, normal = _counts(*_checked(score, truth))  # (K,), from the least anomalous score upwards
    found, alarms = _at_or_above(anomalous), _at_or_above(normal)
    return float(np.sum(anomalous * (found / (found + alarms))) / found[0])


def fpr_at_tpr(score: ArrayLike, truth: ArrayLike, tpr: float = 0.95) -> float:
    """Smallest false positive rate of any threshold whose true positive rate is at least `tpr`.

    Thresholds are the observed scores (alarm at or above); nothing is interpolated between them, so ties
    cost what they would cost in use. Part of the out-of-distribution literature has the normals as
    positives instead: that is another number.
    """
    anomalous, normal = _counts(*_checked(score, truth))
    found = _at_or_above(anomalous) / anomalous.sum()  # (K,), falls as the threshold rises
    alarms = _at_or_above(normal) / normal.sum()
    return float(alarms[found >= tpr].min())


def roc_curve(score: ArrayLike, truth: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Corners of the ROC curve from (0, 0) to (1, 1), as false and true positive rates.

    Points on a straight line between their neighbours are left out: the drawn curve and the area under it
    stay the same.
    """
    anomalous, normal = _counts(*_checked(score, truth))
    found = np.concatenate([[0], np.cumsum(anomalous[::-1])])  # (K+1,)
    alarms = np.concatenate([[0], np.cumsum(normal[::-1])])
    step_y, step_x = np.diff(found), np.diff(alarms)
    # Whole numbers, so that "on a straight line" is decided exactly. Dropping all points that lie between
    # collinear neighbours at once is safe: every step leads right or up, so a run of such points lies on
    # one line.
    corner = step_x[:-1] * step_y[1:] != step_y[:-1] * step_x[1:]
    keep = np.concatenate([[True], corner, [True]])
    return alarms[keep] / alarms[-1], found[keep] / found[-1]


def auroc_interval(score: ArrayLike, truth: ArrayLike) -> tuple[float, float]:
    """A 95 % interval of the AUROC: the uncertainty from the choice of test images; the fitted model stays the same.

    From the lower to the upper end of two intervals. DeLong et al. (1988) on the logit scale estimates the variance
    from the scores, and collapses near 1 on small sets. Newcombe (2006, method 5) inverts the variance as a function of
    the AUROC, so it does not collapse, and supposes that normals and anomalies spread alike. Each fails where the other
    holds: `docs/statistics.md` has the simulated coverage.
    """
    anomalous, normal = _counts(*_checked(score, truth))
    area, m, n = float(_auroc_of_counts(anomalous, normal)), int(anomalous.sum()), int(normal.sum())
    first, second = _delong(anomalous, normal, area), _newcombe(area, m, n)
    return min(first[0], second[0]), max(first[1], second[1])


NORMAL_QUANTILE = 1.959963984540054  # of .975


def _delong(anomalous: NDArray[np.int64], normal: NDArray[np.int64], area: float) -> tuple[float, float]:
    m, n = int(anomalous.sum()), int(normal.sum())
    if min(m, n) < 2 or area in (0.0, 1.0):
        return area, area
    # Share of the normals below each anomaly, of the anomalies above each normal; ties count one half.
    below = (np.cumsum(normal) - normal / 2) / n  # (K,)
    above = (m - np.cumsum(anomalous) + anomalous / 2) / m
    spread = np.sum(anomalous * (below - area) ** 2) / (m - 1) / m + np.sum(normal * (above - area) ** 2) / (n - 1) / n
    half = NORMAL_QUANTILE * np.sqrt(spread) / (area * (1 - area))
    odds = np.log(area / (1 - area))
    return float(1 / (1 + np.exp(half - odds))), float(1 / (1 + np.exp(-half - odds)))


def _newcombe(area: float, m: int, n: int) -> tuple[float, float]:
    def outside(true: float) -> bool:
        """Whether ``area`` lies outside the 95 % range of estimates around the true AUROC ``true``."""
        more = ((m + n) / 2 - 1) * ((1 - true) / (2 - true) + true / (1 + true))
        return abs(area - true) > NORMAL_QUANTILE * np.sqrt(true * (1 - true) * (1 + more) / (m * n))

    ends = []
    for far in (0.0, 1.0):
        inside = area
        for _ in range(60):  # bisection, to the last bits of a float
            middle = (inside + far) / 2
            inside, far = (inside, middle) if outside(middle) else (middle, far)
        ends.append(inside)
    return ends[0], ends[1]


def threshold_from_normals(val_score: ArrayLike, quantile: float = 0.95) -> float | None:
    """Score that at most the share 1 - `quantile` of the held-out normals exceeds.

    None for fewer than 20 images, where such a quantile means nothing. An image is called anomalous when
    its score is greater than the threshold. The threshold is one of the scores given (the quantile rounded
    up to the next one), so it is exact in the precision the scores are kept in.
    """
    val_score = _finite(val_score, "held-out")
    if len(val_score) < FEWEST_FOR_A_THRESHOLD:
        return None
    return float(np.quantile(val_score, quantile, method="higher"))


def evaluate(
    score: ArrayLike,
    truth: ArrayLike,
    *,
    threshold: float | None,
    decided: ArrayLike | None = None,
) -> dict[str, float | None]:
    """All metrics of one scored test set by name.

    `balanced_accuracy`, `f1`, `precision` and `recall` judge a method's own decisions `decided` (N,) where it has
    a rule, else score > `threshold`; anomalies positive; None where there is neither. Precision and F1 are 0 when
    nothing is called anomalous.
    """
    score, truth = _checked(score, truth)
    low, high = auroc_interval(score, truth)
    return {
        "auroc": auroc(score, truth),
        "auroc_low": low,
        "auroc_high": high,
        "average_precision": average_precision(score, truth),
        "fpr95": fpr_at_tpr(score, truth),
        **_decision_metrics(_alarm(score, threshold, decided), truth),
    }


def _alarm(score: NDArray[np.float64], threshold: float | None, decided: ArrayLike | None) -> NDArray[np.bool_] | None:
    if decided is not None:
        return np.asarray(decided, dtype=bool)
    return None if threshold is None else score > threshold


def _decision_metrics(alarm: NDArray[np.bool_] | None, truth: NDArray[np.bool_]) -> dict[str, float | None]:
    if alarm is None:
        return dict.fromkeys(("balanced_accuracy", "f1", "precision", "recall"))
    hits, alarms = int(np.sum(alarm & truth)), int(np.sum(alarm))
    anomalies, normals = int(truth.sum()), int(np.sum(~truth))
    recall = hits / anomalies
    specificity = 1 - (alarms - hits) / normals
    return {
        "balanced_accuracy": (recall + specificity) / 2,
        "f1": 2 * hits / (alarms + anomalies),
        "precision": hits / alarms if alarms else 0.0,
        "recall": recall,
    }


def _finite(score: ArrayLike, which: str) -> NDArray[np.float64]:
    values = np.asarray(score, dtype=np.float64)
    if values.ndim != 1:
        raise ValueError(f"scores must be one number an image, got an array of shape {values.shape}")
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise ValueError(
            f"score of {which} image {bad[0]} is {values[bad[0]]} ({len(bad)} of {len(values)} not finite): "
            "training diverged (try a lower learning rate) or the input is bad"
        )
    return values


def _checked(score: ArrayLike, truth: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    values, labels = _finite(score, "test"), np.asarray(truth)
    if labels.shape != values.shape:
        raise ValueError(f"{len(values)} scores but truth of shape {labels.shape}: give one 0 or 1 a score")
    anomalous = labels == 1
    if not np.all(anomalous | (labels == 0)):
        raise ValueError(f"truth must be 0 or 1, got {labels[~anomalous & (labels != 0)][0]}")
    if anomalous.all() or not anomalous.any():
        kind = "anomalous" if len(anomalous) and anomalous.all() else "normal"
        raise ValueError(f"all {len(values)} test images are {kind}: a metric needs normal and anomalous ones")
    return values, anomalous


def _counts(score: NDArray[np.float64], truth: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Number of anomalies and of normals at each distinct score, in rising order of the score; (K,) each."""
    distinct, rank = np.unique(score, return_inverse=True)
    anomalous = np.bincount(rank[truth], minlength=len(distinct))
    return anomalous, np.bincount(rank, minlength=len(distinct)) - anomalous


def _at_or_above(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.cumsum(counts[::-1])[::-1]


def _auroc_of_counts(anomalous: NDArray[np.int64], normal: NDArray[np.int64]) -> NDArray[np.float64]:
    """AUROC from counts at rising distinct scores along the last axis: the Mann-Whitney statistic.

    Twice the number of (normal, anomaly) pairs in the right order plus the number of tied pairs is a whole
    number, so the quotient is rounded once.
    """
    twice = np.sum(anomalous * (2 * np.cumsum(normal, axis=-1) - normal), axis=-1)
    return np.asarray(twice / (2 * anomalous.sum(axis=-1) * normal.sum(axis=-1)))
