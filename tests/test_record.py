"""Results that are not what they say: copied, edited, with other scores than they were computed from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Command
from finished import Runs
from lightning import Callback
from omegaconf import DictConfig

from anomaly_lab import cli, config, load_run, record, results
from anomaly_lab.run import run

TINY = "model.budget.epochs=2 model.budget.epoch_steps=1 model.detector.width=4 trainer.progress=false"


def tiny(runs: Path, data: Path, *overrides: str) -> DictConfig:
    return config.compose([*TINY.split(), f"runs={runs}", f"data_dir={data}", "split.max_train=250", *overrides])


class StopsAfterOne(Callback):
    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            raise RuntimeError("stopped on purpose")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, data: Path) -> DictConfig:
    """One finished run with a threshold: one_abnormal holds out enough normals."""
    cfg = tiny(tmp_path_factory.mktemp("record"), data, "split=one_abnormal", "abnormal_class=3")
    assert run(cfg) is not None
    return cfg


@pytest.fixture
def copy(finished: DictConfig, tmp_path: Path) -> DictConfig:
    shutil.copytree(finished.runs, tmp_path / "runs")
    cfg = finished.copy()
    cfg.runs = str(tmp_path / "runs")
    return cfg


def edited(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    result = json.loads((folder / "result.json").read_text())
    edit(result)
    (folder / "result.json").write_text(json.dumps(result))


# Copies ---------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_another_seed_is_neither_trained_on_nor_scored(tmp_path: Path, data: Path) -> None:
    first, second = tiny(tmp_path, data), tiny(tmp_path, data, "seed=1")
    with pytest.raises(RuntimeError, match="on purpose"):
        run(first, [StopsAfterOne()])
    there = config.job(second).out
    there.mkdir(parents=True)
    shutil.copy(config.job(first).out / "last.ckpt", there)
    with pytest.raises(
        ValueError, match=r"last\.ckpt is of another run, seed=0 \(not 1\): it was copied there, delete"
    ):
        run(second)
    assert not (there / "result.json").exists()


def test_a_finished_folder_copied_to_another_class_is_not_that_class(copy: DictConfig, data: Path) -> None:
    folder = config.job(copy).out
    there = folder.parent.parent / "a4" / folder.name
    shutil.copytree(folder, there)
    asked = copy.copy()
    asked.abnormal_class = 4
    assert config.job(asked).out == there
    with pytest.raises(ValueError, match=r"result\.json is of another run, normal_class=3 \(not 4\)"):
        run(asked)
    frame = results.read(copy.runs)
    assert len(frame) == 1
    [line] = frame.attrs["damaged"]
    assert "a4" in line and f"is of the run {config.job(copy).path}: it was copied or renamed" in line


def test_a_run_may_lie_elsewhere_and_be_linked_to(copy: DictConfig, tmp_path: Path) -> None:
    folder = config.job(copy).out
    folder.rename(tmp_path / "scratch")
    folder.symlink_to(tmp_path / "scratch")
    row, _ = results.read_run(folder, config.job(copy).path)
    assert row["seed"] == 0


def test_a_checkpoint_copied_into_a_finished_run_is_not_scored_with(copy: DictConfig) -> None:
    path = config.job(copy).out / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["identity"] == json.loads((path.parent / "result.json").read_text())["identity"]
    checkpoint["identity"]["seed"] = 5
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=r"another run, seed=5 \(not 0\)"):
        load_run(path.parent)


# Edits ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("auroc", 9.51, "auroc is 9.51, which is not between 0 and 1"),
        ("auroc", float("nan"), "a number is NaN"),
        ("auroc", None, "no AUROC in it"),
        ("auroc", "0.9", "auroc is '0.9'"),
        ("auroc", True, "auroc is True"),
        ("fpr95", -0.1, "fpr95 is -0.1"),
        ("threshold", float("inf"), "a number is Infinity"),
    ],
)
def test_a_metric_that_cannot_be_is_refused_wherever_results_are_read(
    copy: DictConfig, capsys: pytest.CaptureFixture[str], name: str, value: Any, said: str
) -> None:
    job = config.job(copy)
    edited(job.out, lambda result: result["metrics"].update({name: value}))
    for read in (job.finished, lambda: load_run(job.out), lambda: results.read_run(job.out, job.path)):
        with pytest.raises(ValueError, match="is damaged") as caught:
            read()
        assert said in str(caught.value) and "\n" not in str(caught.value)
    assert cli.report([copy.runs]) == cli.MISTAKE
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("text", ["[]", "4", "null", "[" * 100_000, '{"identity": 3}', '{"identity": {}}', "\0", "{}"])
def test_what_is_no_result_is_one_line_to_every_reader(lab: Command, copy: DictConfig, text: str) -> None:
    job = config.job(copy)
    (job.out / "result.json").write_text(text)
    for read in (job.finished, lambda: load_run(job.out), lambda: results.read_run(job.out, job.path)):
        with pytest.raises(ValueError, match=r"result\.json is damaged") as caught:
            read()
        assert "\n" not in str(caught.value)


def test_a_damaged_result_is_one_line_of_the_command(lab: Command, tmp_path: Path) -> None:
    assert lab(TINY).code == 0
    [file] = tmp_path.rglob("result.json")
    file.write_text("[]")
    code, _, err = lab(TINY)
    assert code == cli.MISTAKE and err.splitlines()[-1].startswith("anomaly-lab: error: ") and "Traceback" not in err


@pytest.mark.parametrize("harm", ["flipped", "gone"])
def test_scores_that_are_flipped_or_gone_are_noticed(copy: DictConfig, harm: str) -> None:
    job = config.job(copy)
    file = job.out / "scores.npz"
    assert record.read(job.out)["sha256"] == {"scores.npz": record.checksum(file)}
    if harm == "gone":
        file.unlink()
    else:
        raw = bytearray(file.read_bytes())
        raw[len(raw) // 2] ^= 1
        file.write_bytes(raw)
    with pytest.raises(ValueError, match=r"scores\.npz is (gone|not the one that the run wrote)"):
        job.finished()
    assert len(results.read(copy.runs)) == 0
    load_run(job.out)  # a detector needs no scores of its run


# Metrics anew ---------------------------------------------------------------------------------------------------------


def test_a_report_computes_the_metrics_anew_and_leaves_out_what_differs(
    copy: DictConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    job = config.job(copy)
    assert record.read(job.out)["metrics"]["threshold"] is not None
    assert cli.report([copy.runs, "--verify"]) == cli.DONE
    capsys.readouterr()
    edited(job.out, lambda result: result["metrics"].update(auroc=0.951))
    assert cli.report([copy.runs]) == cli.DONE, "nothing is recomputed where nobody asks"
    assert cli.report([copy.runs, "--verify"]) == cli.MISTAKE
    assert "says auroc 0.951, its scores say 0." in capsys.readouterr().err


@pytest.mark.parametrize(
    "metric", ["average_precision", "fpr95", "balanced_accuracy", "recall", "threshold", "auroc_low"]
)
def test_every_metric_is_held_to_the_scores(copy: DictConfig, metric: str) -> None:
    result, folder = record.read(config.job(copy).out), config.job(copy).out
    record.recompute(result, folder)
    result["metrics"][metric] += 0.01
    with pytest.raises(ValueError, match=rf"says {metric} "):
        record.recompute(result, folder)


def test_scores_that_were_edited_with_their_checksum_are_held_to_the_metrics(copy: DictConfig) -> None:
    folder = config.job(copy).out
    with np.load(folder / "scores.npz") as file:
        arrays = dict(file)
    arrays["score"] = arrays["truth"].astype(np.float32)
    np.savez(folder / "scores.npz", **arrays)
    edited(folder, lambda result: result["sha256"].update({"scores.npz": record.checksum(folder / "scores.npz")}))
    with pytest.raises(ValueError, match=r"says auroc 0\.\d+, its scores say 1\.0"):
        results.read_run(folder, "x", verify=True)


def test_a_methods_own_decisions_are_kept_for_that(tmp_path: Path, data: Path) -> None:
    small = ["model.detector.width=8", "model.detector.rounds=1", "model.budget.stages={pretrain:1,detect:1,retrain:1}"]
    cfg = config.compose(["model=itsr", *small, f"runs={tmp_path}", f"data_dir={data}", "trainer.progress=false"])
    assert run(cfg) is not None
    out = config.job(cfg).out
    with np.load(out / "scores.npz") as file:
        assert file["decided"].dtype == np.bool_
    record.recompute(record.read(out), out)


def test_scores_that_are_not_there_cannot_be_verified(runs: Runs) -> None:
    folder = runs.add(0.9)
    with pytest.raises(ValueError, match=r"scores\.npz cannot be verified"):
        results.read_run(folder, "x", verify=True)


# What fails late or silently ------------------------------------------------------------------------------------------


def test_weights_that_are_no_numbers_give_no_scores(copy: DictConfig) -> None:
    path = config.job(copy).out / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    name = next(name for name, value in checkpoint["state_dict"].items() if value.is_floating_point())
    checkpoint["state_dict"][name].fill_(float("nan"))
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=r"the score of image 0 is nan: the weights in last\.ckpt may be damaged"):
        load_run(path.parent).score(config.load_images(copy).pixels[:3])


def test_a_batch_of_many_times_the_training_set_is_refused(tmp_path: Path, data: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.batch_size=100000 has each of the \d+ training images \d+ times"):
        run(tiny(tmp_path, data, "model.batch_size=100000"))
