"""GPND: the likelihood of an image under the manifold that an adversarial autoencoder learned (Pidhorskyi et al. 2018).

Legend of the shape comments: B images, N training images, P = C S S pixels, d = latent size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import jacfwd

from anomaly_lab.adversarial import bce
from anomaly_lab.detector import Batch, Detector
from anomaly_lab.networks import DCGANDecoder, DCGANDiscriminator, DCGANEncoder, LatentCritic

SINGULAR = 1e-6
"""Added, squared, to the squares of the Jacobian's singular values: a code that G ignores has a finite volume."""

MAX_SHAPE = 10.0
"""Largest shape of a fitted generalised Gaussian: 2 is a Gaussian, a growing shape approaches a box."""


class GPND(Detector):
    """Encoder E, decoder G, a discriminator D_x of images and D_z of codes; the score is -log p(x).

    Pidhorskyi, Almohsen & Doretto, "Generative probabilistic novelty detection with adversarial autoencoders", NeurIPS
    2018 (arXiv 1807.02588), in the order of the authors' code (podgorskiy/GPND@d44896b). With z ~ N(0, I), drawn anew
    for each of the first three, and x^ = G(E(x)) in [-1, 1], a step moves one after the other

        D_x     BCE(D_x(x), 1) + BCE(D_x(G(z)), 0)
        G       BCE(D_x(G(z)), 1)
        D_z     BCE(D_z(z), 1) + BCE(D_z(E(x)), 0)
        E, G    BCE(D_z(E(x)), 1) + w_rec BCE(x^, x)

    The manifold is where G maps to. An image lies off it by w = x - x^, and its tangent space at z = E(x) is spanned by
    the Jacobian of G, J = U S V^T. With M = power (P - d) dimensions counted off the manifold, the density is

        log p(x) = - log |det S|  +  sum_k log p_k(z_k)  +  log p(w)
        log p(w) = log Gamma(M/2) - M/2 log(2 pi) - (M - 1) log |w| + log p_r(|w|)

    with p_k a generalised Gaussian fitted to the k-th entry of the training codes by maximum likelihood, and p_r the
    density of the training images' |w|. All Jacobians of a batch take d forward passes, and log |det S| is half the log
    determinant of J^T J.

    *Where we differ from the authors' code:* p_r is a kernel density (a Gaussian's, Scott's rule) where theirs is a
    histogram of 30 bins, 1e-308 beyond the last, and log p_k is computed as such, where theirs is the logarithm of a
    density that underflows and their sum of it then -1000: both tie images, the most anomalous ones among them. No p_k
    has a shape above 10: a fit to few codes runs away to a box, outside of which no code has a finite log density. D_x,
    G and E have one width, convolutions have no bias, D_z starts from Glorot's weights (theirs from N(0, 0.02)). The
    rates fall after the epoch of the schedule, theirs one epoch earlier. (2 pi)^(M/2) is theirs as well; a sphere's
    area has 2 pi^(M/2), which shifts all scores alike.
    Their log |det S| has the other sign: they differentiate E, whose Jacobian is about the inverse of G's; ours is the
    paper's formula. Their threshold is chosen on anomalies, ours by the run from held-out normals. Images are in [-1,
    1] and brought to [0, 1] for BCE(x^, x) alone: the other terms change by a constant.

    Args:
        width: channels after the first convolution of E and D_x, before the last of G.
        critic_width: units of the two hidden layers of D_z.
        latent_size: d.
        w_rec: weight of the reconstruction.
        power: the authors' correction of the number of dimensions; 1 is the paper's formula.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        *,
        width: int,
        critic_width: int,
        latent_size: int,
        w_rec: float,
        power: float,
    ) -> None:
        super().__init__(image_shape)
        if not power > 0:
            raise ValueError(f"model.detector.power={power}: give a number above 0")
        channels, size, _ = image_shape
        self.latent_size, self.w_rec = latent_size, w_rec
        self.dimensions = power * (math.prod(image_shape) - latent_size)  # M
        self.encoder = DCGANEncoder(channels, size, width, latent_size, tanh=False)
        self.decoder = DCGANDecoder(channels, size, width, latent_size, nn.ReLU())
        self.image_discriminator = DCGANDiscriminator(channels, size, width)
        self.latent_discriminator = LatentCritic(latent_size, [critic_width, critic_width])

    def players(self) -> Mapping[str, Sequence[nn.Module]]:
        return {
            "image_discriminator": [self.image_discriminator],
            "decoder": [self.decoder],
            "latent_discriminator": [self.latent_discriminator],
            "autoencoder": [self.encoder, self.decoder],
        }

    def plays(self, batch: Batch) -> Iterator[Mapping[str, Tensor]]:
        x = batch.x
        with torch.no_grad():
            made = self.decoder(self.randomness.normal(x, self.latent_size))
        yield {
            "image_discriminator": bce(self.image_discriminator(x)[0], 1) + bce(self.image_discriminator(made)[0], 0)
        }
        made = self.decoder(self.randomness.normal(x, self.latent_size))
        yield {"decoder": bce(self.image_discriminator(made)[0], 1)}
        z = self.randomness.normal(x, self.latent_size)
        with torch.no_grad():
            code = self.encoder(x)
        yield {"latent_discriminator": bce(self.latent_discriminator(z), 1) + bce(self.latent_discriminator(code), 0)}
        code = self.encoder(x)
        adversarial, rec = bce(self.latent_discriminator(code), 1), self.cross_entropy(self.decoder(code), x)
        self.record("loss_reconstruction", rec)
        yield {"autoencoder": adversarial + self.w_rec * rec}

    @staticmethod
    def cross_entropy(rebuilt: Tensor, x: Tensor) -> Tensor:
        """BCE(x^, x) of images in [-1, 1], brought to [0, 1]; its mean, a scalar."""
        with torch.autocast(x.device.type, enabled=False):  # which refuses logarithms of half-precision probabilities
            return F.binary_cross_entropy((rebuilt.float() + 1) / 2, (x.float() + 1) / 2)

    def after_fit(self, images: Tensor) -> None:
        from scipy.stats import gennorm  # a second

        found = [self.off_manifold(x) for x in images.split(1000)]
        codes, distances = (torch.cat(parts).double().cpu() for parts in zip(*found, strict=True))  # (N,d), (N,)
        fitted = []
        for column in codes.numpy().T:
            shape, place, scale = gennorm.fit(column)
            # A fit to few codes can diverge to a box, outside of which the density is 0.
            fitted.append(gennorm.fit(column, f0=MAX_SHAPE) if shape > MAX_SHAPE else (shape, place, scale))
        self.set_fitted("gaussians", torch.tensor(fitted).T.to(images))  # (3,d)
        self.set_fitted("distances", distances.to(images))

    def off_manifold(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """E(x) and |x - G(E(x))|: (B,C,S,S) -> (B,d), (B,)"""
        code = self.encoder(x)
        return code, (x - self.decoder(code)).flatten(1).norm(dim=1)

    def terms(self, x: Tensor) -> Mapping[str, Tensor]:
        code, distance = self.off_manifold(x)
        return {
            "jacobian": self.log_volume(code),
            "latent": -self.log_code(code).sum(1),
            "residual": -self.log_distance(distance),
        }

    def combine(self, terms: Mapping[str, Tensor]) -> Tensor:
        return terms["jacobian"] + terms["latent"] + terms["residual"]

    def log_volume(self, z: Tensor) -> Tensor:
        """log |det S| of the Jacobian of G at each code: (B,d) -> (B,)"""

        def shifted(step: Tensor) -> Tensor:
            return self.decoder(z + step).flatten(1)  # (B,P)

        jacobian = jacfwd(shifted)(torch.zeros_like(z[0]))  # (B,P,d): every code moves alike
        wide = jacobian.double()  # half of the digits are lost in the square
        gram = wide.mT @ wide + SINGULAR**2 * torch.eye(len(z[0]), device=z.device)
        return torch.linalg.slogdet(gram).logabsdet.to(z) / 2

    def log_code(self, z: Tensor) -> Tensor:
        """log p_k(z_k): (B,d) -> (B,d)"""
        shape, place, scale = self.get_buffer("gaussians")
        return (shape / (2 * scale)).log() - torch.lgamma(1 / shape) - ((z - place).abs() / scale) ** shape

    def log_distance(self, r: Tensor) -> Tensor:
        """log p(w) from r = |w|: (B,) -> (B,)"""
        known, m = self.get_buffer("distances"), self.dimensions  # (N,)
        width = known.std() * len(known) ** -0.2
        kernels = -0.5 * ((r[:, None] - known) / width).square()  # (B,N)
        density = kernels.logsumexp(1) - (len(known) * math.sqrt(2 * math.pi) * width).log()
        return math.lgamma(m / 2) - m / 2 * math.log(2 * math.pi) - (m - 1) * r.log() + density

    def reconstruct(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))
