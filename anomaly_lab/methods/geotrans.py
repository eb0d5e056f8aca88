"""GeoTrans: a classifier tells which of 72 geometric transformations an image went through (Golan & El-Yaniv 2018).

Legend of the shape comments: B images, N of the training set, C channels, S = image size, K transformations.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anomaly_lab.detector import Batch, Detector
from anomaly_lab.methods.rotation_prediction import STEPS, TURNS, WideResNet, translated


@dataclass(frozen=True)
class Transformations:
    """T_0 ... T_{K-1}: mirrored or not, moved by -t, 0 or t pixels along both axes (border reflected), turned.

    K is 72, 36 without mirror images, a ninth of either where t = 0. T_0 is the identity.
    """

    flips: bool
    shift: int  # t

    @property
    def count(self) -> int:
        return (1 + self.flips) * (STEPS**2 if self.shift else 1) * TURNS

    def __call__(self, x: Tensor, number: Tensor) -> Tensor:
        """Each image by a transformation of its own: (B,C,S,S), int64 (B,) -> (B,C,S,S)."""
        turn, rest = number % TURNS, number // TURNS
        steps = (
            torch.stack([rest % STEPS, rest // STEPS % STEPS]) if self.shift else torch.zeros_like(rest).expand(2, -1)
        )
        flip = rest // STEPS**2 if self.shift else rest
        mirrored = torch.where(flip.bool()[:, None, None, None], x.flip(3), x)
        moved = translated(mirrored, steps, self.shift)
        turned = torch.stack([moved.rot90(times, (2, 3)) for times in range(TURNS)])  # (4,B,C,S,S)
        return turned[turn, torch.arange(len(x), device=x.device)]

    def all_of(self, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Every transformation of all images: its number, (B,C,S,S)."""
        for number in range(self.count):
            yield number, self(x, torch.full((len(x),), number, device=x.device))


class GeoTrans(Detector):
    """A classifier of transformations, and how probable its answers are under those to normal images.

    Golan & El-Yaniv, "Deep anomaly detection using geometric transformations", NeurIPS 2018, with the settings of the
    authors' code (izikgo/AnomalyDetectionTransformations@6327041). With y(x) the softmax, (K,), of the classifier,

        L = CE(y(T_k(x)), k)

    After training, for each i the answers y(T_i(x)) to training images get a Dirichlet distribution by maximum
    likelihood, of parameters alpha_i (K,). The anomaly score is, up to constants, the negative mean of its logarithm,

        dirichlet   -1/K sum_i (alpha_i - 1) . log y(T_i(x))

    and the paper's simpler one, the missing confidence, stands beside it:

        softmax     -1/K sum_i y_i(T_i(x))

    *Where we differ from the authors' code:* it shuffles all K N pairs of an image and a transformation into batches;
    here an image is seen in one transformation a step, drawn for it, so that K of our epochs have the pairs of one of
    theirs; kernels start as torch's (theirs He-normal, 2.4 times as wide).

    Args:
        depth, width: of the `WideResNet`.
        flips: mirror images among the transformations. shift: t, in pixels; 0 moves nothing.
    """

    def __init__(self, image_shape: Sequence[int], *, depth: int, width: int, flips: bool, shift: int) -> None:
        super().__init__(image_shape)
        channels, size, _ = image_shape
        if not 0 <= shift < size:
            raise ValueError(f"shift={shift}: choose a number of pixels from 0 to below the image's {size}")
        self.transformations = Transformations(flips, shift)
        self.classifier = WideResNet(channels, depth, width, self.transformations.count)

    def players(self) -> Mapping[str, Sequence[nn.Module]]:
        return {"classifier": [self.classifier]}

    def plays(self, batch: Batch) -> Iterator[Mapping[str, Tensor]]:
        x = batch.x
        number = torch.randint(self.transformations.count, (len(x),), generator=self.noise, device=x.device)
        yield {"classifier": F.cross_entropy(self.classifier(self.transformations(x, number)), number)}

    def after_fit(self, images: Tensor) -> None:
        answers: list[list[Tensor]] = [[] for _ in range(self.transformations.count)]
        for x in images.split(1000):
            for number, view in self.transformations.all_of(x):
                answers[number].append(self.classifier(view).double().log_softmax(1))
        self.set_fitted("alpha", torch.stack([most_likely_dirichlet(torch.cat(some)) for some in answers]))  # (K,K)

    def terms(self, x: Tensor) -> Mapping[str, Tensor]:
        alpha = self.get_buffer("alpha")
        dirichlet, softmax = torch.zeros(2, len(x), dtype=alpha.dtype, device=x.device)
        for number, view in self.transformations.all_of(x):
            log_y = self.classifier(view).to(alpha.dtype).log_softmax(1)  # (B,K)
            dirichlet -= log_y @ (alpha[number] - 1)
            softmax -= log_y[:, number].exp()
        count = self.transformations.count
        return {"dirichlet": (dirichlet / count).float(), "softmax": (softmax / count).float()}

    def combine(self, terms: Mapping[str, Tensor]) -> Tensor:
        return terms["dirichlet"]


def most_likely_dirichlet(log_y: Tensor, iterations: int = 200) -> Tensor:
    """Parameters of the Dirichlet distribution under which answers are most likely: log y (N,K), float64 -> (K,).

    The fixed point of psi(alpha) = psi(sum alpha) + mean log y (Minka 2000), from an approximation of sum alpha
    (Wicker et al. 2008).
    """
    mean, mean_log = log_y.exp().mean(0), log_y.mean(0)
    spread = (mean * (mean.clamp(min=1e-300).log() - mean_log)).sum().clamp(min=1e-12)
    euler = -torch.digamma(torch.ones((), dtype=log_y.dtype, device=log_y.device))
    alpha = (mean * (len(mean) - 1) * euler / spread).clamp(min=1e-10)
    for _ in range(iterations):
        alpha = _inverse_digamma(torch.digamma(alpha.sum()) + mean_log)
    return alpha


def _inverse_digamma(y: Tensor) -> Tensor:
    """x with psi(x) = y, by Newton's method."""
    x = torch.where(y >= -2.22, y.exp() + 0.5, -1 / (y - torch.digamma(torch.ones_like(y))))
    for _ in range(5):
        x = x - (torch.digamma(x) - y) / torch.polygamma(1, x)
    return x
