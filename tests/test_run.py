"""One run: what it writes, that it is idempotent, and that a stopped run resumes to the same bits."""

from __future__ import annotations

import fcntl
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Callback
from omegaconf import DictConfig

from anomaly_lab import config, metrics
from anomaly_lab.detector import Diverged
from anomaly_lab.run import run, stream, write_whole

TINY = ["model.budget.epochs=4", "model.budget.epoch_steps=3", "model.detector.width=4", "trainer.progress=false"]


def tiny(runs: Path, *overrides: str) -> DictConfig:
    """A run of a second or two on the embedded digits."""
    return config.compose([*TINY, f"runs={runs}", f"data_dir={runs.parent / 'data'}", *overrides])


class Stop(Callback):
    """Ends a run as a dying process would: in the middle of an epoch, by an exception from nowhere."""

    def __init__(self, after_steps: int) -> None:
        self.left = after_steps

    def on_train_batch_end(self, *_: Any) -> None:
        self.left -= 1
        if self.left == 0:
            raise RuntimeError("stopped")


class Weights(Callback):
    """Keeps the trained weights."""

    def on_fit_end(self, trainer: Any, pl_module: torch.nn.Module) -> None:
        self.weights = {name: tensor.clone() for name, tensor in pl_module.state_dict().items()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[DictConfig, dict[str, Any], Weights]:
    cfg = tiny(tmp_path_factory.mktemp("finished") / "runs", "normal_class=3")
    weights = Weights()
    result = run(cfg, [weights])
    assert result is not None
    return cfg, result, weights


def scores(cfg: DictConfig) -> dict[str, np.ndarray]:
    with np.load(config.run_dir(cfg) / "scores.npz") as file:
        return dict(file)


def test_a_run_writes_what_the_design_says(finished: tuple[DictConfig, dict[str, Any], Weights]) -> None:
    cfg, result, _ = finished
    out = config.run_dir(cfg)
    assert out.relative_to(cfg.runs).parts[:4] == ("shared_ae_small", "digits", "pooled", "n3")
    assert json.loads((out / "result.json").read_text()) == result
    names = {path.name for path in out.iterdir()}
    assert names >= {"result.json", "scores.npz", "last.ckpt", "metrics.csv", "figures"}
    assert not list(out.rglob("*.part"))
    figures = {path.name for path in (out / "figures").iterdir()}
    assert figures == {"roc.png", "scores.png", "reconstructions.png", "training.png"}
    assert result["epochs"] == 4 and result["steps"] == 12 and len(result["history"]) == 4
    assert result["versions"]["torch"] == torch.__version__.split("+")[0]
    assert result["config"]["choices"]["model"] == "shared_ae_small"


def test_metrics_are_those_of_the_written_scores(finished: tuple[DictConfig, dict[str, Any], Weights]) -> None:
    cfg, result, _ = finished
    written = scores(cfg)
    assert result["metrics"]["auroc"] == metrics.auroc(written["score"], written["truth"])
    assert result["metrics"]["val_score"] == pytest.approx(written["val_score"].astype(float).mean(), rel=1e-12)
    assert (written["truth"] == (written["label"] != 3)).all()
    assert result["partition"]["test_normal"] == int((written["truth"] == 0).sum())


def test_the_checkpoint_holds_tensors_and_plain_values_only(
    finished: tuple[DictConfig, dict[str, Any], Weights],
) -> None:
    checkpoint = torch.load(config.run_dir(finished[0]) / "last.ckpt", weights_only=True)
    assert checkpoint["anomaly_lab"]["history"] == finished[1]["history"]


def test_a_finished_run_is_not_made_again(finished: tuple[DictConfig, dict[str, Any], Weights]) -> None:
    cfg, result, _ = finished
    before = (config.run_dir(cfg) / "result.json").stat().st_mtime_ns
    assert run(cfg, [Stop(after_steps=1)]) == result
    assert (config.run_dir(cfg) / "result.json").stat().st_mtime_ns == before


def comparable(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in history]


@pytest.mark.parametrize("model", ["shared_ae_small", "autoencoder_small"])
def test_a_stopped_run_resumes_to_the_same_bits(tmp_path: Path, model: str) -> None:
    whole, weights = Weights(), Weights()
    straight = tiny(tmp_path / "straight", f"model={model}")
    undisturbed = run(straight, [whole])
    broken = tiny(tmp_path / "broken", f"model={model}")
    for after in (8, 2):  # in the middle of epoch 3, then again in the resumed epoch 3
        with pytest.raises(RuntimeError, match="stopped"):
            run(broken, [Stop(after)])
        failure = json.loads((config.run_dir(broken) / "failure.json").read_text())
        assert failure["error"] == "RuntimeError: stopped" and "Traceback" in failure["traceback"]
        assert not (config.run_dir(broken) / "result.json").exists()
    resumed = run(broken, [weights])
    assert undisturbed is not None and resumed is not None
    assert not (config.run_dir(broken) / "failure.json").exists()
    assert comparable(resumed["history"]) == comparable(undisturbed["history"])
    for name, tensor in whole.weights.items():
        assert torch.equal(tensor, weights.weights[name]), name
    for name, array in scores(straight).items():
        assert np.array_equal(array, scores(broken)[name]), name
    assert resumed["metrics"] == undisturbed["metrics"]


def test_killed_after_the_last_epoch_the_run_is_scored_without_training(tmp_path: Path) -> None:
    cfg = tiny(tmp_path / "runs")
    first = run(cfg)
    assert first is not None
    (config.run_dir(cfg) / "result.json").unlink()
    again = run(cfg, [Stop(after_steps=1)])
    assert again is not None and again["metrics"] == first["metrics"]


def test_watching_the_test_set_changes_nothing_and_is_shown_apart(
    finished: tuple[DictConfig, dict[str, Any], Weights],
) -> None:
    cfg, honest, _ = finished
    before = scores(cfg)
    watched = run(tiny(Path(cfg.runs), "normal_class=3", "trainer.watch_test=true"))
    assert watched is not None
    seen = [row.pop("oracle_auroc") for row in watched["history"]]
    assert comparable(watched["history"]) == comparable(honest["history"])
    assert watched["metrics"]["oracle_auroc"] == max(seen)
    assert {**watched["metrics"], "oracle_auroc": None} == honest["metrics"]
    assert seen[-1] == watched["metrics"]["auroc"]
    for name, array in scores(cfg).items():
        assert np.array_equal(array, before[name]), name
    assert "oracle_auroc" in torch.load(config.run_dir(cfg) / "last.ckpt")["anomaly_lab"]["history"][0]


def test_a_second_process_leaves_a_busy_run_alone(tmp_path: Path) -> None:
    cfg = tiny(tmp_path / "runs")
    out = config.run_dir(cfg)
    out.mkdir(parents=True)
    with open(out / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # another open file: as another process would hold it
        assert run(cfg, [Stop(after_steps=1)]) is None
    assert not (out / "result.json").exists()


def test_divergence_is_a_recorded_failure_not_a_table_entry(tmp_path: Path) -> None:
    cfg = tiny(tmp_path / "runs", "model.detector.optimizer.lr=1e30")
    with pytest.raises(Diverged, match=r"diverged: .* at epoch \d; lower the learning rate"):
        run(cfg)
    assert "Diverged" in json.loads((config.run_dir(cfg) / "failure.json").read_text())["error"]
    assert not (config.run_dir(cfg) / "result.json").exists()


def test_half_a_file_is_never_left_behind(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fails(file: Any) -> None:
        file.write(b"new, but")
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_whole(path, fails)
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["normal_class=12"], "no class 12"),
        (["seed=abc"], "seed=abc: give a whole number"),
        (["split=official"], "no official test half"),
        (["split=one_abnormal", "normal_class=3"], "write abnormal_class=3"),
        (["abnormal_class=3"], "write normal_class=3"),
        (["model.batch_size=1"], "at least 2"),
        (["model.budget.epoch_steps=0"], "at least one step"),
        (["model.budget.steps=10"], "either epochs or steps"),
        (["model.input.fit=crop"], "choose pad or resize"),
        (["model.input.channels=2"], "choose 1, 3 or null"),
        (["model.input.range=[1,0]"], "two growing numbers"),
        (["trainer.precision=16-mixed"], "choose 32-true, tf32 or bf16-mixed"),
    ],
)
def test_mistakes_get_one_line_that_says_what_to_do(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        run(tiny(tmp_path / "runs", *overrides))
    assert "\n" not in str(caught.value)


def test_the_abnormal_class_is_named_with_one_abnormal(tmp_path: Path) -> None:
    result = run(tiny(tmp_path / "runs", "split=one_abnormal", "abnormal_class=3", "model.budget.epochs=1"))
    assert result is not None and result["role"] == "abnormal" and result["class_name"] == "3"
    assert (tmp_path / "runs/shared_ae_small/digits/one_abnormal/a3").is_dir()


def test_a_budget_of_steps_is_rounded_up_to_epochs(tmp_path: Path) -> None:
    result = run(tiny(tmp_path / "runs", "model.budget.epochs=null", "model.budget.steps=4"))
    assert result is not None and result["epochs"] == 2 and result["steps"] == 6


@pytest.mark.parametrize("precision", ["bf16-mixed", "tf32"])
def test_other_precisions_train_and_are_other_runs(tmp_path: Path, precision: str) -> None:
    cfg = tiny(tmp_path / "runs", f"trainer.precision={precision}", "model.budget.epochs=1")
    result = run(cfg)
    assert result is not None and math.isfinite(result["metrics"]["auroc"])
    assert result["identity"]["changed"]["trainer.precision"] == precision


def test_streams_are_independent_and_fixed() -> None:
    assert stream(0, "weights") != stream(0, "noise") != stream(1, "noise")
    assert stream(0, "weights") == 6699829313034778310  # pinned: every published run depends on it


FLOOR = 0.95
"""AUROC that five epochs of 20 steps reach on the digit 0 against the others with room to spare (0.98 and more)."""


@pytest.mark.parametrize("model", ["autoencoder_small", "ede_small", "shared_ae_no_adversary_small", "shared_ae_small"])
def test_learning_floor(tmp_path: Path, model: str) -> None:
    budget = ["model.budget.epochs=5", "model.budget.epoch_steps=20", "model.detector.width=8"]
    result = run(tiny(tmp_path / "runs", f"model={model}", *budget, "model.detector.optimizer.lr=2e-3"))
    assert result is not None and result["metrics"]["auroc"] >= FLOOR


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the networks are tiny: more threads only wait for each other
    yield
    torch.set_num_threads(threads)
