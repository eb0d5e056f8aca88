"""Distances in a regularised metric, held to the covariance itself, and the sum of what is rare among normals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from anomaly_lab.calibration import surprisal
from anomaly_lab.methods.scatter_subspace import ScatterSubspace, leading_axes


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def features(count: int, seed: int) -> Tensor:
    """(N,2,3,3), with a few strong directions."""
    shape = torch.randn(18, 18, generator=generator()) * torch.logspace(1, -1, 18)
    return (torch.randn(count, 18, generator=generator(seed)) @ shape.T + 3).view(count, 2, 3, 3)


def fitted(axes: int, **given: float) -> ScatterSubspace:
    made = ScatterSubspace((2, 3, 3), axes=axes, **{"ridge": 0.5, "neighbours": 3, **given}).eval()  # type: ignore[arg-type]
    made.randomness.settle(torch.device("cpu"))
    with torch.no_grad():
        made.after_fit(features(60, 1))
    return made


def test_with_all_axes_both_terms_are_distances_under_the_regularised_covariance() -> None:
    x, normal = features(10, 2), features(60, 1).flatten(1).double()
    covariance = torch.cov(normal.T, correction=0)
    metric = torch.linalg.inv(covariance + 0.5 * covariance.trace() / 18 * torch.eye(18))

    def distance(a: Tensor, b: Tensor) -> Tensor:
        return ((a - b) @ metric * (a - b)).sum(-1).sqrt()

    terms = fitted(18).terms(x)
    flat = x.flatten(1).double()
    torch.testing.assert_close(terms["gaussian"].double(), distance(flat, normal.mean(0)), rtol=1e-3, atol=1e-3)
    nearest = distance(flat[:, None], normal).sort(1).values[:, :3].mean(1)
    torch.testing.assert_close(terms["neighbours"].double(), nearest, rtol=1e-3, atol=1e-3)


def test_with_few_axes_the_variance_beyond_them_is_isotropic() -> None:
    x, normal = features(10, 2).flatten(1).double(), features(60, 1).flatten(1).double()
    variances, directions = torch.linalg.eigh(torch.cov(normal.T, correction=0))
    ridge = 0.5 * variances.mean()
    variances[:-4] = variances[:-4].mean()
    places = (x - normal.mean(0)) @ directions
    expected = (places.square() / (variances + ridge)).sum(1).sqrt()
    torch.testing.assert_close(fitted(4).terms(x.float())["gaussian"].double(), expected, rtol=1e-3, atol=1e-3)


def test_leading_axes_are_those_of_the_covariance() -> None:
    x = torch.randn(300, 200, generator=generator()) * torch.logspace(1, -2, 200)
    x = x - x.mean(0)
    variances, directions = leading_axes(x, 20, generator(1))
    expected = torch.linalg.eigvalsh(x.T @ x / 300).flip(0)[:20]
    torch.testing.assert_close(variances, expected, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(directions.T @ directions, torch.eye(20), rtol=0, atol=1e-4)
    assert len(leading_axes(x[:5], 20, generator(1))[0]) == 4, "no more than there are"


def test_surprise_is_the_share_of_normals_with_at_least_that_value() -> None:
    normal = torch.randn(500, generator=generator()).sort().values
    of_themselves = surprisal(normal, normal)
    shares = torch.tensor([(normal >= value).sum() / 501 for value in normal])
    torch.testing.assert_close(of_themselves, -shares.log(), rtol=1e-3, atol=1e-3)
    values = torch.linspace(-10, 50, 2000)  # from below all normals to far beyond them
    found = surprisal(values, normal)
    assert bool((found.diff() > 0).all()) and bool(found.isfinite().all()), "no two values tie"


def test_a_score_adds_the_surprise_of_both_terms_and_ranks_strange_images_last() -> None:
    made = fitted(6)
    normal, strange = features(30, 3), torch.randn(30, 2, 3, 3, generator=generator(4)) * 20
    x = torch.cat([normal, strange])
    terms = made.terms(x)
    expected = surprisal(terms["gaussian"], made.held_out[0]) + surprisal(terms["neighbours"], made.held_out[1])
    torch.testing.assert_close(made.score(x), expected)
    assert made.score(strange).min() > made.score(normal).max()
    assert made.held_out.shape == (2, 12), "a fifth of the training images"


def test_what_it_cannot_do_is_said() -> None:
    with pytest.raises(ValueError, match="positive numbers"):
        fitted(0)
    with pytest.raises(ValueError, match="60 training images are too few for neighbours=12"):
        fitted(4, neighbours=12)
    assert np.isfinite(fitted(4, neighbours=11).held_out.numpy()).all()


def test_an_image_has_the_same_score_alone_and_in_a_crowd() -> None:
    """Features far from their origin and neighbours near each other: what float32 leaves of their distances differs."""
    made = fitted(18, ridge=1e-3)
    x = features(60, 2)
    crowd = made.score(x)
    assert (crowd - torch.cat([made.score(one[None]) for one in x])).abs().max() < 1e-5 * crowd.std()
