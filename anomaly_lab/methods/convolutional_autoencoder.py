"""Convolutional autoencoders on contrast-normalised images, plain and denoising: what Deep SVDD starts from.

Legend of the shape comments: B images, N of the training set, C channels, S = image size, d = latent size.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anomaly_lab.detector import Batch, Detector
from anomaly_lab.networks import ContrastNormalisation


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-4, affine=False)


class LeNetEncoder(nn.Sequential):
    """5×5 convolutions, each with batch norm and 2×2 max pooling, then one layer to the code; no bias anywhere.

    Neither biases nor batch norm's own shift and scale: with them Deep SVDD would have a constant as its best answer.
    """

    def __init__(self, channels: int, size: int, widths: Sequence[int], latent_size: int) -> None:
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise([channels, *widths]):
            layers += [nn.Conv2d(a, b, 5, padding=2, bias=False), _norm(b), nn.LeakyReLU(0.01), nn.MaxPool2d(2)]
        pixels = (size >> len(widths)) ** 2
        super().__init__(*layers, nn.Flatten(), nn.Linear(widths[-1] * pixels, latent_size, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """(B,C,S,S) -> (B,d)"""
        return super().forward(x)


class LeNetDecoder(nn.Module):
    """The code as d/16 maps of 4×4, doubled by nearest neighbours until S, a 5×5 convolution behind each doubling.

    Where S is no power of two the maps are cropped before the last doubling (S = 28: 4, 8, 16 cropped to 14, 28), as
    the authors' padding of 3 does. With more convolutions than doublings the first ones stand in front.
    """

    def __init__(self, channels: int, size: int, widths: Sequence[int], latent_size: int) -> None:
        super().__init__()
        doublings = math.ceil(math.log2(size / 4))
        if size % 2 or doublings < 1 or latent_size % 16:
            raise ValueError(
                f"this decoder starts from 4×4 pixels: give an even model.input.size above 4, not {size}, and a "
                f"latent_size that 16 divides, not {latent_size}"
            )
        sizes = [latent_size // 16, *reversed(widths), channels]
        if doublings > len(sizes) - 1:
            raise ValueError(f"widths={list(widths)}: {size} pixels need at least {doublings - 1} of them")
        self.convolutions = nn.ModuleList(
            nn.ConvTranspose2d(a, b, 5, padding=2, bias=False) for a, b in itertools.pairwise(sizes)
        )
        self.norms = nn.ModuleList(_norm(width) for width in reversed(widths))
        self.plain = len(self.convolutions) - doublings  # convolutions before the first doubling
        self.undoubled = size // 2

    def forward(self, z: Tensor) -> Tensor:
        """(B,d) -> (B,C,S,S) in (0, 1)"""
        h = F.leaky_relu(z.view(z.shape[0], -1, 4, 4))
        last = len(self.convolutions) - 1
        for position, convolution in enumerate(self.convolutions):
            if position >= self.plain:
                if position == last:
                    start = (h.shape[-1] - self.undoubled) // 2
                    h = h[..., start : start + self.undoubled, start : start + self.undoubled]
                h = F.interpolate(h, scale_factor=2)
            h = convolution(h)
            if position < last:
                h = F.leaky_relu(self.norms[position](h))
        return torch.sigmoid(h)


class ConvolutionalAutoencoder(Detector):
    """Ruff et al.'s deep convolutional autoencoder, the "DCAE" of many tables.

    Ruff et al., "Deep one-class classification", ICML 2018, in the networks of the authors' code
    (lukasruff/Deep-SVDD-PyTorch@1901612). With x^ = D(E(x)) of the normalised image x (`ContrastNormalisation`)

        L = |x - x^|_2^2,    summed over the pixels of an image; the score is the same.

    *Where we differ from the authors' code:* ``low`` and ``high`` are computed; theirs are constants for each class.
    Computed on the whole normal class they agree; here they differ slightly, since some normals are held out.
    Initial weights are Glorot's, as in its networks for CIFAR-10; those for MNIST keep torch's. Their decoder
    for CIFAR-10 applies batch norm to the code; ours does not.

    Args:
        widths: channels of the encoder's convolutions. latent_size: d, a multiple of 16.
    """

    def __init__(self, image_shape: Sequence[int], *, widths: Sequence[int], latent_size: int) -> None:
        super().__init__(image_shape)
        channels, size, _ = image_shape
        self.normalise = ContrastNormalisation()
        self.encoder = LeNetEncoder(channels, size, widths, latent_size)
        self.decoder = LeNetDecoder(channels, size, widths, latent_size)
        for module in [*self.encoder.modules(), *self.decoder.modules()]:
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight, gain=nn.init.calculate_gain("leaky_relu"))

    def players(self) -> Mapping[str, Sequence[nn.Module]]:
        return {"autoencoder": [self.encoder, self.decoder]}

    def before_fit(self, images: Tensor) -> None:
        self.normalise.fit(images)

    def plays(self, batch: Batch) -> Iterator[Mapping[str, Tensor]]:
        yield {"autoencoder": self.error(self.normalise(batch.x)).mean()}

    def error(self, x: Tensor) -> Tensor:
        """|x - x^|_2^2 of normalised images, (B,C,S,S) -> (B,)."""
        return (x - self.decoder(self.encoder(x))).square().sum((1, 2, 3))

    def score(self, x: Tensor) -> Tensor:
        return self.error(self.normalise(x))

    def reconstruct(self, x: Tensor) -> Tensor:
        return self.normalise.undo(self.decoder(self.encoder(self.normalise(x))), x)


class DenoisingAutoencoder(ConvolutionalAutoencoder):
    """The same, which sees a noisy image and must give back the clean one.

    Vincent, Larochelle, Bengio & Manzagol, "Extracting and composing robust features with denoising autoencoders", ICML
    2008: a share ``masked`` of the pixels, drawn anew for every image and step, is set to 0 (the darkest
    value of the normalised training images), and

        L = |x - D(E(x~))|_2^2

    The score is the error of the clean image. Their networks are dense and tied; these are Ruff et al.'s.

    Args:
        masked: share of the pixels, in [0, 1).
    """

    def __init__(self, image_shape: Sequence[int], *, widths: Sequence[int], latent_size: int, masked: float) -> None:
        super().__init__(image_shape, widths=widths, latent_size=latent_size)
        if not 0 <= masked < 1:
            raise ValueError(f"masked={masked}: choose a share of the pixels from 0 to below 1")
        self.masked = masked

    def plays(self, batch: Batch) -> Iterator[Mapping[str, Tensor]]:
        x = self.normalise(batch.x)
        b, _, h, w = x.shape
        kept = torch.rand(b, 1, h, w, generator=self.noise, device=x.device) >= self.masked
        yield {"autoencoder": (x - self.decoder(self.encoder(x * kept))).square().sum((1, 2, 3)).mean()}
