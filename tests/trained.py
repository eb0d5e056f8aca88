"""A run that has been trained, for tests of what is done with one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np

from anomaly_lab import config
from anomaly_lab.run import run

TINY = ["model.budget.epochs=1", "model.budget.epoch_steps=1", "model.detector.width=4", "trainer.progress=false"]


def one_abnormal(folder: Path) -> SimpleNamespace:
    """A run below ``folder`` with a threshold (25 held-out normals): its result, all images, and its scores.npz."""
    where = [f"runs={folder / 'runs'}", f"data_dir={folder / 'data'}"]
    cfg = config.compose([*TINY, *where, "split=one_abnormal", "abnormal_class=3", "split.max_train=250"])
    result = run(cfg)
    assert result is not None and result["metrics"]["threshold"] is not None
    out = config.job(cfg).out
    with np.load(out / "scores.npz") as file:
        written = dict(file)
    return SimpleNamespace(out=out, result=result, images=config.load_images(cfg).pixels, **written)
