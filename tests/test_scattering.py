"""The scattering transform: its definition, Kymatio's numbers, and what it is used for."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from anomaly_lab.scattering import LogScattering

EPS = 1e-4


def coefficients(x: Tensor, scales: int, angles: int) -> Tensor:
    """S x (B,K,s,s) of images (B,1,S,S)."""
    made: Tensor = LogScattering(x.shape[-1], scales=scales, angles=angles, eps=EPS)(x)
    return made.exp() - EPS


def images(size: int, count: int = 3, channels: int = 1) -> Tensor:
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("size", "scales", "angles"), [(32, 3, 8), (16, 2, 6), (32, 1, 4)])
def test_the_coefficients_are_kymatios(size: int, scales: int, angles: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import scipy.special

    monkeypatch.setattr(scipy.special, "sph_harm", None, raising=False)  # gone from SciPy; Kymatio needs it in 3D alone
    kymatio = pytest.importorskip("kymatio.torch", reason="Kymatio is not installed", exc_type=ImportError)
    x = images(size)
    theirs = kymatio.Scattering2D(J=scales, shape=(size, size), L=angles)(x)[:, 0]
    # Kymatio takes 3.1415 for pi where it normalises its filters: 3e-5 an order.
    torch.testing.assert_close(coefficients(x, scales, angles), theirs, rtol=1.2e-4, atol=1e-6)


def wavelet(size: int, scale: int, number: int, angles: int) -> np.ndarray:
    """A Morlet wavelet as printed, by loops over positions and periods, complex (size,size)."""
    sigma, xi = 0.8 * 2**scale, 0.75 * math.pi / 2**scale
    angle = (angles - angles // 2 - 1 - number) * math.pi / angles
    gabor, envelope = np.zeros((size, size), complex), np.zeros((size, size))
    for row, column in itertools.product(range(size), repeat=2):
        for down, right in itertools.product(range(-2, 3), repeat=2):
            y, x = row + down * size, column + right * size
            along, across = y * math.cos(angle) + x * math.sin(angle), x * math.cos(angle) - y * math.sin(angle)
            g = (
                math.exp(-(along**2 + (4 / angles * across) ** 2) / (2 * sigma**2))
                * 4
                / angles
                / (2 * math.pi * sigma**2)
            )
            envelope[row, column] += g
            gabor[row, column] += g * np.exp(1j * xi * along)
    return gabor - gabor.sum() / envelope.sum() * envelope


def convolved(x: np.ndarray, h: np.ndarray) -> np.ndarray:
    """Circular convolution, as a sum over every position."""
    return sum(h[i, j] * np.roll(x, (i, j), (0, 1)) for i, j in itertools.product(range(len(h)), repeat=2))


def test_the_coefficients_are_the_definition() -> None:
    """Without a Fourier transform, and sampled at the end alone; sampling in between costs the stated error."""
    size, scales, angles = 8, 2, 4
    x = images(size, count=1)
    found = coefficients(x, scales, angles)[0].numpy()
    padded = np.pad(x[0, 0].double().numpy(), 2**scales, mode="reflect")
    distance = np.minimum(np.arange(16), 16 - np.arange(16))
    low = np.exp(-(distance**2) / (2 * 1.6**2))
    smooth = np.outer(low, low) / low.sum() ** 2
    wavelets = {(j, t): wavelet(16, j, t, angles) for j in range(scales) for t in range(angles)}

    def averaged(u: np.ndarray) -> np.ndarray:
        return convolved(u, smooth)[::4, ::4][1:-1, 1:-1]

    first = {key: np.abs(convolved(padded, psi)) for key, psi in wavelets.items()}
    order0, order1 = [averaged(padded)], [averaged(u) for u in first.values()]
    order2 = [
        averaged(np.abs(convolved(first[0, t], wavelets[1, s]))) for t, s in itertools.product(range(angles), repeat=2)
    ]
    np.testing.assert_allclose(found[0], order0[0], rtol=1e-4)
    np.testing.assert_allclose(found[1:5], order1[:4], rtol=1e-4)  # scale 0: nothing is sampled in between
    for part, exact in ((found[5:9], order1[4:]), (found[9:], order2)):
        assert np.abs(part - exact).max() < 0.03 * np.abs(exact).max()
    assert len(found) == 1 + 8 + 16


def test_a_constant_has_no_wavelet_coefficients_and_channels_stay_apart() -> None:
    flat = coefficients(torch.full((1, 1, 32, 32), 0.5), 3, 8)[0]
    assert flat[0].numpy() == pytest.approx(0.5, abs=1e-5) and float(flat[1:].abs().max()) < 1e-5
    transform = LogScattering(32, scales=3, angles=8, eps=EPS)
    x = images(32, channels=3)
    assert transform(x).shape == (3, 3 * 217, 4, 4) and transform.paths == 217
    torch.testing.assert_close(transform(x)[:, 217:434], transform(x[:, 1:2]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(transform(x)[:1], transform(x[:1]), rtol=1e-4, atol=1e-4)


def test_a_shift_moves_features_less_than_pixels() -> None:
    x = torch.zeros(1, 1, 32, 32)
    x[..., 8:24, 14:18] = 1  # a bar
    moved = x.roll(1, -1)
    before, after = (LogScattering(32, scales=3, angles=8, eps=EPS)(image) for image in (x, moved))
    spread = (before - before.mean()).norm()
    assert (after - before).norm() / spread < 0.4 * (moved - x).norm() / (x - x.mean()).norm()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"size": 28}, "larger multiple of 8"),
        ({"size": 8}, "larger multiple of 8"),
        ({"eps": 0.0}, "positive numbers"),
    ],
)
def test_what_it_cannot_do_is_said(given: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LogScattering(**{"size": 32, "scales": 3, "angles": 8, "eps": EPS, **given})  # type: ignore[arg-type]
