"""The contract every method fits: plays, fit hooks, scoring, and checkpoints that load anywhere.

Legend of the shape comments: B images in a batch, C channels, H = W pixels, N images of a set.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any, ClassVar, Literal, NamedTuple, get_args, get_origin, get_type_hints

import torch
from lightning import LightningModule
from torch import Tensor, nn

from anomaly_lab import turns
from anomaly_lab.batches import Batch, PlainLoader, TrainingImages, images_of
from anomaly_lab.course import Course, Passes, Stages
from anomaly_lab.players import Learning, Player, minimise, step_schedules, with_optimizers
from anomaly_lab.randomness import Randomness

__all__ = ["Batch", "Contract", "Detector"]


class Contract:
    """What a method says: which networks play, with which losses, and how an image is scored.

    A training step is a sequence of plays (`plays`): each yields the players that move at the same point and their
    losses, in the paper's order; code after a ``yield`` sees the moved networks. Losses are pure functions of
    networks and tensors (no ``.item()``, no branch on values), so the same code can be captured or stacked.
    """

    STAGES: ClassVar[tuple[str, ...]] = ()
    """Names of the stages of training, in order; empty for methods that train the same way throughout."""

    SEMI_SUPERVISED: ClassVar[bool] = False
    """Whether the method learns from known anomalies: those of ``split.known`` are then among its training images,
    marked in `Batch.known`. Where it is False, no method gets any, and a split that has some is refused."""

    def score(self, x: Tensor) -> Tensor:
        """Anomaly score of each image, higher is more anomalous; independent of the other images in ``x``.

        Called in eval mode. x: float32 (B,C,H,W) -> float32 (B,), raw: neither scaled nor clipped.
        """
        return self.combine(self.terms(x))

    def terms(self, x: Tensor) -> Mapping[str, Tensor]:
        """The terms (B,) of a score that combines several, by name; with `combine` in place of `score`.

        A run keeps every term of every image, and its AUROC, so another weight costs no training.
        """
        return {}

    def combine(self, terms: Mapping[str, Tensor]) -> Tensor:
        """The score (B,) of images from their `terms`."""
        raise NotImplementedError(f"{type(self).__name__} needs score(x), or terms(x) and combine(terms)")

    def players(self) -> Mapping[str, Sequence[nn.Module]]:
        """The networks each optimiser owns; a network may belong to two. Empty for methods without gradients."""
        return {}

    def plays(self, batch: Batch) -> Iterator[Mapping[str, Tensor]]:
        """One training step: the losses of the players that move together, once for each move."""
        yield from ()

    def before_fit(self, images: Tensor) -> None:
        """Called once before the first epoch with the prepared training images (N,C,H,W), on the device.

        In eval mode and without gradients, as all hooks are; what a hook finds is kept with `set_fitted`.
        """

    def before_stage(self, stage: str) -> None:
        """Called before the first epoch of each of the `STAGES`, and before `before_epoch`."""

    def before_epoch(self, epoch: int) -> None:
        """Called before every epoch, counted from 1: the place to look for training images to leave out."""

    def train_indices(self, epoch: int) -> Tensor | None:
        """Positions (n,) among the training images that take part in an epoch, counted from 1; None for all."""
        return None

    def steady(self) -> bool:
        """Whether the coming step repeats the last one on other numbers, so that it may be replayed.

        Return False for steps that take another path through `plays` or read a value on the host.
        """
        return True

    def after_step(self) -> None:
        """Called after every step, eager or replayed: the place to read values, for it is never replayed itself."""

    def after_fit(self, images: Tensor) -> None:
        """Called once after the last epoch with the prepared training images (N,C,H,W), on the device.

        A method that has one is scored only then, and its epochs have no ``val_score``, unless it says otherwise with
        `scored_after_fit`.
        """

    def rejected_images(self) -> Mapping[str, Tensor]:
        """Training images the method takes for anomalies: positions (n,) by the name of a round or a set.

        Asked once after fitting. The run records the sets and, since it knows the truth, how right they are.
        """
        return {}

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

    def has(self, hook: str) -> bool:
        """Whether the method has a hook of that name of its own."""
        return getattr(type(self), hook) is not getattr(Contract, hook)

    @property
    def scored_after_fit(self) -> bool:
        """Whether nothing is scored before the fit ends: ``score`` needs what `after_fit` finds, or is itself a search
        that takes longer than an epoch does. Epochs then have no ``val_score``, and `oracle_auroc` is not recorded."""
        return self.has("after_fit")


class Detector(Contract, LightningModule):
    """Base of every method: what it has beside its `Contract`, and what Lightning calls.

    Args:
        image_shape: (C,H,W) of the images the networks will see; given by the run, not by the yaml.
    """

    _given: dict[str, Any]
    automatic_optimization = False  # every method: Lightning's own loop knows one loss a step
    epochs_done: Tensor
    steps_done: Tensor
    images_seen: Tensor

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        made = super().__new__(cls)
        object.__setattr__(made, "_given", _arguments(cls, args, kwargs))
        return made

    def __init__(self, image_shape: Sequence[int]) -> None:
        super().__init__()
        # For load_from_checkpoint; arguments that are no plain values must be given to it.
        self.save_hyperparameters({k: v for k, v in self._given.items() if _plain(v)}, logger=False)
        self.image_shape = tuple(image_shape)
        self.course, self.stages, self.randomness = Course(), Stages(self.STAGES), Randomness()
        self.scored, self.fitted_names = Passes(), set[str]()  # of what `set_fitted` keeps
        self.step = 0  # training steps done, a plain number: reading it does not synchronise with the device
        self.replay: Callable[[Detector, Tensor, Iterator[Tensor]], None] | None = None
        """Does what `play` does without computing it anew (`anomaly_lab.cuda_graphs`); None plays every step."""
        self.learning = Learning()  # optimisers, schedules, clip
        self._players, self._moved = dict[str, Player](), set[str]()
        self._begun = self._finished = False  # whether before_fit, after_fit have been called
        self._images: TrainingImages | None = None
        self._further: Iterator[Tensor] = iter(())  # places of further batches of this step
        self._further_of_epoch: Iterator[Tensor] = iter(())
        # Own counters: Lightning's global_step counts every optimiser's step.
        for name in ("epochs_done", "steps_done", "images_seen"):
            self.register_buffer(name, torch.zeros((), dtype=torch.long))

    # What a method has ------------------------------------------------------------------------------------------

    @property
    def epoch(self) -> Tensor:
        """Number of the current epoch, counted from 1, as papers write schedules; a tensor, so losses stay pure."""
        return self.epochs_done + 1

    @property
    def stage(self) -> str:
        """Name of the present stage; empty without stages."""
        return self.stages.stage

    @property
    def noise(self) -> torch.Generator:
        """All of a method's own noise comes from here; its state travels in the checkpoint."""
        return self.randomness.noise

    @property
    def training_images(self) -> TrainingImages:
        """The training images while a trainer fits; ``everything()`` has them all at once."""
        assert self._images is not None, "there are training images while a trainer fits"
        return self._images

    def record(self, name: str, value: Tensor) -> None:
        """Add ``value`` (a scalar) to the epoch's mean of ``name`` in the history."""
        self.course.record(name, value)

    def next_batch(self) -> Batch:
        """A further training batch within the same step, for critics that move more often than the generator."""
        return self.training_images.batch(next(self._further))

    def set_fitted(self, name: str, value: Tensor) -> None:
        """Keep ``value`` as the buffer ``name``, of a size unknown before fitting; checkpoints restore it."""
        self.fitted_names.add(name)
        self.register_buffer(name, value)

    def plan(self, stages: Mapping[str, int]) -> None:
        """Divide training among the `STAGES`: `Stages.plan`."""
        self.stages.plan(stages)

    # What Lightning calls, in its order -------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        return self.learning.configure(self.players(), self)

    def on_fit_start(self) -> None:
        self.randomness.settle(self.device)
        self._players = with_optimizers(self.players(), self.optimizers())
        self.trainer.fit_loop.setup_data()  # Lightning itself calls it after this hook
        loader: Any = self.trainer.train_dataloader
        if not isinstance(loader, TrainingImages):
            loader = PlainLoader(loader, self.device, leaving_out=self.has("train_indices"))
        self._images = loader
        if self.trainer.ckpt_path is None:  # a fit of its own, maybe of other images, and not the rest of one
            self._begun = self._finished = False
        if not self._begun and self.has("before_fit"):
            with looking(self):
                self.before_fit(self._images.everything().x)
        self._begun = True
        if self.trainer.max_epochs == 0:
            self._finish()

    def on_train_start(self) -> None:
        self.course.begin()
        self.step, self._finished = int(self.steps_done), False

    def on_train_epoch_start(self) -> None:
        epoch = int(self.epochs_done) + 1
        with looking(self):
            if self.stages.enter(epoch):
                self._moved.clear()
                self.before_stage(self.stage)
            self.before_epoch(epoch)
        self.training_images.begin(epoch, self.train_indices(epoch), self.course.seconds_per_step)
        self._further_of_epoch = self.training_images.further()
        self.randomness.begin_epoch(epoch)
        self.scored.reset()
        self.course.begin_epoch(self.step)

    def training_step(self, item: Any, batch_idx: int) -> None:
        for positions in self.training_images.steps(item):
            if self.replay is not None and self.steady():
                self.replay(self, positions, self._further_of_epoch)
            else:
                self.play(positions, self._further_of_epoch)
            turns.after_step(self)
            self.step += 1

    def play(self, positions: Tensor, further: Iterator[Tensor]) -> None:
        """One step on the training images at ``positions`` (B,), `next_batch` on ``further`` ones: what is replayed."""
        self._further = further
        batch = self.training_images.batch(positions)
        for losses in self.plays(batch):
            minimise(losses, self._players, self.learning.clip)
            self._moved.update(losses)
            for player, loss in losses.items():
                self.record(f"loss_{player}", loss)
        self.steps_done += 1
        self.images_seen += len(batch.x)

    def on_validation_epoch_start(self) -> None:
        if not self.trainer.sanity_checking:
            self.course.stop_clock(self.step)
            self.scored.reset()

    @property
    def scorable(self) -> bool:
        """Whether a score means anything yet."""
        return self._finished or not self.scored_after_fit

    def validation_step(self, item: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        if not self.trainer.sanity_checking and self.scorable:
            self.scored.add(item, "val", partial(scores, self))

    def on_validation_epoch_end(self) -> None:
        if self.scored.val.seen:  # for callbacks such as EarlyStopping; loggers get the epoch's row
            self.log("val_score", self.scored.val.mean, logger=False)

    def on_train_epoch_end(self) -> None:
        self.course.stop_clock(self.step)
        row = self.course.end_epoch(int(self.epochs_done) + 1, self.scored)
        step_schedules(self.lr_schedulers(), self._players, self._moved)
        self.epochs_done += 1
        if self.trainer.current_epoch + 1 == self.trainer.max_epochs:
            self._finish()
        for logger in self.trainer.loggers:
            logger.log_metrics({name: value for name, value in row.items() if name != "epoch"}, step=int(row["epoch"]))

    def on_train_end(self) -> None:
        self._finish()  # of a fit that was stopped before the last epoch that was planned

    def on_test_epoch_start(self) -> None:
        self.scored.reset()

    def test_step(self, item: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        held_out = isinstance(loaders := self.trainer.test_dataloaders, list) and dataloader_idx < len(loaders) - 1
        self.scored.add(item, "val" if held_out else "test", partial(scores, self))

    def on_test_epoch_end(self) -> None:
        self.log_dict(self.scored.test.summary())

    def predict_step(self, item: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return scores(self, images_of(item)).score

    def _finish(self) -> None:
        if self.has("after_fit") and not self._finished:
            with looking(self):
                self.after_fit(self.training_images.everything().x)
        self._finished = True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Plain values and tensors only: checkpoints load under weights_only=True.
        fit = {"fit_begun": self._begun, "fit_finished": self._finished, "fitted": sorted(self.fitted_names)}
        checkpoint["anomaly_lab"] = {**self.course.state(), **fit, "noise": self.randomness.state()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        own = checkpoint["anomaly_lab"]
        self.course.load(own)
        self.randomness.load(own["noise"])
        self._begun, self._finished = own.get("fit_begun", True), own["fit_finished"]
        for name in own["fitted"]:
            self.set_fitted(name, torch.empty_like(checkpoint["state_dict"][name], device=self.device))


class Scores(NamedTuple):
    """What a method says of B images."""

    score: Tensor  # float32 (B,)
    decided: Tensor | None  # bool (B,), by the method's own rule
    terms: Mapping[str, Tensor]  # float32 (B,), by name


def scores(detector: Detector, x: Tensor) -> Scores:
    """Score images (B,C,H,W), in eval mode."""
    assert not detector.training, "scores are taken in eval mode"
    # Half precision would tie scores that differ, and an inference tensor takes no part in a search by gradients.
    with torch.autocast(detector.device.type, enabled=False), torch.inference_mode(False), torch.no_grad():
        x = x.clone() if x.is_inference() else x
        terms = {name: term.detach().float() for name, term in detector.terms(x).items()}
        score, decided = (detector.combine(terms) if terms else detector.score(x)).detach().float(), detector.decide(x)
    for name, values in {"score()": score, **terms}.items():
        assert values.shape == (len(x),), f"{name} returned {tuple(values.shape)} for {len(x)} images"
    return Scores(score, decided, terms)


@contextmanager
def looking(detector: nn.Module) -> Iterator[None]:
    """Eval mode without gradients during the block: how hooks look at a detector that is being trained."""
    modes = [(module, module.training) for module in detector.modules()]
    detector.eval()
    with torch.no_grad():
        yield
    for module, training in modes:
        module.training = training


def _arguments(cls: type, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What the constructor was given, by name.

    Raises:
        ValueError: an argument annotated as a ``Literal`` has another value.
    """
    bound = inspect.signature(cls.__init__).bind_partial(None, *args, **kwargs)  # type: ignore[misc]
    given = dict(islice(bound.arguments.items(), 1, None))
    hints = get_type_hints(cls.__init__)  # type: ignore[misc]
    for name, value in given.items():
        valid = get_args(hints[name]) if get_origin(hints.get(name)) is Literal else (value,)
        if value not in valid:
            raise ValueError(f"{name}={value}: choose one of {', '.join(map(str, valid))}")
    return given


def _plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    return value is None or isinstance(value, bool | int | float | str)
