"""One run: what it writes, that it is idempotent, and that a stopped run resumes to the same bits."""

from __future__ import annotations

import csv
import errno
import fcntl
import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import process_state
from lightning import Callback
from omegaconf import DictConfig

from anomaly_lab import config, metrics, record
from anomaly_lab.course import Diverged
from anomaly_lab.files import write_atomically
from anomaly_lab.measure import processor
from anomaly_lab.run import run
from anomaly_lab.splits import Pooled

QUICK = ["trainer.progress=false", "trainer.threads=1"]  # such small networks' threads only wait for each other
TINY = ["model.budget.epochs=4", "model.budget.epoch_steps=3", "model.detector.width=4", *QUICK]


def tiny(runs: Path, *overrides: str) -> DictConfig:
    """A run of a second or two on the embedded digits."""
    return config.compose([*TINY, f"runs={runs}", f"data_dir={runs.parent / 'data'}", *overrides])


class Stop(Callback):
    """Ends a run as a dying process would: in the middle of an epoch, by an exception from nowhere."""

    def __init__(self, after_steps: int) -> None:
        self.left = after_steps

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        after_step = pl_module.after_step

        def stop() -> None:
            after_step()
            self.left -= 1
            if self.left == 0:
                raise RuntimeError("stopped")

        pl_module.after_step = stop


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
    with np.load(config.job(cfg).out / "scores.npz") as file:
        return dict(file)


def test_a_run_writes_what_the_design_says(finished: tuple[DictConfig, dict[str, Any], Weights]) -> None:
    cfg, result, _ = finished
    out = config.job(cfg).out
    assert out.relative_to(cfg.runs).parts[:4] == ("shared_ae_50_small", "digits", "pooled", "n3")
    assert json.loads((out / "result.json").read_text()) == result
    names = {path.name for path in out.iterdir()}
    assert names >= {"result.json", "scores.npz", "last.ckpt", "metrics.csv", "figures"}
    assert not list(out.rglob("*.part"))
    figures = {path.name for path in (out / "figures").iterdir()}
    assert figures == {"roc.png", "scores.png", "reconstructions.png", "training.png"}
    assert result["epochs"] == 4 and result["steps"] == 12 and len(result["history"]) == 4
    assert result["versions"]["torch"] == torch.__version__.split("+")[0]
    assert (result["config"]["choices"]["model"], result["config"]["size"]) == ("shared_ae_50", "small")
    assert result["classes"] == 10
    kernels, threads = torch.backends.cpu.get_cpu_capability(), result["device"].removeprefix(f"{processor()}, ")
    assert processor().endswith(f", {kernels}") and len(processor()) > len(kernels) + 2
    assert re.fullmatch(r"1 thread|([2-9]|\d\d+) threads", threads)


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
    checkpoint = torch.load(config.job(finished[0]).out / "last.ckpt", weights_only=True)
    assert checkpoint["anomaly_lab"]["history"] == finished[1]["history"]


def test_checkpoints_can_be_written_every_so_many_epochs_and_change_nothing(tmp_path: Path) -> None:
    """Three steps an epoch, a checkpoint after the second and the fourth."""
    rare = "trainer.checkpoint_every=2"
    for after, there in ((5, False), (8, True)):  # in the middle of epochs 2 and 3
        cfg = tiny(tmp_path / f"after_{after}", rare)
        with pytest.raises(RuntimeError, match="stopped"):
            run(cfg, [Stop(after)])
        assert (config.job(cfg).out / "last.ckpt").exists() is there
    resumed, whole = run(cfg), run(tiny(tmp_path / "whole"))
    assert resumed is not None and whole is not None and resumed["metrics"] == whole["metrics"]
    odd = tiny(tmp_path / "odd", "trainer.checkpoint_every=3")
    run(odd)  # 4 epochs
    checkpoint = torch.load(config.job(odd).out / "last.ckpt", weights_only=True)
    assert len(checkpoint["anomaly_lab"]["history"]) == 4, "the last epoch is always kept"
    with pytest.raises(ValueError, match=r"trainer\.checkpoint_every=0: give a whole number"):
        run(tiny(tmp_path / "wrong", "trainer.checkpoint_every=0"))


