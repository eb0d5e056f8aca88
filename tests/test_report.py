"""Pages from finished runs: every form of them, and an experiment's."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from finished import AE, SHARED, Runs, grid, identity

from anomaly_lab import cli, grids, report, results, status

LOST = "column headers lost, read as digits 0 to 3"

# -------------------------------------------------------------------------------- lines


def test_a_mean_over_some_runs_says_so() -> None:
    assert report._mean_text(pd.Series([0.5, 0.7])) == "0.600"
    assert report._mean_text(pd.Series([0.5, math.nan, 0.7])) == "0.600 (2/3)"
    assert report._mean_text(pd.Series([math.nan])) == "n/a"


def test_published_figure_and_difference_stand_beside_ours(runs: Runs) -> None:
    for c in range(10):
        runs.add(0.98, model=SHARED, c=c)
    table = runs.table()[SHARED]
    assert table[0].published == results.Published(0.986, "verified", LOST, table[0].published.source)
    assert table[0].difference == pytest.approx(0.98 - 0.986)
    assert table[7].published is None  # lost in the paper's text
    assert table["mean"].published[:3] == (0.989, "verified", "split not stated, likely official")
    assert table["mean"].difference == pytest.approx(0.98 - 0.989)
    text = report.markdown(report.sections(results.read(runs.root)))
    assert f"published (verified, {LOST}, full size)" in text and "*−0.006*" in text
    assert "_small are a reduced size" in text


def test_a_published_figure_is_not_repeated_under_each_setting_of_its_method(runs: Runs) -> None:
    for alpha in (1, 2, 3):
        runs.add(0.98, model=SHARED, changed={"model.detector.alpha": alpha})
    runs.add(0.9, model="vae_small")
    for model in ("shared_ae_printed", "shared_ae_twin"):  # compared with one method, each with its figures below it
        runs.add(0.9, model=model, config={"model": {"published": "vae"}})
    text = report.markdown(report.sections(results.read(runs.root)))
    assert text.count("*difference*") == 6 and (text.count("*0.986*"), text.count("*0.997*")) == (1, 3)


def test_full_size_is_not_called_reduced(runs: Runs) -> None:
    runs.add(0.98, model="shared_ae")
    text = report.markdown(report.sections(results.read(runs.root)))
    assert f"published (verified, {LOST})" in text and "full size" not in text and "reduced" not in text


def test_model_may_name_the_published_method_and_its_pretrained_features(runs: Runs) -> None:
    runs.add(0.9, model="shared_ae_printed", config={"model": {"published": "shared_ae"}})
    runs.add(0.95, model="piad", config={"model": {"pretrained": "vgg19"}})
    assert runs.table()["shared_ae_printed"][0].published.value == 0.986
    parts = report.sections(results.read(runs.root))
    lines = [line.split("|")[1].strip() for line in report.markdown(parts).splitlines() if line.startswith("|")]
    assert f"*published for shared_ae (verified, {LOST})*" in lines, "whose figure it is"
    block = lines.index("*with features pretrained on ImageNet*")
    assert lines.index("`shared_ae_printed`") < block < lines.index("`piad`")


def test_oracle_is_shown_on_request_with_its_gap(runs: Runs) -> None:
    runs.add(0.90, oracle=0.93)
    runs.add(0.80, seed=1)  # was not watched, so it must not enter the gap
    cell = runs.table()[AE][0]
    assert cell.oracle == 0.93 and cell.gap == pytest.approx(0.03)
    parts = report.sections(results.read(runs.root))
    assert "oracle" not in report.markdown(parts)
    assert "*0.930*" in report.markdown(parts, oracle=True) and "*+0.030*" in report.markdown(parts, oracle=True)


def test_a_size_is_what_the_configuration_says_not_how_a_model_is_called(runs: Runs) -> None:
    runs.add(0.98, model="shared_ae_tiny", config={"size": "small", "choices": {"model": "shared_ae"}})
    runs.add(0.97, model="shared_ae_small", config={"size": "full", "choices": {"model": "shared_ae_small"}})
    text = report.markdown(report.sections(results.read(runs.root)))
    assert text.count(f"published (verified, {LOST}, full size)") == 1 and "*−0.006*" in text
    assert text.count("difference") == 1, "shared_ae_small is a method that nobody published"


def test_a_method_of_one_size_has_it_in_full_whatever_the_configuration_asks_for(runs: Runs) -> None:
    runs.add(0.9, model="kde", config={"size": "small", "choices": {"model": "kde"}})
    text = report.markdown(report.sections(results.read(runs.root)))
    assert "published (verified)" in text and "full size" not in text and "reduced" not in text


def test_abnormal_role_is_said(runs: Runs) -> None:
    runs.add(0.9, split="one_abnormal", role="abnormal")
    text = report.markdown(report.sections(results.read(runs.root)))
    assert "Columns: the abnormal class. All the other classes are normal." in text


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
    assert cli.report([str(runs.root), "--oracle"]) == 0
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
        )
    }
    for image in re.findall(r"\]\((figures/[^)]+)\)", (page / "report.md").read_text()):
        assert (page / image).read_bytes().startswith(b"\x89PNG")
    with open(page / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["class_name"] for row in rows if row["dataset"] == "npz"} == {"cat & dog", "a|b", "<i>_x"}


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
    assert cli.report([str(runs.root)]) == 2
    assert "no finished run under" in capsys.readouterr().err
    assert cli.report([str(runs.root / "nowhere")]) == 2
    assert "is not a folder" in capsys.readouterr().err


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
    assert cli.report([str(runs.root)]) == 0
    assert str(file) in capsys.readouterr().err
    for page in ("report.md", "report.html"):
        assert "is damaged" in (runs.root / "report" / page).read_text()


def test_failed_runs_are_named_in_the_report(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    runs.add(0.8, c=1)
    failed = runs.other("failure.json", json.dumps({"error": "OutOfMemory: too large", "traceback": "..."}), c=2)
    line = f"{failed.relative_to(runs.root)} failed: OutOfMemory: too large (run it again, or delete its folder)"
    assert cli.report([str(runs.root)]) == 0
    assert line in capsys.readouterr().err
    for page in ("report.md", "report.html"):
        assert line in (runs.root / "report" / page).read_text()


def test_other_images_under_the_same_name_are_refused(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    runs.add(0.9, fingerprint="a" * 16)
    runs.add(0.9, model=SHARED, fingerprint="b" * 16)
    assert cli.report([str(runs.root)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{AE}/mnist/official/n0/s0 (aaaaaaaaaaaaaaaa)" in error and f"{SHARED}/mnist/official/n0/s0" in error
    assert not (runs.root / "report").exists()


def test_code_that_only_began_a_run_is_named_and_its_uncommitted_changes_count(runs: Runs, tmp_path: Path) -> None:
    runs.add(0.9, c=1)
    earlier = [{"sha": "a" * 40, "dirty": True, "diff": "1"}, {"sha": "a" * 40, "dirty": False}, {"sha": None}]
    runs.add(0.9, c=2, more={"earlier_code": earlier})
    results.write_csv(results.read(runs.root), tmp_path / "results.csv")
    frame = results.read_csv(tmp_path / "results.csv")
    assert list(frame["earlier_code"]) == ["", "a" * 12 + " unknown"] and list(frame["dirty"]) == [False, True]
    said = report.experiment_readme(frame, "# Title\n", "the command")
    assert f"code 0123456789ab; 1 of them begun by other code ({'a' * 12}, unknown); 1 of them from a tree" in said
    frame["earlier_code"] = frame["git_sha"]
    assert "begun by" not in report.experiment_readme(frame, "# Title\n", "the command"), "its own code is no other"


@pytest.mark.parametrize("other", ["--status", "--prune", "--scores=x.npz", "--submission=x.json"])
def test_a_place_for_a_report_is_refused_where_none_is_written(
    runs: Runs, other: str, capsys: pytest.CaptureFixture[str]
) -> None:
    runs.add(0.9)
    assert cli.report([str(runs.root), "--out", str(runs.root / "x"), other]) == 2
    assert f"and {other.partition('=')[0]} writes none: leave one out" in capsys.readouterr().err


def test_figures_name_what_runs_share_once(runs: Runs) -> None:
    for size in (8, 16):
        runs.add(0.9, changed={"model.budget.epochs": 2, "model.detector.latent_size": size})
    [section] = report.sections(results.read(runs.root))
    short, heading = section.figures["mnist-official-classes.png"].args  # type: ignore[attr-defined]
    assert heading == "mnist · official (epochs=2)"
    assert short["label"].tolist() == [f"{AE} [latent_size=8]", f"{AE} [latent_size=16]"]


def test_help_needs_no_heavy_import() -> None:
    code = """if True:
        import sys
        from anomaly_lab import cli, report, results, tables
        try:
            cli.report(["--help"])
        except SystemExit:
            heavy = {"torch", "lightning", "pandas", "matplotlib", "scipy", "hydra", "jinja2"}
            print(sorted(heavy & set(sys.modules)))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("[]")
    assert "--experiment NAME" in done.stdout


