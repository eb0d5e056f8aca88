"""One run: fit, score, measure, write. Idempotent and resumable; the files in its folder are the truth."""

from __future__ import annotations

import gc
import json
import logging
import os
import platform
import time
import warnings
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from omegaconf import DictConfig, OmegaConf

from anomaly_lab import config, record, switches, tracking, turns
from anomaly_lab.build import epochs, load_checkpoint, make_data, make_detector, make_trainer, write_checkpoint
from anomaly_lab.calibration import surprisal
from anomaly_lab.config import Job
from anomaly_lab.data import OneClassData, scored_at_once
from anomaly_lab.detector import Detector
from anomaly_lab.errors import RunFailed
from anomaly_lab.files import Lock, locked, write_atomically, write_json
from anomaly_lab.measure import ORACLES, WatchTest, draw, measure, of_scores, used

log = logging.getLogger(__name__)

SCHEMA = 1


class OutOfMemory(RunFailed):
    """The run does not fit into the memory of its device."""


def run(cfg: DictConfig | Job, callbacks: Sequence[Callback] = ()) -> dict[str, Any] | None:
    """Make the run that ``cfg`` describes, as far as it is not made yet, and return its ``result.json``.

    A finished run is returned as it is. A started one resumes after its last whole epoch, with the same weights to
    the bit on the same kind of device. None if another process is busy with the same run.

    Raises:
        ValueError: the configuration or the data do not fit, or another process is busy with a run that this one is
            made of; one line says what to do.
        Diverged: training diverged or collapsed.
        OutOfMemory: the device's memory, or the machine's, is too small.

    ``failure.json`` records what ended a started run, signals excepted.
    """
    job = cfg if isinstance(cfg, Job) else config.job(cfg)
    cfg = job.cfg
    result = job.finished()
    if result is not None:
        log.info("%s: done before, nothing to do", job.out)
        return result
    members = config.members(cfg)
    for member in members:
        if run(member) is None:
            raise ValueError(f"{member.out} is part of this run and another process is busy with it: start again later")
    with locked(job.out) as lock:
        if lock is None:
            log.warning("%s: another process is busy with this run; left to it", job.out)
            return None
        try:
            result = job.finished()  # another process may have made it in between
            if result is not None:
                return result
            (job.out / "result.json").unlink(missing_ok=True)  # it lacks an oracle metric that is asked for now
            with (
                tracking.opened(cfg, job.out, job.identity) as tracker,
                switches.of_a_run(cfg.trainer.precision, cfg.trainer.threads),
            ):
                try:
                    if members:
                        result = _fuse(job, members, tracker, lock)
                    else:
                        result = _make(job, tracker, [*callbacks, _Owner(lock)], lock)
                except (torch.OutOfMemoryError, MemoryError) as error:
                    raise OutOfMemory(_too_large(cfg)) from error
        except Exception as error:
            if not lock.kept():
                raise  # nothing is written into somebody else's folder
            try:
                record.write_failure(job.out, error, identity=job.identity)
            except OSError as second:
                if not isinstance(error, OSError):  # else it says the same: the disk is full
                    log.warning("the failure itself cannot be recorded: %s", second)
            raise
        return result


class _Owner(Callback):
    """Ends a training whose folder was removed or replaced, before it writes another epoch into it."""

    def __init__(self, lock: Lock) -> None:
        self._lock = lock

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _refuse_loss(self._lock)


def _refuse_loss(lock: Lock) -> None:
    if not lock.kept():
        raise RunFailed(f"{lock.path.parent} was removed while its run was made, so it ends: start it again")


