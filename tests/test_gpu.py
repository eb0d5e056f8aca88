"""On a CUDA device: a run trains, resumes, scores and loads there. Skipped by name elsewhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import DictConfig

from anomaly_lab import config, load_run
from anomaly_lab.run import run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
TINY = ["model.budget.epochs=3", "model.budget.epoch_steps=5", "model.detector.width=8", "trainer.progress=false"]
METHODS = {
    "ganomaly": ["trainer.measure_leak=true"],
    "aae": [],
    "itsr": [
        "model.budget.epochs=null",
        "model.detector.rounds=2",
        "model.budget.stages={pretrain:1,detect:2,retrain:1}",
    ],
    "piad_pixel_l1": ["model.budget.steps=null", "model.detector.gamma_every=4"],
}


@pytest.mark.parametrize("precision", ["32-true", "tf32", "bf16-mixed"])
def test_a_run_on_the_gpu_loads_on_both_devices(tmp_path: Path, precision: str) -> None:
    where = [f"runs={tmp_path}", f"data_dir={tmp_path / 'data'}"]
    loads_on_both(config.compose([*TINY, f"trainer.precision={precision}", "trainer.accelerator=cuda", *where]))


@pytest.mark.parametrize("model", METHODS)
def test_every_method_runs_on_the_gpu(tmp_path: Path, model: str) -> None:
    where = [f"runs={tmp_path}", f"data_dir={tmp_path / 'data'}"]
    tiny = [option for option in TINY if not (model.startswith("piad") and "width" in option)]
    loads_on_both(config.compose([*tiny, f"model={model}", "trainer.accelerator=cuda", *where, *METHODS[model]]))


def loads_on_both(cfg: DictConfig) -> None:
    result = run(cfg)
    assert result is not None and result["device"] == torch.cuda.get_device_name() and result["peak_memory_mb"] > 0
    with np.load(config.job(cfg).out / "scores.npz") as file:
        score, index = file["score"], file["index"]
    images = config.load_images(cfg).pixels[index]
    np.testing.assert_allclose(load_run(config.job(cfg).out, "cuda").score(images), score, rtol=1e-3)
    np.testing.assert_allclose(load_run(config.job(cfg).out).score(images), score, rtol=1e-2)
