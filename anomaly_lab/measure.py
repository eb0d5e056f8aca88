"""From a fitted detector and its data to numbers, rejected images and pictures.

Legend of the shape comments: M test images, B images in a batch, C channels, S = size the networks see.
"""

from __future__ import annotations

import math
import platform
import resource
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from anomaly_lab import figures, metrics, turns
from anomaly_lab.build import make_networks
from anomaly_lab.config import Job
from anomaly_lab.course import Diverged, Scored
from anomaly_lab.data import OneClassData
from anomaly_lab.detector import Detector, scores
from anomaly_lab.errors import RunFailed

ALONE, COMPANY = 8, 0.01
"""Test images that are scored once more by themselves, and how far, in standard deviations of all scores, one may move:
sums in another order, which a search at test time amplifies, move a score by less."""

ORACLES = ("oracle_auroc", "oracle_sorted_auroc")
"""What looks at test labels after every epoch, where it is asked for: `WatchTest`."""


class Measured(NamedTuple):
    """The measurements of a fitted detector: parts of ``result.json`` and the arrays beside it."""

    metrics: dict[str, float | None]
    by_kind: dict[str, Any]
    by_term: dict[str, float]  # AUROC of each term of the score
    learned: dict[str, float | None]  # `learned`
    fitted: dict[str, float | list[int] | None]  # what fitting found, by name: a finite number, or an array's shape
    rejected_images: list[dict[str, Any]]  # a row a set, with its true precision and recall
    sets: dict[str, np.ndarray]  # those images, as indices into the data set; what rejected_images.npz holds
    scores: dict[str, np.ndarray]  # what scores.npz holds


class BatchDependentScore(RunFailed):
    """A score depends on the other images that it was computed with."""


def measure(job: Job, detector: Detector, data: OneClassData, history: Sequence[Mapping[str, float]]) -> Measured:
    """Measure the scores of the detector's last pass over ``data``; with ``trainer.measure_leak`` it scores anew.

    Args:
        history: a row an epoch, with `ORACLES` where they were recorded.

    Raises:
        Diverged: training collapsed: all images have the same score.
        BatchDependentScore: see `refuse_company`.
    """
    trainer, partition, scored = job.cfg.trainer, data.partition, detector.scored
    at = scored.test.places(partition.test)
    val_score, score = scored.val.score, scored.test.score[at]
    if np.ptp(score) == 0:
        raise Diverged(f"training collapsed: every test image has the score {score[0]}; lower the learning rate")
    refuse_company(detector, data, score)
    decided = None if scored.test.decided is None else scored.test.decided[at]
    terms = {name: term[at] for name, term in scored.test.terms.items()}
    best = {name: max((row[name] for row in history if name in row), default=None) for name in ORACLES}
    found, kinds = of_scores(job, data, val_score, score, decided)
    found["oracle_auroc"] = best["oracle_auroc"]
    if trainer.measure_leak:
        assert found["auroc"] is not None
        found |= batch_norm_leak(detector, data, found["auroc"])
        found["oracle_sorted_best_auroc"] = best["oracle_sorted_auroc"]
    rows, sets = _rejected(detector, data)
    return Measured(
        found,
        kinds,
        {name: metrics.auroc(term, partition.test_truth) for name, term in terms.items()},
        learned(job, detector, data),
        _fitted(detector),
        rows,
        sets,
        {
            "score": score.astype(np.float32),
            "truth": partition.test_truth,
            "label": data.images.labels[partition.test],
            "index": partition.test,
            "val_score": val_score.astype(np.float32),
            **({} if decided is None else {"decided": decided}),
            **{f"term_{name}": term for name, term in terms.items()},
            **{f"val_term_{name}": term for name, term in scored.val.terms.items()},
        },
    )


