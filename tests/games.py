"""What tests of adversarial methods share: who moves in which play, and networks that are alive in eval mode."""

from __future__ import annotations

import functools

import torch
from test_methods import batch
from torch import Tensor, nn

from anomaly_lab.detector import Detector
from anomaly_lab.players import make_players, minimise


def settle(network: nn.Module, inputs: Tensor) -> None:
    """Let batch norm's running statistics be those of ``inputs``, so that no ReLU is dead in eval mode."""
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
    mode = network.training
    with torch.no_grad():
        network.train()(inputs)
    network.train(mode)
    for norm in norms:
        norm.momentum = 0.1


def prior(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moved(made: Detector) -> list[tuple[set[str], set[str]]]:
    """In each play of one step, who was said to move and which networks did."""
    players = make_players(made.players(), functools.partial(torch.optim.SGD, lr=0.1))
    plays = []
    for losses in made.plays(batch()):
        before = {name: p.detach().clone() for name, p in made.named_parameters()}
        minimise(losses, players)
        changed = {name.split(".")[0] for name, p in made.named_parameters() if not torch.equal(p, before[name])}
        plays.append((set(losses), changed))
    return plays
