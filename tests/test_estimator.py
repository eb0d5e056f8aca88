"""Methods as estimators over arrays: the same numbers as a run's, in scikit-learn's pipelines and cross-validation."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler

import anomaly_lab
from anomaly_lab import AnomalyDetector, config
from anomaly_lab.build import load_checkpoint
from anomaly_lab.run import run

TINY = ("model.budget.epochs=2", "model.budget.epoch_steps=3", "model.detector.width=4", "trainer.accelerator=cpu")


def digits() -> tuple[np.ndarray, np.ndarray]:
    """Pixels (N,8,8) from 0 to 255 in scikit-learn's order, and the digits."""
    found = load_digits()
    return np.rint(found.images * 255 / 16).astype(np.uint8), found.target


@pytest.mark.parametrize("model", ["ganomaly", "knn"])
def test_it_is_the_run_of_the_command_line(model: str, tmp_path: Path) -> None:
    pixels, target = digits()
    is_test = np.arange(len(pixels)) % 4 == 0
    trained = pixels[(target == 3) & ~is_test]
    extra = [word for word in TINY if model == "ganomaly" or word.startswith("trainer.")] + ["split.val_share=0.2"]
    names = {"class_names": np.array(["normal", "anomalous"])}
    some = is_test | (target == 3)
    np.savez(
        tmp_path / "own.npz", images=pixels[some, None], labels=(target[some] != 3) * 1, is_test=is_test[some], **names
    )
    where = [f"runs={tmp_path}", f"data_dir={tmp_path}", "trainer.progress=false", "logger=none", "split=official"]
    own = ["dataset=npz", "dataset.name=own", f"dataset.path={tmp_path / 'own.npz'}"]
    job = config.job(config.compose([f"model={model}", *own, *where, *extra, "seed=5"]))
    result = run(job)
    assert result is not None

    fitted = AnomalyDetector(model, seed=5, overrides=extra).fit(trained)
    assert len(fitted.decision_scores_) == len(trained) and fitted.threshold_ is not None
    checkpoint = load_checkpoint(job.out / "last.ckpt")
    weights = fitted.detector_.detector.state_dict()
    assert weights.keys() == checkpoint["state_dict"].keys()
    for name, value in checkpoint["state_dict"].items():
        assert torch.equal(weights[name], value), name
    loaded, stored = anomaly_lab.load_run(job.out), config.load_images(job.cfg).pixels
    assert np.array_equal(fitted.decision_function(stored), loaded.score(stored)), "to the bit, in the same batches"
    assert np.array_equal(fitted.predict(stored), loaded.decide(stored))
    with np.load(job.out / "scores.npz") as arrays:
        # The run scores its test images in another order, in which a matrix product may round a last bit otherwise.
        np.testing.assert_allclose(fitted.decision_function(stored[arrays["index"]]), arrays["score"], rtol=1e-5)
    assert fitted.threshold_ == pytest.approx(result["metrics"]["threshold"], rel=1e-6)
    again = AnomalyDetector(model, seed=5, overrides=extra).fit(trained[::-1].copy())
    assert np.array_equal(again.decision_function(stored), fitted.decision_function(stored)), "in whatever order"


def test_it_stands_in_pipelines_and_in_cross_validation() -> None:
    pixels, target = digits()
    few = np.flatnonzero(target == 1)[:120]
    rows, truth = np.concatenate([pixels[few], pixels[target != 1][:30]]), np.repeat([0, 1], [120, 30])
    estimator = AnomalyDetector("knn", overrides=["split.val_share=0.3", "trainer.accelerator=cpu"])
    pipeline = make_pipeline(MinMaxScaler((0, 255), clip=True), estimator)
    pipeline.fit(rows[:100].reshape(100, -1))
    scores = pipeline.decision_function(rows.reshape(150, -1))
    assert scores.shape == (150,) and scores[truth == 1].mean() > scores[truth == 0].mean()
    assert set(np.unique(pipeline.predict(rows.reshape(150, -1)))) == {0, 1}
    aurocs = cross_val_score(estimator, rows, truth, cv=StratifiedKFold(3), scoring="roc_auc")
    assert aurocs.shape == (3,) and (aurocs > 0.5).all()
    cloned = clone(estimator).set_params(seed=3)
    assert (
        cloned.get_params()["seed"] == 3 and cloned.get_params()["model"] == "knn" and not hasattr(cloned, "threshold_")
    )
    labels = estimator.fit_predict(rows[:100])
    assert np.array_equal(labels, estimator.labels_)


@pytest.mark.parametrize("model", ["shared_ae_50", "mean_image"])
def test_a_fitted_one_can_be_copied_and_pickled_without_its_training_images(model: str) -> None:
    x = digits()[0][:60]
    short = ["model.budget.epochs=1", "model.budget.epoch_steps=1", "trainer.accelerator=cpu", "split.val_share=0.4"]
    fitted = AnomalyDetector(model, overrides=short).fit(x)
    text = pickle.dumps(fitted)
    assert x[0].tobytes() not in text
    for again in (pickle.loads(text), copy.deepcopy(fitted)):
        assert np.array_equal(again.decision_function(x), fitted.decision_function(x))
        assert again.threshold_ == fitted.threshold_


