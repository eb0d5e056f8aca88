"""The deep perceptual autoencoder: PIAD's networks and perceptual loss without an adversary (Shvetsova et al. 2021).

Legend of the shape comments: B images, C channels, S = image size, R = resolution, d = latent size, w_R = channels at
that resolution.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anomaly_lab.detector import Batch, Detector
from anomaly_lab.methods.piad import (
    SLOPE,
    PerceptualDetector,
    RelativeL1,
    ResidualEncoder,
    ResidualGenerator,
    init_residual,
    levels,
)
from anomaly_lab.networks import PerceptualFeatures


class PerceptualAutoencoder(PerceptualDetector):
    """An autoencoder trained, and judged, by the relative perceptual L1 alone.

    Shvetsova, Bakker, Fedulova, Schulz, Dylov, "Anomaly detection in medical imaging with deep perceptual
    autoencoders", IEEE Access 2021 (arXiv 2006.13265); ADDPA in the tables of Jia & Liu 2022. With f, E and G as in
    `PerceptualDetector`, loss and anomaly score are

        L_rec(x) = mean|f(x) - f(G(E(x)))| / mean|f(x)|

    *Where we differ from the authors' code* (github.com/ninatu/anomaly_detection, 6fa35f3): in the features'
    normalisation, see `RelativeL1`; and in the networks, PIAD's: for CIFAR-10 theirs have a second residual
    block at each resolution, about twice the parameters. Their hyper-parameters and their epoch are validated on one
    class of true anomalies; here training ends at the last step, and no anomaly is seen. What they do with images of
    64 pixels is `GrowingPerceptualAutoencoder`.

    Args:
        encoder_widths, generator_widths: channels from one resolution to the next, see PIAD's networks; smaller images
            than 32 pixels use those nearest to the image. latent_size: d.
        features: makes f. None: f is the image itself, normalised likewise.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        *,
        encoder_widths: Sequence[int],
        generator_widths: Sequence[int],
        latent_size: int,
        features: Callable[[], PerceptualFeatures] | None,
    ) -> None:
        super().__init__(image_shape)
        channels, size, _ = image_shape
        down = levels("encoder_widths", encoder_widths, size)
        up = levels("generator_widths", generator_widths, size)
        self.encoder = ResidualEncoder(channels, encoder_widths[:down], latent_size)
        self.generator = ResidualGenerator(channels, generator_widths[-up:], latent_size)
        for network in (self.encoder, self.generator):
            network.to(memory_format=torch.channels_last)  # twice as fast on a CPU
        self.use_features(image_shape, features() if features is not None else None)

    def players(self) -> Mapping[str, Sequence[nn.Module]]:
        return {"autoencoder": [self.encoder, self.generator]}

    def plays(self, batch: Batch) -> Iterator[Mapping[str, Tensor]]:
        yield {"autoencoder": self.relative_l1(batch.x, self.reconstruct(batch.x)).mean()}


SIDES = (8, 16, 32, 64)
"""Resolutions, from that of the first stage to the image's own."""


class _Block(nn.Module):
    """x + conv(lrelu(conv(resampled lrelu(x)))), the shortcut resampled likewise: (B,K,H,W) -> (B,K',H',W').

    Resampled in front of the first convolution, by the mean of 2×2 or by nearest neighbours; PIAD's
    `anomaly_lab.methods.piad.ResidualBlock` takes the mean behind the second.
    """

    def __init__(self, inputs: int, outputs: int, resample: nn.Module | None = None) -> None:
        super().__init__()
        self.resample = resample or nn.Identity()
        self.convolutions = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1), nn.LeakyReLU(SLOPE), nn.Conv2d(outputs, outputs, 3, padding=1)
        )
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        residual = self.convolutions(self.resample(F.leaky_relu(x, SLOPE)))
        return self.skip(self.resample(x)) + residual


