"""Methods without a gradient against formulas written out, other implementations, and what a run makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA as SklearnPCA
from torch import Tensor
from torch.distributions import MultivariateNormal

from anomaly_lab import config
from anomaly_lab.build import make_data, make_detector
from anomaly_lab.detector import Detector, scores
from anomaly_lab.methods.knn import NearestNeighbours
from anomaly_lab.methods.mean_image import MeanImage
from anomaly_lab.methods.pca import PCA, log_likelihoods, principal_axes
from anomaly_lab.metrics import auroc
from anomaly_lab.run import run

SHAPE = (1, 4, 4)

D = TypeVar("D", bound=Detector)


def images(count: int, seed: int = 0, rank: int = 16, noise: float = 0.0) -> Tensor:
    """Gaussian images (N,1,4,4) of that rank, with white noise."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(rank, 16, generator=torch.Generator().manual_seed(100))
    x = torch.randn(count, rank, generator=generator) @ mixing + noise * torch.randn(count, 16, generator=generator)
    return x.view(count, *SHAPE) + 0.5


def fitted(made: D, x: Tensor) -> D:
    with torch.no_grad():
        made.eval().after_fit(x)
    return made


# Floors ---------------------------------------------------------------------------------------------------------------


def test_mean_image_is_the_distance_to_the_mean() -> None:
    train, x = images(50), images(7, seed=1)
    difference = x.double().numpy() - train.double().numpy().mean(0)
    for norm, expected in (("l1", np.abs(difference)), ("l2", difference**2)):
        made = fitted(MeanImage(SHAPE, norm=norm), train)  # type: ignore[arg-type]
        np.testing.assert_allclose(scores(made, x).score, expected.mean((1, 2, 3)), rtol=1e-5)
        assert torch.equal(made.reconstruct(x)[0], made.reconstruct(x)[6])
    with pytest.raises(ValueError, match="norm=l3: choose one of l1, l2"):
        MeanImage(SHAPE, norm="l3")  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [10, 200])  # fewer and more images than pixels
def test_pca_is_the_residual_of_scikit_learn_and_the_gaussian_written_out(count: int) -> None:
    train, x, k = images(count), images(7, seed=1), 3
    made = fitted(PCA(SHAPE, score="residual", components=k), train)
    other = SklearnPCA(k).fit(train.flatten(1).double())
    flat = x.flatten(1).double()
    expected = ((flat.numpy() - other.inverse_transform(other.transform(flat))) ** 2).mean(1)
    np.testing.assert_allclose(scores(made, x).score, expected, rtol=1e-4)
    torch.testing.assert_close((x - made.reconstruct(x)).square().mean((1, 2, 3)), scores(made, x).score)

    made = fitted(PCA(SHAPE, score="likelihood", components=k), train)
    np.testing.assert_allclose(scores(made, x).score, -gaussian(train, k).log_prob(flat), rtol=1e-4)
    assert set(made.terms(x)) == {"residual", "likelihood"}


def gaussian(train: Tensor, k: int) -> MultivariateNormal:
    """Probabilistic PCA at its maximum likelihood, its covariance W W' + s^2 I written out."""
    flat = train.flatten(1).double()
    values, vectors = torch.linalg.eigh(torch.cov(flat.T, correction=0))
    noise = values[:-k].mean()
    w = vectors[:, -k:] * (values[-k:] - noise).sqrt()
    return MultivariateNormal(flat.mean(0), w @ w.T + noise * torch.eye(flat.shape[1], dtype=torch.float64))


@pytest.mark.parametrize("count", [10, 200])
def test_log_likelihoods_of_all_numbers_of_components_at_once(count: int) -> None:
    train, x = images(count), images(30, seed=1).flatten(1)
    axes = principal_axes(train.flatten(1))
    found = log_likelihoods(axes, x)
    assert len(found) == len(axes.variance) - 1 == min(count - 1, 16) - 1
    for k in range(1, len(found) + 1):
        torch.testing.assert_close(found[k - 1], gaussian(train, k).log_prob(x.double()).mean(), rtol=1e-6, atol=0)


def test_the_likeliest_number_of_components_is_the_planted_one_and_follows_from_the_seed() -> None:
    train = images(400, rank=3, noise=0.1)
    fits = []
    for seed in (1, 1, 2):
        made = PCA(SHAPE, score="residual", components=None)
        made.randomness.follow(seed)
        fits.append(fitted(made, train))
        assert made.direction.shape == (16, 3)
    x = images(5, seed=1)
    assert torch.equal(fits[0].score(x), fits[1].score(x))
    with pytest.raises(ValueError, match="components=12: 10 training images span 9 dimensions, give fewer"):
        fitted(PCA(SHAPE, score="residual", components=12), images(10))


def test_nearest_neighbours_are_exact() -> None:
    train, x = images(300) + 10, images(20, seed=1) + 10  # far from the origin, where a matrix product cancels
    made = fitted(NearestNeighbours(SHAPE, neighbours=3), train)
    distances = torch.cdist(
        x.flatten(1).double(), train.flatten(1).double(), compute_mode="donot_use_mm_for_euclid_dist"
    )
    expected = distances.sort(1).values[:, :3].mean(1)
    np.testing.assert_allclose(scores(made, x).score, expected, rtol=1e-5)
    alone = fitted(NearestNeighbours(SHAPE, neighbours=1), train)
    assert torch.equal(scores(alone, train).score, torch.zeros(300)), "an image is its own neighbour, exactly"
    with pytest.raises(ValueError, match="neighbours=9: there are only 8 training images"):
        fitted(NearestNeighbours(SHAPE, neighbours=9), images(8))


# What a run makes of them ---------------------------------------------------------------------------------------------


def test_what_only_steps_read_is_no_part_of_a_run_without_steps(tmp_path: Path) -> None:
    where = [f"runs={tmp_path}", f"data_dir={tmp_path}", "trainer.progress=false", "logger=none"]
    plain = ["model=knn", "normal_class=1", *where]
    result = run(config.compose(plain))
    assert result is not None and result["epochs"] == 0 and result["images_per_second"] is None
    assert result["seconds"]["fit"] > 0
    budgeted = config.compose([*plain, "model.budget.epochs=3", "model.batch_size=32", "model.clip=1"])
    assert config.job(budgeted).out == config.job(config.compose(plain)).out
    assert run(budgeted) == result, "done before"
    assert config.job(config.compose([*plain, "model.detector.neighbours=1"])).out != config.job(budgeted).out
    learning = [config.compose([f"model.budget.epochs={epochs}"]) for epochs in (3, 4)]
    assert config.job(learning[0]).out != config.job(learning[1]).out


@pytest.mark.data
def test_the_mean_image_on_mnist(data_dir: Path) -> None:
    """What an audit of ours found with ten lines of numpy, digit by digit."""
    found = []
    for digit in range(10):
        where = ["dataset=mnist", "split=official", f"normal_class={digit}", f"data_dir={data_dir}"]
        cfg = config.compose(["model=mean_image", *where])
        data = make_data(config.job(cfg))
        made = fitted(make_detector(cfg, data.image_shape), data.prepared("train"))
        found.append(auroc(scores(made, data.prepared("test")).score.numpy(), data.partition.test_truth))
    expected = [0.968, 0.988, 0.796, 0.860, 0.877, 0.727, 0.875, 0.911, 0.799, 0.882]
    np.testing.assert_allclose(found, expected, atol=6e-4)
