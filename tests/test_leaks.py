"""Planted leaks: every way by which truth once reached a method, or a test image its training, is shut by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from anomaly_lab import config
from anomaly_lab.batches import Batch
from anomaly_lab.data import OutOfReach
from anomaly_lab.measure import BatchDependentScore
from anomaly_lab.methods.shared_autoencoder import EncoderDecoderEncoder
from anomaly_lab.run import run

THIS = "model.detector._target_=test_leaks"
TINY = ["model=ede", "model.detector.width=4", "model.budget.epochs=2", "model.budget.epoch_steps=2"]


class ReadsTruth(EncoderDecoderEncoder):
    """Adds the truth of its batch to its loss."""

    def plays(self, batch: Batch) -> Iterator[Mapping[str, Tensor]]:
        for losses in super().plays(batch):
            assert batch.truth is not None, "a training batch carries no truth"
            yield {name: loss + batch.truth.float().mean() for name, loss in losses.items()}


class AsksTheTrainingSet(EncoderDecoderEncoder):
    def before_fit(self, images: Tensor) -> None:
        assert self.training_images.everything().truth is not None, "the training set carries no truth"


class AsksTheDataModule(EncoderDecoderEncoder):
    def before_epoch(self, epoch: int) -> None:
        self.found = self.trainer.datamodule.partition.test_truth  # type: ignore[attr-defined]


class AsksTheDataModuleWhileScoring(EncoderDecoderEncoder):
    def terms(self, x: Tensor) -> Mapping[str, Tensor]:
        if self.trainer.testing:
            self.found = self.trainer.datamodule.partition.test_truth  # type: ignore[attr-defined]
        return super().terms(x)


class TakesTestImages(EncoderDecoderEncoder):
    def before_epoch(self, epoch: int) -> None:
        _, _ = self.trainer.datamodule.test_dataloader()  # type: ignore[attr-defined]


class PicksTheBestEpoch(EncoderDecoderEncoder):
    """Remembers the epoch with the best test AUROC."""

    def before_epoch(self, epoch: int) -> None:
        if epoch > 1:
            self.best = max(self.course.history, key=lambda row: row["oracle_auroc"])


class PicksTheBestEpochFromTheLogger(EncoderDecoderEncoder):
    def before_epoch(self, epoch: int) -> None:
        if epoch > 1:
            self.best = max(self.trainer.logger._rows, key=lambda row: row["oracle_auroc"])  # type: ignore[union-attr]


class ComparesWithItsBatch(EncoderDecoderEncoder):
    """Takes the mean score of the batch off: of no use where test images are mixed, and refused all the same."""

    def combine(self, terms: Mapping[str, Tensor]) -> Tensor:
        score = super().combine(terms)
        return score - score.mean()


def asked(folder: Path, *overrides: str) -> Any:
    where = [f"runs={folder}", f"data_dir={folder}", "trainer.progress=false", "trainer.accelerator=cpu"]
    return config.compose([*TINY, *where, *overrides])


@pytest.mark.parametrize(
    ("leak", "error", "message"),
    [
        (ReadsTruth, AssertionError, "a training batch carries no truth"),
        (AsksTheTrainingSet, AssertionError, "the training set carries no truth"),
        (AsksTheDataModule, OutOfReach, "cannot reach the test half or its truth: 'partition' is not in its data mod"),
        (AsksTheDataModuleWhileScoring, OutOfReach, "cannot reach the test half or its truth: 'partition' is not in"),
        (TakesTestImages, OutOfReach, "a detector cannot reach the test half while it is fitted"),
        (PicksTheBestEpoch, KeyError, "^'oracle_auroc'$"),  # the rows of watched epochs lie elsewhere
        (PicksTheBestEpochFromTheLogger, KeyError, "^'oracle_auroc'$"),
        (ComparesWithItsBatch, BatchDependentScore, "looks at the other images of a batch"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_planted_leak_is_shut(leak: type, error: type[Exception], message: str, tmp_path: Path) -> None:
    cfg = asked(tmp_path, f"{THIS}.{leak.__name__}", "trainer.watch_test=true", "logger=csv")
    with pytest.raises(error, match=message):
        run(cfg)
    assert (config.job(cfg).out / "failure.json").is_file() and not (config.job(cfg).out / "result.json").exists()


OUTSIDE = """
from anomaly_lab.detector import Detector


