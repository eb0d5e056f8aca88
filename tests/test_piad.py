"""PIAD: its networks and losses against the paper and its code, the choice of gamma, and frozen features."""

from __future__ import annotations

import functools
import hashlib
import http.server
import itertools
import json
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_methods import detector as any_detector
from test_run import Stop
from torch import Tensor, nn
from torchvision import models
from torchvision.transforms.v2.functional import normalize

from anomaly_lab import cli, config, load_run, networks
from anomaly_lab.adversarial import gradient_penalty
from anomaly_lab.build import make_detector
from anomaly_lab.detector import Batch
from anomaly_lab.methods import piad
from anomaly_lab.methods.piad import PIAD, GradientBalance, ResidualBlock
from anomaly_lab.networks import PerceptualFeatures
from anomaly_lab.players import make_players, minimise
from anomaly_lab.run import run

TINY = [
    "model.detector.encoder_widths=[4,5,6,7]",
    "model.detector.generator_widths=[7,6,5,4]",
    "model.detector.image_critic_widths=[4,4,5,6]",
    "model.detector.latent_critic_widths=[9,8]",
    "model.detector.latent_size=6",
]
RANDOM = [f"model.detector.features.{key}" for key in ("weights=random", "path=null", "sha256=null")]


def detector(model: str = "piad_pixel_l1", *overrides: str, shape: tuple[int, int, int] = (1, 32, 32)) -> PIAD:
    """A small PIAD in float64, whose further batches are other random images than those of `images`."""
    made = make_detector(config.compose([f"model={model}", *TINY, *overrides]), shape).double().train()
    assert isinstance(made, PIAD)
    seeds = itertools.count(100)
    made.next_batch = lambda: batch(images(seed=next(seeds), shape=shape))  # type: ignore[method-assign]
    return made


def images(count: int = 4, seed: int = 0, shape: tuple[int, int, int] = (1, 32, 32)) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((count, *shape), generator=generator, dtype=torch.float64) * 2 - 1


def batch(x: Tensor) -> Batch:
    return Batch(x, torch.arange(len(x)))


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    cause = error.value.__cause__ if not isinstance(error.value, ValueError) else error.value
    text = str(cause)
    assert isinstance(cause, ValueError) and "\n" not in text
    return text


# Networks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resample", [None, "up", "down"])
@pytest.mark.parametrize("outputs", [3, 5])
def test_a_block_is_what_its_resampling_and_convolutions_are_one_after_another(resample: Any, outputs: int) -> None:
    torch.manual_seed(0)
    block = ResidualBlock(3, outputs, resample).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    up = functools.partial(F.interpolate, scale_factor=2, mode="nearest")
    residual, skip = F.leaky_relu(x, 0.2), x
    if resample == "up":
        residual, skip = up(residual), up(skip)
    residual = F.conv2d(residual, block.conv1.weight, block.conv1.bias, padding=1)
    residual = F.conv2d(F.leaky_relu(residual, 0.2), block.conv2.weight, block.conv2.bias, padding=1)
    if resample == "down":
        residual, skip = F.avg_pool2d(residual, 2), F.avg_pool2d(skip, 2)
    if outputs != 3:
        skip = F.conv2d(skip, block.skip.weight, block.skip.bias)
    expected, found = residual + skip, block(x)
    torch.testing.assert_close(found, expected)
    inputs = [x, *block.parameters()]
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), inputs) for y in (found, expected)), strict=True):
        torch.testing.assert_close(a, b)


def convolutions(*layers: tuple[int, int, int]) -> int:
    """Parameters of convolutions with bias: (inputs, outputs, kernel), ..."""
    return sum(inputs * outputs * kernel**2 + outputs for inputs, outputs, kernel in layers)


def blocks(*pairs: tuple[int, int]) -> int:
    skips = [(i, o, 1) for i, o in pairs if i != o]
    return convolutions(*((i, o, 3) for i, o in pairs), *((o, o, 3) for _, o in pairs), *skips)


