"""Finished runs as a frame: read, kept as a CSV, refused; and the state of those that are not finished."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finished import AE, SHARED, Runs, grid, identity

from anomaly_lab import cli, config, grids, report, results

# -------------------------------------------------------------------------------- reading


def test_read_gives_a_typed_row_a_run_in_natural_order(runs: Runs) -> None:
    for size in (64, 8):
        changed = {"model.detector.latent_size": size}
        runs.add(0.9, changed=changed, config={"model": {"detector": {"latent_size": size}}})
    runs.add(0.95, name="zero", dirty=True, config={"model": {"detector": {"latent_size": 32}}}, experiment="e")
    frame = results.read(runs.root)
    assert frame["label"].tolist() == [
        AE,
        f"{AE} [model.detector.latent_size=8]",
        f"{AE} [model.detector.latent_size=64]",
    ]
    assert frame["model.detector.latent_size"].tolist() == [
        32,
        8,
        64,
    ]  # the default's own value, from its config
    first = frame.iloc[0]
    assert (first["class_name"], first["git_sha"], first["seconds"]) == ("zero", "0123456789ab", 61.5)
    assert bool(first["dirty"]) and first["experiment"] == "e"
    assert np.isnan(first["fpr95"]) and frame["normal_class"].dtype == int


def test_csv_round_trips(runs: Runs, tmp_path: Path) -> None:
    for number, rate in enumerate((0, 0.05)):
        changed = {"split.contamination.rate": rate, "model.update": "gan like"} if rate else {}
        config = {
            "split": {"contamination": {"rate": rate}},
            "model": {"update": changed.get("model.update", "usad")},
        }
        runs.add(0.123456789, c=number, name='a "quoted", name', changed=changed, config=config, oracle=0.5)
    frame = results.read(runs.root)
    results.write_csv(frame, tmp_path / "one.csv")
    back = results.read_csv(tmp_path / "one.csv")
    results.write_csv(back, tmp_path / "two.csv")
    assert (tmp_path / "one.csv").read_bytes() == (tmp_path / "two.csv").read_bytes()
    assert list(back.columns) == list(frame.columns)
    assert back["label"].tolist() == frame["label"].tolist()
    assert back["auroc"].tolist() == [0.123457, 0.123457] and back["val_score"][0] == 1.23457e-07
    assert back["model.update"].tolist() == frame["model.update"].tolist() == ["usad", "gan like"]
    assert back["dirty"].dtype == bool and not back["dirty"].any()


def test_csv_starts_with_the_columns_of_the_design_and_sorts(runs: Runs, tmp_path: Path) -> None:
    for c in (10, 9):
        runs.add(0.9, c=c)
    results.write_csv(results.read(runs.root), tmp_path / "results.csv")
    with open(tmp_path / "results.csv", newline="") as file:
        header, *rows = csv.reader(file)
    wanted = "model dataset split normal_class seed auroc average_precision fpr95 balanced_accuracy oracle_auroc"
    assert header[:13] == [*wanted.split(), "epochs", "images_per_second", "git_sha"]
    assert [row[3] for row in rows] == ["9", "10"]


def test_csv_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.csv").write_text("model,seed\na,0\n")
    with pytest.raises(ValueError, match="has no column dataset"):
        results.read_csv(tmp_path / "other.csv")


def test_a_new_metric_is_one_line_in_the_table_of_columns(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs.add(0.9)
    results.write_csv(results.read(runs.root), tmp_path / "before.csv")
    runs.add(0.9, c=1, metrics={"aupro": 0.625})
    monkeypatch.setattr(results, "COLUMNS", (*results.COLUMNS, results._metric("aupro", "AUPRO")))
    results.write_csv(results.read(runs.root), tmp_path / "results.csv")
    frame = results.read_csv(tmp_path / "results.csv")
    assert np.isnan(frame["aupro"][0]) and frame["aupro"][1] == 0.625, "runs of before have none"
    assert results.read_csv(tmp_path / "before.csv")["aupro"].isna().all(), "what is committed stays valid"
    text = report.markdown(report.sections(frame))
    assert "| AUPRO |" in text and "| 0.625 (1/2) |" in text


@pytest.mark.parametrize(("model", "size"), [("ganomaly_small", "small"), ("ganomaly", "full")])
def test_results_of_earlier_code_are_read_under_todays_names(runs: Runs, model: str, size: str) -> None:
    file = runs.add(0.9, model=model) / "result.json"
    result = json.loads(file.read_text())
    result["config"] = {"choices": {"model": model}, "model": {}}
    result["set_aside"] = [{"name": "round 1", "images": 3, "precision": None, "recall": 0.5}]
    del result["classes"]
    result.pop("rejected_images", None)
    file.write_text(json.dumps(result))
    [run] = results.read(runs.root).to_dict("records")
    assert json.loads(run["rejected_images"])[0]["recall"] == 0.5, "earlier code's name of the sets"
    assert (run["model"], run["method"], run["size"], run["published_as"]) == (model, "ganomaly", size, "ganomaly")
    assert np.isnan(run["classes"])


def test_a_planned_run_has_the_names_it_will_be_shown_under(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANOMALY_LAB_DATA", str(data))
    changed = ["model.detector.latent_size=8", "split.contamination.rate=0.1"]
    run = results.planned(config.job(config.compose([*changed, "normal_class=3", "seed=1"])))
    assert run == {
        "model": "shared_ae_50_small",
        "method": "shared_ae_50",
        "size": "small",
        "published_as": "shared_ae",
        "pretrained": "",
        "labels": False,
        "dataset": "digits",
        "split": "pooled",
        "normal_class": 3,
        "seed": 1,
        "changed": " ".join(changed),
        "label": f"shared_ae_50_small [{', '.join(changed)}]",
        "problem": "split.contamination.rate=0.1",
    }


# -------------------------------------------------------------------------------- mixtures


def test_another_problem_may_have_other_images(runs: Runs) -> None:
    runs.add(0.9)
    for model in (AE, SHARED):
        runs.add(0.8, model=model, changed={"split.contamination.rate": 0.1, "model.budget.epochs": 2})
    runs.add(0.9, changed={"model.budget.epochs": 2})
    results.refuse_mixtures(results.read(runs.root))
    runs.add(0.7, model="ede", changed={"split.contamination.rate": 0.1}, fingerprint="c" * 16)
    with pytest.raises(ValueError, match="different images"):
        results.refuse_mixtures(results.read(runs.root))


@pytest.mark.parametrize(
    ("one", "two", "message"),
    [
        ({"images": "a", "model.lr": 1}, {"images": "b", "model.lr": 1}, "on other images"),
        ({"images": "a", "model.lr": 1}, {"images": "a", "model.lr": 2}, "with other settings"),
    ],
)
def test_seeds_of_other_data_or_of_an_edited_yaml_are_not_averaged(
    runs: Runs, one: dict[str, Any], two: dict[str, Any], message: str
) -> None:
    for seed, settings in enumerate((one, one)):
        _settle(runs.add(0.9, seed=seed), settings)
    results.refuse_mixtures(results.read(runs.root))
    _settle(runs.add(0.1, seed=2), two)
    with pytest.raises(ValueError, match=message):
        results.refuse_mixtures(results.read(runs.root))


def _settle(folder: Path, settings: dict[str, Any]) -> None:
    file = folder / "result.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"settings": settings}))


def test_the_same_run_twice_is_refused(runs: Runs) -> None:
    made = runs.add(0.9)
    shutil.copytree(made, runs.root / "copy" / made.relative_to(runs.root))
    with pytest.raises(ValueError, match="are the same run twice"):
        results.refuse_mixtures(results.read(runs.root))


# -------------------------------------------------------------------------------- published


def test_first_published_row_of_a_cell_counts() -> None:
    # OCGAN digit 2: .948 as Jia & Liu quote it stands before .942 of other tables.
    assert results.published("ocgan", "mnist", "official")[2].value == 0.948


def test_a_published_figure_says_that_its_column_headers_are_lost() -> None:
    lost = [row for row in results._published_rows() if "column headers lost" in row["source"]]
    assert {(row["dataset"], row["split"]) for row in lost} == {("mnist", "official")}
    for row in lost:
        figure = results.published(row["model"], "mnist", "official")[int(row["normal_class"])]
        assert figure.setting == "column headers lost, read as digits 0 to 3" or figure.source != row["source"]
    assert results.published("shared_ae", "mnist", "official")[3].setting  # the row itself, not an earlier one
    assert results.published("gpnd", "mnist", "pooled")["mean"].setting == ""


def test_published_table_has_no_unreadable_row() -> None:
    rows = results._published_rows()
    assert len(rows) == 892
    assert {row["status"] for row in rows} == {"verified", "secondary", "unverified"}
    assert all(0 <= float(row["value"]) <= 1 for row in rows)


def test_a_published_row_names_a_method_of_ours_or_none() -> None:
    """What no yaml answers to is never shown; the tables' other systems have no name."""
    models = {path.stem: path.read_text() for path in (config.CONFIG_DIR / "model").glob("*.yaml")}
    answers = set(models) | {name for text in models.values() for name in re.findall(r"^published: (\w+)", text, re.M)}
    named = {row["model"] for row in results._published_rows()} - {""}
    assert named - answers == {"anonagn", "dagpr"}, "known from abstracts: a reconstruction, and none"


