"""Files that somebody else made: bombs, pipes, false checksums, names that a page or a spreadsheet would run."""

from __future__ import annotations

import csv
import json
import os
import re
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Command
from finished import Runs
from PIL import Image

from anomaly_lab import cli, files, pictures, predict, record, results, status
from anomaly_lab.build import load_checkpoint
from anomaly_lab.datasets import NPZ, ImageFolder
from anomaly_lab.images import Images
from anomaly_lab.pictures import open_image

# Bombs ----------------------------------------------------------------------------------------------------------------


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    Image.new("1", (16384, 8192)).save(path)
    assert path.stat().st_size < 200_000
    with pytest.raises(ValueError, match=r"bomb\.png cannot be read \(it has 16384x8192 pixels, more than 67,"):
        open_image(path, str(path), 1, 8)


def test_an_image_of_as_many_pixels_as_there_may_be_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MOST_PIXELS", 64)
    Image.new("L", (8, 8), 7).save(tmp_path / "x.png")
    assert open_image(tmp_path / "x.png", "x.png", 1).shape == (1, 8, 8)
    Image.new("L", (8, 9), 7).save(tmp_path / "x.png")
    with pytest.raises(ValueError, match="8x9 pixels"):
        open_image(tmp_path / "x.png", "x.png", 1)


def test_an_npz_that_unpacks_to_far_more_than_it_is_is_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "bomb.npz"
    np.savez_compressed(path, images=np.zeros((150_000, 1, 32, 32), np.uint8))
    with pytest.raises(ValueError, match=r"bomb\.npz is damaged or unreadable \(its 0\.\d MB unpack to 154 MB\)"):
        NPZ(data_dir=tmp_path, name="bomb", path=path).load()


def test_an_npz_of_noise_is_no_bomb_whatever_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).integers(0, 256, 10_000, np.uint8)
    np.savez_compressed(tmp_path / "noise.npz", noise=noise)
    files.refuse_bomb(tmp_path / "noise.npz", most=1.1)


def test_a_checkpoint_that_unpacks_to_more_than_it_is_is_not_unpacked(tmp_path: Path) -> None:
    torch.save({"state_dict": {"weight": torch.zeros(30_000_000)}}, tmp_path / "plain.ckpt")
    load_checkpoint(tmp_path / "plain.ckpt")
    bomb = tmp_path / "bomb.ckpt"
    with zipfile.ZipFile(tmp_path / "plain.ckpt") as plain, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    assert bomb.stat().st_size < 200_000
    with pytest.raises(ValueError, match=r"bomb\.ckpt is damaged \(ValueError: its 0\.1 MB unpack to 120 MB\)"):
        load_checkpoint(bomb)


def test_a_tensor_that_repeats_one_number_is_no_weight(tmp_path: Path) -> None:
    torch.save({"state_dict": {"bank": torch.zeros(1).expand(10**9)}}, tmp_path / "bomb.ckpt")
    with pytest.raises(ValueError, match=r"bank has 1000000000 numbers, of which it holds a part only"):
        load_checkpoint(tmp_path / "bomb.ckpt")


# Pipes: reading one would block indefinitely --------------------------------------------------------------------------