def count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def test_the_networks_have_the_parameters_of_the_authors_code() -> None:
    made = make_detector(config.compose(["model=piad_pixel_l1", "size=full"]), (1, 32, 32))
    assert isinstance(made, PIAD)
    three = [(32, 32)] * 3
    assert count(made.encoder) == convolutions((1, 32, 3), (32, 32, 4), (32, 32, 1)) + blocks(*three)
    assert count(made.generator) == convolutions((32, 32, 4), (32, 1, 1)) + blocks(*three, (32, 32))
    assert count(made.image_critic) == convolutions((1, 32, 3), (33, 32, 4), (32, 1, 1)) + blocks(*three)
    assert count(made.latent_critic) == convolutions((32, 128, 1), (128, 128, 1), (128, 1, 1))

    made = make_detector(config.compose(["model=piad_pixel_l1_cifar10", "size=full"]), (3, 32, 32))
    assert isinstance(made, PIAD)
    down = blocks((64, 64), (64, 128), (128, 256))
    assert count(made.encoder) == convolutions((3, 64, 3), (256, 256, 4), (256, 256, 1)) + down
    up = blocks((256, 256), (256, 128), (128, 64), (64, 64))
    assert count(made.generator) == convolutions((256, 256, 4), (64, 3, 1)) + up
    down = blocks((32, 32), (32, 64), (64, 128))
    assert count(made.image_critic) == convolutions((3, 32, 3), (129, 128, 4), (128, 1, 1)) + down
    assert count(made.latent_critic) == convolutions((256, 1024, 1), (1024, 1024, 1), (1024, 1, 1))


def test_nothing_is_normalised_and_the_image_is_not_bounded() -> None:
    made = detector()
    kinds = {type(module).__name__ for module in made.modules()}
    assert not [kind for kind in kinds if "Norm" in kind or kind in ("Tanh", "Sigmoid")]
    assert "MinibatchStd" in {type(m).__name__ for m in made.image_critic.modules()}
    assert "MinibatchStd" not in {type(m).__name__ for m in made.encoder.modules()}


def test_the_networks_start_as_the_authors_do() -> None:
    made = make_detector(config.compose(["model=piad_pixel_l1_cifar10", "size=full"]), (3, 32, 32))
    assert isinstance(made, PIAD)
    first, block, last = made.generator[1].weight, made.encoder[3].conv2.weight, made.latent_critic[-1].weight
    for weight, fan_out in ((first, 256 * 16), (block, 256 * 9)):
        assert weight.std().item() == pytest.approx((2 / 1.04 / fan_out) ** 0.5, rel=0.02)
    assert last.abs().max().item() == pytest.approx((6 / 1025) ** 0.5, rel=0.02)
    hidden = made.latent_critic[2].weight
    assert hidden.abs().max().item() == pytest.approx((2 / 1.04) ** 0.5 * (6 / 2048) ** 0.5, rel=0.02)


def test_the_minibatch_channel_is_the_mean_standard_deviation() -> None:
    x = images(5, shape=(3, 4, 4))
    y = piad.MinibatchStd()(x)
    assert y.shape == (5, 4, 4, 4) and torch.equal(y[:, :3], x)
    expected = np.sqrt(x.numpy().var(0) + 1e-8).mean()
    np.testing.assert_allclose(y[:, 3].numpy(), np.full((5, 4, 4), expected), rtol=1e-12)


def test_smaller_images_use_the_widths_nearest_to_the_image() -> None:
    made = detector(shape=(1, 16, 16))
    assert made.encoder[0].out_channels == 4 and made.generator[-1].in_channels == 4
    assert made.reconstruct(images(shape=(1, 16, 16))).shape == (4, 1, 16, 16)
    with pytest.raises(Exception, match="halves the image") as error:
        detector(shape=(1, 28, 28))
    assert "give model.input.size 8, 16, 32" in one_line(error)
    with pytest.raises(Exception, match="has 4 widths") as error:
        detector(shape=(1, 64, 64))
    assert "encoder_widths has 4 widths: images of 64 pixels need 5" in one_line(error)


def test_the_networks_start_alike_whatever_the_features() -> None:
    made = [detector(model).state_dict() for model in ("piad_pixel_l1",)]
    made += [detector(model, *RANDOM).state_dict() for model in ("piad", "piad_squeezenet")]
    assert made[0].keys() == made[1].keys() == made[2].keys()
    for name in (name for name in made[0] if not name.startswith("feature_")):
        assert torch.equal(made[0][name], made[1][name]) and torch.equal(made[0][name], made[2][name]), name


# Losses -------------------------------------------------------------------------------------------------------------


def test_the_gradient_penalty_of_a_plane_is_known() -> None:
    for length in (0.5, 1.0, 3.0):
        critic = nn.Linear(6, 1).double()
        with torch.no_grad():
            critic.weight.copy_(torch.ones(1, 6) * length / 6**0.5)
        found = gradient_penalty(critic, torch.randn(5, 6, dtype=torch.float64))
        assert found.item() == pytest.approx((length - 1) ** 2)


