"""The contract every method fits: plays, fit hooks, scoring, and checkpoints that load anywhere.

Legend of the shape comments: B images in a batch, C channels, H = W pixels, N images of a set.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from lightning import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from anomaly_lab import metrics, turns
from anomaly_lab.capture import Capture, place_step_counts
from anomaly_lab.errors import RunFailed

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]
SchedulerFactory = Callable[[Optimizer], LRScheduler]


EXPLOSION = 1e3
"""A loss that many times what it was in the first step (or above it, for losses below 1) is a divergence."""


class Batch(NamedTuple):
    """Images ready for a network, what they truly are, and where they stand in their data set.

    ``y`` is for reports only: no loss and no score may read it.
    """

    x: Tensor  # float32 (B,C,H,W)
    y: Tensor  # uint8 (B,): 0 normal, 1 anomalous
    index: Tensor  # type: ignore[assignment]  # int64 (B,); hides tuple.index, which nobody needs of a batch


class Stretch:
    """Some steps of an epoch, one after another: what Lightning calls a batch, so that its own work is done once.

    Args:
        positions: of each step, the places (B,) of its images among the training images, where those lie.
        batch: makes the prepared images at such places, on the device.
    """

    def __init__(self, positions: Sequence[Tensor], batch: Callable[[Tensor], Batch]) -> None:
        self.positions, self.batch = positions, batch  # no tuple: Lightning would look into it for what to move


class Diverged(RunFailed):
    """Training left the finite numbers, so there is no detector to score with."""


class ExactScores(Metric):
    """AUROC, average precision and FPR at 95 % TPR of raw, unbounded scores.

    torchmetrics' own binary metrics push whatever lies outside [0, 1] through a sigmoid, batch by batch, which ties
    large scores. This one gathers scores and truth and computes `anomaly_lab.metrics` once, in float64.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    score: list[Tensor]
    truth: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("score", [], dist_reduce_fx="cat")
        self.add_state("truth", [], dist_reduce_fx="cat")

    def update(self, score: Tensor, truth: Tensor) -> None:
        self.score.append(score.detach())
        self.truth.append(truth)

    def compute(self) -> dict[str, float]:
        score = dim_zero_cat(self.score).double().cpu().numpy()
        truth = dim_zero_cat(self.truth).cpu().numpy()
        return {
            "auroc": metrics.auroc(score, truth),
            "average_precision": metrics.average_precision(score, truth),
            "fpr95": metrics.fpr_at_tpr(score, truth),
        }