def of_scores(
    job: Job, data: OneClassData, val_score: np.ndarray, score: np.ndarray, decided: np.ndarray | None = None
) -> tuple[dict[str, float | None], dict[str, Any]]:
    """``metrics`` and ``by_kind`` of a result, from the scores of the held-out normals and of the test images (M,)."""
    threshold = metrics.threshold_from_normals(val_score, job.cfg.trainer.threshold_quantile)
    found = metrics.evaluate(score, data.partition.test_truth, threshold=threshold, decided=decided)
    found |= {"threshold": threshold, "val_score": float(val_score.mean(dtype=np.float64)), "oracle_auroc": None}
    return found, _by_kind(job, data, score, threshold, decided)


def refuse_company(detector: Detector, data: OneClassData, score: np.ndarray) -> None:
    """Score `ALONE` test images one at a time and raise if a score depends on the rest of its batch.

    Raises:
        BatchDependentScore: a score moves by more than `COMPANY` of the spread of all of them.
    """
    chosen = np.random.RandomState(0).permutation(len(score))[:ALONE]
    images = data.prepared("test", chosen.tolist()).to(detector.device)  # (A,C,S,S)
    alone = np.array([scores(detector, image[None]).score.item() for image in images])
    moved = np.abs(alone - score[chosen])
    if moved.max() > COMPANY * score.std(dtype=np.float64) + 1e-5 * np.abs(score[chosen]).max():
        worst = int(moved.argmax())
        raise BatchDependentScore(
            f"score() looks at the other images of a batch: test image {chosen[worst]} has {score[chosen[worst]]:.6g} "
            f"among others and {alone[worst]:.6g} alone; score each image by itself (batch norm in eval mode, no "
            "statistics over a batch, the same noise for every image)"
        )


def learned(job: Job, detector: Detector, data: OneClassData) -> dict[str, float | None]:
    """What tells a detector that learned from one that did not, without a label.

    ``explained_variance``: 1 - |x - reconstruction|^2 / |x - mean training image|^2 over the held-out normals x; 0 is
    what the mean image reaches, and None a method that does not reconstruct. ``distinct_scores``: of the test images.
    ``parameter_change``: |theta - theta_0| / |theta_0| against the weights before training; None without any.
    """
    rebuilt_error = mean_error = 0.0
    mean: Tensor | None = None  # (C,S,S)
    with torch.no_grad():
        for x in data.prepared("val").to(detector.device).split(100):
            rebuilt = detector.reconstruct(x)
            if rebuilt is None:
                break
            if mean is None:  # not for methods without reconstructions: it takes all training images
                mean = data.prepared("train").mean(0).to(detector.device)
            rebuilt_error += float((x - rebuilt).square().sum())
            mean_error += float((x - mean).square().sum())
        after = dict(detector.named_parameters())
        before = dict(make_networks(job.cfg, data.image_shape).named_parameters()) if after else {}
        pairs = [
            (parameter.cpu(), before[name])
            for name, parameter in after.items()
            if name in before and before[name].shape == parameter.shape
        ]
        moved = sum(float((now - then).square().sum()) for now, then in pairs)
        size = sum(float(then.square().sum()) for _, then in pairs)
    return {
        "explained_variance": 1 - rebuilt_error / mean_error if mean_error else None,
        "distinct_scores": len(np.unique(detector.scored.test.score)),
        "parameter_change": (moved / size) ** 0.5 if size else None,
    }


def _fitted(detector: Detector) -> dict[str, float | list[int] | None]:
    """Every number that fitting kept, such as a bandwidth, and the shape of every array, by name; None: not finite."""
    kept: dict[str, Tensor] = {name: getattr(detector, name) for name in sorted(detector.fitted_names)}
    numbers = {name: value.item() if value.isfinite() else None for name, value in kept.items() if not value.ndim}
    return {name: numbers[name] if name in numbers else list(value.shape) for name, value in kept.items()}


