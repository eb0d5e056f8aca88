"""What every method in conf/model must do, tested on each of them, and the equations of shared autoencoders."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from gradients import assert_alike
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from anomaly_lab import config, testing
from anomaly_lab.build import make_detector
from anomaly_lab.detector import Batch, Detector
from anomaly_lab.methods.shared_autoencoder import EncoderDecoderEncoder, SharedAutoencoder
from anomaly_lab.players import make_players, minimise

# Sizes at which a method is quick to test; each model takes those it has.
SHRINK: dict[str, object] = {
    "model.detector.width": 4,
    "model.detector.critic_width": 4,
    "model.detector.search_steps": 3,
    "model.detector.starts": 2,
    "model.detector.flips": False,
    "model.detector.orders": 2,
    "model.detector.architectures": ["squeezenet1_0.features.0"] * 4,
    "model.detector.samples": 8,
    "model.detector.inner": 1,  # of two epochs: a run that is killed between them crosses from one round to the next
    "model.detector.warm_up": 1,  # the second epoch moves the radius
    "model.detector.units": 4,
    "model.detector.encoder_widths": [4, 4, 4, 4],
    "model.detector.generator_widths": [4, 4, 4, 4],
    "model.detector.image_critic_widths": [4, 4, 4, 4],
    "model.detector.latent_critic_widths": [4, 4],
    "model.detector.components": 4,
    "model.detector.features.weights": "random",
    "model.detector.features.path": "null",
    "model.detector.features.sha256": "null",
    "model.detector.features.architecture": "squeezenet1_0",
}
REDUCED = {
    *("detector.width", "detector.widths", "detector.critic_width", "budget.epochs", "budget.steps"),
    *(f"detector.{network}_widths" for network in ("encoder", "generator", "image_critic", "latent_critic")),
    *(f"budget.stages.{stage}" for stage in ("pretrain", "detect", "retrain", "train")),
    *(f"budget.stages.{stage}" for stage in ("gan", "encoder", "plain", "mined")),
    *(f"budget.stages.at_{side}" for side in (8, 16, 32, 64)),
    *(f"budget.stages.to_{side}" for side in (16, 32, 64)),
    # What follows from fewer epochs.
    *(f"{key}.{rest}" for key in ("optimizer", "optimizer.autoencoder", "optimizer.svdd") for rest in ("lr",)),
    *(f"{key}.milestones" for key in ("scheduler", "scheduler.autoencoder", "scheduler.svdd")),
    "scheduler.T_max",
    *("detector.warm_up", "detector.flips", "budget.epoch_steps"),
    "detector.orders",
    "detector.inner",
    "detector.estimator_width",
    "input.size",
    *(f"optimizer.{player}.lr" for player in ("critic", "generator", "encoder")),
    *("detector.latent_size", "detector.critic_rounds", "detector.search_steps", "detector.starts"),
    *("detector.units", "detector.average", "batch_size", "scheduler.step_size"),
}
"""What a small size may reduce."""

CEILINGS = {path.stem for path in (config.CONFIG_DIR / "model").glob("*.yaml") if "\nlabels: true" in path.read_text()}
"""Rows that learn from labels, as no one-class method may."""

MODELS = sorted({path.stem for path in (config.CONFIG_DIR / "model").glob("*.yaml")} - CEILINGS - {"fused"})
"""All that have a detector and see no label; `fused` is made of others, see tests/test_fused.py."""


def flat(section: Mapping[Any, Any], prefix: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in section.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


@functools.cache
def written(model: str) -> DictConfig:
    """A model's yaml on top of those that it starts from, not composed: sixty compositions take a test process 12 s."""
    read = OmegaConf.load(config.CONFIG_DIR / "model" / f"{model}.yaml")
    assert isinstance(read, DictConfig)
    bases = [written(name) for name in read.pop("defaults", []) if name != "_self_"]
    merged = OmegaConf.merge(*bases, read)
    assert isinstance(merged, DictConfig)
    return merged


NUMBER = r"\d+(\.\d+)?(e-?\d+)?"


def none_or_some(number: re.Match[str]) -> str:
    return "some" if float(number[0]) else "none"