class Detector(LightningModule, ABC):
    """Base of every method. A subclass says which networks play, with which losses, and how an image is scored.

    A training step is a sequence of plays (`plays`): each yields the players that move at the same point and their
    losses, in the paper's order; code after a ``yield`` sees the moved networks. Losses are pure functions of
    networks and tensors (no ``.item()``, no branch on values), so the same code can be captured or stacked.

    Args:
        image_shape: (C,H,W) of the images the networks will see; given by the run, not by the yaml.
    """

    STAGES: ClassVar[tuple[str, ...]] = ()
    """Names of the stages of training, in order; empty for methods that train the same way throughout."""

    automatic_optimization = False  # every method: Lightning's own loop knows one loss a step
    epochs_done: Tensor
    steps_done: Tensor
    images_seen: Tensor

    def __init__(self, image_shape: Sequence[int]) -> None:
        super().__init__()
        self.image_shape = tuple(image_shape)
        self.history: list[dict[str, float]] = []
        """One row an epoch: epoch, the mean of every recorded loss, val_score, and oracle_auroc where asked for."""
        self.noise = torch.Generator()
        """All of a method's own noise; on the detector's device, its state travels in the checkpoint."""
        self._noise_state: Tensor | None = None  # a checkpoint's, until it is known on which device it continues
        self._optimizer: OptimizerFactory | Mapping[str, OptimizerFactory] = {}
        self._scheduler: SchedulerFactory | None = None
        self._clip: float | None = None
        self.step = 0
        """Training steps done, for what happens every so many steps; a plain number, so asking does not wait."""
        self.stages: Mapping[str, int] = {}
        """Epochs of each of the `STAGES`, as ``model.budget.stages`` gives them."""
        self.capture: Capture | None = None
        """Replays steps instead of computing them anew; None computes each (`anomaly_lab.capture`)."""
        self.seconds_per_step: float | None = None
        """Of the last epoch, as far as this process knows one."""
        self._fit_finished = False
        self._first_losses: dict[str, float] = {}
        self._owned: dict[str, list[nn.Parameter]] = {}  # what each optimiser moves: walking the networks takes time
        self._stretch: Stretch | None = None
        self._further: Iterator[Tensor] = iter(())  # of the present step
        self._further_of_epoch: Iterator[Tensor] = iter(())
        self._means: dict[str, tuple[Tensor, Tensor]] = {}  # sum and number, which stay where they are in memory
        self._first: dict[str, Tensor] = {}
        self._fitted: set[str] = set()
        self._evaluations: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._decisions: dict[str, list[Tensor]] = {}
        # Own counters: Lightning's global_step counts every optimiser's step.
        self.register_buffer("epochs_done", torch.zeros((), dtype=torch.long))
        self.register_buffer("steps_done", torch.zeros((), dtype=torch.long))
        self.register_buffer("images_seen", torch.zeros((), dtype=torch.long))
        self.test_metrics = ExactScores()

    # What a method says -----------------------------------------------------------------------------------------

    @abstractmethod
    def score(self, x: Tensor) -> Tensor:
        """Anomaly score of each image, higher is more anomalous; of that image alone, whatever else is in ``x``.

        Called in eval mode. x: float32 (B,C,H,W) -> float32 (B,), raw: neither scaled nor clipped.
        """

    def players(self) -> Mapping[str, Sequence[nn.Module]]:
        """The networks each optimiser owns; a network may belong to two. Empty for methods without gradients."""
        return {}

    def plays(self, batch: Batch) -> Iterator[Mapping[str, Tensor]]:
        """One training step: the losses of the players that move together, once for each move."""
        yield from ()

    def before_fit(self, images: Tensor) -> None:
        """Called once before the first epoch with the prepared training images (N,C,H,W), on the device.

        In eval mode and without gradients, as is `after_fit`; what either finds is kept with `set_fitted`.
        """

    def after_fit(self, images: Tensor) -> None:
        """Called once after the last epoch with the prepared training images (N,C,H,W), on the device.

        A method that has one is scored only then, and its epochs have no ``val_score``, unless it says otherwise with
        `scored_after_fit`.
        """

    def after_epoch(self, done: int) -> None:
        """Called after every epoch, ``done`` of them by then, before the checkpoint that holds what it finds.

        In eval mode and without gradients. The place for what happens between epochs, such as looking for training
        images to leave out (`training_set`, `set_fitted`, `train_indices`).
        """

    def steady(self) -> bool:
        """Whether the coming step does what the last one did, on other numbers, so that it may be replayed.

        To be denied where `plays` does something every so many steps, or looks at a value.
        """
        return True

    def after_step(self) -> None:
        """Called after every step, and never replayed: the place to look at values, which waits for the device."""

    def set_aside(self) -> Mapping[str, Tensor]:
        """Training images the method takes for anomalies: positions (n,) by the name of a round or a set.

        Asked once after fitting. The run records the sets and, since it knows the truth, how right they are.
        """
        return {}

    def train_indices(self, epoch: int) -> Tensor | None:
        """Positions (n,) among the training images that take part in the zero-based ``epoch``; None for all.

        Asked before every epoch, and again after a resume (also for the epoch after the last, which then does not
        come): it must follow from the detector's state alone.
        """
        return None

    def reconstruct(self, x: Tensor) -> Tensor | None:
        """The images the method believes it saw, (B,C,H,W), for figures; None where a method has no such thing."""
        return None

    def anomaly_map(self, x: Tensor) -> Tensor | None:
        """Where an image looks anomalous: (B,H,W), non-negative. By default the L1 error of the reconstruction."""
        reconstruction = self.reconstruct(x)
        return None if reconstruction is None else (x - reconstruction).abs().mean(1)

    def decide(self, x: Tensor) -> Tensor | None:
        """A paper's own decision rule: bool (B,). None: the run compares scores with a threshold from normals."""
        return None

    # What every method gets -------------------------------------------------------------------------------------

    @property
    def epoch(self) -> Tensor:
        """Number of the current epoch, counted from 1, as papers write schedules; a tensor, so losses stay pure."""
        return self.epochs_done + 1

    def optimise_with(
        self,
        optimizer: OptimizerFactory | Mapping[str, OptimizerFactory],
        scheduler: SchedulerFactory | None = None,
        clip: float | None = None,
    ) -> None:
        """How the players learn: ``model.optimizer``, ``model.scheduler`` and ``model.clip`` of the configuration.

        Args:
            optimizer: makes the optimiser of one player from its parameters; or a mapping, one factory a player.
            scheduler: makes the schedule of an optimiser's learning rate, stepped once an epoch; None keeps the rate.
            clip: largest L2 norm of one player's gradient; None does not clip.
        """
        self._optimizer, self._scheduler, self._clip = optimizer, scheduler, clip

    def plan(self, stages: Mapping[str, int]) -> None:
        """Divide training: the epochs of each of the `STAGES`, ``model.budget.stages``.

        Raises:
            ValueError: they are not those of the method.
        """
        if tuple(stages) != self.STAGES:
            if not self.STAGES:
                raise ValueError("model.budget.stages: this method has no stages, give model.budget.epochs or steps")
            raise ValueError(f"model.budget.stages of this method are {', '.join(self.STAGES)}, in this order")
        self.stages = stages

    def player_parameters(self, player: str) -> list[nn.Parameter]:
        """The parameters that ``player`` owns, each once."""
        return list(dict.fromkeys(p for network in self.players()[player] for p in network.parameters()))

    def configure_optimizers(self) -> Any:
        optimizers: list[Optimizer] = []
        self._owned.clear()
        for player in self.players():
            factory = self._optimizer
            if isinstance(factory, Mapping):
                if player not in factory:
                    raise ValueError(f"model.optimizer has no entry for the player {player}: give one for each player")
                factory = factory[player]
            self._owned[player] = self.player_parameters(player)
            optimizers.append(factory(self._owned[player]))
        if self._scheduler is None:
            return optimizers or None
        return optimizers, [self._scheduler(optimizer) for optimizer in optimizers]

    def training_step(self, stretch: Stretch, batch_idx: int) -> None:
        self._stretch = stretch
        for positions in stretch.positions:
            if self.capture is not None and self.steady():
                self.capture(self, positions, self._further_of_epoch)
            else:
                self.play(positions, self._further_of_epoch)
            self.after_step()
            self.step += 1
            turns.pass_on()

    def play(self, positions: Tensor, further: Iterator[Tensor]) -> None:
        """One step on the training images at ``positions`` (B,), `next_batch` on ``further`` ones: what is replayed."""
        self._further = further
        batch = self._batch(positions)
        for losses in self.plays(batch):
            self.minimise(losses)
            for player, loss in losses.items():
                self.record(f"loss_{player}", loss)
        self.steps_done += 1
        self.images_seen += len(batch.x)

    def _batch(self, positions: Tensor) -> Batch:
        assert self._stretch is not None
        return self._stretch.batch(positions)

    def minimise(self, losses: Mapping[str, Tensor]) -> None:
        """Move each player down the gradient of its own loss, with respect to its own parameters only.

        All gradients are taken before anyone moves, so the players of one mapping play simultaneously. Nothing is
        left behind on the others' parameters: a leftover gradient is what silently cancels the adversarial term of
        the published USAD loop.
        """
        gradients = {}
        for position, (player, loss) in enumerate(losses.items()):
            parameters = self._owned.get(player) or self.player_parameters(player)
            for parameter in parameters:
                parameter.grad = None
            loss.backward(inputs=parameters, retain_graph=position < len(losses) - 1)
            gradients[player] = [(parameter, parameter.grad) for parameter in parameters]
            for parameter in parameters:
                parameter.grad = None
            assert any(gradient is not None for _, gradient in gradients[player]), f"{player}'s loss never reaches it"
        optimizers = self._optimizers_by_player()
        for player, pairs in gradients.items():
            for parameter, gradient in pairs:
                parameter.grad = gradient
            if self._clip is not None:
                nn.utils.clip_grad_norm_([p for p, _ in pairs], self._clip)
            optimizers[player].step()
            for parameter, _ in pairs:
                parameter.grad = None

    def record(self, name: str, value: Tensor) -> None:
        """Add ``value`` (a scalar) to the epoch's mean of ``name``; read once an epoch, so the device never waits."""
        if name not in self._first_losses:
            self._first.setdefault(name, value.detach())
        if name not in self._means:
            self._means[name] = (torch.zeros((), device=value.device), torch.zeros((), device=value.device))
        total, count = self._means[name]
        total += value.detach().float()
        count += 1

    def next_batch(self) -> Batch:
        """A further training batch within the same step, for critics that move more often than the generator."""
        return self._batch(next(self._further))

    def training_set(self) -> Batch:
        """All prepared training images in their order, on the device; ``y`` is for reports here as well."""
        return self.trainer.datamodule.training_set(self.device)  # type: ignore[attr-defined]

    def stage_of(self, epoch: int) -> tuple[str, int]:
        """Name of the stage of the zero-based ``epoch``, and how many epochs of that stage come before it."""
        assert self.stages, f"{type(self).__name__} needs model.budget.stages"
        *earlier, last = self.stages
        for name in earlier:
            if epoch < self.stages[name]:
                return name, epoch
            epoch -= self.stages[name]
        return last, epoch  # past its end too: nothing comes behind it

    def epoch_means(self) -> dict[str, float]:
        """The means recorded so far in this epoch. Waits for the device."""
        return {name: (total / count).item() for name, (total, count) in self._means.items() if count}

    def set_fitted(self, name: str, value: Tensor) -> None:
        """Keep ``value`` as the buffer ``name``, whose size was not known before fitting; checkpoints restore it."""
        self._fitted.add(name)
        if name in self._buffers:
            self._buffers[name] = value
        else:
            self.register_buffer(name, value)

    def seed_noise(self, seed: int) -> None:
        """Start the generator that all of the method's noise comes from, on the detector's present device."""
        self.noise = torch.Generator(self.device).manual_seed(seed)

    def finish_fit(self, images: Callable[[], Tensor]) -> None:
        """`after_fit`, once: a run that is scored again after a resume is not fitted again.

        images: makes the prepared training images (N,C,H,W) on the device; not called where no method asks.
        """
        self._continue_noise()
        if not self._fit_finished and type(self).after_fit is not Detector.after_fit:
            self.eval()
            with torch.no_grad():
                self.after_fit(images())
        self._fit_finished = True

    @property
    def scored_after_fit(self) -> bool:
        """Whether ``score`` needs what `after_fit` finds, so that there is nothing to score before."""
        return type(self).after_fit is not Detector.after_fit

    def _continue_noise(self) -> None:
        if self.noise.device.type != self.device.type:
            self.seed_noise(self.noise.initial_seed())
        state, self._noise_state = self._noise_state, None
        # The streams of CPU and GPU differ: on another kind of device a resumed run starts its stream anew.
        if state is not None and state.shape == self.noise.get_state().shape:
            self.noise.set_state(state)

    def scores_of(self, dataset: str) -> tuple[Tensor, Tensor]:
        """Scores (N,) and indices (N,) of the last pass over ``dataset``, "val" or "test", on the CPU."""
        scores, indices = zip(*self._evaluations[dataset], strict=True)
        return torch.cat(scores).cpu(), torch.cat(indices).cpu()

    def decisions_of(self, dataset: str) -> Tensor | None:
        """Decisions (N,) of the last pass over ``dataset`` by the method's own rule, on the CPU; None without one."""
        return torch.cat(self._decisions[dataset]).cpu() if dataset in self._decisions else None

    # Lightning's hooks ------------------------------------------------------------------------------------------

    def _optimizers_by_player(self) -> dict[str, LightningOptimizer]:
        # Lightning's wrappers, because they count steps and let a precision plugin do its work.
        found = self.optimizers()
        listed = found if isinstance(found, list) else [found]
        return dict(zip(self.players(), listed, strict=True))

    def on_train_start(self) -> None:
        self._means.clear()
        self._first.clear()
        self.step = int(self.steps_done)
        self._continue_noise()
        capturable = self.capture is not None and self.device.type == "cuda"
        place_step_counts(self.trainer.optimizers, capturable=capturable)

    def on_train_epoch_end(self) -> None:
        turns.settle(self.device)  # before values are asked for, which would wait without letting others work
        row: dict[str, float] = {"epoch": int(self.epochs_done) + 1}
        row |= self.epoch_means()
        row["seconds"] = self._seconds
        for total, count in self._means.values():
            total.zero_()
            count.zero_()
        if "val" in self._evaluations:
            row["val_score"] = self.scores_of("val")[0].double().mean().item()
        if "test" in self._evaluations:
            finite = bool(self.scores_of("test")[0].isfinite().all())
            row["oracle_auroc"] = self.test_metrics.compute()["auroc"] if finite else math.nan
        self._refuse_divergence(row)
        schedulers = self.lr_schedulers()
        if schedulers is not None:
            for scheduler in schedulers if isinstance(schedulers, list) else [schedulers]:
                scheduler.step()  # type: ignore[call-arg]
        self.history.append(row)
        self.epochs_done += 1
        if type(self).after_epoch is not Detector.after_epoch:
            self.eval()
            with torch.no_grad():
                self.after_epoch(int(row["epoch"]))
            self.train()
        for logger in self.trainer.loggers:
            logger.log_metrics({k: v for k, v in row.items() if k != "epoch"}, step=int(row["epoch"]))

    def _refuse_divergence(self, row: Mapping[str, float]) -> None:
        """Raise where training left the finite numbers, or its losses where they began by orders of magnitude."""
        self._first_losses |= {name: value.item() for name, value in self._first.items()}
        self._first.clear()
        for name, value in row.items():
            if not math.isfinite(value):
                raise Diverged(f"training diverged: {name} is {value} at epoch {row['epoch']}; lower the learning rate")
            first = self._first_losses.get(name)
            if first is not None and name.startswith("loss_") and abs(value) > EXPLOSION * max(abs(first), 1.0):
                raise Diverged(
                    f"training diverged: {name} was {first:.3g} in the first step and is {value:.3g} on average in "
                    f"epoch {row['epoch']}; lower the learning rate"
                )

    def on_train_epoch_start(self) -> None:
        self._evaluations, self._decisions = {}, {}
        self._further_of_epoch = self.trainer.datamodule.further_positions()  # type: ignore[attr-defined]
        self._started, self._steps_before = time.perf_counter(), self.step

    def on_validation_epoch_start(self) -> None:
        turns.settle(self.device)
        self._seconds = time.perf_counter() - self._started  # of training alone: validation starts here
        self.seconds_per_step = self._seconds / max(self.step - self._steps_before, 1)
        self._evaluations, self._decisions = {}, {}
        self.test_metrics.reset()

    def on_test_epoch_start(self) -> None:
        self._evaluations, self._decisions = {}, {}
        self.test_metrics.reset()

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        # The first loader holds the held-out normals; in training the second is there on request only.
        if self.scored_after_fit and not self._fit_finished:
            return
        self._evaluate("val" if dataloader_idx == 0 else "test", batch)
        turns.pass_on()

    test_step = validation_step

    def _evaluate(self, dataset: str, batch: Batch) -> None:
        assert not self.training, "scores are taken in eval mode"
        with torch.autocast(self.device.type, enabled=False):  # half precision would tie scores that differ
            score, decided = self.score(batch.x).detach().float(), self.decide(batch.x)
        assert score.shape == batch.index.shape, f"score() returned {tuple(score.shape)} for {len(batch.x)} images"
        self._evaluations.setdefault(dataset, []).append((score, batch.index))
        if decided is not None:
            self._decisions.setdefault(dataset, []).append(decided)
        if dataset == "test":
            self.test_metrics.update(score, batch.y)

    def on_test_epoch_end(self) -> None:
        self.log_dict(self.test_metrics.compute())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Plain values and tensors only: checkpoints load under weights_only=True.
        checkpoint["anomaly_lab"] = {
            "history": self.history,
            "noise": self.noise.get_state(),
            "first_losses": self._first_losses,
            "fit_finished": self._fit_finished,
            "fitted": sorted(self._fitted),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        own = checkpoint["anomaly_lab"]
        self.history, self._fit_finished = own["history"], own["fit_finished"]
        self._first_losses = own["first_losses"]
        self._noise_state = own["noise"].cpu()
        for name in own["fitted"]:
            self.set_fitted(name, torch.empty_like(checkpoint["state_dict"][name], device=self.device))
