"""The course of a training: what was recorded in each epoch, whether it diverged, what a pass over images scored."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from anomaly_lab import metrics
from anomaly_lab.batches import Batch, images_of, plain_batch
from anomaly_lab.errors import RunFailed

EXPLOSION = 1e3
"""A loss above this multiple of its first value (of 1, if that is smaller) is a divergence."""


class Diverged(RunFailed):
    """Training diverged or collapsed, so there is no detector to score with."""


class Scored(Metric):
    """One pass over a set of images: score, place, truth and decision of each, and the exact metrics of all.

    torchmetrics' own binary metrics apply a sigmoid to batches with values outside [0, 1], so large scores become ties.
    This one gathers raw scores and computes `anomaly_lab.metrics` once, in float64.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    _score: list[Tensor]
    _index: list[Tensor]
    _truth: list[Tensor]
    _decided: list[Tensor]
    _terms: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self._names: tuple[str, ...] = ()  # of the terms
        for name in ("_score", "_index", "_truth", "_decided", "_terms"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(
        self,
        score: Tensor,
        index: Tensor,
        truth: Tensor | None = None,
        decided: Tensor | None = None,
        terms: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Append a batch: scores float32 (B,), data-set indices (B,), truth, the method's own decisions, the terms."""
        self._score.append(score.detach())
        self._index.append(index)
        self._names = tuple(terms or ())
        stacked = torch.stack(list(terms.values()), 1) if terms else None  # (B,T)
        for kept, values in ((self._truth, truth), (self._decided, decided), (self._terms, stacked)):
            if values is not None:
                kept.append(values)

    def compute(self) -> dict[str, float]:
        """AUROC, average precision and FPR at 95 % TPR.

        Raises:
            ValueError: a score is not finite, or the images are of one kind only.
        """
        score, truth = self.score.astype(np.float64), self.truth
        return {
            "auroc": metrics.auroc(score, truth),
            "average_precision": metrics.average_precision(score, truth),
            "fpr95": metrics.fpr_at_tpr(score, truth),
        }

    def summary(self) -> dict[str, float]:
        """`compute`'s metrics; the mean score where the truth is unknown or of one kind."""
        ranked = self._truth and len(np.unique(self.truth)) == 2
        return self.compute() if ranked else {"mean_score": self.mean}

    @property
    def seen(self) -> bool:
        """Whether anything was scored since the last reset."""
        return bool(self._score)

    @property
    def score(self) -> np.ndarray:
        """Raw scores, float32 (N,), in the order of the pass."""
        return dim_zero_cat(self._score).cpu().numpy()

    @property
    def index(self) -> np.ndarray:
        """Places of the images in their data set, int64 (N,)."""
        return dim_zero_cat(self._index).cpu().numpy()

    def places(self, index: np.ndarray) -> np.ndarray:
        """Where in the pass the images at ``index`` (N,) of the data set were scored, int64 (N,)."""
        order = np.argsort(self.index, kind="stable")
        found = order[np.searchsorted(self.index, index, sorter=order)]
        assert np.array_equal(self.index[found], index), "the pass scored other images than those asked for"
        return found

    @property
    def truth(self) -> np.ndarray:
        """0 normal, 1 anomalous, uint8 (N,)."""
        return dim_zero_cat(self._truth).cpu().numpy()

    @property
    def decided(self) -> np.ndarray | None:
        """What the method's own rule calls anomalous, bool (N,); None without one."""
        return dim_zero_cat(self._decided).cpu().numpy() if self._decided else None

    @property
    def terms(self) -> dict[str, np.ndarray]:
        """The score's terms by name, float32 (N,) each."""
        return dict(zip(self._names, dim_zero_cat(self._terms).cpu().numpy().T, strict=True)) if self._terms else {}

    @property
    def mean(self) -> float:
        """Mean score. Waits for the device."""
        return dim_zero_cat(self._score).cpu().double().mean().item()


class Passes(nn.Module):
    """The last pass over the held-out normals (``val``) and over the test images (``test``)."""

    def __init__(self) -> None:
        super().__init__()
        self.val, self.test = Scored(), Scored()

    def add(
        self, item: Any, part: str, scores: Callable[[Tensor], tuple[Tensor, Tensor | None, Mapping[str, Tensor]]]
    ) -> None:
        """Score what a loader of the ``part`` (``val`` or ``test``) gave.

        Args:
            scores: of images (B,C,H,W): score, decisions of the method's own rule, terms.
        """
        batch = item if isinstance(item, Batch) else plain_batch(images_of(item))
        score, decided, terms = scores(batch.x)
        scored = self.test if part == "test" else self.val
        scored.update(score, batch.index, batch.truth, decided, terms)

    def reset(self) -> None:
        self.val.reset()
        self.test.reset()


class Course:
    """What was recorded of a training, one row an epoch."""

    def __init__(self) -> None:
        self.history: list[dict[str, float]] = []
        """Rows: epoch (from 1), the mean of every recorded value, seconds, val_score; nothing of the test images."""
        self.seconds_per_step: float | None = None
        """Of the last epoch that this process has trained."""
        self._first_losses: dict[str, float] = {}
        self._first: dict[str, Tensor] = {}
        self._means: dict[str, tuple[Tensor, Tensor]] = {}  # sum and number; a captured step adds to this very memory
        self._started: tuple[float, int] = (0.0, 0)  # time and step
        self._seconds: float | None = None

    def begin(self) -> None:
        """A fit begins, at its first epoch or after a resume."""
        self._means.clear()
        self._first.clear()

    def begin_epoch(self, step: int) -> None:
        self._started, self._seconds = (time.perf_counter(), step), None

    def stop_clock(self, step: int) -> None:
        """The first call in an epoch ends its training time."""
        if self._seconds is None:
            since, first = self._started
            self._seconds = time.perf_counter() - since
            self.seconds_per_step = self._seconds / max(step - first, 1)

    def record(self, name: str, value: Tensor) -> None:
        """Add ``value`` (a scalar) to the epoch's mean of ``name``, without synchronising with the device."""
        if name not in self._first_losses:
            self._first.setdefault(name, value.detach())
        if name not in self._means:
            self._means[name] = (torch.zeros((), device=value.device), torch.zeros((), device=value.device))
        total, count = self._means[name]
        total += value.detach().float()
        count += 1

    def means(self) -> dict[str, float]:
        """The means recorded so far in this epoch. Waits for the device."""
        return {name: (total / count).item() for name, (total, count) in self._means.items() if count}

    def end_epoch(self, epoch: int, scored: Passes) -> dict[str, float]:
        """The row of ``epoch``, which joins the history, with what was ``scored`` after it.

        Raises:
            Diverged: a number in it is not finite, or a loss is orders of magnitude above its first value.
        """
        row = {"epoch": epoch, **self.means(), "seconds": self._seconds or 0.0}
        if scored.val.seen:
            row["val_score"] = scored.val.mean
        for total, count in self._means.values():
            total.zero_()
            count.zero_()
        self._refuse_divergence(row)
        self.history.append(row)
        return row

    def _refuse_divergence(self, row: Mapping[str, float]) -> None:
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

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {"history": self.history, "first_losses": self._first_losses}

    def load(self, state: Mapping[str, Any]) -> None:
        self.history, self._first_losses = state["history"], state["first_losses"]


class Stages:
    """The stages of a training, and which of them an epoch belongs to.

    Args:
        names: in their order; none for a method that trains the same way throughout.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = tuple(names)
        self.epochs: Mapping[str, int] = {}
        """Epochs of each stage."""
        self.stage, self.epoch = "", 0
        """Name of the present stage, and number of the present epoch in it, from 1."""

    def plan(self, epochs: Mapping[str, int]) -> None:
        """Divide training: the epochs of each stage, ``model.budget.stages``.

        Raises:
            ValueError: these are not the stages of the method.
        """
        if tuple(epochs) != self._names:
            if not self._names:
                raise ValueError("model.budget.stages: this method has no stages, give model.budget.epochs or steps")
            raise ValueError(f"model.budget.stages of this method are {', '.join(self._names)}, in this order")
        self.epochs = epochs

    def enter(self, epoch: int) -> bool:
        """Go to ``epoch``, counted from 1 over all stages; whether it is the first of its stage.

        Raises:
            ValueError: the method has stages, and `plan` has not been called.
        """
        if self._names and not self.epochs:
            raise ValueError(f"this method trains in stages: give the epochs of {', '.join(self._names)} with plan()")
        before = 0
        for name, length in self.epochs.items():
            if length:
                self.stage, self.epoch = name, epoch - before
            if epoch <= before + length:
                break
            before += length  # past the end of the last one, too: it goes on
        return self.epoch == 1
