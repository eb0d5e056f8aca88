"""Variational autoencoder, scored by what its likelihood bound is made of (Kingma & Welling 2014).

Legend of the shape comments: B images, P = C S S pixels of an image, d = latent size, K samples of a code.
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


def _hidden(sizes: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b, bias=False), nn.BatchNorm1d(b, eps=1e-4), nn.LeakyReLU(0.01)]
    return nn.Sequential(*layers)


class VAE(Detector):
    """A dense variational autoencoder of grey values in [0, 1] with a Bernoulli output.

    Kingma & Welling, "Auto-encoding variational Bayes", ICLR 2014, in the sizes of the baseline in Deep SAD's code
    (lukasruff/Deep-SAD-PyTorch@2e7aca3). With q(z|x) = N(mu(x), diag s(x)^2), p(z) = N(0, I) and the pixelwise
    cross-entropy BCE(x, D(z)) = -log p(x|z),

        L = BCE(x, D(z)) + KL,  z = mu + s e,  e from N(0, I)
        KL = 1/2 sum_i (mu_i^2 + s_i^2 - log s_i^2 - 1)

    The terms of the score, each with an AUROC of its own in the result:

        reconstruction  BCE(x, D(mu))
        kl              KL
        elbo            mean_k BCE(x, D(z_k)) + KL,  K samples; this one is the score
        squared_error   |x - D(mu)|_2^2, the reconstruction error of other tables. The cross-entropy of a grey pixel is
                        positive even if it is rebuilt exactly, so it is low for images with few grey pixels
        likelihood      -log 1/K sum_k p(x|z_k) p(z_k) / q(z_k|x), the importance-weighted bound (Burda et al. 2016) of
                        the same samples

    *Where we differ from that code:* its score is BCE(x, D(z)) of one sample drawn anew at each test, so that two
    passes over the same images rank them differently; here e_1, ..., e_K are drawn once, with the weights, for all.

    Args:
        widths: units of the encoder's hidden layers; the decoder's are these in reverse.
        latent_size: d. samples: K.
    """

    noise_of_score: Tensor  # (K,d)

    def __init__(self, image_shape: Sequence[int], *, widths: Sequence[int], latent_size: int, samples: int) -> None:
        super().__init__(image_shape)
        refuse_fewer(1, samples=samples)
        pixels = math.prod(image_shape)
        self.encoder = nn.Sequential(nn.Flatten(), *_hidden([pixels, *widths]), nn.Linear(widths[-1], 2 * latent_size))
        self.decoder = nn.Sequential(*_hidden([latent_size, *reversed(widths)]), nn.Linear(widths[0], pixels))
        self.register_buffer("noise_of_score", torch.randn(samples, latent_size))

    def players(self) -> Mapping[str, Sequence[nn.Module]]:
        return {"vae": [self.encoder, self.decoder]}

    def code(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """mu and log s^2, both (B,d)."""
        mu, log_variance = self.encoder(x).chunk(2, 1)
        return mu, log_variance

    def plays(self, batch: Batch) -> Iterator[Mapping[str, Tensor]]:
        x = batch.x
        mu, log_variance = self.code(x)
        noise = torch.randn(mu.shape, generator=self.noise, device=x.device, dtype=x.dtype)
        error = cross_entropy(x, self.decoder(mu + (log_variance / 2).exp() * noise)).mean()
        kl = divergence(mu, log_variance).mean()
        yield {"vae": error + kl}
        self.record("loss_reconstruction", error)
        self.record("loss_kl", kl)

    def terms(self, x: Tensor) -> Mapping[str, Tensor]:
        mu, log_variance = self.code(x)
        e = self.noise_of_score[:, None]  # (K,1,d)
        z = mu + (log_variance / 2).exp() * e  # (K,B,d)
        error = torch.stack([cross_entropy(x, self.decoder(one)) for one in z])  # (K,B)
        kl = divergence(mu, log_variance)
        # log p(z) - log q(z|x), in which the two constants cancel
        log_ratio = (e.square() + log_variance - z.square()).sum(2) / 2  # (K,B)
        rebuilt = self.decoder(mu)  # (B,P), logits
        return {
            "reconstruction": cross_entropy(x, rebuilt),
            "squared_error": (x.flatten(1) - torch.sigmoid(rebuilt)).square().sum(1),
            "kl": kl,
            "elbo": error.mean(0) + kl,
            "likelihood": math.log(len(z)) - (log_ratio - error).logsumexp(0),
        }

    def combine(self, terms: Mapping[str, Tensor]) -> Tensor:
        return terms["elbo"]

    def reconstruct(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.decoder(self.code(x)[0])).view_as(x)


def cross_entropy(x: Tensor, logits: Tensor) -> Tensor:
    """-log p(x|z) of Bernoulli pixels, summed: x (B,C,S,S) in [0, 1] and logits (B,P) -> (B,)."""
    return F.binary_cross_entropy_with_logits(logits, x.flatten(1), reduction="none").sum(1)


def divergence(mu: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mu, s^2) || N(0, 1)) summed over the code: (B,d), (B,d) -> (B,)."""
    return (mu.square() + log_variance.exp() - log_variance - 1).sum(1) / 2