def first_of_their_kind() -> list[str]:
    """The models but those whose yaml is another's with other numbers above zero, once both are shrunk."""
    found: dict[str, str] = {}
    for model in MODELS:
        content = OmegaConf.to_container(written(model))
        assert isinstance(content, dict)
        kind = {
            key: "shrunk"
            if f"model.{key}" in SHRINK and value is not None
            else re.sub(NUMBER, none_or_some, str(value))
            for key, value in flat(content).items()
            if key not in ("published", "pretrained")
        }
        found.setdefault(repr(sorted(kind.items())), model)
    return list(found.values())


@functools.cache
def shrunk(model: str) -> list[str]:
    """Overrides: the method at a size that is quick to test."""
    plain = config.compose([f"model={model}"])
    return [f"model={model}", *(f"{k}={v}" for k, v in SHRINK.items() if OmegaConf.select(plain, k) is not None)]


def detector(model: str, *overrides: str, shape: tuple[int, int, int] = (1, 32, 32)) -> Detector:
    """A detector of ``conf/model`` with its batch norms shaken out of their initial state, in train mode."""
    cfg = config.compose([*shrunk(model), *overrides])
    made = make_detector(cfg, shape)
    generator = torch.Generator().manual_seed(1)
    for buffer in (b for name, b in made.named_buffers() if name.endswith(("running_mean", "running_var"))):
        buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    if made.scored_after_fit:
        with torch.no_grad():
            made.eval().after_fit(images(30, shape, seed=2))
    return made.train()


