"""The distance to the mean training image: the floor under every detector that claims to have learned.

Legend of the shape comments: B images in a batch, N training images, C channels, H = W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from torch import Tensor

from anomaly_lab.detector import Detector

Norm = Literal["l1", "l2"]


class MeanImage(Detector):
    """A(x) = mean |x - m| or mean (x - m)^2 over the pixels, m the mean of the training images.

    An autoencoder whose code does not depend on its input ends here: the best constant reconstruction is the median
    image under L1 and m under L2. A reconstruction error that ranks no better than this one has learned nothing.

    Args:
        norm: ``l1`` or ``l2``.
    """

    mean: Tensor  # (C,H,W)

    def __init__(self, image_shape: Sequence[int], *, norm: Norm) -> None:
        super().__init__(image_shape)
        self.norm = norm

    def after_fit(self, images: Tensor) -> None:
        self.set_fitted("mean", images.double().mean(0).float())

    def terms(self, x: Tensor) -> Mapping[str, Tensor]:
        """``l1`` and ``l2``, whichever of them is the score."""
        difference = (x - self.mean).flatten(1)  # (B,CHW)
        return {"l1": difference.abs().mean(1), "l2": difference.square().mean(1)}

    def combine(self, terms: Mapping[str, Tensor]) -> Tensor:
        return terms[self.norm]

    def reconstruct(self, x: Tensor) -> Tensor:
        return self.mean.expand_as(x)
