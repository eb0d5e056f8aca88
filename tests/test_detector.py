"""The contract's machinery, on methods made for the purpose."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Trainer
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from anomaly_lab import datasets, splits
from anomaly_lab.course import Scored
from anomaly_lab.data import OneClassData, Prepare
from anomaly_lab.detector import Batch, Detector
from anomaly_lab.metrics import evaluate
from anomaly_lab.players import Learning


class Gaussian(Detector):
    """No gradients at all: distance to the mean of the training images."""

    def __init__(self, image_shape: Sequence[int]) -> None:
        super().__init__(image_shape)

    def after_fit(self, images: Tensor) -> None:
        self.set_fitted("mean", images.mean(0))

    def decide(self, x: Tensor) -> Tensor:
        return self.score(x) > 0.123

    def score(self, x: Tensor) -> Tensor:
        return (x - self.get_buffer("mean")).abs().flatten(1).mean(1)


class Searching(Detector):
    """A score by optimisation at test time, as AnoGAN's: the best code of every image, found by gradient steps."""

    STEPS = 5

    def __init__(self, image_shape: Sequence[int]) -> None:
        super().__init__(image_shape)
        self.decoder = nn.Linear(4, 1024)
        self.passes = 0

    def players(self) -> Mapping[str, Sequence[nn.Module]]:
        return {"decoder": [self.decoder]}

    def plays(self, batch: Batch) -> Iterator[Mapping[str, Tensor]]:
        yield {"decoder": self.errors(torch.zeros(len(batch.x), 4), batch.x).mean()}

    def errors(self, z: Tensor, x: Tensor) -> Tensor:
        self.passes += 1
        return (self.decoder(z) - x.flatten(1)).square().mean(1)

    def score(self, x: Tensor) -> Tensor:
        z = x.new_zeros(len(x), 4, requires_grad=True)
        search = torch.optim.SGD([z], lr=1.0)
        for _ in range(self.STEPS):
            with torch.enable_grad():
                loss = self.errors(z, x).sum()  # a sum: no image's gradient depends on how many others there are
            (z.grad,) = torch.autograd.grad(loss, [z])
            search.step()
        return self.errors(z, x)


