"""Many models at once: what one device trains one after another, in turns (hydra/launcher=abreast), in processes.

Counted are the images of all runs together by second on the clock, from the moment in which the slowest has its first
epoch behind it until the quickest has its last: Lightning, loading, validation, the giving away of turns are in it;
start-up, captures of CUDA graphs, scoring and figures are not. `goals` has those too: it takes the time of whole
commands. Images are scikit-learn's digits at the size and in the number of MNIST's, which costs the same work.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from lightning import Callback, LightningModule, Trainer
from omegaconf import DictConfig, OmegaConf

from anomaly_lab import build, config, switches, turns

MODELS = ("shared_ae", "ganomaly")

STEPS = 84
"""Steps of an epoch over one digit of MNIST: 5400 images, 64 in a batch."""

COMMAND = [sys.executable, "-c", "import sys; from anomaly_lab.cli import train; sys.argv[0] = 'anomaly-lab'; train()"]

GOALS = {"shared_ae": (50, 300), "ganomaly": (15, 90)}
"""Epochs, and the seconds in which 10 digits × 3 seeds should be done on one H200."""

Ends = list[tuple[float, int]]
"""When the epochs of one run have ended, on the clock, and how many images it had seen by then."""


class Plan(NamedTuple):
    """How much is measured."""

    models: Sequence[str]
    precisions: Sequence[str]
    abreast: Sequence[int]
    processes: Sequence[int]
    epochs: int
    repeats: int
    overrides: Sequence[str] = ()


FULL = Plan(MODELS, ("tf32", "bf16-mixed"), (2, 4, 8, 16, 30), (2, 4, 8), 6, 3)
QUICK = Plan(MODELS, ("tf32",), (8, 30), (4,), 4, 1)
TINY = Plan(("shared_ae",), ("32-true",), (2,), (), 3, 1, ("model.detector.width=4", "model.budget.epoch_steps=4"))


class _Epochs(Callback):
    def __init__(self, ends: Ends) -> None:
        self._ends = ends

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ends.append((time.perf_counter(), int(pl_module.images_seen)))  # type: ignore[arg-type]


def rate(runs: Sequence[Ends]) -> float:
    """Images by second of runs that were trained side by side, while all of them were past their first epoch."""
    start, end = max(ends[0][0] for ends in runs), min(ends[-1][0] for ends in runs)
    if start >= end:
        raise ValueError("the runs were not trained side by side: give them more epochs")
    images = 0.0
    for ends in runs:
        clock, seen = np.array(ends).T
        first, last = np.interp([start, end], clock, seen)
        images += float(last - first)
    return images / (end - start)


def hand_over(runs: int, turns_each: int = 2000) -> float:
    """Microseconds from one run's step to the next one's, all state put away and back included."""

    def job() -> None:
        for _ in range(turns_each):
            turns.pass_on()

    started = time.perf_counter()
    turns.take([job] * runs, at_once=runs)
    return (time.perf_counter() - started) / (runs * turns_each) * 1e6


def measure(device: str, quick: bool) -> dict[str, Any]:
    """A row for each way to train many models; ``ratio`` is to the first of its model and precision.

    On the CPU two tiny rows without rates: both ways work, and a hand-over costs so much. There is nothing to win.

    Args:
        device: "cpu", or else the GPU.
    """
    plan = TINY if device == "cpu" else QUICK if quick else FULL
    rows: list[dict[str, Any]] = []
    for model in plan.models:
        for precision in plan.precisions:
            rows += _ways(plan, device, model, precision)
    if device != "cpu":
        return {"rows": rows}
    kept = ("model", "way", "models", "hand_over_us")
    note = "A CPU computes one step at a time, so there is nothing to win; what giving the turn to another run costs:"
    return {
        "rows": [{key: row[key] for key in kept if key in row} for row in rows if row["way"] == "abreast"],
        "note": note,
    }


def _ways(plan: Plan, device: str, model: str, precision: str) -> list[dict[str, Any]]:
    common = [
        f"model={model}",
        "size=full",
        "dataset=digits",
        f"trainer.accelerator={'cpu' if device == 'cpu' else 'cuda'}",
        f"trainer.precision={precision}",
        "trainer.progress=false",
        "logger=none",
        f"model.budget.epoch_steps={STEPS}",
        f"model.budget.epochs={plan.epochs}",
        *plan.overrides,
    ]
    has = config.compose(common).trainer
    if "checkpoint_every" in has:  # a matter of its own, and of the disk
        common.append(f"trainer.checkpoint_every={plan.epochs}")
    captured = ["trainer.cuda_graphs=true"] if "cuda_graphs" in has and device != "cpu" else None
    fastest = captured or []
    # Two one after another: of more the rate is the same.
    ways: list[tuple[str, int, bool, Callable[[], float]]] = [
        ("one after another", 2, False, lambda: _one_after_another(common, 2))
    ]
    if captured:
        ways.append(("one after another", 2, True, lambda: _one_after_another([*common, *fastest], 2)))
    for number in plan.abreast:
        ways.append(("abreast", number, bool(captured), partial(_abreast, [*common, *fastest], number)))
    if plan.processes and importlib.util.find_spec("hydra_plugins.hydra_joblib_launcher") is not None:
        for number in plan.processes:
            ways.append(("processes", number, bool(captured), partial(_processes, [*common, *fastest], number)))
    rates = [[way() for *_, way in ways] for _ in range(plan.repeats)]  # each once, then each again
    rows = []
    for (name, number, graph, _), found in zip(ways, zip(*rates, strict=True), strict=True):
        row = {"model": model, "precision": precision, "way": name, "models": number, "captured": graph}
        row |= {
            "images_per_second": round(median(found), 1),
            "ratio": round(median(found) / median(r[0] for r in rates), 3),
        }
        if name == "abreast":
            row["hand_over_us"] = round(hand_over(number), 1)
        if name == "processes":
            row["mps"] = _mps()
        rows.append(row)
    return rows


def _mps() -> bool:
    """Whether NVIDIA's multi-process service is running here."""
    return Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", f"{tempfile.gettempdir()}/nvidia-mps"), "control").exists()


