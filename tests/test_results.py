"""Finished runs as tables: read, refused, compared, written; and the state of those that are not finished."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import DictConfig

from anomaly_lab import results, status
from anomaly_lab.config import Job

AE, SHARED = "autoencoder_small", "shared_ae_small"


def identity(model: str = AE, dataset: str = "mnist", split: str = "official", c: int = 0, seed: int = 0, changed=None):
    return {
        "model": model,
        "dataset": dataset,
        "split": split,
        "normal_class": c,
        "seed": seed,
        "changed": changed or {},
    }


def folder_of(who: Mapping[str, Any]) -> Path:
    seed = f"s{who['seed']}" + ("-" + format(hash(str(who["changed"])) % 16**8, "08x") if who["changed"] else "")
    return Path(who["model"], who["dataset"], who["split"], f"n{who['normal_class']}", seed)


class Runs:
    """A folder of runs, written one by one."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir()

    def add(
        self,
        auroc: float,
        *,
        name: str | None = None,
        role: str = "normal",
        config: Mapping[str, Any] | None = None,
        fingerprint: str | None = None,
        experiment: str | None = None,
        dirty: bool = False,
        oracle: float | None = None,
        metrics: Mapping[str, float] | None = None,
        more: Mapping[str, Any] | None = None,
        **who: Any,
    ) -> Path:
        """A finished run; `who` as for `identity`. The fingerprint follows from the problem unless given."""
        who = identity(**who)
        problem = {key: value for key, value in who["changed"].items() if key.startswith(("split.", "dataset."))}
        images = str((who["dataset"], who["split"], who["normal_class"], who["seed"], problem))
        result = {
            "schema": 1,
            "identity": who,
            "class_name": name or str(who["normal_class"]),
            "role": role,
            "metrics": dict.fromkeys(["fpr95", "balanced_accuracy", "f1", "precision", "recall", "threshold"])
            | {
                "auroc": auroc,
                "auroc_low": auroc - 0.01,
                "auroc_high": auroc + 0.01,
                "average_precision": 2 / 3,
            }
            | {"val_score": 1.23456789e-7, "oracle_auroc": oracle}
            | dict(metrics or {}),
            "partition": {"fingerprint": fingerprint or format(hash(images) % 16**16, "016x")},
            "config": config or {},
            "experiment": experiment,
            "git": {"sha": "0123456789abcdef0123", "dirty": dirty},
            "device": "cpu",
            "seconds": {"fit": 60.0, "score": 1.5},
            "images_per_second": 812.345678,
            "epochs": 2,
            "history": [{"epoch": e, "val_score": 1.0, "oracle_auroc": oracle} for e in (1, 2)] if oracle else [],
            **(more or {}),
        }
        folder = self.root / folder_of(who)
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps(result))
        return folder

    def other(self, file: str, text: str, **who: Any) -> Path:
        """A run that did not finish, with this file in its folder."""
        folder = self.root / folder_of(identity(**who))
        folder.mkdir(parents=True)
        (folder / file).write_text(text)
        return folder

    def table(
        self, dataset: str = "mnist", split: str = "official", expected=None
    ) -> dict[str, dict[Any, results.Cell]]:
        shown = results.table(results.read(self.root), dataset, split, expected)
        return {row.label: row.cells for row in shown.rows}


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path / "runs")


def grid(*members: Mapping[str, Any]) -> list[Job]:
    runs = "/elsewhere/runs"
    return [Job(DictConfig({"runs": runs}), who, Path(runs) / folder_of(who)) for who in members]


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


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text[:40],
        lambda text: "",
        lambda text: "[]",
        lambda text: text.replace('"auroc": 0.9', '"auroc": NaN'),
        lambda text: text.replace('"auroc": 0.9', '"auroc": null'),
        lambda text: text.replace('"fingerprint"', '"other"'),
    ],
    ids=["half written", "empty", "no table", "not a number", "no auroc", "no fingerprint"],
)
def test_damaged_result_is_named_and_skipped(runs: Runs, spoil, capsys: pytest.CaptureFixture[str]) -> None:
    runs.add(0.8, c=1)
    file = runs.add(0.9) / "result.json"
    file.write_text(spoil(file.read_text()))
    frame = results.read(runs.root)
    assert frame["normal_class"].tolist() == [1]
    [line] = frame.attrs["damaged"]
    assert str(file) in line and "\n" not in line
    assert [s.state for s in status.under(runs.root)] == ["done", "damaged"]
    assert results.main([str(runs.root)]) == 0
    assert str(file) in capsys.readouterr().err
    for page in ("report.md", "report.html"):
        assert "is damaged" in (runs.root / "report" / page).read_text()


