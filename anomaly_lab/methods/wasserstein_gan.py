"""Wasserstein GANs of the normal images: f-AnoGAN encodes a test image, ADGAN searches it (Schlegl 2019, Deecke 2018).

Legend of the shape comments: B images, C channels, S = image size, T starts of a search, d = latent size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from anomaly_lab.adversarial import wgan_gp
from anomaly_lab.detector import Batch, Detector
from anomaly_lab.errors import refuse_fewer
from anomaly_lab.networks import DCGANDecoder, DCGANDiscriminator, DCGANEncoder, layer_norm

CodeActivation = Literal["tanh", "3tanh", "linear"]

COPIED = 2**26
"""Most weights that the copies of a generator have together in ADGAN's search; with Adam's numbers a gigabyte."""


class WassersteinGAN(Detector):
    """Generator G and critic D of Gulrajani et al. 2017, with z ~ N(0, I):

        L_D = D(G(z)) - D(x) + penalty (|grad D| - 1)²        L_G = -D(G(z))

    A step is ``critic_rounds`` moves of D, each on fresh images and codes, then one of G. The networks are DCGAN's; D
    has layer norm in batch norm's place, because the penalty is of each image alone.

    Args:
        width: channels of D after its first convolution, of G before its last.
        latent_size: d.
        critic_rounds: moves of D for one of G.
        penalty: weight of the gradient penalty.
    """

    def __init__(
        self, image_shape: Sequence[int], *, width: int, latent_size: int, critic_rounds: int, penalty: float
    ) -> None:
        super().__init__(image_shape)
        refuse_fewer(1, critic_rounds=critic_rounds)
        channels, size, _ = image_shape
        self.latent_size, self.critic_rounds, self.penalty = latent_size, critic_rounds, penalty
        self.generator = DCGANDecoder(channels, size, width, latent_size, nn.ReLU())
        self.critic = DCGANDiscriminator(channels, size, width, norm=layer_norm)

    def players(self) -> Mapping[str, Sequence[nn.Module]]:
        return {"critic": [self.critic], "generator": [self.generator]}

    def plays(self, batch: Batch) -> Iterator[Mapping[str, Tensor]]:
        for number in range(self.critic_rounds):
            x = batch.x if number == 0 else self.next_batch().x
            with torch.no_grad():
                fake = self.generator(self.randomness.normal(x, self.latent_size))
            yield {"critic": wgan_gp(self.criticise, x, fake, self.penalty, self.noise)}
        yield {"generator": -self.criticise(self.generator(self.randomness.normal(batch.x, self.latent_size))).mean()}

    def criticise(self, x: Tensor) -> Tensor:
        """D(x): (B,C,S,S) -> (B,)"""
        return self.critic(x)[0]


class FAnoGAN(WassersteinGAN):
    """G and D with features f, then an encoder E between them, taught as the paper's ``izi_f``.

    Schlegl, Seeböck, Waldstein, Langs & Schmidt-Erfurth, "f-AnoGAN: fast unsupervised anomaly detection with
    generative adversarial networks", Medical Image Analysis 54 (2019), with the order and the constants of the
    authors' code (tSchlegl/f-AnoGAN@35b1de9). Two stages, ``model.budget.stages``: in ``gan`` G and D learn as in
    `WassersteinGAN`; in ``encoder`` they stand still, G in eval mode, and E moves on

        L_E = |x - G(E(x))|² / n + kappa |f(x) - f(G(E(x)))|² / n_f

    The anomaly score is L_E of the image.

    *Where we differ from the authors' code:* the networks are DCGAN's at our image size, 32 pixels, where theirs are
    residual at 64; E has layer norm, as D (theirs batch norm). ``code_activation`` names three outputs of E: under a
    tanh no code has an entry beyond 1, where a third of N(0, 1) lies; 3 tanh reaches nearly all of it. The dense
    generator of a port for MNIST (A03ki/f-AnoGAN@900f9d6) has batch norm with eps 0.8, a slip: 0.8 was meant as its
    momentum.

    Args: as in `WassersteinGAN`, and
        kappa: weight of the features.
        code_activation: ``tanh`` (the paper's), ``3tanh`` or ``linear``.
    """

    STAGES = ("gan", "encoder")

    def __init__(
        self,
        image_shape: Sequence[int],
        *,
        width: int,
        latent_size: int,
        critic_rounds: int,
        penalty: float,
        kappa: float,
        code_activation: CodeActivation,
    ) -> None:
        super().__init__(
            image_shape, width=width, latent_size=latent_size, critic_rounds=critic_rounds, penalty=penalty
        )
        channels, size, _ = image_shape
        self.kappa, self.code_activation = kappa, code_activation
        self.encoder = DCGANEncoder(channels, size, width, latent_size, tanh=False, norm=layer_norm)

    def players(self) -> Mapping[str, Sequence[nn.Module]]:
        return {**super().players(), "encoder": [self.encoder]}

    def plays(self, batch: Batch) -> Iterator[Mapping[str, Tensor]]:
        if self.stage == "encoder":
            self.generator.eval()  # its statistics are those of the images it learned to make
            yield {"encoder": self.combine(self.terms(batch.x)).mean()}
        else:
            yield from super().plays(batch)

    def encode(self, x: Tensor) -> Tensor:
        """E(x): (B,C,S,S) -> (B,d)"""
        code = self.encoder(x)
        if self.code_activation == "linear":
            return code
        return code.tanh() if self.code_activation == "tanh" else 3 * code.tanh()

    def terms(self, x: Tensor) -> Mapping[str, Tensor]:
        made = self.reconstruct(x)
        with torch.no_grad():
            wanted = self.critic.features(x)
        return {
            "residual": (x - made).square().flatten(1).mean(1),
            "feature": (wanted - self.critic.features(made)).square().flatten(1).mean(1),
        }

    def combine(self, terms: Mapping[str, Tensor]) -> Tensor:
        return terms["residual"] + self.kappa * terms["feature"]

    def reconstruct(self, x: Tensor) -> Tensor:
        return self.generator(self.encode(x))


class ADGAN(WassersteinGAN):
    """For each test image the code is searched, and with it the generator's own weights theta, from several starts.

    Deecke, Vandermeulen, Ruff, Mandt & Kloft, "Image anomaly detection with generative adversarial networks",
    ECML-PKDD 2018, with the constants of izikgo/AnomalyDetectionTransformations@6327041 (no official code was found).
    With l(z, theta) = |x - G_theta(z)|² / n, from each of T codes of the prior and from the trained theta,
    ``search_steps`` times

        z <- Adam(z, grad_z l)        theta <- Adam(theta, grad_theta l)        (beta_1 = 0.5)

    and the anomaly score is the mean over the starts of l at the end. All images of a batch are searched at once, each
    with a copy of theta of its own.

    *Where we differ from that code:* the networks are DCGAN's, with kernels of 4×4 and layer norm in the critic (there,
    of 3×3, and batch norm in both); batch norm is in eval mode in both moves (there, the one of theta normalises a
    batch of one image by itself); all test images are scored (there, 5000 drawn without a seed); the starts are drawn
    once, with the weights, so that a score depends on its image alone; l is read after the last moves (there, before
    the sixth one of z).

    Args: as in `WassersteinGAN`, and
        starts: T. search_steps: moves of z, and of theta.
        code_rate, weight_rate: learning rates of the two.
    """

    start: Tensor

    def __init__(
        self,
        image_shape: Sequence[int],
        *,
        width: int,
        latent_size: int,
        critic_rounds: int,
        penalty: float,
        starts: int,
        search_steps: int,
        code_rate: float,
        weight_rate: float,
    ) -> None:
        super().__init__(
            image_shape, width=width, latent_size=latent_size, critic_rounds=critic_rounds, penalty=penalty
        )
        refuse_fewer(0, search_steps=search_steps)
        refuse_fewer(1, starts=starts)
        self.search_steps, self.code_rate, self.weight_rate = search_steps, code_rate, weight_rate
        self.register_buffer("start", torch.randn(starts, latent_size))  # (T,d)

    @property
    def scored_after_fit(self) -> bool:
        return True  # a look at held-out normals would be a search for each

    def score(self, x: Tensor) -> Tensor:
        return self.search(x)[0].mean(1)

    def reconstruct(self, x: Tensor) -> Tensor:
        """The image of the start that ends nearest."""
        losses, made = self.search(x)
        return made[torch.arange(len(x), device=x.device), losses.argmin(1)]

    def search(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """l and G_theta(z) where each start ends: (B,C,S,S) -> (B,T), (B,T,C,S,S)"""
        at_once = max(COPIED // sum(p.numel() for p in self.generator.parameters()), 1)
        ends = [[self.search_from(start, some) for start in self.start] for some in x.split(at_once)]
        losses, made = (torch.cat([torch.stack([end[part] for end in chunk], 1) for chunk in ends]) for part in (0, 1))
        return losses, made

    def search_from(self, start: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """l and G_theta(z) where one start (d,) ends for each image: (B,C,S,S) -> (B,), (B,C,S,S)"""
        z = start.repeat(len(x), 1).requires_grad_()  # (B,d)
        theta = {  # (B,...) each
            name: p.detach().repeat(len(x), *[1] * p.ndim).requires_grad_()
            for name, p in self.generator.named_parameters()
        }

        def rendered() -> Tensor:
            return vmap(lambda own, code: functional_call(self.generator, own, (code[None],))[0])(theta, z)

        def losses() -> Tensor:
            return (x - rendered()).square().flatten(1).mean(1)

        weights = list(theta.values())
        movers = [([z], torch.optim.Adam([z], lr=self.code_rate, betas=(0.5, 0.999)))]
        movers += [(weights, torch.optim.Adam(weights, lr=self.weight_rate, betas=(0.5, 0.999)))]
        with torch.enable_grad():
            for _ in range(self.search_steps):
                for moving, adam in movers:
                    for tensor, gradient in zip(moving, torch.autograd.grad(losses().sum(), moving), strict=True):
                        tensor.grad = gradient
                    adam.step()
        with torch.no_grad():
            return losses(), rendered()
