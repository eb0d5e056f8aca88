"""Gated PixelCNN: the likelihood of every pixel given those before it, and what of it is mere complexity.

Legend of the shape comments: B images, C channels, S = image size, w = width, Q = grey levels.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from anomaly_lab.detector import Batch, Detector


def _gate(h: Tensor) -> Tensor:
    a, b = h.chunk(2, 1)
    return torch.tanh(a) * torch.sigmoid(b)


class _GatedLayer(nn.Module):
    """One layer of both stacks: the vertical one sees the rows up to a pixel's own.

    The horizontal one receives it moved down by one row, and also sees the pixels to the left.

    Convolutions see nothing else because the images are moved down, or to the right, instead of masking the kernels.

    Args:
        first: the horizontal stack may not yet see the pixel itself.
    """

    def __init__(self, inputs: int, width: int, kernel: int, *, first: bool) -> None:
        super().__init__()
        self.reach, self.first = kernel // 2, first
        self.vertical = nn.Conv2d(inputs, 2 * width, (self.reach + 1, kernel))
        self.horizontal = nn.Conv2d(inputs, 2 * width, (1, self.reach + (not first)))
        self.across = nn.Conv2d(2 * width, 2 * width, 1)
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, v: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """(B,a,S,S), (B,a,S,S) -> (B,w,S,S), (B,w,S,S)"""
        r, own = self.reach, not self.first
        rows = self.vertical(F.pad(v, (r, r, r, 0)))  # this row and those above
        above = F.pad(rows, (0, 0, 1, 0))[:, :, :-1]  # those above alone, for the pixels of this row
        before = self.horizontal(F.pad(h, (r, 0, 0, 0)) if own else F.pad(h, (r, 0, 0, 0))[..., :-1])
        gated = self.out(_gate(before + self.across(above)))
        return _gate(rows), gated if self.first else h + gated


class GatedPixelCNN(Detector):
    """-log p(x) of an autoregressive network, with and without what any compressor would charge for the image.

    Van den Oord et al., "Conditional image generation with PixelCNN decoders", NeurIPS 2016: a stack for the rows above
    and one for the pixels to the left, gated units, and a softmax over the Q grey levels of every pixel,

        L = -sum_i log2 p(x_i | x_1, ..., x_{i-1})

    Likelihood prefers smooth images, whatever they show. Serra et al., "Input complexity and out-of-distribution
    detection with likelihood-based generative models", ICLR 2020, take away the bits of a lossless compressor:

        A(x) = -log2 p(x) - complexity_weight * bits of the quantised x as PNG

    Weight 0 is the likelihood alone, which published tables of it mean, and weight 1 theirs; every run records both as
    terms, ``bits`` and ``corrected``. There is no public one-class code of it; sizes are ours.

    *Where we differ from the paper:* the channels of one pixel are independent given the pixels before it.

    Args:
        width: w. layers: gated layers. kernel: size of the first one's kernel; the others' is 3. levels: Q, to 256.
        low, high: what black and white are, ``model.input.range``. complexity_weight: 0 leaves the likelihood alone.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        *,
        width: int,
        layers: int,
        kernel: int,
        levels: int,
        low: float,
        high: float,
        complexity_weight: float,
    ) -> None:
        super().__init__(image_shape)
        if not 2 <= levels <= 256:
            raise ValueError(f"levels={levels}: choose 2 to 256 grey levels")
        channels = image_shape[0]
        self.levels, self.low, self.high, self.complexity_weight = levels, low, high, complexity_weight
        sizes = [(channels, kernel, True)] + [(width, 3, False)] * (layers - 1)
        self.layers = nn.ModuleList(_GatedLayer(a, width, k, first=first) for a, k, first in sizes)
        self.logits = nn.Sequential(
            nn.ReLU(), nn.Conv2d(width, width, 1), nn.ReLU(), nn.Conv2d(width, channels * levels, 1)
        )

    def players(self) -> Mapping[str, Sequence[nn.Module]]:
        return {"pixelcnn": [self.layers, self.logits]}

    def quantised(self, x: Tensor) -> Tensor:
        """The grey level of each pixel, int64 from 0 to Q - 1."""
        return ((x - self.low) / (self.high - self.low) * self.levels).long().clamp(0, self.levels - 1)

    def predicted(self, level: Tensor, like: Tensor) -> Tensor:
        """Logits (B,Q,C,S,S) of every pixel's level given the pixels before it."""
        v = h = (level / (self.levels - 1) * 2 - 1).to(like.dtype)
        for layer in self.layers:
            v, h = layer(v, h)
        b, c, s, t = level.shape
        logits: Tensor = self.logits(h).view(b, self.levels, c, s, t)
        return logits

    def bits(self, x: Tensor) -> Tensor:
        """-log2 p(x): (B,C,S,S) -> (B,)"""
        level = self.quantised(x)
        nats = F.cross_entropy(self.predicted(level, x), level, reduction="none")
        return nats.sum((1, 2, 3)) / math.log(2)

    def plays(self, batch: Batch) -> Iterator[Mapping[str, Tensor]]:
        bits = self.bits(batch.x).mean()
        yield {"pixelcnn": bits / math.prod(self.image_shape)}  # bits a pixel, so that rates mean the same at any size
        self.record("bits", bits)

    def terms(self, x: Tensor) -> Mapping[str, Tensor]:
        bits, png = self.bits(x), png_bits(self.quantised(x), self.levels).to(x)
        return {"bits": bits, "png_bits": png, "corrected": bits - png}

    def combine(self, terms: Mapping[str, Tensor]) -> Tensor:
        return terms["bits"] - self.complexity_weight * terms["png_bits"]


def png_bits(level: Tensor, levels: int) -> Tensor:
    """The length of each image as PNG, in bits: int64 (B,C,S,S) of 0 to levels - 1 -> float32 (B,), on the CPU."""
    pixels = (level * 255 // (levels - 1)).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return torch.tensor([_png_bytes(np.ascontiguousarray(image)) * 8.0 for image in pixels])


def _png_bytes(pixels: np.ndarray) -> int:
    file = io.BytesIO()
    Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(file, "PNG", optimize=True)
    return file.tell()