@pytest.mark.parametrize(
    ("method", "dataset", "mean", "status"),
    [
        ("anogan", "mnist", 0.9127, "verified"),
        ("anogan", "cifar10", 0.6179, "verified"),
        ("conv_ae", "mnist", 0.8965, "unverified"),
        ("conv_ae", "cifar10", 0.5939, "verified"),
        ("deep_svdd", "mnist", 0.948, "verified"),  # its own paper's, not the .928 of Deep SAD's table
        ("deep_svdd", "fashion_mnist", 0.892, "verified"),
        ("deep_svdd_soft", "mnist", 0.9353, "unverified"),
        ("geotrans", "fashion_mnist", 0.935, "verified"),
        ("geotrans", "cifar10", 0.86, "verified"),
        ("goad", "cifar10", 0.851, "verified"),
        ("kde", "cifar10", 0.6489, "verified"),
        ("knn", "cifar10", 0.5955, "verified"),
        ("rotnet", "cifar10", 0.898, "verified"),
    ],
)
def test_means_of_published_rows_are_those_of_their_classes(
    method: str, dataset: str, mean: float, status: str
) -> None:
    cells = results.published(method, dataset, "official")
    assert (cells["mean"].value, cells["mean"].status) == (mean, status)
    if len(cells) > 1:  # classes of one source and the mean of another would not agree
        assert set(cells) == {*range(10), "mean"}
        assert np.mean([cells[c].value for c in range(10)]) == pytest.approx(mean, abs=1e-3)