@pytest.mark.parametrize("space", ["image", "latent"])
def test_the_critics_loss_is_the_papers(space: str) -> None:
    made, x, z = detector(), images(), torch.randn(4, 6, dtype=torch.float64)
    if space == "image":
        critic, real, fake = made.image_critic, x, made.generator(z).detach()
    else:
        critic, real, fake = made.latent_critic, z, made.encoder(x).detach()
    made.randomness.restart(7, made.device)
    found = made.loss_critic(critic, real, fake)

    share = torch.rand(4, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    mixed = torch.stack([s * r + (1 - s) * f for s, r, f in zip(share, real, fake, strict=True)]).requires_grad_()
    gradient = torch.autograd.grad(critic(mixed).sum(), mixed, create_graph=True)[0]
    penalty = sum((g.square().sum().sqrt() - 1) ** 2 for g in gradient) / 4
    drift = (critic(real) ** 2).mean() + (critic(fake) ** 2).mean()
    expected = critic(fake).mean() - critic(real).mean() + 10 * penalty + 0.001 * drift
    torch.testing.assert_close(found, expected)
    parameters = list(critic.parameters())
    for a, b in zip(torch.autograd.grad(found, parameters), torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("model", ["piad_pixel_l1", "piad"])
def test_the_relative_error_is_the_papers(model: str) -> None:
    made = detector(model, *(RANDOM if model == "piad" else []))
    x, y = images(3), images(3, seed=1)
    mean, std = made.feature_mean, made.feature_std
    mean.copy_(torch.randn_like(mean) * 0.1)
    std.copy_(torch.rand_like(std) + 0.5)

    def f(one: Tensor) -> Tensor:
        features = made.features(one[None]) if made.features is not None else one[None]
        return (features - mean) / std

    expected = [((f(a) - f(b)).abs().mean() / f(a).abs().mean()).item() for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(made.relative_l1(x, y).detach().numpy(), expected, rtol=1e-10)
    x.requires_grad_()
    y.requires_grad_()
    toward = torch.autograd.grad(made.relative_l1(x, y).sum(), [x, y], allow_unused=True)
    assert toward[0] is None, "the target and the denominator are constants"
    assert toward[1] is not None and bool((toward[1] != 0).any())
    made.eval()
    with torch.no_grad():
        torch.testing.assert_close(made.score(x), made.relative_l1(x, made.reconstruct(x)))
        if model == "piad_pixel_l1":
            torch.testing.assert_close(made.anomaly_map(x).mean((1, 2)), made.score(x))


def test_an_image_without_features_has_a_finite_score() -> None:
    made = detector()
    x = torch.zeros(1, 1, 32, 32, dtype=torch.float64)
    assert made.score(x).item() == pytest.approx(made.reconstruct(x).abs().mean().item() / 1e-3)


def test_scaling_a_gradient_changes_no_value() -> None:
    x = torch.randn(1000, requires_grad=True)
    y = piad.scale_gradient(x, torch.tensor(0.37))
    assert torch.equal(x, y)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.full((1000,), 0.37))


def test_one_backward_pass_gives_each_network_its_own_gamma() -> None:
    made, x = detector(), images()
    made.balance_encoder.gamma.fill_(3.0)
    made.balance_generator.gamma.fill_(0.2)
    made.randomness.restart(5, made.device)
    *_, losses = made.plays(batch(x))
    made.randomness.restart(5, made.device)
    for _ in range(2):  # the critics' draws: codes, and a mixture for each of the two
        made.sample(x)
        for _ in range(2):
            torch.rand(4, generator=made.noise, dtype=torch.float64)
    z = made.sample(x)
    rec = made.relative_l1(x, made.generator(made.encoder(x))).mean()
    adversarial_z, adversarial_x = (
        -made.latent_critic(made.encoder(x)).mean(),
        -made.image_critic(made.generator(z)).mean(),
    )
    for network, gamma, adversarial in ((made.encoder, 3.0, adversarial_z), (made.generator, 0.2, adversarial_x)):
        parameters = list(network.parameters())
        found = torch.autograd.grad(losses["encoder_generator"], parameters, retain_graph=True)
        own = torch.autograd.grad(rec, parameters, retain_graph=True)
        other = torch.autograd.grad(adversarial, parameters, retain_graph=True)
        for f, a, b in zip(found, own, other, strict=True):
            torch.testing.assert_close(f, gamma * a + b, rtol=1e-8, atol=1e-12)


def test_a_step_is_two_rounds_of_critics_and_one_of_encoder_and_generator_each_on_fresh_images() -> None:
    made, drawn = detector(), []
    fresh = made.next_batch
    made.next_batch = lambda: drawn.append(fresh()) or drawn[-1]  # type: ignore[method-assign,func-returns-value]
    plays = [set(losses) for losses in made.plays(batch(images()))]
    assert plays == [{"image_critic", "latent_critic"}] * 2 + [{"encoder_generator"}]
    assert len(drawn) == 2 and not torch.equal(drawn[0].x, drawn[1].x)
    assert len(list(detector("piad_pixel_l1", "model.detector.critic_rounds=5").plays(batch(images())))) == 6


# Gamma --------------------------------------------------------------------------------------------------------------


def transcribed_gamma(own: list[list[np.ndarray]], other: list[list[np.ndarray]], history: int, a: float) -> float:
    """The authors' rule, with pandas: own[t][layer] and other[t][layer] are gradients."""
    ratios: list[float] = []
    for layer in range(len(own[0])):
        smooth = [
            pd.Series([g[layer].std() for g in measured][-history:]).ewm(alpha=a, adjust=False).mean()
            for measured in (other, own)
        ]
        ratios += (smooth[0] / smooth[1]).tolist()
    return float(np.median(ratios))


def test_gamma_is_the_median_of_smoothed_ratios_over_layers_and_a_history_that_forgets() -> None:
    draw = np.random.default_rng(0)
    balance = GradientBalance(3, history=4, smoothing=0.3).double()
    own: list[list[np.ndarray]] = []
    other: list[list[np.ndarray]] = []
    assert balance.gamma.item() == 1
    for _ in range(9):
        own.append([draw.normal(size=(5, 4)) * 10.0 ** draw.normal() for _ in range(3)])
        other.append([draw.normal(size=(5, 4)) * 10.0 ** draw.normal() for _ in range(3)])
        balance.update(*([torch.from_numpy(g) for g in measured[-1]] for measured in (own, other)))
        assert balance.gamma.item() == pytest.approx(transcribed_gamma(own, other, 4, 0.3), rel=1e-10)


def test_a_layer_that_nothing_moves_has_no_say() -> None:
    balance = GradientBalance(2, history=4, smoothing=0.3)
    still, moved = torch.zeros(3), torch.tensor([1.0, 2.0, 3.0])
    balance.update([still, moved], [still, 5 * moved])
    assert balance.gamma.item() == pytest.approx(5)


def test_gammas_are_chosen_from_the_gradients_of_this_step_before_its_move() -> None:
    made, x, z = detector(), images(), torch.randn(4, 6, dtype=torch.float64)
    made.balance_encoder.gamma.fill_(40.0)  # what was chosen before must not leak into the measurement
    made.choose_gammas(x, z)
    rec = made.relative_l1(x, made.generator(made.encoder(x))).mean()
    cases = (
        (made.encoder, made.balance_encoder, -made.latent_critic(made.encoder(x)).mean()),
        (made.generator, made.balance_generator, -made.image_critic(made.generator(z)).mean()),
    )
    for network, balance, adversarial in cases:
        weights = [p for p in network.parameters() if p.ndim > 1]
        gradients = [torch.autograd.grad(loss, weights, retain_graph=True) for loss in (rec, adversarial)]
        sizes = [[g.numpy().std() for g in some] for some in gradients]
        assert balance.gamma.item() == pytest.approx(np.median(np.divide(sizes[1], sizes[0])), rel=1e-8)


def test_gammas_are_chosen_every_so_many_steps_the_first_time_at_the_last_of_them() -> None:
    made, counts = detector("piad_pixel_l1", "model.detector.gamma_every=3"), []
    for step in range(7):
        made.step = step
        list(made.plays(batch(images())))
        counts.append(int(made.balance_encoder.count))
    assert counts == [0, 0, 1, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("critic_rounds=0", "critic_rounds=0: give a whole number from 1"),
        ("gamma_every=0", "gamma_every=0: give a whole number from 1"),
        ("gamma_history=0.5", "gamma_history=0.5: give a whole number from 1"),
        ("gamma_smoothing=0", "gamma_smoothing=0: give a number above 0"),
    ],
)
def test_a_wrong_number_is_named(override: str, message: str) -> None:
    with pytest.raises(Exception, match=message) as error:
        detector("piad_pixel_l1", f"model.detector.{override}")
    one_line(error)


# Features -----------------------------------------------------------------------------------------------------------


def test_a_frozen_network_is_no_ones_follows_along_and_stays_differentiable() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    x = torch.rand(2, 3, 8, 8)
    before = network(x)
    networks.freeze(network)
    assert torch.equal(network(x), before)
    assert not list(network.parameters()) and not network.state_dict()
    assert {name for name, _ in network.named_buffers()} >= {"0.weight", "0.bias", "1.weight", "1.running_mean"}
    assert network.double()(x.double()).dtype == torch.float64
    x = x.double().requires_grad_()
    assert bool((torch.autograd.grad(network(x).sum(), x)[0] != 0).any())


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A state dict of a whole SqueezeNet with random weights, and its checksum."""
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("weights") / "squeezenet1_0.pth"
    torch.save(models.squeezenet1_0().state_dict(), path)
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


def own(weights_file: tuple[Path, str], **more: Any) -> PerceptualFeatures:
    path, sha256 = weights_file
    return PerceptualFeatures("squeezenet1_0", weights="file", path=str(path), sha256=sha256, **more)


def test_features_are_torchvisions_first_layers_on_images_normalised_as_imagenets(weights_file: Any) -> None:
    whole = models.squeezenet1_0()
    whole.load_state_dict(torch.load(weights_file[0], weights_only=True))
    grey = images(2).float()
    expected = whole.features[:9](
        normalize((grey + 1).expand(-1, 3, -1, -1) / 2, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    )
    found = own(weights_file)(grey)
    assert found.shape == (2, 384, 3, 3)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_vgg19_is_cut_after_relu4_2() -> None:
    torch.manual_seed(0)
    features = PerceptualFeatures("vgg19", weights="random")
    kinds = [type(layer).__name__ for layer in features.layers]
    assert kinds.count("Conv2d") == 10 and kinds.count("MaxPool2d") == 3 and kinds[-1] == "ReLU"
    assert features.layers[21].weight.shape == (512, 512, 3, 3)
    assert features(images(2).float()).shape == (2, 512, 4, 4)


def test_any_layer_of_a_torchvision_network_gives_features(tmp_path: Path) -> None:
    from torchvision import models

    torch.manual_seed(0)
    whole = models.resnet18().eval()
    for name, buffer in whole.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_()
    file = tmp_path / "resnet18.pth"
    torch.save(whole.state_dict(), file)
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    features = PerceptualFeatures("resnet18.layer2", weights="file", path=str(file), sha256=sha256)
    assert (features.channels, features.source["layer"]) == (128, "layer2") and not list(features.parameters())
    x = images(2).float()
    seen = normalize((x + 1).expand(-1, 3, -1, -1) / 2, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    stem = whole.maxpool(whole.relu(whole.bn1(whole.conv1(seen))))
    torch.testing.assert_close(features.train()(x), whole.layer2(whole.layer1(stem)), rtol=1e-4, atol=1e-4)
    made = any_detector(
        "patchcore",
        *("model.detector.features.architecture=resnet18.layer2", "model.detector.features.weights=file"),
        *(f"model.detector.features.path={file}", f"model.detector.features.sha256={sha256}"),
    )
    assert made.train().score(x).shape == (2,) and not made.features.layers.training


@pytest.mark.parametrize(
    ("architecture", "said"),
    [
        ("resnet18", "choose one of vgg19, .* such as resnet18.layer3"),
        ("resnet18.layer9", "resnet18 has no layer layer9"),
        ("resnet18.fc", "leaves no channels and positions"),
    ],
)
def test_a_layer_that_gives_no_features_is_refused(architecture: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        PerceptualFeatures(architecture, weights="random")


def test_a_state_dict_without_the_classifier_will_do(weights_file: tuple[Path, str], tmp_path: Path) -> None:
    state = torch.load(weights_file[0], weights_only=True)
    path = tmp_path / "features.pth"
    torch.save({name: value for name, value in state.items() if name.startswith("features.")}, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert own((path, digest[:8])).checksum == own(weights_file).checksum


def test_features_belong_to_nobody_and_are_in_no_checkpoint(weights_file: tuple[Path, str]) -> None:
    path, sha256 = weights_file
    options = [f"model.detector.features.path={path}", f"model.detector.features.sha256={sha256}"]
    made = detector("piad_squeezenet", *options)
    assert made.features is not None and not list(made.features.parameters())
    assert not [name for name in made.state_dict() if name.startswith("features.")]
    before = {name: buffer.clone() for name, buffer in made.features.named_buffers()}
    players = make_players(made.players(), functools.partial(torch.optim.SGD, lr=0.1))
    for losses in made.plays(batch(images())):
        minimise(losses, players)
    for name, buffer in made.features.named_buffers():
        assert torch.equal(buffer, before[name]) and buffer.grad is None, name


def test_statistics_of_the_training_images_give_unit_spread() -> None:
    made, x = detector("piad", *RANDOM).eval(), images(20)
    with torch.no_grad():
        made.before_fit(x)
        assert made.features is not None
        plain = made.features(x)
        mean, std = plain.mean((0, 2, 3)), plain.std((0, 2, 3), unbiased=False)
        floor = 0.1 * std.square().mean().sqrt()
        torch.testing.assert_close(made.feature_mean.flatten(), mean)
        torch.testing.assert_close(made.feature_std.flatten(), std.clamp(min=floor))
    assert bool((std > floor).any())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "imagenet"}, "weights=imagenet: choose one of torchvision, file, random"),
        ({"weights": "file"}, "path is missing"),
        ({"weights": "file", "path": "no.pth", "sha256": "0" * 8}, "path=no.pth is not there"),
        ({"weights": "file", "path": "FILE"}, "sha256=None: give at least the first 8 hexadecimal digits"),
        ({"weights": "file", "path": "FILE", "sha256": 12345678}, "in quotes if they are a number"),
        ({"weights": "file", "path": "FILE", "sha256": "0" * 64}, "not 000000000000...: it is another file"),
    ],
)
def test_a_file_that_is_not_the_one_is_said_in_one_line(weights_file: Any, options: Any, message: str) -> None:
    options = {key: str(weights_file[0]) if value == "FILE" else value for key, value in options.items()}
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        PerceptualFeatures("squeezenet1_0", **options)
    one_line(error)


def test_a_file_without_the_weights_is_said_in_one_line(weights_file: Any, tmp_path: Path) -> None:
    for content in (b"no weights", b""):
        path = tmp_path / "bad.pth"
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is no state dict of that architecture") as error:
            own((path, hashlib.sha256(content).hexdigest()))
        one_line(error)
    with pytest.raises(ValueError, match="is no state dict of that architecture") as error:
        path, sha256 = weights_file
        PerceptualFeatures("vgg19", weights="file", path=str(path), sha256=sha256)
    one_line(error)
    with pytest.raises(ValueError, match="architecture=resnet50: choose one of vgg19, vgg19_relu3_2, squeezenet1_0"):
        PerceptualFeatures("resnet50", weights="random")


def test_offline_the_way_to_the_weights_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for variable in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # nobody answers there
    monkeypatch.setenv("no_proxy", "")
    with pytest.raises(Exception, match="cannot be fetched") as error:
        detector("piad")
    text = one_line(error)
    assert "get https://download.pytorch.org/models/vgg19-dcbb9e9d.pth" in text
    assert f"put it to {tmp_path}/hub/checkpoints/vgg19-dcbb9e9d.pth" in text
    assert "model.detector.features.weights=file" in text


def test_published_weights_are_fetched_once_and_verified(
    weights_file: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, sha256 = weights_file
    name = f"squeezenet1_0-{sha256[:8]}.pth"
    (tmp_path / "web").mkdir()
    shutil.copy(path, tmp_path / "web" / name)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "web"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    url = f"http://127.0.0.1:{server.server_port}/{name}"
    monkeypatch.setattr(networks, "published_url", lambda cut: url)
    try:
        fetched = PerceptualFeatures("squeezenet1_0", weights="torchvision")
    finally:
        server.shutdown()
        server.server_close()
    assert fetched.checksum == own(weights_file).checksum
    assert PerceptualFeatures("squeezenet1_0", weights="torchvision").checksum == fetched.checksum, "not fetched again"
    kept = tmp_path / "home" / "hub" / "checkpoints" / name
    kept.write_bytes(kept.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match="it is another file"):
        PerceptualFeatures("squeezenet1_0", weights="torchvision")


def test_pretrained_features_refuse_images_they_cannot_see() -> None:
    for shape, message in (((2, 32, 32), "1 or 3 channels, not 2"), ((1, 8, 8), "needs images of 16 pixels or more")):
        with pytest.raises(Exception, match=message) as error:
            detector("piad_squeezenet", *RANDOM, shape=shape)
        one_line(error)
    assert detector(shape=(2, 32, 32)).score(images(shape=(2, 32, 32))).shape == (4,)


def test_the_real_squeezenet_file_is_the_one_that_the_yaml_names(data_dir: Path) -> None:
    if not (data_dir / "squeezenet1_0.pth").is_file():
        pytest.skip("no squeezenet1_0.pth in ANOMALY_LAB_DATA")
    made = detector("piad_squeezenet", f"data_dir={data_dir}")
    assert made.features is not None and made.features.weights == "file"
    assert made.features(images(2)).std() > 0.1


# Statistics from a folder -------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Colour and grey PNGs of several sizes, in two folders, and what is no image."""
    draw = np.random.default_rng(0)
    for i, shape in enumerate([(40, 30, 3), (32, 32, 3), (20, 20), (64, 48, 3), (33, 33)]):
        path = tmp_path / "photos" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, shape, dtype=np.uint8)).save(path)
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    return tmp_path / "photos"


