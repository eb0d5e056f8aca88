"""A small network trained with labelled anomalies: a ceiling, not a detector.

Legend of the shape comments: B images, C channels, S = image size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from anomaly_lab.detector import Batch, Detector


class SupervisedCeiling(Detector):
    """One class against the rest with true labels: L = -log p(y | x), A(x) = log p(anomalous | x) / p(normal | x).

    Its yaml says ``labels: true``, which makes the data module train on the training images of the other classes as
    well and put their truth into every batch (`anomaly_lab.data.OneClassData`). No one-class method gets either. The
    test images are those of every other row, so the difference between the two is what the labels are worth, and
    what is left above it is what no detector of that size can be expected to reach.

    Three 3x3 convolutions, each followed by ReLU and 2x2 max pooling, and one linear layer; no batch norm, so that a
    score depends on its image alone in training, too.

    Args:
        width: channels of the first convolution, doubled by the second and the third.
    """

    def __init__(self, image_shape: Sequence[int], *, width: int) -> None:
        super().__init__(image_shape)
        channels, size, _ = image_shape
        layers: list[nn.Module] = []
        for out in (width, 2 * width, 4 * width):
            layers += [nn.Conv2d(channels, out, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
            channels = out
        self.classifier = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * (size // 8) ** 2, 1))

    def players(self) -> Mapping[str, Sequence[nn.Module]]:
        return {"classifier": [self.classifier]}

    def plays(self, batch: Batch) -> Iterator[Mapping[str, Tensor]]:
        if batch.truth is None:
            raise ValueError("a supervised ceiling learns from labels: its yaml must say labels: true")
        yield {"classifier": F.binary_cross_entropy_with_logits(self.score(batch.x), batch.truth.float())}

    def score(self, x: Tensor) -> Tensor:
        logit: Tensor = self.classifier(x)  # (B,1)
        return logit.squeeze(1)