def test_a_finished_run_is_not_made_again(finished: tuple[DictConfig, dict[str, Any], Weights]) -> None:
    cfg, result, _ = finished
    before = (config.job(cfg).out / "result.json").stat().st_mtime_ns
    assert run(cfg, [Stop(after_steps=1)]) == result
    assert (config.job(cfg).out / "result.json").stat().st_mtime_ns == before


def comparable(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in history]


@pytest.mark.parametrize(
    "layout", ["trainer.channels_last=false", pytest.param("trainer.channels_last=true", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("model", ["shared_ae", "autoencoder"])
def test_a_stopped_run_resumes_to_the_same_bits(tmp_path: Path, model: str, layout: str) -> None:
    whole, weights = Weights(), Weights()
    straight = tiny(tmp_path / "straight", f"model={model}", layout)
    undisturbed = run(straight, [whole])
    broken = tiny(tmp_path / "broken", f"model={model}", layout)
    for after in (8, 2):  # in the middle of epoch 3, then again in the resumed epoch 3
        with pytest.raises(RuntimeError, match="stopped"):
            run(broken, [Stop(after)])
        failure = json.loads((config.job(broken).out / "failure.json").read_text())
        assert failure["error"] == "RuntimeError: stopped" and "Traceback" in failure["traceback"]
        assert not (config.job(broken).out / "result.json").exists()
    resumed = run(broken, [weights])
    assert undisturbed is not None and resumed is not None
    assert not (config.job(broken).out / "failure.json").exists()
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
    (config.job(cfg).out / "result.json").unlink()
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
    kept = torch.load(config.job(cfg).out / "last.ckpt")
    assert [row["oracle_auroc"] for row in kept["watched"]["seen"].values()] == seen
    assert "oracle_auroc" not in kept["anomaly_lab"]["history"][0]
    with (config.job(cfg).out / "metrics.csv").open(newline="") as file:
        assert [float(row["oracle_auroc"]) for row in csv.DictReader(file)] == pytest.approx(seen)


def test_what_was_watched_stays_watched_when_the_leak_is_measured_later(tmp_path: Path) -> None:
    watched = run(tiny(tmp_path / "runs", "trainer.watch_test=true"))
    measured = run(tiny(tmp_path / "runs", "trainer.measure_leak=true"))
    assert watched is not None and measured is not None
    assert measured["metrics"]["oracle_auroc"] == watched["metrics"]["oracle_auroc"] is not None
    assert measured["metrics"]["oracle_sorted_best_auroc"] is None, "after the last epoch alone"


def test_asked_together_the_leak_is_measured_after_every_epoch(tmp_path: Path) -> None:
    apart = run(tiny(tmp_path / "runs", "trainer.watch_test=true"))
    both = tiny(tmp_path / "runs", "trainer.watch_test=true", "trainer.measure_leak=true")
    together = run(both)
    assert apart is not None and together is not None
    history = [dict(row) for row in together["history"]]
    sorted_auroc = [row.pop("oracle_sorted_auroc") for row in history]
    assert comparable(history) == comparable(apart["history"]), "it changes nothing of the training"
    assert together["metrics"]["oracle_sorted_best_auroc"] == max(sorted_auroc)
    assert together["metrics"]["oracle_sorted_auroc"] == sorted_auroc[-1]
    assert {name: together["metrics"][name] for name in apart["metrics"]} == apart["metrics"]
    assert run(both, [Stop(after_steps=1)]) == together, "all of it is there"
    later = run(tiny(tmp_path / "runs", "trainer.measure_leak=true"), [Stop(after_steps=1)])
    assert later == together


def test_a_result_is_retired_before_its_checkpoint_is_overwritten(tmp_path: Path) -> None:
    assert run(tiny(tmp_path / "runs")) is not None
    watched = tiny(tmp_path / "runs", "trainer.watch_test=true")
    with pytest.raises(RuntimeError, match="stopped"):
        run(watched, [Stop(after_steps=5)])
    assert not (config.job(watched).out / "result.json").exists()


def test_a_file_system_without_locks_is_said_and_the_run_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    (tmp_path / "data").mkdir()
    cfg = tiny(tmp_path / "runs")
    config.load_images(cfg)
    with caplog.at_level("WARNING"):
        assert run(cfg) is not None
    assert "cannot be locked" in caplog.text


def test_a_second_process_leaves_a_busy_run_alone(tmp_path: Path) -> None:
    cfg = tiny(tmp_path / "runs")
    out = config.job(cfg).out
    out.mkdir(parents=True)
    with open(out / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # another open file: as another process would hold it
        assert run(cfg, [Stop(after_steps=1)]) is None
    assert not (out / "result.json").exists()


def test_divergence_is_a_recorded_failure_not_a_table_entry(tmp_path: Path) -> None:
    cfg = tiny(tmp_path / "runs", "model.optimizer.lr=1e30")
    with pytest.raises(Diverged, match=r"diverged: .* at epoch \d; lower the learning rate"):
        run(cfg)
    assert "Diverged" in json.loads((config.job(cfg).out / "failure.json").read_text())["error"]
    assert not (config.job(cfg).out / "result.json").exists()


def test_half_a_file_is_never_left_behind(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fails(file: Any) -> None:
        file.write(b"new, but")
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_atomically(path, fails)
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["normal_class=12"], "no class 12"),
        (["seed=abc"], "seed=abc: give a whole number"),
        (["data_dir=null"], "data_dir=null: give a folder, such as data_dir=./here"),
        (["runs=2026"], "runs=2026: give a folder, such as runs=./here"),
        (["model.budget.epochs=-1"], "epochs=-1: give a whole number"),
        (["trainer.threshold_quantile=1.5"], "between 0 and 1"),
        (["split=official"], "no official test half"),
        (["split=one_abnormal", "normal_class=3"], "write abnormal_class=3"),
        (["abnormal_class=3"], "write normal_class=3"),
        (["model.batch_size=1"], "model.batch_size=1: give a whole number from 2"),
        (["model.budget.epoch_steps=0"], "model.budget.epoch_steps=0: give a whole number from 1"),
        (["model.budget.steps=10"], "one of epochs, steps and stages"),
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
    assert (tmp_path / "runs/shared_ae_50_small/digits/one_abnormal/a3").is_dir()


TOY = """
from collections.abc import Iterator, Mapping, Sequence
import torch
from torch import Tensor, nn
from anomaly_lab.detector import Batch, Detector


class Toy(Detector):
    \"\"\"Everything a method may do: noise, dropout, a schedule, fit hooks, epochs on fewer images.\"\"\"

    def __init__(self, image_shape: Sequence[int], *, learns: bool) -> None:
        super().__init__(image_shape)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(1024, 8), nn.Dropout(0.5), nn.Linear(8, 1024))
        self.learns = learns

    def before_fit(self, images: Tensor) -> None:
        assert not torch.is_grad_enabled() and not self.training
        self.set_fitted("centre", images.mean(0) + 0.01 * torch.rand(1, generator=self.noise))

    def after_fit(self, images: Tensor) -> None:
        assert not torch.is_grad_enabled() and not self.training
        self.set_fitted("spread", (images - self.centre).std(0) + 0.1 + torch.rand(1, generator=self.noise))

    def players(self) -> Mapping[str, Sequence[nn.Module]]:
        return {"net": [self.net]} if self.learns else {}

    def plays(self, batch: Batch) -> Iterator[Mapping[str, Tensor]]:
        if self.learns:
            x = torch.cat([batch.x, self.next_batch().x]) - self.centre
            noisy = x + torch.randn(x.shape, generator=self.noise)
            yield {"net": (self.net(noisy) - x.flatten(1)).square().mean()}

    def train_indices(self, epoch: int) -> Tensor:
        return torch.arange((100, 40, 100, 60)[epoch - 1])

    def score(self, x: Tensor) -> Tensor:
        x = (x - self.centre) / self.spread
        return (x.flatten(1) - (self.net(x) if self.learns else 0)).square().mean(1)
"""
TOY_YAML = """
# A toy.
detector: {_target_: toy_method.Toy, learns: true}
optimizer: {_target_: torch.optim.SGD, _partial_: true, lr: 0.1}
scheduler: {_target_: torch.optim.lr_scheduler.StepLR, _partial_: true, step_size: 1, gamma: 0.5}
clip: 1.0
budget: {epochs: 4, steps: null, epoch_steps: 1}
batch_size: 16
input: {size: 32, fit: pad, range: [-1, 1], channels: null}
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A method and its yaml in a folder of the user's own."""
    (tmp_path / "conf/model").mkdir(parents=True)
    (tmp_path / "conf/model/toy.yaml").write_text(TOY_YAML)
    (tmp_path / "toy_method.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv(config.EXTRA_CONFIGS, str(tmp_path / "conf"))
    config._defaults.cache_clear()
    return tmp_path


def toy_run(folder: Path, name: str, *overrides: str) -> DictConfig:
    return config.compose(["model=toy", f"runs={folder / name}", f"data_dir={folder / 'data'}", *QUICK, *overrides])


class StopLater(Callback):
    """Ends a run after its last epoch: before it is fitted to the end, or in the middle of scoring."""

    def __init__(self, hook: str) -> None:
        setattr(self, hook, self._stop)

    def _stop(self, *_: Any) -> None:
        raise RuntimeError("stopped")


def test_a_run_names_all_code_that_trained_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = tiny(tmp_path / "runs")
    codes = [{"sha": letter * 40, "dirty": letter == "b", "diff": None} for letter in "aba"]
    for code, stop in zip(codes, (Stop(8), StopLater("on_train_end")), strict=False):
        monkeypatch.setattr(record, "code", lambda code=code: code)
        with pytest.raises(RuntimeError):
            run(cfg, [stop])
    monkeypatch.setattr(record, "code", lambda: codes[-1])  # which scores what is trained, and came first as well
    result = run(cfg)
    assert result is not None and result["git"] == codes[0] and result["earlier_code"] == [codes[1]]


@pytest.mark.parametrize(
    "stop",
    [Stop(3), Stop(9), Stop(14), StopLater("on_train_end"), StopLater("on_test_batch_end")],
    ids=["step 3", "step 9", "step 14", "train end", "test batch"],
)
def test_a_method_with_everything_resumes_to_the_same_bits(toy: Path, stop: Callback) -> None:
    straight, broken = toy_run(toy, "straight"), toy_run(toy, "broken")
    expected = run(straight)
    with pytest.raises(RuntimeError, match="stopped"):
        run(broken, [stop])
    resumed = run(broken)
    assert expected is not None and resumed is not None
    assert expected["steps"] == 6 + 2 + 6 + 3, "epochs are as long as train_indices makes them"
    assert comparable(resumed["history"]) == comparable(expected["history"])
    assert all("val_score" not in row for row in expected["history"]), "its score is fitted only after the last epoch"
    for name, array in scores(straight).items():
        assert np.array_equal(array, scores(broken)[name]), name


def test_a_watched_method_that_is_scored_only_after_its_fit_is_done_once(toy: Path) -> None:
    cfg = toy_run(toy, "runs", "trainer.watch_test=true")
    first = run(cfg)
    assert first is not None and first["metrics"]["oracle_auroc"] is None
    assert run(cfg, [Stop(after_steps=1)]) == first
    broken = toy_run(toy, "broken", "trainer.watch_test=true")
    with pytest.raises(RuntimeError, match="stopped"):
        run(broken, [Stop(after_steps=7)])  # in epoch 2
    resumed = run(broken, [Stop(after_steps=12)])  # 11 steps are left after the first epoch
    assert resumed is not None and comparable(resumed["history"]) == comparable(first["history"])


def test_noise_and_dropout_follow_from_the_seed(toy: Path) -> None:
    first, again = run(toy_run(toy, "first")), run(toy_run(toy, "again"))
    other = run(toy_run(toy, "first", "seed=1", "split.seed=0"))
    assert first is not None and again is not None and other is not None
    assert comparable(first["history"]) == comparable(again["history"]) != comparable(other["history"])


@pytest.mark.parametrize("epochs", [0, 1])
def test_a_method_without_gradients_is_a_run_like_any_other(toy: Path, epochs: int) -> None:
    result = run(toy_run(toy, "runs", "model.detector.learns=false", f"model.budget.epochs={epochs}"))
    assert result is not None and result["metrics"]["auroc"] > 0.5 and result["epochs"] == epochs
    if epochs == 0:
        assert result["images_per_second"] is None


def test_equal_scores_are_a_failure_not_an_auroc_of_one_half(toy: Path) -> None:
    (toy / "toy_method.py").write_text(TOY.replace("return (x.flatten(1)", "return 0 * (x.flatten(1)"))
    sys.modules.pop("toy_method", None)
    try:
        with pytest.raises(Diverged, match="collapsed: every test image has the score 0"):
            run(toy_run(toy, "runs"))
    finally:
        sys.modules.pop("toy_method", None)


def test_an_edited_default_is_not_answered_with_the_old_result(toy: Path) -> None:
    assert run(toy_run(toy, "runs")) is not None
    yaml = toy / "conf/model/toy.yaml"
    yaml.write_text(TOY_YAML.replace("lr: 0.1", "lr: 0.05"))
    config._defaults.cache_clear()
    with pytest.raises(ValueError, match=r"model\.optimizer\.lr=0\.1 \(now 0\.05\): delete that folder"):
        run(toy_run(toy, "runs"))
    (config.job(toy_run(toy, "runs")).out / "result.json").unlink()
    with pytest.raises(ValueError, match=r"now 0\.05"):  # nor resumed with the old weights
        run(toy_run(toy, "runs"))


def test_a_damaged_checkpoint_is_said_and_started_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cfg = tiny(tmp_path / "runs")
    with pytest.raises(RuntimeError, match="stopped"):
        run(cfg, [Stop(after_steps=8)])
    checkpoint = config.job(cfg).out / "last.ckpt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    result = run(cfg)
    assert result is not None and len(result["history"]) == 4
    assert "cannot be read" in caplog.text


def test_a_schedulers_signal_does_not_publish_a_half_trained_detector(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under Slurm, Lightning by itself answers SIGUSR1 with a checkpoint that its later calls load without asking."""
    for name, value in (("JOB_ID", "1"), ("JOB_NAME", "train"), ("NTASKS", "1"), ("LOCALID", "0"), ("PROCID", "0")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SLURM_NODEID", "0")
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:

        class Signal(Callback):
            def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
                if trainer.current_epoch == 1:
                    os.kill(os.getpid(), signal.SIGUSR1)

        cfg = tiny(tmp_path / "runs")
        result = run(cfg, [Signal()])
    finally:
        signal.signal(signal.SIGUSR1, before)
    plain = run(tiny(tmp_path / "plain"))
    assert result is not None and plain is not None and result["metrics"] == plain["metrics"]
    assert not list(config.job(cfg).out.glob("hpc_ckpt*"))


class Inside(Callback):
    """Keeps how the process is switched while a run trains, and switches something itself."""

    def on_train_start(self, *_: Any) -> None:
        torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark
        self.state = process_state()


def test_a_protocol_is_made_once_however_often_a_run_asks_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    real = Pooled.__post_init__
    monkeypatch.setattr(Pooled, "__post_init__", lambda split: (made.append(split), real(split))[1])
    config._protocol.cache_clear()
    words = ("split.contamination.rate=0.05", "split.contamination.classes=[1]", "model.budget.epochs=1")
    assert run(tiny(tmp_path / "runs", *words)) is not None
    assert len(made) == 1


@pytest.mark.parametrize("end", ["finished", "failed"])
def test_a_run_leaves_its_process_as_it_found_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before, random = process_state(), torch.random.get_rng_state()
    threads = torch.get_num_threads() + 1
    inside = Inside()
    cfg = tiny(tmp_path / "runs", "trainer.precision=tf32", f"trainer.threads={threads}", "model.budget.epochs=1")
    if end == "finished":
        assert run(cfg, [inside]) is not None
    else:
        with pytest.raises(RuntimeError, match="stopped"):
            run(cfg, [inside, Stop(1)])
    assert process_state() == before
    assert torch.equal(torch.random.get_rng_state(), random)
    assert inside.state["threads"] == threads and inside.state["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert inside.state["torch"] == ("high", True, not torch.backends.cudnn.benchmark, False, True, True)
