"""AnoGAN: a GAN of the normal images, and for each test image a search of the code that renders it (Schlegl 2017).

Legend of the shape comments: B images, T starts of the search, d = latent size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from anomaly_lab.adversarial import bce
from anomaly_lab.detector import Batch, Detector
from anomaly_lab.errors import refuse_fewer
from anomaly_lab.networks import DCGANDecoder, DCGANDiscriminator


class AnoGAN(Detector):
    """Generator G and discriminator D with features f; the score is what the best code found leaves unexplained.

    Schlegl, Seeböck, Waldstein, Schmidt-Erfurth & Langs, "Unsupervised anomaly detection with generative adversarial
    networks to guide marker discovery", IPMI 2017 (arXiv 1703.05921). In every step D moves, then G, with z ~ N(0, I):

        L_D = BCE(D(x), 1) + BCE(D(G(z)), 0)
        L_G = BCE(D(G(z)), 1)

    For a test image, ``search_steps`` steps of Adam on z alone, from a z of the prior, lower

        L(z) = (1 - lambda) R(z) + lambda F(z)     R = sum |x - G(z)|,   F = sum |f(x) - f(G(z))|

    and the anomaly score is L at the last z. A batch is searched at once: the sum of its losses has in each code the
    gradient of that image's loss alone, Adam works on each number by itself, and batch norm is in eval mode.

    *Where we differ from public code* (no official one was found; LeeDoYup/AnoGAN@4c650b3 is a port): the search is
    tried from ``starts`` codes and the best end counts, for a single one often ends in another mode (``starts: 1`` is
    the paper's). The starts are drawn once, with the weights, and are the same for all images, so that a score
    depends on its image alone. Adam's rate is an option: the port's 0.001 moves no entry of a code by more than 0.1 in
    100 steps, which is no search in N(0, I). Images have 32 pixels, not 64: R and F are sums over an image, as in the
    paper, so lambda weighs them differently at each size. "Anomaly Detection of MNIST is not yet available" in that
    port, by its README, so no figure on MNIST can be its.

    Args:
        width: channels of D after its first convolution, of G before its last.
        latent_size: d.
        search_steps: steps of Adam for a score. search_rate: their learning rate. starts: T.
        feature_weight: lambda.
    """

    start: Tensor

    def __init__(
        self,
        image_shape: Sequence[int],
        *,
        width: int,
        latent_size: int,
        search_steps: int,
        search_rate: float,
        starts: int,
        feature_weight: float,
    ) -> None:
        super().__init__(image_shape)
        refuse_fewer(0, search_steps=search_steps)
        refuse_fewer(1, starts=starts)
        if not 0 <= feature_weight <= 1:
            raise ValueError(f"model.detector.feature_weight={feature_weight}: choose a number from 0 to 1")
        channels, size, _ = image_shape
        self.latent_size, self.search_steps, self.search_rate = latent_size, search_steps, search_rate
        self.feature_weight = feature_weight
        self.generator = DCGANDecoder(channels, size, width, latent_size, nn.ReLU())
        self.discriminator = DCGANDiscriminator(channels, size, width)
        self.register_buffer("start", torch.randn(starts, latent_size))  # (T,d)

    def players(self) -> Mapping[str, Sequence[nn.Module]]:
        return {"discriminator": [self.discriminator], "generator": [self.generator]}

    def plays(self, batch: Batch) -> Iterator[Mapping[str, Tensor]]:
        fake = self.generator(self.randomness.normal(batch.x, self.latent_size))
        real_logit, fake_logit = self.discriminator(batch.x)[0], self.discriminator(fake.detach())[0]
        yield {"discriminator": bce(real_logit, 1) + bce(fake_logit, 0)}
        yield {"generator": bce(self.discriminator(fake)[0], 1)}

    @property
    def scored_after_fit(self) -> bool:
        return True  # a look at held-out normals would be a search for each

    def terms(self, x: Tensor) -> Mapping[str, Tensor]:
        return self.gaps(x, self.discriminator.features(x), self.search(x))

    def combine(self, terms: Mapping[str, Tensor]) -> Tensor:
        return (1 - self.feature_weight) * terms["residual"] + self.feature_weight * terms["feature"]

    def reconstruct(self, x: Tensor) -> Tensor:
        return self.generator(self.search(x))

    def search(self, x: Tensor) -> Tensor:
        """The code of each image with the smallest L that ``search_steps`` steps from T starts find: (B,d)."""
        z = self.start.repeat(len(x), 1).requires_grad_()  # (B T,d)
        targets = x.repeat_interleave(len(self.start), 0)  # (B T,C,S,S)
        wanted = self.discriminator.features(targets)
        adam = torch.optim.Adam([z], lr=self.search_rate)
        with torch.enable_grad():
            for _ in range(self.search_steps):
                (z.grad,) = torch.autograd.grad(self.combine(self.gaps(targets, wanted, z)).sum(), z)
                adam.step()
        found = z.detach().view(len(x), len(self.start), -1)
        with torch.no_grad():
            best = self.combine(self.gaps(targets, wanted, z)).view(len(x), -1).argmin(1)  # (B,)
        return found[torch.arange(len(x), device=x.device), best]

    def gaps(self, x: Tensor, wanted: Tensor, z: Tensor) -> Mapping[str, Tensor]:
        """R(z) and F(z) of images (B,C,S,S) with features ``wanted`` and of codes (B,d), (B,) each."""
        made = self.generator(z)
        return {
            "residual": (x - made).abs().flatten(1).sum(1),
            "feature": (wanted - self.discriminator.features(made)).abs().flatten(1).sum(1),
        }
