"""One run: fit, score, measure, write. Idempotent and resumable; the files in its folder are the truth."""

from __future__ import annotations

import ctypes
import fcntl
import gc
import hashlib
import io
import json
import logging
import math
import os
import platform
import resource
import sys
import time
import traceback
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.plugins.io import TorchCheckpointIO
from omegaconf import DictConfig, OmegaConf
from torch import nn
from tqdm import tqdm

from anomaly_lab import config, figures, metrics, tracking, turns
from anomaly_lab.capture import Capture
from anomaly_lab.data import OneClassData, Prepare, scored_at_once
from anomaly_lab.detector import Detector, Diverged
from anomaly_lab.files import remove_parts, write_whole

log = logging.getLogger(__name__)

SCHEMA = 1

COLLAPSED = 1e-6
"""Reconstructions that differ from image to image by less than that share of their own size are one and the same."""

HARDLY_BEGUN = 100  # steps

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


class OutOfMemory(ValueError):
    """The run does not fit into the memory of its device."""


def stream(seed: int, purpose: str) -> int:
    """The seed of one independent stream of randomness (weights, noise) of a run: 63 bits."""
    return int.from_bytes(hashlib.sha256(f"{purpose}/{seed}".encode()).digest()[:8]) >> 1


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=1, allow_nan=False)
    write_whole(path, lambda file: file.write(text.encode()))


class _WholeFiles(TorchCheckpointIO):
    """Checkpoints beside their place, then renamed. Lightning's own go through TMPDIR, often another file system."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        # In memory first: torch's writer would turn a full disk into an error of its own that says nothing.
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        with turns.aside():
            write_whole(Path(path), lambda file: file.write(buffer.getbuffer()))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The checkpoint in ``path``, on the CPU, its bytes held to the checksums in the archive.

    torch itself does not look at them: a flipped bit of a weight would be trained on and scored with.

    Raises:
        ValueError: it is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    # zipfile and torch raise BadZipFile, RuntimeError, UnpicklingError, EOFError, KeyError, ... as the damage wants it.
    except Exception as error:
        if isinstance(error, OSError):
            raise
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {reason})") from error
    return checkpoint


class _LastCheckpoint(Checkpoint):
    """``last.ckpt`` every so many epochs. A Checkpoint, because Lightning calls those after everybody else."""

    def __init__(self, path: Path, every: int, settings: Mapping[str, Any], watched: bool) -> None:
        self._path, self._every, self._settings, self._watched = path, every, settings, watched
        self._code = [config.code()]  # all that has trained this run, the last one now

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        assert isinstance(pl_module, Detector)
        history = pl_module.history
        watched = bool(history) and all("oracle_auroc" in row for row in history)  # when nobody watches now, too
        checkpoint["settings"], checkpoint["watched"] = dict(self._settings), self._watched or watched
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
        if len(pl_module.history) % self._every == 0:
            trainer.save_checkpoint(self._path, weights_only=False)  # "weights only" would drop the optimisers


class _SeededEpochs(Callback):
    """Layers that draw from torch's global stream (dropout) draw the same in every epoch, resumed or not."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        torch.manual_seed(stream(self._seed, f"epoch {int(pl_module.epochs_done)}"))  # type: ignore[arg-type]


