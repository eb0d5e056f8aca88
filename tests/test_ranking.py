"""Ranks over problems, their tests, and what the best epoch adds, against numbers by hand and from the literature."""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
from finished import AE, Runs
from programs import load
from scipy.stats import f, rankdata

from anomaly_lab import cli, config, figures, grids, ranking, results

ROOT = Path(__file__).parent.parent


def frame(table: np.ndarray, **more: object) -> pd.DataFrame:
    """A run of method m on problem n for table[n, m]."""
    rows = [
        {"method": f"m{m}", "model": f"m{m}", "dataset": "mnist", "split": "official", "problem": "", "changed": ""}
        | {
            "normal_class": n,
            "seed": 0,
            "labels": False,
            "auroc": auroc,
            "oracle_auroc": math.nan,
            "epochs": 5,
            "pretrained": "",
        }
        | more
        for n, line in enumerate(table)
        for m, auroc in enumerate(line)
    ]
    return pd.DataFrame(rows)


def test_ranks_and_friedmans_test_by_the_formulas() -> None:
    table = np.random.RandomState(0).rand(12, 5).round(1)  # ties among them
    table[:, 2] = (table[:, 2] + 0.3).round(1)
    found = ranking.ranking(frame(table))
    ranks = np.array([rankdata(-line) for line in table])  # (N,K)
    n, k = table.shape
    assert found.problems == n and found.ranks.index[0] == "m2"
    np.testing.assert_allclose(found.ranks[[f"m{m}" for m in range(k)]], ranks.mean(0))
    between = n * ((ranks.mean(0) - (k + 1) / 2) ** 2).sum()
    within = ((ranks - (k + 1) / 2) ** 2).sum() / (n * (k - 1))  # Conover's form, which counts ties
    chi = between / within
    assert found.p == pytest.approx(f.sf((n - 1) * chi / (n * (k - 1) - chi), k - 1, (k - 1) * (n - 1)))


@pytest.mark.parametrize(("k", "q"), [(3, 2.343), (4, 2.569), (5, 2.728), (10, 3.164)])  # Demšar 2006, table 5
def test_the_critical_difference_is_the_tabulated_one(k: int, q: float) -> None:
    found = ranking.ranking(frame(np.random.RandomState(k).rand(7, k)))
    assert found.critical_difference == pytest.approx(q * math.sqrt(k * (k + 1) / 42), rel=2e-3)


def test_what_lacks_a_problem_is_named_and_a_ceiling_is_not_ranked() -> None:
    runs = frame(np.random.RandomState(1).rand(6, 5))
    runs.loc[runs["method"] == "m4", "labels"] = True
    runs = runs[(runs["method"] != "m3") | (runs["normal_class"] > 1)]
    found = ranking.ranking(runs)
    assert sorted(map(str, found.ranks.index)) == ["m0", "m1", "m2"] and found.left_out == {"m3": 4}
    text = "\n".join(ranking.markdown(found))
    assert "3 methods on 6 problems" in text and "`m3` (4)" in text and "m4" not in text
    with pytest.raises(ValueError, match="three methods"):
        ranking.ranking(runs[runs["method"] != "m0"])


def test_methods_with_pretrained_features_are_marked() -> None:
    runs = frame(np.random.RandomState(1).rand(6, 4))
    assert "‡" not in "\n".join(ranking.markdown(ranking.ranking(runs)))
    runs.loc[runs["method"] == "m2", "pretrained"] = "imagenet vgg19"
    text = "\n".join(ranking.markdown(ranking.ranking(runs)))
    assert "| `m2` ‡ |" in text and "| `m1` |" in text and "‡: with features that were pretrained" in text


def test_seeds_are_averaged_and_equal_methods_are_not_told_apart() -> None:
    table = np.random.RandomState(2).rand(9, 4)
    shifted = pd.concat([frame(table - 0.01, seed=1), frame(table + 0.01)])
    pd.testing.assert_series_equal(ranking.ranking(shifted).ranks, ranking.ranking(frame(table)).ranks)
    alike = ranking.ranking(frame(np.full((9, 4), 0.5) + table[:, :1]))
    assert alike.ranks.tolist() == [2.5] * 4 and alike.p == pytest.approx(1) and not alike.pairs()
    assert alike.groups() == [("m0", "m3")]


