"""GOAD: transformed images are drawn to their transformation's centre, away from all others (Bergman & Hoshen 2020).

Legend of the shape comments: B images, C channels, S = image size, K transformations, d = size of the features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anomaly_lab.detector import Batch, Detector
from anomaly_lab.methods.geotrans import Transformations
from anomaly_lab.methods.rotation_prediction import WideResNet


class GOAD(Detector):
    """Features f of which each transformation has a centre; the score asks how probable the right centres are.

    Bergman & Hoshen, "Classification-based anomaly detection for general data", ICLR 2020, for images, with the
    constants of the authors' code (lironber/GOAD@3655b86). Every image of a batch is seen in all K transformations of
    `GeoTrans`. With c_k the mean of f(T_k(x)) over the batch, and g a linear layer on f,

        L = CE(g(f(T_k(x))), k) + lambda max(0, |f(T_k(x)) - c_k|^2 + m - min_{k' != k} |f(T_k(x)) - c_k'|^2)

    as means over images and transformations. After training c_k is the mean over all training images, and

        P(k' | x) = (exp(-|f(x) - c_k'|^2) + eps) / (sum_k'' exp(-|f(x) - c_k''|^2) + K eps)

    The anomaly score is -sum_k log P(k | T_k(x)).

    *Where we differ from the authors' code:* the centres of the score are taken in eval mode (theirs while the last
    epoch trains); the paper's loss has no third term, and theirs adds 10 times the mean of f^2 in every run (``--reg``
    is true by default, and every value a command line can give it is), which keeps f some hundred times smaller; the
    second batch norm and ReLU in each of their blocks are never used, so nothing stands between its two convolutions;
    kernels start as torch's (theirs He-normal). Their ``--eps``, 0 by default, is another: a floor of the squared
    distances. Their ``--lr`` is parsed and never used.

    Args:
        depth, width: of the `WideResNet`, whose last layer is g.
        flips, shift: the transformations, see `GeoTrans`.
        margin: m. w_centre: lambda. eps: from 0; far from all centres it makes probabilities even, and scores equal.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        *,
        depth: int,
        width: int,
        flips: bool,
        shift: int,
        margin: float,
        w_centre: float,
        eps: float,
    ) -> None:
        super().__init__(image_shape)
        channels, size, _ = image_shape
        if not 0 <= shift < size:
            raise ValueError(f"shift={shift}: choose a number of pixels from 0 to below the image's {size}")
        self.transformations = Transformations(flips, shift)
        if eps < 0:
            raise ValueError(f"eps={eps}: choose a number from 0")
        self.margin, self.w_centre, self.eps = margin, w_centre, eps
        *layers, last = WideResNet(channels, depth, width, self.transformations.count)
        self.features, self.classifier = nn.Sequential(*layers), last

    def players(self) -> Mapping[str, Sequence[nn.Module]]:
        return {"network": [self.features, self.classifier]}

    def plays(self, batch: Batch) -> Iterator[Mapping[str, Tensor]]:
        count = self.transformations.count
        views = torch.cat([view for _, view in self.transformations.all_of(batch.x)])  # (KB,C,S,S)
        right = torch.arange(count, device=views.device).repeat_interleave(len(batch.x))  # (KB,)
        f = self.features(views)  # (KB,d)
        named = F.cross_entropy(self.classifier(f), right)
        distance = distances(f, f.view(count, len(batch.x), -1).mean(1))  # (KB,K)
        own = right[:, None] == torch.arange(count, device=views.device)  # (KB,K)
        nearest = distance.masked_fill(own, torch.inf).amin(1)
        centre = (distance.gather(1, right[:, None]).squeeze(1) + self.margin - nearest).clamp(min=0).mean()
        yield {"network": named + self.w_centre * centre}
        self.record("loss_named", named)
        self.record("loss_centre", centre)

    def after_fit(self, images: Tensor) -> None:
        sums: list[Tensor | int] = [0] * self.transformations.count
        for x in images.split(1000):
            for number, view in self.transformations.all_of(x):
                sums[number] = sums[number] + self.features(view).sum(0)
        self.set_fitted("centres", torch.stack([torch.as_tensor(one) for one in sums]) / len(images))  # (K,d)

    def score(self, x: Tensor) -> Tensor:
        centres, eps = self.get_buffer("centres"), torch.tensor(self.eps, device=x.device)
        score = torch.zeros(len(x), device=x.device)
        for number, view in self.transformations.all_of(x):
            near = torch.logaddexp(-distances(self.features(view), centres), eps.log())  # (B,K)
            score -= near[:, number] - near.logsumexp(1)
        return score


def distances(f: Tensor, centres: Tensor) -> Tensor:
    """Squared distance to each centre: (B,d), (K,d) -> (B,K)."""
    return (f[:, None] - centres).square().sum(2)