class GrowingEncoder(nn.Module):
    """An encoder that begins at a small resolution: images (B,C,R,R) -> codes (B,d), for every R of `SIDES`.

    Args:
        widths: channels at 4, 8, ... and 64 pixels.
    """

    def __init__(self, channels: int, widths: Sequence[int], latent_size: int) -> None:
        super().__init__()
        self.inputs = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, w, 3, padding=1), _Block(w, w), _Block(w, w)) for w in widths[1:]
        )
        self.down = nn.ModuleList(
            nn.Sequential(_Block(w, lower, nn.AvgPool2d(2)), _Block(lower, lower))
            for lower, w in itertools.pairwise(widths)
        )
        self.last = nn.Sequential(nn.LeakyReLU(SLOPE), nn.Conv2d(widths[0], latent_size, 4), nn.Flatten())
        self.apply(init_residual)

    def parts(self, level: int, growing: bool) -> list[nn.Module]:
        """What images of ``SIDES[level]`` pixels go through; ``growing``: and those of half as many beside them."""
        return [*self.inputs[level - growing : level + 1], *self.down[: level + 1], self.last]

    def forward(self, x: Tensor, level: int, fresh: Tensor | None = None) -> Tensor:
        """Codes of images at ``SIDES[level]`` pixels; ``fresh`` (): share of that resolution, the rest of the last."""
        h = self.down[level](self.inputs[level](x))
        if fresh is not None:
            h = torch.lerp(self.inputs[level - 1](F.avg_pool2d(x, 2)), h, fresh)
        for block in reversed(self.down[:level]):
            h = block(h)
        z: Tensor = self.last(h)
        return z


class GrowingGenerator(nn.Module):
    """The way back: codes (B,d) -> images (B,C,R,R), for every R of `SIDES`.

    Args:
        widths: channels at 4, 8, ... and 64 pixels.
    """

    def __init__(self, channels: int, widths: Sequence[int], latent_size: int) -> None:
        super().__init__()
        # The reference's padded 4×4 convolution of one position.
        self.first = nn.Sequential(
            nn.LeakyReLU(SLOPE), nn.Unflatten(1, (latent_size, 1, 1)), nn.ConvTranspose2d(latent_size, widths[0], 4)
        )
        self.up = nn.ModuleList(
            nn.Sequential(_Block(lower, w, nn.Upsample(scale_factor=2)), _Block(w, w))
            for lower, w in itertools.pairwise(widths)
        )
        self.outputs = nn.ModuleList(
            nn.Sequential(nn.LeakyReLU(SLOPE), nn.Conv2d(w, channels, 3, padding=1)) for w in widths[1:]
        )
        self.apply(init_residual)

    def parts(self, level: int, growing: bool) -> list[nn.Module]:
        """What makes images of ``SIDES[level]`` pixels; ``growing``: and those of half as many beside them."""
        return [self.first, *self.up[: level + 1], *self.outputs[level - growing : level + 1]]

    def forward(self, z: Tensor, level: int, fresh: Tensor | None = None) -> Tensor:
        """Images at ``SIDES[level]`` pixels; ``fresh`` (): share of that resolution, the rest of the last, doubled."""
        h = self.first(z)
        for block in self.up[:level]:
            h = block(h)
        y: Tensor = self.outputs[level](self.up[level](h))
        if fresh is None:
            return y
        return torch.lerp(F.interpolate(self.outputs[level - 1](h), scale_factor=2), y, fresh)


