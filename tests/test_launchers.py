"""Many runs at once on one machine: processes that share the cores, GPUs dealt out, workers that are killed."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import Said
from laboratory import BARE, Lab, environment, unlimited, until
from omegaconf import OmegaConf

from anomaly_lab import cli, sweep
from hydra_plugins.anomaly_lab_launchers import ParallelLauncher, RayLauncher, SlurmLauncher


@pytest.fixture
def lab_here(tmp_path: Path, data: Path) -> Callable[..., Said]:
    """The commands, with further environment variables."""

    def command(*words: str, **variables: str) -> Said:
        return Lab(tmp_path, environment(data) | variables)(*words)

    return command


@pytest.mark.parametrize(("visible", "names"), [("", []), ("-1", []), ("3,5", ["3", "5"]), ("3,-1,5", ["3"])])
def test_gpus_are_those_that_cuda_sees(monkeypatch: pytest.MonkeyPatch, visible: str, names: list[str]) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert sweep.gpus() == names


@pytest.mark.slow
@pytest.mark.parametrize(
    ("visible", "options", "seen"),
    [
        ("", [], ["", ""]),
        ("3,5", [], ["3", "5"]),
        ("5", ["hydra.launcher.jobs_per_gpu=2"], ["5", "5"]),
    ],
    ids=["no GPU", "two GPUs", "two jobs a GPU"],
)
def test_the_parallel_launcher_deals_out_cores_and_gpus(
    tmp_path: Path, data: Path, visible: str, options: list[str], seen: list[str]
) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="needs pip install 'anomaly-lab[parallel]'")
    lab = Lab(tmp_path, unlimited(data) | {"CUDA_VISIBLE_DEVICES": visible}).with_probe(at_once=2)
    grid = ["model=probe", "seed=0,1,2,3,4", "trainer.accelerator=cpu", *BARE]
    said = lab("-m", "hydra/launcher=parallel", *options, *grid)
    assert said.code == cli.DONE and said.out.endswith("5 runs: 5 done\n"), said
    # A file for each pair of process and GPU: two workers, and none of them has ever changed its GPU.
    assert sorted(probe["gpu"] for probe in lab.probes()) == seen
    assert {probe["threads"] for probe in lab.probes()} == {max(1, len(os.sched_getaffinity(0)) // 2)}


@pytest.mark.slow
def test_a_worker_that_is_killed_takes_no_other_run_along(tmp_path: Path, data: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="needs pip install 'anomaly-lab[parallel]'")
    lab = Lab(tmp_path, environment(data) | {"OMP_NUM_THREADS": "1"}).with_deadly()
    moods = "model.detector.mood=dies,fine,raises,calm,merry"
    code, out, err = lab("-m", "hydra/launcher=parallel", "model=deadly", moods, *BARE)
    assert code == cli.FAILED, out + err
    [counts] = re.findall(r"^5 runs: (.*)$", out, re.M)
    assert set(counts.split(", ")) == {"3 done", "1 failed", "1 interrupted"}, out + err
    assert re.search(r"^failed: .*mood=dies.*: its process was killed by signal 9$", err, re.M)
    assert err.count("in before_fit") == 1, "what failed is not tried again in the same sweep"
    [failure] = (tmp_path / "runs").rglob("failure.json")
    assert "in before_fit" in json.loads(failure.read_text())["traceback"]


@pytest.mark.parametrize(
    ("module", "launch", "extra"),
    [
        (
            "hydra_plugins.hydra_joblib_launcher.joblib_launcher",
            lambda: ParallelLauncher(None, 1).launch([], 0),
            "parallel",
        ),
        ("ray", lambda: RayLauncher(OmegaConf.create(), OmegaConf.create()).launch([], 0), "ray"),
        (
            "hydra_plugins.hydra_submitit_launcher.submitit_launcher",
            lambda: SlurmLauncher(False, "j")._submit([]),
            "slurm",
        ),
    ],
)
def test_a_launcher_without_its_extra_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, module: str, launch: Callable[[], object], extra: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf"needs an extra: pip install anomaly-lab\[{extra}\]"):
        launch()


@pytest.mark.parametrize("option", ["n_jobs=0", "jobs_per_gpu=half"])
def test_a_number_of_jobs_that_is_none_gets_one_line(lab_here: Callable[..., Said], option: str) -> None:
    said = lab_here("-m", "hydra/launcher=parallel", f"hydra.launcher.{option}", "seed=0,1")
    assert said.code == cli.MISTAKE and f"hydra.launcher.{option}: give a whole number from 1" in said.err


@pytest.mark.slow
def test_of_two_processes_that_start_the_same_run_the_second_leaves(tmp_path: Path, data: Path) -> None:
    lab = Lab(tmp_path, environment(data) | {"OMP_NUM_THREADS": "1"}).with_probe(at_once=2)
    words = ["model=probe", *BARE]
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(lab, *words)
        try:
            until(lab.probes)  # in its run, and waiting there
            second = lab(*words)
        finally:
            lab.let_probes_go()
    assert "left to the process that is busy with it: runs/probe/digits/pooled/n0/s0" in second.err
    assert first.result().code == cli.DONE
    assert len(lab.probes()) == 1, "the second began the run as well"
