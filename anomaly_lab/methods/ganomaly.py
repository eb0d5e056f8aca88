"""GANomaly: an encoder-decoder-encoder generator and a discriminator, scored by the latent gap (Akcay et al. 2018).

Legend of the shape comments: B images, C channels, S = image size, d = latent size.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anomaly_lab.detector import Batch, Detector
from anomaly_lab.networks import DCGANDecoder, DCGANDiscriminator, DCGANEncoder, init_dcgan

COLLAPSED_DISCRIMINATOR = 1e-5
"""Below this loss the published code draws the discriminator's weights anew."""


class GANomaly(Detector):
    """Generator G = (G_E, G_D, E) and discriminator D with features f and output in (0, 1).

    Akcay, Atapour-Abarghouei & Breckon, "GANomaly: semi-supervised anomaly detection via adversarial training", ACCV
    2018 (arXiv 1805.06725), in the losses of the authors' code (samet-akcay/ganomaly@78da4ea). With means over all
    elements and

        z = G_E(x)    x^ = G_D(z)    z^ = E(x^)

        L_adv = |f(x) - f(x^)|_2^2    (1)    L_con = |x - x^|_1    (2)    L_enc = |z - z^|_2^2    (3)
        L_G = w_adv L_adv + w_con L_con + w_enc L_enc                                             (4)
        L_D = (BCE(D(x), 1) + BCE(D(x^), 0)) / 2

    the two play from one pass, and the anomaly score is A(x) = mean_k (z_k - z^_k)^2 (5). Where L_D falls below 1e-5
    the discriminator starts again from new weights (its optimiser goes on, as in the authors' code).

    *Where we differ from the authors' code:* scores are taken in eval mode (theirs normalises test batches by their
    own statistics, which on a test set sorted by label leaks the label: ``trainer.measure_leak=true`` measures it),
    are not rescaled by the test set's extremes, and no epoch is chosen by test AUROC. D sees x and x^ once a step
    instead of twice: the features for L_adv are those of the pass that L_D needs anyway. Its weights do not change in
    between, so the gradients are the same; its running statistics, which nothing uses, move half as often. Images
    are in [-1, 1], the range of Tanh.

    Args:
        width: channels after the first convolution.
        latent_size: d.
        w_adv, w_con, w_enc: weights of (1), (2) and (3).
        extra_layers: 3×3 convolutions added to each network at its largest feature map.
    """

    collapsed: Tensor

    def __init__(
        self,
        image_shape: Sequence[int],
        *,
        width: int,
        latent_size: int,
        w_adv: float,
        w_con: float,
        w_enc: float,
        extra_layers: int,
    ) -> None:
        super().__init__(image_shape)
        channels, size, _ = image_shape
        encoder = functools.partial(
            DCGANEncoder, channels, size, width, latent_size, tanh=False, extra_layers=extra_layers
        )
        self.w_adv, self.w_con, self.w_enc = w_adv, w_con, w_enc
        self.encoder, self.second_encoder = encoder(), encoder()
        self.decoder = DCGANDecoder(channels, size, width, latent_size, nn.ReLU(), extra_layers)
        self.discriminator = DCGANDiscriminator(channels, size, width, extra_layers=extra_layers)
        # Of the step just done; a buffer for the sake of its place in memory.
        self.register_buffer("collapsed", torch.zeros((), dtype=torch.bool), persistent=False)

    def players(self) -> Mapping[str, Sequence[nn.Module]]:
        return {"generator": [self.encoder, self.decoder, self.second_encoder], "discriminator": [self.discriminator]}

    def plays(self, batch: Batch) -> Iterator[Mapping[str, Tensor]]:
        x = batch.x
        z = self.encoder(x)  # (B,d)
        fake = self.decoder(z)  # (B,C,S,S)
        z_fake = self.second_encoder(fake)  # (B,d)
        real_logit, real_features = self.discriminator(x)
        fake_logit, fake_features = self.discriminator(fake)

        adv = F.mse_loss(fake_features, real_features)  # (1)
        con = F.l1_loss(fake, x)  # (2)
        enc = F.mse_loss(z_fake, z)  # (3)
        loss_d = 0.5 * (
            F.binary_cross_entropy_with_logits(real_logit, torch.ones_like(real_logit))
            + F.binary_cross_entropy_with_logits(fake_logit, torch.zeros_like(fake_logit))
        )
        yield {
            "generator": self.w_adv * adv + self.w_con * con + self.w_enc * enc,  # (4)
            "discriminator": loss_d,  # of its own weights alone, so fake needs no detaching
        }
        for name, term in (("loss_adv", adv), ("loss_con", con), ("loss_enc", enc)):
            self.record(name, term)
        self.collapsed.copy_(loss_d.detach() < COLLAPSED_DISCRIMINATOR)
        self.record("discriminator_resets", self.collapsed.clone())

    def after_step(self) -> None:
        if self.collapsed:
            self.discriminator.apply(functools.partial(init_dcgan, generator=self.noise))

    def score(self, x: Tensor) -> Tensor:
        z = self.encoder(x)
        return (z - self.second_encoder(self.decoder(z))).square().mean(1)  # (5)

    def reconstruct(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))
