"""Scores of any scale as how rare they are among normal images, so that they can be added without a label.

Legend of the shape comments: B images in a batch, V held-out normal images.
"""

from __future__ import annotations

import torch
from torch import Tensor


def surprise(values: Tensor, normal: Tensor) -> Tensor:
    """-log of the share of normal images with at least that value, (B,), given the ``normal`` values (V,), sorted.

    Between two of them it is interpolated, and beyond the last one it goes on as of an exponential distribution whose
    mean excess is that of the upper tenth, so that no two values tie.
    """
    count = len(normal)
    ranks = torch.arange(count, device=normal.device)
    heights = -torch.log((count - ranks) / (count + 1))  # of the values themselves
    upper = normal[-max(count // 10, 2) :]
    excess = (upper.mean() - upper[0]).clamp_min(1e-6 * normal.abs().mean())
    right = torch.searchsorted(normal, values.contiguous()).clamp(1, count - 1)
    low, high = normal[right - 1], normal[right]
    share = (values - low) / (high - low).clamp_min(1e-12)
    inside = heights[right - 1] + share.clamp(0, 1) * (heights[right] - heights[right - 1])
    below = (values - normal[0]).clamp_max(0) / excess  # a slope there too: no ties among the most normal
    return inside + (values - normal[-1]).clamp_min(0) / excess + below * heights[0]
