"""Bidirectional GANs, which learn an encoder beside the generator: EGBAD's BiGAN and ALAD (Zenati et al. 2018).

Legend of the shape comments: B images, C channels, S = image size, d = latent size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from anomaly_lab.adversarial import bce
from anomaly_lab.detector import Batch, Detector
from anomaly_lab.networks import DCGANDecoder, DCGANDiscriminator, DCGANEncoder, MovingAverage


class JointDiscriminator(nn.Module):
    """D_xz: does a pair of an image and a code come from the encoder, or from the generator?

    Args:
        image, code: branches from an image and from a code to ``features`` numbers together.
        units: of the dense layer behind them. slope: of its leaky ReLU. dropout: behind it.
    """

    def __init__(
        self, image: nn.Module, code: nn.Module, features: int, *, units: int, slope: float, dropout: float
    ) -> None:
        super().__init__()
        self.image, self.code = image, code
        self.pair = nn.Sequential(*dense(features, units, slope, dropout))
        self.logit = nn.Linear(units, 1)

    def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """(B,C,S,S), (B,d) -> logits (B,), features (B,units)"""
        features = self.pair(torch.cat([self.image(x), self.code(z)], 1))
        return self.logit(features).squeeze(1), features


def dense(inputs: int, outputs: int, slope: float, dropout: float) -> list[nn.Module]:
    """A hidden layer of a discriminator."""
    return [nn.Linear(inputs, outputs), nn.LeakyReLU(slope), nn.Dropout(dropout)]


def start(network: nn.Module, deviation: float) -> None:
    """Weights from N(0, deviation), biases 0, and batch norm as TensorFlow has it: epsilon 1e-3, slow statistics."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            nn.init.normal_(layer.weight, 0.0, deviation)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            layer.reset_parameters()
            layer.eps, layer.momentum = 1e-3, 0.01


