"""HRN, Deep SVDD, and the convolutional, variational and robust autoencoders: their equations with plain torch, who
moves when, and that each of them learns more than the mean image."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import pytest
import torch
from gradients import assert_alike
from test_methods import batch, detector, images
from torch import Tensor
from torch.nn import functional as F

from anomaly_lab import config, metrics
from anomaly_lab.batches import Batch, PlainLoader
from anomaly_lab.build import make_data
from anomaly_lab.detector import Detector
from anomaly_lab.methods.convolutional_autoencoder import ConvolutionalAutoencoder
from anomaly_lab.methods.deep_sad import DeepSAD
from anomaly_lab.methods.deep_svdd import DeepSVDD, SoftBoundaryDeepSVDD, away_from_zero
from anomaly_lab.methods.hrn import HRN
from anomaly_lab.methods.robust_autoencoder import RobustAutoencoder
from anomaly_lab.methods.vae import VAE
from anomaly_lab.players import make_players, minimise
from anomaly_lab.run import run


def moved(made: Detector, lr: float = 0.01) -> list[set[str]]:
    """Which networks move in each play of one step."""
    players = make_players(made.players(), functools.partial(torch.optim.SGD, lr=lr))
    found = []
    for losses in made.plays(batch()):
        before = {name: p.detach().clone() for name, p in made.named_parameters()}
        minimise(losses, players)
        found.append({name.split(".")[0] for name, p in made.named_parameters() if not torch.equal(p, before[name])})
    return found


# HRN ----------------------------------------------------------------------------------------------------------------


def test_hrn_loss_and_score_are_the_papers_equations() -> None:
    made = detector("hrn", "model.detector.init=0.5", "model.detector.h_power=3")
    assert isinstance(made, HRN)
    w1, w2 = made.classifier.branches[0].weight, made.classifier.logit.weight
    x = images().flatten(1)
    x = x / (x**2).sum(1, keepdim=True) ** 0.5
    x = (x - x.mean(1, keepdim=True)).requires_grad_()
    f = F.leaky_relu(x @ w1.T, 0.01) @ w2.T  # (B,1)
    penalty = torch.stack([torch.autograd.grad(one, x, create_graph=True)[0].norm() ** 3 for one in f.squeeze(1)])
    expected = -torch.log(1 / (1 + torch.exp(-f)) + 0.01).mean() + 0.1 * penalty.mean()
    (losses,) = made.plays(batch())
    torch.testing.assert_close(losses["classifier"], expected)
    assert penalty.mean() > 1e-3, "the H-regulariser would not be seen"
    own = torch.autograd.grad(losses["classifier"], list(made.parameters()))
    for mine, theirs in zip(own, torch.autograd.grad(expected, list(made.parameters())), strict=True):
        torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(made.eval().score(images()), -f.squeeze(1))


def test_hrn_of_colour_joins_a_branch_for_each_channel() -> None:
    made = detector("hrn_cifar10", "model.detector.width=300", shape=(3, 32, 32))
    assert sorted(tuple(p.shape) for p in made.parameters()) == sorted(
        [*[(300, 1024)] * 3, (300, 900), (1, 300)]
    )  # the authors' code
    assert max(p.abs().max().item() for p in made.parameters()) <= 0.001
    x = torch.rand(4, 3, 32, 32)
    flat = x.flatten(1)
    flat = flat / flat.norm(dim=1, keepdim=True)
    seen = (flat - flat.mean(1, keepdim=True) + 0.006).view(4, 3, 1024)  # the authors' loader for CIFAR-10
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(100)
    torch.testing.assert_close(made.score(x), -made.classifier(seen))
    assert not torch.allclose(made.classifier(seen), made.classifier(seen - 0.006), rtol=1e-3)


# Convolutional autoencoders -----------------------------------------------------------------------------------------


def standardised(x: Tensor) -> Tensor:
    """Global contrast normalisation with the L1 norm, image by image."""
    return torch.stack([(one - one.mean()) / (one - one.mean()).abs().mean() for one in x])


def normal(made: ConvolutionalAutoencoder, x: Tensor) -> Tensor:
    """What the network sees after fitting on the images that `autoencoder` fits on."""
    training = standardised(images(30, seed=2))
    return (standardised(x) - training.min()) / (training.max() - training.min())


def autoencoder(model: str, *overrides: str) -> ConvolutionalAutoencoder:
    made = detector(model, *overrides)
    assert isinstance(made, ConvolutionalAutoencoder)
    made.before_fit(images(30, seed=2))
    return made


@pytest.mark.parametrize("model", ["conv_ae", "denoising_ae"])
def test_autoencoders_minimise_the_squared_error_of_the_normalised_image(model: str) -> None:
    made = autoencoder(model, "model.detector.masked=0") if model == "denoising_ae" else autoencoder(model)
    x = normal(made, images())
    rebuilt = made.decoder(made.encoder(x))
    (losses,) = made.plays(batch())
    torch.testing.assert_close(losses["autoencoder"], ((x - rebuilt) ** 2).flatten(1).sum(1).mean())
    made.eval()
    rebuilt = made.decoder(made.encoder(x))
    torch.testing.assert_close(made.score(images()), ((x - rebuilt) ** 2).flatten(1).sum(1))
    low, high = standardised(images(30, seed=2)).aminmax()
    for image, back, seen in zip(images(), made.reconstruct(images()), rebuilt, strict=True):
        centred = image - image.mean()
        own = (seen * (high - low) + low) * centred.abs().mean() + image.mean()
        torch.testing.assert_close(back, own, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(made.normalise.undo(x, images()), images(), rtol=1e-4, atol=1e-5)


def test_a_denoising_autoencoder_sees_masked_pixels_and_is_scored_on_whole_ones() -> None:
    made = autoencoder("denoising_ae", "model.detector.masked=0.4")
    seen: list[Tensor] = []
    made.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    (losses,) = made.plays(batch(64))
    x = normal(made, images(64))
    masked = seen[0] == 0
    torch.testing.assert_close(seen[0][~masked], x[~masked])
    assert masked.float().mean().item() == pytest.approx(0.4, abs=0.02)
    torch.testing.assert_close(
        losses["autoencoder"], ((x - made.decoder(made.encoder(seen[0]))) ** 2).flatten(1).sum(1).mean()
    )
    made.eval().score(images())
    torch.testing.assert_close(seen[-1], normal(made, images()))


def test_a_white_image_has_a_score() -> None:
    assert torch.isfinite(autoencoder("conv_ae").eval().score(torch.ones(2, 1, 32, 32))).all()


@pytest.mark.parametrize(
    ("model", "shape", "encoder", "decoder"),
    [
        ("conv_ae", (1, 28, 28), 25 * (8 + 8 * 4) + 4 * 49 * 32, 25 * (2 * 4 + 4 * 8 + 8)),
        (
            "conv_ae_cifar10",
            (3, 32, 32),
            25 * (3 * 32 + 32 * 64 + 64 * 128) + 128 * 16 * 128,
            25 * (8 * 128 + 128 * 64 + 64 * 32 + 32 * 3),
        ),
    ],
)
def test_networks_have_the_sizes_of_the_authors_code(
    model: str, shape: tuple[int, int, int], encoder: int, decoder: int
) -> None:
    made = detector(model, "size=full", shape=shape)
    assert isinstance(made, ConvolutionalAutoencoder)
    assert [sum(p.numel() for p in net.parameters()) for net in (made.encoder, made.decoder)] == [encoder, decoder]
    assert made.reconstruct(images(2, shape)).shape == (2, *shape)


def test_a_decoder_reaches_every_even_size() -> None:
    for size in (8, 14, 16, 20, 28, 30, 32):
        shape = (1, size, size)
        made = detector("conv_ae", shape=shape)
        assert made.reconstruct(images(2, shape)).shape == (2, *shape)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["latent_size=30"], "a latent_size that 16 divides, not 30"),
        (["widths=[4]"], r"widths=\[4\]: 32 pixels need at least 2 of them"),
        (["masked=1"], "masked=1: choose a share of the pixels from 0 to below 1"),
    ],
)
def test_a_wrong_size_is_named_with_what_to_do(options: list[str], message: str) -> None:
    with pytest.raises(Exception, match=message):
        detector("denoising_ae", *(f"model.detector.{option}" for option in options))


# Deep SVDD ----------------------------------------------------------------------------------------------------------


def svdd(model: str, stage: str, *overrides: str) -> DeepSVDD:
    made = autoencoder(model, *overrides)
    assert isinstance(made, DeepSVDD)
    made._images = PlainLoader([images(30, seed=2)], made.device, leaving_out=False)
    made.stages.plan({"pretrain": 1, "train": 9})
    made.stages.enter(1 if stage == "pretrain" else 2)
    made.eval()
    with torch.no_grad():
        made.before_stage(stage)
        made.before_epoch(2)
    return made.train()  # type: ignore[no-any-return]


def test_deep_svdd_pretrains_an_autoencoder_and_then_moves_its_encoder_alone() -> None:
    assert moved(svdd("deep_svdd", "pretrain")) == [{"encoder", "decoder"}]
    assert moved(svdd("deep_svdd", "train")) == [{"encoder"}]
    assert moved(svdd("deep_svdd_soft", "train")) == [{"encoder"}]


def test_the_centre_is_the_mean_code_kept_away_from_zero() -> None:
    found = away_from_zero(torch.tensor([-0.3, -0.05, 0.0, 0.02, 0.1, 2.0]))
    assert found.tolist() == pytest.approx([-0.3, -0.1, 0.0, 0.1, 0.1, 2.0])
    made = svdd("deep_svdd", "train").eval()
    with torch.no_grad():
        made.encoder[-1].weight.mul_(4)  # the codes of untrained networks are near zero
        made.before_stage("train")
    mean = made.encoder(normal(made, images(30, seed=2))).mean(0)
    far = mean.abs() > 0.1
    assert far.any() and not far.all()
    torch.testing.assert_close(made.centre[far], mean[far])
    torch.testing.assert_close(made.centre[~far], 0.1 * mean[~far].sign())


def test_deep_svdd_objectives_and_scores_are_the_papers_equations() -> None:
    x = images()
    made = svdd("deep_svdd", "train")
    squared = ((made.encoder(normal(made, x)) - made.centre) ** 2).sum(1)
    (losses,) = made.plays(batch())
    torch.testing.assert_close(losses["svdd"], squared.mean())
    made.eval()
    torch.testing.assert_close(made.score(x), ((made.encoder(normal(made, x)) - made.centre) ** 2).sum(1))

    soft = svdd("deep_svdd_soft", "train", "model.detector.nu=0.25")
    squared = ((soft.encoder(normal(soft, x)) - soft.centre) ** 2).sum(1)
    soft.radius.copy_(squared.detach().median().sqrt())
    r2 = soft.radius.item() ** 2
    (losses,) = soft.plays(batch())
    torch.testing.assert_close(losses["svdd"], r2 + (squared - r2).relu().sum() / 8 / 0.25)
    soft.eval()
    torch.testing.assert_close(soft.score(x), ((soft.encoder(normal(soft, x)) - soft.centre) ** 2).sum(1) - r2)


def test_the_radius_stays_zero_during_warm_up_and_then_follows_each_batch_from_before_its_move() -> None:
    made = svdd("deep_svdd_soft", "train", "model.detector.nu=0.25", "model.detector.warm_up=1")
    assert isinstance(made, SoftBoundaryDeepSVDD)
    moved(made)
    assert made.radius == 0
    made.stages.enter(3)
    made.before_epoch(3)
    distance = (made.encoder(normal(made, images())) - made.centre).norm(dim=1).detach()
    moved(made)
    assert made.radius.item() == pytest.approx(distance.quantile(0.75).item(), rel=1e-4)


def test_deep_sad_draws_images_to_the_centre_and_drives_known_anomalies_from_it() -> None:
    made, x, known = svdd("deep_sad", "train", "model.detector.eta=2.5"), images(), torch.arange(8) % 3 == 1
    assert isinstance(made, DeepSAD) and made.SEMI_SUPERVISED
    squared = ((made.encoder(normal(made, x)) - made.centre) ** 2).sum(1)
    (losses,) = made.plays(Batch(x, torch.arange(8), known=known))
    torch.testing.assert_close(losses["svdd"], (squared[~known].sum() + (2.5 / (squared[known] + 1e-6)).sum()) / 8)
    (none,) = made.plays(batch())
    torch.testing.assert_close(none["svdd"], squared.mean())
    assert moved(made) == [{"encoder"}] and moved(svdd("deep_sad", "pretrain")) == [{"encoder", "decoder"}]


def test_before_there_is_a_centre_nothing_is_scored() -> None:
    assert svdd("deep_svdd", "pretrain").scored_after_fit
    assert not svdd("deep_svdd", "train").scored_after_fit


def test_deep_svdd_shows_no_reconstruction_by_a_decoder_that_its_encoder_has_left() -> None:
    assert svdd("deep_svdd", "train").reconstruct(images()) is None


# Variational autoencoder --------------------------------------------------------------------------------------------


def vae() -> tuple[VAE, Tensor]:
    made = detector("vae", "model.detector.samples=3")
    assert isinstance(made, VAE)
    return made, (images() + 1) / 2


def bernoulli(x: Tensor, logits: Tensor) -> Tensor:
    p = torch.sigmoid(logits)
    return -(x.flatten(1) * p.log() + (1 - x.flatten(1)) * (1 - p).log()).sum(1)


def test_vae_minimises_the_negative_bound_of_one_sample() -> None:
    made, x = (part.double() for part in vae())
    state = made.noise.get_state()
    (losses,) = made.plays(Batch(x, torch.arange(8)))
    made.noise.set_state(state)
    noise = torch.randn(8, 32, generator=made.noise, dtype=torch.float64)
    mu, log_variance = made.encoder(x).chunk(2, 1)
    s = torch.exp(log_variance) ** 0.5
    q, p = torch.distributions.Normal(mu, s), torch.distributions.Normal(0.0, 1.0)
    kl = torch.distributions.kl_divergence(q, p).sum(1)
    assert_alike(losses["vae"], (bernoulli(x, made.decoder(mu + s * noise)) + kl).mean(), made.encoder, made.decoder)


def test_vae_terms_are_reconstruction_divergence_bound_and_likelihood() -> None:
    made, x = vae()
    made.eval()
    mu, log_variance = made.encoder(x).chunk(2, 1)
    q, p = torch.distributions.Normal(mu, torch.exp(log_variance / 2)), torch.distributions.Normal(0.0, 1.0)
    kl = torch.distributions.kl_divergence(q, p).sum(1)
    codes = [mu + q.scale * e for e in made.noise_of_score]
    errors = [bernoulli(x, made.decoder(z)) for z in codes]
    weights = [-e + (p.log_prob(z) - q.log_prob(z)).sum(1) for e, z in zip(errors, codes, strict=True)]
    expected = {
        "reconstruction": bernoulli(x, made.decoder(mu)),
        "squared_error": ((x - made.reconstruct(x)) ** 2).flatten(1).sum(1),
        "kl": kl,
        "elbo": sum(errors) / 3 + kl,
        "likelihood": math.log(3) - torch.logsumexp(torch.stack(weights), 0),
    }
    terms = made.terms(x)
    assert terms.keys() == expected.keys()
    for name, written_out in expected.items():
        torch.testing.assert_close(terms[name], written_out, rtol=1e-4, atol=1e-3, msg=name)
    assert torch.equal(made.score(x), terms["elbo"])


# Robust autoencoder -------------------------------------------------------------------------------------------------


def rda(contamination: float = 0.2) -> RobustAutoencoder:
    made = detector("rda", f"model.detector.contamination={contamination}", "model.detector.inner=2")
    assert isinstance(made, RobustAutoencoder)
    return made


class Numbered(PlainLoader):
    """Images that know their places in a data set: 100, 101, ..."""

    def everything(self) -> Batch:
        x = super().everything().x
        return Batch(x, torch.arange(100, 100 + len(x)))


def test_rda_sets_aside_the_worst_explained_images_and_starts_anew() -> None:
    made, x = rda(), (images(10, seed=2) + 1) / 2
    made._images = Numbered([x], made.device, leaving_out=False)
    with torch.no_grad():
        residual = x.flatten(1) - made.autoencoder(x.flatten(1))
        before = made.autoencoder.weights[0].clone()
        made.before_epoch(1)
        made.before_epoch(2)
        assert torch.equal(made.autoencoder.weights[0], before) and not len(made.outlier)
        made.before_epoch(3)
    assert not torch.equal(made.autoencoder.weights[0], before), "a round begins with new weights"
    size = (residual**2).sum(1) ** 0.5
    threshold = size.quantile(0.8)
    assert made.outlier.tolist() == [i for i in range(10) if size[i] > threshold] and len(made.outlier) == 2
    assert made.rejected_images()["S"].tolist() == made.outlier.tolist()
    for place, row in zip(made.outlier, made.sparse, strict=True):
        torch.testing.assert_close(row, max(0, 1 - threshold / size[place]) * residual[place])

    # In the next round these images are seen without their part in S, and lambda stays.
    explained = x.flatten(1).clone()
    explained[made.outlier] -= made.sparse
    (losses,) = made.plays(Batch(x, torch.arange(100, 110)))
    torch.testing.assert_close(losses["autoencoder"], ((explained - made.autoencoder(explained)) ** 2).mean())
    with torch.no_grad():
        size = (x.flatten(1) - made.autoencoder(explained)).norm(dim=1)
        made.before_epoch(5)
    assert made.threshold == threshold and made.outlier.tolist() == (size > threshold).nonzero().squeeze(1).tolist()


def test_rda_of_a_clean_set_is_a_tied_autoencoder_scored_by_its_residual() -> None:
    made, x = rda(contamination=0), images()
    made._images = Numbered([x], made.device, leaving_out=False)
    with torch.no_grad():
        made.after_fit(x)
    assert not len(made.outlier)
    code, image = x.flatten(1), x.flatten(1)
    for weight, bias in zip(made.autoencoder.weights, made.autoencoder.down, strict=True):
        code = torch.sigmoid(code @ weight.T + bias)
    for weight, bias in zip(made.autoencoder.weights[::-1], made.autoencoder.up[::-1], strict=True):
        code = torch.sigmoid(code @ weight + bias)
    torch.testing.assert_close(made.score(x), (image - code).norm(dim=1))


# Learning -----------------------------------------------------------------------------------------------------------

SHORT = {
    "hrn": ["model.budget.epochs=10"],
    "conv_ae": ["model.budget.epochs=4"],
    "denoising_ae": ["model.budget.epochs=4"],
    "deep_svdd": ["model.budget.stages={pretrain:3,train:2}"],
    "deep_svdd_soft": ["model.budget.stages={pretrain:3,train:2}", "model.detector.warm_up=1"],
    "deep_sad": ["model.budget.stages={pretrain:3,train:2}", "split.known.rate=0.05", "split.known.classes=[7]"],
    "vae": ["model.budget.epochs=6"],
    "rda": ["model.budget.epochs=6", "model.detector.inner=3"],
}


@pytest.mark.slow
@pytest.mark.parametrize("model", SHORT)
def test_seconds_of_training_are_worth_more_than_the_mean_image(model: str, tmp_path: Path) -> None:
    """On ones, of which the embedded digits have many kinds: a floor, no claim."""
    where = [f"runs={tmp_path}", f"data_dir={tmp_path}", "trainer.progress=false", "logger=none"]
    short = ["model.budget.epoch_steps=20", "model.batch_size=32", *SHORT[model]]
    cfg = config.compose([f"model={model}", "normal_class=1", *short, *where])
    result, data = run(cfg), make_data(config.job(cfg))
    assert result is not None
    train, test = data.prepared("train"), data.prepared("test")
    distance = (test - train.mean(0)).square().sum((1, 2, 3)).double().numpy()
    assert result["metrics"]["auroc"] > metrics.auroc(distance, data.partition.test_truth)