def _by_kind(
    job: Job, data: OneClassData, score: np.ndarray, threshold: float | None, decided: np.ndarray | None
) -> dict[str, Any]:
    """Metrics on all test normals and some of the anomalies.

    ``auroc`` holds one number for each class of anomalies. Where the classes of contaminating or known anomalies are
    named, ``seen`` holds all metrics for those, ``unseen`` for the others; they are named at rate 0 as well, for
    comparison.
    """
    truth, labels = data.partition.test_truth, data.images.labels[data.partition.test]
    names = data.images.class_names

    def chosen(kinds: Sequence[int]) -> np.ndarray:
        return (truth == 0) | np.isin(labels, kinds)

    kinds = np.unique(labels[truth == 1]).tolist()
    found: dict[str, Any] = {
        "auroc": {names[kind]: metrics.auroc(score[some], truth[some]) for kind in kinds for some in [chosen([kind])]}
    }
    if (seen := job.split.seen(data.images, data.target)) is not None:
        for name, group in (("seen", seen), ("unseen", [kind for kind in kinds if kind not in seen])):
            some = chosen(group)
            if truth[some].any():
                rule = None if decided is None else decided[some]
                found[name] = metrics.evaluate(score[some], truth[some], threshold=threshold, decided=rule)
    return found


def _rejected(detector: Detector, data: OneClassData) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """The sets of training images that the method took for anomalies: how right it was, and which they are."""
    partition, rows, sets = data.partition, [], {}
    anomalous = int(partition.train_truth.sum())
    for name, chosen in detector.rejected_images().items():
        positions = chosen.cpu().numpy()
        right = int(partition.train_truth[positions].sum())
        rows.append(
            {
                "name": name,
                "images": len(positions),
                "precision": right / len(positions) if len(positions) else None,
                "recall": right / anomalous if anomalous else None,
            }
        )
        sets[name] = partition.train[positions]
    return rows, sets