class Noisy(Detector):
    """Two players, each with an optimiser of its own, noise in the loss, and every second image left out."""

    def __init__(self, image_shape: Sequence[int], **options: Any) -> None:
        super().__init__(image_shape)
        self.learning = Learning(**options)
        self.a, self.b = nn.Linear(1024, 4), nn.Linear(4, 1024)
        self.seen: list[int] = []
        self.rates: list[list[float]] = []

    def players(self) -> Mapping[str, Sequence[nn.Module]]:
        return {"first": [self.a, self.b], "second": [self.b]}

    def plays(self, batch: Batch) -> Iterator[Mapping[str, Tensor]]:
        self.seen += batch.index.tolist()
        self.rates.append([optimizer.param_groups[0]["lr"] for optimizer in self.optimizers()])
        x = batch.x.flatten(1)
        noise = torch.randn(x.shape, generator=self.noise)
        yield {"first": (self.b(self.a(x + 0.1 * noise)) - x).square().mean()}
        yield {"second": (self.b(self.a(x)) - x).abs().mean()}

    def train_indices(self, epoch: int) -> Tensor:
        return torch.arange((epoch - 1) % 2, 100, 2)

    def score(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        return (self.b(self.a(flat)) - flat).abs().mean(1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> OneClassData:
    digits = datasets.Digits(data_dir=tmp_path_factory.mktemp("data"), name="digits").load()
    return OneClassData(digits, splits.Pooled(), "3", Prepare(), batch_size=16)


def trainer(folder: Path, epochs: int) -> Trainer:
    return Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )


def sgd(rate: float) -> Any:
    return lambda parameters: torch.optim.SGD(parameters, lr=rate)


def test_a_method_without_gradients_fits_the_contract(data: OneClassData, tmp_path: Path) -> None:
    detector, run = Gaussian(data.image_shape), trainer(tmp_path, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.fit(detector, data)
        rows = run.test(detector, data, verbose=False)
    measured = {name: value for row in rows for name, value in row.items()}
    at = detector.scored.test.places(data.partition.test)
    score = detector.scored.test.score[at]
    assert np.array_equal(detector.scored.test.truth[at], data.partition.test_truth)
    assert measured["auroc"] == pytest.approx(roc_auc_score(data.partition.test_truth, score), abs=1e-6)

    decided = detector.scored.test.decided
    assert decided is not None
    decided = decided[at]
    assert np.array_equal(decided, score > np.float32(0.123))
    by_rule = evaluate(score, data.partition.test_truth, threshold=0.0, decided=decided)
    assert by_rule == evaluate(score, data.partition.test_truth, threshold=0.123)

    checkpoint: dict[str, Any] = {"state_dict": detector.state_dict()}
    detector.on_save_checkpoint(checkpoint)
    other = Gaussian(data.image_shape)
    other.on_load_checkpoint(checkpoint)  # makes room for the buffer whose size only fitting knew
    other.load_state_dict(checkpoint["state_dict"])
    x = data.prepared("test")
    assert torch.equal(other.score(x), detector.score(x))


def test_a_search_for_every_image_at_test_time_runs_in_batches(data: OneClassData, tmp_path: Path) -> None:
    detector, run = Searching(data.image_shape), trainer(tmp_path, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.test(detector, data, verbose=False)
    assert detector.passes == (Searching.STEPS + 1) * sum(len(loader) for loader in data.test_dataloader())
    x, score = data.prepared("test"), torch.from_numpy(detector.scored.test.score)
    score = score[detector.scored.test.places(data.partition.test)]
    with torch.no_grad():
        start = detector.errors(torch.zeros(len(x), 4), x)
        alone = torch.cat([detector.score(one[None]) for one in x[:5]])
    assert (score < start).all(), "the search got nearer to every image"
    torch.testing.assert_close(score[:5], alone, rtol=1e-5, atol=1e-7)
    assert all(p.grad is None for p in detector.parameters())


def test_players_have_their_own_optimisers_and_schedules(data: OneClassData, tmp_path: Path) -> None:
    detector = Noisy(
        data.image_shape,
        optimizer={"first": sgd(0.01), "second": sgd(0.001)},
        scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1),
    )
    detector.randomness.restart(1, detector.device)
    trainer(tmp_path, 2).fit(detector, data)
    np.testing.assert_allclose(detector.rates[0], [0.01, 0.001])
    np.testing.assert_allclose(detector.rates[-1], [0.001, 0.0001])
    assert int(detector.epochs_done) == 2 and int(detector.steps_done) == len(detector.rates)
    assert [set(row) for row in detector.course.history] == [
        {"epoch", "loss_first", "loss_second", "seconds", "val_score"}
    ] * 2


class Stranger(Noisy):
    """Moves whom players() does not name."""

    def plays(self, batch: Batch) -> Iterator[Mapping[str, Tensor]]:
        yield {"third": self.a(batch.x.flatten(1)).square().mean()}


class Returning(Noisy):
    """Returns its only move."""

    def plays(self, batch: Batch) -> Any:
        return {"first": self.a(batch.x.flatten(1)).square().mean()}


class Orphan(Noisy):
    """Has a network that belongs to no player."""

    def players(self) -> Mapping[str, Sequence[nn.Module]]:
        return {"first": [self.a]}

    def plays(self, batch: Batch) -> Iterator[Mapping[str, Tensor]]:
        yield {"first": self.a(batch.x.flatten(1)).square().mean()}


def unfinished(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("kind", "options", "error", "message"),
    [
        (Stranger, {}, AssertionError, r"plays\(\) moves third; players\(\) names first, second"),
        (Returning, {}, AssertionError, "write yield where it returns one"),
        (Noisy, {"scheduler": unfinished}, ValueError, r"model\.scheduler makes no schedule \(.*step_size"),
    ],
)
def test_a_game_that_cannot_be_played_is_refused_with_its_reason(
    data: OneClassData,
    tmp_path: Path,
    kind: type[Noisy],
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        trainer(tmp_path, 1).fit(kind(data.image_shape, optimizer=sgd(0.01), **options), data)


def test_a_network_of_no_player_is_named_when_training_begins(data: OneClassData, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"b\.weight belongs to no player, so it never learns: give its network to a"):
        trainer(tmp_path, 1).fit(Orphan(data.image_shape, optimizer=sgd(0.01)), data)


def test_images_can_be_left_out_of_training(data: OneClassData, tmp_path: Path) -> None:
    detector = Noisy(data.image_shape, optimizer=sgd(0.01))
    trainer(tmp_path, 1).fit(detector, data)
    even = set(data.partition.train[torch.arange(0, 100, 2).numpy()].tolist())
    assert set(detector.seen) <= even and len(detector.seen) == 48


def test_noise_continues_from_a_checkpoint(data: OneClassData, tmp_path: Path) -> None:
    def fit(epochs: int, checkpoint: Path | None = None) -> tuple[Noisy, Trainer]:
        torch.manual_seed(0)
        detector, run = Noisy(data.image_shape, optimizer=sgd(0.05)), trainer(tmp_path, epochs)
        detector.randomness.restart(7, detector.device)
        run.fit(detector, data, ckpt_path=checkpoint, weights_only=True)
        return detector, run

    straight, _ = fit(2)
    _, first = fit(1)
    first.save_checkpoint(tmp_path / "one.ckpt", weights_only=False)
    resumed, _ = fit(2, tmp_path / "one.ckpt")
    assert torch.equal(resumed.noise.get_state(), straight.noise.get_state())
    for a, b in zip(resumed.parameters(), straight.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_players_gradient_is_clipped_to_its_norm(data: OneClassData, tmp_path: Path) -> None:
    detector = Noisy(data.image_shape, optimizer=sgd(1.0), clip=1e-3)
    before = torch.cat([p.detach().flatten().clone() for p in detector.parameters()])
    single = OneClassData(data.images, splits.Pooled(), "3", Prepare(), batch_size=200)
    trainer(tmp_path, 1).fit(detector, single)
    after = torch.cat([p.detach().flatten() for p in detector.parameters()])
    moved = (after - before).norm().item()
    assert 0.5e-3 < moved <= 2e-3 * (1 + 1e-5)  # two plays of one step, each of norm 1e-3


def test_large_raw_scores_are_not_pushed_through_a_sigmoid() -> None:
    metric, place = Scored(), torch.arange(5)
    score, truth = torch.tensor([50.0, 60.0, 70.0, 80.0, 90.0]), torch.tensor([0, 1, 0, 1, 1])
    metric.update(score[:2], place[:2], truth[:2])
    metric.update(score[2:], place[2:], truth[2:])
    assert metric.compute()["auroc"] == pytest.approx(roc_auc_score(truth, score), abs=1e-12)
    metric.reset()
    metric.update(torch.tensor([float("nan"), 1.0]), place[:2], torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="image 0"):
        metric.compute()
