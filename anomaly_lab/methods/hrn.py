"""HRN: one small network tells one class from everything else, held back by its own gradient (Hu et al. 2020).

Legend of the shape comments: B images, C channels, P = S S pixels of a channel, w = width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anomaly_lab.detector import Batch, Detector

SATURATION = 0.01
"""Added to the sigmoid, as in the authors' code. It bounds the loss: -log(sigmoid + 0.01) <= 4.6."""


class _Classifier(nn.Module):
    """Without biases: w units a channel and, of colour, w that join them, then one logit: (B,C,P) -> (B,)."""

    def __init__(self, channels: int, pixels: int, width: int, init: float) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Linear(pixels, width, bias=False) for _ in range(channels))
        self.joined = nn.ModuleList([nn.Linear(channels * width, width, bias=False)] if channels > 1 else [])
        self.logit = nn.Linear(width, 1, bias=False)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -init, init)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([branch(x[:, channel]) for channel, branch in enumerate(self.branches)], 1)
        for layer in self.joined:
            h = layer(F.leaky_relu(h))
        f: Tensor = self.logit(F.leaky_relu(h)).squeeze(1)
        return f


class HRN(Detector):
    """Holistic regularisation of a classifier f that sees one class only.

    Hu, Wang, Qin, Ma & Liu, "HRN: a holistic approach to one class learning", NeurIPS 2020, in the sizes of the
    authors' code (morning-dews/HRN@22a7984). Each image is divided by its 2-norm and freed of its mean, and the code
    for CIFAR-10 then adds ``offset`` to every value: without biases and with centred images the three layers for
    colour start on a saddle, f = 0, and hardly leave it in 50 epochs. With the means over the batch

        L = -log(sigmoid(f(x)) + 0.01) + lambda |grad_x f(x)|_2^n

    The first term alone grows f without end, for every input; the second, the H-regulariser, taken at the images
    themselves, lets it grow along few directions. The anomaly score is -f(x).

    *Where we differ from the authors' code:* it reports the best test epoch, here the last one counts. Its gradient
    norm on colour images runs over the channels of each pixel; here over the whole image, as in the paper and as in its
    code for grey ones. The 0.01 is the code's; the paper has none. The code's option ``lr`` is never used.

    Args:
        width: w.
        init: weights are drawn from U(-init, init).
        h_weight: lambda. h_power: n.
        offset: added to every value of a normalised image.
    """

    def __init__(
        self, image_shape: Sequence[int], *, width: int, init: float, h_weight: float, h_power: int, offset: float
    ) -> None:
        super().__init__(image_shape)
        channels, height, wide = image_shape
        self.classifier = _Classifier(channels, height * wide, width, init)
        self.h_weight, self.h_power, self.offset = h_weight, h_power, offset

    def players(self) -> Mapping[str, Sequence[nn.Module]]:
        return {"classifier": [self.classifier]}

    def plays(self, batch: Batch) -> Iterator[Mapping[str, Tensor]]:
        x = (normalised(batch.x) + self.offset).requires_grad_()  # (B,C,P)
        with torch.autocast(x.device.type, enabled=False):  # second derivatives in half precision are noise
            f = self.classifier(x)
            (gradient,) = torch.autograd.grad(f.sum(), x, create_graph=True)  # each image's own: no batch norm here
            h = gradient.square().sum((1, 2)).pow(self.h_power / 2).mean()
        negative_log = -(torch.sigmoid(f) + SATURATION).log().mean()
        yield {"classifier": negative_log + self.h_weight * h}
        self.record("loss_negative_log", negative_log)
        self.record("loss_h", h)

    def score(self, x: Tensor) -> Tensor:
        return -self.classifier(normalised(x) + self.offset)


def normalised(x: Tensor) -> Tensor:
    """Images divided by their 2-norm, then centred: (B,C,S,S) -> (B,C,P)."""
    flat = x.flatten(1)
    flat = flat / flat.norm(dim=1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    return (flat - flat.mean(1, keepdim=True)).view(x.shape[0], x.shape[1], -1)
