"""Learning floors: after seconds of training a method tells ones from other digits, better than the mean image.

A floor says that a method learns at all; it is no claim and no choice. Zeros are told by the distance to their mean
image (.998), so that they test nothing; ones are not (.733), because they are written in two ways.

Floors stand elsewhere, too: of small networks in test_one_class_networks, and of transform_knn, rotation_contrast, PIAD
in pixels and the supervised ceiling with their own tests. None have ocsvm, which is honestly below the mean image on
ones (.659); alad, which needs longer than seconds (.776 where the mean image has .807); shared_ae_printed, which
collapses as its algebra says; fused, which is made of others; and what needs downloaded features.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
    "ede": (0.85, "ede", AUTOENCODERS),
    "shared_ae_no_adversary": (0.85, "both", AUTOENCODERS),
    "shared_ae": (0.75, "ede2", AUTOENCODERS),  # hardly above: its reconstructions explain no variance (-.06)
    # With the image term 50 to 1, under which the code depends on the image. With an adversary that is so with seed 0,
    # not with every seed: with seed 1 so short a training stays below the mean image.
    "ede_50": (0.95, "ede", AUTOENCODERS),
    "shared_ae_no_adversary_50": (0.95, "both", AUTOENCODERS),
    "shared_ae_50": (0.9, "ede2", AUTOENCODERS),
    "ganomaly": (0.9, "generator", ["model.budget.epochs=4", "model.budget.epoch_steps=30"]),
    "autoencoder_beggel": (0.9, "autoencoder", ["model.budget.epochs=40", "model.batch_size=32"]),
    "aae": (0.9, "autoencoder", ["model.budget.epochs=40", "model.batch_size=32"]),
    "itsr": (
        0.9,
        "autoencoder",
        ["model.budget.stages={pretrain:20,detect:20,retrain:10}", "model.batch_size=32"],
    ),
}

# Adversarial methods learn ones, at the digits' own eight pixels; the mean image reaches .807 on them.
EIGHT = [
    *("model.input.size=8", "model.batch_size=32", "model.budget.epoch_steps=20"),
]
FAST = [f"model.optimizer.{player}.lr=1e-3" for player in ("critic", "generator", "encoder")]
ONES = {
    "anogan": (0.9, ["model.budget.epochs=15", "model.optimizer.lr=1e-3"]),
    "f_anogan": (0.9, ["model.budget.stages={gan:15,encoder:8}", *FAST]),
    "adgan": (0.9, ["model.budget.steps=300", "model.optimizer.lr=1e-3"]),
    "ocgan": (0.95, ["model.budget.stages={plain:8,mined:4}"]),
    "gpnd": (0.85, ["model.budget.epochs=10"]),
    # By its discriminator alone: what so short a training rebuilds is a shape of ones, and no image's own.
    "bigan": (
        0.85,
        [
            *("model.budget.epochs=30", "model.optimizer.lr=5e-4", "model.detector.dropout=0"),
            *("model.detector.w_discriminator=1", "model.detector.discriminator_term=cross_entropy"),
        ],
    ),
}

OWN_WIDTHS = {
    "rotnet": (0.85, [*EIGHT, "model.detector.shift=2", "model.budget.epochs=10"]),
    "geotrans": (0.85, [*EIGHT, "model.detector.shift=2", "model.budget.epochs=10"]),
    "lsa": (0.9, [*EIGHT, "model.budget.epochs=10"]),
    "anonagn_reconstruction": (0.9, [*EIGHT, "model.budget.epochs=10"]),
    "dagpr_reconstruction": (0.95, [*EIGHT, "model.budget.epochs=10"]),
    "vae": (0.95, [*EIGHT, "model.budget.epochs=10"]),
    "addpa_growing": (
        0.9,
        [
            *("model.detector.features=null", "model.batch_size=32", "model.budget.epoch_steps=20"),
            "model.budget.stages={at_8:2,to_16:1,at_16:1,to_32:1,at_32:1,to_64:1,at_64:2}",
        ],
    ),
    "addpa": (0.95, ["model.detector.features=null", "model.input.size=16", "model.budget.steps=150"]),  # no download
    "pixelcnn": (0.9, [*EIGHT, "model.budget.epochs=5"]),
    "puzzle_ae": (
        0.85,
        [*EIGHT, "model.detector.orders=3", "model.optimizer.unet.lr=3e-3", "model.budget.epochs=12"],
    ),
    "scatter_subspace": (0.95, []),
    "goad": (0.9, [EIGHT[0], "model.detector.shift=2", "model.budget.epochs=3", "model.budget.epoch_steps=60"]),
}
"""The floor, and what makes it a matter of seconds."""


def made(model: str, tmp_path: Path, *overrides: str) -> dict[str, Any]:
    where = [f"runs={tmp_path}", f"data_dir={tmp_path}", "trainer.progress=false", "logger=none"]
    result = run(config.compose([f"model={model}", "normal_class=1", *overrides, *where]))
    assert result is not None
    return result


def test_the_floors_are_above_the_mean_image(tmp_path: Path) -> None:
    for asked, overrides in ((SHORT, []), (ONES, EIGHT), (OWN_WIDTHS, EIGHT)):
        mean_image = made("mean_image", tmp_path, *overrides)["metrics"]["auroc"]
        assert all(floor > mean_image for floor, *_ in asked.values())
        for model in ("pca", "knn"):
            assert made(model, tmp_path, *overrides)["metrics"]["auroc"] > 0.99


@pytest.mark.parametrize("model", ["kde", "isolation_forest", "lof", "gmm"])
def test_a_classical_method_is_above_the_mean_image(model: str, tmp_path: Path) -> None:
    assert made(model, tmp_path)["metrics"]["auroc"] > made("mean_image", tmp_path)["metrics"]["auroc"]


@pytest.mark.slow
@pytest.mark.parametrize("model", SHORT)
def test_a_method_learns(model: str, tmp_path: Path) -> None:
    floor, player, overrides = SHORT[model]
    result = made(model, tmp_path, *overrides)
    assert result["metrics"]["auroc"] >= floor
    first, last = (result["history"][epoch][f"loss_{player}"] for epoch in (0, -1))
    assert last < first, "what it minimises does not fall"


@pytest.mark.slow
@pytest.mark.parametrize("model", ONES)
def test_an_adversarial_method_learns_what_the_mean_image_does_not_know(model: str, tmp_path: Path) -> None:
    floor, overrides = ONES[model]
    result = made(model, tmp_path, "model.detector.width=16", *EIGHT, *overrides)
    assert result["metrics"]["auroc"] >= floor


@pytest.mark.slow
@pytest.mark.parametrize("model", OWN_WIDTHS)
def test_a_method_at_its_own_width_learns_what_the_mean_image_does_not_know(model: str, tmp_path: Path) -> None:
    floor, overrides = OWN_WIDTHS[model]
    assert made(model, tmp_path, *overrides)["metrics"]["auroc"] >= floor
