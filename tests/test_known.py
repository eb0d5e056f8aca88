"""Known anomalies (`split.known`): for methods that ask for them and for no other, and never out of the test."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from conftest import Command
from torch import Tensor, nn

from anomaly_lab import config, record
from anomaly_lab.batches import Batch
from anomaly_lab.build import make_data
from anomaly_lab.data import OneClassData
from anomaly_lab.detector import Detector
from anomaly_lab.run import run

KNOWN = ["split.known.rate=0.1", "split.known.classes=[7]"]


class Told(Detector):
    """Deep SAD's loss (Ruff et al. 2020, equation 7) on a linear code: d for unlabelled images, 1/d for known ones."""

    SEMI_SUPERVISED: ClassVar[bool] = True

    def __init__(self, image_shape: Sequence[int]) -> None:
        super().__init__(image_shape)
        self.code = nn.Linear(int(np.prod(image_shape)), 4, bias=False)

    def players(self) -> Mapping[str, Sequence[nn.Module]]:
        return {"code": [self.code]}

    def plays(self, batch: Batch) -> Iterator[Mapping[str, Tensor]]:
        assert batch.known is not None and batch.truth is None
        distance = self.score(batch.x) + 1e-3
        yield {"code": torch.where(batch.known, 1 / distance, distance).mean()}

    def score(self, x: Tensor) -> Tensor:
        return (self.code(x.flatten(1)) - 1).square().sum(1)


LEARNS = ["model.optimizer={_target_:torch.optim.Adam,_partial_:true,lr:0.01}", "model.budget.epochs=4"]
TOLD = [
    "model=mean_image",
    "model.detector._target_=test_known.Told",
    "~model.detector.norm",
    "model.input.size=8",
    *LEARNS,
]


def made(data: Path, *overrides: str) -> OneClassData:
    return make_data(config.job(config.compose([f"data_dir={data}", "normal_class=1", *overrides])))


@pytest.mark.parametrize("contamination", ["0", "0.1"])
def test_who_asks_is_told_and_everything_else_stays(data: Path, contamination: str) -> None:
    plain = made(data, "model=knn", f"split.contamination.rate={contamination}")
    told = made(data, *TOLD, *KNOWN, f"split.contamination.rate={contamination}")
    ours, theirs = told.partition, plain.partition
    for part in ("val", "test"):
        assert np.array_equal(getattr(ours, part), getattr(theirs, part))
    assert set(ours.train) - set(theirs.train) == set(ours.known) and set(theirs.train) < set(ours.train)
    assert (told.images.labels[ours.known] == 7).all()
    assert len(ours.known) == round(0.1 * len(theirs.train) / 0.9)
    assert ours.fingerprint != theirs.fingerprint

    everything = told.train_dataloader().everything()
    assert everything.truth is None and everything.known is not None and everything.known.dtype == torch.bool
    assert set(everything.index[everything.known].tolist()) == set(ours.known), "and no contaminating one"
    batch = told.train_dataloader().batch(torch.tensor([5, 40]))
    assert batch.known is not None and torch.equal(batch.known, everything.known[[5, 40]])
    assert plain.train_dataloader().everything().known is None, "a one-class method finds nothing"
    assert told.fitting(torch.device("cpu")).train_dataloader().everything().known is not None
    assert next(iter(told.loader("test"))).known is None


def test_without_a_rate_nobody_is_known_and_the_run_is_the_one_it_was(data: Path) -> None:
    told, plain = made(data, *TOLD), made(data, "model=knn")
    assert np.array_equal(told.partition.train, plain.partition.train)
    assert told.partition.fingerprint == plain.partition.fingerprint
    known = told.train_dataloader().everything().known
    assert known is not None and not known.any()
    cfg = config.compose(["model=shared_ae", f"data_dir={data}"])
    assert not any(".known." in key for key in config.settings(cfg)) and config.changed(cfg) == {}


def test_they_make_another_run_named_by_rising_indices(data: Path) -> None:
    def job(*overrides: str) -> config.Job:
        return config.job(config.compose([*TOLD, f"data_dir={data}", *overrides]))

    known = job(*KNOWN).identity["changed"]
    assert known["split.known.rate"] == 0.1 and known["split.known.classes"] == [7]
    assert job("split.known.rate=.1", "split.known.classes=['7']").out == job(*KNOWN).out != job().out
    assert job(*KNOWN).settings["split.known.rate"] == 0.1


@pytest.mark.parametrize("model", ["deep_svdd", "knn", "supervised_ceiling"])
def test_who_does_not_ask_is_refused_in_a_line(model: str, lab: Command) -> None:
    said = lab(f"model={model} split.known.rate=0.05 trainer.progress=false")
    assert said.code == 2 and said.err.count("\n") == 1
    assert re.search(r"split\.known\.rate=0\.05: \w+ learns from no known .*: set split\.known\.rate=0", said.err)
    assert not list(Path("runs").glob("*")), "a typing mistake leaves nothing in the folder of runs"


def test_a_dry_run_tries_the_split(lab: Command) -> None:
    said = lab("--dry-run -m model=knn,pca split.known.rate=0,.05 split.contamination.rate=0,.8,.95")
    assert said.code == 2 and said.out.count("learns from no known anomalies") == 6
    assert said.out.count("impossible") >= 7 and said.out.count("anomalies, digits has") == 2, "of rate .95"
    assert said.out.splitlines()[-2].startswith("12 runs: 0 done, 4 to do, 8 impossible")
    assert said.out.splitlines()[-1].startswith("note: split.contamination.rate=0.8: most of the training images (80%)")
    assert (
        "most of the training images (80%) are anomalies"
        in lab("model=mean_image split.contamination.rate=.8 trainer.progress=false logger=none").out
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["split.known.rate=1"], r"split\.known\.rate=1 must be at least 0 and below 1"),
        (["split.known.rate=0.1", "split.known.classes=[1]"], "known class 1 is not anomalous here: choose among 0"),
        (["split.known.rate=0.95"], r"split\.known\.rate=0\.95 beside \d+ training images needs \d+ anomalies"),
    ],
)
def test_what_cannot_be_known_is_refused(overrides: list[str], message: str, data: Path) -> None:
    with pytest.raises(Exception, match=message) as error:
        made(data, *TOLD, *overrides)
    assert isinstance(error.value.__cause__ or error.value, ValueError)


def test_a_run_learns_from_them_and_says_how_many_they_were(data: Path, tmp_path: Path) -> None:
    where = [f"runs={tmp_path}", f"data_dir={data}", "trainer.progress=false", "logger=none", "normal_class=1"]
    without, told = (run(config.compose([*TOLD, *more, *where])) for more in ([], KNOWN))
    assert without is not None and told is not None
    assert without["partition"]["known"] == 0 and told["partition"]["known"] == 15
    assert told["partition"]["train"] == without["partition"]["train"] + 15
    assert told["partition"]["test_anomalous"] == without["partition"]["test_anomalous"]
    assert set(told["by_kind"]) == {"auroc", "seen", "unseen"} and set(without["by_kind"]) == {"auroc"}
    far = []
    for result in (without, told):
        with np.load(tmp_path / record.place(result["identity"], "normal") / "scores.npz") as arrays:
            score, label = arrays["score"], arrays["label"]
            far.append(np.median(score[label == 7]) / np.median(score[label == 1]))
    assert far[1] > 1.5 * far[0], "sevens are pushed away"
