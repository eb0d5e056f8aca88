"""Contrastive learning of one class, with rotated images as what it is contrasted with.

Legend of the shape comments: B images, V = 2 views, C channels, S = image size, R = 4 rotations, M = R V B rotated
views, N training images, F features, K crops.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anomaly_lab.calibration import Balanced
from anomaly_lab.detector import Batch

ROTATIONS = 4
EMBEDDED = 128
"""Dimensions in which views are contrasted, SimCLR's."""

AT_ONCE = 200
"""Training images whose features are computed in one go."""

GREY = (0.299, 0.587, 0.114)
"""Weights of the channels in luminance (ITU-R 601)."""


class _Block(nn.Module):
    """Two 3×3 convolutions with batch norm after each, and a way round them."""

    def __init__(self, a: int, b: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.Conv2d(b, b, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(b), nn.BatchNorm2d(b)
        self.shortcut = nn.Sequential(
            *([nn.Conv2d(a, b, 1, stride, bias=False), nn.BatchNorm2d(b)] if a != b or stride > 1 else [])
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class ResNet18(nn.Sequential):
    """He et al. 2016 for small images: a 3×3 convolution of stride 1 and no pooling in front; (B,C,S,S) -> (B,8w)."""

    def __init__(self, channels: int, width: int) -> None:
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        a = width
        for group in range(4):
            b = width << group
            layers += [_Block(a, b, 2 if group else 1), _Block(b, b, 1)]
            a = b
        super().__init__(*layers)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = super().forward(x).mean((2, 3))
        return found


class RotationContrast(Balanced):
    """Views of normal images attract each other, rotated ones are held apart, and the rotation is told.

    Each image of a batch is seen in two augmented views x, x' under R = 4 rotations; the views as they are are I, those
    that were turned are O. With f the features of a ResNet-18, z their embedding of norm 1 and tau the temperature,

        p_ij  = exp(z_i z_j / tau) / sum_{a != i} exp(z_i z_a / tau),   a over all M rotated views
        L_in  = -mean over i in I of  sum_{j in I, j != i} w_ij log p_ij
        w_ij  = q_j / sum_{j' in I, j' != i} q_j',   q_j = mean over k in I of exp(z_j z_k / tau), without gradient
        L_out = -mean over i in O of  log p_ii',   i' the other view of the same image, turned alike
        L     = L_in + L_out + CE(rotation | f)

    Rotations as images that are shifted away from the class are those of CSI (Tack, Mo, Jeong & Shin, NeurIPS 2020), as
    is the classifier of rotations; that all inliers attract each other, by soft weights, is UniCon-HA's unilateral
    aggregation (Wang et al., ICCV 2023). Its stages of hard augmentation are left out. With f_r the features of an
    image turned by r, the terms are means over K fixed crops:

        likeness:   -sum_r max over normal images n of cos(f_r(x), f_r(n)) |f_r(x)|^norm_power
        rotations:  -sum_r log p(r | f_r(x))

    and the score adds both on one scale (`Balanced`).

    Args:
        width: of the first convolution; F is eight times that.
        temperature: tau.
        crop: smallest share of the image's area in a random crop. jitter: strength of brightness, contrast and
            saturation (of colour); grey: probability of a grey view (of colour); flip: whether views are mirrored.
        norm_power: 0 or 1.
        crops: K; the first is the whole image.
    """

    TERMS = ("likeness", "rotations")
    bank: Tensor  # (R,N,F), of norm 1
    boxes: Tensor  # (K,3)
    luminance: Tensor  # (3,1,1)

    def __init__(
        self,
        image_shape: Sequence[int],
        *,
        width: int,
        temperature: float,
        crop: float,
        jitter: float,
        grey: float,
        flip: bool,
        norm_power: int,
        crops: int,
    ) -> None:
        super().__init__(image_shape)
        if not 0 < crop <= 1 or not 0 <= jitter < 1 or not 0 <= grey <= 1:
            raise ValueError(f"crop={crop}, jitter={jitter}, grey={grey}: choose shares from 0 to 1, and crop above 0")
        if norm_power not in (0, 1) or crops < 1 or temperature <= 0:
            raise ValueError(f"norm_power={norm_power}, crops={crops}, temperature={temperature}: give 0 or 1, 1, .5")
        self.temperature, self.crop, self.jitter, self.grey = temperature, crop, jitter, grey
        self.flip, self.norm_power, self.crops = flip, norm_power, crops
        channels, features = image_shape[0], 8 * width
        self.network = ResNet18(channels, width)
        self.head = nn.Sequential(nn.Linear(features, features), nn.ReLU(), nn.Linear(features, EMBEDDED))
        self.rotation = nn.Linear(features, ROTATIONS)
        self.register_buffer("luminance", torch.tensor(GREY)[:, None, None], persistent=False)

    def players(self) -> Mapping[str, Sequence[nn.Module]]:
        return {"network": [self.network, self.head, self.rotation]}

    def plays(self, batch: Batch) -> Iterator[Mapping[str, Tensor]]:
        views = torch.cat([self.augmented(batch.x), self.augmented(batch.x)])  # (VB,C,S,S)
        f = self.network(turned(views).flatten(0, 1))  # (M,F), by rotation, then view, then image
        with torch.autocast(f.device.type, enabled=False):  # a product in bfloat16 has no three digits
            inliers, outliers = contrast(F.normalize(self.head(f.float()), dim=1), self.temperature)
        done = torch.arange(ROTATIONS, device=f.device).repeat_interleave(len(views))
        rotation = F.cross_entropy(self.rotation(f), done)
        yield {"network": inliers + outliers + rotation}
        for name, loss in (("inliers", inliers), ("outliers", outliers), ("rotation", rotation)):
            self.record(f"loss_{name}", loss)

    def augmented(self, x: Tensor) -> Tensor:
        """A random view of each image of [0, 1]: crop and flip, then colours: (B,C,S,S)."""

        def drawn(low: float, high: float) -> Tensor:
            return torch.rand(len(x), 1, 1, 1, generator=self.noise, device=x.device) * (high - low) + low

        mirrored = 1 - 2 * (drawn(0, 1) < 0.5 * self.flip).float()
        x = cropped(x, self.boxes_of(len(x)), mirrored.flatten())
        x = (x * drawn(1 - self.jitter, 1 + self.jitter)).clamp(0, 1)
        mean = x.mean((1, 2, 3), keepdim=True)
        x = ((x - mean) * drawn(1 - self.jitter, 1 + self.jitter) + mean).clamp(0, 1)
        if x.shape[1] == 3:
            luminance = (x * self.luminance).sum(1, keepdim=True)
            saturation = drawn(1 - self.jitter, 1 + self.jitter) * (drawn(0, 1) >= self.grey)
            x = ((x - luminance) * saturation + luminance).clamp(0, 1)
        return x

    def boxes_of(self, count: int) -> Tensor:
        """Random crops (count,3): the side as a share of the image's, and the centre from -1 to 1."""
        u = torch.rand(count, 3, generator=self.noise, device=self.device)
        side = (self.crop + (1 - self.crop) * u[:, :1]).sqrt()
        return torch.cat([side, (2 * u[:, 1:] - 1) * (1 - side)], 1)

    def seen(self, x: Tensor) -> Tensor:
        """Features of the four rotations of images: (B,C,S,S) -> (R,B,F)."""
        return self.network(turned(x).flatten(0, 1)).unflatten(0, (ROTATIONS, -1))

    def remember(self, images: Tensor, held_out: Tensor) -> None:
        self.set_fitted("bank", torch.cat([F.normalize(self.seen(x), dim=2) for x in images.split(AT_ONCE)], 1))
        boxes = self.boxes_of(self.crops)
        boxes[0] = boxes.new_tensor([1, 0, 0])
        self.set_fitted("boxes", boxes)

    def terms(self, x: Tensor) -> Mapping[str, Tensor]:
        likeness, rotations = torch.zeros(2, len(x), device=x.device)
        upright = torch.ones(len(x), device=x.device)
        for box in self.boxes:
            f = self.seen(cropped(x, box.expand(len(x), 3), upright))  # (R,B,F)
            size = f.norm(dim=2)
            nearest = (f @ self.bank.mT).amax(2) / size.clamp_min(1e-12)  # cosines, (R,B)
            likeness -= (nearest * size**self.norm_power).sum(0) / self.crops
            told = self.rotation(f).log_softmax(2).diagonal(dim1=0, dim2=2)  # (B,R)
            rotations -= told.sum(1) / self.crops
        return {"likeness": likeness, "rotations": rotations}


def turned(x: Tensor) -> Tensor:
    """All rotations by quarter turns: (B,C,S,S) -> (R,B,C,S,S)."""
    return torch.stack([x.rot90(turn, (2, 3)) for turn in range(ROTATIONS)])


def cropped(x: Tensor, boxes: Tensor, mirrored: Tensor) -> Tensor:
    """A square of each image x (B,C,S,S), enlarged to its size; boxes (B,3), mirrored (B,): -1 for a flip, else 1."""
    side, right, down = boxes.T
    zero = torch.zeros_like(side)
    rows = (side * mirrored, zero, right), (zero, side, down)
    matrix = torch.stack([torch.stack(row, 1) for row in rows], 1)  # (B,2,3)
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)


def contrast(z: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """L_in and L_out of embeddings (M,E) of norm 1, ordered by rotation, then view, then image."""
    likeness = z @ z.T / temperature  # (M,M)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    log_p = likeness - likeness.masked_fill(itself, -torch.inf).logsumexp(1, keepdim=True)
    inliers = len(z) // ROTATIONS
    within = likeness[:inliers, :inliers]
    weights = within.detach().exp().mean(1).expand(inliers, inliers).masked_fill(itself[:inliers, :inliers], 0)
    weights = weights / weights.sum(1, keepdim=True)
    place = torch.arange(inliers, len(z), device=z.device)
    half = inliers // 2
    other = torch.where((place - inliers) % inliers < half, place + half, place - half)
    return -(weights * log_p[:inliers, :inliers]).sum(1).mean(), -log_p[place, other].mean()
