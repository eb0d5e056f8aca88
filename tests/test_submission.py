"""Scores in one archive, and submissions that are held to them: what is written, what is refused, in which words."""

from __future__ import annotations

import copy
import csv
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from anomaly_lab import archive, cli, config, metrics, record, results, submission
from anomaly_lab.run import run

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
CLASSES = 3


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Two seeds of the mean image and one of k-NN on three classes of noise; their archive and submissions."""
    folder = tmp_path_factory.mktemp("submission")
    drawn = np.random.RandomState(0)
    labels = np.repeat(np.arange(CLASSES), 60)
    images = drawn.randint(0, 120, (len(labels), 1, 8, 8)) + 40 * labels[:, None, None, None]
    np.savez(
        folder / "own.npz",
        images=images.astype(np.uint8),
        labels=labels,
        is_test=np.arange(len(labels)) % 3 == 0,
        class_names=np.array(["a", "b", "c"]),
    )
    own = ["dataset=npz", "dataset.name=own", f"dataset.path={folder / 'own.npz'}", f"data_dir={folder}"]
    rest = [f"runs={folder / 'runs'}", "split=official", "split.val_share=0.5", "logger=none", "trainer.progress=false"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("anomaly_lab.run._code", lambda: {"sha": "a" * 40, "dirty": False, "diff": None})
        for model, seed in (("mean_image", 0), ("mean_image", 1), ("knn", 0)):
            for number in range(CLASSES):
                run(config.compose([f"model={model}", *own, *rest, f"normal_class={number}", f"seed={seed}"]))
    runs = folder / "runs"
    assert cli.report([str(runs), "--scores", str(folder / "scores.npz")]) == 0
    for model in ("mean_image", "knn"):
        assert cli.report([str(runs / model / "own/official"), "--submission", str(folder / f"{model}.json")]) == 0
    return SimpleNamespace(folder=folder, runs=runs, scores=folder / "scores.npz")


def path_of(model: str, number: int, seed: int, runs: Path) -> str:
    [found] = runs.glob(f"{model}/own/official/n{number}/s{seed}*")
    return found.relative_to(runs).as_posix()


# Scores -------------------------------------------------------------------------------------------------------------


def test_an_archive_has_the_frame_and_the_arrays_of_the_runs(made: SimpleNamespace, tmp_path: Path) -> None:
    kept, read = archive.Archive(made.scores), results.read(made.runs)
    for frame, name in ((kept.frame, "kept.csv"), (read, "read.csv")):
        results.write_csv(frame, tmp_path / name)
    assert (tmp_path / "kept.csv").read_bytes() == (tmp_path / "read.csv").read_bytes()
    for run_ in read.itertuples():
        arrays = kept.scores(run_.path)
        with np.load(made.runs / run_.path / "scores.npz") as written:
            assert set(archive.ARRAYS) - {"decided"} == set(arrays)
            for name, values in arrays.items():
                assert values.dtype == written[name].dtype and np.array_equal(values, written[name])
        assert metrics.auroc(arrays["score"], arrays["truth"]) == run_.auroc


def test_an_archive_shares_what_is_the_same_and_is_the_same_for_the_same_runs(made, tmp_path) -> None:
    cli.report([str(made.runs), "--scores", str(tmp_path / "again.npz")])
    assert (tmp_path / "again.npz").read_bytes() == made.scores.read_bytes()
    with np.load(made.scores) as plain:  # without this package
        members = [name.partition("/")[0] for name in plain.files if name != "rows.json"]
        entries = json.loads(bytes(plain["rows.json"]))["entries"]
        entry = entries[0]
        score, truth = (plain[entry["arrays"][name]] for name in ("score", "truth"))
    assert metrics.auroc(score, truth) == entry["row"]["auroc"]
    assert members.count("score") == len(entries) == 9 and members.count("truth") == CLASSES
    assert members.count("label") == members.count("index") == 1, "one test half"


def test_what_is_no_archive_or_a_damaged_one_is_said(made, tmp_path) -> None:
    with pytest.raises(ValueError, match="has no run nothing"):
        archive.Archive(made.scores).scores("nothing")
    (tmp_path / "x.npz").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"x\.npz is no archive of scores"):
        archive.Archive(tmp_path / "x.npz")
    first = path_of("knn", 0, 0, made.runs)
    changed = altered(made.scores, tmp_path / "y.npz", first)
    with pytest.raises(ValueError, match="others than the run wrote"):
        archive.Archive(changed).scores(first)


def altered(source: Path, to: Path, path: str) -> Path:
    """A copy of an archive in which the first score of a run is another."""
    member = archive.Archive(source).entries[path]["arrays"]["score"] + ".npy"
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(to, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, content[:-1] + bytes([content[-1] ^ 64]) if name == member else content)
    return to


@pytest.mark.parametrize("file", sorted(EXPERIMENTS.glob("*/scores.npz")), ids=lambda file: file.parent.name)
def test_committed_scores_give_the_digits_of_the_table_beside_them(file: Path) -> None:
    """Rows of results.csv, which may have more than had their scores, computed anew."""
    kept = archive.Archive(file)
    with open(file.parent / "results.csv", newline="", encoding="utf-8") as table:
        rows = {row["path"]: row for row in csv.DictReader(table)}
    assert kept.entries and set(kept.entries) <= set(rows)
    for path, entry in kept.entries.items():
        row, arrays = rows[path], kept.scores(path)
        for name in ("fingerprint", "settings", "git_sha"):
            assert entry["row"][name] == row[name], path
        found = record.of_scores(arrays, entry["threshold_quantile"])
        for name in ("auroc", "auroc_low", "auroc_high", "average_precision", "fpr95", "balanced_accuracy", "f1"):
            assert results.csv_cell(found[name]) == row[name], (path, name)


def test_the_page_names_the_tables_whose_scores_are_here_and_the_others() -> None:
    page = (EXPERIMENTS.parent / "docs/scores.md").read_text()
    for table in sorted(EXPERIMENTS.glob("*/results.csv")):
        name = table.parent.name
        linked = f"[{name}](../experiments/{name}/scores.npz)"
        assert f"`{name}`" in page or linked in page, name
        assert (linked in page) == (table.parent / "scores.npz").exists(), name


# Submissions --------------------------------------------------------------------------------------------------------


def test_a_submission_is_verified_against_runs_and_against_an_archive(made, capsys) -> None:
    files = [str(made.folder / f"{model}.json") for model in ("mean_image", "knn")]
    for source in (["--runs", str(made.runs)], ["--scores", str(made.scores)]):
        assert cli.check_submission([*files, *source]) == 0
        first, second = capsys.readouterr().out.splitlines()
        assert "mean_image [split.val_share=0.5] on own · official" in first and "3 classes × 2 seeds: veri" in first
        assert second.endswith("3 classes × 1 seed [single seed]: verified")
    assert cli.check_submission(files) == 0
    assert capsys.readouterr().out.count("held to no scores") == 2


def test_a_table_of_submissions_is_the_table_of_the_runs(made, tmp_path) -> None:
    contents = [submission.read(made.folder / f"{model}.json") for model in ("mean_image", "knn")]
    results.write_csv(submission.frame(contents), tmp_path / "submitted.csv")
    results.write_csv(results.read(made.runs), tmp_path / "read.csv")
    assert (tmp_path / "submitted.csv").read_bytes() == (tmp_path / "read.csv").read_bytes()
    assert contents[0]["auroc"] == pytest.approx(results.read(made.runs / "mean_image/own/official")["auroc"].mean())


def of(content: dict[str, Any], number: int, seed: int) -> dict[str, Any]:
    [found] = [
        run for run in content["runs"] if (run["identity"]["normal_class"], run["identity"]["seed"]) == (number, seed)
    ]
    return found


def only(**wanted: int) -> Callable[[dict[str, Any]], None]:
    """Leave only some runs, and a head that says so."""

    def edit(content: dict[str, Any]) -> None:
        kept = [run for run in content["runs"] if all(run["identity"][key] == wanted[key] for key in wanted)]
        content |= submission.summary(kept)

    return edit


def without(number: int, seed: int) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["runs"].remove(of(content, number, seed))


def better(content: dict[str, Any]) -> None:
    of(content, 1, 0)["row"]["auroc"] = 0.987654321
    content |= submission.summary(content["runs"])


def another(key: str, value: object, *, row: bool = False) -> Callable[[dict[str, Any]], None]:
    def edit(content: dict[str, Any]) -> None:
        run = of(content, 1, 0)
        (run["row"] if row else run)[key] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (another("split_version", 2), "mixes protocols (split_version 1 and 2)"),
        (another("images", "f" * 64), "mixes protocols (images"),
        (another("changed", "", row=True), "mixes protocols (problem split.val_share=0.5 and no changed key)"),
        (another("classes", None, row=True), "mixes protocols (classes 3 and unknown)"),
        (another("split", "pooled", row=True), "mixes protocols (split official and pooled)"),
        (another("model", "knn", row=True), "is not the run that its identity names"),
        (another("path", "elsewhere", row=True), "elsewhere has the identity of mean_image/own/official/n1/s0-"),
        (another("seed", 1, row=True), "is not the run that its identity names"),
        (without(2, 1), "seed 1 has class 2 is missing: run the others"),
        (only(normal_class=1), "seed 0 has 1 of 3 classes: run the others"),
        (lambda content: content.update(single_seed=True), "says single_seed true, its runs say false"),
        (lambda content: (only(seed=0)(content), content.update(single_seed=False)), "a single seed and is not marked"),
        (another("dirty", True, row=True), "says dirty false, its runs say true"),
        (another("auroc", 0.99, row=True), "says auroc"),
        (lambda content: content.update(schema=2), "schema 2, this code reads 1"),
        (lambda content: content.pop("runs"), "is no submission (KeyError: 'runs')"),
        (lambda content: content.update(runs=[]), "holds no runs"),
        (better, "says auroc 0.987654321, its"),
        (another("fingerprint", "0" * 16, row=True), "has fingerprint 0000000000000000, its scores"),
        (another("scores_sha256", "0" * 64), "was made of other scores: their checksums differ"),
        (another("f1", 0.5, row=True), "says f1 0.5, its"),
        (another("epochs", 7, row=True), "says epochs 7, its run 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_accident_is_refused_in_a_line(made, tmp_path, capsys, edit, said) -> None:
    content = json.loads((made.folder / "mean_image.json").read_text())
    edit(content)
    (tmp_path / "edited.json").write_text(json.dumps(content))
    for source in (["--runs", str(made.runs)], ["--scores", str(made.scores)]):
        assert cli.check_submission([str(tmp_path / "edited.json"), *source]) == cli.FAILED
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1 and "edited.json" in err


def test_a_single_seed_that_is_marked_is_sound_and_a_head_follows_from_its_runs(made) -> None:
    content = json.loads((made.folder / "mean_image.json").read_text())
    one = copy.deepcopy(content)
    only(seed=0)(one)
    submission.refuse_unsound(one, "one seed")
    assert one["single_seed"] and not content["single_seed"] and content["seeds"] == [0, 1]
    assert "[single seed]" in submission.line(one)


def test_runs_of_several_methods_or_with_holes_are_not_written(made, tmp_path, capsys) -> None:
    out = tmp_path / "all.json"
    assert cli.report([str(made.runs), "--submission", str(out)]) == cli.MISTAKE
    assert "give a file to each method" in capsys.readouterr().err and not out.exists()
    shutil.copytree(made.runs / "knn", tmp_path / "runs/knn")
    shutil.rmtree(tmp_path / "runs" / path_of("knn", 1, 0, made.runs))
    assert cli.report([str(tmp_path / "runs"), "--submission", str(out)]) == cli.MISTAKE
    assert "2 of 3 classes" in capsys.readouterr().err and not out.exists()
    assert cli.check_submission([str(made.folder / "knn.json"), "--runs", str(tmp_path / "runs")]) == cli.FAILED
    assert "has no run knn/own/official/n1/s0" in capsys.readouterr().err
    below = str(made.runs / "knn/own")  # the folder that a submission is of, in the place of the one of all runs
    assert cli.check_submission([str(made.folder / "knn.json"), "--runs", below]) == cli.DONE


def test_a_result_that_was_edited_after_the_run_does_not_found_a_submission(made, tmp_path, capsys) -> None:
    shutil.copytree(made.runs / "knn", tmp_path / "knn")
    result = tmp_path / path_of("knn", 1, 0, made.runs) / "result.json"
    content = json.loads(result.read_text())
    content["metrics"]["auroc"] = 0.987654
    result.write_text(json.dumps(content))
    assert cli.report([str(tmp_path), "--submission", str(tmp_path / "knn.json")]) == cli.MISTAKE
    assert "says auroc 0.987654, its scores say" in capsys.readouterr().err


def test_submissions_of_one_protocol_saw_the_same_images(made, tmp_path, capsys) -> None:
    content = json.loads((made.folder / "knn.json").read_text())
    for entry in content["runs"]:
        entry["row"]["fingerprint"] = "0" * 16
    (tmp_path / "other.json").write_text(json.dumps(content))
    assert cli.check_submission([str(made.folder / "mean_image.json"), str(tmp_path / "other.json")]) == cli.FAILED
    assert "saw different images under the same data set, split, class and seed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"f1": ', '"f1": NaN, "f2": ', "a number is NaN"),
        ('"f1": ', '"f1": 1e999, "f2": ', "a number is 1e999"),
        ('"seed": ', '"seed": 0, "seed": ', "a key is there twice: 'seed'"),
        ('"f1": ', f'"f1": {10**60}, "f2": ', "f1 is 1000000000"),
        ('"epochs": 0', f'"epochs": {10**60}', "epochs is 1000000000"),
        ('"epochs": 0', '"epochs": ' + "1" * 5000, "is no submission (ValueError: Exceeds the limit"),
        ('"epochs": 0', '"epochs": true', "epochs is True"),
        ('"class_name": "', '"class_name": 3, "x": "', "class_name is 3"),
        ('\n    "labels": false,', "", "says labels None, its run False"),
        ('"scores_sha256"', '"scores_sha"', "does not say its scores_sha256"),
        ('"threshold_quantile": 0.95', '"threshold_quantile": 0.5', "says threshold_quantile 0.5, its run 0.95"),
        ('"model": "mean_image"', '"model": "../mean_image"', "model is '../mean_image', which is no name"),
        ('"class_name": "', '"class_name": "\\n\\u001b[2J', "[2J"),
        ("{", "{" * 100_000, "is no submission (JSONDecodeError"),
        ("{", "[" * 100_000, "is no submission ("),
        ("{", "\udcff", "is no submission (UnicodeDecodeError"),
        ("{", "[]", "is no submission (JSONDecodeError"),
    ],
    ids=map(str, range(17)),
)
def test_what_no_run_writes_is_refused_in_a_line(made, tmp_path, capsys, old, new, said) -> None:
    text = (made.folder / "mean_image.json").read_text()
    assert old in text
    (tmp_path / "edited.json").write_bytes(text.replace(old, new).encode(errors="surrogateescape"))
    assert cli.check_submission([str(tmp_path / "edited.json"), "--scores", str(made.scores)]) == cli.FAILED
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and "edited.json" in err and "\x1b" not in err


def test_what_is_no_file_stops_no_other(made, tmp_path, capsys) -> None:
    names = [tmp_path / name for name in ("folder", "pipe", "nothing", "loop", "empty", "half", "list")]
    folder, pipe, _, loop, empty, half, listed = names
    folder.mkdir()
    os.mkfifo(pipe)
    loop.symlink_to(loop)
    empty.write_text("")
    half.write_bytes((made.folder / "knn.json").read_bytes()[:3000])
    listed.write_text("[]")
    (tmp_path / "link.json").symlink_to(made.folder / "knn.json")
    asked = [*map(str, names), str(tmp_path / "link.json")]
    assert cli.check_submission([*asked, "--runs", str(made.runs)]) == cli.FAILED
    told = capsys.readouterr()
    assert told.err.count("\n") == told.err.count("is no submission") == len(names)
    assert told.out.count("verified") == 1


# Committed ----------------------------------------------------------------------------------------------------------


def test_an_archive_gives_the_submissions_of_its_runs(made, tmp_path, capsys) -> None:
    asked = [str(made.scores), "--submission", str(tmp_path / "from scores")]
    assert cli.report(asked) == 0
    assert cli.report([str(made.runs), "--submission", str(tmp_path / "from runs")]) == 0
    files = sorted(path.name for path in (tmp_path / "from scores").iterdir())
    assert [name.rpartition("-")[0] for name in files] == ["knn-own-official", "mean_image-own-official"]
    for name in files:
        one, two = (json.loads((tmp_path / folder / name).read_text()) for folder in ("from scores", "from runs"))
        assert one == two
    capsys.readouterr()
    changed = altered(made.scores, tmp_path / "y.npz", path_of("knn", 0, 0, made.runs))
    assert cli.report([str(changed), "--submission", str(tmp_path / "others")]) == cli.MISTAKE
    assert "others than the run wrote" in capsys.readouterr().err and not (tmp_path / "others").exists()


def test_methods_with_holes_are_named_and_the_others_written(made, tmp_path, capsys) -> None:
    shutil.copytree(made.runs, tmp_path / "runs")
    shutil.rmtree(tmp_path / "runs" / path_of("knn", 1, 0, made.runs))
    asked = [str(tmp_path / "runs"), "--submission", str(tmp_path / "all")]
    assert cli.report(asked) == 0
    told = capsys.readouterr()
    assert "not written: knn [split.val_share=0.5] on own · official: seed 0 has 2 of 3 classes" in told.err
    assert told.out.count("written: ") == len(list((tmp_path / "all").iterdir())) == 1
    shutil.rmtree(tmp_path / "runs/mean_image")
    assert cli.report(asked) == cli.MISTAKE
    assert "no method has all that a submission needs" in capsys.readouterr().err


ARCHIVES = sorted(EXPERIMENTS.glob("*/scores.npz"))


def test_submissions_are_where_scores_are() -> None:
    submitted = {file.parent.parent for file in EXPERIMENTS.glob("*/submissions/*.json")}
    assert len(submitted) >= 4 and submitted <= {file.parent for file in ARCHIVES}


@pytest.mark.parametrize("file", ARCHIVES, ids=lambda file: file.parent.name)
def test_committed_submissions_are_those_of_the_archive_and_verified(file: Path, tmp_path: Path) -> None:
    """To mend it: anomaly-lab-report experiments/NAME/scores.npz --submission experiments/NAME/submissions."""
    made_now = dict(submission.write_each(submission.entries(file), tmp_path))
    kept = {path.name: json.loads(path.read_text()) for path in file.parent.glob("submissions/*.json")}
    assert kept == {path.name: json.loads(path.read_text()) for path in tmp_path.iterdir()}
    for path, said in made_now.items():
        assert (path.name in kept) != (isinstance(said, str) and "classes: run the others" in said), said


def test_a_change_that_was_planted_in_a_committed_submission_stops_the_site(tmp_path: Path) -> None:
    shutil.copytree(EXPERIMENTS / "beyond_coil100", tmp_path / "page", ignore=shutil.ignore_patterns("figures"))
    assert len(submission.read_pages(tmp_path)) == 4
    file = sorted(tmp_path.glob("page/submissions/*.json"))[0]
    content = json.loads(file.read_text())
    content["runs"][0]["row"]["auroc"] = 0.5
    content |= submission.summary(content["runs"])  # a head that agrees with it
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"knn-coil100-coil\.json: .* says auroc 0\.5, its run "):
        submission.read_pages(tmp_path)
    file.unlink()
    (tmp_path / "page/scores.npz").unlink()
    with pytest.raises(ValueError, match="is no archive of scores"):
        submission.read_pages(tmp_path)
