"""Methods without a gradient against formulas written out, other implementations, and what a run makes of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import scipy.spatial
import torch
from numpy.typing import NDArray
from sklearn import ensemble, mixture, neighbors, svm
from sklearn.decomposition import PCA as SklearnPCA
from torch import Tensor
from torch.distributions import MultivariateNormal

from anomaly_lab import config
from anomaly_lab.build import make_data, make_detector
from anomaly_lab.detector import Detector, scores
from anomaly_lab.methods.classical import (
    BANDWIDTHS,
    GaussianMixture,
    IsolationForest,
    KernelDensity,
    LocalOutlierFactor,
    OneClassSVM,
)
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
    with pytest.raises(ValueError, match=r"12: 10 training images span 9 dimensions: write .*components=8, "):
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


# The scikit-learn family ---------------------------------------------------------------------------------------------

CLASSICAL = {
    "ocsvm": (OneClassSVM, {"nu": 0.1, "gamma": None}),
    "kde": (KernelDensity, {"bandwidth": None}),
    "isolation_forest": (IsolationForest, {"trees": 20, "samples": 64}),
    "lof": (LocalOutlierFactor, {"neighbours": 5}),
    "gmm": (GaussianMixture, {"components": 2, "ridge": 1e-3}),
}


def sklearns(name: str, made: Any, z: NDArray[np.float64], x: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """Scores of scikit-learn's own estimator of the same hyper-parameters."""
    estimators = {
        "ocsvm": lambda: svm.OneClassSVM(nu=0.1, gamma=float(made.scale)),
        # One leaf: with more, its bounds cancel where the density is low (89.6 for 117.1 in this very test).
        "kde": lambda: neighbors.KernelDensity(bandwidth=float(made.width), leaf_size=len(z)),
        "isolation_forest": lambda: ensemble.IsolationForest(n_estimators=20, max_samples=64, random_state=seed),
        "lof": lambda: neighbors.LocalOutlierFactor(n_neighbors=5, novelty=True),
        "gmm": lambda: mixture.GaussianMixture(2, reg_covar=1e-3, random_state=seed),
    }
    fitted = estimators[name]().fit(z)
    return -(fitted.decision_function(x) if name == "ocsvm" else fitted.score_samples(x))


@pytest.mark.parametrize(("contrast", "pca_variance"), [(False, None), (False, 0.9), (True, 0.9)])
@pytest.mark.parametrize("name", CLASSICAL)
def test_classical_scores_are_scikit_learns(name: str, contrast: bool, pca_variance: float | None) -> None:
    kind, arguments = CLASSICAL[name]
    made: Any = kind(SHAPE, contrast=contrast, pca_variance=pca_variance, **arguments)
    made.randomness.follow(3)
    again = torch.Generator().manual_seed(made.noise.initial_seed())
    train, x = images(200), torch.cat([images(20, seed=1), 3 * images(5, seed=2)])
    with torch.no_grad():
        fitted(made, train)
        z, new = made.features(train).numpy(), made.features(x).numpy()
    assert z.shape[1] == 16 if pca_variance is None else z.shape[1] < 16
    seed = int(torch.randint(2**31 - 1, (), generator=again))  # the first that a forest or a mixture draws
    np.testing.assert_allclose(
        made.score_features(torch.from_numpy(new)), sklearns(name, made, z, new, seed), rtol=1e-5
    )
    assert made.score(x).dtype == torch.float32
    darker = torch.allclose(made.score(0.5 * x - 0.3), made.score(x), rtol=1e-4)
    assert darker == contrast, "neither brightness nor contrast count after the normalisation, and both do without"

    kept = {"state_dict": made.state_dict()}
    made.on_save_checkpoint(kept)
    other = kind(SHAPE, contrast=contrast, pca_variance=pca_variance, **arguments)
    other.on_load_checkpoint(kept)
    other.load_state_dict(kept["state_dict"])
    assert torch.equal(other.score(x), made.score(x)), "all that it found is in the checkpoint"


def test_hyper_parameters_follow_from_normals_alone() -> None:
    train = images(150)
    z = train.flatten(1).double()
    made = fitted(OneClassSVM(SHAPE, contrast=False, pca_variance=None, nu=0.1, gamma=None), train)
    median = np.median(scipy.spatial.distance.pdist(z.numpy(), "sqeuclidean"))
    assert 1 / float(made.scale) == pytest.approx(median, rel=1e-3)  # torch takes the lower of two middle values
    found = KernelDensity.leave_one_out(z)
    for i in (6, 9):
        others = [np.delete(z.numpy(), j, 0) for j in range(len(z))]
        density = [
            neighbors.KernelDensity(bandwidth=BANDWIDTHS[i], leaf_size=len(z)).fit(rest).score(z[j : j + 1].numpy())
            for j, rest in enumerate(others)
        ]
        assert found[i] == pytest.approx(np.mean(density), rel=1e-6)
    chosen = fitted(KernelDensity(SHAPE, contrast=False, pca_variance=None, bandwidth=None), train)
    assert float(chosen.width) == BANDWIDTHS[int(np.argmax(found))]
    two = torch.cat([images(100) * 0.1 - 3, images(100, seed=1) * 0.1 + 3])
    mixture_of_two = fitted(GaussianMixture(SHAPE, contrast=False, pca_variance=None, components=None, ridge=1e-3), two)
    assert len(mixture_of_two.mean) == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: OneClassSVM(SHAPE, contrast=False, pca_variance=None, nu=0, gamma=None),
            "nu=0: give a number above 0",
        ),
        (
            lambda: OneClassSVM(SHAPE, contrast=False, pca_variance=None, nu=0.1, gamma=0),
            "gamma=0: give a number above 0",
        ),
        (
            lambda: fitted(
                OneClassSVM(SHAPE, contrast=False, pca_variance=None, nu=0.1, gamma=None),
                torch.cat([images(1).repeat(90, 1, 1, 1), images(10, seed=1)]),
            ),
            "copies of each other, so no gamma follows",
        ),
        (
            lambda: fitted(PCA(SHAPE, score="residual", components=None), images(1).repeat(30, 1, 1, 1)),
            "too much alike for principal components",
        ),
        (
            lambda: KernelDensity(SHAPE, contrast=False, pca_variance=2, bandwidth=None),
            "pca_variance=2: give a number above 0",
        ),
        (
            lambda: KernelDensity(SHAPE, contrast=False, pca_variance=None, bandwidth=-1),
            "bandwidth=-1: give a number above 0",
        ),
        (
            lambda: IsolationForest(SHAPE, contrast=False, pca_variance=None, trees=0, samples=9),
            "trees=0, samples=9: give at least",
        ),
        (
            lambda: LocalOutlierFactor(SHAPE, contrast=False, pca_variance=None, neighbours=0),
            "neighbours=0: give a whole number",
        ),
        (
            lambda: GaussianMixture(SHAPE, contrast=False, pca_variance=None, components=0, ridge=0.1),
            "components=0: give a whole",
        ),
        (
            lambda: fitted(LocalOutlierFactor(SHAPE, contrast=False, pca_variance=None, neighbours=9), images(9)),
            "only 9 training",
        ),
    ],
)
def test_a_wrong_number_is_named(make: Callable[[], Detector], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