def test_published_figures_on_contaminated_data_are_found_by_what_contaminates() -> None:
    rows = [row for row in results._published_rows() if row["setting"].startswith("split.contamination")]
    assert len(rows) == 18
    for row in rows:
        problem, _, kind = row["setting"].rpartition(" ")
        found = results.published_kind(row["model"], row["dataset"], row["split"], problem, kind)
        assert found is not None and found.value == float(row["value"]) and found.status == "secondary"
    assert results.published_kind("itsr", "mnist", "official", "split.contamination.rate=0.01", "seen") is None


def test_status_of_an_experiment_lists_what_is_missing(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs.add(0.9, c=0)
    runs.add(0.9, c=9)  # not of this grid
    monkeypatch.setattr(grids, "expected_runs", lambda name: grid(identity(c=0), identity(c=1)))
    assert cli.report([str(runs.root), "--status", "--experiment", "sizes"]) == 0
    out = capsys.readouterr().out
    assert f"missing     {AE}/mnist/official/n1/s0" in out and "n9" not in out
    assert "2 runs: 1 done, 1 missing" in out


def test_rows_of_code_that_did_not_know_a_column_are_rows_like_any_other(runs: Runs) -> None:
    for c in (0, 1):
        runs.add(0.9, c=c)
    later = ("device", "images", "settings", "decided_by", "earlier_code")
    rows = [{k: v for k, v in row.items() if k not in later} for row in results.rows_of(results.read(runs.root))]
    frame = results.from_rows(rows)
    assert (frame[[*later]] == "").all(axis=None), "as read_csv has them"
    results.refuse_mixtures(frame)  # unknown images are no other images
    assert len(results.union({"one": frame})) == 2, "a run of an unknown device is a run"