@pytest.mark.parametrize("count", [25, 60, 66, 150, 300])
def test_without_a_threshold_it_says_what_gives_one(count: int) -> None:
    x = digits()[0][:count]
    fitted = AnomalyDetector("mean_image", overrides=["split.val_share=0.01"]).fit(x)
    with pytest.raises(ValueError, match=r"use decision_function, or fit with overrides=") as error:
        fitted.predict(x)
    [advised] = re.findall(r'overrides=\["(.+)"\]$', str(error.value))
    again = AnomalyDetector("mean_image", overrides=[advised]).fit(x)
    assert set(np.unique(again.predict(x))) <= {0, 1} and again.threshold_ is not None
    with pytest.raises(ValueError, match="or fit on 25 images or more"):
        AnomalyDetector("mean_image").fit(x[:24]).predict(x)


def test_max_train_thins_the_array() -> None:
    bank = AnomalyDetector("knn", overrides=["split.max_train=30"]).fit(digits()[0][:60]).detector_.detector.bank
    assert len(bank) == 25  # five are held out


def test_every_layout_is_the_same_images() -> None:
    made, pixels = AnomalyDetector(), digits()[0][:4]
    colour = np.repeat(pixels[..., None], 3, 3)
    for x in (pixels, pixels[:, None], pixels[..., None], pixels.reshape(4, -1), pixels + 0.2):
        assert np.array_equal(made._pixels(x), pixels[:, None])
    for x in (colour, colour.transpose(0, 3, 1, 2), colour.transpose(0, 3, 1, 2).reshape(4, -1)):
        assert np.array_equal(made._pixels(x), colour.transpose(0, 3, 1, 2))
    wide = AnomalyDetector(image_shape=(1, 4, 16))._pixels(pixels.reshape(4, -1))
    assert wide.shape == (4, 1, 4, 16)


@pytest.mark.parametrize(
    ("given", "x", "message"),
    [
        ({}, np.zeros((30, 8, 8)) - 1, "pixels from 0 to 255"),
        ({}, np.full((30, 8, 8), np.nan), "pixels from 0 to 255"),
        ({}, np.full((30, 8, 8), 0.3), "fractions of 1, not pixels from 0 to 255: multiply it by 255"),
        ({"model": "ganomally"}, np.zeros((30, 8, 8)), "there is no model=ganomally: write model=ganomaly"),
        ({"size": "big"}, np.zeros((30, 8, 8)), "size=big: choose full"),
        ({"seed": "a"}, np.zeros((30, 8, 8)), "seed=a: give a whole number from 0"),
        ({"overrides": ["epochs=3"]}, np.zeros((30, 8, 8)), "write model.budget.epochs=3"),
        ({"overrides": "split.val_share=0.2"}, np.zeros((30, 8, 8)), "is one text: give a list"),
        ({}, np.zeros((30, 65)), "of no square image: give image_shape"),
        ({"image_shape": (1, 8, 9)}, np.zeros((30, 64)), "rows of 64 numbers, image_shape"),
        ({}, np.zeros((30, 8, 8, 2)), "neither 1 nor 3 channels, first or last"),
        ({}, np.zeros((30, 4, 8, 8)), r"X \(30, 4, 8, 8\) has neither 1 nor 3 channels"),
        ({"image_shape": (8, 8)}, np.zeros((30, 64)), r"image_shape=\(8, 8\): give \(C, H, W\)"),
        ({}, np.zeros((8, 8)), r"X\[None\] of one image"),
        ({"overrides": None}, np.zeros((30, 8, 8)), "overrides=None: give a list of texts"),
        ({"overrides": [3]}, np.zeros((30, 8, 8)), r"overrides=\[3\]: give a list of texts"),
        ({"overrides": {"split.val_share": 0.2}}, np.zeros((30, 8, 8)), "give a list of texts"),
        ({"overrides": ["seed = 3"]}, np.zeros((30, 8, 8)), "give model, size and seed as arguments"),
        ({"overrides": ["split.val_share = 0.9"]}, np.zeros((30, 8, 8)), "split.val_share = 0.9 is no key=value"),
        ({}, np.array(["a"]), "X must be images"),
        ({}, np.zeros((0, 8, 8)), "X must be images"),
        ({"model": "supervised_ceiling"}, np.zeros((30, 8, 8)), "needs more than normal images"),
        ({"overrides": ["dataset=mnist"]}, np.zeros((30, 8, 8)), "the data are the arrays"),
        ({"overrides": ["split.contamination.rate=0.1"]}, np.zeros((30, 8, 8)), "the data are the arrays"),
        ({"overrides": ["split.max_test=5"]}, np.zeros((30, 8, 8)), "the data are the arrays"),
        ({"overrides": ["split.val_share=0.9"]}, np.eye(64).reshape(64, 8, 8)[:30], "leaves 3 of 30 normals to train"),
        ({"overrides": ["trainer.threshold_quantile=0"]}, np.zeros((30, 8, 8)), "threshold_quantile=0: give a number"),
        ({}, np.zeros((30, 8, 8)), "all 30 normal training images .* are the same image"),
        ({}, np.eye(64).reshape(64, 8, 8)[:9], "has 9 normal training images .* at least 10 are needed"),
    ],
)
def test_what_is_no_array_of_images_is_refused(given: dict, x: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AnomalyDetector(**({"model": "knn"} | given)).fit(x)
    with pytest.raises(ValueError, match="not fitted"):
        AnomalyDetector("knn").predict(np.zeros((3, 8, 8)))
