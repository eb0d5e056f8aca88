"""Augmentation of training batches: what each part does, the same draws for the same seed and epoch, off by default."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command

from anomaly_lab import config
from anomaly_lab.build import make_data
from anomaly_lab.data import Augment

SIZE = 16


def images(count: int = 64) -> torch.Tensor:
    """(B,1,16,16), zero on a border of four pixels."""
    x = torch.zeros(count, 1, SIZE, SIZE)
    x[..., 4:-4, 4:-4] = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return x


def changed(x: torch.Tensor, seed: int = 0, **parts: object) -> torch.Tensor:
    return Augment(**parts)(x, torch.Generator().manual_seed(seed))  # type: ignore[arg-type]


def test_nothing_asked_for_changes_nothing() -> None:
    torch.testing.assert_close(changed(images()), images(), atol=1e-5, rtol=0)


def test_half_of_the_images_are_mirrored() -> None:
    x = images(400)
    found = changed(x, flip=True)
    kept, mirrored = (((found - of).abs().amax((1, 2, 3)) < 1e-5) for of in (x, x.flip(3)))
    assert (kept | mirrored).all() and 150 < int(mirrored.sum()) < 250


def test_a_shift_moves_the_centre_of_mass_by_so_many_pixels_at_most() -> None:
    x, at = images(400), torch.arange(SIZE).float()
    found = changed(x, shift=2)
    torch.testing.assert_close(found.sum((1, 2, 3)), x.sum((1, 2, 3)), rtol=1e-3, atol=0)
    for axis in (2, 3):
        moved = [(of.sum((1, 5 - axis)) * at).sum(1) / of.sum((1, 2, 3)) for of in (x, found)]
        distance = (moved[1] - moved[0]).abs()
        assert 1.8 < distance.max() < 2.01 and distance.min() < 0.1


def test_a_rotation_keeps_distances_from_the_centre() -> None:
    at = torch.arange(SIZE).float() - (SIZE - 1) / 2
    disc = (-(at[:, None].square() + at.square()) / 18).exp().expand(50, 1, SIZE, SIZE)
    assert (changed(disc, rotation=90) - disc).abs().mean() < 0.01
    bar = torch.zeros(50, 1, SIZE, SIZE)
    bar[..., 7:9, 2:-2] = 1
    assert (changed(bar, rotation=90) - bar).abs().mean() > 0.05
    assert (changed(bar, rotation=1) - bar).abs().mean() < 0.02


def test_a_crop_enlarges() -> None:
    square = torch.zeros(100, 1, SIZE, SIZE)
    square[..., 4:12, 4:12] = 1
    area = changed(square, crop=0.7).sum((1, 2, 3)) / 64
    assert area.min() > 0.99 and 1.7 < area.max() < 1 / 0.7**2 + 0.05


def test_off_by_default_and_the_same_run_as_before(data: Path) -> None:
    cfg = config.compose([f"data_dir={data}"])
    assert cfg.model.input.augment is None and config.changed(cfg) == {}
    assert not any("augment" in key for key in config.settings(cfg))
    on = config.compose([f"data_dir={data}", "model.input.augment={shift:2,flip:true}"])
    assert config.changed(on) == {"model.input.augment.shift": 2, "model.input.augment.flip": True}


def test_draws_depend_on_seed_and_epoch_alone(data: Path) -> None:
    job = config.job(config.compose([f"data_dir={data}", "model.input.augment={shift:2,rotation:10}"]))

    def first(epoch: int) -> torch.Tensor:
        made = make_data(job).train_dataloader()
        made.begin(epoch, None, None)
        return torch.cat([made.batch(torch.arange(8)).x for _ in range(2)])

    assert torch.equal(first(2), first(2)) and not torch.equal(first(2), first(3))
    assert not torch.equal(first(2)[:8], first(2)[8:]), "every batch anew"
    plain = make_data(config.job(config.compose([f"data_dir={data}"]))).train_dataloader()
    changed = make_data(job).train_dataloader()
    assert torch.equal(changed.everything().x, plain.everything().x), "hooks see the images themselves"
    assert changed.order[0].equal(plain.order[0]), "and the order is what it was"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("'model.input.augment={shfit:2}'", "model.input.augment has no shfit: give some of shift, flip, crop"),
        ("model.input.augment=true", "model.input.augment has no True"),
        ("model.input.augment=1 --dry-run", "model.input.augment has no 1"),
        ("'model.input.augment={shift:-1}' --dry-run", "give shift (pixels) and rotation (degrees) from 0"),
        ("'model.input.augment={rotation:much}'", "give shift (pixels) and rotation (degrees) from 0"),
        ("model=pca 'model.input.augment={shift:2}'", "augment would change nothing: pca takes no training steps"),
        ("'model.input.augment={crop:0}'", "crop above 0 up to 1"),
        ("'model.input.augment={shift:1}' trainer.cuda_graphs=true", "set trainer.cuda_graphs=false"),
        ("model=scatter_subspace 'model.input.augment={shift:1}'", "fixed features are computed once"),
    ],
)
def test_what_makes_no_sense_is_refused(words: str, message: str, lab: Command) -> None:
    said = lab(f"{words} trainer.progress=false")
    line = said.out.splitlines()[0] if "--dry-run" in words else said.err
    assert said.code == 2 and message in line and said.err.count("\n") == ("--dry-run" not in words)
    assert not list(Path("runs").glob("*")), "nothing was begun"


@pytest.mark.parametrize("given", [{"shift": -1}, {"crop": 0}, {"crop": 1.5}, {"rotation": -3}, {"flip": 1}])
def test_augmentations_made_in_python_are_held_to_the_same_ranges(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="give shift"):
        Augment(**given)
