"""Transformation prediction with a memory for each transformation: its equations in plain torch, what it learns."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from test_methods import batch, detector, images
from torch import Tensor
from torch.nn import functional as F

from anomaly_lab import config
from anomaly_lab.calibration import spared
from anomaly_lab.methods.transform_knn import TransformKNN
from anomaly_lab.run import run

MOVES = [(0, 0), (0, 4), (0, -4), (4, 0), (-4, 0)]


def made(*overrides: str) -> TransformKNN:
    found = detector("transform_knn", *overrides)
    assert isinstance(found, TransformKNN)
    return found


def view(x: Tensor, t: int) -> Tensor:
    """Transformation number t of images (B,1,S,S), pixel by pixel."""
    (down, right), size = MOVES[t // 4], x.shape[-1]

    def inside(place: int) -> int:
        return -place if place < 0 else 2 * (size - 1) - place if place >= size else place

    rows, columns = ([inside(i - step) for i in range(size)] for step in (down, right))
    return torch.rot90(x[:, :, rows][:, :, :, columns], t % 4, (2, 3))


def features(found: TransformKNN, x: Tensor) -> list[Tensor]:
    """h(T_t x) of each transformation, (B,F)."""
    return [found.features(view(x, t)).mean((2, 3)) for t in range(20)]


def test_the_loss_is_that_of_its_formula() -> None:
    found, x = made("model.detector.margin_weight=0.5"), images()
    found.centres.copy_(torch.randn(found.centres.shape, generator=torch.Generator().manual_seed(3)))
    found.steps_done.fill_(50)
    before = found.centres.clone()
    (losses,) = found.plays(batch())
    h = features(found, x)
    loss = torch.zeros(())
    for t in range(20):
        log_p = found.head(h[t]).log_softmax(1)
        for i in range(8):
            apart = [(h[t][i] - centre).square().sum() for centre in before]
            margin = 1 + apart[t] - min(apart[s] for s in range(20) if s != t)
            loss = loss + (-log_p[i, t] + 0.5 * margin.clamp_min(0) + 1e-3 * h[t][i].square().sum()) / 160
    torch.testing.assert_close(losses["classifier"], loss)
    torch.testing.assert_close(found.centres, 0.9 * before + 0.1 * torch.stack([one.mean(0) for one in h]).detach())


def test_the_first_batch_places_the_centres() -> None:
    found, x = made(), images()
    list(found.plays(batch()))
    torch.testing.assert_close(found.centres, torch.stack([one.mean(0) for one in features(found, x)]).detach())


def test_the_score_weighs_each_transformation_by_how_well_held_out_normals_tell_it() -> None:
    found, x = made("model.detector.neighbours=3").eval(), images(4)
    found.head.weight.data.mul_(20)  # so that some are told
    normal = images(30, seed=2)
    with torch.no_grad():
        found.after_fit(normal)
        out = normal[spared(normal)]
        assert len(out) == 3
        told = [found.head(h).log_softmax(1)[:, t] for t, h in enumerate(features(found, out))]
        worth = [max(0.0, 1 + one.mean().item() / math.log(20)) for one in told]
        torch.testing.assert_close(found.worth, torch.tensor(worth), rtol=1e-4, atol=1e-5)
        assert max(worth) > 0.05 > min(worth)
        expected = torch.zeros(2, 4)
        for t, (h, bank) in enumerate(zip(features(found, x), features(found, normal[~spared(normal)]), strict=True)):
            distance = torch.cdist(F.normalize(h).double(), F.normalize(bank).double()).sort(1).values[:, :3].mean(1)
            expected[0] -= worth[t] * found.head(h).log_softmax(1)[:, t]
            expected[1] += (worth[t] + 0.1) * distance.float()
        terms = found.terms(x)
        torch.testing.assert_close(terms["transformations"], expected[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(terms["neighbours"], expected[1], rtol=1e-3, atol=1e-4)
        of_normals = found.terms(out)
        torch.testing.assert_close(found.score(x), sum(terms[n] / of_normals[n].abs().mean() for n in found.TERMS))
        alike = made("model.detector.weighted=false")
        assert torch.equal(alike.worth, torch.ones(20))


def test_a_tenth_of_the_images_takes_no_part_in_training() -> None:
    found = made()
    found.before_fit(images(41))
    indices = found.train_indices(1)
    assert indices is not None and set(range(41)) - set(indices.tolist()) == {0, 10, 20, 30, 40}
    with pytest.raises(ValueError, match="10 training images are too few to hold out two of them: give 11"):
        found.before_fit(images(10))


def test_numbers_of_transformations_and_what_it_refuses() -> None:
    assert [made(f"model.detector.shifts={n}").views(images(2)).shape[0] for n in (1, 5, 9)] == [4, 20, 36]
    assert made("model.detector.places=2").looked(images(2)).shape == (20, 2, 64)
    for override, message in (
        ("shifts=2", "shifts=2: choose one of 1, 5, 9"),
        ("shift=32", "choose a number of pixels from 1 to below the image's 32"),
        ("places=3", "four times that must divide the image's size, 32"),
        ("neighbours=0", "whole number from 1"),
    ):
        with pytest.raises(Exception, match=message):
            made(f"model.detector.{override}")


@pytest.mark.slow
def test_it_learns_ones_better_than_the_mean_image(tmp_path: Path) -> None:
    where = [f"runs={tmp_path}", f"data_dir={tmp_path}", "trainer.progress=false", "logger=none", "normal_class=1"]
    mean = run(config.compose(["model=mean_image", *where]))
    short = ["model.budget.epochs=2", "model.budget.epoch_steps=25", "model.detector.width=8"]
    learned = run(config.compose(["model=transform_knn", *short, *where]))
    assert mean is not None and learned is not None
    assert learned["history"][-1]["loss_classified"] < 0.85 * math.log(20)
    assert learned["metrics"]["auroc"] > mean["metrics"]["auroc"] + 0.05


def test_it_runs_in_bfloat16(tmp_path: Path) -> None:
    """The running centres stay in float32."""
    where = [f"runs={tmp_path}", f"data_dir={tmp_path}", "trainer.progress=false", "logger=none", "normal_class=1"]
    tiny = ["model.detector.width=4", "split.max_train=60", "split.max_test=30", "model.budget.epochs=1"]
    tiny += ["model.budget.epoch_steps=2", "trainer.precision=bf16-mixed"]
    made = run(config.compose(["model=transform_knn", *tiny, *where]))
    assert made is not None and made["learned"]["distinct_scores"] > 10
