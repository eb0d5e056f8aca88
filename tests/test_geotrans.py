"""GeoTrans and GOAD: their transformations, losses and scores with plain torch."""

from __future__ import annotations

import itertools

import pytest
import torch
from gradients import assert_alike
from test_methods import batch, detector, images
from torch import Tensor
from torch.nn import functional as F

from anomaly_lab.methods.geotrans import GeoTrans, Transformations, most_likely_dirichlet
from anomaly_lab.methods.goad import GOAD
from anomaly_lab.methods.rotation_prediction import translated

SETS = [(True, 8, 72), (False, 8, 36), (True, 0, 8), (False, 0, 4)]


def by_hand(x: Tensor, flips: bool, shift: int) -> list[Tensor]:
    """All transformations of images, one after another."""
    views = []
    for flip, step_y, step_x, turn in itertools.product(
        range(1 + flips), range(3 if shift else 1), range(3 if shift else 1), range(4)
    ):
        view = torch.flip(x, (3,)) if flip else x
        if shift:
            view = translated(view, torch.tensor([[step_x] * len(x), [step_y] * len(x)]), shift)
        views.append(torch.rot90(view, turn, (2, 3)))
    return views


@pytest.mark.parametrize(("flips", "shift", "count"), SETS)
def test_every_transformation_is_another_one_and_the_first_is_none(flips: bool, shift: int, count: int) -> None:
    made, x = Transformations(flips, shift), images(5, (3, 32, 32))
    expected = by_hand(x, flips, shift)
    assert made.count == len(expected) == count
    for (number, view), wanted in zip(made.all_of(x), expected, strict=True):
        assert torch.equal(view, wanted), number
    assert torch.equal(expected[0], x)
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(expected, 2))
    mixed = torch.tensor([0, count - 1, 1, count // 2, 2])
    assert torch.equal(made(x, mixed), torch.stack([expected[k][i] for i, k in enumerate(mixed.tolist())]))


# GeoTrans -----------------------------------------------------------------------------------------------------------


def geotrans(*overrides: str) -> GeoTrans:
    made = detector("geotrans", "model.detector.flips=true", "model.detector.shift=0", *overrides)
    assert isinstance(made, GeoTrans)
    return made


def test_a_step_asks_which_transformation_an_image_went_through() -> None:
    made, x = geotrans(), images()
    state = made.noise.get_state()
    (losses,) = made.plays(batch())
    made.noise.set_state(state)
    number = torch.randint(8, (8,), generator=made.noise)
    assert len(set(number.tolist())) > 2
    views = by_hand(x, True, 0)
    p = made.classifier(torch.stack([views[k][i] for i, k in enumerate(number.tolist())])).softmax(1)
    torch.testing.assert_close(losses["classifier"], -p[torch.arange(8), number].log().mean())


def test_its_score_is_the_log_density_of_dirichlet_distributions_fitted_to_normal_answers() -> None:
    made, x = geotrans().eval(), images(3)
    expected, softmax = torch.zeros(3, dtype=torch.float64), torch.zeros(3)
    with torch.no_grad():
        answers = [made.classifier(view).double().log_softmax(1) for view in by_hand(images(30, seed=2), True, 0)]
        torch.testing.assert_close(made.get_buffer("alpha"), torch.stack([most_likely_dirichlet(y) for y in answers]))
        # Untrained, all answers are alike and alpha is so large that alpha - 1 is alpha.
        made.set_fitted("alpha", torch.rand(8, 8, generator=torch.Generator().manual_seed(4)).double() * 3 + 0.2)
        for number, view in enumerate(by_hand(x, True, 0)):
            alpha = made.get_buffer("alpha")[number]
            p = made.classifier(view).double().softmax(1)
            constant = torch.lgamma(alpha.sum()) - torch.lgamma(alpha).sum()
            expected -= (torch.distributions.Dirichlet(alpha, validate_args=False).log_prob(p) - constant) / 8
            softmax -= p[:, number].float() / 8
        torch.testing.assert_close(made.combine(made.terms(x)), expected.float())
        torch.testing.assert_close(made.terms(x)["softmax"], softmax)


def test_the_dirichlet_fit_has_no_likelier_neighbour() -> None:
    torch.manual_seed(0)
    true = torch.tensor([2.0, 0.5, 7.0], dtype=torch.float64)
    log_p = torch.distributions.Dirichlet(true).sample((20000,)).clamp(min=1e-300).log()
    alpha = most_likely_dirichlet(log_p)
    torch.testing.assert_close(alpha, true, rtol=0.05, atol=0)
    gradient = torch.digamma(alpha.sum()) - torch.digamma(alpha) + log_p.mean(0)
    assert gradient.abs().max() < 1e-6
    certain = most_likely_dirichlet(torch.tensor([[0.0, -80.0, -90.0], [0.0, -85.0, -70.0]], dtype=torch.float64))
    assert certain.isfinite().all() and (certain > 0).all(), "a classifier without doubts"


# GOAD ---------------------------------------------------------------------------------------------------------------


def goad(*overrides: str) -> GOAD:
    made = detector("goad", "model.detector.shift=0", *overrides)
    assert isinstance(made, GOAD)
    return made


def test_its_loss_names_transformations_and_parts_their_centres() -> None:
    made, x = goad("model.detector.margin=0.3", "model.detector.w_centre=0.7").double(), images().double()
    (losses,) = made.plays(batch()._replace(x=x))
    f = made.features(torch.cat(by_hand(x, False, 0))).view(4, 8, -1)
    logits = made.classifier(f.flatten(0, 1)).view(4, 8, 4)
    centres = [f[k].mean(0) for k in range(4)]
    total = torch.zeros((), dtype=torch.float64)
    parted = 0
    for k, i in itertools.product(range(4), range(8)):
        own = ((f[k, i] - centres[k]) ** 2).sum()
        nearest = torch.stack([((f[k, i] - centres[j]) ** 2).sum() for j in range(4) if j != k]).min()
        total = total + (F.relu(own + 0.3 - nearest) * 0.7 - logits[k, i].log_softmax(0)[k]) / 32
        parted += int(own + 0.3 < nearest)
    assert_alike(losses["network"], total, made.features, made.classifier)
    assert parted < 32, "no image is within the margin"


@pytest.mark.parametrize("eps", [0.0, 0.01])
def test_its_score_is_the_improbability_of_the_right_centres(eps: float) -> None:
    made, x = goad(f"model.detector.eps={eps}").eval(), images(3)
    with torch.no_grad():
        centres = [made.features(view).mean(0) for view in by_hand(images(30, seed=2), False, 0)]
        expected = torch.zeros(3)
        for k, view in enumerate(by_hand(x, False, 0)):
            f = made.features(view)
            near = torch.stack([(-((f - c) ** 2).sum(1)).exp() + eps for c in centres], 1)
            expected -= (near[:, k] / near.sum(1)).log()
        torch.testing.assert_close(made.score(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("model", "override", "message"),
    [
        ("geotrans", "model.detector.shift=32", "shift=32: choose a number of pixels"),
        ("goad", "model.detector.shift=-1", "shift=-1: choose a number of pixels"),
        ("goad", "model.detector.eps=-1", "eps=-1: choose a number from 0"),
    ],
)
def test_a_wrong_option_is_named(model: str, override: str, message: str) -> None:
    with pytest.raises(Exception, match=message):
        detector(model, override)
