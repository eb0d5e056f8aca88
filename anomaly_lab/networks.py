"""Networks that two or more methods use.

Legend of the shape comments: B images, C channels, S = image size in pixels, d = size of the latent code.
"""

from __future__ import annotations

import math

from torch import Tensor, nn


def _halvings(size: int) -> int:
    if size < 8 or size & (size - 1):
        raise ValueError(
            f"these networks halve the image down to 4×4: give model.input.size 8, 16, 32, ..., not {size}"
        )
    return int(math.log2(size)) - 2


def init_dcgan(module: nn.Module) -> None:
    """N(0, 0.02) for convolutions, N(1, 0.02) for batch norm's scale, 0 for its shift (Radford et al. 2016)."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


class DCGANEncoder(nn.Sequential):
    """Strided 4×4 convolutions down to 4×4 pixels, then one to a code; batch norm on all but the first and the last.

    Args:
        channels: C of the image. size: S, a power of two from 8. width: channels after the first convolution, doubled
        by each further one. latent_size: d. tanh: bound the code to (-1, 1), else it is linear.
    """

    def __init__(self, channels: int, size: int, width: int, latent_size: int, *, tanh: bool) -> None:
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 4, 2, 1, bias=False), nn.LeakyReLU(0.2)]
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
    """

    def __init__(self, channels: int, size: int, width: int, latent_size: int, activation: nn.Module) -> None:
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
        super().__init__(*layers, nn.ConvTranspose2d(wide, channels, 4, 2, 1, bias=False), nn.Tanh())
        self.apply(init_dcgan)

    def forward(self, z: Tensor) -> Tensor:
        """(B,d) -> (B,C,S,S)"""
        return super().forward(z)