def batch_norm_leak(detector: Detector, data: OneClassData, auroc: float) -> dict[str, float]:
    """AUROC of scores taken with batch norm in training mode: on the test set mixed, and sorted by truth.

    The second is what published code of GANomaly's family does: a batch of only normals, or only anomalies, is
    normalised by its own statistics, so its members' scores depend on their neighbours' label. Never a result. Without
    batch norm both are ``auroc``, the honest one.
    """
    layers = [module for module in detector.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if not layers:  # nothing looks at a batch (`refuse_company`)
        return {"oracle_shuffled_auroc": auroc, "oracle_sorted_auroc": auroc}
    tracking_statistics = [layer.track_running_stats for layer in layers]
    loader, truth = data.loader("test"), torch.from_numpy(data.partition.test_truth)
    by_truth = torch.argsort(truth, stable=True)
    mixed = torch.from_numpy(np.random.RandomState(0).permutation(len(truth)))
    found = {}
    try:
        detector.eval()
        for layer in layers:
            layer.train()
            layer.track_running_stats = False  # they stay as they are
        for name, order in (("oracle_shuffled_auroc", mixed), ("oracle_sorted_auroc", by_truth)):
            batches = list(order.to(loader.pixels.device).split(data.batch_size))
            if len(batches) > 1 and len(batches[-1]) == 1:  # a single image has no batch statistics
                batches[-2:] = [torch.cat(batches[-2:])]
            with torch.no_grad():
                score = torch.cat([detector.score(loader.batch(some).x).float() for some in batches])
            found[name] = metrics.auroc(score.cpu().numpy(), truth.numpy()[order.numpy()])
    finally:
        for layer, tracked in zip(layers, tracking_statistics, strict=True):
            layer.track_running_stats = tracked
        detector.eval()
    return found


class WatchTest(Callback):
    """Test AUROCs after every epoch, for the figures beside the honest one; no method's hook sees them.

    Args:
        data: the data module of the run.
        names: what is recorded: ``oracle_auroc``, and ``oracle_sorted_auroc`` of `batch_norm_leak`. What was recorded
            before a resume is kept, whatever is recorded now.
    """

    def __init__(self, data: OneClassData, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._seen: dict[int, dict[str, float]] = {}  # by epoch

        def look(detector: Detector) -> dict[str, float]:
            scored, loader = Scored(), data.loader("test").shuffled()
            for batch in loader:
                score, *_ = scores(detector, batch.x)
                scored.update(score, batch.index, batch.truth)
                turns.pass_on()
            if not np.isfinite(scored.score).all():
                return {"oracle_auroc": math.nan}
            found = {"oracle_auroc": scored.compute()["auroc"]}
            if "oracle_sorted_auroc" in names:
                found |= batch_norm_leak(detector, data, found["oracle_auroc"])
            return {name: found[name] for name in names}

        self._look = look  # a closure: no attribute leads from here to the data

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Detector)
        if self.names and pl_module.scorable and not trainer.sanity_checking:
            epoch = int(pl_module.epochs_done) + 1
            self._seen[epoch] = self._seen.get(epoch, {}) | self._look(pl_module)
            if not np.isfinite(list(self._seen[epoch].values())).all():
                raise Diverged(f"training diverged: a score is not finite at epoch {epoch}; lower the learning rate")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        assert isinstance(pl_module, Detector)
        epochs = [self._seen.get(int(row["epoch"]), {}) for row in pl_module.course.history]
        whole = [name for name in ORACLES if name in self.names or (epochs and all(name in seen for seen in epochs))]
        checkpoint["watched"] = {"whole": whole, "seen": {epoch: dict(seen) for epoch, seen in self._seen.items()}}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._seen = {epoch: dict(seen) for epoch, seen in checkpoint["watched"]["seen"].items()}

    def joined(self, history: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
        """The rows of ``history`` with what was recorded after their epochs."""
        return [{**row, **self._seen.get(int(row["epoch"]), {})} for row in history]


def draw(
    detector: Detector | None, data: OneClassData, score: np.ndarray, result: Mapping[str, Any], folder: Path
) -> None:
    """Write the run's pictures: curves and histograms of ``score`` (M,) and ``result``, and examples, with what
    ``detector`` makes of them; a run made of others has none."""
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
    maps = reconstruction = None
    if detector is not None:
        x = data.prepared("test", chosen).to(detector.device)
        with torch.no_grad():
            maps = detector.anomaly_map(x)
            if data.prepare.features is None:  # of features: no picture
                reconstruction = detector.reconstruct(x)
    grid = figures.reconstruction_grid(
        data.displayable("test", chosen).numpy(),
        None if reconstruction is None else data.prepare.displayable(reconstruction).cpu().numpy(),
        None if maps is None else maps.cpu().numpy(),
        score[chosen],
        captions,
    )
    figures.save(grid, folder / "reconstructions.png")


def used(device: torch.device) -> tuple[str, float]:
    """The device's name, a CPU's with the threads it computed with, and the peak of memory on it, in MB (on the CPU: of
    the process)."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device), torch.cuda.max_memory_allocated(device) / 2**20
    threads = torch.get_num_threads()
    return f"{processor()}, {threads} thread{'s' * (threads != 1)}", peak_memory()


def processor() -> str:
    """The CPU as its maker calls it, and the widest vectors that torch uses on it: "AMD EPYC, AVX2".

    Kernels are chosen by both and add in different orders, wide ones also by the number of threads (`used`), so a run
    gives the same digits only where all are equal: docs/rounding.md.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(names, platform.processor() or platform.machine())}, {torch.backends.cpu.get_cpu_capability()}"


def peak_memory() -> float:
    """Peak resident memory of this process, in MB: VmHWM, for ru_maxrss counts the process image before exec too."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 2**10
    except (OSError, StopIteration):  # not Linux; macOS counts bytes, the others KB
        unit = 2**20 if platform.system() == "Darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
