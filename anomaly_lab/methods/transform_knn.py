"""Transformation prediction with a memory of normal images under every transformation.

Legend of the shape comments: B images, N training images, C channels, S = image size, T transformations, F features,
k neighbours.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anomaly_lab.calibration import Balanced
from anomaly_lab.detector import Batch
from anomaly_lab.errors import refuse_fewer

SHIFTS = ((0, 0), (0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1))
"""Directions of the translations, down and to the right: one along no axis, four along one, four along both."""

NEIGHBOUR_WEIGHT = 0.1
"""What a transformation that nobody can tell still counts among the neighbours."""

CENTRE_RATE = 0.1
"""Share of a batch in the running centres of the features."""

AT_ONCE = 50
"""Images whose views are looked at together."""


class TransformKNN(Balanced):
    """Which transformation was done to an image, and how near it lies to normal images that were transformed so?

    A network with features h and logits f sees every image under T transformations T_t, all rotations by quarter turns
    of translations by 0 or ``shift`` pixels with a reflected border. With c_t the running mean of h(T_t x),

        L = CE(f(T_t x), t) + margin_weight max(0, 1 + |h_t - c_t|^2 - min_{t' != t} |h_t - c_t'|^2) + 1e-3 |h_t|^2

    which is the loss of GOAD (Bergman & Hoshen, "Classification-based anomaly detection for general data", ICLR 2020)
    on top of the cross-entropy of GeoTrans (Golan & El-Yaniv, NeurIPS 2018), with centres that do not depend on the
    batch. What a transformation is worth is asked of normal images that the network has not seen,

        r_t = max(0, 1 + mean log p_t / log T)     with p_t the softmax of f(T_t x) at t

    1 where it is always told, 0 where it is guessed, as half a turn of a 0 or an 8. The terms of the score are

        transformations:  -sum_t r_t log p_t
        neighbours:       sum_t (r_t + 0.1) mean of |u_t - v| over the k nearest v = h/|h| of normal images under t,
                          with u_t = h_t / |h_t|

    and the score adds both on one scale (`Balanced`). No label is seen. Ours: rotation prediction is the row
    `rotnet`; the weights and the memory for each transformation are what it lacks.

    Args:
        width: channels of the first convolution; F is four times that.
        places: the features are means over so many by so many places of the last map.
        shifts: 1, 5 or 9 translations, the first of `SHIFTS`; T is four times that.
        shift: in pixels.
        weighted: whether r_t is what it says above, or 1.
        neighbours: k.
    """

    TERMS = ("transformations", "neighbours")
    centres: Tensor  # (T,F)
    worth: Tensor  # (T,), r_t
    bank: Tensor  # (T,N,F), of norm 1

    def __init__(
        self,
        image_shape: Sequence[int],
        *,
        width: int,
        places: int,
        shifts: Literal[1, 5, 9],
        shift: int,
        margin_weight: float,
        weighted: bool,
        neighbours: int,
    ) -> None:
        super().__init__(image_shape)
        channels, size, _ = image_shape
        if not 0 < shift < size:
            raise ValueError(f"shift={shift}: choose a number of pixels from 1 to below the image's {size}")
        if places < 1 or size % (4 * places):
            raise ValueError(f"places={places}: four times that must divide the image's size, {size}")
        refuse_fewer(1, neighbours=neighbours)
        self.offsets = [(shift * down, shift * right) for down, right in SHIFTS[:shifts]]
        self.shift, self.margin_weight, self.weighted, self.neighbours = shift, margin_weight, weighted, neighbours
        self.transformations = 4 * shifts
        widths = (channels, width, 2 * width, 4 * width, 4 * width)
        layers: list[nn.Module] = []
        for stride, (a, b) in zip((2, 1, 2, 1), itertools.pairwise(widths), strict=True):
            # Group norm: a view's features depend on no other view.
            layers += [nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.GroupNorm(math.gcd(b, 4), b), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.window = size // 4 // places
        self.head = nn.Linear(4 * width * places**2, self.transformations)
        self.register_buffer("centres", torch.zeros(self.transformations, 4 * width * places**2))

    def players(self) -> Mapping[str, Sequence[nn.Module]]:
        return {"classifier": [self.features, self.head]}

    def plays(self, batch: Batch) -> Iterator[Mapping[str, Tensor]]:
        h = self.looked(batch.x)  # (T,B,F)
        done = torch.arange(self.transformations, device=h.device)
        classified = F.cross_entropy(self.head(h).flatten(0, 1), done.repeat_interleave(len(batch.x)))
        distance = (h[:, :, None] - self.centres).square().sum(3)  # (T,B,T)
        own = torch.eye(self.transformations, dtype=torch.bool, device=h.device)[:, None]  # (T,1,T)
        others = distance.masked_fill(own, math.inf).amin(2)  # (T,B)
        margin = F.relu(1 + (distance * own).sum(2) - others).mean()
        yield {"classifier": classified + self.margin_weight * margin + 1e-3 * h.square().sum(2).mean()}
        rate = (1 / (self.steps_done + 1)).clamp_min(CENTRE_RATE)  # the first batch stands alone
        self.centres.lerp_(h.detach().float().mean(1), rate)
        self.record("loss_classified", classified)
        self.record("loss_margin", margin)

    def views(self, x: Tensor) -> Tensor:
        """All transformations of images: (B,C,S,S) -> (T,B,C,S,S), the turns of one translation side by side."""
        size, pad = x.shape[-1], self.shift
        padded = F.pad(x, (pad,) * 4, mode="reflect")
        moved = [
            padded[..., pad - down : pad - down + size, pad - right : pad - right + size]
            for down, right in self.offsets
        ]
        return torch.stack([one.rot90(turn, (2, 3)) for one in moved for turn in range(4)])

    def looked(self, x: Tensor) -> Tensor:
        """Features of all views of images: (B,C,S,S) -> (T,B,F)."""
        found = F.avg_pool2d(self.features(self.views(x).flatten(0, 1)), self.window)
        return found.flatten(1).unflatten(0, (self.transformations, -1))

    def told(self, h: Tensor) -> Tensor:
        """log p_t (T,B) of what was done, given the features (T,B,F)."""
        return self.head(h).log_softmax(2).diagonal(dim1=0, dim2=2).T

    def remember(self, images: Tensor, held_out: Tensor) -> None:
        self.set_fitted("bank", torch.cat([F.normalize(self.looked(x), dim=2) for x in images.split(AT_ONCE)], 1))
        told = torch.cat([self.told(self.looked(x)) for x in held_out.split(AT_ONCE)], 1).mean(1)
        worth = (1 + told / math.log(self.transformations)).clamp_min(0)
        self.set_fitted("worth", worth if self.weighted else torch.ones_like(worth))

    def terms(self, x: Tensor) -> Mapping[str, Tensor]:
        h = self.looked(x)
        u = F.normalize(h, dim=2)
        nearest = (u @ self.bank.mT).topk(min(self.neighbours, self.bank.shape[1]), dim=2).indices  # (T,B,k)
        transformation = torch.arange(len(h), device=h.device)[:, None, None]
        # From the differences themselves: 2 - 2 u'v leaves no digits where they are small.
        distance = (u[:, :, None] - self.bank[transformation, nearest]).norm(dim=3).mean(2)  # (T,B)
        return {
            "transformations": -(self.worth[:, None] * self.told(h)).sum(0),
            "neighbours": ((self.worth + NEIGHBOUR_WEIGHT)[:, None] * distance).sum(0),
        }
