"""Any method as an estimator over arrays, with the names of scikit-learn and PyOD.

Legend of the shape comments: N images, C channels, H×W pixels, D = C·H·W.
"""

from __future__ import annotations

import logging
import math
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hydra.errors import HydraException
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, OutlierMixin
from sklearn.utils.validation import check_is_fitted

from anomaly_lab import config, metrics, switches
from anomaly_lab.advice import advice
from anomaly_lab.build import epochs, make_augment, make_detector, make_lightning_trainer, make_prepare
from anomaly_lab.data import OneClassData
from anomaly_lab.detector import Detector
from anomaly_lab.errors import explained
from anomaly_lab.images import Images
from anomaly_lab.players import Learning
from anomaly_lab.predict import FittedDetector
from anomaly_lab.splits import Official, Partition, Target

NOT_OF_ARRAYS = ("model", "size", "seed", "dataset", "experiment", "normal_class", "abnormal_class")
"""Keys that are parameters of the estimator, or that its arrays stand for."""


OF_SPLIT = ("max_train", "val_share", "seed")
"""Keys of ``split`` that arrays have a use for."""


def _release(detector: Detector) -> None:
    """Let go of what only fitting needs: trainer, images, optimisers. What scores stays, and can be pickled."""
    detector._trainer, detector._images, detector._players, detector.learning = None, None, {}, Learning()
    detector._further = detector._further_of_epoch = iter(())


def _stands_for_data(key: str) -> bool:
    key = key.strip()  # of "seed = 1"; Hydra says what is wrong with the other keys
    section, _, name = key.partition(".")
    return key in NOT_OF_ARRAYS or (section == "split" and name not in OF_SPLIT)


@dataclass(frozen=True)
class _Everything(Official):
    """All images are normal and train, but for those that `Official` would hold out of a class ``normal``."""

    @classmethod
    def _misfit(cls, images: Images) -> str:
        return "is no array"  # so that it is nobody's advice

    def resolve(self, images: Images, named: Any) -> Target:
        return 0

    def __call__(self, images: Images, target: Target, seed: int) -> Partition:
        seed = seed if self.seed is None else self.seed
        normals = self._thin(images, [np.arange(len(images))], self.max_train, "max_train", seed)
        self._refuse_unlearnable(images, normals, "normal")
        train, val = self.hold_out(images, normals, seed)
        none, no_truth = np.zeros(0, np.int64), np.zeros(0, np.uint8)
        return Partition(train, np.zeros(len(train), np.uint8), val, none, no_truth, "", none, none)