class Bidirectional(Detector):
    """Encoder E, generator G, discriminator D_xz of pairs, and the averages of their weights that score.

    Args:
        latent_size: d.
        average: decay of the moving averages of all networks' weights.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        encoder: nn.Module,
        generator: nn.Module,
        joint: JointDiscriminator,
        *,
        latent_size: int,
        average: float,
    ) -> None:
        super().__init__(image_shape)
        self.latent_size, self.average = latent_size, average
        self.encoder, self.generator, self.joint = encoder, generator, joint

    def players(self) -> Mapping[str, Sequence[nn.Module]]:
        return {"joint": [self.joint], "generator": [self.generator], "encoder": [self.encoder]}

    def start_averages(self) -> None:
        """Called by a constructor when all networks are there."""
        followed = {name: MovingAverage(network, self.average) for name, [network] in self.players().items()}
        self.averages = nn.ModuleDict(followed)

    def follow(self) -> None:
        """Called at the end of every step."""
        for name, [network] in self.players().items():
            cast(MovingAverage, self.averages[name]).follow(network)

    def codes_like(self, x: Tensor) -> Tensor:
        """z ~ N(0, I), (B,d)"""
        return self.randomness.normal(x, self.latent_size)

    def reconstruct(self, x: Tensor) -> Tensor:
        return self.averages["generator"](self.averages["encoder"](x))


class BiGAN(Bidirectional):
    """EGBAD: a BiGAN, scored by its reconstruction and by its discriminator.

    Zenati, Foo, Lecouat, Manek & Chandrasekhar, "Efficient GAN-based anomaly detection", 2018 (arXiv 1802.06222), on
    Donahue et al. 2017, with the networks and the order of the authors' code for MNIST
    (houssamzenati/Efficient-GAN-Anomaly-Detection@15568ab). With z ~ N(0, I), D moves, then, on another batch, G and E:

        L_D = BCE(D(x, E(x)), 1) + BCE(D(G(z), z), 0)
        L_G = BCE(D(G(z), z), 1)            L_E = BCE(D(x, E(x)), 0)

    and with x^ = G(E(x)), f the last hidden layer of D, and the moving averages of all weights,

        A(x) = (1 - w) sum |x - x^|  +  w sum |f(x, E(x)) - f(x^, E(x))|      or      ... + w BCE(D(x, E(x)), 1)

    *Where we differ from the authors' code:* its second score has D(x^, E(x)) where the paper, and we, have D(x, E(x));
    images have 32 pixels (theirs 28, which is ``model.input.size=28``); batch norm's statistics, which follow at both
    moves, are those of G(z) (theirs follow at a network's own move, and G's are of reconstructions as well); strided
    convolutions pad both sides (theirs one); averages are taken after both moves (theirs together with a move). E's
    first convolution has no activation, as in their commits c67832a and 8e62c36 (f9ee733 has one). Their experiment has
    one digit abnormal and reports the area under the precision-recall curve.

    Args:
        width: channels of E's first convolution; D's image branch has twice as many. units: of D's dense layer for
        codes; its last hidden layer, and G's first, have twice as many. dropout: behind D's four hidden layers.
        latent_size, average: as in `Bidirectional`.
        w_discriminator: w.
        discriminator_term: ``feature`` or ``cross_entropy``; both are kept with a run's scores.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        *,
        width: int,
        units: int,
        dropout: float,
        latent_size: int,
        average: float,
        w_discriminator: float,
        discriminator_term: Literal["feature", "cross_entropy"],
    ) -> None:
        channels, size, _ = image_shape
        if size % 4:
            raise ValueError(f"BiGAN halves the image twice: give a model.input.size that 4 divides, not {size}")
        if not 0 <= w_discriminator <= 1:
            raise ValueError(f"model.detector.w_discriminator={w_discriminator}: choose a number from 0 to 1")
        side, leaky = size // 4, nn.LeakyReLU(0.1)
        encoder = nn.Sequential(
            nn.Conv2d(channels, width, 3, 1, 1),  # linear
            *(nn.Conv2d(width, 2 * width, 3, 2, 1), nn.BatchNorm2d(2 * width), leaky),
            *(nn.Conv2d(2 * width, 4 * width, 3, 2, 1), nn.BatchNorm2d(4 * width), leaky),
            *(nn.Flatten(), nn.Linear(4 * width * side**2, latent_size)),
        )
        generator = nn.Sequential(
            *(nn.Linear(latent_size, 2 * units), nn.BatchNorm1d(2 * units), nn.ReLU()),
            *(nn.Linear(2 * units, 4 * width * side**2), nn.BatchNorm1d(4 * width * side**2), nn.ReLU()),
            nn.Unflatten(1, (4 * width, side, side)),
            *(nn.ConvTranspose2d(4 * width, 2 * width, 4, 2, 1), nn.BatchNorm2d(2 * width), nn.ReLU()),
            *(nn.ConvTranspose2d(2 * width, channels, 4, 2, 1), nn.Tanh()),
        )
        image = nn.Sequential(
            *(nn.Conv2d(channels, 2 * width, 4, 2, 1), leaky, nn.Dropout(dropout)),
            *(nn.Conv2d(2 * width, 2 * width, 4, 2, 1), nn.BatchNorm2d(2 * width), leaky, nn.Dropout(dropout)),
            nn.Flatten(),
        )
        code = nn.Sequential(*dense(latent_size, units, 0.1, dropout))
        features = 2 * width * side**2 + units
        joint = JointDiscriminator(image, code, features, units=2 * units, slope=0.1, dropout=dropout)
        super().__init__(image_shape, encoder, generator, joint, latent_size=latent_size, average=average)
        for network in (self.encoder, self.generator, self.joint):
            start(network, 0.02)
        self.w_discriminator, self.discriminator_term = w_discriminator, discriminator_term
        self.start_averages()

    def plays(self, batch: Batch) -> Iterator[Mapping[str, Tensor]]:
        encoded, generated = self.logits(batch.x)
        yield {"joint": bce(encoded, 1) + bce(generated, 0)}
        encoded, generated = self.logits(self.next_batch().x)
        yield {"generator": bce(generated, 1), "encoder": bce(encoded, 0)}
        self.follow()

    def logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """D(x, E(x)) and D(G(z), z) of a fresh z: (B,C,S,S) -> (B,), (B,)"""
        z = self.codes_like(x)
        return self.joint(x, self.encoder(x))[0], self.joint(self.generator(z), z)[0]

    def terms(self, x: Tensor) -> Mapping[str, Tensor]:
        code = self.averages["encoder"](x)
        rebuilt = self.averages["generator"](code)
        logit, features = self.averages["joint"](x, code)
        _, again = self.averages["joint"](rebuilt, code)
        return {
            "residual": (x - rebuilt).abs().flatten(1).sum(1),
            "feature": (features - again).abs().sum(1),
            "cross_entropy": F.softplus(-logit),
        }

    def combine(self, terms: Mapping[str, Tensor]) -> Tensor:
        w = self.w_discriminator
        return (1 - w) * terms["residual"] + w * terms[self.discriminator_term]


