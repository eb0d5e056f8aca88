"""Players: the networks that one optimiser moves, and their move.

A training step of an adversarial method is a game: each player descends the gradient of its own loss with respect to
its own parameters (`minimise`). `Learning` gives each player its optimiser and schedule.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]
SchedulerFactory = Callable[[Optimizer], LRScheduler]


class Player(NamedTuple):
    """What one optimiser moves."""

    parameters: list[nn.Parameter]
    optimizer: Optimizer | LightningOptimizer


def parameters_of(networks: Sequence[nn.Module]) -> list[nn.Parameter]:
    """The parameters of a player's networks, each once, frozen ones included."""
    return list(dict.fromkeys(parameter for network in networks for parameter in network.parameters()))


def warn_of_unowned(detector: nn.Module, players: Mapping[str, Sequence[nn.Module]]) -> None:
    """Say that a detector has players and, beside theirs, parameters that nobody will ever move."""
    owned = {id(parameter) for networks in players.values() for parameter in parameters_of(networks)}
    free = [name for name, p in detector.named_parameters() if p.requires_grad and id(p) not in owned]
    if players and free:
        warnings.warn(
            f"{free[0]} belongs to no player, so it never learns: give its network to a player in players(), or "
            "networks.freeze() it",
            stacklevel=2,
        )


def with_optimizers(players: Mapping[str, Sequence[nn.Module]], optimizers: Any) -> dict[str, Player]:
    """Each player's networks with its optimiser, in the players' order; Lightning gives a single one without a list."""
    found = optimizers if isinstance(optimizers, list) else [optimizers]
    named = zip(players.items(), found, strict=True)
    return {name: Player(parameters_of(networks), optimizer) for (name, networks), optimizer in named}


def make_players(players: Mapping[str, Sequence[nn.Module]], factory: OptimizerFactory) -> dict[str, Player]:
    """Each player's networks with an optimiser of its own, for `minimise` without a trainer."""
    owned = {name: parameters_of(networks) for name, networks in players.items()}
    return {name: Player(parameters, factory(parameters)) for name, parameters in owned.items()}


def minimise(losses: Mapping[str, Tensor], players: Mapping[str, Player], clip: float | None = None) -> None:
    """Move each player down the gradient of its own loss, with respect to its own parameters only.

    All gradients are computed before the first move, so the players of one mapping move simultaneously. Afterwards
    every ``grad`` is None: a leftover gradient silently cancels the adversarial term of the published USAD loop.
    Parameters with ``requires_grad=False`` do not move.

    Args:
        losses: scalars by player. clip: largest L2 norm of one player's gradient; None does not clip.
    """
    assert isinstance(losses, Mapping), "plays() yields {player: loss} for each move: write yield where it returns one"
    assert losses.keys() <= players.keys(), (
        f"plays() moves {', '.join(losses.keys() - players.keys())}; players() names {', '.join(players) or 'none'}"
    )
    gradients: dict[str, list[tuple[nn.Parameter, Tensor | None]]] = {}
    for position, (name, loss) in enumerate(losses.items()):
        parameters = [parameter for parameter in players[name].parameters if parameter.requires_grad]
        assert parameters, f"every parameter of the player {name} is frozen, so it has no move"
        for parameter in parameters:
            parameter.grad = None
        loss.backward(inputs=parameters, retain_graph=position < len(losses) - 1)
        gradients[name] = [(parameter, parameter.grad) for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        assert any(gradient is not None for _, gradient in gradients[name]), f"{name}'s loss never reaches it"
    for name, pairs in gradients.items():
        for parameter, gradient in pairs:
            parameter.grad = gradient
        if clip is not None:
            nn.utils.clip_grad_norm_([parameter for parameter, _ in pairs], clip)
        players[name].optimizer.step()
        for parameter, _ in pairs:
            parameter.grad = None


class Learning:
    """How players learn: ``model.optimizer``, ``model.scheduler`` and ``model.clip`` of a configuration.

    Args:
        optimizer: makes the optimiser of a player from its parameters; or a mapping, one factory a player.
        scheduler: makes the schedule of an optimiser's learning rate; or a mapping with one, or None, a player. A
            schedule counts the epochs of those stages in which its player moves: each stage has its own milestones.
        clip: see `minimise`.
    """

    def __init__(
        self,
        optimizer: OptimizerFactory | Mapping[str, OptimizerFactory] | None = None,
        scheduler: SchedulerFactory | Mapping[str, SchedulerFactory | None] | None = None,
        clip: float | None = None,
    ) -> None:
        self._optimizer, self._scheduler, self.clip = optimizer or {}, scheduler, clip

    def configure(self, players: Mapping[str, Sequence[nn.Module]], detector: nn.Module) -> Any:
        """What Lightning's ``configure_optimizers`` returns: one optimiser a player, in the players' order.

        Args:
            detector: whose players they are; a warning says which of its parameters belong to none.

        Raises:
            ValueError: a player has no optimiser, or the optimiser or the schedule cannot be made.
        """
        warn_of_unowned(detector, players)
        optimizers = []
        for name, networks in players.items():
            factory = self._optimizer.get(name) if isinstance(self._optimizer, Mapping) else self._optimizer
            if factory is None:
                raise ValueError(f"model.optimizer has no entry for the player {name}: give one for each player")
            try:
                optimizers.append(factory(parameters_of(networks)))
            except TypeError as error:  # a text for a number, or a key that it does not have
                raise ValueError(
                    f"model.optimizer makes no optimiser ({error}): anomaly-lab --cfg job shows it"
                ) from error
        pairs = zip(players, optimizers, strict=True)
        try:
            made = [make(optimizer) for name, optimizer in pairs if (make := self._schedule_of(name)) is not None]
        except TypeError as error:
            raise ValueError(f"model.scheduler makes no schedule ({error}): anomaly-lab --cfg job shows it") from error
        return (optimizers, made) if made else optimizers

    def _schedule_of(self, player: str) -> SchedulerFactory | None:
        return self._scheduler.get(player) if isinstance(self._scheduler, Mapping) else self._scheduler


def step_schedules(schedules: Any, players: Mapping[str, Player], moved: Collection[str]) -> None:
    """Step the schedules of the players that ``moved`` in this stage by one epoch."""
    moving = {id(getattr(players[name].optimizer, "optimizer", players[name].optimizer)) for name in moved}
    for schedule in schedules if isinstance(schedules, list) else [schedules] if schedules else []:
        if id(schedule.optimizer) in moving:
            schedule.step()