def test_a_method_that_always_wins_is_told_apart_by_both_tests() -> None:
    table = np.random.RandomState(3).rand(20, 4)
    table[:, 1] += 1
    found = ranking.ranking(frame(table))
    assert found.ranks["m1"] == 1 and found.p < 1e-6
    assert {worse for better, worse, _ in found.pairs() if better == "m1"} == {"m0", "m2", "m3"}
    assert all("m1" not in group for group in found.groups())
    assert figures.critical_difference(found).axes[0].get_ylim()[1] < 0


def test_a_true_null_is_rejected_about_as_often_as_the_level_says() -> None:
    random = np.random.RandomState(4)
    wrong = sum(ranking.ranking(frame(random.rand(10, 4))).p < ranking.LEVEL for _ in range(200))
    assert 2 <= wrong <= 20  # ten expected


def test_names_lose_their_data_set_and_keep_what_a_run_changed() -> None:
    assert ranking.method_of("hrn_cifar10", "cifar10") == "hrn"
    assert ranking.method_of("deep_svdd_fashion", "fashion_mnist") == "deep_svdd"
    assert ranking.method_of("hrn_cifar10_small", "cifar10") == "hrn_small"
    assert ranking.method_of("hrn_cifar10", "mnist") == "hrn_cifar10"
    assert ranking.method_of("vae", "mnist", "model.lr=1 split.seed=2", "split.seed=2") == "vae [model.lr=1]"


def test_two_sizes_of_a_method_are_not_averaged() -> None:
    runs = frame(np.array([[0.9, 0.5, 0.6]] * 3))
    small = runs[runs["method"] == "m0"].assign(model="m0_small", auroc=0.1)
    runs.loc[runs["method"] == "m1", "model"] = "m1_small"  # of one size alone: the method's name
    found = ranking.ranking(pd.concat([runs, small], ignore_index=True))
    assert found.auroc.round(9).to_dict() == {"m0": 0.9, "m2": 0.6, "m1": 0.5, "m0_small": 0.1}
    other = runs[runs["method"] == "m0"].assign(dataset="cifar10", method="m0_cifar10", model="m0_cifar10_small")
    watched = pd.concat([runs, other], ignore_index=True).assign(oracle_auroc=1.0)
    counted = ranking.best_epochs(watched).set_index("method")["runs"].to_dict()
    assert counted == {"m0": 3, "m0_small": 3, "m1": 3, "m2": 3}, "a small size is no full one of another data set"


def test_what_the_best_epoch_adds_is_counted_over_watched_runs_alone() -> None:
    runs = frame(np.array([[0.5, 0.9], [0.7, 0.8], [0.6, 0.6]]))
    runs.loc[runs["method"] == "m0", "oracle_auroc"] = [0.6, 0.7, 0.8]
    runs.loc[1, "oracle_auroc"] = 0.95
    runs.loc[1, "epochs"] = 1  # its only epoch is the best
    (row,) = ranking.best_epochs(runs).itertuples()
    assert (row.method, row.runs, row.problems, row.epochs) == ("m0", 3, 3, 5)
    assert (row.mean, row.largest, row.last_is_best) == pytest.approx((0.1, 0.2, 1 / 3))
    assert ranking.best_epochs_markdown(runs[runs["method"] == "m1"]) == [
        "No run watched the test AUROC after each of several epochs."
    ]


def test_what_the_best_epoch_adds_is_told_for_each_data_set_and_who_is_never_watched() -> None:
    runs = frame(np.array([[0.5, 0.9, 0.9], [0.7, 0.8, 0.8]]))
    runs.loc[runs["method"] == "m0", "oracle_auroc"] = [0.6, 0.9]
    runs.loc[runs["method"] == "m2", "epochs"] = 0
    other = runs[runs["method"] == "m0"].assign(dataset="cifar10", method="m0_cifar10", oracle_auroc=[0.5, 0.7])
    runs = pd.concat([runs, other], ignore_index=True)
    (row,) = ranking.best_epochs(runs).itertuples()
    assert row.datasets == pytest.approx({"mnist": 0.15, "cifar10": 0.0})
    assert ranking.unwatched(runs) == ["m1"], "m2 trains nothing"


