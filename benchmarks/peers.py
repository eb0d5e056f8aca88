"""The lab beside anomalib's GANomaly and PyOD's autoencoder, in images per CPU-second, in one process.

GANomaly (anomalib): its own Lightning module under its own `Engine` (no logger, no progress bar), fed by a
`torch.utils.data.DataLoader` over images that lie decoded in memory; its items, collation and preprocessing (scaling
to [-1, 1]) are counted, as are the lab's. Both have the same stored images of 32×32 pixels and three channels, the same
widths, batch and optimisers. Its losses are not the paper's (it compares D's outputs instead of features), at about the
same work; D runs three times a step. Counted is one epoch after one of warming up; checkpoints and validation are not.
With two workers their CPU time counts, too.

Autoencoder (PyOD): the same fully connected layers, activation, batch norm, dropout, batch, loss and learning rate on
both sides, on 28×28 pixels in [0, 1]; PyOD's standardising is off. The lab brings its bytes to [0, 1] batch by batch,
PyOD is given floats. PyOD trains by its own `fit` and data loader; counted are its epochs after the first, without its
scoring of the training set. The lab trains through a run, with the fused Adam that its dense methods have.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from anomaly_lab import build, config
from anomaly_lab.detector import Batch, Detector
from benchmarks.compare import Cost, contest, now
from benchmarks.training import Stopwatch, compose, fit

INSTALL = "pip install 'anomaly-lab[bench]'"


def missing(package: str) -> bool:
    return importlib.util.find_spec(package) is None


# anomalib -----------------------------------------------------------------------------------------------------------


class _InMemory(Dataset[Any]):
    """Decoded images as anomalib's data sets give them: float (3,32,32) in [0, 1], one at a time."""

    def __init__(self, pixels: Tensor) -> None:
        self._pixels = pixels  # uint8 (N,3,32,32)

    def __len__(self) -> int:
        return len(self._pixels)

    def __getitem__(self, position: int) -> Any:
        from anomalib.data import ImageItem

        return ImageItem(image=self._pixels[position].float() / 255, gt_label=torch.tensor(0))


class _SecondEpoch(Callback):
    """The cost of the second epoch, until its last step, or with workers until they have ended."""

    cost: Cost

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.started = now()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.cost = now().since(self.started)


def anomalib_epoch(cfg: DictConfig, pixels: Tensor, steps: int, workers: int) -> Cost:
    """What an epoch of so many steps of anomalib's GANomaly costs, of the size of ``cfg``."""
    from anomalib.data import ImageBatch
    from anomalib.engine import Engine
    from anomalib.models import Ganomaly
    from anomalib.pre_processing import PreProcessor
    from torchvision.transforms.v2 import Compose, Normalize, Resize

    detector, size = cfg.model.detector, pixels.shape[-2:]
    scaling = Compose([Resize(size, antialias=True), Normalize([0.5] * 3, [0.5] * 3)])  # its size is read from here
    model = Ganomaly(
        batch_size=cfg.model.batch_size,
        n_features=detector.width,
        latent_vec_size=detector.latent_size,
        lr=cfg.model.optimizer.lr,
        pre_processor=PreProcessor(transform=scaling),
        post_processor=False,
        evaluator=False,
        visualizer=False,
    )
    order = torch.arange(steps * cfg.model.batch_size) % len(pixels)
    loader = DataLoader(
        _InMemory(pixels[order]),
        cfg.model.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        collate_fn=ImageBatch.collate,
    )
    watch = _SecondEpoch()
    with tempfile.TemporaryDirectory() as out:
        engine = Engine(
            callbacks=[watch],
            default_root_dir=out,
            accelerator=cfg.trainer.accelerator,
            devices=1,
            max_epochs=2,
            enable_progress_bar=False,
            enable_model_summary=False,
            log_every_n_steps=10**6,
        )
        engine.fit(model, train_dataloaders=loader)
        if workers:
            watch.cost = now().since(watch.started)  # the workers' last seconds are in
    return watch.cost


def against_anomalib(
    model: str, *overrides: str, steps: int, pairs: int, workers: int = 0, device: str = "cpu"
) -> Mapping[str, Any]:
    """A row: GANomaly's training here and there, by turns."""
    cfg = compose(model, steps, 2, *overrides, device=device, stored=(32, 3))
    data = build.make_data(config.job(cfg))
    pixels = torch.from_numpy(data.images.pixels[data.partition.train])  # uint8 (N,3,32,32)
    images = steps * int(cfg.model.batch_size)
    ours, theirs = [], []
    for _ in range(pairs):
        watch = Stopwatch(1)
        fit(cfg, watch)
        ours.append(watch.own[0].per(images))
        theirs.append(anomalib_epoch(cfg, pixels, steps, workers).per(images))
    about = {"against": "anomalib GANomaly", "model": config.model_name(cfg), "batch_size": cfg.model.batch_size}
    return about | {"steps": steps, "workers": workers} | contest(ours, theirs)


# PyOD ---------------------------------------------------------------------------------------------------------------


