"""The three methods of Beggel et al. (2019): equations, the decision rule, what is rejected and what comes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from gradients import assert_alike
from omegaconf import DictConfig
from test_methods import batch, detector, images
from test_run import Stop, Weights, comparable, scores
from torch import Tensor

from anomaly_lab import config, load_run
from anomaly_lab.detector import Batch
from anomaly_lab.methods.adversarial_autoencoder import (
    AdversarialAutoencoder,
    DenseAutoencoder,
    IterativeTrainingSetRefinement,
    squared_error,
    training_rank,
)
from anomaly_lab.record import LEARNED
from anomaly_lab.run import run

STAGES = "model.budget.stages={pretrain:2,detect:4,retrain:2}"


def tiny(runs: Path, model: str, *overrides: str) -> DictConfig:
    """Two detection rounds of two epochs each between two epochs before and after, on contaminated digits."""
    sizes = ["model.detector.width=16", "model.batch_size=32"]
    if model == "itsr":
        sizes += ["model.detector.rounds=2", "model.detector.nu=0.1", STAGES]
    where = [f"runs={runs}", f"data_dir={runs.parent / 'data'}", "trainer.progress=false"]
    dirty = ["split.contamination.rate=0.1", "split.contamination.classes=[7]"]
    return config.compose([f"model={model}", *sizes, *where, *dirty, *overrides])


# Equations ----------------------------------------------------------------------------------------------------------


def test_the_plain_autoencoder_is_its_squared_error() -> None:
    made, x = detector("autoencoder_beggel"), images()
    assert isinstance(made, DenseAutoencoder)
    rebuilt = made.decoder(made.encoder(x))
    error = ((x - rebuilt) ** 2).mean(dim=(1, 2, 3))
    (losses,) = made.plays(batch())
    torch.testing.assert_close(losses["autoencoder"], error.mean())
    torch.testing.assert_close(made.score(x), error)
    assert made.decide(x) is None, "no threshold before fitting"
    made.after_fit(x)
    decided = made.decide(x)
    assert decided is not None and decided.tolist() == (error > error.quantile(0.9)).tolist() and decided.any()


def adversarial(model: str = "aae", *overrides: str) -> AdversarialAutoencoder:
    made = detector(model, *overrides)
    assert isinstance(made, AdversarialAutoencoder)
    return made


def test_the_three_plays_are_reconstruction_critic_and_encoder() -> None:
    made, x = adversarial().double(), images().double()
    made.randomness.restart(3, made.device)
    plays = made.plays(batch()._replace(x=x))
    first, second, third = (next(plays) for _ in range(3))
    assert [list(losses) for losses in (first, second, third)] == [["autoencoder"], ["critic"], ["encoder"]]
    assert_alike(first["autoencoder"], ((x - made.reconstruct(x)) ** 2).mean(), made.encoder, made.decoder)
    prior = torch.randn(8, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    on_prior, on_codes = (torch.sigmoid(made.critic(code)) for code in (prior, made.encoder(x)))
    assert_alike(second["critic"], -on_prior.log().mean() - (1 - on_codes).log().mean(), made.critic)
    assert_alike(third["encoder"], -on_codes.log().mean(), made.encoder)


@pytest.mark.parametrize("model", ["aae", "itsr"])
def test_the_score_at_nine_tenths_is_the_papers_rule(model: str) -> None:
    made, training = adversarial(model).eval(), images(200, seed=5)
    made.after_fit(training)
    error = ((training - made.reconstruct(training)) ** 2).mean(dim=(1, 2, 3))
    likelihood = torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2)).log_prob(made.encoder(training))
    rule = (error > error.quantile(0.9)) | (likelihood < likelihood.quantile(0.1))
    assert 0 < rule.sum() < len(rule)
    assert torch.equal(made.decide(training), rule)
    assert torch.equal(made.score(training) > 0.9, rule)
    far = made.score(torch.stack([3 * training[0], 30 * training[0]]))
    assert 1 < far[0] < far[1], "beyond all training images, scores still differ"


def test_training_ranks_rise_with_the_value_and_meet_the_quantiles() -> None:
    ordered = torch.tensor([1.0, 2.0, 2.0, 4.0, 8.0])
    values = torch.tensor([-6.0, 1.0, 1.5, 2.0, 3.0, 8.0, 15.0])
    rank = training_rank(values, ordered)
    torch.testing.assert_close(rank, torch.tensor([-1.0, 0.0, 0.125, 0.25, 0.625, 1.0, 2.0]))
    for q in (0.1, 0.5, 0.6, 0.9):
        above = torch.linspace(0, 10, 41)
        assert torch.equal(training_rank(above, ordered) > q, above > ordered.quantile(q)), q


def test_sizes_are_the_papers() -> None:
    full = ["model.detector.width=1000"]
    plain = detector("autoencoder_beggel", *full, shape=(1, 28, 28))
    aae = adversarial("aae", *full, "model.detector.critic_width=1000")
    hidden = 784 * 1000 + 1000 + 1000 * 1000 + 1000
    count = [sum(p.numel() for p in network.parameters()) for network in (plain.encoder, plain.decoder)]
    assert count == [hidden + 32 * 1000 + 32, 32 * 1000 + 1000 + 1000 * 1000 + 1000 + 784 * 1000 + 784]
    assert sum(p.numel() for p in aae.critic.parameters()) == 2 * 1000 + 1000 + 1000 * 1000 + 1000 + 1000 + 1
    assert sum(isinstance(layer, torch.nn.BatchNorm1d) for layer in aae.encoder) == 2
    assert not any(isinstance(layer, torch.nn.BatchNorm1d) for layer in (*plain.encoder, *aae.decoder, *aae.critic))


# Refinement ---------------------------------------------------------------------------------------------------------


def refinement(**buffers: Tensor) -> IterativeTrainingSetRefinement:
    made = detector("itsr", "model.detector.w_anomaly=-0.5", "model.detector.adversarial_cap=0.6")
    assert isinstance(made, IterativeTrainingSetRefinement)
    for name, value in buffers.items():
        made.set_fitted(name, value)
    return made


def test_negative_weights_turn_the_losses_of_likely_anomalies_round() -> None:
    made, x = refinement(repelled_index=torch.tensor([2, 5])), images()
    w = torch.tensor([1, 1, -0.5, 1, 1, -0.5, 1, 1])
    made.randomness.restart(3, made.device)
    plays = made.plays(batch())
    first, second, third = (next(plays) for _ in range(3))
    error = ((x - made.reconstruct(x)) ** 2).mean(dim=(1, 2, 3))
    torch.testing.assert_close(first["autoencoder"], (w * error).mean())
    d = torch.sigmoid(made.critic(made.encoder(x))).squeeze(1)

    def capped(term: Tensor) -> Tensor:
        return torch.where(w < 0, term.clamp(max=0.6), term)

    torch.testing.assert_close(third["encoder"], (w * capped(-d.log())).mean())
    prior = torch.sigmoid(made.critic(torch.randn(8, 2, generator=torch.Generator().manual_seed(3))))
    torch.testing.assert_close(second["critic"], -prior.log().mean() + (w * capped(-(1 - d).log())).mean())


def test_rejected_images_are_left_out_of_the_batch_and_the_worst_come_back() -> None:
    made = refinement(
        rejected_in=torch.tensor([0, 1, 0, 2, 2, 0]), repelled=torch.tensor([False, True, False, False, True, False])
    )
    assert made.train_indices(1).tolist() == [0, 1, 2, 4, 5]
    made.rounds = 2
    sets = {name: positions.tolist() for name, positions in made.rejected_images().items()}
    assert sets == {"round 1": [1], "round 2": [1, 3, 4], "repelled": [1, 4]}


def test_the_candidates_with_the_largest_errors_come_back() -> None:
    made = refinement(rejected_in=torch.tensor([1, 0, 1, 2, 2, 1]), repelled=torch.zeros(6, dtype=torch.bool)).eval()
    x = images(6)
    errors = squared_error(x, made.reconstruct(x))
    candidates = torch.tensor([0, 2, 3, 4, 5])
    made.retrain_quantile = 0.6
    made._images = Images(Batch(x, torch.arange(6) + 100))  # type: ignore[assignment]
    made._repel()
    worst = candidates[errors[candidates].argsort(descending=True)[:2]].sort().values
    assert made.repelled.nonzero().squeeze(1).tolist() == worst.tolist()
    assert made.repelled_index.tolist() == (worst + 100).tolist()


@torch.no_grad()
@pytest.mark.parametrize("svm_sees", ["in_use", "all"])
def test_a_round_takes_the_share_nu_of_the_images_that_its_svm_sees(svm_sees: str) -> None:
    made, x = refinement().eval(), torch.randn(200, 2)
    made.encoder = torch.nn.Sequential()  # the codes are the images
    made.nu, made.svm_sees = 0.1, svm_sees
    made._images = Images(Batch(x, torch.arange(200)))  # type: ignore[assignment]
    made._reject(1)
    first = made.rejected_in.nonzero().squeeze(1).tolist()
    assert 15 <= len(first) <= 25
    made._reject(2)
    assert (made.rejected_in == 1).nonzero().squeeze(1).tolist() == first, "the round is the one that found it first"
    again = int((made.rejected_in == 2).sum())
    assert again == 0 if svm_sees == "all" else 13 <= again <= 23, "the same encoder and images, the same outliers"


class Images(NamedTuple):
    """The training images of a detector that no trainer fits."""

    all: Batch

    def everything(self) -> Batch:
        return self.all


def test_rounds_are_at_the_start_of_detection_and_evenly_on(monkeypatch: pytest.MonkeyPatch) -> None:
    made, happened = refinement(), []
    made.rounds = 3
    made.plan({"pretrain": 4, "detect": 6, "retrain": 5})
    monkeypatch.setattr(made, "_reject", lambda number: happened.append((now, f"round {number}")))
    monkeypatch.setattr(made, "_repel", lambda: happened.append((now, "repel")))

    def begin(epoch: int) -> None:
        if made.stages.enter(epoch):
            made.before_stage(made.stage)
        made.before_epoch(epoch)

    for now in range(1, 16):
        begin(now)
    assert happened == [(5, "round 1"), (7, "round 2"), (9, "round 3"), (11, "repel")]
    happened.clear()
    made.w_anomaly = 0.0
    for now in range(1, 16):
        begin(now)
    assert (11, "repel") not in happened, "a weight of 0 leaves them out, in no batch"


@pytest.fixture(scope="module")
def refined(tmp_path_factory: pytest.TempPathFactory) -> tuple[DictConfig, dict[str, Any], Weights]:
    cfg, weights = tiny(tmp_path_factory.mktemp("refined") / "runs", "itsr"), Weights()
    result = run(cfg, [weights])
    assert result is not None
    return cfg, result, weights


def test_a_run_records_what_was_rejected_and_how_right_it_was(
    refined: tuple[DictConfig, dict[str, Any], Weights],
) -> None:
    cfg, result, _ = refined
    with np.load(config.job(cfg).out / "rejected_images.npz") as file:
        sets = {name: file[name] for name in file}
    assert [row["name"] for row in result["rejected_images"]] == ["round 1", "round 2", "repelled"]
    train = result["partition"]["train"]
    kept = torch.load(config.job(cfg).out / "last.ckpt", weights_only=True)["state_dict"]
    assert kept["training_errors"].shape == (train,), "thresholds are of all training images"
    assert 0.05 * train < len(sets["round 1"]) < 0.2 * train, "about nu of the images in use"
    assert set(sets["round 1"]) < set(sets["round 2"]) and set(sets["repelled"]) < set(sets["round 2"])
    labels = config.load_images(cfg).labels
    for row in result["rejected_images"]:
        anomalous = (labels[sets[row["name"]]] == 7).sum()
        assert row["images"] == len(sets[row["name"]])
        assert row["precision"] == pytest.approx(anomalous / row["images"])
        assert row["recall"] == pytest.approx(anomalous / result["partition"]["train_anomalous"])


def test_it_is_tested_on_seen_and_unseen_kinds_by_the_papers_rule(
    refined: tuple[DictConfig, dict[str, Any], Weights],
) -> None:
    cfg, result, _ = refined
    written = scores(cfg)
    normal, seen = written["truth"] == 0, written["label"] == 7
    rule = written["score"] > 0.9
    for name, anomalies in (("seen", seen), ("unseen", ~normal & ~seen)):
        expected = (rule[anomalies].mean() + (~rule[normal]).mean()) / 2
        assert result["by_kind"][name]["balanced_accuracy"] == pytest.approx(expected)
    assert set(result["by_kind"]["auroc"]) == {str(digit) for digit in range(1, 10)}


@pytest.mark.parametrize(
    "model", ["itsr", *(pytest.param(m, marks=pytest.mark.slow) for m in ("aae", "autoencoder_beggel"))]
)
def test_stopped_anywhere_it_resumes_to_the_same_bits(
    model: str, tmp_path: Path, refined: tuple[DictConfig, dict[str, Any], Weights]
) -> None:
    overrides = [] if model == "itsr" else ["model.budget.epochs=4"]
    if model == "itsr":
        straight, undisturbed, whole = refined
    else:
        straight, whole = tiny(tmp_path / "straight", model, *overrides), Weights()
        undisturbed = run(straight, [whole])  # type: ignore[assignment]
    broken, weights = tiny(tmp_path / "broken", model, *overrides), Weights()
    steps = undisturbed["steps"] // undisturbed["epochs"]
    # For itsr: before the first round, inside the first and the second round, and in retraining.
    for after in (steps + 1, steps + 2, 2 * steps + 1, 2 * steps) if model == "itsr" else (steps + 1, 2):
        with pytest.raises(RuntimeError, match="stopped"):
            run(broken, [Stop(after)])
    resumed = run(broken, [weights])
    assert resumed is not None
    assert comparable(resumed["history"]) == comparable(undisturbed["history"])
    for name, tensor in whole.weights.items():
        assert torch.equal(tensor, weights.weights[name]), name
    for name, array in scores(straight).items():
        assert np.array_equal(array, scores(broken)[name]), name
    assert resumed["rejected_images"] == undisturbed["rejected_images"] and resumed["by_kind"] == undisturbed["by_kind"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.detector.rounds=0"], "rounds=0: give a whole number"),
        (["model.detector.rounds=2.5"], "rounds=2.5: give a whole number"),
        (["model.detector.adversarial_cap=0"], "adversarial_cap=0: give a number above 0"),
        (["model.budget.stages=5"], "give each stage its epochs"),
        (["model.detector.nu=1"], "nu=1: choose a share"),
        (["model.detector.retrain_quantile=80"], "retrain_quantile=80: choose a number from 0 to 1"),
        (["model.detector.svm_sees=some"], "svm_sees=some: choose in_use or all"),
        (["model.detector.w_anomaly=0.1"], "w_anomaly=0.1: .* choose 0 or less"),
        (["model.budget.stages.detect=15"], "whole epochs for each of the 10 rounds, not 50 and 15"),
        (["+model.budget.stages.more=1"], "are pretrain, detect, retrain, in this order"),
        (["model.budget.stages.retrain=-1"], "stages.retrain=-1: give a whole number from 0"),
    ],
)
def test_a_wrong_option_is_named_with_the_right_ones(overrides: list[str], message: str) -> None:
    with pytest.raises(Exception, match=message):
        detector("itsr", *overrides)


def test_one_reconstruction_for_all_images_is_a_result_that_says_so(tmp_path: Path) -> None:
    options = ["model.optimizer.lr=5", "model.budget.epochs=20", "model.batch_size=16", "split.contamination.rate=0"]
    cfg = tiny(tmp_path, "autoencoder_beggel", *options)
    result = run(cfg)
    assert result is not None
    detector = load_run(config.job(cfg).out).detector
    with torch.no_grad():
        rebuilt = detector.reconstruct(torch.rand(20, *detector.image_shape))
    assert rebuilt.std(0).max() < 1e-6, "it has not collapsed: a larger learning rate is needed here"
    assert result["learned"]["explained_variance"] < LEARNED and result["learned"]["distinct_scores"] > 1


@pytest.mark.parametrize("model", ["itsr", "aae", "autoencoder_beggel"])
def test_a_finished_run_scores_and_decides_on_new_images(
    model: str, tmp_path: Path, refined: tuple[DictConfig, dict[str, Any], Weights]
) -> None:
    cfg = refined[0] if model == "itsr" else tiny(tmp_path / "runs", model, "model.budget.epochs=2")
    run(cfg)
    written = scores(cfg)
    pixels = config.load_images(cfg).pixels[written["index"]]
    loaded = load_run(config.job(cfg).out)
    np.testing.assert_allclose(loaded.score(pixels), written["score"], rtol=1e-5, atol=1e-6)
    if model != "autoencoder_beggel":
        assert np.array_equal(loaded.decide(pixels), written["score"] > 0.9)
