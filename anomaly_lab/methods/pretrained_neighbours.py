"""Nearest neighbours among frozen features of ImageNet: of whole images (DN2), and of their patches (PatchCore).

Legend of the shape comments: B images, N of the training set, K×s×s pretrained features, P = N s s patches, M kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from anomaly_lab.detector import Detector
from anomaly_lab.errors import refuse_fewer
from anomaly_lab.networks import PerceptualFeatures

AT_ONCE = 250
"""Training images whose features are computed in one go."""


class PretrainedNeighbours(Detector):
    """The mean squared distance of an image's features to those of its k nearest training images.

    Bergman, Cohen & Hoshen, "Deep nearest neighbor anomaly detection", 2020 (arXiv 2002.10445): f(x), the mean over
    the positions of a network's features, is learned from ImageNet's labels and stays as it is;

        A(x) = 1/k sum of |f(x) - f(y)|_2^2 over the k training images y nearest to x

    *Where we differ:* the paper takes the last layer of a ResNet; here the network ends where `PerceptualFeatures` cuts
    it, about in its middle.

    Args:
        features: makes the frozen network.
        k: neighbours.
    """

    def __init__(self, image_shape: Sequence[int], *, features: Callable[[], PerceptualFeatures], k: int) -> None:
        super().__init__(image_shape)
        refuse_fewer(1, k=k)
        self.k, self.features = k, features()
        self.features.refuse(image_shape)

    def after_fit(self, images: Tensor) -> None:
        self.set_fitted("bank", torch.cat([self.describe(x) for x in images.split(AT_ONCE)]))  # (N,K)

    def describe(self, x: Tensor) -> Tensor:
        """f(x): (B,C,S,S) -> (B,K)"""
        return self.features(x).mean((2, 3))

    def score(self, x: Tensor) -> Tensor:
        return nearest(self.describe(x), self.get_buffer("bank"), self.k)[0].square().mean(1)


class PatchCore(PretrainedNeighbours):
    """The distance of an image's oddest patch to the patches of normal images, of which a few stand for all.

    Roth et al., "Towards total recall in industrial anomaly detection", CVPR 2022. A patch is a position of the
    features, averaged with its eight neighbours. Of the P patches of the training images a share is kept: greedily the
    patch that is farthest from those kept so far, in a random projection to ``projected`` dimensions. With m* the kept
    patch nearest to the patch p of x, p* the patch with the largest such distance d* and N_k(m*) the k kept patches
    nearest to m*, the anomaly score is

        A(x) = (1 - exp d* / sum of exp |p* - m| over m in N_k(m*)) d*                     (6), (7)

    the anomaly map is the distance of every patch, enlarged.

    *Where we differ:* the paper joins the second and third block of a Wide ResNet-50; here the features are those of
    one layer (`PerceptualFeatures`). Distances within the exponential are divided by the square root of K: with
    features of a larger scale the weight would be 0 or 1.

    Args:
        share: of the patches that are kept, in (0, 1].
        projected: dimensions in which the farthest patch is looked for.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        *,
        features: Callable[[], PerceptualFeatures],
        k: int,
        share: float,
        projected: int,
    ) -> None:
        super().__init__(image_shape, features=features, k=k)
        if not 0 < share <= 1:
            raise ValueError(f"share={share}: choose a share of the patches above 0, at most 1")
        if k < 2:
            raise ValueError(
                f"k={k}: the nearest patch to a patch is itself, so every score would be 0; give 2 or more"
            )
        self.share, self.projected = share, projected

    def after_fit(self, images: Tensor) -> None:
        patches = torch.cat([self.patches(x).flatten(0, 1) for x in images.split(AT_ONCE)])  # (P,K)
        shape = (patches.shape[1], self.projected)
        projection = torch.randn(shape, generator=self.noise, device=patches.device)
        kept = farthest_first(patches @ projection, max(round(self.share * len(patches)), 2))
        self.set_fitted("bank", patches[kept])  # (M,K)

    def patches(self, x: Tensor) -> Tensor:
        """(B,C,S,S) -> (B,s s,K)"""
        return F.avg_pool2d(self.features(x), 3, 1, 1, count_include_pad=False).flatten(2).transpose(1, 2)

    def terms(self, x: Tensor) -> Mapping[str, Tensor]:
        patches, bank = self.patches(x), self.get_buffer("bank")
        to_bank, place = (found.view(len(x), -1) for found in nearest(patches.flatten(0, 1), bank, 1))  # (B,s s)
        distance, patch = to_bank.max(1)  # d* and p*, (B,)
        centre = place.gather(1, patch[:, None]).squeeze(1)  # m*
        odd = patches[torch.arange(len(x), device=x.device), patch]  # (B,K)
        around = nearest(bank[centre], bank, self.k)[1]  # N_k(m*), (B,k)
        others = (odd[:, None] - bank[around]).norm(dim=2)  # (B,k)
        scale = bank.shape[1] ** 0.5
        return {"distance": distance, "weight": 1 - (distance / scale - (others / scale).logsumexp(1)).exp()}

    def combine(self, terms: Mapping[str, Tensor]) -> Tensor:
        return terms["weight"] * terms["distance"]

    def score(self, x: Tensor) -> Tensor:
        return self.combine(self.terms(x))

    def anomaly_map(self, x: Tensor) -> Tensor:
        features = self.patches(x)
        distance = nearest(features.flatten(0, 1), self.get_buffer("bank"), 1)[0]
        side = int(features.shape[1] ** 0.5)
        return F.interpolate(distance.view(-1, 1, side, side), x.shape[-2:], mode="bilinear").squeeze(1)


def nearest(x: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Distances (B,k) to the k nearest of ``bank`` (M,K), fewer where it has fewer, and their places: x (B,K)."""
    found = torch.cdist(x, bank).topk(min(k, len(bank)), largest=False).indices  # by a matrix product, which cancels
    return (x[:, None] - bank[found]).norm(dim=2), found


def farthest_first(points: Tensor, count: int) -> Tensor:
    """Positions (count,) of points chosen one after another, each the farthest from those before; the first is 0.

    points: (P,D)
    """
    chosen = torch.zeros(count, dtype=torch.long, device=points.device)
    distance = (points - points[0]).norm(dim=1)
    for position in range(1, count):
        chosen[position] = distance.argmax()
        distance = torch.minimum(distance, (points - points[chosen[position]]).norm(dim=1))
    return chosen
