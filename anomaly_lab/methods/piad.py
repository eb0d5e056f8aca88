"""Perceptual image anomaly detection (Tuluptceva et al. 2019): two adversarial spaces and a perceptual reconstruction.

Legend of the shape comments: B images, C channels, S = image size, d = latent size, K×s×s pretrained features.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anomaly_lab.adversarial import gradient_penalty
from anomaly_lab.detector import Batch, Detector
from anomaly_lab.errors import refuse_fewer
from anomaly_lab.networks import LatentCritic, PerceptualFeatures, channel_statistics

SLOPE = 0.2
"""Of every leaky ReLU."""


class ResidualBlock(nn.Module):
    """x + conv(lrelu(conv(lrelu(x)))), pre-activated and without normalisation.

    The resampled pairs are computed as one convolution each (Karras et al. 2018, "fused"), of the same numbers at half
    the work: nearest neighbour and a 3×3 kernel are a transposed 4×4 kernel of stride 2, a 3×3 kernel and the mean of
    2×2 a 4×4 kernel of stride 2. The 1×1 convolution commutes with both and runs at the lower resolution.

    Args:
        resample: ``up``: nearest neighbour before the first convolution; ``down``: mean of 2×2 after the second.
    """

    def __init__(self, inputs: int, outputs: int, resample: Literal["up", "down"] | None = None) -> None:
        super().__init__()
        self.resample = resample
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B,K,H,W) -> (B,K',H,W), (B,K',2H,2W) or (B,K',H/2,W/2)"""
        residual = F.leaky_relu(x, SLOPE)
        if self.resample == "up":
            kernel = _four_shifts(self.conv1.weight.transpose(0, 1).flip(2, 3))
            residual = F.conv_transpose2d(residual, kernel, self.conv1.bias, stride=2, padding=1)
        else:
            residual = self.conv1(residual)
        residual = F.leaky_relu(residual, SLOPE)
        if self.resample == "down":
            kernel = _four_shifts(self.conv2.weight) / 4
            residual = F.conv2d(residual, kernel, self.conv2.bias, stride=2, padding=1)
            return self.skip(F.avg_pool2d(x, 2)) + residual
        shortcut = self.skip(x)
        return self.conv2(residual) + (F.interpolate(shortcut, scale_factor=2) if self.resample == "up" else shortcut)


def _four_shifts(kernel: Tensor) -> Tensor:
    """The sum of a 3×3 kernel at the four corners of a 4×4 one: (K',K,3,3) -> (K',K,4,4)."""
    padded = F.pad(kernel, (1, 1, 1, 1))
    rows = padded[..., 1:, :] + padded[..., :-1, :]
    return rows[..., 1:] + rows[..., :-1]


class MinibatchStd(nn.Module):
    """Append one channel, everywhere the mean over features of their standard deviation in the batch (Karras 2018)."""

    def forward(self, x: Tensor) -> Tensor:
        """(B,K,H,W) -> (B,K+1,H,W)"""
        std = (x.var(0, unbiased=False) + 1e-8).sqrt().mean()
        return torch.cat([x, std.expand(len(x), 1, *x.shape[2:])], 1)


class ResidualEncoder(nn.Sequential):
    """Residual blocks down to 4×4 pixels, then one convolution to a single position and a linear map to a code.

    Args:
        widths: channels at S, at S/2, ... and of the single position; the first counts twice, before and after the
            first block. minibatch_std: append it at 4×4 (`MinibatchStd`).
    """

    def __init__(self, channels: int, widths: Sequence[int], latent_size: int, *, minibatch_std: bool = False) -> None:
        first, *_ = widths
        blocks = [ResidualBlock(i, o, "down") for i, o in itertools.pairwise([first, *widths[:-1]])]
        super().__init__(
            nn.Conv2d(channels, first, 3, padding=1),
            *blocks,
            *([MinibatchStd()] if minibatch_std else []),
            nn.LeakyReLU(SLOPE),
            nn.Conv2d(widths[-2] + minibatch_std, widths[-1], 4),
            nn.LeakyReLU(SLOPE),
            nn.Conv2d(widths[-1], latent_size, 1),
            nn.Flatten(),
        )
        self.apply(init_residual)

    def forward(self, x: Tensor) -> Tensor:
        """(B,C,S,S) -> (B,d)"""
        return super().forward(x)


