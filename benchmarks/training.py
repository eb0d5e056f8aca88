"""Throughput of training: the lab against a bare PyTorch loop and against GANomaly's published loop.

The lab trains as a run does (`build.make_data`, `make_detector`, `make_trainer(...).fit` under `switches.numerics`):
Lightning, its checks, the recording of losses and the loading and preparation of every batch are counted. Not counted
are the first epoch, validation, checkpoints and the end of an epoch; an epoch here has as many steps as take half a
second or so. After each epoch of the lab, within the same process, the baselines train as many steps: `benchmarks.bare`
over prepared images in memory, for GANomaly also `benchmarks.published`. So every pair of figures is of neighbours in
time. Images are scikit-learn's digits, which need no download, stored at MNIST's size.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from omegaconf import DictConfig

from anomaly_lab import build, config, switches
from anomaly_lab.data import Prepare
from anomaly_lab.datasets import Digits
from anomaly_lab.detector import Detector
from benchmarks.bare import LOOPS, PASSES, Bare, start
from benchmarks.compare import Cost, contest, now
from benchmarks.published import Published

RANDOM_FEATURES = (
    "model.detector.features.weights=random",
    "model.detector.features.path=null",
    "model.detector.features.sha256=null",
)
"""SqueezeNet's work does not depend on its weights, so no file is asked for."""


_FOLDER = tempfile.TemporaryDirectory(prefix="anomaly-lab-benchmarks-")


@functools.cache
def digits(size: int, channels: int) -> Path:
    """scikit-learn's digits as stored images of another size: MNIST's is 28 and 1, CIFAR-10's 32 and 3."""
    images = Digits(data_dir=_FOLDER.name).decode()
    enlarged = Prepare(size, "pad", (0.0, 255.0), channels)(torch.from_numpy(images.pixels)).round().byte()
    path = Path(_FOLDER.name) / f"digits-{channels}x{size}x{size}.npz"
    names, labels, is_test = np.array(images.class_names), images.labels, images.is_test
    np.savez(path, images=enlarged.numpy(), labels=labels, is_test=is_test, class_names=names)
    return path


def compose(
    model: str, epoch_steps: int, epochs: int, *overrides: str, device: str = "cpu", stored: tuple[int, int] = (28, 1)
) -> DictConfig:
    """A run of ``model`` (``size=full`` by default) on `digits` of the size ``stored``: epochs of so many steps."""
    given = [
        f"model={model}",
        "size=full",
        "dataset=npz",
        "dataset.name=digits_enlarged",
        f"dataset.path={digits(*stored)}",
    ]
    given += ["split=pooled", "trainer.progress=false", "logger=none", f"model.budget.epoch_steps={epoch_steps}"]
    given += [f"trainer.accelerator={'cuda' if device == 'gpu' else 'cpu'}"]
    if not model.startswith("itsr"):  # whose first stage is long enough
        given += [f"model.budget.epochs={epochs}", "model.budget.steps=null"]
    if model.startswith("piad_squeezenet"):
        given += RANDOM_FEATURES
    cfg = config.compose([*given, *overrides])
    cfg.split.max_train = epoch_steps * cfg.model.batch_size  # or fewer: then they come several times
    return cfg


class Stopwatch(Callback):
    """What every epoch of training costs but the first, and a turn for others after each; ends after ``epochs``.

    Args:
        others: called with no arguments after each epoch, outside the deterministic algorithms that a run asks for.
    """

    def __init__(self, epochs: int, others: Sequence[Callable[[], object]] = ()) -> None:
        self._left, self._others = epochs + 1, others
        self.own: list[Cost] = []
        self.theirs: list[list[Cost]] = [[] for _ in others]
        self._started: Cost | None = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = now()

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()
        before = switches.current()
        assert before is not None
        switches.apply(before._replace(deterministic=False))
        for other, costs in zip(self._others, self.theirs, strict=True):
            started = now()
            other()
            costs.append(now().since(started))
        switches.apply(before)
        self._left -= 1
        if not self._left:
            for costs in (self.own, *self.theirs):
                del costs[0]  # the first epoch warms up
            trainer.should_stop = True

    def _stop(self) -> None:
        if self._started is not None:
            self.own.append(now().since(self._started))
            self._started = None


