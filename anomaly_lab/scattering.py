"""The wavelet scattering transform of small images: fixed features, stable to small deformations.

Legend of the shape comments: B images, C channels, S = their size, P = 2^J pixels of padding on each side,
M = S + 2P, s = S / 2^J, K paths.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 0.8
"""Standard deviation of the first scale's Gaussian envelope, in pixels."""

FREQUENCY = 0.75 * math.pi
"""Centre frequency of the first scale's wavelets, in radians a pixel."""


class LogScattering(nn.Module):
    """log(eps + S x): the scattering coefficients of orders 0, 1 and 2 of every channel, on a logarithmic scale.

    With the Morlet wavelets psi_{j,t} of J scales and L angles and the Gaussian phi of scale J,

        S x = (x * phi,  |x * psi_{j,t}| * phi,  ||x * psi_{j,t}| * psi_{j',t'}| * phi  for j < j'),

    each sampled every 2^J pixels: K = 1 + L J + L^2 J (J-1) / 2 paths of s x s values (Bruna & Mallat, "Invariant
    scattering convolution networks", PAMI 2013). Wavelets, padding by reflection, order of the paths and resolution of
    each convolution are those of Kymatio 0.3 (Andreux et al., JMLR 2020), to which a test compares. The last
    convolution, phi with its sampling, is a product with one matrix from each side, since phi is separable: nothing but
    the wavelets needs a Fourier transform.

    Args:
        size: S. scales: J. angles: L. eps: what is added before the logarithm, for images from 0 to 1.

    Raises:
        ValueError: an image of that size has no such scale.
    """

    def __init__(self, size: int, *, scales: int, angles: int, eps: float) -> None:
        super().__init__()
        if scales < 1 or angles < 1 or eps <= 0:
            raise ValueError(f"scales={scales}, angles={angles}, eps={eps}: give positive numbers")
        if size % 2**scales or size <= 2**scales:
            raise ValueError(f"scales={scales}: the image's size, {size}, must be a larger multiple of {2**scales}")
        self.size, self.scales, self.angles, self.eps = size, scales, angles, eps
        self.padding = 2**scales
        self.padded = size + 2 * self.padding
        wavelets = torch.stack([self._wavelets(scale) for scale in range(scales)])  # (J,L,M,M), real
        low = _periodic_gaussian(self.padded, WIDTH * 2 ** (scales - 1))
        low = torch.fft.fft(low).real  # (M,)
        for j in range(scales):
            self.register_buffer(f"smooth{j}", self._smooth(low, j).float(), persistent=False)
        for j, k in itertools.combinations_with_replacement(range(scales), 2):
            if j == 0 or j < k:  # first-order wavelets act on the image, second-order ones on maps of smaller scales
                step = 2 ** (k - j)
                # Sampling every so many pixels is the mean over blocks of frequencies.
                filters = _blocks(_low_frequencies(wavelets[k], j), step)[..., None] / step**2
                # Once for the real and once for the imaginary part: what is multiplied by it is seen as pairs.
                self.register_buffer(f"wavelets{j}{k}", filters.float().repeat_interleave(2, -1), persistent=False)

    @property
    def paths(self) -> int:
        """K."""
        return 1 + self.angles * self.scales + self.angles**2 * self.scales * (self.scales - 1) // 2

    def forward(self, x: Tensor) -> Tensor:
        """Features float32 (B,C K,s,s) of images float32 (B,C,S,S) in [0, 1]; channel by channel, then by path."""
        channels = x.shape[1]
        x = F.pad(x, (self.padding,) * 4, mode="reflect").flatten(0, 1)  # (BC,M,M)
        found = torch.cat(list(self._coefficients(x)), 1)  # (BC,K,s,s)
        return (found + self.eps).log_().unflatten(0, (-1, channels)).flatten(1, 2)

    def _coefficients(self, x: Tensor) -> Iterator[Tensor]:
        """Order 0, all of order 1, all of order 2, each (B,.,s,s), of padded images x (B,M,M)."""
        yield self._averaged(x[:, None], 0)
        spectrum = torch.fft.fft2(x)  # (B,M,M)
        first = [self._moduli(spectrum, 0, j) for j in range(self.scales)]  # (B,L,M/2^j,M/2^j)
        yield from (self._averaged(u, j) for j, u in enumerate(first))
        for j, u in enumerate(first[:-1]):
            spectrum = torch.fft.fft2(u)  # (B,L,.,.)
            second = [self._averaged(self._moduli(spectrum, j, k), k) for k in range(j + 1, self.scales)]
            yield torch.cat(second, 2).flatten(1, 2)  # (B,L,(J-j-1)L,s,s): by first angle, second scale, second angle

    def _moduli(self, spectrum: Tensor, j: int, k: int) -> Tensor:
        """|u * psi_{k,t}| sampled every 2^k pixels, (...,L,n,n), given the ``spectrum`` (...,m,m) of maps u sampled
        every 2^j."""
        blocks = torch.view_as_real(_blocks(spectrum, 2 ** (k - j))).unsqueeze(-4)  # (step^2,...,1,n,n,2)
        filters = self.get_buffer(f"wavelets{j}{k}")  # (step^2,L,n,n,2)
        total = blocks[0] * filters[0]
        for block, some in zip(blocks[1:], filters[1:], strict=True):
            total.addcmul_(block, some)
        squares = torch.view_as_real(torch.fft.ifft2(torch.view_as_complex(total))).square_()
        # abs() guards against overflow, and takes five times as long.
        return (squares[..., 0] + squares[..., 1]).sqrt_()

    def _averaged(self, u: Tensor, j: int) -> Tensor:
        """u * phi without the padding, every 2^J pixels, (...,s,s), of maps u (...,m,m) sampled every 2^j."""
        smooth = self.get_buffer(f"smooth{j}")  # (s,m)
        return ((u @ smooth.T).mT @ smooth.T).mT  # matrices from the right: one large product each

    def _wavelets(self, scale: int) -> Tensor:
        """Fourier transforms of the Morlet wavelets of one scale, real, float64 (L,M,M)."""
        width, frequency = WIDTH * 2**scale, FREQUENCY / 2**scale
        slant = 4 / self.angles  # how much longer than wide the envelope is, inverted
        copies = torch.arange(-2 * self.padded, 3 * self.padded, dtype=torch.float64)  # five periods, summed below
        y, x = torch.meshgrid(copies, copies, indexing="ij")
        wavelets = []
        for number in range(self.angles):
            angle = (self.angles - self.angles // 2 - 1 - number) * math.pi / self.angles
            along = y * math.cos(angle) + x * math.sin(angle)
            across = x * math.cos(angle) - y * math.sin(angle)
            envelope = torch.exp(-(along.square() + (slant * across).square()) / (2 * width**2))
            envelope = envelope * slant / (2 * math.pi * width**2)
            gabor = _periodic(envelope * torch.exp(1j * frequency * along))
            envelope = _periodic(envelope)
            wavelets.append(gabor - gabor.sum() / envelope.sum() * envelope)  # Morlet: no response to a constant
        return torch.fft.fft2(torch.stack(wavelets)).real  # the imaginary part is zero by symmetry

    def _smooth(self, low: Tensor, j: int) -> Tensor:
        """The matrix (s,m) that smooths a signal of m = M / 2^j samples, samples it and leaves the padding out."""
        size = self.padded // 2**j
        spectrum = torch.fft.fft(torch.eye(size, dtype=torch.float64)) * _low_frequencies(low, j, axes=1)  # rows
        smoothed = torch.fft.ifft(spectrum).real  # (m,m): row i is the response to a unit at i
        return smoothed[:, :: 2 ** (self.scales - j)].T[1:-1]


def _periodic_gaussian(size: int, width: float) -> Tensor:
    """A Gaussian of unit sum, repeated with the period ``size``, float64 (size,)."""
    x = torch.arange(-2 * size, 3 * size, dtype=torch.float64)
    return (torch.exp(-x.square() / (2 * width**2)) / (math.sqrt(2 * math.pi) * width)).view(5, size).sum(0)


def _periodic(x: Tensor) -> Tensor:
    """The sum (M,M) of five times five periods (5M,5M)."""
    return x.unflatten(0, (5, -1)).unflatten(2, (5, -1)).sum((0, 2))


def _blocks(spectrum: Tensor, step: int) -> Tensor:
    """The step x step blocks of a spectrum (...,m,m), contiguous: (step^2,...,m/step,m/step)."""
    blocks = spectrum.unflatten(-1, (step, -1)).unflatten(-3, (step, -1))  # (...,step,n,step,n)
    return blocks.movedim((-4, -2), (0, 1)).flatten(0, 1).contiguous()


def _low_frequencies(spectrum: Tensor, j: int, axes: int = 2) -> Tensor:
    """The lowest 1/2^j of the frequencies along the last ``axes``: the filter for maps sampled every 2^j pixels."""
    for axis in itertools.islice((-1, -2), axes):
        half = spectrum.shape[axis] >> (j + 1)
        if j:
            ends = spectrum.narrow(axis, 0, half), spectrum.narrow(axis, spectrum.shape[axis] - half, half)
            spectrum = torch.cat(ends, axis)
    return spectrum
