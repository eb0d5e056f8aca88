"""AnoGAN and f-AnoGAN: losses, the order of the moves, the search and what a batch has to do with it, stages."""

from __future__ import annotations

import functools

import pytest
import torch
from games import moved, prior, settle
from gradients import assert_alike
from test_methods import batch, detector, images

from anomaly_lab.methods.anogan import AnoGAN
from anomaly_lab.methods.wasserstein_gan import FAnoGAN
from anomaly_lab.players import make_players, minimise


def anogan(*overrides: str) -> AnoGAN:
    made = detector("anogan", *overrides)
    assert isinstance(made, AnoGAN)
    settle(made.generator, prior(0, 50, made.latent_size))
    settle(made.discriminator, images(50))
    return made


def f_anogan(*overrides: str, stage: str = "gan") -> FAnoGAN:
    made = detector("f_anogan", *overrides)
    assert isinstance(made, FAnoGAN)
    settle(made.generator, prior(0, 50, made.latent_size))
    made.stages.stage = stage
    made.next_batch = batch  # type: ignore[method-assign]
    return made


# AnoGAN -------------------------------------------------------------------------------------------------------------


def test_the_discriminator_moves_first_and_the_generator_meets_the_moved_one() -> None:
    assert moved(anogan()) == [({"discriminator"}, {"discriminator"}), ({"generator"}, {"generator"})]
    made, x = anogan(), images()
    made.randomness.restart(3, made.device)
    players = make_players(made.players(), functools.partial(torch.optim.SGD, lr=0.1))
    plays = made.plays(batch())
    first = next(plays)
    fake = made.generator(prior(3, 8, made.latent_size))
    on_real, on_fake = (torch.sigmoid(made.discriminator(image)[0]) for image in (x, fake))
    torch.testing.assert_close(first["discriminator"], -on_real.log().mean() - (1 - on_fake).log().mean())
    minimise(first, players)
    torch.testing.assert_close(next(plays)["generator"], -torch.sigmoid(made.discriminator(fake)[0]).log().mean())


def test_the_score_is_the_weighted_loss_of_the_code_that_the_search_found() -> None:
    made, x = anogan("model.detector.feature_weight=0.3").eval(), images()
    z = made.search(x)
    rebuilt = made.generator(z)
    residual = (x - rebuilt).abs().sum(dim=(1, 2, 3))
    feature = (made.discriminator.features(x) - made.discriminator.features(rebuilt)).abs().sum(dim=(1, 2, 3))
    with torch.no_grad():  # as the loop scores
        torch.testing.assert_close(made.score(x), 0.7 * residual + 0.3 * feature)
        torch.testing.assert_close(made.reconstruct(x), rebuilt)


def test_each_image_is_searched_as_if_alone_by_adam_from_every_start() -> None:
    made, x = anogan("model.detector.search_rate=0.1").eval(), images(3)
    found = made.search(x)
    for image, code in zip(x, found, strict=True):
        wanted, ends = made.discriminator.features(image[None]).detach(), []
        for start in made.start:
            z = start[None].clone().requires_grad_()
            adam = torch.optim.Adam([z], lr=0.1)
            for _ in range(made.search_steps):
                adam.zero_grad()
                made.combine(made.gaps(image[None], wanted, z)).sum().backward()
                adam.step()
            ends.append((made.combine(made.gaps(image[None], wanted, z)).item(), z.detach()))
        _, best = min(ends, key=lambda end: end[0])
        torch.testing.assert_close(code, best[0], rtol=1e-4, atol=1e-5)
    assert made.start.shape == (2, made.latent_size) and not torch.equal(found, made.start[:1].expand(3, -1))


def test_more_steps_and_more_starts_leave_less_unexplained() -> None:
    made, x = anogan("model.detector.search_rate=0.1").eval(), images(20)
    by_steps = []
    for made.search_steps in (0, 5, 30):
        by_steps.append(made.score(x).mean().item())
    assert by_steps == sorted(by_steps, reverse=True)
    both, made.start = made.score(x), made.start[:1]
    assert (both <= made.score(x) + 1e-3).all()


