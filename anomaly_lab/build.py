"""From a run's configuration to what it trains with: data, detector, trainer, and the files of its checkpoints."""

from __future__ import annotations

import io
import logging
import math
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.plugins.io import TorchCheckpointIO
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from anomaly_lab import config, record, turns, values
from anomaly_lab.config import Job
from anomaly_lab.cuda_graphs import GraphedSteps
from anomaly_lab.data import Augment, OneClassData, Prepare
from anomaly_lab.detector import Detector
from anomaly_lab.features import FeatureStore
from anomaly_lab.files import refuse_bomb, write_atomically
from anomaly_lab.players import Learning
from anomaly_lab.randomness import stream

log = logging.getLogger(__name__)


# Data and detector ----------------------------------------------------------------------------------------------------


def make_prepare(cfg: DictConfig) -> Prepare:
    """The preprocessing ``model.input`` describes."""
    given = OmegaConf.to_container(cfg.model.input, resolve=True)
    assert isinstance(given, dict)
    given.pop("augment", None)  # of training batches alone
    (low, high), features = given.pop("range"), instantiate(given.pop("features", None), _convert_="all")
    return Prepare(value_range=(low, high), features=features, **{str(key): value for key, value in given.items()})


def make_augment(cfg: DictConfig) -> Augment | None:
    """How training images are changed; raises what `values.augmentation` does."""
    given = values.augmentation(cfg)
    return None if given is None else Augment(**given)


def make_data(job: Job) -> OneClassData:
    """The data module of a run, its partition made.

    Raises:
        ValueError: the split has known anomalies and the method asks for none.
    """
    cfg, images, prepare = job.cfg, config.load_images(job.cfg), make_prepare(job.cfg)
    if caution := config.caution(job):
        log.warning(caution)
    kept = Path(cfg.data_dir).expanduser() / "features"
    return OneClassData(
        images,
        job.split,
        config.target(cfg),
        prepare,
        batch_size=cfg.model.batch_size,
        epoch_steps=cfg.model.budget.epoch_steps,
        score_batch_size=cfg.trainer.score_batch_size,
        seed=cfg.seed,
        features=FeatureStore(images, prepare, kept, cfg.trainer.feature_cache_gb * 1e9),
        labels=bool(cfg.model.get("labels")),
        known=config.semi_supervised(cfg),
        augment=make_augment(cfg),
    )


def make_detector(cfg: DictConfig, image_shape: Sequence[int], epochs: int | None = None) -> Detector:
    """The untrained detector of ``cfg`` for images of shape (C,S,S), and how it learns; same seed, same weights.

    Args:
        epochs: what the budget comes to (`epochs`), for schedules over it (``T_max: ${..budget.epochs}``) where
            ``model.budget`` gives steps.
    """
    config.refuse_missing_keys(cfg)
    detector = make_networks(cfg, image_shape)
    if detector.players():
        config.refuse_missing_keys(cfg, learns=True)
    model = cfg.model
    if epochs is not None and model.budget.steps is not None:
        model = model.copy()
        model.budget.epochs = epochs
    optimizer, scheduler = (instantiate(model[key], _convert_="all") for key in ("optimizer", "scheduler"))
    detector.learning = Learning(optimizer, scheduler, cfg.model.clip)
    detector.plan(values.stages(cfg))
    return detector


