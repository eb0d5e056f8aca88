"""``python -m benchmarks.statistics``: what an interval covers and how often a test rejects a true null, simulated.

Prints the tables of docs/statistics.md (three minutes on one core).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, wilcoxon

from anomaly_lab import metrics

SIZES = ((15, 15, 2000), (100, 400, 1000), (1000, 9000, 200))
"""Test normals, test anomalies, simulated test sets."""


Interval = Callable[[NDArray[np.float64], NDArray[np.bool_]], tuple[float, float]]


def delong(score: NDArray[np.float64], truth: NDArray[np.bool_]) -> tuple[float, float]:
    """The first half of `metrics.auroc_interval`."""
    counts = metrics._counts(score, truth)
    return metrics._delong(*counts, float(metrics._auroc_of_counts(*counts)))


def newcombe(score: NDArray[np.float64], truth: NDArray[np.bool_]) -> tuple[float, float]:
    """The second half of `metrics.auroc_interval`."""
    counts = metrics._counts(score, truth)
    return metrics._newcombe(float(metrics._auroc_of_counts(*counts)), int(truth.sum()), int((~truth).sum()))


def bootstrap(score: NDArray[np.float64], truth: NDArray[np.bool_]) -> tuple[float, float]:
    """Percentiles of the AUROC of 200 resamples, normals and anomalies each drawn anew."""
    rng, (normal, anomalous) = np.random.RandomState(0), (score[~truth], score[truth])
    areas = []
    for _ in range(200):
        x = normal[rng.randint(len(normal), size=len(normal))]
        y = anomalous[rng.randint(len(anomalous), size=len(anomalous))]
        areas.append(metrics.auroc(np.concatenate([x, y]), np.arange(len(x) + len(y)) >= len(x)))
    low, high = np.percentile(areas, [2.5, 97.5])
    return float(low), float(high)


ALONE: dict[str, tuple[Interval, int]] = {
    "DeLong": (delong, 1),
    "Newcombe": (newcombe, 1),
    "bootstrap": (bootstrap, 10),
}
"""Intervals that are not used alone, and by how much fewer test sets each is tried on."""


def coverage(
    normals: int,
    anomalies: int,
    area: float,
    spread: float,
    sets: int,
    interval: Interval = metrics.auroc_interval,
    seed: int = 0,
) -> float:
    """Share of simulated test sets whose interval holds the true AUROC.

    Scores of normals are N(0, 1), of anomalies N(d, spread²) with the d that gives the ``area``.
    """
    rng, truth = np.random.RandomState(seed), np.arange(normals + anomalies) >= normals
    distance = norm.ppf(area) * np.sqrt(1 + spread**2)
    held = 0
    for _ in range(sets):
        score = rng.randn(len(truth)) * np.where(truth, spread, 1) + distance * truth
        low, high = interval(score, truth)
        held += low <= area <= high
    return held / sets


def rejections(
    classes: int, seeds: int, by_class: float, by_seed: float, tables: int, seed: int = 0
) -> tuple[float, float]:
    """How often the signed-rank test rejects at 5 % where two methods are alike on average over classes.

    The difference of a class is N(0, by_class²), that of one of its runs N(0, by_seed²) around it. First with every
    (class, seed) as a pair of its own, then with the seeds of a class averaged.
    """
    rng, found = np.random.RandomState(seed), np.zeros(2)
    for _ in range(tables):
        difference = by_class * rng.randn(classes, 1) + by_seed * rng.randn(classes, seeds)
        found += [wilcoxon(difference.ravel()).pvalue < 0.05, wilcoxon(difference.mean(1)).pvalue < 0.05]
    return float(found[0] / tables), float(found[1] / tables)


def main() -> None:
    print("| normals + anomalies | AUROC | anomalies spread alike | 3 times as wide | a third |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for (normals, anomalies, sets), area in itertools.product(SIZES, (0.7, 0.9, 0.95, 0.99, 0.999)):
        held = [f"{coverage(normals, anomalies, area, spread, sets):.3f}" for spread in (1, 3, 1 / 3)]
        print(f"| {normals} + {anomalies} | {area} | {' | '.join(held)} |", flush=True)
    print(f"\n| normals + anomalies | AUROC | spread | {' | '.join(ALONE)} |")
    print(f"| --- | ---: | --- |{' ---: |' * len(ALONE)}")
    for (normals, anomalies, sets), (spread, name) in ((SIZES[0], (1, "alike")), (SIZES[2], (1 / 3, "a third"))):
        for area in (0.95, 0.99, 0.999):
            held = [
                f"{coverage(normals, anomalies, area, spread, sets // fewer, interval):.3f}"
                for interval, fewer in ALONE.values()
            ]
            print(f"| {normals} + {anomalies} | {area} | {name} | {' | '.join(held)} |", flush=True)
    print("\n| seeds | sd of runs / sd of classes | pairs of (class, seed) | seeds averaged |")
    print("| ---: | ---: | ---: | ---: |")
    for seeds, ratio in itertools.product((1, 3, 5), (0.5, 1, 2)):
        pairs, averaged = rejections(10, seeds, 1.0, ratio, 2000)
        print(f"| {seeds} | {ratio} | {pairs:.3f} | {averaged:.3f} |", flush=True)


if __name__ == "__main__":
    main()