class _Progress(Callback):
    """One bar for the whole run: epoch, the losses of the last one, and the time left."""

    def __init__(self, title: str) -> None:
        self._title = title

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert trainer.max_epochs is not None and isinstance(pl_module, Detector)
        steps = trainer.datamodule.steps  # type: ignore[attr-defined]
        screen = sys.stderr.isatty()
        self._bar = tqdm(
            initial=int(pl_module.steps_done),
            total=trainer.max_epochs * steps,
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
        means = pl_module.epoch_means() | {"epoch": f"{int(pl_module.epochs_done) + 1}/{trainer.max_epochs}"}
        self._bar.set_postfix({k.removeprefix("loss_"): v for k, v in means.items()})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._bar.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if hasattr(self, "_bar"):
            self._bar.close()


@contextmanager
def _alone(out: Path) -> Iterator[bool]:
    """Whether this process has the run's folder for itself. The kernel lets go of the lock when a process dies.

    Who has it removes what killed processes left half-written.
    """
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as file:
        for attempt in (1, 2):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if attempt == 2:
                    yield False
                    return
                time.sleep(0.2)  # a status report may have looked at the lock in this very moment
            except OSError as error:  # some cluster file systems have no locks
                log.warning("%s cannot be locked (%s): take care that nobody else makes the same run", out, error)
                break
            else:
                remove_parts(out)  # without a lock they might be somebody's
                break
        yield True


def make_prepare(cfg: DictConfig) -> Prepare:
    """The preprocessing ``model.input`` describes."""
    given = OmegaConf.to_container(cfg.model.input, resolve=True)
    assert isinstance(given, dict)
    low, high = given.pop("range")
    return Prepare(value_range=(low, high), **{str(key): value for key, value in given.items()})


def make_data(cfg: DictConfig) -> OneClassData:
    """The data module of ``cfg``: the class resolved, the partition made."""
    return OneClassData(
        config.load_images(cfg),
        instantiate(cfg.split, _convert_="all"),
        config.target(cfg),
        make_prepare(cfg),
        batch_size=cfg.model.batch_size,
        epoch_steps=cfg.model.budget.epoch_steps,
        score_batch_size=cfg.trainer.score_batch_size,
        seed=cfg.seed,
        watch_test=cfg.trainer.watch_test,
    )


def make_detector(cfg: DictConfig, image_shape: Sequence[int]) -> Detector:
    """The untrained detector of ``cfg`` for images of shape (C,S,S); same seed, same weights."""
    config.refuse_missing_keys(cfg)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream(cfg.seed, "weights"))
        detector = instantiate(cfg.model.detector, image_shape=tuple(image_shape), _convert_="all")
    if not isinstance(detector, Detector):
        raise ValueError(f"model={cfg.choices.model}: model.detector._target_ must name a subclass of Detector")
    if detector.players():
        config.refuse_missing_keys(cfg, learns=True)
    optimizer, scheduler = (instantiate(cfg.model[key], _convert_="all") for key in ("optimizer", "scheduler"))
    detector.optimise_with(optimizer, scheduler, cfg.model.clip)
    if cfg.trainer.channels_last:
        detector.to(memory_format=torch.channels_last)
    detector.plan(_stages(cfg))
    return detector


def _stages(cfg: DictConfig) -> dict[str, int]:
    """Epochs of each stage of training, in order; empty for methods without stages."""
    stages = cfg.model.budget.get("stages") or {}
    if not isinstance(stages, Mapping):
        raise ValueError("model.budget.stages: give each stage its epochs, such as {pretrain: 50, detect: 100}")
    for name, epochs in stages.items():
        if type(epochs) is not int or epochs < 0:
            raise ValueError(f"model.budget.stages.{name}={epochs}: give a whole number of epochs from 0")
    return {str(name): int(epochs) for name, epochs in stages.items()}


def _epochs(cfg: DictConfig, data: OneClassData) -> int:
    """The budget in whole epochs; a budget of steps is rounded up."""
    budget, stages = cfg.model.budget, _stages(cfg)
    if (budget.epochs is not None) + (budget.steps is not None) + bool(stages) > 1:
        raise ValueError("give model.budget one of epochs, steps and stages, and null for the others")
    for name in ("epochs", "steps"):
        if budget[name] is not None and (type(budget[name]) is not int or budget[name] < 0):
            raise ValueError(f"model.budget.{name}={budget[name]}: give a whole number from 0")
    if stages:
        return sum(stages.values())
    return int(budget.epochs or 0) if budget.steps is None else math.ceil(budget.steps / data.steps)


