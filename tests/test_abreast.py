"""Runs that take turns in one process end as they end alone, to the bit: anomaly_lab.turns, hydra/launcher=abreast."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Command, process_state
from lightning import Callback
from omegaconf import DictConfig
from torch import Tensor

from anomaly_lab import cli, config, turns
from anomaly_lab.build import load_checkpoint
from anomaly_lab.cuda_graphs import GraphedSteps
from anomaly_lab.methods.shared_autoencoder import EncoderDecoderEncoder
from anomaly_lab.run import run

pytestmark = pytest.mark.slow

STEPS = 3
TINY = f"model.budget.epochs=2 model.budget.epoch_steps={STEPS} model.batch_size=48 trainer.progress=false"
SMALL = "model.detector.width=4"


class Dropped(EncoderDecoderEncoder):
    """With dropout, which draws from the one random stream that torch has for the whole process."""

    def _errors(self, x: Tensor) -> tuple[Tensor, Tensor | float]:
        return super()._errors(F.dropout(x, 0.3, self.training))


DROPPED = f"model=ede {SMALL} model.detector._target_={__name__}.Dropped"
SINGLE = [
    f"model=shared_ae {SMALL} normal_class=0 seed=1 trainer.watch_test=true",
    f"{DROPPED} normal_class=4 seed=2",
    f"model=ganomaly {SMALL} normal_class=3 trainer.precision=tf32",
    "model=aae model.detector.width=8 model.detector.critic_width=8 normal_class=1",  # noise of its own
    f"{DROPPED} normal_class=5 seed=3 trainer.precision=bf16-mixed",
]


def tiny(runs: Path, data: Path, words: str) -> DictConfig:
    return config.compose([*TINY.split(), *words.split(), f"runs={runs}", f"data_dir={data}"])


def made(cfg: DictConfig) -> dict[str, bytes]:
    """Every number that a finished run has left, but the seconds."""
    out = config.job(cfg).out
    checkpoint = load_checkpoint(out / "last.ckpt")
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in checkpoint["anomaly_lab"].pop("history")]
    found = {"history": json.dumps(rows).encode()}

    def walk(name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            found[name] = value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        elif isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{name}/{key}", inner)
        elif isinstance(value, list):
            for key, inner in enumerate(value):
                walk(f"{name}/{key}", inner)

    for part in ("state_dict", "optimizer_states", "anomaly_lab"):
        walk(part, checkpoint[part])
    with np.load(out / "scores.npz") as scores:
        found |= {name: scores[name].tobytes() for name in scores}
    assert sum(name.startswith("optimizer_states") for name in found) > 10 and len(found["score"]) > 100
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, data: Path) -> list[dict[str, bytes]]:
    cfgs = [tiny(tmp_path_factory.mktemp("alone"), data, words) for words in SINGLE]
    assert all(run(cfg) for cfg in cfgs)
    return [made(cfg) for cfg in cfgs]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the threads that give their turn away, in that order."""
    order: list[str] = []
    real = turns.pass_on

    def pass_on() -> None:
        order.append(threading.current_thread().name)
        real()

    monkeypatch.setattr(turns, "pass_on", pass_on)
    return order


# Runs ---------------------------------------------------------------------------------------------------------------


def test_runs_abreast_are_those_alone_to_the_bit_and_take_turns_step_by_step(
    tmp_path: Path, data: Path, alone: list[dict[str, bytes]], recorded: list[str]
) -> None:
    before = torch.get_rng_state(), torch.get_float32_matmul_precision(), warnings.filters
    cfgs = [tiny(tmp_path, data, words) for words in SINGLE]
    results = turns.take([partial(run, cfg) for cfg in cfgs], at_once=4)
    for cfg, result, expected in zip(cfgs, results, alone, strict=True):
        assert result is not None and result["identity"] == config.job(cfg).identity
        assert made(cfg) == expected
    order = recorded
    assert order[: 4 * STEPS] == [f"run {number}" for number in range(4)] * STEPS
    assert order.index("run 4") > min(order[::-1].index(f"run {number}") for number in range(4)), "no place is free"
    after = torch.get_rng_state(), torch.get_float32_matmul_precision(), warnings.filters
    assert torch.equal(before[0], after[0]) and before[1] == after[1] and before[2] is after[2]


