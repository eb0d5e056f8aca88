"""What several adversarial methods share: binary cross-entropy, the Wasserstein loss with gradient penalty."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor


def bce(logit: Tensor, label: float) -> Tensor:
    """Mean binary cross-entropy of logits with one label for all of them, 1 for real and 0 for fake: a scalar."""
    return F.binary_cross_entropy_with_logits(logit, torch.full_like(logit, label))


def gradient_penalty(critic: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """(|dD/dx| - 1)² of each image or code, its mean, a scalar (Gulrajani et al. 2017); x: (B,...)."""
    x = x.detach().requires_grad_()
    with torch.autocast(x.device.type, enabled=False):  # second derivatives in half precision are noise
        (gradient,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return (gradient.flatten(1).norm(dim=1) - 1).square().mean()


def wgan_gp(critic: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, penalty: float, noise: Generator) -> Tensor:
    """The critic's loss D(fake) - D(real) + penalty GP, GP on a random mixture of both: (B,...), (B,...) -> scalar."""
    share = torch.rand(len(real), generator=noise, device=real.device, dtype=real.dtype)
    share = share.view(-1, *[1] * (real.ndim - 1))
    mixed = share * real + (1 - share) * fake
    return critic(fake).mean() - critic(real).mean() + penalty * gradient_penalty(critic, mixed)
