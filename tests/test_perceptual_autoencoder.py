"""ADDPA: the relative perceptual L1 written out, its player, its features, what it shares with PIAD, how it grows."""

from __future__ import annotations

import pytest
import torch
from hydra.errors import InstantiationException
from omegaconf import OmegaConf
from torch import Tensor
from torch.nn import functional as F
from torchvision import models

from anomaly_lab import config
from anomaly_lab.build import make_detector
from anomaly_lab.detector import Batch
from anomaly_lab.methods.perceptual_autoencoder import GrowingPerceptualAutoencoder, PerceptualAutoencoder
from anomaly_lab.methods.piad import RelativeL1
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


# Growing ------------------------------------------------------------------------------------------------------------


def growing(*overrides: str) -> GrowingPerceptualAutoencoder:
    torch.manual_seed(0)
    small = ["model.detector.widths=[8,7,6,5,4]", "model.detector.features.weights=random"]
    layers = [f"squeezenet1_0.features.{layer}" for layer in (0, 0, 3, 3)]
    words = [
        "model=addpa_growing",
        "size=small",
        *small,
        f"model.detector.architectures=[{','.join(layers)}]",
        *overrides,
    ]
    made = make_detector(config.compose(words), (1, 64, 64))
    assert isinstance(made, GrowingPerceptualAutoencoder)
    return made


def at(made: GrowingPerceptualAutoencoder, stage: str, epoch: int) -> None:
    made.stages.stage, made.stages.epoch = stage, epoch
    made.before_epoch(1)


def shrunk(x: Tensor, side: int) -> Tensor:
    return F.interpolate(x, (side, side), mode="bilinear")


def doubled(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3)


def test_while_it_grows_images_codes_reconstructions_and_losses_are_mixtures() -> None:
    made, x = growing("model.budget.stages.to_32=4"), torch.rand(3, 1, 64, 64) * 2 - 1
    with torch.no_grad():
        made.before_fit(torch.rand(9, 1, 64, 64))
    at(made, "to_32", 1)
    (losses,) = made.plays(Batch(x, torch.arange(3)))
    a = 0.25  # the first of four epochs
    seen = (1 - a) * doubled(shrunk(x, 16)) + a * shrunk(x, 32)
    e, g = made.encoder, made.generator
    h = (1 - a) * e.inputs[1](F.avg_pool2d(seen, 2)) + a * e.down[2](e.inputs[2](seen))
    z = e.last(e.down[0](e.down[1](h)))
    h = g.up[1](g.up[0](g.first(z)))
    y = (1 - a) * doubled(g.outputs[1](h)) + a * g.outputs[2](g.up[2](h))
    assert y.shape == (3, 1, 32, 32)

    def judged(x: Tensor, y: Tensor, level: int) -> Tensor:
        judge = made.judges[level]
        assert isinstance(judge, RelativeL1) and judge.features is not None
        f, g = ((judge.features(one) - judge.feature_mean) / judge.feature_std for one in (x, y))
        return ((f - g).abs().mean((1, 2, 3)) / f.abs().mean((1, 2, 3))).mean()

    expected = (1 - a) * judged(shrunk(seen, 16), shrunk(y, 16), 1) + a * judged(seen, y, 2)
    torch.testing.assert_close(losses, {"to_32": expected}, rtol=1e-4, atol=1e-5)
    at(made, "to_32", 4)
    (fresh,) = made.plays(Batch(x, torch.arange(3)))
    at(made, "at_32", 1)
    (whole,) = made.plays(Batch(x, torch.arange(3)))
    torch.testing.assert_close(fresh["to_32"], whole["at_32"], msg="a stage ends where the next one begins")
    with torch.no_grad():
        y = g(e(x, 3), 3)
        torch.testing.assert_close(made.score(x).mean(), judged(x, y, 3), rtol=1e-4, atol=1e-5)


def test_each_stage_moves_the_networks_that_it_uses() -> None:
    made, x = growing(), torch.rand(2, 1, 64, 64)
    players = made.players()
    assert list(players) == ["at_8", "to_16", "at_16", "to_32", "at_32", "to_64", "at_64"]
    for stage, networks in players.items():
        at(made, stage, 1)
        made.zero_grad()
        (losses,) = made.plays(Batch(x, torch.arange(2)))
        losses[stage].backward()
        moved = {name for name, p in made.named_parameters() if p.grad is not None and p.grad.any()}
        own = {id(p) for network in networks for p in network.parameters()}
        assert moved == {name for name, p in made.named_parameters() if id(p) in own}, stage


@pytest.mark.parametrize(
    ("override", "said"),
    [("model.detector.widths=[8,8,8]", "give the five channels"), ("model.budget.stages.at_64=0", "give it an epoch")],
)
def test_what_cannot_grow_is_refused(override: str, said: str) -> None:
    with pytest.raises((ValueError, InstantiationException), match=said):
        growing(override)


def test_it_grows_to_64_pixels() -> None:
    with pytest.raises(InstantiationException, match=r"set model\.input\.size=64"):
        make_detector(config.compose(["model=addpa_growing", "model.detector.features=null"]), (1, 32, 32))