def fit(cfg: DictConfig, callback: Callback) -> Detector:
    """Train as a run of ``cfg`` would, up to its scoring."""
    with tempfile.TemporaryDirectory() as out, switches.numerics(cfg.trainer.precision), torch.random.fork_rng():
        job = replace(config.job(cfg), out=Path(out))
        data = build.make_data(job)
        trainer = build.make_trainer(job, data, "benchmark", callbacks=[callback])
        detector = start(cfg, data, trainer.strategy.root_device)
        trainer.fit(detector, datamodule=data)
    return detector


def steps_in(seconds: float, model: str, *overrides: str, fewest: int, device: str = "cpu") -> int:
    """How many steps of the bare loop take about so long, on a machine that may be busy; at least ``fewest``."""
    bare, batches, further = make_bare(compose(model, 4, 1, *overrides, device=device), model)
    rounds = len(further) // len(batches)
    bare.train(batches[:2], further[: 2 * rounds])
    started = now()
    bare.train(batches[2:], further[2 * rounds :])
    return max(fewest, round(seconds / (min(now().since(started)) / len(batches[2:]))))


def make_bare(cfg: DictConfig, method: str, **adam: bool) -> tuple[Bare, list[torch.Tensor], list[torch.Tensor]]:
    """The bare loop, and the positions of the images of its first epoch: of the batches, and of the further ones."""
    data = build.make_data(config.job(cfg))
    bare = Bare(method, cfg, data, torch.device(cfg.trainer.accelerator), **adam)
    device = bare.images.device
    images = data.train_dataloader()
    batches = [positions.to(device) for positions in images.order]
    rounds = getattr(bare.detector, "critic_rounds", 0)
    further = islice(images.further(), rounds * len(batches))
    return bare, batches, [positions.to(device) for positions in further]


def against_loops(
    model: str, *overrides: str, pairs: int, seconds: float, device: str = "cpu"
) -> list[Mapping[str, Any]]:
    """A row for each loop that the lab's training of ``model`` is compared with."""
    steps = steps_in(seconds, model, *overrides, fewest=3, device=device)
    cfg = compose(model, steps, pairs + 1, *overrides, device=device)
    bare, batches, further = make_bare(cfg, model)
    others: dict[str, Callable[[], object]] = {"bare": lambda: bare.train(batches, further)}
    if model == "ganomaly":
        published = Published(cfg, build.make_data(config.job(cfg)), torch.device(cfg.trainer.accelerator))
        chosen = torch.cat(batches)
        others["published"] = lambda: published.train(published.loader(chosen))
    watch = Stopwatch(pairs, list(others.values()))
    fit(cfg, watch)
    images = steps * int(cfg.model.batch_size)
    about = {
        "model": model,
        "size": "small" if config.reduced(cfg) else "published",
        "batch_size": int(cfg.model.batch_size),
        "steps": steps,
        "passes": PASSES[model],
    }
    ours = [cost.per(images) for cost in watch.own]
    return [
        about | {"against": name} | contest(ours, [cost.per(images) for cost in costs])
        for name, costs in zip(others, watch.theirs, strict=True)
    ]


def measure(device: str, quick: bool, model: str | None = None) -> list[Mapping[str, Any]]:
    """Rows of `against_loops` for every method (or one ``model``), at its published and at its small size."""
    methods = (model,) if model else ("shared_ae", "ganomaly", "aae") if quick else tuple(LOOPS)
    pairs, seconds = (3, 0.1) if quick else (6, 0.5)
    contests = [(method, size) for size in (("small",) if quick else ("full", "small")) for method in methods]
    return [
        row
        for method, size in contests
        for row in against_loops(method, f"size={size}", pairs=pairs, seconds=seconds, device=device)
    ]
