"""Latent-space autoregression: an autoencoder whose codes have a density of their own (Abati et al. 2019).

Legend of the shape comments: B images, C channels, S = image size, d = latent size, w = estimator's width, Q = bins.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anomaly_lab.detector import Batch, Detector

SLOPE = 0.01  # of every leaky ReLU


class _Masked(nn.Linear):
    """Linear, b units for each code entry that see the entries before it, and it with ``own``: (B,d a) -> (B,d b)."""

    mask: Tensor

    def __init__(self, latent_size: int, a: int, b: int, *, own: bool) -> None:
        super().__init__(latent_size * a, latent_size * b)
        seen = torch.ones(latent_size, latent_size).tril(0 if own else -1)  # [entry, what it sees]
        self.register_buffer("mask", seen.repeat_interleave(b, 0).repeat_interleave(a, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


class Estimator(nn.Module):
    """log p(z_i | z_1, ..., z_{i-1}) over Q bins of [0, 1], for every i: (B,d) -> logits (B,d,Q)."""

    def __init__(self, latent_size: int, width: int, bins: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for position, (a, b) in enumerate(itertools.pairwise([1, width, width, width, width, bins])):
            layers += [nn.LeakyReLU(SLOPE)] * (position > 0) + [_Masked(latent_size, a, b, own=position > 0)]
        self.layers = nn.Sequential(*layers)
        self.bins = bins

    def forward(self, z: Tensor) -> Tensor:
        logits: Tensor = self.layers(z)
        return logits.view(*z.shape, self.bins)

    def negative_log_likelihood(self, z: Tensor) -> Tensor:
        """-log p(z), in nats: (B,d) -> (B,). The target bins are detached: z gets its
        gradient from the entries that the estimator conditions on."""
        target = (z.detach() * self.bins).long().clamp(0, self.bins - 1)
        return F.cross_entropy(self(z).transpose(1, 2), target, reduction="none").sum(1)


class Residual(nn.Module):
    """Two convolutions with batch norm beside a shortcut: (B,a,S,S) -> (B,b,S',S').

    Args:
        a, b: channels. step: ``halve`` the image, ``double`` it, or ``keep`` its size and its channels. Where it is
        kept the shortcut is the image itself, else a 1×1 convolution with batch norm.
    """

    def __init__(self, a: int, b: int, step: Literal["halve", "double", "keep"]) -> None:
        super().__init__()
        assert step != "keep" or a == b
        first: nn.Module
        shortcut: list[nn.Module] = []
        if step == "halve":
            first = nn.Conv2d(a, b, 3, 2, 1, bias=False)
            shortcut = [nn.Conv2d(a, b, 1, 2, bias=False), nn.BatchNorm2d(b)]
        elif step == "double":
            first = nn.ConvTranspose2d(a, b, 5, 2, 2, output_padding=1, bias=False)
            shortcut = [nn.ConvTranspose2d(a, b, 1, 2, output_padding=1, bias=False), nn.BatchNorm2d(b)]
        else:
            first = nn.Conv2d(a, b, 3, 1, 1, bias=False)
        second = nn.Conv2d(b, b, 3, 1, 1, bias=False)
        self.main = nn.Sequential(first, nn.BatchNorm2d(b), nn.LeakyReLU(SLOPE), second, nn.BatchNorm2d(b))
        self.shortcut = nn.Sequential(*shortcut)

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.main(x) + self.shortcut(x), SLOPE)


class LSA(Detector):
    """Surprisal and error: images are odd when their code is unlikely or their reconstruction bad.

    Abati, Porrello, Calderara & Cucchiara, "Latent space autoregression for novelty detection", CVPR 2019; the authors'
    code (aimagelab/novelty-detection@055d393) holds networks and test, training is made from the paper. A code z in
    (0, 1)^d is cut into Q bins for its density alone:

        L = |x - x^|_2^2 - lambda log p(z),    summed over pixels and entries

    The score is the sum of both terms after each has been scaled by its minimum and maximum among the training images.

    *Where we differ from the authors' code:* its scales come from a tenth of the training normals drawn anew at the
    test, which had trained as well; ours from all that trained. Its first convolution of colour images has no padding.

    Args:
        widths: channels of the encoder's residual blocks, each of which halves the image; the decoder has them in
        reverse and ends in half the first. stem: with a convolution and a block before the first halving, and a block
        behind the last doubling. hidden: units between the convolutions and the code. latent_size: d.
        estimator_width: w. bins: Q. nll_weight: lambda.
    """

    scales: Tensor  # (2,2): minimum and maximum of reconstruction and of nll

    def __init__(
        self,
        image_shape: Sequence[int],
        *,
        widths: Sequence[int],
        stem: bool,
        hidden: int,
        latent_size: int,
        estimator_width: int,
        bins: int,
        nll_weight: float,
    ) -> None:
        super().__init__(image_shape)
        channels, size, _ = image_shape
        if size % 2 ** len(widths):
            raise ValueError(
                f"{len(widths)} halvings need a model.input.size that {2 ** len(widths)} divides, not {size}"
            )
        side, last = size >> len(widths), max(widths[0] // 2, 1)
        deepest = widths[-1] * side**2
        before: list[nn.Module] = []
        if stem:
            before = [nn.Conv2d(channels, last, 3, 1, 1, bias=False), nn.LeakyReLU(SLOPE), Residual(last, last, "keep")]
        self.encoder = nn.Sequential(
            *before,
            *(Residual(a, b, "halve") for a, b in itertools.pairwise([last if stem else channels, *widths])),
            nn.Flatten(),
            *(nn.Linear(deepest, hidden), nn.BatchNorm1d(hidden), nn.LeakyReLU(SLOPE)),
            *(nn.Linear(hidden, latent_size), nn.Sigmoid()),
        )
        self.decoder = nn.Sequential(
            *(nn.Linear(latent_size, hidden), nn.BatchNorm1d(hidden), nn.LeakyReLU(SLOPE)),
            *(nn.Linear(hidden, deepest), nn.BatchNorm1d(deepest), nn.LeakyReLU(SLOPE)),
            nn.Unflatten(1, (widths[-1], side, side)),
            *(Residual(a, b, "double") for a, b in itertools.pairwise([*reversed(widths), last])),
            *([Residual(last, last, "keep")] if stem else []),
            nn.Conv2d(last, channels, 1, bias=False),  # without an activation, as in the authors' code
        )
        self.estimator = Estimator(latent_size, estimator_width, bins)
        self.nll_weight = nll_weight
        self.register_buffer("scales", torch.tensor([[0.0, 1.0], [0.0, 1.0]]))

    def players(self) -> Mapping[str, Sequence[nn.Module]]:
        return {"lsa": [self.encoder, self.decoder, self.estimator]}

    def plays(self, batch: Batch) -> Iterator[Mapping[str, Tensor]]:
        terms = self.terms(batch.x)
        yield {"lsa": terms["reconstruction"].mean() + self.nll_weight * terms["nll"].mean()}
        for name, term in terms.items():
            self.record(f"loss_{name}", term.mean())

    def terms(self, x: Tensor) -> Mapping[str, Tensor]:
        z = self.encoder(x)
        error = (x - self.decoder(z)).square().sum((1, 2, 3))
        return {"reconstruction": error, "nll": self.estimator.negative_log_likelihood(z)}

    @property
    def scored_after_fit(self) -> bool:
        return True

    def after_fit(self, images: Tensor) -> None:
        found = [torch.stack(list(self.terms(x).values())) for x in images.split(1000)]  # (2,B) each
        self.scales.copy_(torch.stack(torch.cat(found, 1).aminmax(dim=1), 1))

    def combine(self, terms: Mapping[str, Tensor]) -> Tensor:
        low, high = self.scales.unbind(1)
        both = torch.stack([terms["reconstruction"], terms["nll"]], 1)  # (B,2)
        return ((both - low) / (high - low).clamp(min=1e-6)).sum(1)  # of an untrained estimator: no range

    def reconstruct(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))
