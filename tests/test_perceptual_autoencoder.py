"""ADDPA: the relative perceptual L1 written out, its one player, its features, and what it shares with PIAD."""

from __future__ import annotations

import torch
from omegaconf import OmegaConf
from torch import Tensor
from torchvision import models

from anomaly_lab import config
from anomaly_lab.build import make_detector
from anomaly_lab.detector import Batch
from anomaly_lab.methods.perceptual_autoencoder import PerceptualAutoencoder
from anomaly_lab.networks import PerceptualFeatures

RANDOM = [f"model.detector.features.{key}" for key in ("weights=random", "path=null", "sha256=null")]


def detector(*overrides: str, shape: tuple[int, int, int] = (1, 32, 32)) -> PerceptualAutoencoder:
    torch.manual_seed(0)
    made = make_detector(config.compose(["model=addpa", "size=small", *RANDOM, *overrides]), shape)
    assert isinstance(made, PerceptualAutoencoder)
    return made


def images(count: int = 4, channels: int = 1) -> Tensor:
    return torch.rand(count, channels, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_loss_and_score_are_the_relative_l1_of_normalised_features() -> None:
    made, x = detector(), images()
    assert made.features is not None
    with torch.no_grad():
        made.before_fit(images(8))
        plain = made.features(images(8))  # (8,K,s,s)
        mean, std = plain.mean((0, 2, 3)), plain.std((0, 2, 3), unbiased=False)
        std = std.clamp(min=0.1 * std.square().mean().sqrt())
        f, g = (
            (made.features(image) - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
            for image in (x, made.generator(made.encoder(x)))
        )
        expected = torch.stack([(a - b).abs().mean() / a.abs().mean() for a, b in zip(f, g, strict=True)])
        torch.testing.assert_close(made.score(x), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(made.anomaly_map(x).shape, torch.Size((4, 32, 32)))
    (losses,) = made.plays(Batch(x, torch.arange(4)))
    torch.testing.assert_close(losses["autoencoder"].detach(), expected.mean(), rtol=1e-4, atol=1e-5)


def test_its_one_player_owns_both_networks_and_no_feature() -> None:
    made = detector()
    ((name, networks),) = made.players().items()
    assert name == "autoencoder" and list(networks) == [made.encoder, made.generator]
    (losses,) = made.plays(Batch(images(), torch.arange(4)))
    losses["autoencoder"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for network in networks for p in network.parameters())
    assert made.features is not None and not list(made.features.parameters())


def test_vgg19_is_cut_after_relu3_2() -> None:
    made = PerceptualFeatures("vgg19_relu3_2", weights="random")
    whole = models.vgg19(weights=None).features[:14]
    convolutions = [layer for layer in whole if isinstance(layer, torch.nn.Conv2d)]
    assert len(convolutions) == 6 and isinstance(whole[-1], torch.nn.ReLU) and made.channels == 256
    assert made(images(1)).shape == (1, 256, 8, 8)
    assert made(images(1, 3)[:, :, :4, :4]).shape == (1, 256, 1, 1) and made.smallest == 4


def test_the_stand_in_differs_from_it_in_features_alone() -> None:
    one, other = (
        OmegaConf.to_container(config.compose([f"model={name}"]).model) for name in ("addpa", "addpa_squeezenet")
    )
    assert isinstance(one, dict) and isinstance(other, dict)
    features = [section["detector"].pop("features")["architecture"] for section in (one, other)]
    assert features == ["vgg19_relu3_2", "squeezenet1_0"]
    differing = {key for key in other if one.get(key) != other[key]}
    assert differing == {"pretrained", "published"} and other["published"] == "addpa"
