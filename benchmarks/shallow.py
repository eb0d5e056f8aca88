"""The lab's nearest neighbours and principal components beside PyOD's: the same scores, and the seconds they take.

Both sides have the same prepared images of one MNIST digit, float32 in memory, and give scores that are equal but for
rounding, which every row shows. k-NN (PyOD): the mean distance to five neighbours. PCA (PyOD): the sum over the
components of the distance of an image to the axis as a point, divided by the axis's share of the variance, without
standardising; no method of the lab scores so, hence `DistanceToAxes`. Counted are fitting on the training images and
scoring the test images, the lab's in batches of a run's size, without Lightning; on a GPU PyOD stays on the CPU. PyOD's
fitting includes the scores of the training images, from which its threshold comes; the lab's threshold costs the scores
of its held-out normals, about a tenth of that, which are not counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from anomaly_lab import build, config, metrics
from anomaly_lab.data import OneClassData, scored_at_once
from anomaly_lab.detector import Detector, looking
from anomaly_lab.methods.knn import NearestNeighbours
from anomaly_lab.methods.pca import principal_axes
from benchmarks.compare import Cost, contest, now
from benchmarks.peers import INSTALL, missing

NEIGHBOURS, COMPONENTS = 5, 32
DIGIT = 8


class DistanceToAxes(Detector):
    """PyOD's PCA: sum over i of |x - u_i|_2 / w_i, u_i the axes with their largest entry positive, w_i their share of
    the variance.

    Args:
        components: how many axes.
    """

    axes: Tensor  # (D,k)
    shares: Tensor  # (k,)

    def __init__(self, image_shape: Sequence[int], *, components: int) -> None:
        super().__init__(image_shape)
        self.components = components

    def after_fit(self, images: Tensor) -> None:
        _, variance, direction = principal_axes(images.flatten(1))
        direction = direction[:, : self.components]
        largest = direction.gather(0, direction.abs().argmax(0, keepdim=True))
        self.set_fitted("axes", direction * largest.sign())
        self.set_fitted("shares", variance[: self.components] / variance.sum())

    def score(self, x: Tensor) -> Tensor:
        x = x.flatten(1).double()
        squares = x.square().sum(1, keepdim=True) + 1 - 2 * x @ self.axes
        return (squares.sqrt() / self.shares).sum(1).float()


class Turn(NamedTuple):
    """What fitting and scoring cost, and the scores of the test images."""

    fitting: Cost
    scoring: Cost
    scores: np.ndarray


def ours(detector: Detector, train: Tensor, test: Tensor) -> Turn:
    started = now()
    with looking(detector):
        detector.after_fit(train)
        fitted = now()
        at_once = scored_at_once(train.device)
        scores = torch.cat([detector.score(x) for x in test.split(at_once)]).cpu().numpy()
    return Turn(fitted.since(started), now().since(fitted), scores)


def theirs(detector: Any, train: np.ndarray, test: np.ndarray) -> Turn:
    started = now()
    detector.fit(train)
    fitted = now()
    scores = detector.decision_function(test)
    return Turn(fitted.since(started), now().since(fitted), scores)


def compared(data: OneClassData, pairs: int, device: str) -> list[Mapping[str, Any]]:
    """Rows of both detectors: fitting and scoring, each by turns."""
    from pyod.models.knn import KNN
    from pyod.models.pca import PCA

    train, test, truth = data.prepared("train"), data.prepared("test"), data.partition.test_truth
    flat = train.flatten(1).numpy(), test.flatten(1).numpy()
    train, test = (x.to("cuda" if device == "gpu" else "cpu") for x in (train, test))
    rows: list[Mapping[str, Any]] = []
    for name, make, theirs_made in (
        (
            "PyOD KNN",
            lambda: NearestNeighbours(data.image_shape, neighbours=NEIGHBOURS),
            lambda: KNN(n_neighbors=NEIGHBOURS, method="mean"),
        ),
        (
            "PyOD PCA",
            lambda: DistanceToAxes(data.image_shape, components=COMPONENTS),
            lambda: PCA(n_components=COMPONENTS, svd_solver="full", standardization=False),
        ),
    ):
        one, other = [], []
        for _ in range(pairs + 1):  # the first warms up
            one.append(ours(make(), train, test))
            other.append(theirs(theirs_made(), *flat))
        scores = one[-1].scores.astype(np.float64), other[-1].scores
        equal = {
            "largest_difference_in_std": float(f"{np.abs(scores[0] - scores[1]).max() / scores[1].std():.1e}"),
            **{
                f"auroc_{who}": round(metrics.auroc(s, truth), 6)
                for who, s in zip(("ours", "theirs"), scores, strict=True)
            },
        }
        for what, images in (("fitting", len(train)), ("scoring", len(test))):
            costs = [[getattr(turn, what) for turn in side[1:]] for side in (one, other)]
            seconds = {
                f"{who}_seconds": float(f"{np.median([cost.wall for cost in side]):.3g}")
                for who, side in zip(("ours", "theirs"), costs, strict=True)
            }
            per_image = [[cost.per(images) for cost in side] for side in costs]
            rows.append({"against": name, "what": what, "images": images, **equal, **seconds, **contest(*per_image)})
    return rows


def measure(device: str, quick: bool) -> list[Mapping[str, Any]]:
    """Rows for one MNIST digit; a row that says so where PyOD or MNIST is missing."""
    if missing("pyod"):
        rows: list[Mapping[str, Any]] = [{"against": "PyOD", "missing": f"pyod is not installed: {INSTALL}"}]
    else:
        given = ["model=knn", "dataset=mnist", "split=official", f"normal_class={DIGIT}", "trainer.accelerator=cpu"]
        cfg = config.compose([*given, "split.max_test=1000"])
        try:
            data = build.make_data(config.job(cfg))
        except ValueError as error:
            rows = [{"against": "PyOD", "missing": f"MNIST is not in {Path(cfg.data_dir).name}: {error}"}]
        else:
            return compared(data, 1 if quick else 5, device)
    print(rows[0]["missing"])
    return rows
