"""Contrastive learning with rotations: its losses with plain torch, its views, its score, and that it learns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_methods import detector, images
from torch import Tensor
from torch.nn import functional as F

from anomaly_lab import config
from anomaly_lab.batches import Batch
from anomaly_lab.calibration import spared
from anomaly_lab.methods.rotation_contrast import RotationContrast, contrast, cropped
from anomaly_lab.run import run


def made(*overrides: str, shape: tuple[int, int, int] = (3, 16, 16)) -> RotationContrast:
    found = detector("rotation_contrast", "model.input.size=16", *overrides, shape=shape)
    assert isinstance(found, RotationContrast)
    return found


def grey(count: int, seed: int = 0, shape: tuple[int, int, int] = (3, 16, 16)) -> Tensor:
    return (images(count, shape, seed) + 1) / 2


def test_the_contrast_is_that_of_its_formula() -> None:
    z = F.normalize(torch.randn(4 * 2 * 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.double))
    z.requires_grad_()
    tau, inliers = 0.5, 6
    e = [[(a @ b / tau).exp() for b in z] for a in z]

    def log_share(i: int, j: int) -> Tensor:
        return (e[i][j] / sum(e[i][a] for a in range(24) if a != i)).log()

    q = [sum(e[j][k].detach() for k in range(inliers)) / inliers for j in range(inliers)]
    expected_in, expected_out = torch.zeros((), dtype=torch.double), torch.zeros((), dtype=torch.double)
    for i in range(inliers):
        others = [j for j in range(inliers) if j != i]
        total = sum(q[j] for j in others)
        expected_in = expected_in - sum(q[j] / total * log_share(i, j) for j in others) / inliers
    for i in range(inliers, 24):
        rotation, view, image = i // 6, i // 3 % 2, i % 3
        expected_out = expected_out - log_share(i, rotation * 6 + (1 - view) * 3 + image) / 18
    found_in, found_out = contrast(z, tau)
    torch.testing.assert_close(found_in, expected_in)
    torch.testing.assert_close(found_out, expected_out)
    for found, expected in ((found_in, expected_in), (found_out, expected_out)):
        (one,), (other,) = (torch.autograd.grad(loss, z, retain_graph=True) for loss in (found, expected))
        torch.testing.assert_close(one, other)


def test_the_loss_adds_the_rotation_of_the_same_views() -> None:
    found, x = made(), grey(4)
    state = found.noise.get_state()
    (losses,) = found.plays(Batch(x, torch.arange(4)))
    found.noise.set_state(state)
    views = torch.cat([found.augmented(x), found.augmented(x)])
    f = found.network(torch.cat([torch.rot90(views, turn, (2, 3)) for turn in range(4)]))
    inliers, outliers = contrast(F.normalize(found.head(f)), 0.5)
    log_p = found.rotation(f).log_softmax(1)
    rotation = -torch.stack([log_p[i, i // 8] for i in range(32)]).mean()
    torch.testing.assert_close(losses["network"], inliers + outliers + rotation)


def test_views_are_crops_in_changed_colours() -> None:
    x = torch.arange(16.0).repeat(3, 16, 1)[None] / 15
    whole = torch.tensor([[1.0, 0, 0]])
    torch.testing.assert_close(cropped(x, whole, torch.ones(1)), x)
    torch.testing.assert_close(cropped(x, whole, -torch.ones(1)), x.flip(3))
    right = cropped(x, torch.tensor([[0.5, 0.5, 0.0]]), torch.ones(1))
    assert right[0, 0, 0, 0] > 0.49 and right[0, 0, 0, -1] > 0.95
    boxes = made("model.detector.crop=0.3").boxes_of(500)
    assert 0.3**0.5 <= boxes[:, 0].min() < 0.6 and boxes[:, 0].max() > 0.95
    assert bool((boxes[:, 1:].abs().max(1).values + boxes[:, 0] <= 1 + 1e-6).all()), "within the image"
    grey_ones = (made("model.detector.grey=0.5").augmented(grey(200)).std(1).amax((1, 2)) < 1e-6).float().mean()
    assert 0.35 < grey_ones < 0.65
    none = [f"model.detector.{key}" for key in ("crop=1", "jitter=0", "grey=0", "flip=false")]
    torch.testing.assert_close(made(*none).augmented(grey(5)), grey(5))
    assert made(shape=(1, 16, 16)).augmented(grey(5, shape=(1, 16, 16))).shape == (5, 1, 16, 16)


def test_a_view_is_cropped_and_mirrored_then_changed_in_brightness_contrast_and_saturation() -> None:
    found, x = made("model.detector.jitter=0.3", "model.detector.grey=0.5"), grey(40)
    state = found.noise.get_state()
    views = found.augmented(x)
    found.noise.set_state(state)

    def drawn() -> Tensor:
        return torch.rand(40, 1, 1, 1, generator=found.noise)

    mirrored = drawn().flatten() < 0.5
    cut = cropped(x, found.boxes_of(40), torch.where(mirrored, -1.0, 1.0))
    brightness, contrast_, saturation = (0.7 + 0.6 * drawn() for _ in range(3))
    coloured = drawn() >= 0.5
    for one, view, *given in zip(cut, views, brightness, contrast_, saturation, coloured, strict=True):
        b, c, s, has_colour = (value.item() for value in given)
        one = (b * one).clamp(0, 1)
        one = (one.mean() + c * (one - one.mean())).clamp(0, 1)
        luminance = 0.299 * one[0] + 0.587 * one[1] + 0.114 * one[2]
        torch.testing.assert_close(view, (luminance + s * has_colour * (one - luminance)).clamp(0, 1))
    assert 8 < mirrored.sum() < 32 and 8 < coloured.sum() < 32


@pytest.mark.parametrize("norm_power", [0, 1])
def test_its_terms_are_likeness_and_the_rotation(norm_power: int) -> None:
    found, x, normal = made(f"model.detector.norm_power={norm_power}").eval(), grey(3), grey(30, 2)
    with torch.no_grad():
        found.after_fit(normal)
        assert found.boxes.shape == (10, 3) and found.boxes[0].tolist() == [1, 0, 0]
        expected = torch.zeros(2, 3)
        for box in found.boxes:
            for turn in range(4):
                view = torch.rot90(cropped(x, box.expand(3, 3), torch.ones(3)), turn, (2, 3))
                f, of_normals = found.network(view), found.network(torch.rot90(normal[~spared(normal)], turn, (2, 3)))
                cosines = F.cosine_similarity(f[:, None], of_normals[None], dim=2)
                expected[0] -= cosines.max(1).values * f.norm(dim=1) ** norm_power / 10
                expected[1] -= found.rotation(f).log_softmax(1)[:, turn] / 10
        terms = found.terms(x)
    torch.testing.assert_close(terms["likeness"], expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(terms["rotations"], expected[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("override", "message"), [("crop=0", "crop above 0"), ("norm_power=2", "norm_power=2")])
def test_what_it_cannot_do_is_said(override: str, message: str) -> None:
    with pytest.raises(Exception, match=message):
        made(f"model.detector.{override}")


def test_it_runs_in_the_precision_that_its_yaml_recommends(tmp_path: Path) -> None:
    """The command in the yaml asks for bf16-mixed, in which the contrast alone is in float32."""
    where = [f"runs={tmp_path}", f"data_dir={tmp_path}", "trainer.progress=false", "logger=none", "normal_class=1"]
    tiny = ["model.input.size=16", "model.detector.width=4", "model.detector.crops=1", "split.max_train=40"]
    tiny += ["split.max_test=20", "model.budget.epochs=1", "model.budget.epoch_steps=2", "trainer.precision=bf16-mixed"]
    made = run(config.compose(["model=rotation_contrast", *tiny, *where]))
    assert made is not None and made["images_per_second"] > 0 and made["peak_memory_mb"] > 0
    assert 0 <= made["metrics"]["auroc"] <= 1 and made["learned"]["distinct_scores"] > 10


@pytest.mark.slow
def test_a_short_training_tells_rotations_and_ones(tmp_path: Path) -> None:
    """A smoke test: the losses fall and the score is above that of the mean image; no claim about any table."""
    where = [f"runs={tmp_path}", f"data_dir={tmp_path}", "trainer.progress=false", "logger=none", "normal_class=1"]
    size = ["model.input.size=16", "model.detector.flip=false", "model.detector.width=4", "model.budget.epoch_steps=40"]
    mean = run(config.compose(["model=mean_image", *where]))
    learned = run(config.compose(["model=rotation_contrast", *size, "model.detector.crops=2", *where]))
    assert mean is not None and learned is not None
    first, last = learned["history"][0], learned["history"][-1]
    assert all(last[name] < first[name] for name in ("loss_inliers", "loss_outliers", "loss_rotation"))
    assert learned["metrics"]["auroc"] > mean["metrics"]["auroc"]
