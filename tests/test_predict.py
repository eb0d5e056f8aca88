"""A finished run as a detector: the same scores from arrays and from files, decisions, heat maps, the command."""

from __future__ import annotations

import csv
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from trained import TINY, one_abnormal

import anomaly_lab
from anomaly_lab import cli, config, metrics, predict
from anomaly_lab.datasets import ImageFolder
from anomaly_lab.run import run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A run with a threshold (25 held-out normals), its files, and its images."""
    return one_abnormal(tmp_path_factory.mktemp("predict"))


@pytest.fixture(scope="module")
def fitted(made: SimpleNamespace) -> predict.FittedDetector:
    return anomaly_lab.load_run(made.out)


@pytest.fixture
def pngs(made: SimpleNamespace, tmp_path: Path) -> list[Path]:
    """The first test images of the run, as files in an order of names that is theirs."""
    paths = [tmp_path / "pngs" / f"{position:02d}.png" for position in range(6)]
    paths[0].parent.mkdir()
    for path, index in zip(paths, made.index, strict=False):
        Image.fromarray(made.images[index, 0]).save(path)
    return paths


@pytest.mark.parametrize(
    "layout",
    [lambda x: x, lambda x: x[:, 0], lambda x: x.transpose(0, 2, 3, 1), lambda x: x[::-1][::-1]],
    ids=["NCHW", "NHW", "NHWC", "not contiguous"],
)
def test_the_runs_own_test_images_get_the_scores_that_the_run_wrote(made, fitted, layout) -> None:
    score = fitted.score(layout(made.images[made.index]))
    assert score.dtype == np.float32
    np.testing.assert_allclose(score, made.score, rtol=1e-5, atol=1e-7)


def test_scores_are_computed_with_the_switches_of_the_run_and_leave_none_behind(made, fitted, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(
        fitted.detector,
        "score",
        lambda x: seen.append(torch.are_deterministic_algorithms_enabled()) or x.mean((1, 2, 3)),
    )
    fitted.score(made.images[:3])
    assert seen == [True] and not torch.are_deterministic_algorithms_enabled()


def test_decisions_are_those_that_the_runs_metrics_count(made, fitted) -> None:
    decided = fitted.decide(made.images[made.index])
    assert decided.dtype == np.bool_
    assert 0 < decided.sum() < len(decided)
    assert np.array_equal(decided, made.score.astype(np.float64) > fitted.threshold)
    expected = metrics.evaluate(made.score, made.truth, threshold=fitted.threshold)["recall"]
    assert expected == decided[made.truth == 1].mean() == made.result["metrics"]["recall"]


def test_a_methods_own_rule_decides_where_it_has_one(made, fitted, monkeypatch) -> None:
    monkeypatch.setattr(fitted.detector, "decide", lambda x: x.mean((1, 2, 3)) > 0.3)
    images = made.images[:300]
    bright = fitted.prepare(torch.from_numpy(images)).mean((1, 2, 3)).numpy() > 0.3
    assert np.array_equal(fitted.decide(images), bright)


def test_without_a_threshold_there_are_scores_but_no_decisions(made, fitted) -> None:
    changed = {**made.result, "metrics": {**made.result["metrics"], "threshold": None}}
    without = predict.FittedDetector(fitted.detector, fitted.prepare, changed, fitted.device)
    assert np.isfinite(without.score(made.images[:3])).all()
    with pytest.raises(ValueError, match="too few normal images for a threshold"):
        without.decide(made.images[:3])


def test_image_files_get_the_scores_of_their_pixels(made, fitted, pngs) -> None:
    images = fitted.read(pngs)
    assert np.array_equal(images, made.images[made.index[: len(pngs)]])
    np.testing.assert_allclose(fitted.score(images), made.score[: len(pngs)], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("size", [(20, 13), (5, 8), (8, 8), (300, 200)])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P"])
def test_files_of_any_size_and_colour_are_read_as_the_folder_reader_reads_them(fitted, tmp_path, size, mode) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    path = tmp_path / "all" / "class" / "image.png"
    path.parent.mkdir(parents=True)
    Image.fromarray(noise).convert(mode).save(path)
    reader = ImageFolder(data_dir=tmp_path, name="all", path=tmp_path / "all", size=8, channels=1)
    assert np.array_equal(fitted.read([path]), reader.decode().pixels)


def test_a_run_on_images_that_are_not_square_takes_files_of_their_size_only(made, fitted, tmp_path) -> None:
    oblong = predict.FittedDetector(
        fitted.detector, fitted.prepare, {**made.result, "stored_shape": [1, 4, 8]}, fitted.device
    )
    fits, square = tmp_path / "fits.png", tmp_path / "square.png"
    Image.new("L", (8, 4), 7).save(fits)
    Image.new("L", (8, 8)).save(square)
    assert np.array_equal(oblong.read([fits]), np.full((1, 1, 4, 8), 7))
    with pytest.raises(ValueError, match=r"square\.png cannot be read \(it has 8x8 pixels, the run's images 8x4\)"):
        oblong.read([square])
    broken: list[Any] = []
    assert len(oblong.read([square, fits], broken)) == 1 and [fault.where for fault in broken] == [str(square)]


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, 8, 8), np.float32),
        np.zeros((2, 1, 16, 16), np.uint8),
        np.zeros((2, 3, 8, 8), np.uint8),
        np.zeros((8, 8), np.uint8),
    ],
    ids=["floats", "another size", "colour", "one image alone"],
)
def test_arrays_that_the_run_never_saw_the_like_of_are_refused(fitted, images) -> None:
    with pytest.raises(ValueError, match=r"wants uint8 images of \(N,8,8\), \(N,8,8,1\) or \(N, 1, 8, 8\), not"):
        fitted.score(images)


def test_no_images_give_no_scores(fitted) -> None:
    assert fitted.score(fitted.read([])).shape == fitted.decide(fitted.read([])).shape == (0,)


def test_anomaly_maps_lie_over_the_image_as_the_network_sees_it(made, fitted, monkeypatch) -> None:
    images = made.images[made.index[:5]]
    x = fitted.prepare(torch.from_numpy(images))
    with torch.no_grad():
        error = (x - fitted.detector.reconstruct(x)).abs().mean(1)
    np.testing.assert_allclose(fitted.anomaly_map(images), error, atol=1e-6)
    shown = fitted.displayable(images)
    assert shown.shape == (5, 1, 32, 32) and shown.min() >= 0 and shown.max() <= 1
    monkeypatch.setattr(fitted.detector, "anomaly_map", lambda x: None)
    assert fitted.anomaly_map(images) is None


def test_gradients_are_left_as_they_were(made, fitted) -> None:
    fitted.score(made.images[:2])
    assert torch.is_grad_enabled()


def test_a_run_trained_in_mixed_precision_is_scored_in_full(tmp_path: Path) -> None:
    """Half precision would tie scores that differ; here, and in the run."""
    cfg = config.compose([*TINY, "trainer.precision=bf16-mixed", f"runs={tmp_path}", f"data_dir={tmp_path / 'data'}"])
    assert run(cfg) is not None
    with np.load(config.job(cfg).out / "scores.npz") as file:
        written, index = file["score"], file["index"]
    assert len(np.unique(written)) > 0.95 * len(written)
    images = config.load_images(cfg).pixels[index]
    np.testing.assert_allclose(predict.load_run(config.job(cfg).out).score(images), written, rtol=1e-5)


def _without_result(run_folder: Path) -> None:
    (run_folder / "result.json").unlink()


def _half_a_result(run_folder: Path) -> None:
    (run_folder / "result.json").write_text('{"schema": 1,')


def _without_checkpoint(run_folder: Path) -> None:
    (run_folder / "last.ckpt").unlink()


def _half_a_checkpoint(run_folder: Path) -> None:
    whole = (run_folder / "last.ckpt").read_bytes()
    (run_folder / "last.ckpt").write_bytes(whole[: len(whole) // 2])


def _of_another_epoch(run_folder: Path) -> None:
    checkpoint = torch.load(run_folder / "last.ckpt", weights_only=True)
    checkpoint["state_dict"]["epochs_done"] += 1
    torch.save(checkpoint, run_folder / "last.ckpt")


def _other_networks(run_folder: Path) -> None:
    result = json.loads((run_folder / "result.json").read_text())
    result["config"]["model"]["detector"]["width"] = 8
    (run_folder / "result.json").write_text(json.dumps(result))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (_without_result, "holds no finished run: give the folder with its result.json"),
        (_half_a_result, "result.json is damaged"),
        (_without_checkpoint, "has lost its last.ckpt"),
        (_half_a_checkpoint, "does not fit this version of shared_ae_50_small, or is damaged"),
        (_of_another_epoch, "it is of epoch 2, the result of epoch 1"),
        (_other_networks, "does not fit this version of shared_ae_50_small, or is damaged"),
    ],
)
def test_what_is_no_finished_run_is_said_in_one_line(made, tmp_path, harm, message) -> None:
    folder = tmp_path / "run"
    shutil.copytree(made.out, folder)
    harm(folder)
    with pytest.raises(ValueError, match=message) as caught:
        anomaly_lab.load_run(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["image_shape", "stored_shape", "config", "config.model", "config.model.input"])
def test_a_result_of_other_code_is_said_in_one_line(made, tmp_path, key) -> None:
    folder = shutil.copytree(made.out, tmp_path / "run")
    result = json.loads((folder / "result.json").read_text())
    del result["config"]["trainer"]["channels_last"]  # earlier code had none, and meant false
    (folder / "result.json").write_text(json.dumps(result))
    assert predict.load_run(folder).stored_shape == tuple(result["stored_shape"])
    section, *words = result, *key.split(".")
    for word in words[:-1]:
        section = section[word]
    del section[words[-1]]
    (folder / "result.json").write_text(json.dumps(result))
    with pytest.raises(ValueError, match=r"result\.json is damaged"):
        predict.load_run(folder)


def test_a_device_that_is_not_there_is_said(made) -> None:
    with pytest.raises(ValueError, match="device abacus cannot be used here"):
        anomaly_lab.load_run(made.out, "abacus")


def test_the_command_writes_scores_decisions_and_heat_maps(made, fitted, pngs, tmp_path, capsys) -> None:
    out, maps = tmp_path / "new" / "scores.csv", tmp_path / "maps"
    (pngs[0].parent / "notes.txt").write_text("no image")
    assert cli.score([str(made.out), str(pngs[0].parent), "--out", str(out), "--heat-maps", str(maps)]) == 0
    assert f"{len(pngs)} images scored: {out}" in capsys.readouterr().out
    with open(out) as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == [str(path) for path in pngs]
    np.testing.assert_allclose([float(row["score"]) for row in rows], made.score[: len(pngs)], rtol=1e-5)
    anomalous = fitted.decide(fitted.read(pngs))
    assert [row["decision"] for row in rows] == ["anomalous" if one else "normal" for one in anomalous]
    assert sorted(path.name for path in maps.iterdir()) == [f"{i:05d}_{path.stem}.png" for i, path in enumerate(pngs)]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda path: path.write_bytes(b"no image"), "00.png cannot be read"),
        (lambda path: path.write_bytes(path.read_bytes()[:60]), "00.png cannot be read"),
        (lambda path: Image.fromarray(np.zeros((8, 8), np.uint16)).save(path), "00.png cannot be read (its pixels"),
        (lambda path: path.unlink(), "00.png is neither a file nor a folder"),
    ],
    ids=["no image", "truncated", "16 bits", "absent"],
)
def test_an_unreadable_image_is_named_and_nothing_is_written(made, pngs, tmp_path, capsys, broken, message) -> None:
    broken(pngs[0])
    assert cli.score([str(made.out), *map(str, pngs), "--out", str(tmp_path / "scores.csv")]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("anomaly-lab-score: error: ") and message in line
    assert not (tmp_path / "scores.csv").exists()


def test_all_unreadable_images_are_named_and_left_out_on_request(made, pngs, tmp_path, capsys) -> None:
    for path in (pngs[0], pngs[2]):
        path.write_bytes(b"no image")
    words = [str(made.out), *map(str, pngs), "--out", str(tmp_path / "scores.csv")]
    assert cli.score(words) == 2 and not (tmp_path / "scores.csv").exists()
    [line] = capsys.readouterr().err.splitlines()
    assert f"2 of {len(pngs)} images cannot be read: {pngs[0]} (" in line and f"{pngs[2]} (" in line
    assert line.endswith("or skip them with --skip-broken")
    assert cli.score([*words, "--skip-broken"]) == 0
    said = capsys.readouterr()
    assert (
        said.out == f"{len(pngs) - 2} images scored: {tmp_path / 'scores.csv'}\n" and said.err.count("left out: ") == 2
    )
    with open(tmp_path / "scores.csv") as file:
        rows = list(csv.DictReader(file))
    kept = [path for path in pngs if path not in (pngs[0], pngs[2])]
    assert [row["image"] for row in rows] == [str(path) for path in kept]


def test_a_run_without_a_threshold_says_why_it_decides_nothing(made, pngs, tmp_path, capsys) -> None:
    folder = shutil.copytree(made.out, tmp_path / made.out.parent.name / made.out.name)
    result = json.loads((folder / "result.json").read_text())
    result["metrics"]["threshold"] = None
    (folder / "result.json").write_text(json.dumps(result))
    words = [str(pngs[0]), "--out", str(tmp_path / "scores.csv")]
    assert cli.score([str(made.out), *words]) == 0 and capsys.readouterr().err == ""
    assert cli.score([str(folder), *words]) == 0
    assert capsys.readouterr().err.startswith("no decisions: this run held out too few normal images for a threshold")


def test_a_folder_without_images_is_said(made, tmp_path, capsys) -> None:
    assert cli.score([str(made.out), str(tmp_path)]) == 2
    assert "no images (.bmp" in capsys.readouterr().err


def test_help_needs_no_torch() -> None:
    code = (
        "import sys\nfrom anomaly_lab import cli\n"
        "try: cli.score(['--help'])\n"
        "finally: print(sorted({'torch', 'lightning', 'hydra', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--heat-maps DIR" in done.stdout and done.stdout.endswith("[]\n")


@pytest.mark.parametrize("option", ["--out", "--heat-maps"])
@pytest.mark.parametrize("number", [errno.ENOTDIR, errno.ENOSPC])
def test_what_cannot_be_written_names_the_file_and_the_option(
    made, pngs, tmp_path, capsys, monkeypatch, option, number
):
    (tmp_path / "file").write_text("")
    where = tmp_path / "file" / "below" if number == errno.ENOTDIR else tmp_path / "new" / "place"
    if number == errno.ENOSPC:

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", full)
    others = [] if option == "--out" else ["--out", str(tmp_path / "scores.csv")]
    code = cli.score([str(made.out), str(pngs[0]), option, str(where), *others])
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"{tmp_path}" in err and "cannot be written: " in err and option in err
    assert code == (cli.FAILED if number == errno.ENOSPC else cli.MISTAKE) and "Errno" not in err
    assert ("the file system is full" in err) == (number == errno.ENOSPC)


def test_a_place_that_cannot_be_written_is_said_before_anything_is_scored(made, pngs, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(predict.FittedDetector, "score", None)
    assert cli.score([str(made.out), str(pngs[0]), "--out", str(tmp_path / "file" / "scores.csv")]) == cli.MISTAKE
    assert "cannot be written: " in capsys.readouterr().err


def test_broken_files_alone_are_not_told_to_be_skipped_again(made, tmp_path, capsys) -> None:
    (tmp_path / "broken.png").write_text("no")
    assert cli.score([str(made.out), str(tmp_path), "--skip-broken"]) == cli.MISTAKE
    err = capsys.readouterr().err
    assert "repair, convert or remove it" in err and "--skip-broken" not in err
