"""The supervised ceiling: it has the labels that nobody else gets, the same test images, and a place of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from finished import Runs
from test_methods import detector, images

from anomaly_lab import config, report, results
from anomaly_lab.build import make_data
from anomaly_lab.data import OneClassData
from anomaly_lab.detector import Batch
from anomaly_lab.run import run
from anomaly_lab.tables import significance

CEILING = "supervised_ceiling"


def made(model: str, data: Path, *overrides: str) -> OneClassData:
    return make_data(config.job(config.compose([f"model={model}", f"data_dir={data}", "normal_class=1", *overrides])))


@pytest.mark.parametrize("contamination", ["0", "0.1"])
def test_it_trains_on_labelled_anomalies_and_is_tested_as_everybody(data: Path, contamination: str) -> None:
    given = f"split.contamination.rate={contamination}"
    ceiling, plain = made(CEILING, data, given), made("knn", data, given)
    ours, theirs = ceiling.partition, plain.partition
    assert np.array_equal(ours.test, theirs.test) and np.array_equal(ours.val, theirs.val)
    assert ours.fingerprint == theirs.fingerprint
    assert set(theirs.train) < set(ours.train) and not set(ours.train) & {*ours.test, *ours.val}
    assert np.array_equal(ours.train_truth, ceiling.images.labels[ours.train] != 1)
    others = ceiling.images.labels != 1
    assert ours.train_truth.sum() == sum(4 * int((ceiling.images.labels == c).sum()) // 5 for c in {*range(10)} - {1})
    assert ours.train_truth.sum() < others.sum()

    known, unknown = (module.train_dataloader().everything() for module in (ceiling, plain))
    assert unknown.truth is None, "a one-class method finds no truth"
    assert known.truth is not None and np.array_equal(known.truth.numpy(), ours.train_truth)
    batch = ceiling.train_dataloader().batch(torch.tensor([3, 500]))
    assert batch.truth is not None and torch.equal(batch.truth, known.truth[[3, 500]])


def test_where_all_anomalies_are_tested_there_is_no_ceiling(data: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.labels=true: this split tests on all anomalies"):
        made(CEILING, data, "split=one_abnormal", "normal_class=null", "abnormal_class=1")


def test_its_loss_is_the_log_probability_of_the_label_and_its_score_that_of_an_anomaly() -> None:
    ceiling, x, truth = detector(CEILING), images(), torch.arange(8) % 3 == 0
    (losses,) = ceiling.plays(Batch(x, torch.arange(8), truth=truth))
    p = torch.sigmoid(ceiling.score(x))
    torch.testing.assert_close(losses["classifier"], -torch.where(truth, p, 1 - p).log().mean())


@pytest.mark.slow
def test_its_labels_are_worth_something_and_without_them_it_says_so(data: Path, tmp_path: Path) -> None:
    where = [f"runs={tmp_path}", f"data_dir={data}", "trainer.progress=false", "logger=none", "normal_class=1"]
    result = run(config.compose([f"model={CEILING}", "model.budget.steps=200", *where]))
    assert result is not None and result["metrics"]["auroc"] > 0.99  # the mean image has .733
    assert result["partition"]["train_anomalous"] > 1000
    with pytest.raises(ValueError, match="its yaml must say labels: true"):
        run(config.compose([f"model={CEILING}", "model.labels=false", *where]))


def test_it_stands_apart_and_takes_part_in_no_test(runs: Runs) -> None:
    for c in range(10):
        runs.add(0.9 + c / 1000, c=c)
        runs.add(0.8 + c / 500, model="knn", c=c)
        runs.add(0.99, model=CEILING, c=c, config={"model": {"labels": True}})
    frame = results.read(runs.root)
    lines = [line.split("|")[1].strip() for line in report.markdown(report.sections(frame)).splitlines() if "|" in line]
    assert lines.index("`knn`") < lines.index("*with the labels of anomalies: a ceiling, no detector*")
    assert lines.index("*with the labels of anomalies: a ceiling, no detector*") < lines.index(f"`{CEILING}`")
    compared = significance(frame, "mnist", "official")
    assert compared and all(CEILING not in pair[:2] for pair in compared)
    results.write_csv(frame, runs.root / "results.csv")
    assert results.read_csv(runs.root / "results.csv")["labels"].sum() == 10