# f-AnoGAN -----------------------------------------------------------------------------------------------------------


def test_the_critic_moves_so_many_times_on_fresh_images_then_the_generator() -> None:
    made = f_anogan("model.detector.critic_rounds=3")
    alone = [({name}, {name}) for name in ("critic", "critic", "critic", "generator")]
    assert moved(made) == alone
    assert moved(f_anogan(stage="encoder")) == [({"encoder"}, {"encoder"})]


def test_the_losses_of_the_gan_are_wgan_gps() -> None:
    made, x = f_anogan("model.detector.critic_rounds=2", "model.detector.penalty=7").double(), images().double()
    other = images(seed=1).double()
    made.next_batch = lambda: batch()._replace(x=other)  # type: ignore[method-assign]
    made.randomness.restart(3, made.device)
    *rounds, last = made.plays(batch()._replace(x=x))
    generator = torch.Generator().manual_seed(3)
    for losses, real in zip(rounds, (x, other), strict=True):
        z = torch.randn(8, made.latent_size, generator=generator, dtype=torch.float64)
        share = torch.rand(8, generator=generator, dtype=torch.float64).view(8, 1, 1, 1)
        fake = made.generator(z).detach()
        mixed = (share * real + (1 - share) * fake).requires_grad_()
        (slope,) = torch.autograd.grad(made.critic(mixed)[0].sum(), mixed)
        penalty = ((slope.square().sum(dim=(1, 2, 3)).sqrt() - 1) ** 2).mean()
        expected = made.critic(fake)[0].mean() - made.critic(real)[0].mean() + 7 * penalty
        torch.testing.assert_close(losses["critic"], expected)
    z = torch.randn(8, made.latent_size, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(last["generator"], -made.critic(made.generator(z))[0].mean())


@pytest.mark.parametrize(("activation", "bound"), [("tanh", 1.0), ("3tanh", 3.0), ("linear", None)])
def test_the_encoders_loss_is_the_score_and_its_code_is_bounded(activation: str, bound: float | None) -> None:
    options = ["model.detector.kappa=0.5", f"model.detector.code_activation={activation}"]
    made, x = f_anogan(*options, stage="encoder").double().eval(), images().double()
    code = made.encoder(x)
    code = code if bound is None else bound * torch.tanh(code)
    rebuilt = made.generator(code)
    image = ((x - rebuilt) ** 2).mean(dim=(1, 2, 3))
    feature = ((made.critic.features(x) - made.critic.features(rebuilt)) ** 2).mean(dim=(1, 2, 3))
    torch.testing.assert_close(made.score(x), image + 0.5 * feature)
    (losses,) = made.plays(batch()._replace(x=x))
    assert_alike(losses["encoder"], (image + 0.5 * feature).mean(), made.encoder)


@pytest.mark.parametrize(("stage", "still"), [("gan", False), ("encoder", True)])
def test_the_generators_statistics_stand_still_while_the_encoder_learns(stage: str, still: bool) -> None:
    made = f_anogan(stage=stage)
    before = {name: value.clone() for name, value in made.generator.named_buffers()}
    list(made.plays(batch()))
    assert all(torch.equal(value, before[name]) for name, value in made.generator.named_buffers()) is still


@pytest.mark.parametrize(
    ("model", "override", "message"),
    [
        ("anogan", "model.detector.search_steps=2.5", "search_steps=2.5: give a whole number from 0"),
        ("anogan", "model.detector.starts=0", "starts=0: give a whole number from 1"),
        ("anogan", "model.detector.feature_weight=2", "feature_weight=2: choose a number from 0 to 1"),
        ("f_anogan", "model.detector.critic_rounds=0", "critic_rounds=0: give a whole number from 1"),
        ("f_anogan", "model.detector.code_activation=relu", "code_activation=relu: choose one of tanh, 3tanh, linear"),
    ],
)
def test_a_wrong_option_is_named_with_the_right_ones(model: str, override: str, message: str) -> None:
    with pytest.raises(Exception, match=message):
        detector(model, override)