def _make(job: Job, tracker: tracking.Tracker, callbacks: Sequence[Callback], lock: Lock) -> dict[str, Any]:
    cfg, split, out = job.cfg, job.split, job.out
    code = _code()  # now: what lies in the checkout when the run ends may be other code
    data = make_data(job)
    detector = make_detector(cfg, data.image_shape, epochs(cfg, data))
    class_name = split.title(data.images, data.target)
    title = f"{job.identity['model']} {job.identity['dataset']} {class_name}"
    watch = WatchTest(data, _oracles(cfg))
    trainer = make_trainer(job, data, title, tracker, [watch, *callbacks])
    device = trainer.strategy.root_device

    turns.own_stream(device)
    if device.type == "cuda":
        gc.collect()  # an earlier run of this process that failed may still hold memory, in cycles
        torch.cuda.reset_peak_memory_stats(device)

    checkpoint, history = _resumable(job)
    tracker.start(history)
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*constructed with capturable=True.*")  # the steps before a capture
        warnings.filterwarnings("ignore", message=".*`training_step` returned `None`.*|.*log_every_n_steps.*")
        started = time.perf_counter()
        _fit(job, detector, data, trainer, checkpoint)
        fit_seconds = sum(row["seconds"] for row in detector.course.history) or time.perf_counter() - started
        started = time.perf_counter()
        trainer.test(detector, datamodule=data.testing(device), verbose=False)
    score_seconds = time.perf_counter() - started
    device_name, memory = used(device)
    detector.to(device).eval()  # Lightning leaves it on the CPU
    history = watch.joined(detector.course.history)
    measured = measure(job, detector, data, history)

    _refuse_loss(lock)
    arrays = {"scores.npz": measured.scores} | ({"rejected_images.npz": measured.sets} if measured.sets else {})
    for name, content in arrays.items():
        _write_arrays(out / name, content)
    partition = data.partition
    result = {
        "schema": SCHEMA,
        "identity": job.identity,
        "class_name": class_name,
        "classes": len(split.targets(data.images)) if isinstance(data.target, int) else None,  # of which one is named
        "role": split.role,
        "image_shape": list(data.image_shape),
        "stored_shape": list(data.images.pixels.shape[1:]),
        "metrics": measured.metrics,
        "by_kind": measured.by_kind,
        "by_term": measured.by_term,
        "learned": measured.learned,
        "fitted": measured.fitted,
        "decided_by": "own rule" if "decided" in measured.scores else "held-out normals",
        "partition": {
            "fingerprint": partition.fingerprint,
            "version": split.version,
            "train": len(partition.train),
            "train_anomalous": int(partition.train_truth.sum()),  # contaminating and known ones
            "known": len(partition.known),
            "val": len(partition.val),
            "test_normal": int((partition.test_truth == 0).sum()),
            "test_anomalous": int(partition.test_truth.sum()),
            "test_copies": data.test_copies(),
        },
        "config": OmegaConf.to_container(cfg, resolve=True),
        "settings": job.settings,
        "experiment": cfg.choices.experiment,
        "git": code,
        "earlier_code": trainer.checkpoint_callback.earlier_code,  # type: ignore[union-attr]
        "versions": _versions(),
        "device": device_name,
        "finished": _now(),
        "seconds": {"fit": round(fit_seconds, 3), "score": round(score_seconds, 3)},
        "images_per_second": round(int(detector.images_seen) / fit_seconds, 1) if detector.step else None,
        "peak_memory_mb": round(memory, 1),
        "rejected_images": measured.rejected_images,
        "sha256": {name: record.checksum(out / name) for name in arrays},
        "epochs": int(detector.epochs_done),
        "steps": int(detector.steps_done),
        "history": history,
    }
    tracker.watched(history)  # only now: no hook of the method can meet it in a logger
    if cfg.trainer.figures:
        draw(detector, data, measured.scores["score"], result, out / "figures")
    tracker.publish(result, out / "figures", measured.scores)  # before the run counts as done: a killed one repeats it
    (out / record.FAILURE).unlink(missing_ok=True)  # of an earlier attempt; before, so that no finished run keeps one
    write_json(out / "result.json", result)
    return result


def _fuse(job: Job, members: Sequence[Job], tracker: tracking.Tracker, lock: Lock) -> dict[str, Any]:
    """The run whose score is the sum of its members' surprisal (`calibration`), each told by its held-out normals."""
    data = make_data(job)
    results: dict[str, dict[str, Any]] = {}
    sums = {"val_score": np.zeros(len(data.partition.val)), "score": np.zeros(len(data.partition.test))}
    for member in members:
        result = member.finished()
        assert result is not None
        with np.load(member.out / "scores.npz") as file:
            found = {part: torch.from_numpy(file[part]).double() for part in sums}
        if result["partition"]["fingerprint"] != data.partition.fingerprint:
            raise ValueError(f"{member.out} was made on another partition: delete that folder to make it anew")
        normal = found["val_score"].sort().values
        for part, scores in found.items():
            sums[part] += surprisal(scores, normal).numpy()
        results[result["identity"]["model"]] = result
    one, code = next(iter(results.values())), _code()
    shown: Any = OmegaConf.to_container(job.cfg, resolve=True)
    for key in ("pretrained", "labels"):  # tables list such runs in blocks of their own
        theirs = [made["config"]["model"][key] for made in results.values() if made["config"]["model"].get(key)]
        shown["model"] |= {key: theirs[0]} if theirs else {}
    arrays: dict[str, np.ndarray] = {**sums, "truth": data.partition.test_truth, "index": data.partition.test}
    arrays["label"] = data.images.labels[data.partition.test]
    measured, by_kind = of_scores(job, data, sums["val_score"], sums["score"])
    _refuse_loss(lock)
    _write_arrays(job.out / "scores.npz", arrays)
    result = {
        **{key: one[key] for key in ("schema", "class_name", "classes", "role", "stored_shape", "partition", "device")},
        "identity": job.identity,
        "image_shape": list(data.image_shape),
        "metrics": measured,
        "by_kind": by_kind,
        "by_term": {name: made["metrics"]["auroc"] for name, made in results.items()},
        "decided_by": "held-out normals",
        "fitted": {},
        "learned": dict.fromkeys(one["learned"]) | {"distinct_scores": len(np.unique(sums["score"]))},
        "config": shown,
        "settings": job.settings,
        "experiment": job.cfg.choices.experiment,
        "git": code,
        "earlier_code": [made["git"] for made in results.values() if made["git"] != code],
        "versions": _versions(),
        "finished": _now(),
        "seconds": {part: sum(made["seconds"][part] for made in results.values()) for part in ("fit", "score")},
        "images_per_second": None,
        "peak_memory_mb": max(made["peak_memory_mb"] for made in results.values()),
        "rejected_images": [],
        "sha256": {"scores.npz": record.checksum(job.out / "scores.npz")},
        **{"epochs": 0, "steps": 0, "history": []},
    }
    tracker.start([])
    if job.cfg.trainer.figures:
        draw(None, data, sums["score"], result, job.out / "figures")
    tracker.publish(result, job.out / "figures", arrays)
    (job.out / record.FAILURE).unlink(missing_ok=True)
    write_json(job.out / "result.json", result)
    return result


