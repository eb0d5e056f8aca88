"""Lightning's own doors: a Trainer with nothing else does what a run does, for every method and for plain loaders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import EarlyStopping
from test_methods import MODELS, shrunk, written
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from anomaly_lab import config, figures
from anomaly_lab.batches import Batch
from anomaly_lab.build import make_data, make_detector
from anomaly_lab.detector import Detector
from anomaly_lab.networks import PerceptualFeatures
from anomaly_lab.players import Learning
from anomaly_lab.run import run

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # Lightning's advice on workers, loggers and batch sizes
    pytest.mark.skipif(torch.cuda.is_available(), reason="to the bit on a CPU only, and a bare Trainer takes the GPU"),
]


def short(model: str, folder: Path) -> Any:
    """A configuration of two epochs and more, its training set contaminated, so that ITSR has what to reject."""
    stages = config.compose([f"model={model}"]).model.budget.get("stages")
    given = ["model.budget.epoch_steps=3"]
    if stages:
        given += ["model.budget.stages={" + ",".join(f"{name}: 2" for name in stages) + "}"]
        given += ["model.detector.rounds=2"] * ("rounds" in config.compose([f"model={model}"]).model.detector)
    else:
        given += ["model.budget.epochs=2", "model.budget.steps=null"]
    where = [f"runs={folder / 'runs'}", f"data_dir={folder}", "logger=none", "trainer.progress=false"]
    return config.compose([*shrunk(model), *given, *where, "split.contamination.rate=0.05", "split.max_test=20"])


QUICK = ("autoencoder", "ganomaly", "itsr", "knn")
"""Of each kind one: a single player, two against each other, stages, no gradients; frozen features take long."""


def kinds() -> list[str]:
    """One model of each class of detector, and one more where others of it see frozen features: Lightning's doors know
    no more of it."""
    found: dict[tuple[str, bool], str] = {}
    for model in MODELS:
        detector = written(model).detector
        found.setdefault((detector["_target_"], detector.get("features") is not None), model)
    return list(found.values())


@pytest.mark.drawn  # so that each method's figures are
@pytest.mark.parametrize("model", [pytest.param(m, marks=[pytest.mark.slow] * (m not in QUICK)) for m in kinds()])
def test_a_bare_trainer_gives_the_scores_of_a_run_to_the_bit(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where a bare Trainer keeps its own things
    monkeypatch.setattr(figures, "save", lambda *_: None)  # they are made; what files hold is no question here
    cfg = short(model, tmp_path)
    result = run(cfg)
    assert result is not None
    with np.load(config.job(cfg).out / "scores.npz") as file:
        expected, held_out = file["score"], file["val_score"]

    data = make_data(config.job(cfg))
    detector, trainer = make_detector(cfg, data.image_shape), Trainer(max_epochs=result["epochs"])
    trainer.fit(detector, data)
    [*_, tested] = trainer.test(detector, data)
    predicted = trainer.predict(detector, data)
    assert predicted is not None
    # predict keeps the data set's order, in which a matrix product may round a last bit otherwise.
    np.testing.assert_allclose(torch.cat(predicted).numpy(), expected, rtol=1e-5)
    at = detector.scored.test.places(data.partition.test)
    assert np.array_equal(detector.scored.test.score[at], expected) and np.array_equal(
        detector.scored.val.score, held_out
    )
    [auroc] = [value for name, value in tested.items() if name.startswith("auroc")]
    assert auroc == pytest.approx(result["metrics"]["auroc"], abs=1e-6)
    rows = [
        [{k: v for k, v in row.items() if k != "seconds"} for row in h]
        for h in (detector.course.history, result["history"])
    ]
    assert rows[0] == rows[1]

    paths = [config.job(cfg).out / "last.ckpt"]
    if result["epochs"]:  # Lightning's own writes one an epoch
        paths.append(trainer.checkpoint_callback.best_model_path)  # type: ignore[union-attr]
    for path in paths:
        given = torch.load(path, weights_only=True)["hyper_parameters"]
        lacking = {name: value for name, value in detector._given.items() if name not in given}
        assert set(lacking) <= {"features"}, "all but what is no plain value"
        loaded = type(detector).load_from_checkpoint(path, weights_only=True, **lacking)
        if lacking:  # frozen features are in no checkpoint, and random ones would be drawn anew
            for name, module in detector.named_modules(remove_duplicate=False):
                if isinstance(module, PerceptualFeatures):
                    loaded.set_submodule(name, module)
        again = Trainer(logger=False).predict(loaded, data)
        assert again is not None and torch.equal(torch.cat(again), torch.cat(predicted))


class Everything(Detector):
    """Hooks, further batches, two players, a score by search: what plain loaders and bare trainers must serve."""

    STAGES = ("first", "second")

    def __init__(self, image_shape: Sequence[int]) -> None:
        super().__init__(image_shape)
        self.net, self.frozen = nn.Linear(64, 64), nn.Linear(64, 64).requires_grad_(False)
        sgd = lambda parameters: torch.optim.SGD(parameters, lr=0.1)  # noqa: E731
        halved = lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)  # noqa: E731
        self.learning = Learning(sgd, {"early": halved, "late": halved})
        self.called: list[str] = []
        self.rates: list[list[float]] = []

    def players(self) -> Mapping[str, Sequence[nn.Module]]:
        return {"early": [self.net, self.frozen], "late": [self.net]}

    def before_fit(self, images: Tensor) -> None:
        self.called.append(f"before_fit {len(images)}")
        self.set_fitted("centre", images.mean(0))

    def before_stage(self, stage: str) -> None:
        self.called.append(f"before_stage {stage}")

    def before_epoch(self, epoch: int) -> None:
        assert not self.training
        self.called.append(f"before_epoch {epoch} {self.stage} {self.stages.epoch}")
        self.rates.append([optimizer.param_groups[0]["lr"] for optimizer in self.optimizers()])

    def plays(self, batch: Batch) -> Iterator[Mapping[str, Tensor]]:
        x = torch.cat([batch.x, self.next_batch().x]).flatten(1)
        yield {"early" if self.stage == "first" else "late": (self.frozen(self.net(x)) - x).square().mean()}

    def after_fit(self, images: Tensor) -> None:
        self.called.append(f"after_fit {len(images)}")

    @property
    def scored_after_fit(self) -> bool:
        return False

    def score(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x, requires_grad=True)
        with torch.enable_grad():
            loss = (self.net((x + z).flatten(1)) - x.flatten(1)).square().sum()
        (gradient,) = torch.autograd.grad(loss, z)
        return gradient.flatten(1).norm(dim=1) + (x - self.get_buffer("centre")).flatten(1).norm(dim=1)


def everything() -> Everything:
    made = Everything((1, 8, 8))
    made.plan({"first": 2, "second": 3})
    made.randomness.follow(0)
    return made


IMAGES = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("pairs", [False, True])
def test_a_plain_loader_trains_validates_tests_and_predicts(
    pairs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    images = TensorDataset(IMAGES, torch.arange(40)) if pairs else IMAGES  # type: ignore[var-annotated]
    loader: Any = DataLoader(images, batch_size=10)  # type: ignore[arg-type]
    detector, trainer = everything(), Trainer(max_epochs=5)
    trainer.fit(detector, loader, loader)
    assert detector.called == [
        "before_fit 40",
        *("before_stage first", "before_epoch 1 first 1", "before_epoch 2 first 2"),
        *("before_stage second", "before_epoch 3 second 1", "before_epoch 4 second 2", "before_epoch 5 second 3"),
        "after_fit 40",
    ]
    assert int(detector.steps_done) == 20 and int(detector.images_seen) == 200
    assert all(row["val_score"] > 0 and row["seconds"] > 0 for row in detector.course.history)
    predicted: Any = trainer.predict(detector, loader)
    assert torch.cat(predicted).shape == (40,)
    assert trainer.test(detector, loader) == [{"mean_score": pytest.approx(torch.cat(predicted).mean().item())}]
    loaded = Everything.load_from_checkpoint(trainer.checkpoint_callback.best_model_path)  # type: ignore[union-attr]
    again: Any = trainer.predict(loaded, loader)
    assert torch.equal(torch.cat(again), torch.cat(predicted))


def test_a_schedule_counts_the_epochs_of_the_stages_its_player_moves_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    detector = everything()
    Trainer(max_epochs=5, logger=False).fit(detector, DataLoader(IMAGES, batch_size=10))  # type: ignore[arg-type]
    np.testing.assert_allclose(detector.rates, [[0.1, 0.1], [0.05, 0.1], [0.025, 0.1], [0.025, 0.05], [0.025, 0.025]])


def test_a_frozen_parameter_of_a_player_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    detector = everything()
    frozen, moved = detector.frozen.weight.clone(), detector.net.weight.clone()
    Trainer(max_epochs=1, logger=False).fit(detector, DataLoader(IMAGES, batch_size=10))  # type: ignore[arg-type]
    assert torch.equal(detector.frozen.weight, frozen) and not torch.equal(detector.net.weight, moved)


def test_a_trainer_that_stops_early_fits_to_the_end_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    detector, loader = everything(), DataLoader(IMAGES, batch_size=10)  # type: ignore[arg-type]
    stop = EarlyStopping("val_score", stopping_threshold=1e9, patience=1)  # at once: every score is below
    Trainer(max_epochs=5, callbacks=[stop], logger=False).fit(detector, loader, loader)
    assert detector.called[-1] == "after_fit 40" and len(detector.course.history) < 5


def test_a_second_fit_is_of_its_own_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cfg, another = short("knn", tmp_path), short("knn", tmp_path)
    another.normal_class = 8
    one, other = (make_data(config.job(each)) for each in (cfg, another))
    again, fresh = (make_detector(cfg, one.image_shape) for _ in range(2))
    for detector, data in ((again, one), (again, other), (fresh, other)):
        Trainer(max_epochs=0).fit(detector, data)
    assert torch.equal(again.bank, fresh.bank)


def test_stages_whose_length_nobody_gave_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    detector = Everything((1, 8, 8))
    with pytest.raises(ValueError, match=r"trains in stages: give the epochs of first, second with plan\(\)"):
        Trainer(max_epochs=1, logger=False).fit(detector, DataLoader(IMAGES, batch_size=10))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("items", "shown"),
    [
        (torch.zeros(4, 8, 8), r"torch\.float32 \(2, 8, 8\)"),
        (torch.zeros(4, 1, 8, 8, dtype=torch.uint8), r"torch\.uint8 \(2, 1, 8, 8\)"),
        ([{"image": torch.zeros(1, 8, 8)}] * 4, "dict"),
    ],
)
def test_what_is_no_batch_of_images_gets_one_line(
    items: Any, shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"must give images float \(B,C,H,W\).*not {shown}"):
        Trainer(max_epochs=1, logger=False).fit(everything(), DataLoader(items, batch_size=2))


def test_a_method_that_leaves_images_out_says_that_a_plain_loader_cannot_tell_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    detector = make_detector(short("itsr", tmp_path), (1, 28, 28))
    loader = DataLoader(torch.rand(20, 1, 28, 28), batch_size=10)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"by their position .* train it on anomaly_lab\.data\.OneClassData"):
        Trainer(max_epochs=1, logger=False).fit(detector, loader)
    assert int(detector.steps_done) == 0, "before anything is trained"
