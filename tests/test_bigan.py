"""BiGAN and ALAD: losses, the order of the moves, the averages that score, and spectral norm."""

from __future__ import annotations

import functools

import pytest
import torch
from games import moved, prior, settle
from gradients import assert_alike
from test_methods import batch, detector, images
from torch import Generator, Tensor
from torch.nn.functional import softplus

from anomaly_lab import config
from anomaly_lab.build import make_detector
from anomaly_lab.detector import Batch
from anomaly_lab.methods.bigan import ALAD, Bidirectional, BiGAN
from anomaly_lab.networks import DCGANEncoder, MovingAverage
from anomaly_lab.players import make_players, minimise

SMALL = ["model.detector.units=8", "model.detector.latent_size=6", "model.detector.dropout=0"]


def bidirectional(model: str, *overrides: str) -> Bidirectional:
    made = detector(model, *SMALL, *overrides)
    assert isinstance(made, Bidirectional)
    for network, inputs in (
        (made.generator, prior(0, 50, 6)),
        (made.encoder, images(50)),
        (made.joint.image, images(50)),
    ):
        settle(network, inputs)
    made.start_averages()  # of what the networks are now
    made.next_batch = lambda: Batch(images(seed=1).to(made.encoder[0].weight), torch.arange(8))  # type: ignore[method-assign]
    return made


def game(real: Tensor, fake: Tensor) -> Tensor:
    return softplus(-real).mean() + softplus(fake).mean()


def test_who_moves_in_which_play() -> None:
    second = {"generator", "encoder"}
    for model, first in (("bigan", {"joint"}), ("alad", {"joint", "images", "codes"})):
        assert moved(bidirectional(model)) == [(first, first), (second, second)]


def test_the_losses_of_bigan_are_the_papers_and_g_and_e_meet_another_batch() -> None:
    made, x, z = bidirectional("bigan").double(), images().double(), Generator().manual_seed(3)
    made.randomness.restart(3, made.device)
    players = make_players(made.players(), functools.partial(torch.optim.SGD, lr=0.1))
    draw = functools.partial(torch.randn, 8, 6, generator=z, dtype=torch.float64)
    e, g, d = made.encoder, made.generator, made.joint
    plays = made.plays(batch()._replace(x=x))
    code, losses = draw(), next(plays)
    torch.testing.assert_close(losses["joint"], game(d(x, e(x))[0], d(g(code), code)[0]))
    minimise(losses, players)
    x, code, losses = made.next_batch().x, draw(), next(plays)
    assert_alike(losses["generator"], softplus(-d(g(code), code)[0]).mean(), g)
    assert_alike(losses["encoder"], softplus(d(x, e(x))[0]).mean(), e)


def test_the_losses_of_alad_are_the_papers_and_g_and_e_meet_another_batch() -> None:
    # Spectral norm iterates in train mode, so that no two passes are alike.
    made = bidirectional("alad").double().eval()
    made.randomness.restart(3, made.device)
    generator = Generator().manual_seed(3)
    e, g, d_xz, d_xx, d_zz = made.encoder, made.generator, made.joint, made.images, made.codes  # type: ignore[attr-defined]
    draw = functools.partial(torch.randn, 8, 6, generator=generator, dtype=torch.float64)
    plays = made.plays(batch()._replace(x=images().double()))
    x, z = images().double(), draw()
    first = next(plays)
    assert_alike(first["joint"], game(d_xz(x, e(x))[0], d_xz(g(z), z)[0]), d_xz)
    assert_alike(first["images"], game(d_xx(x, x)[0], d_xx(x, g(e(x)))[0]), d_xx)
    assert_alike(first["codes"], game(d_zz(z, z), d_zz(z, e(g(z)))), d_zz)
    x, z = images(seed=1).double(), draw()
    second = next(plays)
    cycle = game(d_xx(x, g(e(x)))[0], d_xx(x, x)[0]) + game(d_zz(z, e(g(z))), d_zz(z, z))
    assert_alike(second["generator"], softplus(-d_xz(g(z), z)[0]).mean() + cycle, g)
    assert_alike(second["encoder"], softplus(d_xz(x, e(x))[0]).mean() + cycle, e)


