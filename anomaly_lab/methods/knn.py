"""The distance to the nearest training images.

Legend of the shape comments: B images in a batch, N training images, D = C·H·W pixels, k neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from anomaly_lab.detector import Detector
from anomaly_lab.errors import refuse_fewer


class NearestNeighbours(Detector):
    """A(x) = mean of the L2 distances of x to its k nearest training images, in pixels.

    Angiulli & Pizzuti, "Fast outlier detection in high dimensional spaces", PKDD 2002, whose weight of a point is the
    sum of these distances. The search is exact: one matrix product finds the neighbours, since the order of
    |x - y|^2 over y is that of |y|^2 - 2 x'y, and their distances are then taken from the differences themselves.

    Args:
        neighbours: k.
    """

    centre: Tensor  # (D,)
    bank: Tensor  # (N,D)

    def __init__(self, image_shape: Sequence[int], *, neighbours: int) -> None:
        super().__init__(image_shape)
        refuse_fewer(1, neighbours=neighbours)
        self.neighbours = neighbours

    def after_fit(self, images: Tensor) -> None:
        if len(images) < self.neighbours:
            raise ValueError(f"neighbours={self.neighbours}: there are only {len(images)} training images")
        bank = images.flatten(1)
        self.set_fitted("centre", bank.mean(0))
        self.set_fitted("bank", bank - self.centre)  # small numbers: less of |y|^2 - 2 x'y cancels

    def score(self, x: Tensor) -> Tensor:
        x = x.flatten(1) - self.centre
        order = self.bank.square().sum(1) - 2 * x @ self.bank.T  # (B,N)
        nearest = order.topk(self.neighbours, largest=False).indices  # (B,k)
        return (x[:, None] - self.bank[nearest]).square().sum(2).sqrt().mean(1)
