"""Cells, means over classes and tests of difference, against numbers by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finished import AE, SHARED, Runs, grid, identity

from anomaly_lab import report, results, tables

# -------------------------------------------------------------------------------- tables


def test_cell_is_mean_and_sd_over_seeds(runs: Runs) -> None:
    for seed, auroc in enumerate((0.90, 0.92, 0.97)):
        runs.add(auroc, seed=seed)
    cell = runs.table()[AE][0]
    assert cell.mean == pytest.approx(0.93) and cell.sd == pytest.approx(np.std([0.90, 0.92, 0.97], ddof=1))
    assert "0.930 ± 0.036 |" in report.markdown(report.sections(results.read(runs.root)))


def test_missing_seeds_and_classes_show_in_the_cell_and_the_mean(runs: Runs) -> None:
    for seed in range(3):
        for c in range(10):
            if (seed, c) != (1, 4):
                runs.add(0.9 + 0.01 * seed, c=c, seed=seed)
    runs.add(0.8, model=SHARED, c=2)
    table = runs.table()
    assert report._cell_text(table[AE][4]) == "0.910 ± 0.014 (2/3)"
    assert report._cell_text(table[SHARED][2]) == "0.800 (1/3)"
    assert report._cell_text(table[SHARED][3]) == "0/3"
    assert report._cell_text(table[AE]["mean"]).endswith("(29/30 runs)")
    assert report._cell_text(table[SHARED]["mean"]) == "0.800 (1/10 classes)"


def test_rows_stand_in_the_order_of_the_frame(runs: Runs) -> None:
    for size in (None, 256, 4):
        more = {"model.detector.latent_size": size} if size else {}
        runs.add(0.9, changed={"model.budget.epochs": 2} | more)
        runs.add(0.9, model="ede_small", changed=more)
    frame = results.read(runs.root)
    assert list(runs.table()) == list(dict.fromkeys(frame["label"]))


def test_mean_over_classes_is_the_mean_of_the_class_means(runs: Runs) -> None:
    values = {(0, 0): 0.8, (1, 0): 0.9, (0, 1): 0.9, (1, 1): 1.0, (0, 2): 0.95}  # (class, seed)
    for (c, seed), auroc in values.items():
        runs.add(auroc, c=c, seed=seed)
    cell = runs.table()[AE]["mean"]
    assert cell.mean == pytest.approx(((0.8 + 0.9 + 0.95) / 3 + 0.95) / 2)
    assert cell.sd == pytest.approx(np.std([0.85, 0.95], ddof=1))  # seed 2 lacks a class


def test_grid_of_an_experiment_says_what_is_missing(runs: Runs) -> None:
    runs.add(0.9, c=3, name="three")
    expected = grid(*(identity(c=c, seed=s) for c in (3, 5) for s in (0, 1)), identity(model=SHARED, c=5))
    table = runs.table(expected=expected)
    assert [(cell.present, cell.expected) for cell in table[AE].values()] == [(1, 2), (0, 2), (1, 4)]
    assert [(cell.present, cell.expected) for cell in table[SHARED].values()] == [(0, 0), (0, 1), (0, 1)]


@pytest.mark.parametrize(
    ("who", "figure"),
    [
        ({"split": "pooled"}, None),  # Table 2 is the official split's
        ({"changed": {"split.contamination.rate": 0.1}}, None),  # another problem
        ({"changed": {"model.budget.epochs": 3}}, 0.986),
        ({"model": "unheard_of"}, None),
    ],
)
def test_published_figure_only_for_the_same_problem(runs: Runs, who: dict[str, Any], figure: float | None) -> None:
    runs.add(0.9, **({"model": SHARED} | who))
    [cells] = runs.table(split=who.get("split", "official")).values()
    assert (cells[0].published and cells[0].published.value) == figure


def test_mean_over_some_classes_is_not_compared_with_the_published_mean(runs: Runs) -> None:
    for c in (0, 1, 2):
        runs.add(0.9, model=SHARED, c=c, split="pooled")
    cell = runs.table(split="pooled")[SHARED]["mean"]
    assert cell.published.value == 0.992 and cell.difference is None
    assert cell.flag == "3/10 classes"


@pytest.mark.parametrize(("dataset", "split", "classes"), [("cifar100", "pooled", 100), ("mine", "pooled", 7)])
def test_a_mean_over_fewer_classes_than_the_protocol_has_is_flagged_for_any_data_set(
    runs: Runs, dataset: str, split: str, classes: int
) -> None:
    for c in (0, 1, 2):
        runs.add(0.9, dataset=dataset, split=split, c=c, more={"classes": classes})
    assert runs.table(dataset, split)[AE]["mean"].flag == f"3/{classes} classes"


def test_a_mean_is_flagged_where_no_run_recorded_how_many_classes_there_are(runs: Runs) -> None:
    for c in range(10):
        _forget_classes(runs.add(0.98, model=SHARED, c=c))
    cell = runs.table()[SHARED]["mean"]
    assert cell.flag == "10 of an unknown number of classes"
    assert cell.published is not None and cell.difference is None
    _forget_classes(runs.add(0.9, c=3, changed={"split.contamination.rate": 0.1}))
    runs.add(0.9, c=3)  # the same problem as those of SHARED, so it counts for them too
    flags = {name: cells["mean"].flag for name, cells in runs.table().items()}
    assert flags == {
        AE: "1/10 classes",
        f"{AE} [split.contamination.rate=0.1]": "1 of an unknown number of classes",
        SHARED: "",
    }


def _forget_classes(folder: Path) -> None:
    result = json.loads((folder / "result.json").read_text())
    del result["classes"]
    (folder / "result.json").write_text(json.dumps(result))


# -------------------------------------------------------------------------------- differences


def test_holm_equals_the_example_by_hand() -> None:
    # sorted .005 .01 .03 .04 times 4 3 2 1: .02 .03 .06 .04, the last raised to the running maximum .06
    assert tables.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert tables.holm([0.6, 0.7]) == [1.0, 1.0]
    assert tables.holm([]) == []


def test_significance_pairs_over_common_classes(runs: Runs) -> None:
    gains = [0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, -0.015]
    for c, gain in enumerate(gains):
        runs.add(0.8, c=c)
        runs.add(0.8 + gain, c=c, model=SHARED)
    runs.add(0.1, c=9)  # no partner
    [found] = tables.significance(results.read(runs.root), "mnist", "official")
    # The one loss is the second smallest in size, so its rank sum is 2. Of the 2**8 choices of signs those
    # with a rank sum of at most 2 are {}, {1}, {2}: p = 2 * 3 / 256.
    assert (found.first, found.second, found.classes, found.ties, found.seeds) == (AE, SHARED, 8, 0, 1)
    assert found.difference == pytest.approx(-np.mean(gains))
    assert found.p == pytest.approx(6 / 256) and found.p_holm == found.p


def test_too_few_classes_give_no_p_value(runs: Runs) -> None:
    for c in range(7):
        runs.add(0.9, c=c)
        runs.add(0.9 + (0.01 * c if c > 1 else 0), c=c, model=SHARED)
    [found] = tables.significance(results.read(runs.root), "mnist", "official")
    assert (found.classes, found.ties, found.p) == (7, 2, None)  # five differ
    assert "1 comparison has too few classes" in report.markdown(report.sections(results.read(runs.root)))


def test_of_many_comparisons_only_those_that_differ_are_listed() -> None:
    def many(count: int, p_holm: float) -> list[tables.Comparison]:
        return [tables.Comparison(AE, f"m{i}", 10, 0, 1, 0.1, 0.001, p_holm) for i in range(count)]

    rows, said = report._tests(many(report.LISTED, 1.0))
    assert len(rows) == report.LISTED and not said
    rows, said = report._tests(many(report.LISTED + 100, 1.0) + many(2, 0.04))
    assert len(rows) == 2 and said == "Of 202 comparisons no other has a p below 0.05 after Holm's correction over all."
    rows, said = report._tests(many(report.LISTED + 1, 1.0))
    assert not rows and said.startswith("Of 101 comparisons none has")


def test_seeds_are_averaged_before_classes_are_compared(runs: Runs) -> None:
    for c in range(6):
        for seed in range(3):
            runs.add(0.8, c=c, seed=seed)
            runs.add(0.8 + 0.01 * (c + 1) + 0.02 * (seed - 1), c=c, seed=seed, model=SHARED)
    runs.add(0.1, c=0, seed=7)  # no partner
    [found] = tables.significance(results.read(runs.root), "mnist", "official")
    assert (found.classes, found.seeds, found.difference) == (6, 3, pytest.approx(-0.035))
    assert found.p == pytest.approx(2 / 2**6)  # of six classes that all agree, not of 18 pairs


def test_a_run_that_explains_no_more_than_the_mean_image_is_marked(runs: Runs) -> None:
    runs.add(0.9, c=0, learned={"explained_variance": 0.02, "distinct_scores": 900, "parameter_change": 0.3})
    runs.add(0.9, c=1, learned={"explained_variance": 0.8, "distinct_scores": 900, "parameter_change": 0.3})
    runs.add(0.9, c=2, learned={"explained_variance": None, "distinct_scores": 900, "parameter_change": 1e-9})
    runs.add(0.9, c=3)
    cells = runs.table()[AE]
    assert [cells[key].unlearned for key in (0, 1, 2, 3, "mean")] == [1, 0, 1, 0, 2]
    page = report.markdown(report.sections(results.read(runs.root)))
    assert "| 0.900† | 0.900 | 0.900† | 0.900 | 0.900†" in page and "no better than the mean image" in page


def test_methods_are_not_compared_across_problems(runs: Runs) -> None:
    for c in range(8):
        runs.add(0.9, c=c)
        runs.add(0.8, c=c, changed={"split.contamination.rate": 0.1})
        runs.add(0.7 + 0.01 * c, c=c, model=SHARED, changed={"split.contamination.rate": 0.1})
    [found] = tables.significance(results.read(runs.root), "mnist", "official")
    assert "rate=0.1" in found.first and "rate=0.1" in found.second


# -------------------------------------------------------------------------------- the table of everything


def test_overview_aggregates_the_runs_of_all_frames_and_counts_each_once(runs: Runs, tmp_path: Path) -> None:
    for c in range(10):
        for seed, auroc in enumerate((0.9, 0.8)):
            runs.add(auroc, c=c, seed=seed)
    runs.add(0.7, model="mean_image", c=3)
    other = Runs(tmp_path / "other")
    other.add(0.9, c=0)  # a run that both have
    other.add(0.95, c=0, changed={"model.budget.epochs": 2})
    found = tables.overview({"one": results.read(runs.root), "two": results.read(other.root)})
    assert [(e.method, e.size, e.changed, e.block) for e in found] == [
        ("autoencoder", "small", "model.budget.epochs=2", "from scratch"),
        ("autoencoder", "small", "", "from scratch"),
        ("mean_image", "full", "", "floor"),
    ]
    changed, whole, floor = found
    assert whole.mean.mean == pytest.approx(0.85) and whole.mean.sd == pytest.approx(np.std([0.9, 0.8], ddof=1))
    assert (len(whole.classes), whole.whole, whole.seeds, whole.mean.present, whole.mean.flag) == (
        10,
        10,
        (0, 1),
        20,
        "",
    )
    assert whole.sources == ("one", "two") and changed.sources == ("two",)
    assert (list(floor.classes), floor.mean.flag, floor.seeds) == ([3], "1/10 classes", (0,))


def test_overview_compares_means_over_all_classes_only(runs: Runs) -> None:
    for c in range(10):
        runs.add(0.9, model=SHARED, c=c)
    runs.add(0.9, model=SHARED, c=2, changed={"model.budget.epochs": 2})
    part, whole = sorted(tables.overview({"one": results.read(runs.root)}), key=lambda e: len(e.classes))
    figure = results.published("shared_ae", "mnist", "official")["mean"]
    assert whole.mean.difference == pytest.approx(0.9 - figure.value)
    assert part.mean.published == figure and part.mean.difference is None


def test_overview_refuses_one_run_with_two_results(runs: Runs, tmp_path: Path) -> None:
    runs.add(0.9)
    other = Runs(tmp_path / "other")
    other.add(0.91)
    with pytest.raises(ValueError, match=r"autoencoder_small has two results in one and two: make the older one again"):
        tables.overview({"one": results.read(runs.root), "two": results.read(other.root)})


def test_results_of_two_devices_may_differ_and_the_submitted_one_counts(runs: Runs, tmp_path: Path) -> None:
    runs.add(0.9)
    other = Runs(tmp_path / "other")
    other.add(0.91, more={"device": "AMD EPYC, AVX2"})
    page, submitted = {"one": results.read(runs.root)}, {"two": results.read(other.root)}
    [entry] = tables.overview(page, submitted)
    assert (entry.mean.mean, entry.sources, entry.submissions, entry.verified) == (pytest.approx(0.91), (), ("two",), 1)
    [entry] = tables.overview(page | submitted)
    assert (entry.mean.mean, entry.sources, entry.verified) == (pytest.approx(0.9), ("one",), 0)


def test_overview_takes_a_run_at_full_precision_for_its_six_digits(runs: Runs, tmp_path: Path) -> None:
    runs.add(0.123456789)
    results.write_csv(results.read(runs.root), tmp_path / "results.csv")
    [entry] = tables.overview({"one": results.read_csv(tmp_path / "results.csv"), "two": results.read(runs.root)})
    assert entry.sources == ("one", "two") and entry.mean.present == 1


def test_a_text_that_an_archive_lacks_does_not_cost_its_precision(runs: Runs, tmp_path: Path) -> None:
    """An archive of earlier code has not every column of a results.csv, in which the missing text is empty."""
    runs.add(0.123456789)
    archive = results.read(runs.root)
    results.write_csv(archive, tmp_path / "results.csv")
    [entry] = tables.overview(
        {"page": results.read_csv(tmp_path / "results.csv")}, {}, {"old": archive.assign(fitted=None)}
    )
    assert entry.mean.mean == 0.123456789 and entry.archived == 1
