"""Rotation and translation prediction: a classifier that knows how a normal image was turned (Hendrycks et al. 2019).

Legend of the shape comments: B images, C channels, S = image size, w = width, V = views of an image.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anomaly_lab.detector import Batch, Detector

TURNS, STEPS = 4, 3
"""Quarter turns; translations along one axis: none, back, forth."""


class _Residual(nn.Module):
    """Two 3×3 convolutions with batch norm before each, and a way round them."""

    def __init__(self, a: int, b: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(a), nn.BatchNorm2d(b)
        self.conv1, self.conv2 = (nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.Conv2d(b, b, 3, 1, 1, bias=False))
        self.shortcut = nn.Conv2d(a, b, 1, stride, bias=False) if a != b or stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(x))
        around = x if self.shortcut is None else self.shortcut(h)
        y: Tensor = around + self.conv2(F.relu(self.norm2(self.conv1(h))))
        return y


class WideResNet(nn.Sequential):
    """Zagoruyko & Komodakis 2016: three groups of residual blocks, w, 2w and 4w channels: (B,C,S,S) -> (B,outputs).

    Args:
        depth: 4 + 6 n, with n blocks a group. width: w; 64 is their widening factor of 4.
    """

    def __init__(self, channels: int, depth: int, width: int, outputs: int) -> None:
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth={depth}: choose 10, 16, 22, 28, ...")
        stem = min(16, width)
        layers: list[nn.Module] = [nn.Conv2d(channels, stem, 3, 1, 1, bias=False)]
        for group, (a, b) in enumerate(itertools.pairwise([stem, width, 2 * width, 4 * width])):
            for block in range((depth - 4) // 6):
                layers.append(_Residual(b if block else a, b, 2 if group and not block else 1))
        super().__init__(
            *layers,
            nn.BatchNorm2d(4 * width),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4 * width, outputs),
        )


class RotationPrediction(Detector):
    """One network, three heads: by how many quarter turns, and how far along either axis, was this image moved?

    Hendrycks, Mazeika, Kadavath & Song, "Using self-supervised learning can improve model robustness and uncertainty",
    NeurIPS 2019, in the order of the authors' code for one class (hendrycks/ss-ood@8051356; that for CIFAR-10 is not
    published). Every image of a batch is moved by a translation drawn for it, out of the nine of -t, 0 and t pixels
    along both axes, the border reflected, and shown in all four rotations:

        L = 1/3 (CE(rotation) + CE(translation along x) + CE(translation along y))

    With p the softmax of each head at what was really done, the score is the negative sum of the three means of p over
    all 36 views of an image. Their negative means are its terms.

    *Where we differ from the authors' code:* no image is mirrored or cropped at random, so that digits stay digits; a
    step draws one translation an image instead of going through all nine in an epoch nine times as long; the network is
    that of GeoTrans for images of 32 pixels (theirs, for 224, is a ResNet-18 with attention).

    Args:
        depth, width: of the `WideResNet`.
        shift: t, in pixels; 0 asks for rotations alone.
    """

    def __init__(self, image_shape: Sequence[int], *, depth: int, width: int, shift: int) -> None:
        super().__init__(image_shape)
        channels, size, _ = image_shape
        if not 0 <= shift < size:
            raise ValueError(f"shift={shift}: choose a number of pixels from 0 to below the image's {size}")
        self.shift = shift
        self.heads = {"rotation": TURNS} | ({"translation_x": STEPS, "translation_y": STEPS} if shift else {})
        self.classifier = WideResNet(channels, depth, width, sum(self.heads.values()))

    def players(self) -> Mapping[str, Sequence[nn.Module]]:
        return {"classifier": [self.classifier]}

    def plays(self, batch: Batch) -> Iterator[Mapping[str, Tensor]]:
        steps = torch.randint(STEPS, (2, len(batch.x)), generator=self.noise, device=batch.x.device)
        views, done = self.views(batch.x, steps if self.shift else torch.zeros_like(steps))
        losses = {name: F.cross_entropy(logits, done[name]) for name, logits in self.predicted(views).items()}
        yield {"classifier": torch.stack(list(losses.values())).mean()}
        for name, loss in losses.items():
            self.record(f"loss_{name}", loss)

    def views(self, x: Tensor, steps: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """All rotations of translated images (4B,C,S,S), and by head what was done to each (4B,): (B,C,S,S), (2,B)."""
        moved = translated(x, steps, self.shift)
        turned = torch.cat([moved.rot90(turn, (2, 3)) for turn in range(TURNS)])
        turns = torch.arange(TURNS, device=x.device).repeat_interleave(len(x))
        done = {"rotation": turns, "translation_x": steps[0].repeat(TURNS), "translation_y": steps[1].repeat(TURNS)}
        return turned, done

    def predicted(self, views: Tensor) -> dict[str, Tensor]:
        """Logits by head."""
        parts = self.classifier(views).split(list(self.heads.values()), dim=1)
        return dict(zip(self.heads, parts, strict=True))

    def terms(self, x: Tensor) -> Mapping[str, Tensor]:
        found: dict[str, list[Tensor]] = {name: [] for name in self.heads}
        for step_x, step_y in itertools.product(range(STEPS if self.shift else 1), repeat=2):
            steps = torch.tensor([[step_x], [step_y]], device=x.device).expand(2, len(x))
            views, done = self.views(x, steps)
            for name, logits in self.predicted(views).items():
                right = logits.softmax(1).gather(1, done[name][:, None])  # (4B,1)
                found[name].append(right.view(TURNS, len(x)).mean(0))
        return {name: -torch.stack(means).mean(0) for name, means in found.items()}

    def combine(self, terms: Mapping[str, Tensor]) -> Tensor:
        return torch.stack(list(terms.values())).sum(0)


def translated(x: Tensor, steps: Tensor, shift: int) -> Tensor:
    """Each image moved along x and y by 0, -shift or shift pixels (steps 0, 1, 2), its border reflected.

    x: (B,C,S,S); steps: int64 (2,B)
    """
    if not shift:
        return x
    size = x.shape[-1]
    offset = shift * ((steps == 2).long() - (steps == 1).long())  # (2,B)
    place = torch.arange(size, device=x.device) + shift - offset[..., None]  # (2,B,S) in the padded image
    padded = F.pad(x, (shift,) * 4, mode="reflect")
    image = torch.arange(len(x), device=x.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[image, place[1][:, :, None], place[0][:, None, :]].permute(0, 3, 1, 2)