def make_trainer(
    cfg: DictConfig, data: OneClassData, out: Path, title: str, logger: Any = False, callbacks: Sequence[Callback] = ()
) -> Trainer:
    """A Lightning trainer for exactly one run: one device, no state outside ``out``."""
    precision = cfg.trainer.precision
    if precision not in ("32-true", "tf32", "bf16-mixed"):
        raise ValueError(f"trainer.precision={precision}: choose 32-true, tf32 or bf16-mixed")
    every = cfg.trainer.checkpoint_every
    if type(every) is not int or every < 1:
        raise ValueError(f"trainer.checkpoint_every={every}: give a whole number of epochs from 1")
    last = _LastCheckpoint(out / "last.ckpt", every, config.settings(cfg), cfg.trainer.watch_test)
    own: list[Callback] = [last, _SeededEpochs(cfg.seed)]
    if cfg.trainer.progress:
        own.append(_Progress(title))
    trainer = Trainer(
        accelerator=cfg.trainer.accelerator,
        devices=1,
        precision="bf16-mixed" if precision == "bf16-mixed" else "32-true",
        max_epochs=_epochs(cfg, data),
        callbacks=[*own, *callbacks],
        # Under Slurm, Lightning's own environment would answer signals with checkpoints that later calls pick up.
        plugins=[_WholeFiles(), LightningEnvironment()],
        reload_dataloaders_every_n_epochs=1,  # a loader is one epoch's order, and epochs may differ in length
        logger=logger,
        default_root_dir=out,
        inference_mode=False,  # a score may need gradients (AnoGAN's search in latent space)
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    if cfg.trainer.capture:
        if trainer.strategy.root_device.type == "cuda":
            trainer.callbacks.insert(0, Capture())  # type: ignore[attr-defined]
        else:
            log.warning("trainer.capture=true: there is no GPU to capture steps on, so it has no effect")
    return trainer


@contextmanager
def numerics(precision: str) -> Iterator[None]:
    """The global switches of a run's numbers, set back afterwards: ``trainer.precision`` and deterministic algorithms.

    Where an operation has no deterministic algorithm, torch warns. All new memory would be filled with NaN, lest its
    content be used: a pass over every tensor, of which these kernels overwrite every number anyway.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS may sum in another order each time
    filling = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
        torch.utils.deterministic.fill_uninitialized_memory = filling  # type: ignore[attr-defined]
        torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])


def _threads(cfg: DictConfig) -> None:
    """All cores for one run; the launcher's share of them where several run side by side."""
    if cfg.trainer.threads is not None:
        torch.set_num_threads(cfg.trainer.threads)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(len(os.sched_getaffinity(0)))


def keep_freed_memory(most: int = 2**30) -> None:
    """Let this process keep up to ``most`` free bytes at its heap's end: every step needs the same again.

    glibc gives back what exceeds 64 MB there, and the next step pays for every page anew: up to a tenth of its time.
    Arrays of 32 MB and more are returned as before. Nothing happens with other C libraries.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 2**25)  # where glibc's own ends up: setting the other one stops it from moving
        mallopt(_M_TRIM_THRESHOLD, most)


def _code() -> dict[str, Any]:
    """`config.code`; with ``submitted``, and a warning, where a job runs other code than it was submitted with."""
    now = config.code()
    submitted = json.loads(os.environ.get(config.SUBMITTED, "null"))
    if submitted is None or all(submitted[key] == now[key] for key in ("sha", "diff")):
        return now
    then_name, now_name = (
        f"{code['sha']}" + (f" with changes {code['diff']}" if code["diff"] else "") for code in (submitted, now)
    )
    log.warning("the code has changed since this job was submitted: then %s, now %s", then_name, now_name)
    return now | {"submitted": submitted}


def _versions() -> dict[str, str]:
    packages = ("anomaly-lab", "torch", "torchvision", "lightning", "torchmetrics", "hydra-core", "numpy")
    return {"python": platform.python_version()} | {package: version(package) for package in packages}


def _device(trainer: Trainer) -> tuple[str, float]:
    """The device's name and the peak of memory on it, in MB (on the CPU: of the process)."""
    device = trainer.strategy.root_device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device), torch.cuda.max_memory_allocated(device) / 2**20
    return device.type, peak_memory()


