"""What is measured of a fitted detector: what it learned, without labels, and the leak of batch norm."""

from __future__ import annotations

import json
import math
import platform
import resource
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from anomaly_lab import config, metrics, results
from anomaly_lab.build import make_data
from anomaly_lab.detector import Detector
from anomaly_lab.measure import _fitted, batch_norm_leak, peak_memory
from anomaly_lab.methods.classical import BANDWIDTHS
from anomaly_lab.run import run


class Brightness(Detector):
    """Scores the mean of an image behind batch norm: perfect when honest, blind in batches of one kind."""

    def __init__(self, image_shape: Sequence[int]) -> None:
        super().__init__(image_shape)
        self.norm = nn.BatchNorm1d(1)

    def score(self, x: Tensor) -> Tensor:
        return self.norm(x.mean((1, 2, 3))[:, None]).squeeze(1)


def test_the_leak_is_that_of_a_test_set_sorted_by_truth(tmp_path: Path) -> None:
    random = np.random.RandomState(0)
    labels = np.repeat([0, 1], 100)
    pixels = (60 + 100 * labels[:, None, None, None] + random.randint(0, 40, (200, 1, 8, 8))).astype(np.uint8)
    arrays = {"images": pixels, "labels": labels, "is_test": np.arange(200) % 100 >= 39}
    np.savez(tmp_path / "two.npz", **arrays, class_names=np.array(["dark", "bright"]))
    where = [f"data_dir={tmp_path}", "dataset=npz", "dataset.name=two", f"dataset.path={tmp_path / 'two.npz'}"]
    # 122 test images in batches of 11: one would be left over, and has no statistics.
    cfg = config.compose([*where, "split=official", "normal_class=dark", "model.batch_size=11"])
    data = make_data(config.job(cfg))
    made = Brightness(data.image_shape)
    before = {name: buffer.clone() for name, buffer in made.norm.named_buffers()}
    found = batch_norm_leak(made, data, 0.5)
    assert found["oracle_shuffled_auroc"] > 0.95 and found["oracle_sorted_auroc"] < 0.7
    assert all(torch.equal(buffer, before[name]) for name, buffer in made.norm.named_buffers())
    assert made.norm.track_running_stats and not made.norm.training


def run_on_digits(folder: Path, *overrides: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    where = [f"runs={folder}", f"data_dir={folder}", "trainer.progress=false", "logger=none", "trainer.accelerator=cpu"]
    cfg = config.compose([*overrides, *where])
    result = run(cfg)
    assert result is not None
    with np.load(config.job(cfg).out / "scores.npz") as arrays:
        return result, dict(arrays)


def test_the_terms_of_a_score_are_kept_for_every_image(tmp_path: Path) -> None:
    overrides = ["model=ede", "model.budget.epochs=1", "model.detector.width=4", "model.detector.omega=0.25"]
    result, arrays = run_on_digits(tmp_path, *overrides)
    image, latent = arrays["term_image"], arrays["term_latent"]
    assert np.allclose(arrays["score"], 0.25 * image + 0.75 * latent, rtol=1e-6)
    assert np.allclose(arrays["val_score"], 0.25 * arrays["val_term_image"] + 0.75 * arrays["val_term_latent"])
    assert result["by_term"] == {
        "image": metrics.auroc(image, arrays["truth"]),
        "latent": metrics.auroc(latent, arrays["truth"]),
    }


def test_what_a_rule_chose_is_in_the_result_and_in_the_table(tmp_path: Path) -> None:
    """The bandwidth that likelihood chose, one that was given, and the number of components that were kept."""
    chosen, _ = run_on_digits(tmp_path, "model=kde")
    given, _ = run_on_digits(tmp_path, "model=kde", "model.detector.bandwidth=3", "model.detector.pca_variance=null")
    images, pixels = given["fitted"]["bank"]
    assert given["fitted"] == {"bank": [chosen["partition"]["train"], pixels], "width": 3}
    assert chosen["fitted"]["width"] in BANDWIDTHS and chosen["fitted"]["bank"][0] == images
    kept = chosen["fitted"]["bank"][1]
    assert 1 < kept < pixels and chosen["fitted"]["basis"] == [pixels, kept]
    table = results.read(tmp_path)
    assert [json.loads(row)["width"] for row in table["fitted"]] == [
        pytest.approx(run["fitted"]["width"], rel=1e-5) for run in (chosen, given)
    ]
    network, _ = run_on_digits(
        tmp_path / "network", "model=autoencoder", "model.detector.width=4", "model.budget.epochs=1"
    )
    assert network["fitted"] == {}


def test_a_fitted_number_that_is_none_costs_no_result() -> None:
    found = _fitted(WithoutTail((1, 8, 8)))
    assert found == {"bank": [3, 4], "tail": None, "width": 2.0}
    assert json.loads(results._fitted({"fitted": found})) == found


class WithoutTail(Detector):
    def __init__(self, image_shape: Sequence[int]) -> None:
        super().__init__(image_shape)
        for name, value in (("tail", math.nan), ("width", 2.0), ("bank", [[0.0] * 4] * 3)):
            self.set_fitted(name, torch.tensor(value))


@pytest.mark.slow
def test_a_network_that_rebuilds_the_mean_image_explains_no_variance(tmp_path: Path) -> None:
    """A decoder of width 4 after five steps against one after 200: labels are not looked at."""
    small = ["model=autoencoder", "model.detector.width=8", "model.optimizer.lr=2e-3", "model.budget.epochs=4"]
    begun, _ = run_on_digits(tmp_path / "begun", *small, "model.budget.epoch_steps=2")
    trained, arrays = run_on_digits(tmp_path / "trained", *small, "model.budget.epoch_steps=60")
    assert begun["learned"]["explained_variance"] < 0.1 < 0.3 < trained["learned"]["explained_variance"] < 1
    assert 0 < begun["learned"]["parameter_change"] < trained["learned"]["parameter_change"]
    assert trained["learned"]["distinct_scores"] == len(np.unique(arrays["score"]))


@pytest.mark.parametrize(("system", "said"), [("Darwin", 512 * 2**20), ("FreeBSD", 512 * 2**10)])
def test_the_peak_of_memory_is_in_mb_wherever_there_is_no_proc(
    system: str, said: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object, **__: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(resource, "getrusage", lambda _: SimpleNamespace(ru_maxrss=said))
    assert peak_memory() == 512