def test_the_command_ranks_runs(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    for c in range(3):
        for number, model in enumerate([AE, "ede_small", "ganomaly_small"]):
            runs.add(0.9 - 0.1 * number, model=model, c=c)
    assert cli.report([str(runs.root), "--ranking"]) == 0
    printed = capsys.readouterr().out
    written = (runs.root / "report/ranking.md").read_text(encoding="utf-8")
    assert written.strip() in printed and "3 methods on 3 problems" in written
    assert (runs.root / "report/ranking.png").read_bytes()[:4] == b"\x89PNG"
    assert cli.report([str(runs.root / "nothing"), "--ranking"]) == 2


def test_an_experiments_runs_alone_are_ranked_and_damaged_ones_are_named(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for c in range(3):
        for number, model in enumerate([AE, "ede_small", "ganomaly_small", "knn"]):
            runs.add(0.9 - 0.1 * number, model=model, c=c, experiment=None if model == "knn" else "mine")
    broken = next(runs.root.glob("knn/**/result.json"))
    broken.write_text("{")
    monkeypatch.setattr(grids, "expected_runs", lambda name: [])
    assert cli.report([str(runs.root), "--ranking", "--experiment", "mine"]) == 0
    out, err = capsys.readouterr()
    assert "3 methods on 3 problems" in out and "knn" not in out and f"{broken} is damaged" in err


def test_the_committed_page_is_what_its_generator_writes() -> None:
    module = load("ranking")
    assert module.PAGE.read_text(encoding="utf-8") == module.page()[0], "run python docs/ranking.py"
    text, drawn = module.page()
    assert all(path.is_file() and f"]({path.name})" in text for path in drawn) and len(drawn) == 2
    assert len(results.read_csv(ROOT / "experiments/everything/results.csv"))


@pytest.fixture(scope="module")
def practice() -> ModuleType:
    return load("practice")


def test_the_page_of_published_practice_is_what_its_generator_writes(practice: ModuleType) -> None:
    written = practice.PAGE.read_text(encoding="utf-8")
    assert practice.page() == written, "run python docs/practice.py"
    sections = load("ranking").page()[0]
    assert f"\n## {practice.BEST_EPOCH}\n" in sections, "the heading that the page links to"
    for page in ("README.md", "docs/test_labels.md", "docs/ranking.md", "site/mkdocs.yml"):
        assert "practice.md" in (ROOT / page).read_text(encoding="utf-8"), page


def test_every_method_of_a_publication_has_a_row_on_that_page(practice: ModuleType) -> None:
    """But floors, ceilings, what is ours, and a method whose very input is known anomalies."""
    rows = {name for one in practice.PRACTICE for name in (one.method, *one.rows)}
    assert {one.kind for one in practice.PRACTICE} == set(practice.SECTIONS)
    names = {path.stem for path in (config.CONFIG_DIR / "model").glob("*.yaml")}
    plain = {name for name in names if not re.search(r"_(cifar10|coil100|fashion|squeezenet|pixel_l1)$", name)}
    ours = {"scatter_subspace", "transform_knn", "rotation_contrast", "fused", "supervised_ceiling", "deep_sad"}
    without_choices = {"mean_image", "pca", "knn", "lof", "gmm", "pretrained_knn", "patchcore"}
    grown = {"addpa_growing"}  # addpa of other images, by the same code
    ablations = {"autoencoder", "denoising_ae", "ede", "shared_ae_no_adversary", "shared_ae_printed"}
    assert plain - rows == ours | without_choices | grown | ablations


def test_what_a_choice_adds_is_counted_from_runs(practice: ModuleType) -> None:
    one = practice.Practice("m0", "labels", "", "", grid=("gamma",))
    runs = frame(np.array([[0.5, 0.9], [0.7, 0.8]])).assign(oracle_sorted_auroc=math.nan)
    assert practice.best_epoch(one, runs) == "cannot be measured: scored only after the fit"
    assert practice.best_epoch(one, runs.assign(epochs=0)) == "has no epochs"
    assert practice.best_epoch(one, runs[runs["method"] == "m1"]) == "not run here"
    watched = runs.assign(oracle_auroc=runs["auroc"] + 0.1, oracle_sorted_auroc=runs["auroc"] + 0.2)
    assert practice.best_epoch(one, watched) == "`m0` **+0.100**, at most +0.100 (2 runs, 5 epochs)"
    assert practice.sorted_batches(one, watched) == "sorted batches: `m0` **+0.200** (2 runs)"
    settings = ["model.detector.gamma=1", "model.detector.gamma=1 model.detector.nu=0.1"]
    tried = pd.concat([runs, *(runs.assign(auroc=0.6 + n / 10, changed=text) for n, text in enumerate(settings))])
    assert practice.grid(one, tried).startswith("a grid of 2 settings of gamma: **+0.050** (0.600 by the rule; 4 runs")
