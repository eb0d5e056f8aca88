"""Two distances in one regularised metric over fixed features: to the mean and to the nearest normal images.

Legend of the shape comments: B images in a batch, N images of a set, D = F·h·w features of an image, r axes,
k neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from anomaly_lab.calibration import surprisal
from anomaly_lab.detector import Detector

HELD_OUT = 5
"""One in so many training images is held out of the first fit; their terms give the tail probabilities p."""

ITERATIONS = 4
"""Of the subspace iteration: after two, the leading variances of log-scattering features have three exact digits."""

OVERSAMPLING = 32
"""Axes that the subspace iteration follows beyond those that are kept."""


class Metric(NamedTuple):
    """The inverse of a regularised covariance: its leading axes, and one variance for all directions beyond them."""

    mean: Tensor  # (D,)
    directions: Tensor  # (D,r), orthonormal
    deviations: Tensor  # (r,), that the metric gives the directions
    beyond: Tensor  # (), variance

    def place(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Whitened coordinates (B,r) of features x (B,D) and the squared length (B,) of what lies beyond the axes.

        In float64: squared lengths are subtracted here and from the distances of neighbours, which in float32 leaves
        four digits that change with the size of the batch.
        """
        x = x.double() - self.mean
        along = x @ self.directions.double()
        rest = (x.square().sum(1) - along.square().sum(1)).clamp_min(0)
        return along / self.deviations, rest / self.beyond


class ScatterSubspace(Detector):
    """How far an image's log-scattering features lie from the mean normal image, and from the k nearest ones.

    With the mean m and the covariance C of the normal features phi in D dimensions, both distances are taken in

        |v|_M^2 = v' (C + ridge tr(C)/D I)^-1 v,

    with C replaced by its r leading axes and one variance for all other directions, as in probabilistic PCA (Tipping &
    Bishop 1999). The terms of the score are

        gaussian:    |phi(x) - m|_M
        neighbours:  mean of |phi(x) - phi(n)|_M over the k nearest normal images n

    In this metric ``gaussian`` is exact. Of a neighbour's distance only the part along the axes is: of the training
    images the coordinates on the axes and one squared length beyond them are kept, and beyond the axes the squared
    distance is taken for the sum of both squared lengths, that of orthogonal vectors.

    The score is the sum over both terms of -log p(t), where p(t) is the share of held-out normals whose term is at
    least t (`anomaly_lab.calibration.surprisal`). Every fifth training image is held out of a first fit, which gives p;
    a second fit, to all of them, gives the terms of test images. No gradients are taken and no label is read.

    The features come from ``model.input.features``: `anomaly_lab.scattering.LogScattering` in the yaml.

    Args:
        axes: r, at most. ridge: share of the mean variance that is added to every direction's. neighbours: k.
    """

    mean: Tensor  # (D,)
    directions: Tensor  # (D,r)
    deviations: Tensor  # (r,)
    beyond: Tensor  # ()
    bank: Tensor  # (N,r), float64, as bank_rest
    bank_rest: Tensor  # (N,)
    held_out: Tensor  # (T,V), each term of held-out normals, sorted
    TERMS = ("gaussian", "neighbours")

    def __init__(self, image_shape: Sequence[int], *, axes: int, ridge: float, neighbours: int) -> None:
        super().__init__(image_shape)
        if axes < 1 or neighbours < 1 or ridge <= 0:
            raise ValueError(f"axes={axes}, ridge={ridge}, neighbours={neighbours}: give positive numbers")
        self.rank, self.ridge, self.neighbours = axes, ridge, neighbours

    def after_fit(self, images: Tensor) -> None:
        x = images.flatten(1)
        if len(x) < HELD_OUT * (self.neighbours + 1):
            raise ValueError(f"{len(x)} training images are too few for neighbours={self.neighbours}")
        out = torch.arange(len(x), device=x.device) % HELD_OUT == 0  # in an order that depends on their pixels alone
        self._fit(x[~out])
        parts = [self.terms(part) for part in x[out].split(1000)]
        held_out = torch.stack([torch.cat([terms[name] for terms in parts]) for name in self.TERMS])
        self.set_fitted("held_out", held_out.sort(1).values)
        self._fit(x)

    def _fit(self, x: Tensor) -> None:
        mean = x.mean(0)
        centred = x - mean
        variances, directions = leading_axes(centred, self.rank, self.noise)
        total, dimensions = centred.square().sum() / len(x), x.shape[1]
        ridge = self.ridge * total / dimensions
        beyond = (total - variances.sum()).clamp_min(0) / max(dimensions - len(variances), 1) + ridge
        metric = Metric(mean, directions, (variances + ridge).sqrt(), beyond)
        bank, rest = metric.place(x)
        for name, value in (*metric._asdict().items(), ("bank", bank), ("bank_rest", rest)):
            self.set_fitted(name, value)

    def terms(self, x: Tensor) -> Mapping[str, Tensor]:
        place, rest = Metric(self.mean, self.directions, self.deviations, self.beyond).place(x.flatten(1))
        gaussian = place.square().sum(1) + rest
        # Beyond the axes no product: taken for orthogonal.
        order = self.bank.square().sum(1) + self.bank_rest - 2 * place @ self.bank.T  # (B,N)
        nearest = order.topk(self.neighbours, largest=False).values  # (B,k)
        neighbours = (nearest + gaussian[:, None]).clamp_min(0).sqrt().mean(1)
        return {"gaussian": gaussian.sqrt().float(), "neighbours": neighbours.float()}

    def combine(self, terms: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([surprisal(terms[name], self.held_out[i]) for i, name in enumerate(self.TERMS)]).sum(0)


def leading_axes(centred: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The largest variances (r,) of centred x (N,D) and their directions (D,r); r is ``rank``, or all there are.

    By subspace iteration from random directions (Halko, Martinsson & Tropp, SIAM Review 2011, algorithm 4.4).
    """
    count, dimensions = centred.shape
    rank = min(rank, count - 1, dimensions)
    width = min(rank + OVERSAMPLING, count, dimensions)
    basis = torch.randn(dimensions, width, generator=generator, device=generator.device).to(centred.device)
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(centred.T @ (centred @ basis)).Q
    places = centred @ basis  # (N,width)
    variances, rotation = torch.linalg.eigh(places.T @ places / count)
    return variances.flip(0)[:rank].clamp_min(0), (basis @ rotation.flip(1))[:, :rank].contiguous()
