"""Scoring with the lab's own loop: how near it comes to the fastest convolution of the device, method by method.

Measured: the test pass of a run, `trainer.test` on the run's data module, from the first batch to the last: slicing,
preparing and scoring every image, and its row of the metrics. Not counted in the loop, but told as ``loop_share``, the
loop's share of the whole call: Lightning's set-up and the exact metrics at the end. The images are random, the networks
untrained, at published size: neither changes what is computed.

Operations are counted (`benchmarks.counts`) on one batch. Methods whose images cost more see fewer of them.
"""

from __future__ import annotations

import statistics
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer

from anomaly_lab import config
from anomaly_lab.build import make_detector, make_prepare, make_trainer
from anomaly_lab.data import OneClassData
from anomaly_lab.detector import Detector, looking, scores
from anomaly_lab.images import Images
from anomaly_lab.splits import Official
from anomaly_lab.switches import numerics
from benchmarks import counts, machine

IMAGES = 10_000
DEAR = {"cpu": 5e11, "cuda": 2e13}
"""Operations of one pass above which a method other than `TARGETS` is given fewer images."""
TARGETS = ("ganomaly", "shared_ae")
BATCHES = {"cpu": (50, 100, 200, 500, 1000), "cuda": (500, 1000, 2000, 5000, 10_000)}


class Pass(NamedTuple):
    """One pass over the test images."""

    images: int
    loop: float  # seconds
    call: float  # seconds


class _Loop(Callback):
    """The time from before the first batch to after the last; the metrics are computed after it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seconds = -machine.now(self._device)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seconds += machine.now(self._device)


def random_images(train: int, test: int, shape: tuple[int, ...]) -> Images:
    """Random pixels: ``train`` normal images to train on, ``test`` to test on, half of them anomalous."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (train + test, *shape), dtype=np.uint8)
    labels, is_test = np.zeros(train + test, np.int64), np.arange(train + test) >= train
    labels[train + test // 2 :] = 1
    return Images.canonical(pixels, labels, is_test, ("normal", "anomalous"), name="random")


class Scorer:
    """A model at its published size and the lab's test pass over random images."""

    def __init__(self, model: str, device: str, images: int, batch: int | None, folder: Path) -> None:
        overrides = [f"trainer.accelerator={device}", "trainer.progress=false"]
        overrides += [f"trainer.score_batch_size={batch}"] if batch else []
        cfg = counts.compose(model, *overrides)
        self.precision = cfg.trainer.precision
        self.data = OneClassData(
            random_images(100, images, counts.stored_shape(model)),
            Official(),
            0,
            make_prepare(cfg),
            batch_size=cfg.model.batch_size,
            score_batch_size=cfg.trainer.score_batch_size,
        )
        self.detector: Detector = make_detector(cfg, self.data.image_shape).to(device)
        with looking(self.detector):
            self.detector.after_fit(self.data.prepared("train").to(device))
        self.device = torch.device(device)
        self._loop = _Loop(self.device)
        job = replace(config.job(cfg), out=folder)
        self._trainer = make_trainer(job, self.data, "", callbacks=[self._loop])
        self.batch = max(len(batch.x) for batch in self.data.test_dataloader()[1])

    def __call__(self) -> Pass:
        """One pass, as a run makes it."""
        with warnings.catch_warnings(), numerics(self.precision):
            warnings.simplefilter("ignore")
            started = machine.now(self.device)
            self._trainer.test(self.detector, datamodule=self.data, verbose=False)
            call = machine.now(self.device) - started
        return Pass(len(self.data.partition.val) + len(self.data.partition.test), self._loop.seconds, call)

    def mflop(self) -> float:
        """Operations of scoring one image, in millions, its method's own decision included."""
        x = next(iter(self.data.test_dataloader()[0])).x.to(self.device)
        with torch.no_grad():
            self.detector.to(self.device).eval()
            return counts.cost(lambda: scores(self.detector, x)).flop / len(x) / 1e6


def _row(model: str, scorer: Scorer, repeats: int) -> dict[str, Any]:
    """Medians of ``repeats`` passes, each beside a new measurement of the peak."""
    peak, mflop = machine.peak(scorer.device.type), scorer.mflop()
    pairs = [(peak.gflops(), scorer()) for _ in range(repeats)]
    rates = [mflop * one.images / one.loop / 1e3 for _, one in pairs]
    row = {
        "method": model,
        "image": "×".join(map(str, scorer.data.image_shape)),
        "images": pairs[0][1].images,
        "batch": scorer.batch,
        "mflop_per_image": mflop,
        "gflops": statistics.median(rates),
        "peak_gflops": statistics.median(found for found, _ in pairs),
        "share_of_peak": statistics.median(rate / found for rate, (found, _) in zip(rates, pairs, strict=True)),
        "loop_share": statistics.median(one.loop / one.call for _, one in pairs),
    }
    if scorer.device.type == "cuda":
        row["seconds"] = statistics.median(one.loop for _, one in pairs)
    return row


def measure(device: str, quick: bool) -> dict[str, Any]:
    """A row for each published method at the lab's own batch size, and for `TARGETS` at several others.

    ``purpose`` tells the two apart: ``method`` and ``batch size``.
    """
    device = machine.device_of(device).type
    most, repeats = (500, 1) if quick else (IMAGES, 3)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        Scorer("ganomaly", device, 100, None, folder)()  # what the first pass of a process loads
        for model in TARGETS if quick else counts.published():
            images = most
            if model not in TARGETS:
                per_image = Scorer(model, device, 100, None, folder).mflop() * 1e6
                images = min(most, max(100, int(DEAR[device] / per_image) // 100 * 100))
            rows.append({"purpose": "method"} | _row(model, Scorer(model, device, images, None, folder), repeats))
        for model in TARGETS:
            for batch in BATCHES[device]:
                images = most if device == "cuda" else min(most, 2000)
                rows.append(
                    {"purpose": "batch size"} | _row(model, Scorer(model, device, images, batch, folder), repeats)
                )
    note = (
        "The lab's own test pass: slicing, preparing, scoring, with the peak convolution measured again before each. "
        f"Medians of {repeats} pass{'es' * (repeats > 1)}."
    )
    return {"rows": rows, "note": note}
