"""On a CUDA device: a run trains, resumes, scores and loads there. Skipped by name elsewhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from anomaly_lab import config, load_run
from anomaly_lab.run import run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
TINY = ["model.budget.epochs=3", "model.budget.epoch_steps=5", "model.detector.width=8", "trainer.progress=false"]


@pytest.mark.parametrize("precision", ["32-true", "tf32", "bf16-mixed"])
def test_a_run_on_the_gpu_loads_on_both_devices(tmp_path: Path, precision: str) -> None:
    where = [f"runs={tmp_path}", f"data_dir={tmp_path / 'data'}"]
    cfg = config.compose([*TINY, f"trainer.precision={precision}", "trainer.accelerator=cuda", *where])
    result = run(cfg)
    assert result is not None and result["device"] != "cpu" and result["peak_memory_mb"] > 0
    with np.load(config.run_dir(cfg) / "scores.npz") as file:
        score, index = file["score"], file["index"]
    images = config.load_images(cfg).pixels[index]
    np.testing.assert_allclose(load_run(config.run_dir(cfg), "cuda").score(images), score, rtol=1e-3)
    np.testing.assert_allclose(load_run(config.run_dir(cfg)).score(images), score, rtol=1e-2)