# -------------------------------------------------------------------------------- experiments


@pytest.fixture
def experiment(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    """A sensitivity to the latent size: one run is missing, two were made before for something else."""
    members = []
    for size in (8, 16, 32):
        for c in (0, 1):
            changed = {} if size == 16 else {"model.detector.latent_size": size}
            who = {"c": c, "changed": changed}
            members.append(identity(**who))
            if (size, c) != (32, 1):
                runs.add(
                    0.9 + size / 1000,
                    config={"model": {"detector": {"latent_size": size}}},
                    oracle=0.95,
                    experiment=None if size == 16 else "sizes",
                    **who,
                )
    runs.add(0.5, model="foreign", changed={"model.other": 1}, experiment="another")
    out = tmp_path / "experiments" / "sizes"
    out.mkdir(parents=True)
    (out / "notes.md").write_text("# Latent size\n\nExpected: more is better.\n")
    asked = []
    monkeypatch.setattr(grids, "expected_runs", lambda name: asked.append(name) or grid(*members))
    assert cli.report([str(runs.root), "--experiment", "sizes", "--out", str(out)]) == 0
    assert asked == ["sizes"]
    assert "1 of the grid are missing" in capsys.readouterr().out
    return out


def test_experiment_holds_its_own_runs_only(experiment: Path) -> None:
    frame = results.read_csv(experiment / "results.csv")
    assert len(frame) == 5 and set(frame["model"]) == {AE}
    assert "model.other" not in frame.columns
    assert frame["model.detector.latent_size"].tolist() == [16, 16, 8, 8, 32]


def test_without_the_data_set_the_runs_recorded_under_the_name_are_reported(
    experiment: Path,
    runs: Runs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def no_data(name: str) -> Any:
        raise ValueError("mnist could not be fetched")

    arguments = [str(runs.root), "--experiment", "sizes", "--out", str(tmp_path / "again")]
    monkeypatch.setattr(grids, "expected_runs", no_data)
    assert cli.report(arguments) == 0
    shown = capsys.readouterr()
    assert "only runs recorded under the name sizes" in shown.err and "of the grid" not in shown.out
    assert set(results.read_csv(tmp_path / "again" / "results.csv")["model.detector.latent_size"]) == {8, 32}
    assert cli.report([*arguments, "--status"]) == 2
    assert cli.report([str(runs.root), "--experiment", "unheard"]) == 2


def test_experiment_readme_comes_from_the_csv_alone(experiment: Path) -> None:
    frame = results.read_csv(experiment / "results.csv")
    notes = (experiment / "notes.md").read_text()
    text = (experiment / "README.md").read_text()
    assert text == report.experiment_readme(frame, notes, report.experiment_command("sizes"))
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


def test_more_courses_than_can_be_told_apart_are_not_drawn(experiment: Path) -> None:
    frame = results.read_csv(experiment / "results.csv")
    for count, drawn in ((16, True), (17, False)):
        many = pd.concat([frame.iloc[[0]].assign(model=f"m{i}", label=f"m{i}", changed="") for i in range(count)])
        [section] = report.sections(many.reset_index(drop=True))
        assert ("mnist-official-epochs.png" in section.figures) == drawn


def test_experiment_is_the_same_bytes_again(
    experiment: Path, runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = tmp_path / "again"
    shutil.copytree(experiment, again)
    monkeypatch.setattr(grids, "expected_runs", lambda name: [])
    cli.report([str(runs.root), "--experiment", "sizes", "--out", str(again)])
    # The runs made for something else are known from the grid alone.
    assert len(results.read_csv(again / "results.csv")) == 3
    frame = results.read_csv(experiment / "results.csv")
    report._write_experiment(frame, results.read_epochs(runs.root, frame), "sizes", again)
    for file in sorted(path for path in experiment.rglob("*") if path.is_file()):
        assert (again / file.relative_to(experiment)).read_bytes() == file.read_bytes(), file.name


# ----------------------------------------------------------------- what only some runs have something for


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
    text = report.markdown(report.sections(results.read_csv(tmp_path / "results.csv")))
    (header, _, run, published) = lines(text.split("kinds that contaminate")[1].split("\n\n")[1])
    assert header == ["method", "class", "seed", "AUROC", "seen", "unseen", "bal. acc. seen", "unseen", "epochs"]
    assert run[1:] == ["0", "0", "0.880", "0.700", "0.900", "0.650", "0.850", "2"]
    assert published == ["published (secondary, full size)", "", "", "", "", "", "0.94", "0.93", ""]
    clean = report.markdown(report.sections(frame[frame["normal_class"] == 1]))
    assert "kinds that contaminate" not in clean
    page = report.html(report.sections(frame), frame, {name: b"" for s in report.sections(frame) for name in s.figures})
    assert "kinds that contaminate" in page and "<td>published (secondary, full size)</td>" in page


def test_sets_of_rejected_training_images_are_shown_with_their_truth(runs: Runs, tmp_path: Path) -> None:
    sets = [
        {"name": "round 1", "images": 108, "precision": 0.25, "recall": 0.5},
        {"name": "repelled", "images": 0, "precision": None, "recall": 0.0},
    ]
    runs.add(0.9, model="itsr_small", more={"rejected_images": sets})
    results.write_csv(results.read(runs.root), tmp_path / "results.csv")
    text = report.markdown(report.sections(results.read_csv(tmp_path / "results.csv")))
    _, _, first, second = lines(text.split("took for anomalies")[1].split("\n\n")[1])
    assert first[3:] == ["round 1", "108", "0.250", "0.500"] and second[3:] == ["repelled", "0", "n/a", "0.000"]


def test_the_leak_of_batch_norm_is_shown_as_no_result(runs: Runs) -> None:
    leak = {"oracle_shuffled_auroc": 0.61, "oracle_sorted_auroc": 0.97, "oracle_sorted_best_auroc": 0.99}
    runs.add(0.6, model="ganomaly_small", metrics=leak, oracle=0.7)
    runs.add(0.8, model="ganomaly_small", metrics=leak, oracle=0.8, c=9)
    runs.add(0.9, model="ede_small", metrics=dict(list(leak.items())[:2]))  # not watched
    runs.add(0.9, model="knn", metrics={"oracle_shuffled_auroc": 0.9, "oracle_sorted_auroc": 0.9})  # no batch norm
    text = report.markdown(report.sections(results.read(runs.root)))
    assert "None but the first is a result." in text
    _, _, ede, mean, *both = lines(text.split("is a result.")[1].split("\n\n")[1])
    assert ede[3:] == ["0.900", "", "0.610", "0.970", "", "+0.070"]
    assert mean[1:] == ["mean of 2", "", "0.700", "0.750", "0.610", "0.970", "0.990", "+0.290"]
    assert [row[3:] for row in both] == [
        ["0.600", "0.700", "0.610", "0.970", "0.990", "+0.390"],
        ["0.800", "0.800", "0.610", "0.970", "0.990", "+0.190"],
    ]


def test_what_a_choice_of_the_setting_by_test_labels_adds_is_shown_as_no_result(runs: Runs) -> None:
    for gamma, first, second in ((None, 0.6, 0.7), (0.1, 0.9, 0.4), (0.2, 0.7, 0.8)):
        changed = {"model.detector.gamma": gamma} if gamma else {}
        runs.add(first, model="ocsvm", changed=changed)
        runs.add(second, model="ocsvm", changed=changed, c=8)
    runs.add(0.99, model="ocsvm", changed={"model.detector.gamma": 0.1}, c=9)  # not of all settings
    runs.add(0.5, model="knn")
    for epochs in (1, 2):
        runs.add(0.3 * epochs, model="ede_small", changed={"model.budget.epochs": epochs})  # without the shipped one
        runs.add(0.5, model="vae_small", changed={"model.budget.epochs": epochs}, c=epochs)  # of no class in common
    lines = report.markdown(report.sections(results.read(runs.root))).splitlines()
    head = lines.index("| method | settings | classes | shipped | best for all | best for each | each - shipped |")
    assert "neither is a result" in lines[head - 2]
    assert lines[head + 2 : head + 5] == [
        "| `ede_small` | 2 | 1 |  | 0.600 | 0.600 |  |",
        "| `ocsvm` | 3 | 2 | 0.650 | 0.750 | 0.850 | +0.200 |",
        "",
    ]


def test_settings_on_contaminated_data_are_compared_among_themselves(runs: Runs) -> None:
    for rate in (0.01, 0.05):
        runs.add(0.6, model="knn", changed={"split.contamination.rate": rate})
        runs.add(0.8, model="knn", changed={"split.contamination.rate": rate, "model.detector.k": 1})
    text = report.markdown(report.sections(results.read(runs.root)))
    for rate in ("0.01", "0.05"):
        assert f"| `knn [split.contamination.rate={rate}]` | 2 | 1 | 0.600 | 0.800 | 0.800 | +0.200 |" in text


def test_the_page_says_what_called_an_image_anomalous(runs: Runs) -> None:
    runs.add(0.6, model="aae_small", more={"decided_by": "own rule"})
    runs.add(0.7, model="ede_small", more={"decided_by": "held-out normals"})
    text = report.markdown(report.sections(results.read(runs.root)))
    assert "by the method's own rule by `aae_small`, else by a threshold from held-out normals alone." in text
    runs.add(0.7, model="ede_small", seed=1)  # of code that did not record it
    text = report.markdown(report.sections(results.read(runs.root)))
    assert "by its method's own rule where its paper has one (of training errors), else by" in text


@pytest.mark.parametrize("words", [[], ["--status"]], ids=["tables", "status"])
def test_a_reader_that_leaves_after_the_first_line_costs_nothing(runs: Runs, words: list[str]) -> None:
    for seed in range(40):
        runs.add(0.9, seed=seed, changed={"model.detector.width": seed + 2})
    program = "import sys; from anomaly_lab.cli import report; sys.exit(report())"
    command = [sys.executable, "-c", program, str(runs.root), *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait() == cli.DONE
    assert (runs.root / "report/report.html").exists() == (not words)


def test_a_report_takes_away_what_a_killed_one_left(runs: Runs) -> None:
    runs.add(0.9)
    left = runs.root / "report/figures/.x.png.0123abcd.part"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    os.utime(left, (0, 0))
    assert cli.report([str(runs.root)]) == cli.DONE
    assert not left.exists()
