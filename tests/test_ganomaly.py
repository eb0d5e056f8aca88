"""GANomaly: the equations, who learns from what, the discriminator's new start, sizes, and the measured leak."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path

import pytest
import torch
from gradients import assert_alike
from test_methods import batch, detector, images
from torch import nn

from anomaly_lab import config
from anomaly_lab.course import Diverged
from anomaly_lab.methods.ganomaly import GANomaly
from anomaly_lab.players import Player, make_players, minimise
from anomaly_lab.run import run

TINY = ["model=ganomaly", "size=full", "model.detector.width=4", "model.budget.epoch_steps=4", "trainer.progress=false"]


def ganomaly(*overrides: str, shape: tuple[int, int, int] = (1, 32, 32)) -> GANomaly:
    made = detector("ganomaly", *overrides, shape=shape)
    assert isinstance(made, GANomaly)
    return made


def sgd(made: GANomaly, lr: float = 0.1) -> dict[str, Player]:
    return make_players(made.players(), functools.partial(torch.optim.SGD, lr=lr))


def test_losses_and_score_are_the_papers_equations() -> None:
    options = ["model.detector.w_adv=2", "model.detector.w_con=30", "model.detector.w_enc=0.5"]
    made, x = ganomaly(*options).double(), images().double()
    (losses,) = made.plays(batch()._replace(x=x))
    z = made.encoder(x)
    rebuilt = made.decoder(z)
    z_again = made.second_encoder(rebuilt)
    d = made.discriminator
    gap = (d.features(x) - d.features(rebuilt)) ** 2
    adv = gap.sum() / gap.numel()
    con = (x - rebuilt).abs().sum() / x.numel()
    enc = ((z - z_again) ** 2).sum() / z.numel()
    generator = (made.encoder, made.decoder, made.second_encoder)
    assert_alike(losses["generator"], 2 * adv + 30 * con + 0.5 * enc, *generator)
    real, fake = (torch.sigmoid(d(image)[0]) for image in (x, rebuilt))
    assert_alike(losses["discriminator"], 0.5 * (-real.log().mean() - (1 - fake).log().mean()), d)
    made.eval()
    z = made.encoder(x)
    torch.testing.assert_close(made.score(x), ((z - made.second_encoder(made.decoder(z))) ** 2).mean(dim=1))
    torch.testing.assert_close(made.reconstruct(x), made.decoder(z))


def test_the_players_share_one_pass_and_move_as_if_each_had_its_own() -> None:
    """The authors' order: the generator steps, then the discriminator on images from before that step."""
    made, twin = ganomaly(), ganomaly()
    twin.load_state_dict(made.state_dict())
    (losses,) = made.plays(batch())
    minimise(losses, sgd(made))

    x = images()
    fake = twin.decoder(twin.encoder(x)).detach()
    real_logit, fake_logit = twin.discriminator(x)[0], twin.discriminator(fake)[0]
    loss = 0.5 * (nn.functional.softplus(-real_logit).mean() + nn.functional.softplus(fake_logit).mean())
    for parameter, gradient in zip(
        twin.discriminator.parameters(), torch.autograd.grad(loss, list(twin.discriminator.parameters())), strict=True
    ):
        parameter.data -= 0.1 * gradient
    for (name, ours), theirs in zip(
        made.discriminator.named_parameters(), twin.discriminator.parameters(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, msg=name)


def test_a_collapsed_discriminator_starts_again_from_new_weights_of_the_runs_own_noise() -> None:
    def weights(scale: float, seed: int) -> tuple[torch.Tensor, float]:
        made = ganomaly()
        made.randomness.restart(seed, made.device)
        players = sgd(made, lr=0.0)
        with torch.no_grad():  # tells real from fake with certainty, or not at all
            made.discriminator.logit[0].weight.zero_()
        made.discriminator.logit.append(Certain(scale))
        for losses in made.plays(batch()):
            minimise(losses, players)
        made.after_step()
        return made.discriminator.features[0].weight.detach().clone(), made.course.means()["discriminator_resets"]

    before = ganomaly().discriminator.features[0].weight
    kept, resets = weights(0.0, seed=1)
    assert torch.equal(kept, before) and resets == 0
    drawn, resets = weights(100.0, seed=1)
    assert not torch.equal(drawn, before) and resets == 1
    assert torch.equal(drawn, weights(100.0, seed=1)[0]) and not torch.equal(drawn, weights(100.0, seed=2)[0])


class Certain(nn.Module):
    """A logit of +scale for the first batch it sees, -scale for the second."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, logit: torch.Tensor) -> torch.Tensor:
        self.scale = -self.scale
        return logit - self.scale


@pytest.mark.parametrize(("size", "channels", "extra"), [(32, 1, 0), (32, 3, 1), (64, 3, 0), (64, 1, 2)])
def test_parameters_per_network_are_those_of_the_authors_code(size: int, channels: int, extra: int) -> None:
    made = ganomaly(
        "model.detector.width=64", f"model.detector.extra_layers={extra}", shape=(channels, size, size)
    ).eval()
    # Kernels of 4×4 without bias, 64 channels doubled down to 4×4 pixels; two numbers a normalised channel.
    widths = [64, 128, 256, 512][: {32: 3, 64: 4}[size]]
    kernels = 16 * (channels * 64 + sum(a * b for a, b in itertools.pairwise(widths)))
    more = extra * (9 * 64 * 64 + 2 * 64)
    encoder = kernels + 16 * widths[-1] * 100 + 2 * sum(widths[1:]) + more
    decoder = kernels + 16 * widths[-1] * 100 + 2 * sum(widths) + more
    critic = kernels + 16 * widths[-1] + 2 * sum(widths[1:]) + more
    counts = [
        sum(p.numel() for p in network.parameters())
        for network in (made.encoder, made.second_encoder, made.decoder, made.discriminator)
    ]
    assert counts == [encoder, encoder, decoder, critic]
    with torch.no_grad():
        assert made.score(images(2, (channels, size, size))).shape == (2,)
        assert made.discriminator(images(2, (channels, size, size)))[1].shape == (2, widths[-1], 4, 4)


def test_at_a_rate_of_one_it_ends_with_a_recorded_failure(tmp_path: Path) -> None:
    cfg = config.compose([*TINY, f"runs={tmp_path}", f"data_dir={tmp_path}", "model.optimizer.lr=1"])
    with pytest.raises(Diverged, match=r"training (diverged|collapsed).*: .*; lower the learning rate"):
        run(cfg)
    assert "Diverged: training" in (config.job(cfg).out / "failure.json").read_text()
    assert not (config.job(cfg).out / "result.json").exists()


def test_the_leak_of_batch_norm_is_measured_apart_and_changes_nothing(tmp_path: Path) -> None:
    def made(*overrides: str) -> dict[str, float]:
        paths = [
            f"runs={tmp_path}",
            f"data_dir={tmp_path}",
            "model.budget.epochs=2",
            "model.optimizer.lr=5e-3",
            "normal_class=8",
        ]
        result = run(config.compose([*TINY, *paths, *overrides]))
        assert result is not None
        return result["metrics"]

    honest = made()
    measured = made("trainer.measure_leak=true")  # scored again from the checkpoint, not trained again
    leak = {name: measured.pop(name) for name in ("oracle_sorted_auroc", "oracle_shuffled_auroc")}
    assert measured.pop("oracle_sorted_best_auroc") is None, "not watched after every epoch"
    assert measured == honest
    assert leak["oracle_sorted_auroc"] != leak["oracle_shuffled_auroc"] != honest["auroc"]
    assert made().items() >= leak.items(), "a finished run is returned as it was measured"