class FullyConnected(Detector):
    """PyOD's autoencoder as a method of the lab: layer, batch norm, ReLU, dropout; squared error as loss.

    Args:
        hidden: units of the encoder's layers; the decoder mirrors them.
    """

    def __init__(self, image_shape: Sequence[int], *, hidden: Sequence[int], dropout: float) -> None:
        super().__init__(image_shape)
        sizes = [math.prod(image_shape), *hidden, *reversed(hidden[:-1])]
        layers: list[nn.Module] = [nn.Flatten()]
        for a, b in itertools.pairwise(sizes):
            layers += [nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU(), nn.Dropout(dropout)]
        self.network = nn.Sequential(*layers, nn.Linear(sizes[-1], sizes[0]), nn.Unflatten(1, self.image_shape))

    def players(self) -> Mapping[str, Sequence[nn.Module]]:
        return {"autoencoder": [self.network]}

    def plays(self, batch: Batch) -> Iterator[Mapping[str, Tensor]]:
        yield {"autoencoder": nn.functional.mse_loss(self.network(batch.x), batch.x)}

    def score(self, x: Tensor) -> Tensor:
        return (x - self.network(x)).square().flatten(1).mean(1)


def fully_connected(hidden: Sequence[int], batch_size: int, steps: int, epochs: int, device: str = "cpu") -> DictConfig:
    """A run of `FullyConnected`, with PyOD's default dropout, learning rate and weight decay."""
    given = [f"model.batch_size={batch_size}", "model.optimizer.lr=1e-3", "+model.optimizer.weight_decay=1e-5"]
    cfg = compose("autoencoder_beggel", steps, epochs, *given, device=device)
    cfg.model.detector = {
        "_target_": "benchmarks.peers.FullyConnected",
        "hidden": list(hidden),
        "dropout": 0.2,
    }
    return cfg


def pyod_epochs(cfg: DictConfig, x: np.ndarray, epochs: int) -> tuple[list[Cost], nn.Module]:
    """What each epoch of PyOD's autoencoder costs, and its network. x: float32 (N,P)."""
    from pyod.models.auto_encoder import AutoEncoder

    costs: list[Cost] = []

    class Watched(AutoEncoder):
        def training_prepare(self) -> None:
            super().training_prepare()
            self.started = now()

        def epoch_update(self) -> None:
            costs.append(now().since(self.started))
            self.started = now()

    with torch.random.fork_rng():
        detector = Watched(
            preprocessing=False,
            lr=cfg.model.optimizer.lr,
            epoch_num=epochs,
            batch_size=cfg.model.batch_size,
            hidden_neuron_list=list(cfg.model.detector.hidden),
            dropout_rate=cfg.model.detector.dropout,
            optimizer_params={"weight_decay": cfg.model.optimizer.weight_decay},
            device=torch.device("cuda" if cfg.trainer.accelerator == "cuda" else "cpu"),
            verbose=0,
        )
        detector.fit(x)
    return costs, detector.model


def against_pyod(
    hidden: Sequence[int], *, batch_size: int, steps: int, pairs: int, device: str = "cpu"
) -> Mapping[str, Any]:
    """A row: the same autoencoder's training here and there, by turns."""
    cfg = fully_connected(hidden, batch_size, steps, 2, device)
    x = build.make_data(config.job(cfg)).prepared("train").flatten(1).numpy()
    x = x[np.arange(steps * batch_size) % len(x)]
    ours, theirs = [], []
    for _ in range(pairs):
        watch = Stopwatch(1)
        fit(cfg, watch)
        ours.append(watch.own[0].per(len(x)))
        theirs.append(pyod_epochs(cfg, x, 2)[0][1].per(len(x)))
    about = {"against": "PyOD AutoEncoder", "model": "fully connected", "hidden": list(hidden)}
    return about | {"batch_size": batch_size, "steps": steps, "workers": 0} | contest(ours, theirs)


def measure(device: str, quick: bool) -> list[Mapping[str, Any]]:
    """Rows of both comparisons; a row that says so for a package that is not installed."""
    pairs = 2 if quick else 5
    rows: list[Mapping[str, Any]] = []
    if missing("anomalib"):
        rows.append({"against": "anomalib GANomaly", "missing": f"anomalib is not installed: {INSTALL}"})
    else:
        rows.append(against_anomalib("ganomaly", "size=small", steps=20, pairs=pairs, device=device))
        if not quick:
            rows.append(against_anomalib("ganomaly", steps=4, pairs=pairs, device=device))
            rows.append(against_anomalib("ganomaly", "size=small", steps=20, pairs=pairs, workers=2, device=device))
    if missing("pyod"):
        rows.append({"against": "PyOD AutoEncoder", "missing": f"pyod is not installed: {INSTALL}"})
    else:
        rows.append(against_pyod([64, 32], batch_size=32, steps=100, pairs=pairs, device=device))  # PyOD's defaults
        if not quick:  # the size of autoencoder_beggel
            rows.append(against_pyod([1000, 1000, 32], batch_size=256, steps=10, pairs=pairs, device=device))
    for row in rows:
        if "missing" in row:
            print(row["missing"])
    return rows
