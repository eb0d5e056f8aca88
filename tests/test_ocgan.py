"""OCGAN: losses, the order of the moves, and where mining goes."""

from __future__ import annotations

import functools

import torch
from games import moved, settle
from gradients import assert_alike
from test_methods import batch, detector, images
from torch import Tensor
from torch.nn.functional import softplus

from anomaly_lab.methods.ocgan import OCGAN
from anomaly_lab.players import make_players, minimise


def ocgan(*overrides: str, stage: str = "plain") -> OCGAN:
    made = detector("ocgan", *overrides)
    assert isinstance(made, OCGAN)
    made.stages.stage = stage
    return made


def game(real: Tensor, fake: Tensor) -> Tensor:
    return (softplus(-real).mean() + softplus(fake).mean()) / 2


def test_the_discriminators_move_first_then_the_classifier_then_the_autoencoder() -> None:
    both, autoencoder = {"image_discriminator", "latent_discriminator"}, {"autoencoder"}
    for stage in ("plain", "mined"):
        expected = [(both, both), ({"classifier"}, {"classifier"}), (autoencoder, {"encoder", "decoder"})]
        assert moved(ocgan(stage=stage)) == expected


def test_the_losses_are_the_papers() -> None:
    options = ["sigma=0.3", "w_latent=4", "w_rec=30"]
    made, x = ocgan(*(f"model.detector.{option}" for option in options)).double(), images().double()
    made.randomness.restart(3, made.device)
    players = make_players(made.players(), functools.partial(torch.optim.SGD, lr=0.1))
    plays = made.plays(batch()._replace(x=x))
    generator = torch.Generator().manual_seed(3)
    u, prior = (2 * torch.rand(8, 16, generator=generator, dtype=torch.float64) - 1 for _ in range(2))
    noisy = x + 0.3 * torch.randn(x.shape, generator=generator, dtype=torch.float64)

    first = next(plays)
    d_v, d_l, c = made.image_discriminator, made.latent_discriminator, made.classifier
    code = made.encoder(noisy)
    assert code.abs().max() < 1
    rebuilt, rendered = made.decoder(code), made.decoder(u)
    torch.testing.assert_close(first["image_discriminator"], game(d_v(x)[0], d_v(rendered)[0]))
    torch.testing.assert_close(first["latent_discriminator"], game(d_l(prior), d_l(code)))
    minimise(first, players)
    second = next(plays)
    torch.testing.assert_close(second["classifier"], game(c(rebuilt)[0], c(rendered)[0]))
    minimise(second, players)
    latent, visual = softplus(-d_l(code)).mean(), softplus(-d_v(rendered)[0]).mean()
    expected = 4 * latent + visual + 30 * ((x - rebuilt) ** 2).mean()
    assert_alike(next(plays)["autoencoder"], expected, made.encoder, made.decoder)


def test_mining_goes_where_the_classifier_doubts_and_stays_in_the_cube() -> None:
    made = ocgan("model.detector.mining_rate=1", "model.detector.mining_steps=2").double().eval()
    settle(made.decoder, 2 * torch.rand(50, 16, dtype=torch.float64) - 1)
    settle(made.classifier, images(50).double())
    u = 2 * torch.rand(6, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 1
    mined = made.mine(u)
    assert mined.abs().max() < 1
    called = [made.class_logit(made.decoder(code)) for code in (u, mined)]
    assert (called[1] < called[0]).all()
    for one, found in zip(u, mined, strict=True):
        mu = torch.atanh(one[None])
        for _ in range(2):
            mu.requires_grad_()
            (gradient,) = torch.autograd.grad(softplus(made.class_logit(made.decoder(torch.tanh(mu)))).sum(), mu)
            mu = (mu - gradient).detach()
        torch.testing.assert_close(found[None], torch.tanh(mu))


def test_the_autoencoder_meets_the_mined_codes() -> None:
    losses = []
    for rate in (0.0, 50.0):
        made = ocgan(f"model.detector.mining_rate={rate}", stage="mined")
        made.randomness.restart(3, made.device)
        losses.append(list(made.plays(batch()))[-1]["autoencoder"].item())
    assert losses[0] != losses[1]


def test_the_score_is_the_error_of_the_image_without_noise() -> None:
    made, x = ocgan().eval(), images()
    torch.testing.assert_close(made.score(x), ((x - made.decoder(made.encoder(x))) ** 2).mean(dim=(1, 2, 3)))