def make_networks(cfg: DictConfig, image_shape: Sequence[int]) -> Detector:
    """The detector alone, as far as it is needed to score; calls nothing that ``cfg`` names but ``model.detector``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream(cfg.seed, "weights"))
        detector = instantiate(cfg.model.detector, image_shape=tuple(image_shape), _convert_="all")
    if not isinstance(detector, Detector):
        raise ValueError(f"model={cfg.choices.model}: model.detector._target_ must name a subclass of Detector")
    detector.randomness.follow(cfg.seed)
    if cfg.trainer.get("channels_last"):  # results of earlier code do not say
        detector.to(memory_format=torch.channels_last)
    return detector


def epochs(cfg: DictConfig, data: OneClassData) -> int:
    """The budget in whole epochs; a budget of steps is rounded up. 0 for a method without an optimiser."""
    if cfg.model.optimizer is None:
        return 0
    budget, stages = cfg.model.budget, values.stages(cfg)
    if stages:
        return sum(stages.values())
    return int(budget.epochs or 0) if budget.steps is None else math.ceil(budget.steps / data.steps)


# Trainer --------------------------------------------------------------------------------------------------------------


def make_trainer(
    job: Job, data: OneClassData, title: str, logger: Any = False, callbacks: Sequence[Callback] = ()
) -> Trainer:
    """The trainer of a run, with its checkpoints, its turns and its progress bar."""
    cfg, every = job.cfg, job.cfg.trainer.checkpoint_every
    own: list[Callback] = [_LastCheckpoint(job, every), _Turns()]
    if cfg.trainer.progress:
        own.append(_Progress(title, data.steps))
    return make_lightning_trainer(cfg, data, job.out, logger, [*own, *callbacks])


def make_lightning_trainer(
    cfg: DictConfig, data: OneClassData, folder: str | Path, logger: Any = False, callbacks: Sequence[Callback] = ()
) -> Trainer:
    """A Lightning trainer of ``cfg``: one device, no state outside of ``folder``."""
    precision = cfg.trainer.precision
    trainer = Trainer(
        accelerator=cfg.trainer.accelerator,
        devices=1,
        precision="bf16-mixed" if precision == "bf16-mixed" else "32-true",
        max_epochs=epochs(cfg, data),
        callbacks=list(callbacks),
        # Under Slurm, Lightning's own environment would answer signals with checkpoints that later calls pick up.
        plugins=[_WholeFiles(), LightningEnvironment()],
        logger=logger,
        default_root_dir=folder,
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
        inference_mode=False,  # else every batch is copied, because a score may need gradients
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    if cfg.trainer.cuda_graphs:
        if trainer.strategy.root_device.type == "cuda":
            trainer.callbacks.insert(0, GraphedSteps())  # type: ignore[attr-defined]
        else:
            log.warning("trainer.cuda_graphs=true: there is no GPU to capture steps on, so it has no effect")
    return trainer


class _LastCheckpoint(Checkpoint):
    """``last.ckpt`` every so many epochs. A Checkpoint, because Lightning calls those after everybody else."""

    def __init__(self, job: Job, every: int) -> None:
        self._job, self._every = job, every
        self._code = [record.code()]  # every code version that trained this run, the present one last

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["identity"], checkpoint["settings"] = dict(self._job.identity), dict(self._job.settings)
        checkpoint["code"] = self._code

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        now = self._code[-1]
        earlier = checkpoint.get("code", [{"sha": None, "dirty": None, "diff": None}])  # older ones do not say it
        self._code = [code for code in earlier if code != now] + [now]

    @property
    def earlier_code(self) -> list[dict[str, Any]]:
        return self._code[:-1]

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Detector)
        if len(pl_module.course.history) % self._every == 0:
            # "Weights only" would drop the optimisers.
            trainer.save_checkpoint(self._job.out / "last.ckpt", weights_only=False)


class _Turns(Callback):
    """Gives other runs of this process their turns where this one would wait (`anomaly_lab.turns`)."""

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        turns.settle(pl_module.device)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        turns.settle(pl_module.device)  # reading values would block the other runs

    def on_validation_batch_end(self, *_: Any) -> None:
        turns.pass_on()

    def on_test_batch_end(self, *_: Any) -> None:
        turns.pass_on()


class _Progress(Callback):
    """One bar for the whole run: epoch, the losses of the last one, and the time left."""

    def __init__(self, title: str, steps: int) -> None:
        self._title, self._steps = title, steps  # of an epoch

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert trainer.max_epochs is not None and isinstance(pl_module, Detector)
        screen = sys.stderr.isatty()
        self._bar = tqdm(
            initial=int(pl_module.steps_done),
            total=trainer.max_epochs * self._steps,
            desc=self._title,
            unit="step",
            mininterval=0.5 if screen else 30,  # seconds; a log file needs no animation
            position=None if screen else 0,  # bars of several runs: one below the other, but not in a log file
            leave=not turns.shared(),  # their place is needed again, and the line of the result says it all
        )

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, Detector)
        self._bar.update(pl_module.step - self._bar.n)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Detector)
        means = pl_module.course.means() | {"epoch": f"{int(pl_module.epochs_done) + 1}/{trainer.max_epochs}"}
        self._bar.set_postfix({k.removeprefix("loss_"): v for k, v in means.items()})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._bar.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if hasattr(self, "_bar"):
            self._bar.close()


# Checkpoints ----------------------------------------------------------------------------------------------------------


def write_checkpoint(path: Path, checkpoint: Mapping[str, Any]) -> None:
    """Write ``checkpoint`` atomically: Lightning stages its own in TMPDIR, often on another file system."""
    # In memory first: torch's writer would turn a full disk into an error of its own that says nothing.
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    with turns.aside():
        write_atomically(path, lambda file: file.write(buffer.getbuffer()))


class _WholeFiles(TorchCheckpointIO):
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        write_checkpoint(Path(path), checkpoint)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The checkpoint in ``path``, on the CPU, its bytes held to the checksums in the archive.

    torch itself does not look at them: a flipped bit of a weight would be trained on and scored with.

    Raises:
        ValueError: it is damaged.
    """
    try:
        refuse_bomb(path, most=1)  # torch does not compress
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        for name, tensor in checkpoint["state_dict"].items():
            if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
                raise ValueError(f"{name} has {tensor.numel()} numbers, of which it holds a part only")
    # zipfile and torch raise BadZipFile, RuntimeError, UnpicklingError, EOFError, ..., depending on the damage.
    except Exception as error:
        if isinstance(error, OSError):
            raise
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {reason})") from error
    return checkpoint