class ResidualGenerator(nn.Sequential):
    """From a code to 4×4 pixels, residual blocks up to S×S, one more, and a linear map to the image, not bounded.

    Args:
        widths: channels at 4×4, at 8×8, ... and at S.
    """

    def __init__(self, channels: int, widths: Sequence[int], latent_size: int) -> None:
        super().__init__(
            nn.Unflatten(1, (latent_size, 1, 1)),
            nn.ConvTranspose2d(latent_size, widths[0], 4),  # the reference's padded 4×4 convolution of one position
            *(ResidualBlock(i, o, "up") for i, o in itertools.pairwise(widths)),
            ResidualBlock(widths[-1], widths[-1]),
            nn.LeakyReLU(SLOPE),
            nn.Conv2d(widths[-1], channels, 1),
        )
        self.apply(init_residual)

    def forward(self, z: Tensor) -> Tensor:
        """(B,d) -> (B,C,S,S)"""
        return super().forward(z)


def init_residual(module: nn.Module) -> None:
    """He's normal initialisation for the leaky ReLU, by outgoing connections (He et al. 2015)."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, SLOPE, mode="fan_out")
    elif isinstance(module, nn.ConvTranspose2d):  # stored the other way round
        nn.init.kaiming_normal_(module.weight, SLOPE, mode="fan_in")


def levels(name: str, widths: Sequence[int], size: int) -> int:
    """How many widths images of S pixels take: one for each of S, S/2, ..., 8 and one more."""
    if size < 8 or size & (size - 1):
        raise ValueError(f"the encoder halves the image down to 4×4: give model.input.size 8, 16, 32, ..., not {size}")
    levels = int(math.log2(size)) - 1
    if len(widths) < levels:
        raise ValueError(f"model.detector.{name} has {len(widths)} widths: images of {size} pixels need {levels}")
    return levels


def scale_gradient(x: Tensor, factor: Tensor) -> Tensor:
    """``x`` itself, through which gradients come back multiplied by ``factor`` (a scalar)."""
    return x.detach() + factor * (x - x.detach())


class GradientBalance(nn.Module):
    """The weight gamma of one loss that gives a network gradients as large as those of another loss.

    A measurement takes the sizes of both gradients in every weight tensor. The last ``history`` measurements are
    smoothed, s_t = (1 - a) s_{t-1} + a size_t from s_0 = size_0, and gamma is the median of s_t(other) / s_t(own) over
    all tensors and all t: "over layers" in the paper, with their history in its code. Tensors that neither loss moves
    do not count. gamma = 1 before the first measurement.

    Args:
        tensors: L, how many are measured. history: T, measurements kept. smoothing: a, in (0, 1].
    """

    gamma: Tensor
    own: Tensor
    other: Tensor
    count: Tensor

    def __init__(self, tensors: int, *, history: int, smoothing: float) -> None:
        super().__init__()
        self.smoothing = smoothing
        self.register_buffer("gamma", torch.ones(()))
        self.register_buffer("own", torch.zeros(history, tensors))
        self.register_buffer("other", torch.zeros(history, tensors))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def update(self, own: Sequence[Tensor], other: Sequence[Tensor]) -> None:
        """A measurement: the gradients of both losses with respect to the L tensors, whose size is their spread."""
        count = int(self.count)  # waits for the device, as seldom as gradients are measured
        for kept, gradients in ((self.own, own), (self.other, other)):
            if count == len(kept):
                kept.copy_(kept.roll(-1, 0))
            kept[min(count, len(kept) - 1)] = torch.stack([g.std(unbiased=False) for g in gradients])
        count = min(count + 1, len(self.own))
        self.count.fill_(count)
        ratios = self._smoothed(self.other[:count]) / self._smoothed(self.own[:count])  # (t,L)
        self.gamma.copy_(ratios.flatten().nanquantile(0.5))

    def _smoothed(self, sizes: Tensor) -> Tensor:
        """The recursion of the class, written out: s_t = sum of w[t,i] size_i; (t,L) -> (t,L)."""
        t = torch.arange(len(sizes), device=sizes.device, dtype=sizes.dtype)
        w = self.smoothing * ((1 - self.smoothing) ** (t[:, None] - t).clamp(min=0)).tril()
        w[:, 0] = (1 - self.smoothing) ** t
        return w @ sizes


class RelativeL1(nn.Module):
    """A reconstruction judged by pretrained features f, normalised by channel.

        L_rec(x, y) = mean|f(x) - f(y)| / mean|f(x)|          relative-perceptual-L1

    *Where we differ from the authors' code* (github.com/ninatu/piad, adcb8fa): channel statistics of f come from the
    training images unless a file is given (theirs are of ImageNet, a file in their repository; the divisor that their
    code calls ``var`` is a standard deviation, as ours is); no standard deviation is taken below a tenth of the root
    mean square over channels, since narrow normals leave channels almost unmoved; the denominator of L_rec is at least
    0.001, against a division by zero (f has unit spread).
    """

    features: PerceptualFeatures | None
    feature_mean: Tensor
    feature_std: Tensor

    def use_features(self, image_shape: Sequence[int], features: PerceptualFeatures | None) -> None:
        """Judge images (C,S,S) by f, made after the networks, whose initial weights must not depend on it.

        Args:
            features: f; None for the image itself.
        """
        self.features = features
        if self.features is not None:
            self.features.refuse(image_shape)
        count = image_shape[0] if self.features is None else self.features.channels  # K
        self.register_buffer("feature_mean", torch.zeros(count, 1, 1))
        self.register_buffer("feature_std", torch.ones(count, 1, 1))

    def fit_features(self, images: Tensor) -> None:
        """Find the channel statistics, in training images (N,C,S,S) where no file has them."""
        statistics = None if self.features is None else self.features.given_statistics()
        mean, std = statistics or channel_statistics(self._plain_features(x) for x in images.split(256))
        self.feature_mean.copy_(mean.view(-1, 1, 1))
        self.feature_std.copy_(std.clamp(min=0.1 * std.square().mean().sqrt()).view(-1, 1, 1))

    def relative_l1(self, x: Tensor, y: Tensor) -> Tensor:
        """mean|f(x) - f(y)| / mean|f(x)| of each image, gradients through y alone: (B,C,S,S), (B,C,S,S) -> (B,)."""
        target, size = self._target(x)
        return (target - self._normalised_features(y)).abs().flatten(1).mean(1) / size

    def _target(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            target = self._normalised_features(x)  # (B,K,s,s)
            return target, target.abs().flatten(1).mean(1).clamp(min=1e-3)  # (B,)

    def _plain_features(self, x: Tensor) -> Tensor:
        return x if self.features is None else self.features(x)

    def _normalised_features(self, x: Tensor) -> Tensor:
        return (self._plain_features(x) - self.feature_mean) / self.feature_std


class PerceptualDetector(RelativeL1, Detector):
    """An encoder E and a generator G whose anomaly score is the `RelativeL1` of x and G(E(x)).

    A subclass makes ``encoder`` and ``generator``, then calls `use_features`.
    """

    encoder: nn.Module
    generator: nn.Module

    def before_fit(self, images: Tensor) -> None:
        self.fit_features(images)

    def score(self, x: Tensor) -> Tensor:
        return self.relative_l1(x, self.reconstruct(x))

    def reconstruct(self, x: Tensor) -> Tensor:
        return self.generator(self.encoder(x))

    def anomaly_map(self, x: Tensor) -> Tensor:
        """What the score is the mean of, before that: the error of the features, brought to S×S pixels."""
        target, size = self._target(x)
        error = (target - self._normalised_features(self.reconstruct(x))).abs().mean(1, keepdim=True)
        return F.interpolate(error / size.view(-1, 1, 1, 1), x.shape[-2:], mode="bilinear").squeeze(1)


class PIAD(PerceptualDetector):
    """Encoder E and generator G between images and N(0, I), a critic in each space, and a perceptual reconstruction.

    Tuluptceva, Bakker, Fedulova, Konushin, "Perceptual image anomaly detection", ACPR 2019 (arXiv 1909.05904). With f
    pretrained features, normalised by the mean and the standard deviation of each channel, D_x and D_z the critics of
    images and codes, z ~ N(0, I), GP the gradient penalty on a random mixture of both arguments, the losses are

        L_rec(x)   = mean|f(x) - f(G(E(x)))| / mean|f(x)|          relative-perceptual-L1, the anomaly score
        critics      D(fake) - D(real) + 10 GP + 0.001 (D(real)² + D(fake)²)    (x, G(z)) for D_x, (z, E(x)) for D_z
        E            gamma_E L_rec - D_z(E(x))
        G            gamma_G L_rec - D_x(G(z))

    A step is ``critic_rounds`` moves of the critics, each on fresh images and codes, then one of E and G on fresh ones.
    gamma_E and gamma_G are chosen by `GradientBalance`, just before the move of every ``gamma_every``-th step.

    Architecture, initialisation, order and constants are those of the authors' code (github.com/ninatu/piad, adcb8fa).
    *Where we differ:* in the features' normalisation, see `RelativeL1`.

    Args:
        encoder_widths, generator_widths, image_critic_widths: channels from one resolution to the next, see the
            networks; smaller images than 32 pixels use those nearest to the image. latent_critic_widths: hidden units.
        latent_size: d.
        critic_rounds: moves of the critics in a step.
        gradient_penalty, drift: weights of the critics' second and third term.
        gamma_every: steps between two choices of gamma. gamma_history, gamma_smoothing: see `GradientBalance`.
        features: makes f. None: f is the image itself, normalised likewise.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        *,
        encoder_widths: Sequence[int],
        generator_widths: Sequence[int],
        image_critic_widths: Sequence[int],
        latent_critic_widths: Sequence[int],
        latent_size: int,
        critic_rounds: int,
        gradient_penalty: float,
        drift: float,
        gamma_every: int,
        gamma_history: int,
        gamma_smoothing: float,
        features: Callable[[], PerceptualFeatures] | None,
    ) -> None:
        super().__init__(image_shape)
        refuse_fewer(1, critic_rounds=critic_rounds, gamma_every=gamma_every, gamma_history=gamma_history)
        if not 0 < gamma_smoothing <= 1:
            raise ValueError(f"model.detector.gamma_smoothing={gamma_smoothing}: give a number above 0, at most 1")
        channels, size, _ = image_shape
        e, g, c = (
            levels(name, widths, size)
            for name, widths in (
                ("encoder_widths", encoder_widths),
                ("generator_widths", generator_widths),
                ("image_critic_widths", image_critic_widths),
            )
        )
        self.latent_size, self.critic_rounds, self.gamma_every = latent_size, critic_rounds, gamma_every
        self.penalty, self.drift = gradient_penalty, drift
        self.encoder = ResidualEncoder(channels, encoder_widths[:e], latent_size)
        self.generator = ResidualGenerator(channels, generator_widths[-g:], latent_size)
        self.image_critic = ResidualEncoder(channels, image_critic_widths[:c], 1, minibatch_std=True)
        self.latent_critic = LatentCritic(latent_size, latent_critic_widths)
        for network in (self.encoder, self.generator, self.image_critic):
            network.to(memory_format=torch.channels_last)  # twice as fast on a CPU
        self.balance_encoder, self.balance_generator = (
            GradientBalance(len(_weights(network)), history=gamma_history, smoothing=gamma_smoothing)
            for network in (self.encoder, self.generator)
        )
        self.use_features(image_shape, features() if features is not None else None)

    def players(self) -> Mapping[str, Sequence[nn.Module]]:
        return {
            "image_critic": [self.image_critic],
            "latent_critic": [self.latent_critic],
            "encoder_generator": [self.encoder, self.generator],
        }

    def plays(self, batch: Batch) -> Iterator[Mapping[str, Tensor]]:
        for _ in range(self.critic_rounds):
            x = self.next_batch().x
            z = self.sample(x)
            with torch.no_grad():
                fake_x, fake_z = self.generator(z), self.encoder(x)
            yield {
                "image_critic": self.loss_critic(self.image_critic, x, fake_x),
                "latent_critic": self.loss_critic(self.latent_critic, z, fake_z),
            }
        x, z = batch.x, self.sample(batch.x)
        if not self.steady():
            self.choose_gammas(x, z)
        gamma_e, gamma_g = self.balance_encoder.gamma, self.balance_generator.gamma
        # One backward pass for both: L_rec times gamma_G reaches G, and on the way to E is brought to gamma_E. The
        # weights are in the gradients alone, so that the values of two epochs can be compared.
        rec, adversarial_z, adversarial_x = self.loss_terms(x, z, gamma_e / gamma_g)
        self.record("loss_reconstruction", rec)
        self.record("log10_gamma_encoder", gamma_e.log10())
        self.record("log10_gamma_generator", gamma_g.log10())
        yield {"encoder_generator": scale_gradient(rec, gamma_g) + adversarial_z + adversarial_x}

    def steady(self) -> bool:
        return (self.step + 1) % self.gamma_every != 0

    def sample(self, x: Tensor) -> Tensor:
        """As many codes from the prior N(0, I) as there are images: (B,C,S,S) -> (B,d)."""
        return torch.randn(len(x), self.latent_size, generator=self.noise, device=x.device, dtype=x.dtype)

    def loss_critic(self, critic: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
        """WGAN-GP with drift on real and fake images or codes (B,...), a scalar."""
        share = torch.rand(len(real), generator=self.noise, device=real.device, dtype=real.dtype)
        share = share.view(-1, *[1] * (real.ndim - 1))
        on_real, on_fake = critic(real), critic(fake)  # (B,1)
        penalty = gradient_penalty(critic, share * real + (1 - share) * fake)
        drift = on_real.square().mean() + on_fake.square().mean()
        return on_fake.mean() - on_real.mean() + self.penalty * penalty + self.drift * drift

    def loss_terms(self, x: Tensor, z: Tensor, factor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """L_rec, -D_z(E(x)) and -D_x(G(z)), scalars; the gradient of L_rec reaches E multiplied by ``factor``."""
        code = self.encoder(x)  # (B,d)
        rec = self.relative_l1(x, self.generator(scale_gradient(code, factor))).mean()
        return rec, -self.latent_critic(code).mean(), -self.image_critic(self.generator(z)).mean()

    def choose_gammas(self, x: Tensor, z: Tensor) -> None:
        """Measure the gradients of L_rec and of the adversarial losses of E and G on images and codes of one step."""
        rec, adversarial_z, adversarial_x = self.loss_terms(x, z, torch.ones_like(self.balance_encoder.gamma))
        e, g = _weights(self.encoder), _weights(self.generator)
        own = torch.autograd.grad(rec, e + g, retain_graph=True)
        other = torch.autograd.grad(adversarial_z + adversarial_x, e + g)  # one reaches E alone, the other G alone
        self.balance_encoder.update(own[: len(e)], other[: len(e)])
        self.balance_generator.update(own[len(e) :], other[len(e) :])


def _weights(network: nn.Module) -> list[nn.Parameter]:
    """The weight tensors of a network, without the biases."""
    return [parameter for name, parameter in network.named_parameters() if name.endswith("weight")]