class ToTheMean(Detector):
    \"\"\"Squared distance to the mean image: of the training images, or of the images scored together.\"\"\"

    def __init__(self, image_shape, *, leak):
        super().__init__(image_shape)
        self.leak = leak

    def after_fit(self, images):
        self.set_fitted("centre", images.mean(0))

    def score(self, x):
        return (x - (x.mean(0) if self.leak else self.centre)).square().flatten(1).mean(1)
"""


@pytest.mark.parametrize("leak", [False, True])
def test_a_method_from_outside_whose_score_looks_at_its_batch_is_refused_at_the_end_of_its_run(
    leak: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "conf/model").mkdir(parents=True)
    (tmp_path / "to_the_mean.py").write_text(OUTSIDE)
    config_of_it = "detector: {_target_: to_the_mean.ToTheMean, leak: false}\n"
    (tmp_path / "conf/model/to_the_mean.yaml").write_text(config_of_it)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv(config.EXTRA_CONFIGS, str(tmp_path / "conf"))
    where = [f"runs={tmp_path}", f"data_dir={tmp_path}", "trainer.progress=false", "trainer.accelerator=cpu"]
    cfg = config.compose(["model=to_the_mean", f"model.detector.leak={leak}", "logger=none", *where])
    if leak:
        with pytest.raises(BatchDependentScore, match="looks at the other images of a batch"):
            run(cfg)
        assert not (config.job(cfg).out / "result.json").exists()
    else:
        assert run(cfg) is not None


def test_neighbours_of_the_test_pass_do_not_share_their_label(tmp_path: Path) -> None:
    """What a batch-dependent score lived on: in the data set's order, all images of a batch are of one class."""
    seen: list[Tensor] = []

    class Looks(EncoderDecoderEncoder):
        def terms(self, x: Tensor) -> Mapping[str, Tensor]:
            if self.trainer.testing:
                seen.append(x)
            return super().terms(x)

    globals()["Looks"] = Looks
    result = run(asked(tmp_path, f"{THIS}.Looks", "logger=none", "trainer.score_batch_size=7"))
    assert result is not None
    with np.load(tmp_path / "digits.npz") as stored, np.load(next(tmp_path.rglob("scores.npz"))) as arrays:
        first, truth = stored["images"][arrays["index"]], arrays["truth"]
    batches = [x for x in seen if len(x) == 7][-3:]  # of the test images, which come last
    kinds = [{int(truth[same(first, image)]) for image in batch} for batch in batches]
    assert {0, 1} in kinds


def same(stored: np.ndarray, image: Tensor) -> int:
    """Which of the stored images, 8x8, was enlarged fourfold and brought to [-1, 1]."""
    pixels = ((image[0, 1::4, 1::4] + 1) * 127.5).round().to(torch.uint8).numpy()
    return int(np.abs(stored[:, 0].astype(int) - pixels).sum((1, 2)).argmin())


def test_byte_copies_of_training_images_are_counted_and_named(tmp_path: Path) -> None:
    rng = np.random.RandomState(0)
    images = rng.randint(0, 256, (120, 1, 8, 8)).astype(np.uint8)
    labels, is_test = np.arange(120) % 2, np.arange(120) >= 80
    normal_tests = np.flatnonzero(is_test & (labels == 0))
    images[normal_tests[:3]] = images[:80][labels[:80] == 0][:3]
    np.savez(tmp_path / "two.npz", images=images, labels=labels, is_test=is_test, class_names=np.array(["a", "b"]))
    data = ["dataset=npz", "dataset.name=two", f"dataset.path={tmp_path / 'two.npz'}", "split=official"]
    result = run(asked(tmp_path, *data, "normal_class=a", "logger=none"))
    assert result is not None and result["partition"]["test_copies"] == 3
    from anomaly_lab import report, results

    page = report.markdown(report.sections(results.read(tmp_path)))
    assert "Test images that are byte copies of training images: 3 with class a." in page