class ALAD(Bidirectional):
    """Adversarially learned anomaly detection: a BiGAN with two more discriminators, of the cycles x -> x and z -> z.

    Zenati, Romain, Foo, Lecouat & Chandrasekhar, "Adversarially learned anomaly detection", ICDM 2018 (arXiv
    1812.02288), in the order and with the constants of the authors' code for CIFAR-10 (houssamzenati/
    Adversarially-Learned-Anomaly-Detection@1f1c310). With x^ = G(E(x)),
    z^ = E(G(z)) and z ~ N(0, I), the three discriminators move together, then, on another batch, G and E together:

        D_xz   BCE(D_xz(x, E(x)), 1) + BCE(D_xz(G(z), z), 0)
        D_xx   BCE(D_xx(x, x), 1) + BCE(D_xx(x, x^), 0)          D_zz   BCE(D_zz(z, z), 1) + BCE(D_zz(z, z^), 0)
        cycle  BCE(D_xx(x, x), 0) + BCE(D_xx(x, x^), 1) + BCE(D_zz(z, z), 0) + BCE(D_zz(z, z^), 1)
        G      BCE(D_xz(G(z), z), 1) + cycle                    E      BCE(D_xz(x, E(x)), 0) + cycle

    E and the discriminators have spectral norm but for their last layers; D_xx sees its two images one above the other.
    With f the features of D_xx, and the moving averages of all weights, the anomaly score is
    A(x) = sum |f(x, x) - f(x, x^)|.

    *Where we differ from the authors' code:* convolutions of E, G and of D_xz's image branch have no bias (theirs all
    have one); spectral norm is torch's, whose power iteration takes no gradient and rests while scoring (theirs does
    neither); each network has an Adam of its own (theirs share one, whose bias correction so fades five times as fast);
    batch norm's statistics follow at both moves, averages after both; D_xx's convolutions pad both sides alike (theirs
    one more to the right); training ends after its budget (theirs when the score of held-out normals has not fallen for
    ten epochs, and it then tests the last weights, not those of the best epoch). Their ``--enable_dzz``, ``--sn`` and
    ``--enable_early_stop`` are off by default; the paper's model has all three, ours the first two.

    Args:
        width: channels of E and D_xz after their first convolution, of G before its last; D_xx has half of it.
        units: of the two dense layers that D_xz has for codes; the pair has twice as many.
        dropout: in the discriminators' dense layers, and in D_xx. latent_size, average: as in `Bidirectional`.
    """

    def __init__(
        self, image_shape: Sequence[int], *, width: int, units: int, dropout: float, latent_size: int, average: float
    ) -> None:
        channels, size, _ = image_shape
        encoder = DCGANEncoder(channels, size, width, latent_size, tanh=False)
        encoder.insert(1, nn.BatchNorm2d(width))
        image = nn.Sequential(DCGANDiscriminator(channels, size, width).features, nn.Flatten())
        code = nn.Sequential(*dense(latent_size, units, 0.2, dropout), *dense(units, units, 0.2, dropout))
        features = width * (size // 8) * 16 + units  # of 4×4 positions
        joint = JointDiscriminator(image, code, features, units=2 * units, slope=0.2, dropout=dropout)
        generator = DCGANDecoder(channels, size, width, latent_size, nn.ReLU())
        super().__init__(image_shape, encoder, generator, joint, latent_size=latent_size, average=average)
        self.images = PairOfImages(channels, size, max(width // 2, 1), dropout)
        self.codes = PairOfCodes(latent_size, dropout)
        for network in (self.encoder, self.generator, self.joint, self.images, self.codes):
            start(network, 0.01)
        for network in (self.encoder, self.joint, self.images, self.codes):
            *bounded, _ = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
            for layer in bounded:
                spectral_norm(layer)
        self.start_averages()

    def players(self) -> Mapping[str, Sequence[nn.Module]]:
        return {**super().players(), "images": [self.images], "codes": [self.codes]}

    def plays(self, batch: Batch) -> Iterator[Mapping[str, Tensor]]:
        encoded, generated, same_x, cycled_x, same_z, cycled_z = self.logits(batch.x)
        yield {
            "joint": bce(encoded, 1) + bce(generated, 0),
            "images": bce(same_x, 1) + bce(cycled_x, 0),
            "codes": bce(same_z, 1) + bce(cycled_z, 0),
        }
        encoded, generated, same_x, cycled_x, same_z, cycled_z = self.logits(self.next_batch().x)
        cycle = bce(same_x, 0) + bce(cycled_x, 1) + bce(same_z, 0) + bce(cycled_z, 1)
        yield {"generator": bce(generated, 1) + cycle, "encoder": bce(encoded, 0) + cycle}
        self.follow()

    def logits(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """D_xz(x, E(x)), D_xz(G(z), z), D_xx(x, x), D_xx(x, x^), D_zz(z, z), D_zz(z, z^) of a fresh z, (B,) each."""
        z = self.codes_like(x)
        code, generated = self.encoder(x), self.generator(z)
        pairs = self.joint(x, code)[0], self.joint(generated, z)[0]
        images = self.images(x, x)[0], self.images(x, self.generator(code))[0]
        return *pairs, *images, self.codes(z, z), self.codes(z, self.encoder(generated))

    def terms(self, x: Tensor) -> Mapping[str, Tensor]:
        rebuilt, discriminator = self.reconstruct(x), self.averages["images"]
        gap = discriminator(x, x)[1] - discriminator(x, rebuilt)[1]
        return {"feature": gap.abs().sum(1), "residual": (x - rebuilt).abs().flatten(1).sum(1)}

    def combine(self, terms: Mapping[str, Tensor]) -> Tensor:
        return terms["feature"]


class PairOfImages(nn.Module):
    """D_xx: is the second image the first one, or its reconstruction? Two 5×5 convolutions of stride 2, and a logit."""

    def __init__(self, channels: int, size: int, width: int, dropout: float) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in ((channels, width), (width, 2 * width)):
            layers += [nn.Conv2d(inputs, outputs, 5, 2, 2), nn.LeakyReLU(0.2), nn.Dropout(dropout)]
        self.features = nn.Sequential(*layers, nn.Flatten())
        self.logit = nn.Linear(2 * width * 2 * (size // 4) ** 2, 1)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """(B,C,S,S), (B,C,S,S) -> logits (B,), features (B,-)"""
        features = self.features(torch.cat([x, y], 2))
        return self.logit(features).squeeze(1), features


class PairOfCodes(nn.Sequential):
    """D_zz: is the second code the first one, or that of the generated image? Dense layers of 64 and 32 units."""

    def __init__(self, latent_size: int, dropout: float) -> None:
        layers: list[nn.Module] = []
        for inputs, outputs in ((2 * latent_size, 64), (64, 32)):
            layers += dense(inputs, outputs, 0.2, dropout)
        super().__init__(*layers, nn.Linear(32, 1))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        """(B,d), (B,d) -> logits (B,)"""
        return super().forward(torch.cat([x, y], 1)).squeeze(1)
