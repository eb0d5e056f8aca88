"""What tests of a loss written out with plain torch share: values alone would not see a term that is detached."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def assert_alike(found: Tensor, expected: Tensor, *networks: nn.Module) -> None:
    """Two losses of one value and one gradient: a term that is detached by mistake has the right value. In float64."""
    torch.testing.assert_close(found, expected)
    for network in networks:
        weights = list(network.parameters())
        one, other = (
            torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights, retain_graph=True)])
            for loss in (found, expected)
        )
        assert one.dtype == torch.float64 and other.norm() > 0
        assert (one - other).norm() <= 1e-6 * other.norm(), "another gradient"
