"""Puzzle-AE: a U-Net puts the tiles of a normal image in order, and fails at others (Salehi et al. 2020).

Legend of the shape comments: B images, C channels, S = image size, w = width, P = permutations.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anomaly_lab.detector import Batch, Detector
from anomaly_lab.networks import DCGANDiscriminator

ORDERS = torch.tensor(list(itertools.permutations(range(4))))  # (24,4); the first leaves all tiles where they are


def _twice(a: int, b: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(a, b, 3, 1, 1), nn.ReLU(), nn.Conv2d(b, b, 3, 1, 1), nn.ReLU())


class UNet(nn.Module):
    """Ronneberger et al. 2015 without batch norm: four halvings, fewer of small images: (B,C,S,S), same shape."""

    def __init__(self, channels: int, size: int, width: int) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(min(5, size.bit_length() - 1))]
        self.down = nn.ModuleList(_twice(a, b) for a, b in itertools.pairwise([channels, *widths]))
        upwards = list(itertools.pairwise(reversed(widths)))
        self.enlarge = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, 2) for a, b in upwards)
        self.up = nn.ModuleList(_twice(a, b) for a, b in upwards)  # of what was enlarged and what is passed across
        self.out = nn.Conv2d(width, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        across: list[Tensor] = []
        for level, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if level else x)
            across.append(x)
        across.pop()
        for enlarge, block in zip(self.enlarge, self.up, strict=True):
            x = block(torch.cat([enlarge(x), across.pop()], 1))
        y: Tensor = self.out(x)
        return y


class PuzzleAutoencoder(Detector):
    """A U-Net U that sees an image cut in 2×2 tiles, in another order and attacked, and must give back the image.

    Salehi et al., "Puzzle-AE: novelty detection in images through solving puzzles", 2020 (arXiv 2008.12959), in the
    order of the authors' code (Niousha12/Puzzle_Anomaly_Detection@e08befb). In every step

        1. each image's tiles are put in an order drawn for it, and with probability ``blank`` one tile is emptied: p
        2. p is attacked once: d from U(-eps, eps), moved by 2 eps along the sign of the gradient of |x - U(p + d)|^2,
           kept within eps of p and within the images' range
        3. U moves on   |x - x^|_2^2 + adversarial_weight |f(x) - f(x^)|_2^2,   x^ = U(p + d), means over all elements
        4. the critic with features f moves on  BCE(D(x), 1) + BCE(D(x^), 0), on x^ from before U's move

    The anomaly score is the mean, over orders other than the true one, of the error after that order divided by its
    mean over the training images: some orders are harder than others.

    *Where we differ from the authors' code:* its divisors come from 851 held-out normals drawn anew at the test, most
    of which had trained; ours from the training images. Images are padded to 32 pixels, for the critic; the learning
    rate stays, where theirs falls at plateaus; U enlarges by transposed convolutions (theirs bilinearly, with half of
    the channels at the lowest level). They empty the same tile of every image in a batch, of colour into its grey mean,
    and draw one order other than the true one for all of them. Their attack raises the error against the attacked
    puzzle itself and can reach 2 eps. Their critic's loss is half of this one, a factor that Adam divides out.

    Args:
        width: w, channels of U's first level. critic_width: of the critic. blank: probability. eps: radius of the
            attack, in image values; not rescaled with ``low`` and ``high``. orders: how many orders a score is the mean
            of, at most 23.
    """

    table: Tensor  # int64 (24,4): `ORDERS`
    cost: Tensor  # (P,): mean error of the training images after each order of `chosen`

    def __init__(
        self,
        image_shape: Sequence[int],
        *,
        width: int,
        critic_width: int,
        blank: float,
        eps: float,
        low: float,
        high: float,
        adversarial_weight: float,
        orders: int,
    ) -> None:
        super().__init__(image_shape)
        if not 1 <= orders <= 23:
            raise ValueError(f"orders={orders}: four tiles have 1 to 23 orders that are not the true one")
        channels, size, _ = image_shape
        self.blank, self.eps, self.low, self.high = blank, eps, low, high
        self.adversarial_weight = adversarial_weight
        self.unet = UNet(channels, size, width)
        self.critic = DCGANDiscriminator(channels, size, critic_width)
        self.register_buffer("table", ORDERS.clone(), persistent=False)
        self.chosen = [1 + (23 * place) // orders for place in range(orders)]  # spread over all, without the true one
        self.register_buffer("cost", torch.ones(orders))

    def players(self) -> Mapping[str, Sequence[nn.Module]]:
        return {"unet": [self.unet], "critic": [self.critic]}

    def plays(self, batch: Batch) -> Iterator[Mapping[str, Tensor]]:
        x = batch.x
        puzzle = self.puzzle(x)
        rebuilt = self.unet(self.attacked(puzzle, x))
        features, fake_features = (self.critic(image)[1] for image in (x, rebuilt))
        error = F.mse_loss(rebuilt, x)
        yield {"unet": error + self.adversarial_weight * F.mse_loss(fake_features, features)}
        self.record("loss_error", error)
        real, fake = self.critic(x)[0], self.critic(rebuilt.detach())[0]
        yield {"critic": F.softplus(-real).mean() + F.softplus(fake).mean()}

    def puzzle(self, x: Tensor) -> Tensor:
        """Step 1 of every image in ``x`` (B,C,S,S)."""
        b = len(x)
        drawn = torch.randint(len(self.table), (b,), generator=self.noise, device=x.device)
        tile = torch.randint(4, (b,), generator=self.noise, device=x.device)
        empty = torch.rand(b, generator=self.noise, device=x.device) < self.blank
        keep = ~((tile[:, None] == torch.arange(4, device=x.device)) & empty[:, None])  # (B,4)
        return joined(
            tiles(x)[torch.arange(b, device=x.device)[:, None], self.table[drawn]] * keep[..., None, None, None]
        )

    def attacked(self, puzzle: Tensor, x: Tensor) -> Tensor:
        """Step 2: (B,C,S,S), (B,C,S,S) -> (B,C,S,S)"""
        uniform = torch.rand(x.shape, generator=self.noise, device=x.device, dtype=x.dtype)
        d = (self.eps * (2 * uniform - 1)).requires_grad_()
        (gradient,) = torch.autograd.grad(F.mse_loss(self.unet(puzzle + d), x), d)
        d = (d.detach() + 2 * self.eps * gradient.sign()).clamp(-self.eps, self.eps)
        return (puzzle + d).clamp(self.low, self.high)

    def errors(self, x: Tensor) -> Tensor:
        """Mean squared error after each chosen order: (B,C,S,S) -> (B,P)."""
        found = [self.unet(joined(tiles(x)[:, self.table[order]])) for order in self.chosen]
        return torch.stack([(rebuilt - x).square().mean((1, 2, 3)) for rebuilt in found], 1)

    @property
    def scored_after_fit(self) -> bool:
        return True

    def after_fit(self, images: Tensor) -> None:
        self.cost.copy_(torch.cat([self.errors(x) for x in images.split(500)]).mean(0))

    def score(self, x: Tensor) -> Tensor:
        return (self.errors(x) / self.cost).mean(1)

    def reconstruct(self, x: Tensor) -> Tensor:
        return self.unet(joined(tiles(x)[:, self.table[-1]]))  # after the order in reverse


def tiles(x: Tensor) -> Tensor:
    """The four quarters of images, row by row: (B,C,S,S) -> (B,4,C,S/2,S/2)."""
    b, c, s, t = x.shape
    cut = x.view(b, c, 2, s // 2, 2, t // 2).permute(0, 2, 4, 1, 3, 5)
    return cut.reshape(b, 4, c, s // 2, t // 2)


def joined(parts: Tensor) -> Tensor:
    """`tiles` undone: (B,4,C,S/2,S/2) -> (B,C,S,S)."""
    b, _, c, h, w = parts.shape
    return parts.view(b, 2, 2, c, h, w).permute(0, 3, 1, 4, 2, 5).reshape(b, c, 2 * h, 2 * w)