def test_scores_are_taken_with_the_averages() -> None:
    x = images()
    made = bidirectional("bigan", "model.detector.w_discriminator=0.3").eval()
    assert isinstance(made, BiGAN)
    e, g, d = made.encoder, made.generator, made.joint
    code = e(x)
    logit, features = d(x, code)
    residual = (x - g(code)).abs().sum(dim=(1, 2, 3))
    feature = (features - d(g(code), code)[1]).abs().sum(dim=1)
    torch.testing.assert_close(made.score(x), 0.7 * residual + 0.3 * feature)
    made.discriminator_term = "cross_entropy"
    torch.testing.assert_close(made.score(x), 0.7 * residual - 0.3 * torch.sigmoid(logit).log())

    alad = bidirectional("alad").eval()
    assert isinstance(alad, ALAD)
    gap = alad.images.features(torch.cat([x, x], 2))
    gap = gap - alad.images.features(torch.cat([x, alad.generator(alad.encoder(x))], 2))
    torch.testing.assert_close(alad.score(x), gap.abs().sum(dim=1))
    before = alad.score(x)
    with torch.no_grad():
        for parameter in alad.parameters():
            parameter.add_(1.0)
    assert torch.equal(alad.score(x), before), "the weights that are trained have no say before a step ends"


@pytest.mark.parametrize("model", ["bigan", "alad"])
def test_a_step_ends_with_the_averages(model: str) -> None:
    made = bidirectional(model, "model.detector.average=0.9")
    first = {name: p.detach().clone() for name, p in made.named_parameters()}
    players = make_players(made.players(), functools.partial(torch.optim.SGD, lr=0.5))
    for losses in made.plays(batch()):
        minimise(losses, players)
    for player, [network] in made.players().items():
        average = dict(made.averages[player].network.named_buffers())  # type: ignore[union-attr, operator]
        for name, parameter in network.named_parameters():
            torch.testing.assert_close(average[name], 0.9 * first[f"{player}.{name}"] + 0.1 * parameter)
        for name, buffer in network.named_buffers():
            assert torch.equal(average[name], buffer), name


def test_a_moving_average_is_in_the_checkpoint_and_no_players() -> None:
    average = MovingAverage(DCGANEncoder(1, 16, 4, 3, tanh=False), 0.5)
    assert not list(average.parameters())
    assert {f"network.{name}" for name in average.network.state_dict()} == set(average.state_dict()) != set()
    with pytest.raises(ValueError, match=r"decay=1.*from 0 to below 1"):
        MovingAverage(DCGANEncoder(1, 16, 4, 3, tanh=False), 1)


def test_spectral_norm_bounds_the_discriminators_and_the_encoder_of_alad_but_for_their_last_layers() -> None:
    made = bidirectional("alad")
    assert isinstance(made, ALAD)
    for _ in range(20):  # power iterations
        list(made.plays(batch()))
    for network in (made.encoder, made.joint, made.images, made.codes):
        *bounded, last = [layer for layer in network.modules() if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear)]
        for layer in bounded:
            assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1, rel=0.1)
        assert not hasattr(last, "parametrizations")
    assert all(not hasattr(layer, "parametrizations") for layer in made.generator)


