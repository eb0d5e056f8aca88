"""Principal components: the linear autoencoder, fitted in one step, and the Gaussian that belongs to it.

Legend of the shape comments: B images in a batch, N images of a set, D = C·H·W pixels, r rank, k components.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from anomaly_lab.detector import Detector
from anomaly_lab.errors import refuse_fewer

Score = Literal["residual", "likelihood"]

HELD_OUT = 5
"""One in so many training images is held out to choose the number of components."""

RANK = 1e-10
"""Variances below that share of the largest one are zero up to rounding."""


class Axes(NamedTuple):
    """Principal axes with positive variance, the largest first."""

    mean: Tensor  # (D,)
    variance: Tensor  # (r,), by the maximum likelihood estimate with 1/N
    direction: Tensor  # (D,r), orthonormal columns


def principal_axes(x: Tensor) -> Axes:
    """All principal axes of x (N,D), in float64, from the smaller of the covariance and the Gram matrix."""
    x = x.double()
    count, dimensions = x.shape
    mean = x.mean(0)
    centred = x - mean
    wide = count > dimensions
    variance, vectors = torch.linalg.eigh((centred.T @ centred if wide else centred @ centred.T) / count)
    variance, vectors = variance.flip(0), vectors.flip(1)  # eigh has the smallest first
    rank = int((variance > RANK * variance[0]).sum())
    variance, vectors = variance[:rank], vectors[:, :rank]
    return Axes(mean, variance, vectors if wide else centred.T @ vectors / (count * variance).sqrt())


def noise_variances(variance: Tensor, dimensions: int) -> Tensor:
    """sigma^2 for k = 1 to r - 1 components, (r-1,): the mean of the D - k variances that are left out."""
    left = variance.sum() - variance.cumsum(0)[:-1]
    return left / (dimensions - torch.arange(1, len(variance), device=variance.device))


def log_likelihoods(axes: Axes, x: Tensor) -> Tensor:
    """Mean log-likelihood of x (N,D) under probabilistic PCA with k = 1 to r - 1 of ``axes``, (r-1,)."""
    centred = x.double() - axes.mean
    squares = (centred @ axes.direction).square().mean(0)  # (r,), their mean over the images
    rest = centred.square().sum(1).mean() - squares.cumsum(0)[:-1]
    noise = noise_variances(axes.variance, x.shape[1])
    mahalanobis = (squares / axes.variance).cumsum(0)[:-1] + rest / noise
    components = torch.arange(1, len(axes.variance), device=x.device)
    volume = axes.variance.log().cumsum(0)[:-1] + (x.shape[1] - components) * noise.log()
    return -(x.shape[1] * math.log(2 * math.pi) + volume + mahalanobis) / 2


class PCA(Detector):
    """The residual of the first k principal components, or the negative log-likelihood of probabilistic PCA.

    With m the mean, u_i and l_i the axes and variances of the training images, y_i = u_i'(x - m) and
    s^2 = (sum_{i>k} l_i) / (D - k),

        residual:    |x - m - sum_{i<=k} y_i u_i|^2 / D
        likelihood:  (D log 2 pi + sum_{i<=k} log l_i + (D-k) log s^2 + sum_{i<=k} y_i^2 / l_i + D residual / s^2) / 2

    the latter being -log N(x; m, W W' + s^2 I) at the maximum likelihood of Tipping & Bishop, "Probabilistic principal
    component analysis", J. R. Stat. Soc. B 61(3), 1999, equations (3), (7) and (8).

    With ``components: null`` k maximises the mean log-likelihood of a fifth of the training images, drawn by the run's
    seed and excluded from that fit; the final fit uses all. No label is seen. On pixels, many of which hardly vary,
    that rule keeps hundreds of components, and their residual sees little.

    Args:
        score: ``residual`` or ``likelihood``.
        components: k; None to choose it by likelihood.
    """

    mean: Tensor  # (D,)
    variance: Tensor  # (k,)
    direction: Tensor  # (D,k)
    noise_variance: Tensor  # ()

    def __init__(self, image_shape: Sequence[int], *, score: Score, components: int | None) -> None:
        super().__init__(image_shape)
        if components is not None:
            refuse_fewer(1, components=components)
        self.score_rule, self.components = score, components

    def after_fit(self, images: Tensor) -> None:
        x = images.flatten(1)
        components = self.components or self._most_likely(x)
        axes = principal_axes(x)
        if components >= len(axes.variance):
            most = len(axes.variance) - 1
            advice = f"write model.detector.components={most}, or less" if most else "use others"
            raise ValueError(
                f"model.detector.components={components}: {len(x)} training images span {len(axes.variance)} "
                f"dimensions: {advice}"
            )
        noise = noise_variances(axes.variance, x.shape[1])[components - 1]
        fitted = axes.mean, axes.variance[:components], axes.direction[:, :components].contiguous(), noise
        for name, value in zip(("mean", "variance", "direction", "noise_variance"), fitted, strict=True):
            self.set_fitted(name, value.float())

    def _most_likely(self, x: Tensor) -> int:
        order = torch.randperm(len(x), generator=self.noise, device=self.noise.device).to(x.device)
        held_out, fitted = order[: len(x) // HELD_OUT], order[len(x) // HELD_OUT :]
        axes = principal_axes(x[fitted])
        if len(axes.variance) < 2:
            raise ValueError(f"the {len(x)} training images are too much alike for principal components: use others")
        return int(log_likelihoods(axes, x[held_out]).argmax()) + 1

    def _residual(self, x: Tensor) -> tuple[Tensor, Tensor]:
        centred = x.flatten(1) - self.mean
        y = centred @ self.direction  # (B,k)
        return y, centred - y @ self.direction.T  # (B,D)

    def terms(self, x: Tensor) -> Mapping[str, Tensor]:
        """``residual`` and ``likelihood``, whichever of them is the score."""
        y, residual = self._residual(x)
        error = residual.square().sum(1)
        dimensions, components = self.direction.shape
        volume = self.variance.log().sum() + (dimensions - components) * self.noise_variance.log()
        mahalanobis = (y.square() / self.variance).sum(1) + error / self.noise_variance
        likelihood = (dimensions * math.log(2 * math.pi) + volume + mahalanobis) / 2
        return {"residual": error / dimensions, "likelihood": likelihood}

    def combine(self, terms: Mapping[str, Tensor]) -> Tensor:
        return terms[self.score_rule]

    def reconstruct(self, x: Tensor) -> Tensor:
        return x - self._residual(x)[1].view_as(x)
