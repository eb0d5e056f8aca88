"""Learning floors: every method tells zeros from other digits after seconds of training, far better than chance.

A floor says that a method learns at all; it is no claim and no choice. Zeros are the easiest of the embedded digits.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from anomaly_lab import config
from anomaly_lab.run import run

AUTOENCODERS = [
    *("model.budget.epochs=5", "model.budget.epoch_steps=20"),
    *("model.detector.width=8", "model.optimizer.lr=2e-3"),
]

SHORT = {
    # The AUROC, the player whose loss is the reconstruction, or mostly that, and what makes it a matter of seconds.
    "autoencoder": (0.95, "ede", AUTOENCODERS),
    "ede": (0.95, "ede", AUTOENCODERS),
    "shared_ae_no_adversary": (0.95, "both", AUTOENCODERS),
    "shared_ae": (0.95, "ede2", AUTOENCODERS),
    "ganomaly": (0.9, "generator", ["model.budget.epochs=4", "model.budget.epoch_steps=30"]),
    "autoencoder_beggel": (0.9, "autoencoder", ["model.budget.epochs=40", "model.batch_size=32"]),
    "aae": (0.9, "autoencoder", ["model.budget.epochs=40", "model.batch_size=32"]),
    "itsr": (
        0.9,
        "autoencoder",
        ["model.budget.stages={pretrain:20,detect:20,retrain:10}", "model.batch_size=32"],
    ),
}

# Adversarial methods learn ones, at the digits' own eight pixels; the mean image reaches .757 on them (1.000 on zeros).
EIGHT = [
    *("normal_class=1", "model.input.size=8", "model.detector.width=16", "model.batch_size=32"),
    "model.budget.epoch_steps=20",
]
FAST = [f"model.optimizer.{player}.lr=1e-3" for player in ("critic", "generator", "encoder")]
ONES = {
    "anogan": (0.9, ["model.budget.epochs=15", "model.optimizer.lr=1e-3"]),
    "f_anogan": (0.9, ["model.budget.stages={gan:15,encoder:8}", *FAST]),
    "adgan": (0.9, ["model.budget.steps=300", "model.optimizer.lr=1e-3"]),
    "ocgan": (0.95, ["model.budget.stages={plain:8,mined:4}"]),
    "gpnd": (0.85, ["model.budget.epochs=10"]),
    "bigan": (0.85, ["model.budget.epochs=30", "model.optimizer.lr=5e-4"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("model", SHORT)
def test_a_method_learns(model: str, tmp_path: Path) -> None:
    floor, player, overrides = SHORT[model]
    where = [f"runs={tmp_path}", f"data_dir={tmp_path}", "trainer.progress=false", "logger=none"]
    result = run(config.compose([f"model={model}", "normal_class=0", *overrides, *where]))
    assert result is not None
    assert result["metrics"]["auroc"] >= floor
    first, last = (result["history"][epoch][f"loss_{player}"] for epoch in (0, -1))
    assert last < first, "what it minimises does not fall"


@pytest.mark.slow
@pytest.mark.parametrize("model", ONES)
def test_an_adversarial_method_learns_what_the_mean_image_does_not_know(model: str, tmp_path: Path) -> None:
    floor, overrides = ONES[model]
    where = [f"runs={tmp_path}", f"data_dir={tmp_path}", "trainer.progress=false", "logger=none"]
    result = run(config.compose([f"model={model}", *EIGHT, *overrides, *where]))
    assert result is not None
    assert result["metrics"]["auroc"] >= floor