def _fit(job: Job, detector: Detector, data: OneClassData, trainer: Trainer, checkpoint: Path | None) -> None:
    """Train, from ``checkpoint`` on where there is one, until ``last.ckpt`` holds the fitted detector."""
    if checkpoint is not None:
        log.info("%s: resuming", job.out)
    loaders = data.fitting(trainer.strategy.root_device)
    trainer.fit(detector.train(), datamodule=loaders, ckpt_path=checkpoint, weights_only=True)
    assert int(detector.epochs_done) == trainer.max_epochs, "a half-trained detector must not be scored"
    trainer.save_checkpoint(job.out / "last.ckpt", weights_only=False)


def _oracles(cfg: DictConfig) -> list[str]:
    """What is recorded of the test images after every epoch; the leak only where both are asked for."""
    return [*ORACLES[: 1 + cfg.trainer.measure_leak]] if cfg.trainer.watch_test else []


def _write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    write_atomically(path, lambda file: np.savez_compressed(file, **arrays))


def _resumable(job: Job) -> tuple[Path | None, list[dict[str, float]]]:
    """The checkpoint to go on from and the history it holds; None and nothing for a fresh start."""
    path = job.out / "last.ckpt"
    if not path.is_file():
        return None, []
    try:
        checkpoint = load_checkpoint(path)
        history, settings = checkpoint["anomaly_lab"]["history"], checkpoint["settings"]
        missing = [name for name in _oracles(job.cfg) if name not in checkpoint["watched"]["whole"]]
    except (ValueError, KeyError, TypeError) as error:  # damaged, or whole and of another program
        log.warning("%s cannot be read: starting again (%s)", path, error)
        return None, []
    if "optimizer_states" not in checkpoint:
        log.info("%s: pruned to its weights, from which training cannot go on; starting again", job.out)
        return None, []
    job.refuse_other_run(checkpoint.get("identity", job.identity), path)  # those of earlier code do not say it
    job.refuse_other_settings(settings)
    if missing:
        log.info("%s: %s was not watched so far; starting again", job.out, " and ".join(missing))
        return None, []
    return path, history


def prune(out: Path) -> int:
    """Keep of the finished run in ``out`` only what scores new images; the bytes that were freed.

    Gone are the optimisers' states, two thirds of the file and more with Adam. A run that loses its result.json
    afterwards is trained anew instead of scored again.
    """
    path = out / "last.ckpt"
    with locked(out) as lock:
        if lock is None or not (out / "result.json").is_file() or not path.is_file():
            return 0
        checkpoint = load_checkpoint(path)
        if "optimizer_states" not in checkpoint:
            return 0
        before = path.stat().st_size
        for training in ("optimizer_states", "lr_schedulers", "loops", "callbacks"):
            checkpoint.pop(training, None)
        write_checkpoint(path, checkpoint)
        return before - path.stat().st_size


def _too_large(cfg: DictConfig) -> str:
    memory = ""
    if torch.cuda.is_available():
        free, total = (value / 2**20 for value in torch.cuda.mem_get_info())
        memory = f"; {total:.0f} MB in all, {free:.0f} MB of them free now"
    fewer = "lower hydra.launcher.n_jobs, " if turns.shared() else ""
    scored = cfg.trainer.score_batch_size or scored_at_once(torch.device("cuda" if memory else "cpu"))
    return (
        f"out of memory with model.batch_size={cfg.model.batch_size} and "
        f"trainer.score_batch_size={scored}{memory}: {fewer}free the device of other processes, lower "
        "trainer.score_batch_size where scoring failed (it changes no result), or model.batch_size or the networks' "
        "width (which makes another run)"
    )


def _code() -> dict[str, Any]:
    """`record.code`; with ``submitted``, and a warning, where a job runs other code than it was submitted with."""
    now = record.code()
    submitted = json.loads(os.environ.get(record.SUBMITTED, "null"))
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


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
