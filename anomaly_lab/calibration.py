"""Scores of any scale as how rare they are among normal images, so that they can be added without a label.

Legend of the shape comments: B images in a batch, N of the training set, V of them held out, T terms of a score.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from anomaly_lab.detector import Detector

HELD_OUT = 10
"""One in so many training images takes no part in the training of a `Balanced` method."""


def surprisal(values: Tensor, normal: Tensor) -> Tensor:
    """Negative log tail probability (B,): -log of the share of the sorted ``normal`` values (V,) that are at least it.

    Interpolated between two of them; beyond the last one the tail is exponential, with the mean excess of their upper
    tenth, so that no two values tie.
    """
    count = len(normal)
    ranks = torch.arange(count, device=normal.device)
    heights = -torch.log((count - ranks) / (count + 1))  # of the values themselves
    upper = normal[-max(count // 10, 2) :]
    excess = (upper.mean() - upper[0]).clamp_min((1e-6 * normal.abs().mean()).clamp_min(1e-12))
    right = torch.searchsorted(normal, values.contiguous()).clamp(1, count - 1)
    low, high = normal[right - 1], normal[right]
    share = (values - low) / (high - low).clamp_min(1e-12)
    inside = heights[right - 1] + share.clamp(0, 1) * (heights[right] - heights[right - 1])
    below = (values - normal[0]).clamp_max(0) / excess  # a slope there too: no ties among the most normal
    return inside + (values - normal[-1]).clamp_min(0) / excess + below * heights[0]


class Balanced(Detector):
    """A method whose networks see nine in ten training images, and whose terms are weighed on the tenth.

    The score adds the `TERMS`, each divided by the mean of its magnitude on held-out normal images, as CSI (Tack et al.
    2020) divides by the mean on training images. Those held out are training images of the run, not the normals that
    its threshold comes from.
    """

    TERMS: ClassVar[tuple[str, ...]]
    """Names of the terms, as `terms` gives them."""

    trained_on: Tensor  # int64 (N-V,)
    magnitude: Tensor  # (T,)

    def remember(self, images: Tensor, held_out: Tensor) -> None:
        """Called once after the last epoch with the images the networks saw (N-V,C,S,S) and the others (V,C,S,S)."""
        raise NotImplementedError

    def before_fit(self, images: Tensor) -> None:
        self.set_fitted("trained_on", (~spared(images)).nonzero().squeeze(1))

    def train_indices(self, epoch: int) -> Tensor | None:
        return self.trained_on

    def after_fit(self, images: Tensor) -> None:
        out = spared(images)
        self.remember(images[~out], images[out])
        parts = [self.terms(part) for part in images[out].split(100)]
        terms = torch.stack([torch.cat([found[name] for found in parts]) for name in self.TERMS])
        self.set_fitted("magnitude", terms.abs().mean(1).clamp_min(1e-12))

    def combine(self, terms: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([terms[name] / self.magnitude[i] for i, name in enumerate(self.TERMS)]).sum(0)


def spared(images: Tensor) -> Tensor:
    """Which of the training images (N,C,S,S) a `Balanced` method holds out, bool (N,).

    Raises:
        ValueError: fewer than two would be.
    """
    if len(images) <= HELD_OUT:
        raise ValueError(f"{len(images)} training images are too few to hold out two of them: give {HELD_OUT + 1}")
    return torch.arange(len(images), device=images.device) % HELD_OUT == 0