def test_pipes_are_no_images(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(ValueError, match="no images"):
        predict.image_files([tmp_path])
    with pytest.raises(ValueError, match="neither a file nor a folder"):
        predict.image_files([tmp_path / "x.png"])
    (tmp_path / "folder/class").mkdir(parents=True)
    os.mkfifo(tmp_path / "folder/class/x.png")
    with pytest.raises(ValueError, match=r"x\.png cannot be read \(it is no file\)"):
        ImageFolder(data_dir=tmp_path, name="pipes", path=tmp_path / "folder").decode()


def test_pipes_are_no_files_of_a_run(tmp_path: Path) -> None:
    folder = tmp_path / "ede/digits/pooled/n0/s0"
    folder.mkdir(parents=True)
    for name in (".lock", "result.json", "data.npz", "last.ckpt"):
        os.mkfifo(folder / name)
    assert not files.is_locked(folder / ".lock")
    for read in (
        lambda: record.read(folder),
        lambda: load_checkpoint(folder / "last.ckpt"),
        NPZ(data_dir=tmp_path, name="x", path=folder / "data.npz").load,
    ):
        with pytest.raises(ValueError, match="it is no file"):
            read()
    assert [found.state for found in status.under(tmp_path)] == ["damaged"]


# Names ----------------------------------------------------------------------------------------------------------------


def test_an_npz_cannot_claim_the_checksum_of_other_images(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 1, 8, 8), np.uint8)
    labels, is_test, names = np.arange(30) % 3, np.zeros(30, np.bool_), np.array(["a", "b", "c"])
    honest = Images.canonical(pixels, labels, is_test, ("a", "b", "c"), name="x")
    own = {"images": honest.pixels, "labels": honest.labels, "is_test": is_test, "class_names": names}
    reader = NPZ(data_dir=tmp_path, name="x", path=tmp_path / "x.npz")
    np.savez(tmp_path / "x.npz", **own, sha256=np.array(honest.sha256))
    assert reader.load().sha256 == honest.sha256
    np.savez(tmp_path / "x.npz", **(own | {"images": 255 - honest.pixels}), sha256=np.array(honest.sha256))
    with pytest.raises(ValueError, match=rf"x\.npz is damaged \(sha256 [0-9a-f]+, recorded {honest.sha256}\)"):
        reader.load()


@pytest.mark.parametrize("words", ["model=../dataset/digits", "split=../model/ede", "experiment=../train"])
def test_a_choice_that_leaves_its_folder_is_refused(lab: Command, words: str) -> None:
    code, out, err = lab(words)
    assert code == cli.MISTAKE and out == "" and err.splitlines()[-1].startswith("anomaly-lab: error: ")
    assert "Traceback" not in err


HOSTILE = "<script>alert(1)</script>"


def test_a_report_runs_nothing_that_a_result_says(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    hostile = HOSTILE.replace("/", "")
    config = {"choices": {"model": hostile}, "model": {"pretrained": HOSTILE}}
    device = {"device": HOSTILE, "git": {"sha": HOSTILE, "dirty": False}}
    changed = {"model.x": "`<img src=x>"}
    for seed in (0, 1, 2):
        who = {"model": hostile, "dataset": hostile, "split": hostile, "changed": changed, "seed": seed}
        runs.add(0.9, name=HOSTILE, experiment=HOSTILE, config=config, more=device, **who)
    runs.other("failure.json", json.dumps({"error": HOSTILE}), seed=8)
    assert cli.report([str(runs.root)]) == cli.DONE
    page = (runs.root / "report/report.md").read_text()
    assert "script" in page and not re.search(r"(?<!\\)<(?!/?(details|summary)>)", page)
    html = (runs.root / "report/report.html").read_text()
    assert "alert(1)" in html and "<script" not in html and "<img src=x" not in html


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(1)", "\tx"])
def test_a_spreadsheet_computes_nothing_that_a_result_says(runs: Runs, tmp_path: Path, text: str) -> None:
    runs.add(0.9, name=text)
    frame = results.read(runs.root)
    results.write_csv(frame, tmp_path / "results.csv")
    with open(tmp_path / "results.csv", newline="") as file:
        [row] = csv.DictReader(file)
    assert row["class_name"] == f"'{text}" and row["auroc"] == "0.9"
    assert results.read_csv(tmp_path / "results.csv")["class_name"].tolist() == [text]


def test_negative_numbers_are_no_formulas(tmp_path: Path) -> None:
    results.write_rows(tmp_path / "x.csv", ["a"], [[-0.5], [-3], [[-1, 1]]])
    assert (tmp_path / "x.csv").read_text() == 'a\n-0.5\n-3\n"[-1,1]"\n'


def test_a_file_whose_name_is_a_formula_is_text_among_the_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fitted: Any = SimpleNamespace(
        read=lambda some, broken: some,
        score=lambda images: np.zeros(len(images)),
        decisions=lambda images, scores: None,
    )
    predict.score_files(fitted, [Path("=cmd.png")], tmp_path / "scores.csv")
    assert (tmp_path / "scores.csv").read_text() == "image,score,decision\n'=cmd.png,0,\n"