def peak_memory() -> float:
    """Most memory that this process has held, in MB: what it was before its program was loaded is not its own."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 2**10
    except (OSError, StopIteration):  # not Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def run(cfg: DictConfig, callbacks: Sequence[Callback] = ()) -> dict[str, Any] | None:
    """Make the run that ``cfg`` describes, as far as it is not made yet, and return its ``result.json``.

    A finished run is returned as it is. A started one resumes after its last whole epoch, with the same weights to
    the bit on the same kind of device. None if another process is busy with the same run.

    Raises:
        ValueError: the configuration or the data do not fit; one line says what to do.
        Diverged: training left the finite numbers.
        OutOfMemory: the device's memory, or the machine's, is too small.

    Whatever ends a started run, but a signal, is recorded in ``failure.json``.
    """
    identity = config.identity(cfg)
    out = config.run_dir(cfg)
    result = config.finished(cfg)
    if result is not None:
        log.info("%s: done before, nothing to do", out)
        return result
    with _alone(out) as alone:
        if not alone:
            log.warning("%s: another process is busy with this run; left to it", out)
            return None
        try:
            result = config.finished(cfg)  # another process may have made it in between
            if result is not None:
                return result
            (out / "result.json").unlink(missing_ok=True)  # without the test AUROC that is asked for now
            with tracking.opened(cfg, out, identity) as tracker, numerics(cfg.trainer.precision):
                try:
                    result = _make(cfg, identity, out, tracker, callbacks)
                except (torch.OutOfMemoryError, MemoryError) as error:
                    raise OutOfMemory(_too_large(cfg)) from error
        except Exception as error:
            failure = {"identity": identity, "error": " ".join(f"{type(error).__name__}: {error}".split())}
            try:
                write_json(out / "failure.json", failure | {"traceback": traceback.format_exc(), "time": _now()})
            except OSError as second:
                if not isinstance(error, OSError):  # else it says the same: the disk is full
                    log.warning("the failure itself cannot be recorded: %s", second)
            raise
        return result


def _too_large(cfg: DictConfig) -> str:
    memory = ""
    if torch.cuda.is_available():
        free, total = (value / 2**20 for value in torch.cuda.mem_get_info())
        memory = f"; {total:.0f} MB in all, {free:.0f} MB of them free now"
    fewer = "lower hydra.launcher.models, " if turns.shared() else ""
    scored = cfg.trainer.score_batch_size or scored_at_once(torch.device("cuda" if memory else "cpu"))
    return (
        f"out of memory with model.batch_size={cfg.model.batch_size} and "
        f"trainer.score_batch_size={scored}{memory}: {fewer}free the device of other processes, lower "
        "trainer.score_batch_size where scoring failed (it changes no result), or model.batch_size or the networks' "
        "width (which makes another run)"
    )


def prune(out: Path) -> int:
    """Keep of the finished run in ``out`` only what scores new images; the bytes that were freed.

    Gone are the optimisers' states, two thirds of the file and more with Adam. A run that loses its result.json
    afterwards is trained anew instead of scored again.
    """
    path = out / "last.ckpt"
    with _alone(out) as alone:
        if not alone or not (out / "result.json").is_file() or not path.is_file():
            return 0
        checkpoint = load_checkpoint(path)
        if "optimizer_states" not in checkpoint:
            return 0
        before = path.stat().st_size
        for training in ("optimizer_states", "lr_schedulers", "loops", "callbacks"):
            checkpoint.pop(training, None)
        _WholeFiles().save_checkpoint(checkpoint, path)
        return before - path.stat().st_size


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _resumable(cfg: DictConfig, out: Path) -> tuple[Path | None, list[dict[str, float]]]:
    """The checkpoint to go on from and the history it holds; None and nothing for a fresh start."""
    path = out / "last.ckpt"
    if not path.is_file():
        return None, []
    try:
        checkpoint = load_checkpoint(path)
        history, settings = checkpoint["anomaly_lab"]["history"], checkpoint["settings"]
        watched = checkpoint["watched"]
    except (ValueError, KeyError, TypeError) as error:  # damaged, or whole and of another program
        log.warning("%s cannot be read: starting again (%s)", path, error)
        return None, []
    if "optimizer_states" not in checkpoint:
        log.info("%s: pruned to its weights, from which training cannot go on; starting again", out)
        return None, []
    config.refuse_other_settings(settings, cfg, out)
    if cfg.trainer.watch_test and not watched:
        log.info("%s: its test AUROC was not watched so far; starting again", out)
        return None, []
    return path, history


def _make(
    cfg: DictConfig,
    identity: dict[str, Any],
    out: Path,
    tracker: tracking.Tracker,
    callbacks: Sequence[Callback],
) -> dict[str, Any]:
    code = _code()  # now: what lies in the checkout when the run ends may be other code
    _threads(cfg)
    keep_freed_memory()
    if not 0 < cfg.trainer.threshold_quantile < 1:
        raise ValueError(f"trainer.threshold_quantile={cfg.trainer.threshold_quantile}: give a number between 0 and 1")
    data, split = make_data(cfg), instantiate(cfg.split)
    detector = make_detector(cfg, data.image_shape)
    resolved = OmegaConf.to_container(cfg, resolve=True)
    class_name = split.classes(data.images)[data.target]
    title = f"{identity['model']} {identity['dataset']} {class_name}"
    trainer = make_trainer(cfg, data, out, title, tracker, callbacks)
    device = trainer.strategy.root_device

    turns.own_stream(device)
    if device.type == "cuda":
        gc.collect()  # an earlier run of this process that failed may still hold memory, in cycles
        torch.cuda.reset_peak_memory_stats(device)

    checkpoint, history = _resumable(cfg, out)
    tracker.start(history)
    detector.to(device).seed_noise(stream(cfg.seed, "noise"))
    if checkpoint is not None:
        log.info("%s: resuming", out)
    elif type(detector).before_fit is not Detector.before_fit:  # else nobody wants all images at once
        detector.eval()
        with torch.no_grad():
            detector.before_fit(data.prepared("train").to(device))
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*constructed with capturable=True.*")  # the steps before a capture
        warnings.filterwarnings("ignore", message=".*`training_step` returned `None`.*|.*log_every_n_steps.*")
        trainer.fit(detector.train(), datamodule=data, ckpt_path=checkpoint, weights_only=True)
        assert int(detector.epochs_done) == trainer.max_epochs, "a half-trained detector must not be scored"
        detector.to(device).finish_fit(lambda: data.prepared("train").to(device))
        trainer.save_checkpoint(out / "last.ckpt", weights_only=False)
        started = time.perf_counter()
        trainer.test(detector, datamodule=data, verbose=False)
    score_seconds = time.perf_counter() - started

    val_score = detector.scores_of("val")[0].numpy()
    score, index = (tensor.numpy() for tensor in detector.scores_of("test"))
    partition = data.partition
    assert np.array_equal(index, partition.test), "test images came in another order than they were asked for"
    if np.ptp(score) == 0:
        raise Diverged(f"training collapsed: every test image has the score {score[0]}; lower the learning rate")
    _refuse_collapse(detector, data)
    threshold = metrics.threshold_from_normals(val_score, cfg.trainer.threshold_quantile)
    decided = detector.decisions_of("test")
    oracle = [row["oracle_auroc"] for row in detector.history if "oracle_auroc" in row]
    arrays: dict[str, Any] = {
        "score": score.astype(np.float32),
        "truth": partition.test_truth,
        "label": data.images.labels[partition.test],
        "index": partition.test,
        "val_score": val_score.astype(np.float32),
    }
    write_whole(out / "scores.npz", lambda file: np.savez_compressed(file, **arrays))
    name, memory = _device(trainer)
    seconds = sum(row["seconds"] for row in detector.history)
    result = {
        "schema": SCHEMA,
        "identity": identity,
        "class_name": class_name,
        "role": split.role,
        "image_shape": list(data.image_shape),
        "stored_shape": list(data.images.pixels.shape[1:]),
        "metrics": metrics.evaluate(score, partition.test_truth, threshold=threshold, decided=decided)
        | {"threshold": threshold, "val_score": float(val_score.mean(dtype=np.float64))}
        | {"oracle_auroc": max(oracle, default=None)}
        | (_batch_norm_leak(detector.to(device), data, device) if cfg.trainer.measure_leak else {}),
        "by_kind": _by_kind(cfg, data, score, threshold, decided),
        "partition": {
            "fingerprint": partition.fingerprint,
            "version": split.version,
            "train": len(partition.train),
            "train_anomalous": int(partition.train_truth.sum()),
            "val": len(partition.val),
            "test_normal": int((partition.test_truth == 0).sum()),
            "test_anomalous": int(partition.test_truth.sum()),
        },
        "config": resolved,
        "settings": config.settings(cfg),
        "experiment": cfg.choices.experiment,
        "git": code,
        "earlier_code": trainer.checkpoint_callback.earlier_code,  # type: ignore[union-attr]
        "versions": _versions(),
        "device": name,
        "finished": _now(),
        "seconds": {"fit": round(seconds, 3), "score": round(score_seconds, 3)},
        "images_per_second": round(int(detector.images_seen) / seconds, 1) if seconds else None,
        "peak_memory_mb": round(memory, 1),
        "set_aside": _set_aside(detector, data, out),
        "epochs": int(detector.epochs_done),
        "steps": int(detector.steps_done),
        "history": detector.history,
    }
    _draw(detector.to(device).eval(), data, score, result, out / "figures")
    tracker.publish(result, out / "figures", arrays)  # before the run counts as done: a killed one shows it again
    (out / "failure.json").unlink(missing_ok=True)  # of an earlier attempt; before, so that no finished run keeps one
    write_json(out / "result.json", result)
    return result


def _refuse_collapse(detector: Detector, data: OneClassData) -> None:
    """Raise where a method that reconstructs gives the same image for every image; no label is looked at."""
    if int(detector.steps_done) < HARDLY_BEGUN:
        return  # weights of 0.02 say almost the same of every image until they have grown
    images = data.prepared("val", range(min(64, len(data.partition.val)))).to(detector.device)  # (B,C,S,S)
    detector.eval()
    with torch.no_grad():
        rebuilt = detector.reconstruct(images)
    if rebuilt is None or images.std(0).max() == 0:
        return
    if rebuilt.std(0).max() < COLLAPSED * rebuilt.abs().mean():
        raise Diverged(
            f"training collapsed: {len(images)} different held-out images have the same reconstruction; "
            "lower the learning rate"
        )


def _by_kind(
    cfg: DictConfig, data: OneClassData, score: np.ndarray, threshold: float | None, decided: torch.Tensor | None
) -> dict[str, Any]:
    """Metrics on all test normals and some of the anomalies.

    ``auroc`` holds one number for each class of anomalies. Where contaminating classes are named, ``seen`` holds all
    metrics for those, ``unseen`` for the others; they are named at rate 0 as well, for comparison.
    """
    truth, labels = data.partition.test_truth, data.images.labels[data.partition.test]
    names = data.images.class_names

    def chosen(kinds: Sequence[int]) -> np.ndarray:
        return (truth == 0) | np.isin(labels, kinds)

    kinds = np.unique(labels[truth == 1]).tolist()
    found: dict[str, Any] = {
        "auroc": {names[kind]: metrics.auroc(score[some], truth[some]) for kind in kinds for some in [chosen([kind])]}
    }
    split = instantiate(cfg.split)
    if split.contamination.classes is not None:
        seen = split.contaminating(data.images, data.target)
        for name, group in (("seen", seen), ("unseen", [kind for kind in kinds if kind not in seen])):
            some = chosen(group)
            if truth[some].any():
                rule = None if decided is None else decided.numpy()[some]
                found[name] = metrics.evaluate(score[some], truth[some], threshold=threshold, decided=rule)
    return found


def _set_aside(detector: Detector, data: OneClassData, out: Path) -> list[dict[str, Any]]:
    """What the method set aside, a row a set, with its true precision and recall; the images in set_aside.npz."""
    sets = {name: positions.cpu().numpy() for name, positions in detector.set_aside().items()}
    if not sets:
        return []
    partition, rows = data.partition, []
    anomalous = int(partition.train_truth.sum())
    for name, positions in sets.items():
        right = int(partition.train_truth[positions].sum())
        rows.append(
            {
                "name": name,
                "images": len(positions),
                "precision": right / len(positions) if len(positions) else None,
                "recall": right / anomalous if anomalous else None,
            }
        )
    arrays: dict[str, Any] = {name: partition.train[positions] for name, positions in sets.items()}
    write_whole(out / "set_aside.npz", lambda file: np.savez_compressed(file, **arrays))
    return rows


def _batch_norm_leak(detector: Detector, data: OneClassData, device: torch.device) -> dict[str, float]:
    """AUROC of scores taken with batch norm in training mode: on the test set mixed, and sorted by truth.

    The second is what published code of GANomaly's family does: a batch of only normals, or only anomalies, is
    normalised by its own statistics, so its members' scores know their neighbours' label. Never a result.
    """
    layers = [module for module in detector.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    tracking_statistics = [layer.track_running_stats for layer in layers]
    pixels, truth, _ = data.part("test", device)
    by_truth = torch.argsort(truth.cpu(), stable=True)
    mixed = torch.from_numpy(np.random.RandomState(0).permutation(len(truth)))
    found = {}
    try:
        detector.eval()
        for layer in layers:
            layer.train()
            layer.track_running_stats = False  # they stay as they are
        for name, order in (("oracle_shuffled_auroc", mixed), ("oracle_sorted_auroc", by_truth)):
            batches = list(order.to(pixels.device).split(data.batch_size))
            if len(batches) > 1 and len(batches[-1]) == 1:  # of which there are no statistics
                batches[-2:] = [torch.cat(batches[-2:])]
            with torch.no_grad():
                score = torch.cat([detector.score(data.prepare(pixels[some].to(device))).float() for some in batches])
            found[name] = metrics.auroc(score.cpu().numpy(), truth.cpu().numpy()[order.numpy()])
    finally:
        for layer, tracked in zip(layers, tracking_statistics, strict=True):
            layer.track_running_stats = tracked
        detector.eval()
    return found


def _draw(detector: Detector, data: OneClassData, score: np.ndarray, result: Mapping[str, Any], folder: Path) -> None:
    """The run's pictures, from what is written beside them."""
    identity, measured, truth = result["identity"], result["metrics"], data.partition.test_truth
    title = f"{identity['model']}, {identity['dataset']} {identity['split']}, {result['role']}: {result['class_name']}"
    interval = (measured["auroc_low"], measured["auroc_high"])
    figures.save(figures.roc(score, truth, interval, title), folder / "roc.png")
    figures.save(figures.score_histogram(score, truth, measured["threshold"], title), folder / "scores.png")
    if result["history"]:
        figures.save(figures.training_curves(result["history"], title), folder / "training.png")
    chosen: list[int] = []
    captions: list[str] = []
    for kind, name in enumerate(("normal", "anomalous")):
        members = np.flatnonzero(truth == kind)
        ranked = members[np.argsort(score[members], kind="stable")]
        count = min(4, len(ranked) // 2)
        for end, some in (("most normal", ranked[:count]), ("most anomalous", ranked[len(ranked) - count :])):
            chosen += some.tolist()
            captions += [f"{name} images, {end}"] * count
    if not chosen:
        return
    x = data.prepared("test", chosen).to(detector.device)
    with torch.no_grad():
        reconstruction, maps = detector.reconstruct(x), detector.anomaly_map(x)
    grid = figures.reconstruction_grid(
        data.prepare.displayable(x).cpu().numpy(),
        None if reconstruction is None else data.prepare.displayable(reconstruction).cpu().numpy(),
        None if maps is None else maps.cpu().numpy(),
        score[chosen],
        captions,
    )
    figures.save(grid, folder / "reconstructions.png")