def options(weights_file: tuple[Path, str]) -> list[str]:
    return [f"model.detector.features.path={weights_file[0]}", f"model.detector.features.sha256={weights_file[1]}"]


def test_the_tool_writes_statistics_that_a_run_takes(weights_file: Any, folder: Path, capsys: Any) -> None:
    out = folder.parent / "statistics.npz"
    assert cli.features([str(folder), *options(weights_file), "--model", "piad_squeezenet", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    with np.load(out) as file:
        mean, std, provenance = file["mean"], file["std"], json.loads(str(file["provenance"]))
    assert provenance["folder"] == "photos" and provenance["images"] == 5 and provenance["size"] == 32
    assert provenance["features"]["architecture"] == "squeezenet1_0" and provenance["features"]["weights"] == "file"
    assert {"images_sha256", "made", "versions"} <= provenance.keys()

    seen = []
    for path in sorted(folder.rglob("*.png")):
        image = Image.open(path).convert("RGB")
        image = image if image.size == (32, 32) else image.resize((32, 32), Image.Resampling.BILINEAR)
        seen.append(torch.from_numpy(np.asarray(image).transpose(2, 0, 1) / 127.5 - 1).float())
    values = own(weights_file)(torch.stack(seen)).double().numpy()
    np.testing.assert_allclose(mean, values.mean((0, 2, 3)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(std, values.std((0, 2, 3)), rtol=1e-3, atol=1e-5)

    words = said.split(": ", 1)[1].split()
    made = detector("piad_squeezenet", *options(weights_file), *words)
    made.before_fit(images())
    np.testing.assert_allclose(made.feature_mean.flatten().numpy(), mean, rtol=1e-6)


def test_statistics_of_other_features_and_files_that_are_none_are_refused(
    weights_file: Any, folder: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "statistics.npz"
    cli.features([str(folder), "--model", "piad_squeezenet", "--out", str(out), "--limit", "2", *options(weights_file)])
    words = capsys.readouterr().out.split(": ", 1)[1].split()
    assert json.loads(str(np.load(out)["provenance"]))["images"] == 2
    with pytest.raises(ValueError, match=r"belongs to other features \(checksum") as error:
        detector("piad_squeezenet", *RANDOM, *words).before_fit(images())
    one_line(error)
    with pytest.raises(ValueError, match=r"statistics\.path is missing"):
        detector("piad_squeezenet", *options(weights_file), words[1]).before_fit(images())
    np.savez(out, mean=np.zeros(3))
    digest = hashlib.sha256(out.read_bytes()).hexdigest()
    words[1] = f"model.detector.features.statistics.sha256={digest}"
    with pytest.raises(ValueError, match="holds no channel statistics") as error:
        detector("piad_squeezenet", *options(weights_file), *words).before_fit(images())
    one_line(error)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["photos", "--model", "piad_pixel_l1"], "model=piad_pixel_l1 has no pretrained features"),
        (["photos", "--model", "ede"], "model=ede has no pretrained features"),
        (["photos", "--model", "typo"], "there is no model=typo: choose among"),
        (["photos", *RANDOM], "random features are drawn anew by every run"),
        (["nowhere"], "nowhere is not a folder"),
        (["photos", "--limit", "0"], "--size and --limit are whole numbers from 1"),
    ],
)
def test_a_mistake_about_statistics_gets_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, words: list[str], message: str
) -> None:
    monkeypatch.chdir(folder.parent)
    words = [*words, "--out", "out.npz"]
    assert cli.features(words if "--model" in words else [*words, "--model", "piad_squeezenet"]) == cli.MISTAKE
    said = capsys.readouterr().err
    assert said.startswith("anomaly-lab-features: error: ") and said.count("\n") == 1 and message in said
    assert not Path("out.npz").exists()


# Runs ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["torchvision", "random"])
def test_a_file_that_would_not_be_read_is_refused(weights: str) -> None:
    with pytest.raises(Exception, match=rf"which weights={weights} does not read: set .*weights=file, or both to null"):
        detector("piad_squeezenet", f"model.detector.features.weights={weights}", "model.detector.features.path=my.pth")


def test_where_a_file_lies_is_no_part_of_a_run_but_its_checksum_is(tmp_path: Path) -> None:
    base = ["model=piad_squeezenet", "normal_class=0", f"data_dir={tmp_path / 'data'}"]
    plain = config.job(config.compose(base)).out
    for key in ("features.path=elsewhere.pth", "features.statistics.path=elsewhere.npz"):
        assert config.job(config.compose([*base, f"model.detector.{key}"])).out == plain
    assert config.job(config.compose([*base, f"data_dir={tmp_path / 'elsewhere'}"])).out == plain
    for key in ("features.sha256=00000000ab", "features.statistics.sha256=00000000ab", "features.weights=random"):
        assert config.changed(config.compose([*base, f"model.detector.{key}"])), key


RUN = [
    "model.budget.steps=null",
    "model.budget.epochs=3",
    "model.budget.epoch_steps=3",
    "model.batch_size=4",
    "model.detector.gamma_every=2",
    "model.detector.gamma_history=3",
    "split.max_train=12",
    "split.max_test=20",
    "trainer.progress=false",
]


@pytest.fixture
def data_folder(weights_file: tuple[Path, str], tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "data").mkdir()
    shutil.copy(weights_file[0], tmp_path / "data" / "squeezenet1_0.pth")
    yield tmp_path / "data"


def test_a_stopped_run_resumes_to_the_same_bits_and_loads_where_its_weights_moved_to(
    weights_file: tuple[Path, str], data_folder: Path, tmp_path: Path
) -> None:
    def cfg(runs: str) -> Any:
        own_weights = f"model.detector.features.sha256={weights_file[1]}"
        where = [f"runs={tmp_path / runs}", f"data_dir={data_folder}"]
        return config.compose(["model=piad_squeezenet", *TINY, *RUN, own_weights, *where])

    straight, broken = cfg("straight"), cfg("broken")
    undisturbed = run(straight)
    with pytest.raises(RuntimeError, match="stopped"):
        run(broken, [Stop(5)])  # after gammas were chosen in steps 2 and 4
    resumed = run(broken)
    assert undisturbed is not None and resumed is not None and resumed["steps"] == 9
    states = [torch.load(config.job(c).out / "last.ckpt", weights_only=True)["state_dict"] for c in (straight, broken)]
    assert states[0].keys() == states[1].keys() and not [name for name in states[0] if name.startswith("features.")]
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name
    assert int(states[0]["balance_generator.count"]) == 3 and states[0]["balance_generator.gamma"] != 1
    assert resumed["metrics"] == undisturbed["metrics"]
    history = resumed["history"][-1]
    assert {"loss_image_critic", "loss_latent_critic", "loss_encoder_generator", "loss_reconstruction"} <= set(history)
    assert {"log10_gamma_encoder", "log10_gamma_generator", "val_score"} <= set(history)

    with np.load(config.job(broken).out / "scores.npz") as file:
        score, index = file["score"], file["index"]
    pixels = config.load_images(broken).pixels[index]
    np.testing.assert_allclose(load_run(config.job(broken).out).score(pixels), score, rtol=1e-5)
    data_folder.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="name today's with data_dir or --data-dir") as error:
        load_run(config.job(broken).out)
    assert "squeezenet1_0.pth is not there" in one_line(error)
    moved = load_run(config.job(broken).out, data_dir=tmp_path / "moved")
    np.testing.assert_allclose(moved.score(pixels), score, rtol=1e-5)


@pytest.mark.slow
def test_it_learns_to_tell_digits(tmp_path: Path) -> None:
    """A floor in seconds: ones against the other digits at 16 pixels, at higher rates, without pretrained features.

    Above the distance to the mean image of the same pixels, which tells zeros but not ones.
    """
    players = ("image_critic", "latent_critic", "encoder_generator")
    fast = [f"model.optimizer.{player}.lr=2e-3" for player in players]
    short = ["model.budget.steps=150", "model.budget.epoch_steps=50", "model.detector.gamma_every=20"]
    where = [f"runs={tmp_path / 'runs'}", f"data_dir={tmp_path / 'data'}", "trainer.progress=false", "normal_class=1"]
    mean = run(config.compose(["model=mean_image", "model.input.size=16", *where]))
    result = run(config.compose(["model=piad_pixel_l1", "model.input.size=16", *short, *fast, *where]))
    assert mean is not None and result is not None
    assert result["metrics"]["auroc"] > mean["metrics"]["auroc"] + 0.1