def test_failed_runs_are_named_in_the_report(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    runs.add(0.8, c=1)
    failed = runs.other("failure.json", json.dumps({"error": "OutOfMemory: too large", "traceback": "..."}), c=2)
    line = f"{failed.relative_to(runs.root)} failed: OutOfMemory: too large"
    assert results.main([str(runs.root)]) == 0
    assert line in capsys.readouterr().err
    for page in ("report.md", "report.html"):
        assert line in (runs.root / "report" / page).read_text()


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


def test_code_that_only_began_a_run_is_named_and_its_uncommitted_changes_count(runs: Runs, tmp_path: Path) -> None:
    runs.add(0.9, c=1)
    earlier = [{"sha": "a" * 40, "dirty": True, "diff": "1"}, {"sha": "a" * 40, "dirty": False}, {"sha": None}]
    runs.add(0.9, c=2, more={"earlier_code": earlier})
    results.write_csv(results.read(runs.root), tmp_path / "results.csv")
    frame = results.read_csv(tmp_path / "results.csv")
    assert list(frame["earlier_code"]) == ["", "a" * 12 + " unknown"] and list(frame["dirty"]) == [False, True]
    said = results.experiment_readme(frame, "# Title\n", "the command")
    assert f"code 0123456789ab; 1 of them begun by other code ({'a' * 12}, unknown); 1 of them from a tree" in said


def test_csv_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.csv").write_text("model,seed\na,0\n")
    with pytest.raises(ValueError, match="has no column dataset"):
        results.read_csv(tmp_path / "other.csv")


# -------------------------------------------------------------------------------- mixtures


def test_other_images_under_the_same_name_are_refused(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    runs.add(0.9, fingerprint="a" * 16)
    runs.add(0.9, model=SHARED, fingerprint="b" * 16)
    assert results.main([str(runs.root)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{AE}/mnist/official/n0/s0 (aaaaaaaaaaaaaaaa)" in error and f"{SHARED}/mnist/official/n0/s0" in error
    assert not (runs.root / "report").exists()


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
    shutil.copytree(runs.add(0.9), runs.root / "copy" / "n0" / "s0")
    with pytest.raises(ValueError, match="are the same run twice"):
        results.refuse_mixtures(results.read(runs.root))


# -------------------------------------------------------------------------------- tables


def test_cell_is_mean_and_sd_over_seeds(runs: Runs) -> None:
    for seed, auroc in enumerate((0.90, 0.92, 0.97)):
        runs.add(auroc, seed=seed)
    cell = runs.table()[AE][0]
    assert cell.mean == pytest.approx(0.93) and cell.sd == pytest.approx(np.std([0.90, 0.92, 0.97], ddof=1))
    assert "0.930 ± 0.036 |" in results.markdown(results.sections(results.read(runs.root)))


def test_missing_seeds_and_classes_show_in_the_cell_and_the_mean(runs: Runs) -> None:
    for seed in range(3):
        for c in range(10):
            if (seed, c) != (1, 4):
                runs.add(0.9 + 0.01 * seed, c=c, seed=seed)
    runs.add(0.8, model=SHARED, c=2)
    table = runs.table()
    assert results._cell_text(table[AE][4]) == "0.910 ± 0.014 (2/3)"
    assert results._cell_text(table[SHARED][2]) == "0.800 (1/3)"
    assert results._cell_text(table[SHARED][3]) == "0/3"
    assert results._cell_text(table[AE]["mean"]).endswith("(29/30 runs)")
    assert results._cell_text(table[SHARED]["mean"]) == "0.800 (1/10 classes)"


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


def test_published_figure_and_difference_stand_beside_ours(runs: Runs) -> None:
    for c in range(10):
        runs.add(0.98, model=SHARED, c=c)
    table = runs.table()[SHARED]
    assert table[0].published == results.Published(0.986, "verified", "", table[0].published.source)
    assert table[0].difference == pytest.approx(0.98 - 0.986)
    assert table[7].published is None  # lost in the paper's text
    assert table["mean"].published[:3] == (0.989, "verified", "split not stated, likely official")
    assert table["mean"].difference == pytest.approx(0.98 - 0.989)
    text = results.markdown(results.sections(results.read(runs.root)))
    assert "published (verified, full size)" in text and "*−0.006*" in text
    assert "_small are a reduced size" in text


def test_full_size_is_not_called_reduced(runs: Runs) -> None:
    runs.add(0.98, model="shared_ae")
    text = results.markdown(results.sections(results.read(runs.root)))
    assert "published (verified)" in text and "full size" not in text and "reduced" not in text


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


def test_first_published_row_of_a_cell_counts() -> None:
    # OCGAN digit 2: .948 as Jia & Liu quote it stands before .942 of other tables.
    assert results.published("ocgan", "mnist", "official")[2].value == 0.948


def test_published_table_has_no_unreadable_row() -> None:
    rows = results._published_rows()
    assert len(rows) == 892
    assert {row["status"] for row in rows} == {"verified", "secondary", "unverified"}
    assert all(0 <= float(row["value"]) <= 1 for row in rows)


def test_model_may_name_the_published_method_and_its_pretrained_features(runs: Runs) -> None:
    runs.add(0.9, model="shared_ae_printed", config={"model": {"published": "shared_ae"}})
    runs.add(0.95, model="piad", config={"model": {"pretrained": "vgg19"}})
    assert runs.table()["shared_ae_printed"][0].published.value == 0.986
    parts = results.sections(results.read(runs.root))
    lines = [line.split("|")[1].strip() for line in results.markdown(parts).splitlines() if line.startswith("|")]
    assert "*published for shared_ae (verified)*" in lines, "whose figure it is"
    block = lines.index("*with features pretrained on ImageNet*")
    assert lines.index("`shared_ae_printed`") < block < lines.index("`piad`")


def test_oracle_is_shown_on_request_with_its_gap(runs: Runs) -> None:
    runs.add(0.90, oracle=0.93)
    runs.add(0.80, seed=1)  # was not watched, so it must not enter the gap
    cell = runs.table()[AE][0]
    assert cell.oracle == 0.93 and cell.gap == pytest.approx(0.03)
    parts = results.sections(results.read(runs.root))
    assert "oracle" not in results.markdown(parts)
    assert "*0.930*" in results.markdown(parts, oracle=True) and "*+0.030*" in results.markdown(parts, oracle=True)


def test_abnormal_role_is_said(runs: Runs) -> None:
    runs.add(0.9, split="one_abnormal", role="abnormal")
    text = results.markdown(results.sections(results.read(runs.root)))
    assert "Columns: the abnormal class. All the other classes are normal." in text


# -------------------------------------------------------------------------------- differences


def test_holm_equals_the_example_by_hand() -> None:
    # sorted .005 .01 .03 .04 times 4 3 2 1: .02 .03 .06 .04, the last raised to the running maximum .06
    assert results.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert results.holm([0.6, 0.7]) == [1.0, 1.0]
    assert results.holm([]) == []


def test_significance_pairs_over_common_classes_and_seeds(runs: Runs) -> None:
    gains = [0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, -0.015]
    for c, gain in enumerate(gains):
        runs.add(0.8, c=c)
        runs.add(0.8 + gain, c=c, model=SHARED)
    runs.add(0.1, c=9)  # no partner
    [found] = results.significance(results.read(runs.root), "mnist", "official")
    # The one loss is the second smallest in size, so its rank sum is 2. Of the 2**8 choices of signs those
    # with a rank sum of at most 2 are {}, {1}, {2}: p = 2 * 3 / 256.
    assert (found.first, found.second, found.pairs, found.ties) == (AE, SHARED, 8, 0)
    assert found.difference == pytest.approx(-np.mean(gains))
    assert found.p == pytest.approx(6 / 256) and found.p_holm == found.p


def test_too_few_pairs_give_no_p_value(runs: Runs) -> None:
    for c in range(7):
        runs.add(0.9, c=c)
        runs.add(0.9 + (0.01 * c if c > 1 else 0), c=c, model=SHARED)
    [found] = results.significance(results.read(runs.root), "mnist", "official")
    assert (found.pairs, found.ties, found.p) == (7, 2, None)  # five differ
    assert "1 comparison has too few pairs" in results.markdown(results.sections(results.read(runs.root)))


def test_methods_are_not_compared_across_problems(runs: Runs) -> None:
    for c in range(8):
        runs.add(0.9, c=c)
        runs.add(0.8, c=c, changed={"split.contamination.rate": 0.1})
        runs.add(0.7 + 0.01 * c, c=c, model=SHARED, changed={"split.contamination.rate": 0.1})
    [found] = results.significance(results.read(runs.root), "mnist", "official")
    assert "rate=0.1" in found.first and "rate=0.1" in found.second


# -------------------------------------------------------------------------------- pages


@pytest.fixture
def page(runs: Runs, capsys: pytest.CaptureFixture[str]) -> Path:
    """A report over two data sets, with a class whose name must be escaped everywhere."""
    for c, name in enumerate(("cat & dog", "a|b", "<i>_x")):
        for model in (AE, SHARED):
            for seed in range(2):
                runs.add(
                    0.9 + 0.01 * c - 0.03 * seed,
                    model=model,
                    c=c,
                    seed=seed,
                    name=name,
                    dataset="npz",
                    split="official",
                )
    runs.add(0.7, dataset="cifar10")
    assert results.main([str(runs.root), "--oracle"]) == 0
    assert "npz · official" in capsys.readouterr().out
    return runs.root / "report"


def test_report_writes_every_form(page: Path) -> None:
    assert {file.name for file in page.iterdir()} == {
        *(
            "figures",
            "report.html",
            "report.md",
            "report.tex",
            "results.csv",
            "tables.csv",
            "significance.csv",
        )
    }
    for image in re.findall(r"\]\((figures/[^)]+)\)", (page / "report.md").read_text()):
        assert (page / image).read_bytes().startswith(b"\x89PNG")
    with open(page / "tables.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["class_name"] for row in rows if row["dataset"] == "npz"} == {
        "cat & dog",
        "a|b",
        "<i>_x",
        "mean",
    }


def test_html_needs_nothing_else_and_escapes(page: Path) -> None:
    text = (page / "report.html").read_text()
    assert text.count('src="data:image/png;base64,') == text.count("<img") == 3
    assert not re.search(r'(?:src|href)="(?!data:|#)', text) and "<script" not in text and "@import" not in text
    assert "cat &amp; dog" in text and "&lt;i&gt;_x" in text and "<i>_x" not in text
    assert "prefers-color-scheme: dark" in text


def test_markdown_tables_are_not_broken_by_names(page: Path) -> None:
    for block in re.findall(r"(?:^\|.*\n)+", (page / "report.md").read_text(), flags=re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


def test_latex_is_escaped_and_balanced(page: Path) -> None:
    text = (page / "report.tex").read_text()
    assert r"cat \& dog" in text and r"autoencoder\_small" in text and r"$\pm$" in text
    for begin in ("table", "tabular"):
        assert text.count(rf"\begin{{{begin}}}") == text.count(rf"\end{{{begin}}}") == 2
    assert {name: text.count(rf"\{name}") for name in ("toprule", "bottomrule")} == {
        "toprule": 2,
        "bottomrule": 2,
    }
    body = re.findall(r"\\midrule\n(.*?)\\bottomrule", text, flags=re.DOTALL)[1]
    rows = [re.sub(r"\\&", "", row).count("&") for row in body.splitlines() if row.endswith(r"\\")]
    assert set(rows) == {5}  # method, three classes, mean, seeds


def test_report_without_finished_runs_says_so(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    assert results.main([str(runs.root)]) == 2
    assert "no finished run under" in capsys.readouterr().err
    assert results.main([str(runs.root / "nowhere")]) == 2
    assert "is not a folder" in capsys.readouterr().err


# -------------------------------------------------------------------------------- experiments


@pytest.fixture
def experiment(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A sensitivity to the latent size: one run is missing, two were made before for something else."""
    members = []
    for size in (8, 16, 32):
        for c in (0, 1):
            changed = {} if size == 16 else {"model.detector.latent_size": size}
            who = {"c": c, "changed": changed}
            members.append(identity(**who))
            if (size, c) != (32, 1):
                config = {"model": {"detector": {"latent_size": size}}}
                runs.add(
                    0.9 + size / 1000,
                    config=config,
                    oracle=0.95,
                    experiment=None if size == 16 else "sizes",
                    **who,
                )
    runs.add(0.5, model="foreign", changed={"model.other": 1}, experiment="another")
    out = tmp_path / "experiments" / "sizes"
    out.mkdir(parents=True)
    (out / "notes.md").write_text("# Latent size\n\nExpected: more is better.\n")
    asked = []
    arguments = [str(runs.root), "--experiment", "sizes", "--out", str(out)]
    assert results.main(arguments, lambda name: asked.append(name) or grid(*members)) == 0
    assert asked == ["sizes"]
    assert "1 of the grid are missing" in capsys.readouterr().out
    return out


def test_experiment_holds_its_own_runs_only(experiment: Path) -> None:
    frame = results.read_csv(experiment / "results.csv")
    assert len(frame) == 5 and set(frame["model"]) == {AE}
    assert "model.other" not in frame.columns
    assert frame["model.detector.latent_size"].tolist() == [16, 16, 8, 8, 32]


def test_without_the_data_set_the_runs_recorded_under_the_name_are_reported(
    experiment: Path, runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_data(name: str) -> Any:
        raise ValueError("mnist could not be fetched")

    arguments = [str(runs.root), "--experiment", "sizes", "--out", str(tmp_path / "again")]
    assert results.main(arguments, no_data) == 0
    shown = capsys.readouterr()
    assert "only runs recorded under the name sizes" in shown.err and "of the grid" not in shown.out
    assert set(results.read_csv(tmp_path / "again" / "results.csv")["model.detector.latent_size"]) == {8, 32}
    assert results.main([*arguments, "--status"], no_data) == 2
    assert results.main([str(runs.root), "--experiment", "unheard"], no_data) == 2


def test_experiment_readme_comes_from_the_csv_alone(experiment: Path) -> None:
    frame = results.read_csv(experiment / "results.csv")
    notes = (experiment / "notes.md").read_text()
    text = (experiment / "README.md").read_text()
    assert text == results.experiment_readme(frame, notes, results.experiment_command("sizes"))
    assert text.index("Expected: more is better.") < text.index("anomaly-lab -m experiment=sizes")
    assert "oracle (best epoch on test)" in text
    for image in re.findall(r"\]\((figures/[^)]+)\)", text):
        assert (experiment / image).is_file()
    assert "AUROC against model.detector.latent_size" in text


def test_course_over_epochs_of_watched_runs_is_kept(experiment: Path) -> None:
    with open(experiment / "epochs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["epoch"], row["oracle_auroc"]) for row in rows] == [("1", "0.95"), ("2", "0.95")] * 5
    assert (experiment / "figures" / "mnist-official-epochs.png").is_file()
    assert "Test AUROC after every epoch" in (experiment / "README.md").read_text()


def test_figures_name_what_runs_share_once(runs: Runs) -> None:
    for size in (8, 16):
        runs.add(0.9, changed={"model.budget.epochs": 2, "model.detector.latent_size": size})
    [section] = results.sections(results.read(runs.root))
    short, heading = section.figures["mnist-official-classes.png"].args  # type: ignore[attr-defined]
    assert heading == "mnist · official (epochs=2)"
    assert short["label"].tolist() == [f"{AE} [latent_size=8]", f"{AE} [latent_size=16]"]


def test_experiment_is_the_same_bytes_again(experiment: Path, runs: Runs, tmp_path: Path) -> None:
    again = tmp_path / "again"
    shutil.copytree(experiment, again)
    results.main([str(runs.root), "--experiment", "sizes", "--out", str(again)], lambda name: [])
    # The runs made for something else are known from the grid alone.
    assert len(results.read_csv(again / "results.csv")) == 3
    frame = results.read_csv(experiment / "results.csv")
    results._write_experiment(frame, results.read_epochs(runs.root, frame), "sizes", again)
    for file in sorted(path for path in experiment.rglob("*") if path.is_file()):
        assert (again / file.relative_to(experiment)).read_bytes() == file.read_bytes(), file.name


def test_status_of_an_experiment_lists_what_is_missing(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    runs.add(0.9, c=0)
    runs.add(0.9, c=9)  # not of this grid
    arguments = [str(runs.root), "--status", "--experiment", "sizes"]
    assert results.main(arguments, lambda name: grid(identity(c=0), identity(c=1))) == 0
    out = capsys.readouterr().out
    assert f"missing     {AE}/mnist/official/n1/s0" in out and "n9" not in out
    assert "2 runs: 1 done, 1 missing" in out


def test_help_needs_no_heavy_import() -> None:
    code = """if True:
        import sys
        from anomaly_lab import results
        try:
            results.main(["--help"])
        except SystemExit:
            heavy = {"torch", "lightning", "pandas", "matplotlib", "scipy", "hydra", "jinja2"}
            print(sorted(heavy & set(sys.modules)))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("[]")
    assert "--experiment NAME" in done.stdout


# What only some runs have something for ---------------------------------------------------------------------------


def lines(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]


def test_kinds_of_anomaly_stand_apart_beside_the_published_figures(runs: Runs, tmp_path: Path) -> None:
    dirty = {"split.contamination.classes": [2], "split.contamination.rate": 0.01}
    kinds = {
        "auroc": {"2": 0.7, "3": 0.9},
        "seen": {"auroc": 0.7, "balanced_accuracy": 0.65},
        "unseen": {"auroc": 0.9, "balanced_accuracy": 0.85},
    }
    runs.add(0.88, model="itsr_small", changed=dirty, more={"by_kind": kinds})
    runs.add(0.95, model="itsr_small", c=1)
    frame = results.read(runs.root)
    results.write_csv(frame, tmp_path / "results.csv")
    text = results.markdown(results.sections(results.read_csv(tmp_path / "results.csv")))
    (header, _, run, published) = lines(text.split("kinds that contaminate")[1].split("\n\n")[1])
    assert header == ["method", "class", "seed", "AUROC", "seen", "unseen", "bal. acc. seen", "unseen", "epochs"]
    assert run[1:] == ["0", "0", "0.880", "0.700", "0.900", "0.650", "0.850", "2"]
    assert published == ["published (secondary, full size)", "", "", "", "", "", "0.94", "0.93", ""]
    clean = results.markdown(results.sections(frame[frame["normal_class"] == 1]))
    assert "kinds that contaminate" not in clean
    page = results.html(
        results.sections(frame), frame, {name: b"" for s in results.sections(frame) for name in s.figures}
    )
    assert "kinds that contaminate" in page and "<td>published (secondary, full size)</td>" in page


def test_published_figures_on_contaminated_data_are_found_by_what_contaminates() -> None:
    rows = [row for row in results._published_rows() if row["setting"].startswith("split.contamination")]
    assert len(rows) == 18
    for row in rows:
        problem, _, kind = row["setting"].rpartition(" ")
        found = results._published_kind(row["model"], row["dataset"], row["split"], problem, kind)
        assert found is not None and found.value == float(row["value"]) and found.status == "secondary"
    assert results._published_kind("itsr", "mnist", "official", "split.contamination.rate=0.01", "seen") is None


def test_sets_of_images_set_aside_are_shown_with_their_truth(runs: Runs, tmp_path: Path) -> None:
    sets = [
        {"name": "round 1", "images": 108, "precision": 0.25, "recall": 0.5},
        {"name": "repelled", "images": 0, "precision": None, "recall": 0.0},
    ]
    runs.add(0.9, model="itsr_small", more={"set_aside": sets})
    results.write_csv(results.read(runs.root), tmp_path / "results.csv")
    text = results.markdown(results.sections(results.read_csv(tmp_path / "results.csv")))
    _, _, first, second = lines(text.split("took for anomalies")[1].split("\n\n")[1])
    assert first[3:] == ["round 1", "108", "0.250", "0.500"] and second[3:] == ["repelled", "0", "n/a", "0.000"]


def test_the_leak_of_batch_norm_is_shown_as_no_result(runs: Runs) -> None:
    runs.add(0.6, model="ganomaly_small", metrics={"oracle_shuffled_auroc": 0.61, "oracle_sorted_auroc": 0.99})
    text = results.markdown(results.sections(results.read(runs.root)))
    assert "The last two are no results." in text
    _, _, row = lines(text.split("no results.")[1].split("\n\n")[1])
    assert row[3:] == ["0.600", "0.610", "0.990", "+0.390"]
