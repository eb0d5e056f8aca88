"""OCGAN: an autoencoder whose bounded latent space is made to hold the normal class everywhere (Perera et al. 2019).

Legend of the shape comments: B images, d = latent size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from anomaly_lab.adversarial import bce
from anomaly_lab.detector import Batch, Detector
from anomaly_lab.networks import DCGANDecoder, DCGANDiscriminator, DCGANEncoder, LatentCritic


class OCGAN(Detector):
    """Encoder E to (-1, 1)^d and decoder G, held to it by a latent and an image discriminator and by mined codes.

    Perera, Nallapati & Xiang, "OCGAN: one-class novelty detection using GANs with constrained latent representations",
    CVPR 2019 (arXiv 1903.08550), in the order of the authors' code (PramuPerera/OCGAN@0dda279, ``andgan.py``). With
    u ~ U(-1, 1)^d, noisy images x~ = x + sigma n with n ~ N(0, I), and x^ = G(E(x~)), a step is

        D_v, D_l  (BCE(D_v(x), 1) + BCE(D_v(G(u)), 0)) / 2   and   (BCE(D_l(u'), 1) + BCE(D_l(E(x~)), 0)) / 2
        C         (BCE(C(x^), 1) + BCE(C(G(u)), 0)) / 2            is this an image of the class?
        mining    u <- tanh(atanh u - rate g), g the gradient of BCE(C(G(u)), 0) by atanh u, ``mining_steps`` times
        E, G      w_latent BCE(D_l(E(x~)), 1) + BCE(D_v(G(u)), 1) + w_rec |x - x^|² / n

    Mining moves u to codes whose images C rejects; there G learns to render the class. It waits for the networks to
    learn something: the stages ``plain`` and ``mined`` of ``model.budget.stages``. The anomaly score is
    |x - G(E(x))|² / n, of the image without noise.

    *Where we differ from the authors' code:* D_l has one logit (theirs ends in 16 sigmoids that go through a second
    one); u is mined from all of (-1, 1)^d, where theirs, a tanh of U(-1, 1), never leaves (-.76, .76)^d although D_v
    was taught on all of it; E ends in the paper's tanh (a flag that is off there); images have 32 pixels, not 61 in
    three channels, and DCGAN's 4×4 kernels; D_l's hidden units are leaky (theirs are cut off at 0); u is mined with the
    C that has just moved (in the code that is stored publicly, before C moves); no dropout; the last epoch counts
    (theirs is the one with the smallest error on held-out normals). Their indentation runs the end of an epoch after
    every batch; ours does not. What they name L1 in the loss of E and G is half the mean square, so their weights of it
    count half. A TensorFlow port (nuclearboy95/Anomaly-Detection-OCGAN-tensorflow@6be4602) cuts the test set to a
    length that follows from the training set's, about half of MNIST's in the order of the file, and its README's
    figures are of that half.

    Args:
        width: channels of E and C after their first convolution, of G before its last.
        critic_width: those of D_v.
        latent_widths: hidden units of D_l.
        latent_size: d.
        sigma: of the noise.
        w_latent, w_rec: weights in the loss of E and G.
        mining_steps, mining_rate: gradient steps on u in one training step, and their rate.
    """

    STAGES = ("plain", "mined")

    def __init__(
        self,
        image_shape: Sequence[int],
        *,
        width: int,
        critic_width: int,
        latent_widths: Sequence[int],
        latent_size: int,
        sigma: float,
        w_latent: float,
        w_rec: float,
        mining_steps: int,
        mining_rate: float,
    ) -> None:
        super().__init__(image_shape)
        channels, size, _ = image_shape
        self.latent_size, self.sigma, self.w_latent, self.w_rec = latent_size, sigma, w_latent, w_rec
        self.mining_steps, self.mining_rate = mining_steps, mining_rate
        self.encoder = DCGANEncoder(channels, size, width, latent_size, tanh=True)
        self.decoder = DCGANDecoder(channels, size, width, latent_size, nn.ReLU())
        self.image_discriminator = DCGANDiscriminator(channels, size, critic_width)
        self.latent_discriminator = LatentCritic(latent_size, latent_widths)
        self.classifier = DCGANDiscriminator(channels, size, width)

    def players(self) -> Mapping[str, Sequence[nn.Module]]:
        return {
            "image_discriminator": [self.image_discriminator],
            "latent_discriminator": [self.latent_discriminator],
            "classifier": [self.classifier],
            "autoencoder": [self.encoder, self.decoder],
        }

    def plays(self, batch: Batch) -> Iterator[Mapping[str, Tensor]]:
        x, u, other = batch.x, self.sample(batch.x), self.sample(batch.x)
        noise = torch.randn(x.shape, generator=self.noise, device=x.device, dtype=x.dtype)
        with torch.no_grad():
            code = self.encoder(x + self.sigma * noise)  # (B,d)
            rebuilt, made = self.decoder(code), self.decoder(u)
        yield {
            "image_discriminator": self.game(self.image_logit, x, made),
            "latent_discriminator": self.game(self.latent_discriminator, other, code),
        }
        yield {"classifier": self.game(self.class_logit, rebuilt, made)}
        if self.stage == "mined":
            u = self.mine(u)
        code = self.encoder(x + self.sigma * noise)
        latent, visual = bce(self.latent_discriminator(code), 1), bce(self.image_logit(self.decoder(u)), 1)
        rec = (x - self.decoder(code)).square().mean()
        self.record("loss_reconstruction", rec)
        yield {"autoencoder": self.w_latent * latent + visual + self.w_rec * rec}

    def sample(self, x: Tensor) -> Tensor:
        """As many codes from U(-1, 1)^d as there are images: (B,C,S,S) -> (B,d)."""
        return 2 * self.randomness.uniform(x, self.latent_size) - 1

    @staticmethod
    def game(discriminator: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor) -> Tensor:
        """(BCE(D(real), 1) + BCE(D(fake), 0)) / 2, a scalar."""
        return 0.5 * (bce(discriminator(real), 1) + bce(discriminator(fake), 0))

    def image_logit(self, x: Tensor) -> Tensor:
        """D_v: (B,C,S,S) -> (B,)"""
        return self.image_discriminator(x)[0]

    def class_logit(self, x: Tensor) -> Tensor:
        """C: (B,C,S,S) -> (B,)"""
        return self.classifier(x)[0]

    def mine(self, u: Tensor) -> Tensor:
        """Move each code to where C calls its image least of the class: (B,d) -> (B,d), in (-1, 1)."""
        mu = u.clamp(1e-6 - 1, 1 - 1e-6).atanh()
        for _ in range(self.mining_steps):
            mu.requires_grad_()
            # Of each code's own loss: the mean would make the rate depend on the size of the batch.
            (gradient,) = torch.autograd.grad(len(u) * bce(self.class_logit(self.decoder(mu.tanh())), 0), mu)
            mu = (mu - self.mining_rate * gradient).detach()
        return mu.tanh()

    def score(self, x: Tensor) -> Tensor:
        return (x - self.reconstruct(x)).square().flatten(1).mean(1)

    def reconstruct(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))
