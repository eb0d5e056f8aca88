"""Robust deep autoencoder: splits the training set into a part that an autoencoder rebuilds and a few outliers.

Legend of the shape comments: B images in a batch, N in the training set, P = C S S pixels of an image, M outliers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anomaly_lab.detector import Batch, Detector
from anomaly_lab.errors import refuse_fewer


class _TiedAutoencoder(nn.Module):
    """Sigmoid layers whose decoder has the encoder's matrices, transposed: (B,P) -> (B,P) in (0, 1)."""

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        pairs = list(itertools.pairwise(sizes))
        self.weights = nn.ParameterList(torch.empty(b, a) for a, b in pairs)
        self.down = nn.ParameterList(torch.empty(b) for _, b in pairs)
        self.up = nn.ParameterList(torch.empty(a) for a, _ in pairs)
        self.reset()

    def reset(self, generator: torch.Generator | None = None) -> None:
        """New weights: Glorot's for the matrices, U(-0.1, 0.1) for the biases."""
        for weight in self.weights:
            nn.init.xavier_uniform_(weight, generator=generator)
        for bias in [*self.down, *self.up]:
            nn.init.uniform_(bias, -0.1, 0.1, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        for weight, bias in zip(self.weights, self.down, strict=True):
            x = torch.sigmoid(F.linear(x, weight, bias))
        for weight, bias in zip(reversed(self.weights), reversed(self.up), strict=True):
            x = torch.sigmoid(F.linear(x, weight.T, bias))
        return x


class RobustAutoencoder(Detector):
    """X = L + S: an autoencoder is trained on L, and S takes up the few images that it explains worst.

    Zhou & Paffenroth, "Anomaly detection with robust deep autoencoders", KDD 2017, the l2,1 model for anomalies, in the
    order of the authors' code (zc8340311/RobustAutoencoder@f87cfdd):

        min |L - D(E(L))|_2 + lambda |S^T|_{2,1},    X = L + S,  one row of S an image

    in rounds of ``inner`` epochs; each begins with new weights, and between two of them

        R = X - D(E(L)),    S_i = max(0, 1 - lambda / |R_i|_2) R_i,    L = X - S

    The first term is a mean square over pixels and images. The anomaly score of any image is |x - D(E(x))|_2. Training
    images with S_i != 0 after the last round are those it takes for anomalies (`rejected_images`).

    *Where we differ from the authors' code:* they choose lambda by the labels of the very images they detect in; here
    it is the (1 - ``contamination``) quantile of |R_i| after the first round, so that S takes the share of images that
    one expects to be anomalous; with ``contamination`` 0 the method is an autoencoder that starts anew every round.
    They descend the gradient; here Adam does, whose state goes on when the weights start anew. Their method scores the
    images it is trained on; here the test images are others.

    Args:
        widths: units of the encoder's layers.
        contamination: expected share of anomalies in the training set, in [0, 1).
        inner: epochs of a round.
    """

    threshold: Tensor  # lambda, ()
    outlier: Tensor  # int64 (M,): places among the training images
    outlier_index: Tensor  # int64 (M,): places in the data set
    sparse: Tensor  # (M,P): their rows of S; all other rows are 0

    def __init__(self, image_shape: Sequence[int], *, widths: Sequence[int], contamination: float, inner: int) -> None:
        super().__init__(image_shape)
        if not 0 <= contamination < 1:
            raise ValueError(f"contamination={contamination}: choose a share from 0 to below 1")
        refuse_fewer(1, inner=inner)
        self.contamination, self.inner = contamination, inner
        self.autoencoder = _TiedAutoencoder([math.prod(image_shape), *widths])
        self.register_buffer("threshold", torch.full((), torch.inf))
        for name in ("outlier", "outlier_index"):
            self.set_fitted(name, torch.empty(0, dtype=torch.long))
        self.set_fitted("sparse", torch.empty(0, math.prod(image_shape)))

    def players(self) -> Mapping[str, Sequence[nn.Module]]:
        return {"autoencoder": [self.autoencoder]}

    def before_fit(self, images: Tensor) -> None:
        if self.contamination and (self.training_images.everything().index < 0).any():
            raise ValueError("this method keeps what it takes from each training image: use OneClassData")

    def before_epoch(self, epoch: int) -> None:
        if epoch > 1 and (epoch - 1) % self.inner == 0:
            self._shrink()
            self.autoencoder.reset(self.noise)

    def plays(self, batch: Batch) -> Iterator[Mapping[str, Tensor]]:
        mine = (batch.index[:, None] == self.outlier_index).to(batch.x.dtype)  # (B,M)
        explained = batch.x.flatten(1) - mine @ self.sparse.to(batch.x.dtype)  # L, (B,P)
        yield {"autoencoder": (explained - self.autoencoder(explained)).square().mean()}

    def _shrink(self) -> None:
        """S from the present autoencoder, and lambda the first time."""
        training = self.training_images.everything()
        x = training.x.flatten(1)  # (N,P)
        explained = x.index_add(0, self.outlier, -self.sparse)
        residual = x - torch.cat([self.autoencoder(some) for some in explained.split(1000)])
        size = residual.norm(dim=1)  # (N,)
        if self.threshold.isinf() and self.contamination:
            self.threshold.copy_(size.quantile(1 - self.contamination))
        outlier = (size > self.threshold).nonzero().squeeze(1)
        self.set_fitted("outlier", outlier)
        self.set_fitted("outlier_index", training.index[outlier])
        self.set_fitted("sparse", (1 - self.threshold / size[outlier])[:, None] * residual[outlier])

    @property
    def scored_after_fit(self) -> bool:
        return False  # only S needs the end of the last round

    def after_fit(self, images: Tensor) -> None:
        self._shrink()

    def rejected_images(self) -> Mapping[str, Tensor]:
        return {"S": self.outlier}

    def score(self, x: Tensor) -> Tensor:
        return (x - self.reconstruct(x)).flatten(1).norm(dim=1)

    def reconstruct(self, x: Tensor) -> Tensor:
        return self.autoencoder(x.flatten(1)).view_as(x)
