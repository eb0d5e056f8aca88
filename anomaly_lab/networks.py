"""Networks that two or more methods use.

Legend of the shape comments: B images, C channels, S = image size in pixels, d = size of the latent code.
"""

from __future__ import annotations

import math

from torch import Generator, Tensor, nn


def _halvings(size: int) -> int:
    if size < 8 or size & (size - 1):
        raise ValueError(
            f"these networks halve the image down to 4×4: give model.input.size 8, 16, 32, ..., not {size}"
        )
    return int(math.log2(size)) - 2


def init_dcgan(module: nn.Module, generator: Generator | None = None) -> None:
    """N(0, 0.02) for convolutions, N(1, 0.02) for batch norm's scale, 0 for its shift (Radford et al. 2016)."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0.0, 0.02, generator)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02, generator)
        nn.init.zeros_(module.bias)


def _extra(width: int, layers: int, activation: nn.Module) -> list[nn.Module]:
    return [
        module
        for _ in range(layers)
        for module in (nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), activation)
    ]


class DCGANEncoder(nn.Sequential):
    """Strided 4×4 convolutions down to 4×4 pixels, then one to a code; batch norm on all but the first and the last.

    Args:
        channels: C of the image. size: S, a power of two from 8. width: channels after the first convolution, doubled
        by each further one. latent_size: d. tanh: bound the code to (-1, 1), else it is linear.
        extra_layers: 3×3 convolutions with batch norm behind the first convolution (GANomaly's ``extralayers``).
    """

    def __init__(
        self, channels: int, size: int, width: int, latent_size: int, *, tanh: bool, extra_layers: int = 0
    ) -> None:
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 4, 2, 1, bias=False), nn.LeakyReLU(0.2)]
        layers += _extra(width, extra_layers, nn.LeakyReLU(0.2))
        for _ in range(_halvings(size) - 1):
            layers += [
                nn.Conv2d(width, 2 * width, 4, 2, 1, bias=False),
                nn.BatchNorm2d(2 * width),
                nn.LeakyReLU(0.2),
            ]
            width *= 2
        layers += [nn.Conv2d(width, latent_size, 4, 1, 0, bias=False), nn.Flatten()]
        super().__init__(*layers, *([nn.Tanh()] if tanh else []))
        self.apply(init_dcgan)

    def forward(self, x: Tensor) -> Tensor:
        """(B,C,S,S) -> (B,d)"""
        return super().forward(x)


class DCGANDecoder(nn.Sequential):
    """The encoder's mirror: transposed 4×4 convolutions with batch norm from a code to an image in (-1, 1).

    Args:
        activation: the hidden layers' non-linearity: ``nn.ReLU()`` in DCGAN and GANomaly, leaky in shared autoencoders.
        extra_layers: 3×3 convolutions with batch norm before the last transposed convolution.
    """

    def __init__(
        self,
        channels: int,
        size: int,
        width: int,
        latent_size: int,
        activation: nn.Module,
        extra_layers: int = 0,
    ) -> None:
        halvings = _halvings(size)
        wide = width * 2 ** (halvings - 1)
        layers: list[nn.Module] = [nn.Unflatten(1, (latent_size, 1, 1))]
        layers += [
            nn.ConvTranspose2d(latent_size, wide, 4, 1, 0, bias=False),
            nn.BatchNorm2d(wide),
            activation,
        ]
        for _ in range(halvings - 1):
            layers += [
                nn.ConvTranspose2d(wide, wide // 2, 4, 2, 1, bias=False),
                nn.BatchNorm2d(wide // 2),
                activation,
            ]
            wide //= 2
        layers += _extra(wide, extra_layers, activation)
        super().__init__(*layers, nn.ConvTranspose2d(wide, channels, 4, 2, 1, bias=False), nn.Tanh())
        self.apply(init_dcgan)

    def forward(self, z: Tensor) -> Tensor:
        """(B,d) -> (B,C,S,S)"""
        return super().forward(z)


class DCGANDiscriminator(nn.Module):
    """The encoder's form with one output: a logit, real against fake, and the features it is made from.

    Args: as in `DCGANEncoder`.
    """

    def __init__(self, channels: int, size: int, width: int, *, extra_layers: int = 0) -> None:
        super().__init__()
        *features, logit, flatten = DCGANEncoder(channels, size, width, 1, tanh=False, extra_layers=extra_layers)
        self.features = nn.Sequential(*features)
        self.logit = nn.Sequential(logit, flatten)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B,C,S,S) -> logits (B,), features (B,width S/8,4,4)"""
        features = self.features(x)
        return self.logit(features).squeeze(1), features
