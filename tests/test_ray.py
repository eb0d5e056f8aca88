"""Runs as tasks of a real Ray: booked fractions of a GPU, workers that are killed, a cluster that is joined."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from laboratory import BARE, GATED_MODEL, Lab, environment, unlimited, until

from anomaly_lab import cli

pytestmark = pytest.mark.ray

ON_RAY = ["-m", "hydra/launcher=ray_shared", "trainer.accelerator=cpu"]
NO_GPU = ["hydra.launcher.remote.num_gpus=0", "+hydra.launcher.init.num_cpus=2"]
EPOCHS = 5
GRID = [*GATED_MODEL, f"model.budget.epochs={EPOCHS}", "normal_class=3,8", "trainer.accelerator=cpu"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed: make test-ray")
    monkeypatch.setenv("RAY_worker_niceness", "0")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(16))  # or Ray writes one into the home folder


def made(lab: Lab) -> dict[str, Any]:
    """Scores of every run as bytes, and what was measured but the seconds."""
    found = {}
    for path in sorted(lab.folder.rglob("result.json")):
        result = json.loads(path.read_text())
        history = [{k: v for k, v in row.items() if k != "seconds"} for row in result["history"]]
        scores = (path.parent / "scores.npz").read_bytes()
        found[path.relative_to(lab.folder).as_posix()] = (scores, result["metrics"], history)
    return found


def test_a_run_whose_worker_is_killed_goes_on_in_another_to_the_same_bytes(tmp_path: Path, data: Path) -> None:
    (tmp_path / "serial").mkdir()
    (tmp_path / "ray").mkdir()
    one_thread = environment(data) | {"OMP_NUM_THREADS": "1"}  # as Ray gives each: more would add up in another order
    serial = Lab(tmp_path / "serial", one_thread).with_gate(0)
    serial.open_gate()
    said = serial("-m", *GRID)
    assert said.code == cli.DONE and said.out.endswith("2 runs: 2 done\n"), said

    lab = Lab(tmp_path / "ray", one_thread).with_gate(2)
    with ThreadPoolExecutor(1) as pool:
        sweep = pool.submit(lab, *ON_RAY, *NO_GPU, *GRID)
        until(lambda: len(lab.waiting()) == 2 or sweep.done())
        assert not sweep.done(), sweep.result()
        victim, other = lab.waiting()
        command = Path(f"/proc/{victim}/cmdline").read_bytes()
        os.kill(victim, signal.SIGKILL)
        lab.open_gate()
        said = sweep.result()
    assert command.startswith(b"ray::"), command
    assert said.code == cli.DONE and said.out.endswith("2 runs: 2 done\n"), said
    steps = lab.steps()
    assert steps[victim] == 2 and steps[other] >= EPOCHS and len(steps) >= 2
    assert steps.total() == 2 * EPOCHS, "the killed run went on after its second epoch, not from the start"
    assert made(lab) == made(serial) and len(made(lab)) == 2


def test_a_run_that_kills_every_worker_fails_alone(tmp_path: Path, data: Path) -> None:
    lab = Lab(tmp_path, environment(data) | {"OMP_NUM_THREADS": "1"}).with_deadly()
    words = ["model=deadly", "model.detector.mood=dies,fine,raises", *BARE]
    code, out, err = lab(*ON_RAY, *NO_GPU, "hydra.launcher.remote.max_retries=1", *words)
    assert code == cli.FAILED, out + err
    [counts] = re.findall(r"^3 runs: (.*)$", out, re.M)
    assert set(counts.split(", ")) == {"1 done", "2 failed"}, out + err
    [line] = re.findall(r"^failed: .*: its worker died, and so did those that tried it again.*$", err, re.M)
    folder = tmp_path / re.findall(r"^failed: (\S+): ", line)[0]
    assert json.loads((folder / "failure.json").read_text())["error"].startswith("its worker died")


@pytest.fixture
def cluster() -> Iterator[str]:
    """The address of a Ray that was started in another folder, with other variables: two cores and a pretended GPU."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tempfile.mkdtemp(prefix="ray-")  # short: it has sockets, whose paths may have 107 characters
    resources = ["--num-cpus=2", "--num-gpus=1", "--object-store-memory=100000000", "--include-dashboard=false"]
    start = "from ray.scripts.scripts import main; main()"
    head = ["start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={port}", f"--temp-dir={folder}"]
    with open(Path(folder) / "log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", start, *head, *resources],
            cwd=folder,
            env=unlimited(Path(folder)),
            stdout=log,
            stderr=log,
        )
    try:
        until(lambda: "Ray runtime started" in (Path(folder) / "log").read_text() or process.poll() is not None)
        assert process.poll() is None, (Path(folder) / "log").read_text()
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()  # takes its processes along
        process.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


def test_two_runs_share_a_gpu_of_a_cluster_that_is_joined(tmp_path: Path, data: Path, cluster: str) -> None:
    lab = Lab(tmp_path, unlimited(data)).with_probe(at_once=2)
    words = ["model=probe", "seed=0,1", *BARE]
    said = lab(*ON_RAY, f"hydra.launcher.init.address={cluster}", *words)
    assert said.code == cli.DONE and said.out.endswith("2 runs: 2 done\n"), said
    assert lab.probes() == [{"gpu": "0", "threads": 1}] * 2, "two halves of one"
    again = lab(*ON_RAY, "hydra.launcher.init.address=127.0.0.1:1", *words)
    assert again.code == cli.DONE and again.out.count("done before") == 2, "what is done needs no Ray"


def test_a_machine_without_a_gpu_is_told_so_at_once(tmp_path: Path, data: Path) -> None:
    said = Lab(tmp_path, environment(data) | {"CUDA_VISIBLE_DEVICES": ""})(*ON_RAY, "seed=0,1")
    assert said.code == cli.MISTAKE and "hydra.launcher.remote.num_gpus=0.5 is more than Ray finds here (0)" in said.err
