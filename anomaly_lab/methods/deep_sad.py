"""Deep SAD: Deep SVDD that is also told a few anomalies, which it drives out of the sphere (Ruff et al. 2020).

Legend of the shape comments: B images, C channels, S = image size, d = latent size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from anomaly_lab.detector import Batch
from anomaly_lab.methods.deep_svdd import DeepSVDD

NEAR = 1e-6
"""Added to an anomaly's distance before it is inverted, in the authors' code."""


class DeepSAD(DeepSVDD):
    """Deep semi-supervised anomaly detection: a centre, images drawn to it, known anomalies driven away from it.

    Ruff, Vandermeulen, Goernitz, Binder, Mueller, Mueller & Kloft, "Deep semi-supervised anomaly detection", ICLR 2020,
    in the two stages, networks and settings of the authors' code (lukasruff/Deep-SAD-PyTorch@2e7aca3). Pretraining and
    the centre c are `DeepSVDD`'s, known anomalies included in both, as there; then phi alone moves on

        L = mean over images of   |phi(x) - c|^2            x not known to be an anomaly            (7)
                                  eta / (|phi(x) - c|^2)    x a known anomaly (``split.known``)

    with weight decay in the optimiser. The anomaly score is |phi(x) - c|^2. At ``split.known.rate=0`` it is Deep SVDD.

    *Where we differ from the authors' code:* it pretrains on the mean of the squared error over pixels, ours on
    `DeepSVDD`'s sum, beside which the weight decay is some 800 times weaker; its command gives pretraining one learning
    rate, ours falls; learning rates fall after the epoch they say, see `DeepSVDD`. Its images
    are scaled to [0, 1] without contrast normalisation; ours are `DeepSVDD`'s, so that the known anomalies are all that
    differs from it. It can be told of normals as well (``ratio_known_normal``), which weigh eta; ours are unlabelled.

    Args:
        eta: weight of a known anomaly; 1 weighs it like any image.
    """

    SEMI_SUPERVISED: ClassVar[bool] = True

    def __init__(self, image_shape: Sequence[int], *, widths: Sequence[int], latent_size: int, eta: float) -> None:
        super().__init__(image_shape, widths=widths, latent_size=latent_size)
        if eta < 0:
            raise ValueError(f"eta={eta}: choose a weight from 0")
        self.eta = eta

    def plays(self, batch: Batch) -> Iterator[Mapping[str, Tensor]]:
        if self.stage == "pretrain":
            yield from super().plays(batch)
            return
        distance = self.distance(batch.x)  # (B,)
        known = torch.zeros_like(distance, dtype=torch.bool) if batch.known is None else batch.known
        yield {"svdd": torch.where(known, self.eta / (distance + NEAR), distance).mean()}
        self.record("known", known.float().mean())