def layers_of(network: torch.nn.Module) -> str:
    """A word a layer: c is a convolution and t a transposed one (outputs, kernel, stride), l is linear (outputs), n is
    batch norm, leaky has its slope, and d is a dropout with its probability."""
    found = []
    for _, layer in network.named_modules(remove_duplicate=False):
        match layer:
            case torch.nn.Conv2d():
                found.append(f"c{layer.out_channels},{layer.kernel_size[0]},{layer.stride[0]}")
            case torch.nn.ConvTranspose2d():
                found.append(f"t{layer.out_channels},{layer.kernel_size[0]},{layer.stride[0]}")
            case torch.nn.Linear():
                found.append(f"l{layer.out_features}")
            case torch.nn.BatchNorm1d() | torch.nn.BatchNorm2d():
                assert (layer.eps, layer.momentum) == (1e-3, 0.01)
                assert torch.equal(layer.weight, torch.ones_like(layer.weight))
                found.append("n")
            case torch.nn.LeakyReLU():
                found.append(f"leaky{layer.negative_slope}")
            case torch.nn.ReLU() | torch.nn.Tanh():
                found.append(type(layer).__name__.lower())
            case torch.nn.Dropout():
                found.append(f"d{layer.p}")
    return " ".join(found)


def published(model: str, shape: tuple[int, int, int]) -> Bidirectional:
    made = make_detector(config.compose([f"model={model}", "size=full"]), shape)
    assert isinstance(made, Bidirectional)
    return made


def test_the_networks_of_bigan_are_the_authors() -> None:
    """houssamzenati/Efficient-GAN-Anomaly-Detection, mnist_utilities.py."""
    made = published("bigan", (1, 28, 28))
    assert layers_of(made.encoder) == "c32,3,1 c64,3,2 n leaky0.1 c128,3,2 n leaky0.1 l200"
    assert layers_of(made.generator) == "l1024 n relu l6272 n relu t64,4,2 n relu t1,4,2 tanh"
    assert layers_of(made.joint.image) == "c64,4,2 leaky0.1 d0.5 c64,4,2 n leaky0.1 d0.5"
    assert layers_of(made.joint.code) == "l512 leaky0.1 d0.5"
    assert layers_of(made.joint.pair) == "l1024 leaky0.1 d0.5"
    assert made.joint.pair[0].in_features == 7 * 7 * 64 + 512
    for network in (made.encoder, made.generator, made.joint):
        kernels = torch.cat([p.detach().flatten() for p in network.parameters() if p.ndim > 1])
        assert kernels.std().item() == pytest.approx(0.02, rel=0.05)


def test_the_networks_of_alad_are_the_authors() -> None:
    """houssamzenati/Adversarially-Learned-Anomaly-Detection, cifar10_utilities.py."""
    made = published("alad", (3, 32, 32))
    assert isinstance(made, ALAD)
    assert layers_of(made.encoder) == "c128,4,2 n leaky0.2 c256,4,2 n leaky0.2 c512,4,2 n leaky0.2 c100,4,1"
    assert layers_of(made.generator) == "t512,4,1 n relu t256,4,2 n relu t128,4,2 n relu t3,4,2 tanh"
    assert layers_of(made.joint.image) == "c128,4,2 leaky0.2 c256,4,2 n leaky0.2 c512,4,2 n leaky0.2"
    assert layers_of(made.joint.code) == "l512 leaky0.2 d0.2 l512 leaky0.2 d0.2"
    assert layers_of(made.joint.pair) == "l1024 leaky0.2 d0.2"
    assert layers_of(made.images) == "c64,5,2 leaky0.2 d0.2 c128,5,2 leaky0.2 d0.2 l1"
    assert layers_of(made.codes) == "l64 leaky0.2 d0.2 l32 leaky0.2 d0.2 l1"
    for network in (made.generator, made.codes):
        kernels = torch.cat([p.detach().flatten() for p in network.parameters() if p.ndim > 1])
        assert kernels.std().item() == pytest.approx(0.01, rel=0.1)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.detector.discriminator_term=l2", "discriminator_term=l2: choose one of feature, cross_entropy"),
        ("model.detector.w_discriminator=-1", "w_discriminator=-1: choose a number from 0 to 1"),
    ],
)
def test_a_wrong_option_is_named_with_the_right_ones(override: str, message: str) -> None:
    with pytest.raises(Exception, match=message):
        detector("bigan", override)


def test_an_image_that_cannot_be_halved_twice_is_refused() -> None:
    with pytest.raises(Exception, match=r"model\.input\.size that 4 divides, not 30"):
        published("bigan", (1, 30, 30))
