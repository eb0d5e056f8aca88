"""Deep SVDD: normal images are mapped into a small sphere (Ruff et al. 2018).

Legend of the shape comments: B images, N of the training set, d = latent size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from anomaly_lab.detector import Batch
from anomaly_lab.methods.convolutional_autoencoder import ConvolutionalAutoencoder

NEAREST_TO_ZERO = 0.1
"""Entries of the centre are moved at least so far from 0, which a network without biases reaches too easily."""


class DeepSVDD(ConvolutionalAutoencoder):
    """One-class Deep SVDD, in two stages, each with its own optimiser and schedule.

    Ruff et al., "Deep one-class classification", ICML 2018, networks and settings of the authors' code
    (lukasruff/Deep-SVDD-PyTorch@1901612):

        pretrain   encoder phi and decoder as an autoencoder (`ConvolutionalAutoencoder`)
        train      the centre c is the mean of phi(x) over the training images as pretraining left phi, entries with
                   0 < |c_i| < 0.1 moved to +-0.1; then phi alone moves on

                       L = mean |phi(x) - c|^2                                        (4), weight decay in the optimiser

    The anomaly score is |phi(x) - c|^2 (5). Before the second stage there is no centre, so nothing is scored.

    *Where we differ from the authors' code:* a rate falls after the milestone epoch; their schedule steps at the start
    of an epoch, so theirs falls one epoch earlier; the extremes of the normalised images are computed
    (`ConvolutionalAutoencoder`). As theirs, ours are minimum and maximum, so one extreme training image sets the scale
    of all: on CIFAR-10 the minimum is from -6 to -35, depending on the class.
    """

    STAGES = ("pretrain", "train")

    centre: Tensor  # (d,)

    def __init__(self, image_shape: Sequence[int], *, widths: Sequence[int], latent_size: int) -> None:
        super().__init__(image_shape, widths=widths, latent_size=latent_size)
        self.register_buffer("centre", torch.zeros(latent_size))

    def players(self) -> Mapping[str, Sequence[nn.Module]]:
        return {**super().players(), "svdd": [self.encoder]}

    def plan(self, stages: Mapping[str, int]) -> None:
        if stages.get("train") == 0:
            raise ValueError("model.budget.stages.train=0: without it there is no centre to score by; give at least 1")
        super().plan(stages)

    def before_stage(self, stage: str) -> None:
        if stage == "train":
            images = self.training_images.everything().x
            codes = torch.cat([self.encoder(self.normalise(x)) for x in images.split(1000)])  # (N,d)
            self.centre.copy_(away_from_zero(codes.mean(0)))

    def plays(self, batch: Batch) -> Iterator[Mapping[str, Tensor]]:
        if self.stage == "pretrain":
            yield from super().plays(batch)
        else:
            yield {"svdd": self.distance(batch.x).mean()}

    @property
    def scored_after_fit(self) -> bool:
        return self.stage == "pretrain"

    def distance(self, x: Tensor) -> Tensor:
        """|phi(x) - c|^2: (B,C,S,S) -> (B,)"""
        return (self.encoder(self.normalise(x)) - self.centre).square().sum(1)

    def score(self, x: Tensor) -> Tensor:
        return self.distance(x)

    def reconstruct(self, x: Tensor) -> None:  # type: ignore[override]
        """None: the decoder belongs to the encoder that pretraining left."""


class SoftBoundaryDeepSVDD(DeepSVDD):
    """Deep SVDD whose sphere has a radius, outside of which a share ``nu`` of the training images may lie.

        L = R^2 + mean max(0, |phi(x) - c|^2 - R^2) / nu                              (3)

    R stays 0 for ``warm_up`` epochs; from then on it is, after every step, the (1 - nu) quantile of the distances
    |phi(x) - c| in that step's batch, from before its move. The score is |phi(x) - c|^2 - R^2.

    Args:
        nu: in (0, 1]. warm_up: epochs of the second stage.
    """

    radius: Tensor  # R, ()
    moving: Tensor  # bool (): whether R follows the batches, else it is 0; no Python branch, so steps can be replayed

    def __init__(
        self, image_shape: Sequence[int], *, widths: Sequence[int], latent_size: int, nu: float, warm_up: int
    ) -> None:
        super().__init__(image_shape, widths=widths, latent_size=latent_size)
        if not 0 < nu <= 1:
            raise ValueError(f"nu={nu}: choose a share above 0, at most 1")
        self.nu, self.warm_up = nu, warm_up
        self.register_buffer("radius", torch.zeros(()))
        self.register_buffer("moving", torch.zeros((), dtype=torch.bool))

    def before_epoch(self, epoch: int) -> None:
        self.moving.fill_(self.stage == "train" and self.stages.epoch > self.warm_up)

    def plays(self, batch: Batch) -> Iterator[Mapping[str, Tensor]]:
        if self.stage == "pretrain":
            yield from super().plays(batch)
            return
        distance = self.distance(batch.x)  # (B,)
        beyond = (distance - self.radius.square()).clamp(min=0)
        yield {"svdd": self.radius.square() + beyond.mean() / self.nu}
        quantile = distance.detach().sqrt().quantile(1 - self.nu)
        self.radius.copy_(torch.where(self.moving, quantile, self.radius))
        self.record("radius", self.radius.clone())

    def score(self, x: Tensor) -> Tensor:
        return self.distance(x) - self.radius.square()


def away_from_zero(centre: Tensor) -> Tensor:
    """Entries nearer to 0 than 0.1 at that distance, on their side; a 0 stays, as in the authors' code."""
    near = centre.abs() < NEAREST_TO_ZERO
    return torch.where(near, centre.sign() * NEAREST_TO_ZERO, centre)
