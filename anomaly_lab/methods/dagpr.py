"""An autoencoder whose codes a Gaussian process tells normal from odd, in training images and in others (after DAGPR).

Legend of the shape comments: B images, N in the training set, V at whose codes the process is told a value, C channels,
S = image size, d = latent size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from anomaly_lab.detector import Batch, Detector
from anomaly_lab.errors import refuse_fewer
from anomaly_lab.methods.classical import squared_distances
from anomaly_lab.networks import DCGANDecoder, DCGANEncoder

EPS = 1e-12
"""Squared distances of codes below this share of their squared length are rounding: codes are computed in float32."""


class AutoencodingGaussianProcess(Detector):
    """DAGPR as far as its abstract tells it: a reconstruction, not a re-implementation.

    Fan, Zhang, Zhu, Zhang, Yang & Cao, "Robust deep auto-encoding Gaussian process regression for unsupervised anomaly
    detection", Neurocomputing 376, 2020, of which the abstract is known here, and no code. Known: a convolutional
    autoencoder finds features, and Gaussian process regression on them removes anomalies from contaminated training
    images. In rounds of ``inner`` epochs, with E the encoder and D the decoder,

        1. E and D move on   |x - D(E(x))|_2^2   of the images in use, at first all
        2. a Gaussian process is told the value 1 at the codes of V images in use; of the training images, the share
           ``contamination`` at whose codes it is the least certain go out of use, until the next round decides anew

    and the process of the score is told 1 at codes of images that are in use at last. At a code z it has

        m(z) = k^T (K + s^2 I)^-1 1,    v(z) = 1 - k^T (K + s^2 I)^-1 k,    k(z, z') = exp(-|z - z'|^2 / l^2)

    with s^2 the ``noise``. The anomaly score is the variance v(E(x)); 1 - m(E(x)) and the error of the reconstruction
    are recorded beside it. In step 2 an image among the V is judged by the process without it:
    v_i = 1 / [(K + s^2 I)^-1]_ii - s^2.

    *Guessed:* the value 1 for every normal image, from the nearest public family (one-class Gaussian processes:
    Kemmler, Rodner & Denzler, ACCV 2010), which has both m and v for scores: v here, by ones of ``digits`` (two digits
    of MNIST had been seen), as m goes past 1 between dense codes. The kernel, whose l^2 is the median of |z - z'|^2,
    for the likelihood of a constant value grows with l without end; that v removes, too; the rounds and the share;
    DCGAN's networks and the squared error; V, for time.

    Args:
        width: channels after the first convolution. latent_size: d.
        inner: epochs of a round. contamination: share of training images out of use, in [0, 1).
        support: V at most, drawn from the images in use. noise: s^2, above 0.
    """

    centre: Tensor  # float64 (1,d): mean of the codes below, which are kept without it: few digits are lost
    support_codes: Tensor  # float64 (V,d)
    inverse: Tensor  # float64 (V,V): of K + s^2 I
    scale: Tensor  # float64 (): l^2
    dropped: Tensor  # int64 (M,): places among the training images
    used: Tensor  # int64 (N - M,): the other places

    def __init__(
        self,
        image_shape: Sequence[int],
        *,
        width: int,
        latent_size: int,
        inner: int,
        contamination: float,
        support: int,
        noise: float,
    ) -> None:
        super().__init__(image_shape)
        refuse_fewer(1, inner=inner)
        refuse_fewer(2, support=support)
        if not 0 <= contamination < 1:
            raise ValueError(f"contamination={contamination}: choose a share from 0 to below 1")
        if noise <= 0:
            raise ValueError(f"noise={noise}: give a variance above 0")
        channels, size, _ = image_shape
        self.inner, self.contamination, self.support, self.noise_variance = inner, contamination, support, noise
        self.encoder = DCGANEncoder(channels, size, width, latent_size, tanh=False)
        self.decoder = DCGANDecoder(channels, size, width, latent_size, torch.nn.ReLU())
        self.register_buffer("centre", torch.zeros(1, latent_size, dtype=torch.float64))
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))
        self.set_fitted("support_codes", torch.empty(0, latent_size, dtype=torch.float64))
        self.set_fitted("inverse", torch.empty(0, 0, dtype=torch.float64))
        self.set_fitted("dropped", torch.empty(0, dtype=torch.long))
        self.set_fitted("used", torch.empty(0, dtype=torch.long))

    def players(self) -> Mapping[str, Sequence[torch.nn.Module]]:
        return {"autoencoder": [self.encoder, self.decoder]}

    def plays(self, batch: Batch) -> Iterator[Mapping[str, Tensor]]:
        yield {"autoencoder": F.mse_loss(self.reconstruct(batch.x), batch.x)}

    def before_fit(self, images: Tensor) -> None:
        self.set_fitted("used", torch.arange(len(images), device=images.device))
        self.set_fitted("dropped", self.used[:0])

    def before_epoch(self, epoch: int) -> None:
        if epoch > 1 and (epoch - 1) % self.inner == 0:
            self._clean(self.training_images.everything().x)

    def train_indices(self, epoch: int) -> Tensor | None:
        return self.used if len(self.dropped) else None

    def after_fit(self, images: Tensor) -> None:
        codes = self._clean(images)
        self._regress(codes, self.used)

    def rejected_images(self) -> Mapping[str, Tensor]:
        return {"dropped": self.dropped}

    def _clean(self, images: Tensor) -> Tensor:
        """Step 2: which training images are in use, by the codes (N,d) of all, which it returns."""
        codes = torch.cat([self.encoder(x) for x in images.split(1000)])
        told = self._regress(codes, self.used)
        variance = torch.cat([self.moments(z)[1] for z in codes.split(1000)])  # (N,)
        variance[told] = 1 / self.inverse.diagonal() - self.noise_variance
        count = round(self.contamination * len(codes))
        order = variance.argsort(descending=True, stable=True)
        self.set_fitted("dropped", order[:count].sort().values)
        self.set_fitted("used", order[count:].sort().values)
        return codes

    def _regress(self, codes: Tensor, used: Tensor) -> Tensor:
        """Tell the process 1 at some of the codes (N,d) at the places ``used``: the places (V,) of those."""
        drawn = torch.randperm(len(used), generator=self.noise, device=used.device)[: self.support]
        told = used[drawn].sort().values
        self.centre.copy_(codes[told].double().mean(0))
        z = codes[told].double() - self.centre
        squares = squared_distances(z, z)
        rows, columns = torch.triu_indices(len(z), len(z), 1, device=z.device)
        median = squares[rows, columns].median() if len(z) > 1 else squares.sum()
        # A single code, or one for all, says nothing of scale, and any will do.
        self.scale.copy_(median if median > EPS * (1 + self.centre.square().sum()) else torch.ones_like(median))
        kernel = (-squares / self.scale).exp()
        noise = self.noise_variance * torch.eye(len(z), dtype=z.dtype, device=z.device)
        self.set_fitted("support_codes", z)
        self.set_fitted("inverse", torch.cholesky_inverse(torch.linalg.cholesky(kernel + noise)))
        return told

    def moments(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """m and v of codes (B,d), both float64 (B,)."""
        k = (-squared_distances(z.double() - self.centre, self.support_codes) / self.scale).exp()  # (B,V)
        return k @ self.inverse.sum(1), 1 - ((k @ self.inverse) * k).sum(1)

    def terms(self, x: Tensor) -> Mapping[str, Tensor]:
        z = self.encoder(x)
        error = (x - self.decoder(z)).square().mean((1, 2, 3))
        mean, variance = self.moments(z)
        return {"variance": variance.to(x.dtype), "mean": (1 - mean).to(x.dtype), "reconstruction": error}

    def combine(self, terms: Mapping[str, Tensor]) -> Tensor:
        return terms["variance"]

    def reconstruct(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))