def images(count: int = 8, shape: tuple[int, int, int] = (1, 32, 32), seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((count, *shape), generator=generator) * 2 - 1


def batch(count: int = 8) -> Batch:
    return Batch(images(count), torch.arange(count))


# Every method -------------------------------------------------------------------------------------------------------


def test_there_are_models() -> None:
    assert {"shared_ae", "autoencoder", "ede"} <= set(MODELS)
    assert not [model for model in MODELS if model.endswith(config.SMALL)], "a size is a value in its yaml"


@pytest.mark.parametrize("model", MODELS)
def test_every_model_composes_with_a_lab_note_and_a_budget(model: str) -> None:
    assert (config.CONFIG_DIR / "model" / f"{model}.yaml").read_text().startswith("#"), "no note at the top"
    cfg = config.compose([f"model={model}"])
    required, optional = (
        {"detector", "members", "optimizer", "scheduler", "clip", "budget", "batch_size", "input"},
        {"published", "pretrained"},
    )
    assert required <= set(cfg.model) <= required | optional
    budget = cfg.model.budget
    budgets = sum(bool(budget.get(kind)) for kind in ("epochs", "steps", "stages"))
    assert budgets == (cfg.model.optimizer is not None), "a method without gradients has no epochs"


QUICK = ("shared_ae", "ganomaly", "piad_pixel_l1", "itsr", "knn")
"""One of each of the four papers, one of them with stages, and one without gradients; others in ``make test-slow``."""


def test_a_kind_is_more_than_its_numbers() -> None:
    kinds = set(first_of_their_kind())
    assert "ede_50" not in kinds and {"ede", "autoencoder"} <= kinds, "a weight of 0 is no other number"
    assert {"piad", "piad_pixel_l1", "deep_svdd", "deep_svdd_soft", "deep_sad"} <= kinds
    assert {written(model).detector["_target_"] for model in MODELS} == {
        written(model).detector["_target_"] for model in kinds
    }
    for model in ("piad_squeezenet_cifar10", "vae_fashion"):
        assert written(model).detector["_target_"] == config.compose([f"model={model}"]).model.detector["_target_"]


@pytest.mark.parametrize(
    "model", [pytest.param(m, marks=[pytest.mark.slow] * (m not in QUICK)) for m in first_of_their_kind()]
)
def test_every_method_keeps_the_contract(model: str, monkeypatch: pytest.MonkeyPatch, data: Path) -> None:
    """As ``anomaly-lab-check model=...`` does; tests/test_testing.py shows that it can fail.

    A yaml with other numbers alone takes its one step at full size in tests/test_cuda_graphs.py.
    """
    monkeypatch.setenv("ANOMALY_LAB_DATA", str(data))
    name, *small = shrunk(model)
    rounds = ["model.detector.rounds=2"] * ("rounds" in config.compose([name]).model.detector)  # an epoch each
    testing.check(model, *small, *rounds, "split.contamination.rate=0.05")


# Shared autoencoders ------------------------------------------------------------------------------------------------


def transcription(made: SharedAutoencoder, x: Tensor, n: int, alpha: float, beta: float) -> dict[str, Tensor]:
    """Algorithm 1 and equations (1) to (7) of Jia & Liu (2022), letter by letter, without the floor."""
    e1, e2, d1, d2 = made.encoder1, made.encoder2, made.decoder1, made.decoder2
    z = e1(x)
    x1, x2 = d1(z), d2(z)
    z1, z2 = e2(x1), e2(x2)
    x2_prime = d1(z2)
    z2_prime = e2(x2_prime)
    l1_rec = alpha * torch.mean(torch.abs(x - x1)) + beta * torch.mean(torch.abs(z - z1))
    l2_rec = alpha * torch.mean(torch.abs(x - x2)) + beta * torch.mean(torch.abs(z - z2))
    adv = alpha * torch.mean(torch.abs(x - x2_prime)) + beta * torch.mean(torch.abs(z - z2_prime))
    image = torch.abs(x - x2_prime).mean(dim=(1, 2, 3))
    latent = torch.abs(z - z2_prime).mean(dim=1)
    return {
        "rec1": l1_rec,
        "rec2": l2_rec,
        "adv": adv,
        "ede1": (1 / n) * l1_rec - (1 - 1 / n) * adv,
        "ede2": (1 / n) * l2_rec + (1 - 1 / n) * adv,
        "image": image,
        "latent": latent,
        "image2": torch.abs(x - x2).mean(dim=(1, 2, 3)),
        "reencoded": alpha * torch.mean(torch.abs(x - x2_prime)) + beta * torch.mean(torch.abs(z2 - z2_prime)),
    }


def shared(*overrides: str) -> SharedAutoencoder:
    made = detector("shared_ae_printed", "model.detector.alpha=1.5", "model.detector.beta=0.7", *overrides)
    assert isinstance(made, SharedAutoencoder)
    return made


@pytest.mark.parametrize("n", [1, 2, 3, 10])
def test_losses_are_the_printed_equations(n: int) -> None:
    made, x = shared(), images()
    made.epochs_done.fill_(n - 1)
    expected = transcription(made, x, n, 1.5, 0.7)
    p = made.passes(x)
    torch.testing.assert_close(made.loss_rec1(p), expected["rec1"])
    torch.testing.assert_close(made.loss_rec2(p), expected["rec2"])
    torch.testing.assert_close(made.loss_adv(p), expected["adv"])
    torch.testing.assert_close(made.loss_ede1(p), expected["ede1"])
    torch.testing.assert_close(made.loss_ede2(p), expected["ede2"])


def test_the_floor_holds_the_reconstruction_weight() -> None:
    made = shared("model.detector.rec_weight_floor=0.75")
    weights = []
    for n in (1, 2, 50):
        made.epochs_done.fill_(n - 1)
        weights.append(made.rec_weight().item())
    assert weights == [1.0, 0.75, 0.75]


def test_as_printed_decoder_1_is_paid_for_a_bad_reconstruction_from_epoch_3() -> None:
    """With x2' in x1's place, the weight of D1's image error in (6) is 2/n - 1."""
    made, x = shared("model.detector.beta=0"), images()
    signs = {}
    for n in (1, 2, 3, 10):
        made.epochs_done.fill_(n - 1)
        p = made.passes(x)
        p.__dict__["x2p"] = p.x1  # perfect latent consistency
        signs[n] = (made.loss_ede1(p) / made.loss_rec1(p)).item()
    assert signs == pytest.approx({1: 1.0, 2: 0.0, 3: -1 / 3, 10: -0.8}, abs=1e-6)


def moves(update: str) -> list[set[str]]:
    """Which networks move in each play of one step."""
    made = shared(f"model.detector.update={update}", "model.detector.rec_weight_floor=0.75")
    made.epochs_done.fill_(4)
    players = make_players(made.players(), functools.partial(torch.optim.SGD, lr=0.1))
    moved = []
    for losses in made.plays(batch()):
        before = {name: p.detach().clone() for name, p in made.named_parameters()}
        minimise(losses, players)
        moved.append({n.split(".")[0] for n, p in made.named_parameters() if not torch.equal(p, before[n])})
    return moved


@pytest.mark.parametrize(
    ("update", "expected"),
    [
        ("alternating", [{"encoder1", "encoder2", "decoder1"}, {"encoder1", "encoder2", "decoder2"}]),
        ("decoder", [{"decoder1"}, {"encoder1", "encoder2", "decoder2"}]),
        ("simultaneous", [{"encoder1", "encoder2", "decoder1", "decoder2"}]),
        ("none", [{"encoder1", "encoder2", "decoder1", "decoder2"}]),
    ],
)
def test_who_moves_in_which_play(update: str, expected: list[set[str]]) -> None:
    assert moves(update) == expected


@pytest.mark.parametrize("update", ["alternating", "decoder", "simultaneous", "none"])
def test_each_player_moves_on_its_own_equation(update: str) -> None:
    made, x = shared(f"model.detector.update={update}").double(), images().double()
    made.epochs_done.fill_(3)
    printed = transcription(made, x, 4, 1.5, 0.7)
    one, two, both = printed["ede1"], printed["ede2"], printed["rec1"] + printed["rec2"]
    expected: dict[str, list[dict[str, Tensor]]] = {
        "alternating": [{"ede1": one}, {"ede2": two}],
        "decoder": [{"decoder1": one}, {"ede2": two + printed["rec1"] / 4}],
        "simultaneous": [{"decoder1": one, "decoder2": two, "encoders": both / 4}],
        "none": [{"both": both}],
    }
    for losses, wanted in zip(made.plays(batch()._replace(x=x)), expected[update], strict=True):
        assert losses.keys() == wanted.keys()
        for player, loss in losses.items():
            assert_alike(loss, wanted[player], *made.players()[player])


def test_the_second_play_sees_the_networks_the_first_one_moved() -> None:
    made = shared("model.detector.rec_weight_floor=0.75")
    made.epochs_done.fill_(4)
    players = make_players(made.players(), functools.partial(torch.optim.SGD, lr=0.5))

    def second_loss(play_first: bool) -> Tensor:
        plays = made.plays(batch())
        first = next(plays)
        if play_first:
            minimise(first, players)
        return next(plays)["ede2"].detach()

    assert not torch.allclose(second_loss(play_first=False), second_loss(play_first=True), rtol=1e-3)


def test_scores_and_latent_targets_are_what_they_are_called() -> None:
    x = images()
    made = shared("model.detector.omega=0.3").eval()
    expected = transcription(made, x, 1, 1.5, 0.7)
    torch.testing.assert_close(made.score(x), 0.3 * expected["image"] + 0.7 * expected["latent"])
    usad = shared("model.detector.omega=0.3", "model.detector.score=usad").eval()
    torch.testing.assert_close(usad.score(x), 0.3 * expected["image2"] + 0.7 * expected["image"])
    reencoded = shared("model.detector.latent_target=reencoded").eval()
    torch.testing.assert_close(reencoded.loss_adv(reencoded.passes(x)), expected["reencoded"])

    attached, detached = shared("model.detector.alpha=0"), shared("model.detector.alpha=0")
    detached.latent_target = "code_detached"
    losses = [m.loss_adv(m.passes(x)) for m in (attached, detached)]
    torch.testing.assert_close(*losses)
    gradients = [
        torch.autograd.grad(loss, list(m.encoder1.parameters()))
        for m, loss in zip((attached, detached), losses, strict=True)
    ]
    assert any(not torch.allclose(a, b) for a, b in zip(*gradients, strict=True))


def test_the_ablation_rows_leave_out_what_they_say() -> None:
    x = images()
    ede = detector("ede", "model.detector.alpha=1.5", "model.detector.beta=0.7").eval()
    autoencoder = detector("autoencoder").eval()
    assert isinstance(ede, EncoderDecoderEncoder) and isinstance(autoencoder, EncoderDecoderEncoder)
    z = ede.encoder1(x)
    x1 = ede.decoder1(z)
    assert ede.encoder2 is not None
    image, latent = (x - x1).abs().mean(dim=(1, 2, 3)), (z - ede.encoder2(x1)).abs().mean(dim=1)
    (losses,) = ede.plays(Batch(x, torch.arange(8)))
    torch.testing.assert_close(losses["ede"], (1.5 * image + 0.7 * latent).mean())
    torch.testing.assert_close(ede.score(x), 0.5 * image + 0.5 * latent)
    assert autoencoder.encoder2 is None
    torch.testing.assert_close(autoencoder.score(x), (x - autoencoder.reconstruct(x)).abs().mean(dim=(1, 2, 3)))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.detector.update=usad", "update=usad: choose one of alternating"),
        ("model.detector.latent_target=x", "latent_target=x: choose one of code"),
        ("model.detector.score=x", "score=x: choose one of primed"),
        ("model.detector.omega=2", "omega=2: choose a number from 0 to 1"),
        ("model.detector.rec_weight_floor=-1", "rec_weight_floor=-1: choose a number from 0 to 1"),
    ],
)
def test_a_wrong_option_is_named_with_the_right_ones(override: str, message: str) -> None:
    with pytest.raises(Exception, match=message):
        detector("shared_ae", override)