class AnomalyDetector(OutlierMixin, BaseEstimator):
    """A method of anomaly_lab over arrays of images: ``fit(X)``, then ``decision_function(X)`` and ``predict(X)``.

    Fitted on the images of a class it has the weights, to the bit on a CPU, and so the scores of the command line's run
    with ``split=official`` on a data set whose class ``normal`` has these training images, whatever their order.
    Scores are PyOD's and this package's: higher is more anomalous.

    ``X`` holds pixels from 0 to 255: (N,H,W), (N,H,W,C) or (N,C,H,W), or flat (N,D) as scikit-learn's pipelines have
    them; numbers that are no bytes are rounded.

    Args:
        model, size, seed: as on the command line.
        overrides: further ``key=value``, such as ``model.budget.epochs=3``, ``split.val_share=0.3``.
        image_shape: (C,H,W) of the rows of a flat ``X``; None: they are square and grey, or else square and colour.

    Attributes:
        decision_scores_: float32 (N,), the scores of the images of ``fit``.
        labels_: int (N,), the decisions on them: 1 anomalous, 0 normal; None without a threshold.
        threshold_: from held-out images of ``fit``, ``trainer.threshold_quantile`` of their scores; None where those
            are fewer than 20 (raise ``split.val_share``) and the method has no rule of its own.
        detector_: the fitted detector, to `FittedDetector`'s other methods, such as ``anomaly_map``.
    """

    def __init__(
        self,
        model: str = "shared_ae_50",
        size: str = "small",
        seed: int = 0,
        overrides: Sequence[str] = (),
        image_shape: tuple[int, int, int] | None = None,
    ) -> None:
        self.model, self.size, self.seed = model, size, seed
        self.overrides, self.image_shape = overrides, image_shape

    def fit(self, X: ArrayLike, y: object = None) -> AnomalyDetector:
        """Train on the images ``X`` as normal ones; ``y`` is ignored.

        Raises:
            ValueError: ``X`` is no array of images, holds too few of them, or the method needs more than images.
        """
        pixels = self._pixels(X)
        if isinstance(self.overrides, str):
            raise ValueError(f"overrides={self.overrides!r} is one text: give a list of key=value")
        listed = isinstance(self.overrides, list | tuple)
        if not listed or not all(isinstance(word, str) for word in self.overrides):
            raise ValueError(f"overrides={self.overrides!r}: give a list of texts key=value")
        given = list(self.overrides)
        if wrong := [word for word in given if _stands_for_data(word.split("=")[0].lstrip("+~"))]:
            raise ValueError(f"overrides={wrong}: give model, size and seed as arguments; the data are the arrays")
        words = [f"model={self.model}", f"size={self.size}", f"seed={self.seed}", *given]
        try:
            cfg = config.compose(words)
        except HydraException as error:
            raise ValueError(advice(error, words) or explained(error)) from error
        config.refuse_impossible(cfg)
        if cfg.model.members or cfg.model.get("labels"):
            raise ValueError(f"model={self.model} needs more than normal images: use the command line")
        images = Images.canonical(
            pixels, np.zeros(len(pixels), np.int64), np.zeros(len(pixels), bool), ("normal",), name="array"
        )
        prepare = make_prepare(cfg)
        data = OneClassData(
            images,
            _Everything(max_train=cfg.split.max_train, val_share=cfg.split.val_share, seed=cfg.split.seed),
            0,
            prepare,
            batch_size=cfg.model.batch_size,
            epoch_steps=cfg.model.budget.epoch_steps,
            score_batch_size=cfg.trainer.score_batch_size,
            seed=cfg.seed,
            known=config.semi_supervised(cfg),
            augment=make_augment(cfg),
        )
        detector = make_detector(cfg, data.image_shape, epochs(cfg, data))
        precision = cfg.trainer.precision
        with (
            tempfile.TemporaryDirectory() as folder,
            switches.of_a_run(precision, cfg.trainer.threads),
            warnings.catch_warnings(),
            torch.random.fork_rng(),
        ):
            warnings.simplefilter("ignore")
            said = logging.getLogger("lightning.pytorch")
            level = said.level
            said.setLevel(logging.WARNING)  # a cross-validation needs no greeting a fold
            trainer = make_lightning_trainer(cfg, data, folder)
            try:
                trainer.fit(detector.train(), datamodule=data.fitting(trainer.strategy.root_device))
            finally:
                said.setLevel(level)
        device = trainer.strategy.root_device
        result: dict[str, Any] = {
            "stored_shape": list(images.pixels.shape[1:]),
            "metrics": {"threshold": None},
            "config": {"trainer": {"precision": precision}},
            "identity": {"model": self.model},
        }
        _release(detector)
        self.detector_ = FittedDetector(detector.to(device).eval(), prepare, result, device)
        val_score = self.detector_.score(images.pixels[data.partition.val])
        threshold = metrics.threshold_from_normals(val_score, cfg.trainer.threshold_quantile)
        result["metrics"]["threshold"] = self.threshold_ = threshold
        self.decision_scores_ = self.detector_.score(pixels)
        decided = self.detector_.decisions(pixels, self.decision_scores_)
        self.labels_ = None if decided is None else decided.astype(int)
        self._fitted_on = len(data.partition.train) + len(data.partition.val)
        self.n_features_in_ = math.prod(pixels.shape[1:])
        return self

    def decision_function(self, X: ArrayLike) -> NDArray[np.float32]:
        """Anomaly scores float32 (N,), raw; higher is more anomalous."""
        check_is_fitted(self)
        return self.detector_.score(self._pixels(X))

    def predict(self, X: ArrayLike) -> NDArray[np.int64]:
        """1 for images that are called anomalous, 0 for normal ones, int (N,), as PyOD has it.

        Raises:
            ValueError: there is no threshold, see ``threshold_``.
        """
        check_is_fitted(self)
        pixels = self._pixels(X)
        decided = self.detector_.decisions(pixels, self.detector_.score(pixels))
        if decided is None:
            share = math.ceil(2000 / self._fitted_on) / 100
            enough = (
                f"""with overrides=["split.val_share={share}"]""" if self._fitted_on > 24 else "on 25 images or more"
            )
            raise ValueError(
                f"too few of the {self._fitted_on} images were held out for a threshold (20 are needed): use "
                f"decision_function, or fit {enough}"
            )
        return decided.astype(np.int64)

    def fit_predict(self, X: ArrayLike, y: object = None, **more: Any) -> NDArray[np.int64]:
        """``fit(X)``, then the decisions on ``X``."""
        return self.fit(X).predict(X)

    def _pixels(self, X: ArrayLike) -> NDArray[np.uint8]:
        """uint8 (N,C,H,W) of what the user has."""
        x = np.asarray(X)
        if x.dtype.kind not in "uif" or x.ndim not in (2, 3, 4) or not len(x):
            raise ValueError(f"X must be images (N,H,W), (N,H,W,C), (N,C,H,W) or rows (N,D), not {x.dtype} {x.shape}")
        if x.dtype != np.uint8:
            whole = np.rint(x)
            if not (np.isfinite(x).all() and whole.min() >= 0 and whole.max() <= 255):
                raise ValueError("X must hold pixels from 0 to 255: scale it, and replace what is not finite")
            if x.max() <= 1 and (x != whole).any():  # they would silently become black and white
                raise ValueError("X holds fractions of 1, not pixels from 0 to 255: multiply it by 255")
            x = whole.astype(np.uint8)
        if x.ndim == 2:
            x = x.reshape(len(x), *self._shape_of_rows(x.shape[1]))
        elif x.ndim == 3:
            x = x[:, None]
        elif x.shape[1] not in (1, 3):
            if x.shape[3] not in (1, 3):
                raise ValueError(f"X {x.shape} has neither 1 nor 3 channels, first or last: drop or add some")
            x = x.transpose(0, 3, 1, 2)
        return np.ascontiguousarray(x)

    def _shape_of_rows(self, numbers: int) -> tuple[int, int, int]:
        if self.image_shape is not None:
            if len(self.image_shape) != 3 or self.image_shape[0] not in (1, 3):
                raise ValueError(f"image_shape={self.image_shape}: give (C, H, W), with 1 or 3 channels C")
            if math.prod(self.image_shape) != numbers:
                raise ValueError(f"X has rows of {numbers} numbers, image_shape={self.image_shape} has others")
            return self.image_shape
        for channels in (1, 3):
            side = math.isqrt(numbers // channels)
            if channels * side * side == numbers:
                return channels, side, side
        raise ValueError(
            f"X has rows of {numbers} numbers, of no square image: give image_shape=(C, H, W), or X[None] of one image"
        )