class GrowingPerceptualAutoencoder(Detector):
    """The deep perceptual autoencoder of 64 pixels, which grows there from 8, and its loss with it.

    Shvetsova et al. 2021, section III-B, as their configurations for chest X-rays have it (`PerceptualAutoencoder` has
    the reference). The stages ``at_R`` train at R pixels; in ``to_R`` between them images, codes and reconstructions
    are each a mixture of what R/2 and R pixels give, with the share a of R rising from 0 to 1, and

        L(x) = (1 - a) L_rec(x', y') at R/2 + a L_rec(x, y) at R,      x' = x halved, y = G(E(x)), y' = y halved

    where L_rec is `RelativeL1` with features that grow as well (``architectures``): of VGG19 relu1_2 at 8 pixels,
    relu2_2 at 16, relu3_2 at 32 and 64. Every stage begins with an optimiser of its own. The anomaly score is L_rec at
    64 pixels, by the networks of the last stage: there is none before.

    *Where we differ from the authors' code* (github.com/ninatu/anomaly_detection, 6fa35f3): a rises with each epoch,
    theirs with each step; training ends at the last step, theirs by validation on one class of true anomalies; channel
    statistics of the features as in `RelativeL1`.

    Args:
        widths: channels at 4, 8, 16, 32 and 64 pixels. latent_size: d.
        features: makes f, given its ``architecture``. None: f is the image itself, normalised likewise.
        architectures: of f at 8, 16, 32 and 64 pixels, see `PerceptualFeatures`.
    """

    STAGES: ClassVar[tuple[str, ...]] = ("at_8", "to_16", "at_16", "to_32", "at_32", "to_64", "at_64")

    fresh: Tensor  # a, ()

    def __init__(
        self,
        image_shape: Sequence[int],
        *,
        widths: Sequence[int],
        latent_size: int,
        features: Callable[..., PerceptualFeatures] | None,
        architectures: Sequence[str],
    ) -> None:
        super().__init__(image_shape)
        channels, size, _ = image_shape
        if size != SIDES[-1]:
            raise ValueError(f"this autoencoder grows from 8 to 64 pixels: set model.input.size=64, not {size}")
        if len(widths) != len(SIDES) + 1 or len(architectures) != len(SIDES):
            raise ValueError(
                f"widths={list(widths)}, architectures={list(architectures)}: give the five channels at 4, 8, 16, 32 "
                "and 64 pixels, and the four architectures at 8, 16, 32 and 64"
            )
        self.encoder = GrowingEncoder(channels, widths, latent_size)
        self.generator = GrowingGenerator(channels, widths, latent_size)
        made = {
            name: None if features is None else features(architecture=name) for name in dict.fromkeys(architectures)
        }
        self.judges = nn.ModuleList()
        for side, name in zip(SIDES, architectures, strict=True):
            judge = RelativeL1()
            judge.use_features((channels, side, side), made[name])
            self.judges.append(judge)
        self.register_buffer("fresh", torch.ones(()))

    def players(self) -> Mapping[str, Sequence[nn.Module]]:
        places = {stage: _place(stage) for stage in self.STAGES}
        return {stage: [*self.encoder.parts(*at), *self.generator.parts(*at)] for stage, at in places.items()}

    def plan(self, stages: Mapping[str, int]) -> None:
        super().plan(stages)
        if not stages["at_64"]:
            raise ValueError(
                "model.budget.stages.at_64=0: the score is made of that stage's networks, give it an epoch"
            )

    def before_fit(self, images: Tensor) -> None:
        for side, judge in zip(SIDES, self.judges, strict=True):
            assert isinstance(judge, RelativeL1)
            judge.fit_features(torch.cat([halved(x, side) for x in images.split(256)]))

    def before_epoch(self, epoch: int) -> None:
        self.fresh.fill_(self.stages.epoch / self.stages.epochs[self.stage])  # of no use in a stage ``at_R``

    def plays(self, batch: Batch) -> Iterator[Mapping[str, Tensor]]:
        stage = self.stage or self.STAGES[-1]
        level, growing = _place(stage)
        x, fresh = halved(batch.x, SIDES[level]), self.fresh if growing else None
        if growing:
            x = torch.lerp(F.interpolate(halved(batch.x, SIDES[level - 1]), scale_factor=2), x, self.fresh)
        y = self.generator(self.encoder(x, level, fresh), level, fresh)
        loss = self.relative_l1(x, y, level).mean()
        if growing:
            lower = SIDES[level - 1]
            last = self.relative_l1(halved(x, lower), halved(y, lower), level - 1).mean()
            loss = torch.lerp(last, loss, self.fresh)
        yield {stage: loss}

    def relative_l1(self, x: Tensor, y: Tensor, level: int) -> Tensor:
        """L_rec of images and reconstructions (B,C,R,R) at ``SIDES[level]`` pixels: (B,)."""
        judge = self.judges[level]
        assert isinstance(judge, RelativeL1)
        return judge.relative_l1(x, y)

    @property
    def scored_after_fit(self) -> bool:
        return True  # before the last stage nothing at 64 pixels has trained

    def score(self, x: Tensor) -> Tensor:
        return self.relative_l1(x, self.reconstruct(x), len(SIDES) - 1)

    def reconstruct(self, x: Tensor) -> Tensor:
        last = len(SIDES) - 1
        y: Tensor = self.generator(self.encoder(x, last), last)
        return y


def _place(stage: str) -> tuple[int, bool]:
    """The place of a stage's resolution in `SIDES`, and whether it grows there."""
    return SIDES.index(int(stage[3:])), stage.startswith("to_")


def halved(x: Tensor, side: int) -> Tensor:
    """Images (B,C,S,S) at ``side`` pixels, bilinear without smoothing, as the reference has them."""
    return x if x.shape[-1] == side else F.interpolate(x, size=(side, side), mode="bilinear", align_corners=False)