def test_no_latent_score_without_a_second_encoder() -> None:
    with pytest.raises(Exception, match="set omega=1"):
        detector("ede", "model.detector.beta=0")


def test_networks_refuse_sizes_they_cannot_halve() -> None:
    with pytest.raises(Exception, match=r"model\.input\.size 8, 16, 32"):
        detector("autoencoder", shape=(1, 28, 28))


@pytest.mark.parametrize("model", MODELS)
def test_small_sizes_change_width_and_epochs_only(model: str) -> None:
    small, full = (config.compose([f"model={model}", f"size={size}"]).model for size in ("small", "full"))
    reduced = {key for key in flat(small) if flat(small)[key] != flat(full)[key]}
    assert reduced <= REDUCED and (reduced or small.optimizer is None)


def test_other_features_change_nothing_but_the_features() -> None:
    def differing(model: str, other: str) -> dict[str, tuple[object, object]]:
        one, two = (flat(config.compose([f"model={name}"]).model) for name in (model, other))
        return {key: (one.get(key), two.get(key)) for key in one | two if one.get(key) != two.get(key)}

    for other in ("piad_squeezenet", "piad_pixel_l1"):
        at_mnists_size = differing("piad_cifar10", f"{other}_cifar10")
        assert at_mnists_size == differing("piad_coil100", other), other
        assert all(key == "pretrained" or key.startswith("detector.features") for key in at_mnists_size)


def test_the_encoder_has_the_four_convolutions_of_figure_3() -> None:
    made = detector("shared_ae", "model.detector.width=64")
    assert isinstance(made, SharedAutoencoder)
    kinds = [type(layer).__name__ for layer in made.encoder1]
    assert kinds.count("Conv2d") == 4 and kinds.count("BatchNorm2d") == 2 and kinds[-1] == "Tanh"
    kinds = [type(layer).__name__ for layer in made.decoder1]
    assert kinds.count("ConvTranspose2d") == 4 and kinds.count("BatchNorm2d") == 3 and kinds[-1] == "Tanh"
    sizes = [sum(p.numel() for p in network.parameters()) for network in (made.encoder1, made.decoder1)]
    # Bias-free 4×4 kernels 1-64-128-256-100 and back, and two numbers a normalised channel.
    kernels = 16 * (1 * 64 + 64 * 128 + 128 * 256 + 256 * 100)
    assert sizes == [kernels + 2 * (128 + 256), kernels + 2 * (256 + 128 + 64)]


def test_config_files_of_models_are_found_from_the_checkout() -> None:
    assert Path(config.CONFIG_DIR).name == "conf"
