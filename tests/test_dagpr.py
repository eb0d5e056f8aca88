"""DAGPR, reconstructed: its process against scikit-learn's, the images it removes, and the order of a round."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hydra.errors import InstantiationException
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF
from test_methods import detector, images
from torch import Tensor
from torch.nn import functional as F

from anomaly_lab.batches import Batch, PlainLoader
from anomaly_lab.detector import looking
from anomaly_lab.methods.dagpr import AutoencodingGaussianProcess


def dagpr(*overrides: str) -> AutoencodingGaussianProcess:
    made = detector("dagpr_reconstruction", *overrides)
    assert isinstance(made, AutoencodingGaussianProcess)
    return made


def regressed(codes: Tensor, new: Tensor, noise: float) -> tuple[Tensor, Tensor]:
    """Mean and variance of scikit-learn's process of ones at new codes, its length from the median distance."""
    z = codes.double().numpy()
    apart = [((a - b) ** 2).sum() for i, a in enumerate(z) for b in z[:i]]
    median = sorted(apart)[(len(apart) - 1) // 2]
    kernel = RBF(np.sqrt(median / 2), "fixed")
    process = GaussianProcessRegressor(kernel, alpha=noise, optimizer=None).fit(z, np.ones(len(z)))
    mean, deviation = process.predict(new.double().numpy(), return_std=True)
    return torch.from_numpy(mean).float(), torch.from_numpy(deviation**2).float()


def test_its_autoencoder_moves_on_the_squared_error() -> None:
    made, x = dagpr(), images()
    plays = list(made.plays(Batch(x, torch.arange(len(x)))))
    assert [set(losses) for losses in plays] == [{"autoencoder"}]
    torch.testing.assert_close(plays[0]["autoencoder"], F.mse_loss(made.decoder(made.encoder(x)), x))


def test_its_score_is_the_variance_of_a_process_of_ones() -> None:
    made, x, new = dagpr("model.detector.contamination=0", "model.detector.noise=0.2"), images(20), images(6, seed=3)
    with looking(made):
        made.before_fit(x)
        made.after_fit(x)
        codes, others = made.encoder(x), made.encoder(new)
        mean, variance = regressed(codes, others, 0.2)
        terms = made.terms(new)
        torch.testing.assert_close(terms["variance"], variance, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(terms["mean"], 1 - mean, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(terms["reconstruction"], (new - made.decoder(others)).square().mean((1, 2, 3)))
        assert torch.equal(made.combine(terms), terms["variance"])
        assert variance.std() > 1e-3, "one score for all would pass"


def test_the_process_is_told_of_so_many_images_in_use_as_it_may() -> None:
    made, x = dagpr("model.detector.contamination=0.25", "model.detector.support=7"), images(20)
    with looking(made):
        made.before_fit(x)
        made.after_fit(x)
        codes = made.encoder(x) - made.centre
    assert made.support_codes.shape == (7, 32) and made.inverse.shape == (7, 7)
    told = [int((codes - code).abs().sum(1).argmin()) for code in made.support_codes]
    assert len(set(told)) == 7 and set(told) <= set(made.used.tolist())


def test_it_removes_whom_the_process_without_them_is_least_sure_of_and_takes_them_back() -> None:
    made, x = (
        dagpr("model.detector.contamination=0.2", "model.detector.inner=2", "model.detector.noise=0.1"),
        images(15),
    )
    made._images = PlainLoader([x], made.device, leaving_out=False)
    with looking(made):
        made.before_fit(x)
        assert made.train_indices(1) is None
        made.before_epoch(1)
        made.before_epoch(2)
        assert made.train_indices(2) is None, "a round is two epochs"
        codes = made.encoder(x)
        made.before_epoch(3)
    # The length is that of all fifteen; only the process is one without the image.
    unsure = []
    for i in range(15):
        rest = torch.arange(15) != i
        kernel = (-torch.cdist(codes, codes).square() / made.scale).exp().double()
        inside = kernel[rest][:, rest] + 0.1 * torch.eye(14)
        unsure.append(float(1 - kernel[i, rest] @ torch.linalg.solve(inside, kernel[rest, i])))
    expected = sorted(sorted(range(15), key=lambda i: -unsure[i])[:3])
    assert made.rejected_images()["dropped"].tolist() == expected
    left = made.train_indices(3)
    assert left is not None and left.tolist() == [i for i in range(15) if i not in expected]
    with looking(made):
        for parameter in made.encoder.parameters():  # other codes, another decision
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)) / 4)
        made.before_epoch(5)
    assert len(made.dropped) == 3 and set(made.dropped.tolist()) != set(expected)


def test_images_that_the_process_was_not_told_of_are_judged_by_the_whole_process() -> None:
    options = ["contamination=0.3", "inner=1", "noise=0.5", "support=9"]
    made, x = dagpr(*(f"model.detector.{option}" for option in options)), images(20)
    made._images = PlainLoader([x], made.device, leaving_out=False)
    with looking(made):
        made.before_fit(x)
        made.before_epoch(2)
        codes = made.encoder(x).double() - made.centre
    told = [int((codes - code).abs().sum(1).argmin()) for code in made.support_codes]
    kernel = (-torch.cdist(codes, codes).square() / made.scale).exp()
    unsure = []
    for i in range(20):
        seen = [place for place in told if place != i]
        inside = kernel[seen][:, seen] + 0.5 * torch.eye(len(seen))
        unsure.append(float(1 - kernel[i, seen] @ torch.linalg.solve(inside, kernel[seen, i])))
    expected = sorted(sorted(range(20), key=lambda i: -unsure[i])[:6])
    assert made.rejected_images()["dropped"].tolist() == expected
    assert set(expected) & set(told) and set(expected) - set(told), "images of one kind alone would be removed"


def test_one_code_for_all_images_has_one_score() -> None:
    made, x = dagpr(), images(12)
    with looking(made):
        for parameter in made.encoder.parameters():
            parameter.zero_()
        assert not made.encoder(x).any()
        made.before_fit(x)
        made.after_fit(x)
        scores = made.score(x)
    assert torch.isfinite(scores).all() and scores.unique().numel() == 1


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("contamination=1", "choose a share"),
        ("noise=0", "above 0"),
        ("inner=0", "inner=0"),
        ("support=1", "support=1"),
    ],
)
def test_impossible_options_are_refused(option: str, said: str) -> None:
    with pytest.raises(InstantiationException, match=said):
        dagpr(f"model.detector.{option}")
