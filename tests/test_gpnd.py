"""GPND: losses, the order of the moves, and the density, term by term."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from games import moved, settle
from gradients import assert_alike
from scipy.stats import gaussian_kde, gennorm
from test_methods import batch, detector, images
from torch.nn.functional import softplus

from anomaly_lab.methods.gpnd import GPND
from anomaly_lab.players import make_players, minimise


def gpnd(*overrides: str) -> GPND:
    made = detector("gpnd", "model.detector.latent_size=3", *overrides).double()
    assert isinstance(made, GPND)
    settle(made.encoder, images(50).double())
    settle(made.decoder, torch.randn(50, 3, dtype=torch.float64))
    return made


def test_four_moves_one_after_the_other() -> None:
    assert moved(gpnd().float()) == [
        ({"image_discriminator"}, {"image_discriminator"}),
        ({"decoder"}, {"decoder"}),
        ({"latent_discriminator"}, {"latent_discriminator"}),
        ({"autoencoder"}, {"encoder", "decoder"}),
    ]


def test_the_losses_are_the_papers() -> None:
    made, x = gpnd("model.detector.w_rec=3"), images().double()
    made.randomness.restart(3, made.device)
    players = make_players(made.players(), functools.partial(torch.optim.SGD, lr=0.1))
    generator = torch.Generator().manual_seed(3)
    first, second, third = (torch.randn(8, 3, generator=generator, dtype=torch.float64) for _ in range(3))
    d_x, d_z = made.image_discriminator, made.latent_discriminator
    plays, found = made.plays(batch()._replace(x=x)), []
    for movers, expected in (
        ([d_x], lambda: softplus(-d_x(x)[0]).mean() + softplus(d_x(made.decoder(first))[0]).mean()),
        ([made.decoder], lambda: softplus(-d_x(made.decoder(second))[0]).mean()),
        ([d_z], lambda: softplus(-d_z(third)).mean() + softplus(d_z(made.encoder(x))).mean()),
        (
            [made.encoder, made.decoder],
            lambda: softplus(-d_z(made.encoder(x))).mean() + 3 * crossed(x, made.decoder(made.encoder(x))),
        ),
    ):
        losses = next(plays)
        [loss] = losses.values()
        assert_alike(loss, expected(), *movers)
        found.append(loss.item())
        minimise(losses, players)
    assert len(set(found)) == 4


def crossed(x: torch.Tensor, rebuilt: torch.Tensor) -> torch.Tensor:
    target, guess = (x + 1) / 2, (rebuilt + 1) / 2
    return -(target * guess.log() + (1 - target) * (1 - guess).log()).mean()


def test_the_score_is_minus_the_log_density() -> None:
    made, training, x = gpnd("model.detector.power=0.5").eval(), images(60, seed=5).double(), images(4).double()
    with torch.no_grad():
        made.after_fit(training)
        terms = made.terms(x)
        codes, known = (part.numpy() for part in made.off_manifold(training))
        z, r = made.off_manifold(x)
    fitted = [gennorm.fit(column) for column in codes.T]
    for row, code in enumerate(z):
        jacobian = torch.autograd.functional.jacobian(lambda code: made.decoder(code[None]).flatten(), code)
        volume = torch.linalg.svdvals(jacobian).log().sum().item()
        assert terms["jacobian"][row].item() == pytest.approx(volume, rel=1e-6)
        latent = -sum(gennorm.logpdf(code[k].item(), *fitted[k]) for k in range(3))
        assert terms["latent"][row].item() == pytest.approx(latent, rel=1e-6)
        m = 0.5 * (1024 - 3)
        place = math.lgamma(m / 2) - m / 2 * math.log(2 * math.pi) - (m - 1) * math.log(r[row].item())
        residual = -(place + gaussian_kde(known).logpdf(r[row].item()).item())
        assert terms["residual"][row].item() == pytest.approx(residual, rel=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(made.score(x), sum(terms.values()))


def test_an_entry_of_the_code_that_the_decoder_ignores_leaves_a_finite_volume() -> None:
    made = gpnd().float().eval()
    with torch.no_grad():
        first = next(layer for layer in made.decoder if isinstance(layer, torch.nn.ConvTranspose2d))
        first.weight[1].zero_()
        assert made.log_volume(torch.randn(2, 3)).isfinite().all()


def test_images_far_off_the_manifold_are_still_told_apart() -> None:
    made = gpnd().float().eval()
    with torch.no_grad():
        made.after_fit(images(60, seed=5))
        far = made.log_distance(torch.tensor([1e2, 1e3, 1e4]))
    assert far.isfinite().all() and (np.diff(far) < 0).all()


def test_a_density_fitted_to_codes_in_a_box_reaches_beyond_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made = gpnd().float().eval()
    box = torch.rand(100, 3, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(made, "off_manifold", lambda x: (box, box[:, 0]))
    with torch.no_grad():
        made.after_fit(images(100))
        found = made.log_code(torch.tensor([[0.5], [5.0], [50.0]]).expand(3, 3))
    assert made.get_buffer("gaussians")[0].max() <= 10
    assert found.isfinite().all() and (found.diff(dim=0) < 0).all()


def test_a_power_of_nothing_is_refused() -> None:
    with pytest.raises(Exception, match="power=0: give a number above 0"):
        gpnd("model.detector.power=0")