def _train(cfg: DictConfig, ends: Ends) -> None:
    """As a run does, as far as training goes."""
    with tempfile.TemporaryDirectory() as folder, switches.numerics(cfg.trainer.precision):
        job = replace(config.job(cfg), out=Path(folder))
        data = build.make_data(job)
        detector = build.make_detector(cfg, data.image_shape)
        trainer = build.make_trainer(job, data, "", callbacks=[_Epochs(ends)])
        device = trainer.strategy.root_device
        turns.own_stream(device)
        trainer.fit(detector.to(device).train(), datamodule=data)


def _configs(overrides: Sequence[str], number: int) -> list[DictConfig]:
    return [config.compose([*overrides, f"normal_class={i % 10}", f"seed={i // 10}"]) for i in range(number)]


def _one_after_another(overrides: Sequence[str], number: int) -> float:
    images = seconds = 0.0
    for cfg in _configs(overrides, number):
        ends: Ends = []
        _train(cfg, ends)
        images, seconds = images + ends[-1][1] - ends[0][1], seconds + ends[-1][0] - ends[0][0]
    return images / seconds


def _abreast(overrides: Sequence[str], number: int) -> float:
    runs: list[Ends] = [[] for _ in range(number)]
    jobs = [partial(_train, cfg, ends) for cfg, ends in zip(_configs(overrides, number), runs, strict=True)]
    turns.take(jobs, at_once=number)
    return rate(runs)


def _processes(overrides: Sequence[str], number: int) -> float:
    """By hydra/launcher=parallel. Epochs alone are counted, not the validation between them, in favour of this way."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["-m", "hydra/launcher=parallel", f"hydra.launcher.jobs_per_gpu={number}"]
        words += [f"seed={','.join(map(str, range(number)))}", f"runs={folder}", *overrides]
        subprocess.run([*COMMAND, *words], check=True, stdout=subprocess.DEVNULL)
        total = 0.0
        for path in Path(folder).rglob("result.json"):
            result = json.loads(path.read_text())
            each = result["steps"] / result["epochs"] * result["config"]["model"]["batch_size"]
            total += each / median(row["seconds"] for row in result["history"][1:])
    return total


def goals(models: int = 30, precision: str = "tf32") -> list[dict[str, Any]]:
    """Seconds of whole commands on one GPU, start-up, scoring and figures included: MNIST's 10 digits × 3 seeds.

    Needs MNIST in ``ANOMALY_LAB_DATA``.
    """
    rows = []
    for model, (epochs, limit) in GOALS.items():
        words = ["-m", "hydra/launcher=abreast", f"hydra.launcher.n_jobs={models}", f"model={model}", "size=full"]
        words += ["dataset=mnist", "split=official", f"model.budget.epochs={epochs}"]
        words += ["normal_class=range(0,10)", "seed=0,1,2"]
        words += ["trainer.accelerator=cuda", f"trainer.precision={precision}", "trainer.progress=false"]
        keys = OmegaConf.to_container(config.compose([f"model={model}"]).trainer)
        assert isinstance(keys, dict)
        words += [
            f"trainer.{key}={value}"
            for key, value in (("cuda_graphs", "true"), ("checkpoint_every", epochs))
            if key in keys
        ]
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            subprocess.run([*COMMAND, *words, f"runs={folder}"], check=True, stdout=subprocess.DEVNULL)
            seconds = time.perf_counter() - started
            results = [json.loads(path.read_text()) for path in Path(folder).rglob("result.json")]
        mean = float(np.mean([result["metrics"]["auroc"] for result in results]))
        row = {"model": model, "runs": len(results), "epochs": epochs, "precision": precision, "models": models}
        rows.append(row | {"seconds": round(seconds, 1), "limit": limit, "mean_auroc": round(mean, 4)})
    return rows


if __name__ == "__main__":
    found = goals() if sys.argv[1:] == ["goals"] else measure(sys.argv[1], "--quick" in sys.argv)
    print(json.dumps(found, indent=1))