def test_without_random_streams_of_their_own_runs_would_disturb_each_other(
    tmp_path: Path, data: Path, alone: list[dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "OWN", turns.OWN[1:])
    cfgs = [tiny(tmp_path, data, SINGLE[number]) for number in (1, 4)]
    turns.take([partial(run, cfg) for cfg in cfgs], at_once=2)
    assert made(cfgs[0]) != alone[1]


class Again:
    """A graph without a GPU: a replay computes the step again. Nobody else may have a turn in any of its parts."""

    handed_over: list[str]

    def __init__(self, noise: torch.Generator) -> None:
        self._step: Callable[[], None] | None = None
        self.replayed = 0

    def warm_up(self, step: Callable[[], None]) -> None:
        before = len(self.handed_over)
        step()
        assert len(self.handed_over) == before

    def capture(self, step: Callable[[], None]) -> None:
        self._step = step

    def replay(self) -> None:
        assert self._step is not None
        self.warm_up(self._step)
        self.replayed += 1


def test_captured_steps_take_turns_as_whole_steps(
    tmp_path: Path, data: Path, alone: list[dict[str, bytes]], recorded: list[str]
) -> None:
    Again.handed_over = recorded
    graphs: list[Again] = []

    def made_one(noise: torch.Generator) -> Again:
        graphs.append(Again(noise))
        return graphs[-1]

    cfgs = [tiny(tmp_path, data, SINGLE[number]) for number in (1, 2, 4)]
    turns.take([partial(run, cfg, [GraphedSteps(made_one)]) for cfg in cfgs], at_once=3)
    assert [made(cfg) for cfg in cfgs] == [alone[number] for number in (1, 2, 4)]
    assert sum(graph.replayed for graph in graphs) >= 3 * STEPS


class Watched(Callback):
    def __init__(self) -> None:
        self.seen: set[str] = set()

    def on_train_batch_start(self, *_: Any) -> None:
        assert torch.are_deterministic_algorithms_enabled()
        self.seen.add(torch.get_float32_matmul_precision())


def test_each_run_computes_with_its_own_precision(tmp_path: Path, data: Path) -> None:
    watched = [Watched(), Watched()]
    cfgs = [tiny(tmp_path, data, f"{SMALL} trainer.precision={precision}") for precision in ("tf32", "32-true")]
    turns.take([partial(run, cfg, [watch]) for cfg, watch in zip(cfgs, watched, strict=True)], at_once=2)
    assert [watch.seen for watch in watched] == [{"high"}, {"highest"}]
    assert not torch.are_deterministic_algorithms_enabled()


class Last(Callback):
    """Keeps how the process is switched at the last step of a run."""

    def on_train_batch_end(self, *_: Any) -> None:
        self.state = process_state()


def test_the_first_run_to_end_leaves_the_others_their_threads_and_their_environment(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before, other = process_state(), torch.get_num_threads() + 1
    last = [Last(), Last()]
    words = [f"{SMALL} trainer.threads={other} model.budget.epochs={epochs}" for epochs in (1, 4)]
    jobs = [partial(run, tiny(tmp_path, data, w), [watch]) for w, watch in zip(words, last, strict=True)]
    turns.take(jobs, at_once=2)
    assert process_state() == before
    assert last[1].state == last[0].state and last[1].state["threads"] == other
    assert last[1].state["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_each_run_has_a_stream_and_its_results_are_those_alone(tmp_path: Path, data: Path) -> None:
    streams: set[int] = set()

    class Stream(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            streams.add(torch.cuda.current_stream().cuda_stream)

    def made_in(folder: str, at_once: int) -> list[np.ndarray]:
        cfgs = [tiny(tmp_path / folder, data, f"{words} trainer.accelerator=cuda") for words in SINGLE]
        jobs = [partial(run, cfg, [Stream()]) for cfg in cfgs]
        if at_once == 1:
            assert all(job() for job in jobs)
        else:
            assert all(turns.take(jobs, at_once))
        return [np.load(config.job(cfg).out / "scores.npz")["score"] for cfg in cfgs]

    expected = made_in("alone", 1)
    assert streams == {0}
    found = made_in("abreast", 5)
    assert len(streams) == 6
    for score, reference in zip(found, expected, strict=True):
        np.testing.assert_allclose(score, reference, rtol=1e-3)


# The command --------------------------------------------------------------------------------------------------------


@pytest.fixture
def lab(lab: Command) -> Command:
    """``anomaly-lab -m hydra/launcher=abreast``."""
    return lambda words: lab(f"-m hydra/launcher=abreast {words}")


def written(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_a_sweep_goes_on_beside_a_failure_and_a_repeated_one_makes_only_what_is_missing(
    lab: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once: list[int] = []
    real = turns.pass_on

    def counted() -> None:
        at_once.append(sum(thread.name.startswith("run ") for thread in threading.enumerate()))
        real()

    monkeypatch.setattr(turns, "pass_on", counted)
    grid = f"{TINY} {SMALL} hydra.launcher.n_jobs=2 normal_class=0,99,1 model.optimizer.lr=1e-4,1e30"
    code, out, err = lab(grid)
    assert code == cli.FAILED and max(at_once) == 2
    lines = out.splitlines()
    assert lines[-2] == "6 runs: 2 done, 4 failed"
    assert sorted(line.split("  ")[3] for line in lines if "AUROC" in line) == ["normal 0", "normal 1"]
    assert err.count("training diverged") == 2 and err.count("no class 99") == 2 and "Traceback" not in err
    failures = [json.loads(path.read_text())["error"] for path in Path("runs").rglob("failure.json")]
    assert len(failures) == 2 and all(line.startswith("Diverged: ") for line in failures)

    good = grid.replace(",1e30", "").replace(",99", "")
    before = written(Path("runs/shared_ae_50_small"))
    code, out, err = lab(good)
    assert (code, err, out.count("(done before)"), out.splitlines()[-1]) == (0, "", 2, "2 runs: 2 done")
    assert written(Path("runs/shared_ae_50_small")) == before

    lost, kept = sorted(Path("runs").rglob("result.json"))
    lost.unlink()
    code, out, _ = lab(good)
    assert code == 0 and out.count("(done before)") == 1
    assert lost.exists() and kept.stat().st_mtime_ns == before[str(kept)]


def test_a_run_that_does_not_fit_beside_the_others_says_that_fewer_may(
    lab: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = EncoderDecoderEncoder.plays

    def too_large(self: Any, batch: Any) -> Any:
        if len(batch.x) == 64:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(self, batch)

    monkeypatch.setattr(EncoderDecoderEncoder, "plays", too_large)
    code, out, err = lab(f"{TINY} {SMALL} model=ede model.batch_size=64,32")
    assert code == cli.FAILED and "2 runs: 1 failed, 1 done" in out
    assert "out of memory with model.batch_size=64" in err and "lower hydra.launcher.n_jobs" in err


def test_a_run_that_another_process_makes_is_left_to_it(lab: Command, tmp_path: Path, data: Path) -> None:
    busy = config.job(tiny(tmp_path / "runs", data, SMALL)).out
    busy.mkdir(parents=True)
    hold = f"import fcntl; f = open({str(busy / '.lock')!r}, 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True)"
    with subprocess.Popen([sys.executable, "-c", f"{hold}; input()"], stdin=-1, stdout=-1, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "1\n"
        code, out, err = lab(f"{TINY} {SMALL} seed=0,1")
        holder.communicate("\n")
    assert code == cli.FAILED and f"left to the process that is busy with it: {busy.relative_to(tmp_path)}" in err
    assert out.count("AUROC") == 1 and "seed 1" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("hydra.launcher.n_jobs=0", "hydra.launcher.n_jobs=0: give a whole number from 1"),
        ("hydra.launcher.n_jobs=two", "hydra.launcher.n_jobs=two: give a whole number from 1"),
        ("hydra.launcher.streams=2", "hydra.launcher.streams cannot be set"),
        ("logger=csv,wandb", "logger=wandb records one run at a time in a process: with hydra/launcher=abreast choose"),
    ],
)
def test_a_mistake_gets_one_line(lab: Command, words: str, message: str) -> None:
    code, out, err = lab(words)
    assert (code, out) == (cli.MISTAKE, "")
    assert err.startswith(f"anomaly-lab: error: {message}") and err.count("\n") == 1


PROGRAM = "import sys; from anomaly_lab.cli import train; sys.argv[0] = 'anomaly-lab'; train()"


@pytest.mark.timeout(1800)  # three starts and three runs, on whatever share of a core
def test_signals_stop_all_runs_and_the_same_command_goes_on_to_the_same_bits(tmp_path: Path, data: Path) -> None:
    """Real processes: terminated, resumed, interrupted, resumed."""
    common = f"{TINY} {SMALL} model.budget.epochs=12 trainer.threads=1 trainer.figures=false logger=none"
    words = ["-m", "hydra/launcher=abreast", "hydra.launcher.n_jobs=2", "normal_class=0,1,2", *shlex.split(common)]
    command, environment = [sys.executable, "-c", PROGRAM, *words], os.environ | {"ANOMALY_LAB_DATA": str(data)}
    start = partial(subprocess.Popen, command, cwd=tmp_path, env=environment, stdout=-1, stderr=-1, text=True)

    def epochs() -> list[int]:
        return sorted(
            len(load_checkpoint(path)["anomaly_lab"]["history"]) for path in (tmp_path / "runs").rglob("last.ckpt")
        )

    for number, code, message in (
        (signal.SIGTERM, cli.TERMINATED, "terminated: the same command goes on after the last whole epoch"),
        (signal.SIGINT, cli.INTERRUPTED, "interrupted: the same command goes on after the last whole epoch"),
    ):
        before, end = epochs(), time.monotonic() + 600
        with start() as process:
            while len(now := epochs()) < 2 or now == before:
                assert process.poll() is None and time.monotonic() < end, process.communicate()[1]
                time.sleep(0.02)
            process.send_signal(number)
            _, err = process.communicate(timeout=300)
        assert (process.returncode, err) == (code, f"{message}\n")
        assert len(epochs()) == 2 and max(epochs()) < 12, "both were at work, and neither had ended"
        assert not [path for name in ("result.json", "failure.json", "*.part") for path in tmp_path.rglob(name)]

    with start() as process:
        out, err = process.communicate(timeout=900)
    assert (process.returncode, out.splitlines()[-1]) == (0, "3 runs: 3 done"), err
    for named in range(3):
        words = f"{common} normal_class={named}"
        whole, resumed = tiny(tmp_path / "whole", data, words), tiny(tmp_path / "runs", data, words)
        assert run(whole) is not None and made(resumed) == made(whole)


# Turns --------------------------------------------------------------------------------------------------------------


def counting(name: str, steps: int, log: list[str]) -> str:
    for step in range(steps):
        log.append(f"{name}{step}")
        turns.pass_on()
    return name


def test_turns_go_round_and_who_ends_makes_room_for_the_next() -> None:
    log: list[str] = []
    lengths = {"a": 2, "b": 4, "c": 1, "d": 2}
    jobs = [partial(counting, name, steps, log) for name, steps in lengths.items()]
    assert turns.take(jobs, at_once=2) == ["a", "b", "c", "d"]
    assert log == ["a0", "b0", "a1", "b1", "b2", "c0", "b3", "d0", "d1"] and not turns.shared()
    log.clear()
    assert turns.take(jobs, at_once=1) == ["a", "b", "c", "d"]
    assert log == ["a0", "a1", "b0", "b1", "b2", "b3", "c0", "d0", "d1"]
    assert turns.take([], at_once=3) == []


def test_only_one_works_at_a_time_whatever_they_wait_for() -> None:
    working: list[int] = []
    clashes: list[int] = []
    rested = threading.Barrier(3, timeout=60)  # broken, unless all three stand aside at once

    def job(number: int) -> int:
        for step in range(200):
            working.append(number)
            if len(working) > 1:
                clashes.append(step)
            time.sleep(0)
            working.remove(number)
            if step == 100:
                with turns.aside():
                    rested.wait()
            elif step % 7 == number:
                with turns.aside():
                    time.sleep(0.001)
            else:
                turns.pass_on()
        return number

    assert turns.take([partial(job, number) for number in range(3)], at_once=3) == [0, 1, 2]
    assert clashes == []


def test_global_state_is_each_jobs_own_and_at_last_the_callers() -> None:
    value = ["the caller's"]
    own = (lambda: value[0], lambda kept: value.__setitem__(0, kept))

    def job(name: str) -> Sequence[str]:
        seen = [value[0]]
        value[0] = name
        for _ in range(3):
            turns.pass_on()
            seen.append(value[0])
        with turns.aside():
            pass
        return [*seen, value[0]]

    found = turns.take([partial(job, name) for name in "abc"], at_once=2, own=[own])
    assert found == [["the caller's", *[name] * 4] for name in "abc"]
    assert value == ["the caller's"]


def test_an_exception_that_reaches_the_caller_ends_all_jobs() -> None:
    ended: list[str] = []

    def endless(name: str) -> None:
        try:
            while True:
                turns.pass_on()
        finally:
            ended.append(name)

    def faulty() -> None:
        turns.pass_on()
        raise SystemExit(3)

    with pytest.raises(SystemExit) as caught:
        turns.take([partial(endless, "a"), faulty, partial(endless, "b"), partial(endless, "never begun")], at_once=3)
    assert caught.value.code == 3 and sorted(ended) == ["a", "b"]

    ended.clear()
    threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        turns.take([partial(endless, "a"), partial(endless, "b")], at_once=2)
    assert sorted(ended) == ["a", "b"]


def test_who_waits_for_the_device_asks_it_and_lets_the_others_work(monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        """Done after some questions, or when somebody waits for it."""

        def __init__(self) -> None:
            self.left = 3

        def record(self, stream: str) -> None:
            assert stream == f"stream of {threading.current_thread().name}"

        def query(self) -> bool:
            self.left -= 1
            return self.left < 0

        def synchronize(self) -> None:
            log.append("blocked")
            self.left = 0

    log: list[str] = []
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: f"stream of {threading.current_thread().name}")

    def waiting() -> None:
        turns.settle(device)
        log.append("settled")

    turns.take([waiting, partial(counting, "b", 5, log)], at_once=2)
    assert log == ["b0", "b1", "b2", "settled", "b3", "b4"], "three questions, a turn after each"
    log.clear()
    turns.take([waiting], at_once=1)
    waiting()
    assert log == ["blocked", "settled"] * 2
    turns.settle(torch.device("cpu"))
    assert len(log) == 4


# The benchmark ------------------------------------------------------------------------------------------------------


def test_the_benchmark_counts_what_is_trained_while_all_runs_are_at_it() -> None:
    from benchmarks import abreast

    # One image a second; two a second; both only from 2 to 5.
    assert abreast.rate([[(2.0, 2), (4.0, 4), (6.0, 6)], [(1.0, 2), (5.0, 10)]]) == 3
    with pytest.raises(ValueError, match="not trained side by side"):
        abreast.rate([[(0.0, 1), (1.0, 2)], [(2.0, 1), (3.0, 2)]])


def test_the_benchmark_runs(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import abreast

    monkeypatch.setenv("ANOMALY_LAB_DATA", str(data))
    (row,) = abreast.measure("cpu", True)["rows"]
    assert (row["way"], row["models"]) == ("abreast", 2) and 0 < row["hand_over_us"] < 10_000
    one, two = abreast._ways(abreast.TINY, "cpu", "shared_ae", "32-true")
    assert (one["way"], two["way"], two["models"]) == ("one after another", "abreast", 2)
    assert one["ratio"] == 1 and one["images_per_second"] > 0 and two["images_per_second"] > 0
