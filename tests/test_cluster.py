"""Many runs at once: GPUs dealt out on one machine, a real Slurm that preempts, ends and loses jobs, code that changes.

The tests marked ``slurm`` start a throw-away cluster from the Slurm that is installed; without one they are skipped.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import throwaway_slurm
from omegaconf import OmegaConf
from throwaway_slurm import Cluster, until

from anomaly_lab import cli, config, results
from hydra_plugins.anomaly_lab_launchers import ParallelLauncher, RayLauncher, SlurmLauncher, _Notice

ROOT = Path(__file__).parent.parent
SMALL = ["model.budget.epoch_steps=1", "model.detector.width=4", "trainer.progress=false"]
LONG = [*SMALL, "model.budget.epochs=40"]
"""Ten seconds of training and more, with a checkpoint every quarter of a second."""

PROBE = '''
import json, os, time
from pathlib import Path
import torch
from anomaly_lab.detector import Detector

class Probe(Detector):
    """Writes down what its process sees, and waits until so many have done the same: they run side by side."""

    def before_fit(self, images):
        here, wanted = Path(os.environ["PROBES"]), int(os.environ["PROBES_AT_ONCE"])
        seen = {"gpu": os.environ.get("CUDA_VISIBLE_DEVICES"), "threads": torch.get_num_threads()}
        mine = here / f"{os.getpid()}-{seen['gpu']}.part"
        mine.write_text(json.dumps(seen))
        mine.rename(mine.with_suffix(".json"))
        end = time.monotonic() + 120
        while len(list(here.glob("*.json"))) < wanted:
            assert time.monotonic() < end, "the others did not come"
            time.sleep(0.1)

    def score(self, x):
        return x.mean((1, 2, 3))
'''

PROBE_YAML = """
detector: {_target_: probe.Probe}
optimizer: {}
scheduler: null
clip: null
budget: {epochs: 1, steps: null, epoch_steps: 1}
batch_size: 64
input: {size: 8, fit: pad, range: [0, 1], channels: null}
"""


class Said(NamedTuple):
    code: int
    out: str
    err: str


class Lab(NamedTuple):
    """The commands in processes of their own, in a folder of their own."""

    folder: Path
    environment: Mapping[str, str]

    def __call__(self, *words: str, command: str = "train", code: Path = ROOT) -> Said:
        program = (
            f"import sys; sys.argv[0] = 'anomaly-lab'; from anomaly_lab.cli import {command}; sys.exit({command}())"
        )
        done = subprocess.run(
            [sys.executable, "-c", program, *words],
            cwd=self.folder,
            env={**self.environment, "PYTHONPATH": os.pathsep.join([str(code), str(self.folder)])},
            capture_output=True,
            text=True,
        )
        return Said(done.returncode, done.stdout, done.stderr)

    def status(self) -> dict[str, tuple[str, str]]:
        """State and details by the folder of the class, as ``anomaly-lab-report --status`` prints them."""
        lines = self("runs", "--status", command="report").out.splitlines()[:-1]
        rows = [line.split(maxsplit=2) for line in lines]
        return {path.split("/")[3]: (state, "".join(rest)) for state, path, *rest in rows}

    def with_probe(self, at_once: int) -> Lab:
        """The same with ``model=probe``, of which so many wait for each other."""
        (self.folder / "conf" / "model").mkdir(parents=True)
        (self.folder / "conf" / "model" / "probe.yaml").write_text(PROBE_YAML)
        (self.folder / "probe.py").write_text(PROBE)
        (self.folder / "probes").mkdir()
        own = {"PROBES": str(self.folder / "probes"), "PROBES_AT_ONCE": str(at_once)}
        return self._replace(environment={**self.environment, config.EXTRA_CONFIGS: str(self.folder / "conf"), **own})

    def probes(self) -> list[dict[str, Any]]:
        return [json.loads(path.read_text()) for path in (self.folder / "probes").glob("*.json")]

    def result(self, name: str = "n0") -> dict[str, Any]:
        [path] = self.folder.glob(f"runs/*/*/*/{name}/*/result.json")
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    def log(self, job: str, kind: str = "err") -> str:
        path = self.folder / "runs" / ".submitit" / job / f"{job}_0_log.{kind}"
        return path.read_text() if path.exists() else ""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


def environment(data: Path, of: Mapping[str, str] = os.environ) -> dict[str, str]:
    hidden = ("CUDA_VISIBLE_DEVICES", config.EXTRA_CONFIGS, config.SUBMITTED)
    return {name: value for name, value in of.items() if name not in hidden} | {"ANOMALY_LAB_DATA": str(data)}


# Slurm -------------------------------------------------------------------------------------------------------------

slurm = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.flaky(reruns=2),  # real daemons with timeouts of their own: on a starved machine Slurm itself gives up
    pytest.mark.skipif(bool(throwaway_slurm.missing()), reason=f"no Slurm: {', '.join(throwaway_slurm.missing())}"),
]
"""Marks of the tests that need a cluster."""


def on_slurm(test: Callable[..., None]) -> Callable[..., None]:
    for mark in slurm:
        test = mark(test)
    return test


SLURM = ["-m", "hydra/launcher=slurm", "hydra.launcher.mem_gb=1", "hydra.launcher.cpus_per_task=1"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="needs pip install 'anomaly-lab[slurm]'")
    with throwaway_slurm.started(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture
def lab(tmp_path: Path, data: Path, cluster: Cluster) -> Iterator[Lab]:
    yield Lab(tmp_path, environment(data, cluster.environment))
    cluster.clear()


def submitted(said: Said) -> str:
    """The number of the Slurm job that a command has submitted."""
    assert "submitted as Slurm job " in said.out, said
    return said.out.partition("submitted as Slurm job ")[2].partition(":")[0]


def same_run(one: Path, other: Path) -> None:
    """The two runs are one to the bit: every score, every metric, every column of the history but the clock's."""
    [first], [second] = one.glob("runs/*/*/*/n0/*"), other.glob("runs/*/*/*/n0/*")
    with np.load(first / "scores.npz") as a, np.load(second / "scores.npz") as b:
        assert sorted(a) == sorted(b)
        for name in a:
            assert a[name].tobytes() == b[name].tobytes(), name
    left, right = (json.loads((folder / "result.json").read_text()) for folder in (first, second))
    assert left["metrics"] == right["metrics"] and left["partition"] == right["partition"]
    for row in left["history"] + right["history"]:
        del row["seconds"]
    assert left["history"] == right["history"] and len(left["history"]) == 40
    rows = [(folder / "metrics.csv").read_text().splitlines() for folder in (first, second)]
    clock = rows[0][0].split(",").index("seconds")
    a_rows, b_rows = ([[*r.split(",")[:clock], *r.split(",")[clock + 1 :]] for r in some] for some in rows)
    assert a_rows == b_rows


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A folder with the run of `LONG` that nobody disturbed, made without Slurm."""
    folder = tmp_path_factory.mktemp("undisturbed")
    said = Lab(folder, environment(data) | {"OMP_NUM_THREADS": "1"})(*LONG)
    assert said.code == 0, said
    return folder


def epochs(lab: Lab) -> int:
    """How many epochs the one run of ``lab`` has behind it."""
    found = list(lab.folder.glob("runs/*/*/*/n0/*/metrics.csv"))
    return len(found[0].read_text().splitlines()) - 1 if found and found[0].parent.joinpath("last.ckpt").exists() else 0


def empty(cluster: Cluster) -> Callable[[], bool]:
    return lambda: not cluster("squeue", "--noheader")


@on_slurm
def test_a_grid_is_submitted_and_left_and_the_same_command_fills_what_is_missing(lab: Lab, cluster: Cluster) -> None:
    lab = lab.with_probe(at_once=2)
    grid = [*SLURM, "model=probe", "trainer.progress=false"]
    first = lab(*grid, "normal_class=0,1,2,99", "hydra.launcher.array_parallelism=2")
    assert first.code == cli.FAILED and "no class 99" in first.err, "what cannot be made is said at once"
    job = submitted(first)
    assert first.out.startswith(f"submitted as Slurm job {job}: 3 runs\n")

    again = lab(*grid, "normal_class=0,1,2,3")
    assert again.code == cli.DONE, again
    assert again.out.startswith("with Slurm already: 3 runs\nsubmitted as Slurm job ") and ": 1 run\n" in again.out
    assert again.out.endswith("the jobs go on by themselves: anomaly-lab-report runs --status\n")
    seen = lab.status()
    assert {state for state, _ in seen.values()} <= {"queued", "running"}
    assert seen["n3"][0] == "queued" and seen["n3"][1].startswith(f"Slurm job {submitted(again)}, pending (")

    cluster("scancel", submitted(again))
    until(empty(cluster), 120, cluster.logs)
    assert {name: state for name, (state, _) in lab.status().items()} == {
        **dict.fromkeys(("n0", "n1", "n2"), "done"),
        "n3": "interrupted",
    }
    probes = lab.probes()
    assert {probe["gpu"] for probe in probes} == {"0", "1"}, "side by side, each with a GPU of its own"
    assert [probe["threads"] for probe in probes] == [1, 1, 1], "as many as the job has cores"
    assert "submitted" not in lab.result()["git"]

    before = {path: path.stat().st_mtime_ns for path in lab.folder.rglob("result.json")}
    last = lab(*grid, "normal_class=0,1,2,3", "hydra.launcher.wait=true")
    assert last.code == cli.DONE and last.out.endswith("4 runs: 4 done\n"), last
    assert last.out.startswith(f"submitted as Slurm job {submitted(last)}: 1 run\n")
    assert {path: path.stat().st_mtime_ns for path in before} == before, "a finished run was touched"
    assert len(before) == 3 and lab.result("n3")


def preempt(lab: Lab, cluster: Cluster, job: str, told_by: str) -> None:
    """Let a job of the other partition take the node away from a run that is on its way, and give it back."""
    until(lambda: epochs(lab) >= 2, 90, cluster.logs)
    rival = cluster.submit("high", "sleep", "1")
    until(lambda: cluster.job(rival)["JobState"] == "COMPLETED", 60, cluster.logs)
    assert f"{told_by} for Slurm job {job}, preempted: put back into the queue" in lab.log(job)
    assert cluster.job(job)["Restarts"] == "1"
    assert lab.status()["n0"] == ("queued", f"Slurm job {job}, pending (BeginTime)")
    assert not list(lab.folder.rglob("failure.json"))
    cluster.start_now(job)


@on_slurm
def test_a_run_that_is_preempted_and_then_loses_its_node_ends_at_the_same_bits(
    lab: Lab, cluster: Cluster, undisturbed: Path
) -> None:
    job = submitted(lab(*SLURM, *LONG))
    preempt(lab, cluster, job, "SIGUSR2")
    until(lambda: "resuming" in lab.log(job, "out"), 60, cluster.logs)
    done = epochs(lab)
    assert 2 <= done < 40
    until(lambda: epochs(lab) > done, 60, cluster.logs)
    cluster("scontrol", "update", f"NodeName={cluster.host}", "State=down", "Reason=test")
    until(lambda: cluster.job(job)["JobState"] == "PENDING", 60, cluster.logs)
    assert lab.status()["n0"][0] == "queued"
    # A job that comes back before its node has forgotten it makes Slurm drain the node.
    until(lambda: cluster.left(job), 60, cluster.logs)
    time.sleep(5)
    cluster.start_now(job)  # the node comes back by itself: its slurmd still answers

    def ended() -> bool:
        cluster.back_in_service()
        return empty(cluster)()

    until(ended, 120, cluster.logs)
    assert int(cluster.job(job)["Restarts"]) >= 2 and lab.log(job, "out").count("resuming") == 2
    same_run(lab.folder, undisturbed)


@on_slurm
def test_a_cluster_that_preempts_with_sigterm_alone_loses_nothing_either(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, data: Path, undisturbed: Path
) -> None:
    with throwaway_slurm.started(tmp_path_factory.mktemp("slurm"), user_signal=False) as cluster:
        lab = Lab(tmp_path, environment(data, cluster.environment))
        job = submitted(lab(*SLURM, *LONG))
        preempt(lab, cluster, job, "SIGTERM")
        until(empty(cluster), 90, cluster.logs)
    same_run(lab.folder, undisturbed)


@on_slurm
def test_at_its_time_limit_a_run_is_put_back_and_a_cancelled_one_is_not(lab: Lab, cluster: Cluster) -> None:
    limit = ["hydra.launcher.timeout_min=1", "hydra.launcher.signal_delay_s=30"]
    job = submitted(lab(*SLURM, *SMALL, "model.budget.epochs=5000", *limit))
    until(lambda: cluster.job(job)["Restarts"] == "1", 120, cluster.logs)
    assert f"SIGUSR2 for Slurm job {job}, at its time limit: put back into the queue" in lab.log(job)
    until(lambda: cluster.job(job)["JobState"] == "PENDING", 30, cluster.logs)
    assert lab.status()["n0"][0] == "queued"
    cluster.start_now(job)
    until(lambda: "resuming" in lab.log(job, "out"), 60, cluster.logs)
    assert lab.status()["n0"] == ("running", f"Slurm job {job}, running on {cluster.host}")
    cluster("scancel", job)
    until(empty(cluster), 60, cluster.logs)
    assert cluster.job(job)["JobState"] == "CANCELLED"
    assert lab.status()["n0"] == ("interrupted", "resumes from last.ckpt")


@on_slurm
def test_a_run_without_an_epoch_within_its_time_limit_fails_instead_of_coming_back_for_ever(
    lab: Lab, cluster: Cluster
) -> None:
    endless = ["model.budget.epoch_steps=1000000", "model.detector.width=4", "trainer.progress=false"]
    job = submitted(lab(*SLURM, *endless))
    until(lambda: list(lab.folder.rglob(".lock")), 90, cluster.logs)  # it has begun
    cluster("scancel", "--signal=USR2", job)  # as at the limit
    until(empty(cluster), 60, cluster.logs)
    assert cluster.job(job)["JobState"] == "FAILED"
    state, why = lab.status()["n0"]
    assert state == "failed" and "give hydra.launcher.timeout_min=" in why


@pytest.fixture
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of its own with this code."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("anomaly_lab", "hydra_plugins", "conf"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", ".gitignore"):
        shutil.copy(ROOT / name, copy)
    for words in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message=code"]):
        who = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
        subprocess.run(["git", *who, *words], cwd=copy, check=True)
    return copy


@on_slurm
def test_a_job_that_starts_with_other_code_than_was_submitted_says_so(
    lab: Lab, cluster: Cluster, checkout: Path
) -> None:
    held = "+hydra.launcher.additional_parameters.hold=true"
    job = submitted(lab(*SLURM, *SMALL, "model.budget.epochs=1", held, code=checkout))
    assert lab.status()["n0"] == ("queued", f"Slurm job {job}, pending (JobHeldUser)")
    with open(checkout / "anomaly_lab" / "networks.py", "a") as file:
        file.write("# edited while the job waited\n")
    cluster("scontrol", "release", job)
    until(empty(cluster), 90, cluster.logs)
    git = lab.result()["git"]
    assert git["submitted"] == {"sha": git["sha"], "dirty": False, "diff": None}
    assert git["dirty"] and git["diff"]
    assert f"the code has changed since this job was submitted: then {git['sha']}, now {git['sha']} with changes" in (
        lab.log(job, "out")
    )


# Without a cluster -------------------------------------------------------------------------------------------------


def test_the_hash_of_the_changes_covers_code_and_configurations_alone(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "_PACKAGE", checkout / "anomaly_lab")
    code = config.code.__wrapped__
    clean = code()
    assert len(clean["sha"]) == 40 and clean == {"sha": clean["sha"], "dirty": False, "diff": None}
    (checkout / "README.md").write_text("notes")
    assert code() == {**clean, "dirty": True}
    new = checkout / "conf" / "model" / "new.yaml"
    new.write_text("a: 1")
    one = code()["diff"]
    new.write_text("a: 2")
    two = code()["diff"]
    (checkout / "anomaly_lab" / "files.py").unlink()
    three = code()["diff"]
    assert len({None, one, two, three}) == 4
    monkeypatch.setattr(config, "_PACKAGE", checkout / "conf" / "elsewhere")
    assert code() == {"sha": None, "dirty": None, "diff": None}


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Put a shell script in front of everything on PATH."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "bin").mkdir()

    def put(name: str, script: str) -> None:
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)

    return put


Program = Callable[[str, str], None]
RUNNING = "JobState=RUNNING TimeLimit=00:10:00 PreemptTime"


@pytest.mark.parametrize(
    ("shown", "epoch_done", "requeue", "ends", "says"),
    [
        (f"{RUNNING}=2030-01-01T00:00:00", False, "true", True, "preempted: put back"),
        (f"{RUNNING}=None", True, "true", True, "at its time limit: put back"),
        (
            f"{RUNNING}=2030-01-01T00:00:00",
            True,
            "echo no >&2; false",
            False,
            "it cannot be put back (no), so it works on",
        ),
        ("JobState=CANCELLED PreemptTime=None", True, "true", True, "it ends here"),
    ],
)
def test_the_first_signal_is_answered_and_no_other(
    tmp_path: Path,
    program: Program,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    shown: str,
    epoch_done: bool,
    requeue: str,
    ends: bool,
    says: str,
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    asked = tmp_path / "asked"
    program("scontrol", f'echo "$@" >> {asked}; if [ "$1" = show ]; then echo "{shown}"; else {requeue}; fi')
    notice = _Notice(tmp_path)
    if epoch_done:
        (tmp_path / "last.ckpt").touch()
    if ends:
        with pytest.raises(SystemExit) as end:
            notice(signal.SIGUSR2, None)
        assert end.value.code == cli.TERMINATED
    else:
        notice(signal.SIGUSR2, None)
    said = capfd.readouterr().err
    assert said.startswith("SIGUSR2 for Slurm job 7_3") and says in said
    before = asked.read_text()
    assert before.startswith("show job -o 7_3\n") and before.count("requeue 7_3\n") == ("RUNNING" in shown)
    notice(signal.SIGTERM, None)
    assert asked.read_text() == before and capfd.readouterr().err == ""


def test_a_time_limit_without_an_epoch_is_a_failure(
    tmp_path: Path, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    program("scontrol", f'[ "$1" = show ] && echo "{RUNNING}=None"')
    (tmp_path / "last.ckpt").touch()  # of an earlier attempt
    with pytest.raises(ValueError, match="no checkpoint was written within the job's time limit of 00:10:00"):
        _Notice(tmp_path)(signal.SIGUSR2, None)


def test_status_asks_slurm_once_and_tells_where_a_job_is(tmp_path: Path, program: Program) -> None:
    runs, asked = tmp_path / "runs", tmp_path / "asked"
    for number in range(5):
        results.record_job(runs / f"ede/digits/pooled/n{number}/s0", {"job": f"7_{number}"})
    (runs / "ede/digits/pooled/n5/s0").mkdir(parents=True)  # nobody submitted this one
    (runs / "ede/digits/pooled/n4/s0/failure.json").write_text('{"error": "Diverged: loss is nan"}')
    program("squeue", f"echo asked >> {asked}; echo '7_0|RUNNING|node3'; echo '7_1|PENDING|(Resources, and more)'")
    found = {status.path.split("/")[3]: status for status in results.status(runs)}
    assert {name: status.state for name, status in found.items()} == {
        "n0": "running",
        "n1": "queued",
        "n2": "interrupted",
        "n3": "interrupted",
        "n4": "failed",
        "n5": "interrupted",
    }
    assert found["n0"].detail == "Slurm job 7_0, running on node3"
    assert found["n1"].detail == "Slurm job 7_1, pending (Resources, and more)"
    assert asked.read_text() == "asked\n"

    program("squeue", "exit 1")  # the controller is down: nothing is called lost, nothing submitted twice
    assert {status.state for status in results.status(runs)} == {"queued", "interrupted"}
    assert [status.path.split("/")[3] for status in results.status(runs) if status.state == "interrupted"] == ["n5"]


def test_without_slurm_its_launcher_gets_one_line(lab_here: Callable[..., Said]) -> None:
    said = lab_here("-m", "hydra/launcher=slurm", "seed=0,1", PATH="")
    assert said.code == cli.MISTAKE and said.out == ""
    assert said.err == (
        "anomaly-lab: error: hydra/launcher=slurm: there is no sbatch here, start it on a login node of the cluster\n"
    )


@pytest.fixture
def lab_here(tmp_path: Path, data: Path) -> Callable[..., Said]:
    """The commands without a cluster, with further environment variables."""

    def command(*words: str, **variables: str) -> Said:
        return Lab(tmp_path, environment(data) | variables)(*words)

    return command


@pytest.mark.slow
@pytest.mark.parametrize(("visible", "jobs_per_gpu", "seen"), [("3,5", 1, ["3", "5"]), ("5", 2, ["5", "5"])])
def test_the_parallel_launcher_deals_out_the_gpus(
    tmp_path: Path, data: Path, visible: str, jobs_per_gpu: int, seen: list[str]
) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="needs pip install 'anomaly-lab[parallel]'")
    own = {name: value for name, value in environment(data).items() if not name.endswith("_NUM_THREADS")}
    lab = Lab(tmp_path, own | {"CUDA_VISIBLE_DEVICES": visible}).with_probe(at_once=2)
    grid = ["model=probe", "seed=0,1,2,3,4", "trainer.accelerator=cpu", "trainer.progress=false"]
    said = lab("-m", "hydra/launcher=parallel", f"hydra.launcher.jobs_per_gpu={jobs_per_gpu}", *grid)
    assert said.code == cli.DONE and said.out.endswith("5 runs: 5 done\n"), said
    # A file for each pair of process and GPU: two workers, and none of them has ever changed its GPU.
    assert sorted(probe["gpu"] for probe in lab.probes()) == seen
    assert {probe["threads"] for probe in lab.probes()} == {max(1, len(os.sched_getaffinity(0)) // 2)}


@pytest.mark.slow
def test_ray_books_fractions_of_a_gpu(tmp_path: Path, data: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_ray_launcher", reason="needs pip install 'anomaly-lab[ray]'")
    own = {name: value for name, value in environment(data).items() if not name.endswith("_NUM_THREADS")}
    lab = Lab(tmp_path, own | {"RAY_worker_niceness": "0"}).with_probe(at_once=2)
    pretend = ["+hydra.launcher.ray.init.num_gpus=1", "+hydra.launcher.ray.init.num_cpus=2"]
    grid = ["model=probe", "seed=0,1", "trainer.accelerator=cpu", "trainer.progress=false"]
    said = lab("-m", "hydra/launcher=ray_shared", *pretend, *grid)
    assert said.code == cli.DONE and "2 runs: 2 done\n" in said.out, said
    assert lab.probes() == [{"gpu": "0", "threads": 1}] * 2, "two halves of one"


@pytest.mark.parametrize(
    ("module", "launch", "extra"),
    [
        ("hydra_joblib_launcher.joblib_launcher", lambda: ParallelLauncher(None, 1).launch([], 0), "parallel"),
        ("hydra_ray_launcher.ray_launcher", lambda: RayLauncher(OmegaConf.create()).launch([], 0), "ray"),
        ("hydra_submitit_launcher.submitit_launcher", lambda: SlurmLauncher(False, "jobs")._submit([]), "slurm"),
    ],
)
def test_a_launcher_without_its_extra_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, module: str, launch: Callable[[], object], extra: str
) -> None:
    monkeypatch.setitem(sys.modules, f"hydra_plugins.{module}", None)
    with pytest.raises(ValueError, match=rf"needs an extra: pip install anomaly-lab\[{extra}\]"):
        launch()


@pytest.mark.parametrize("option", ["n_jobs=0", "jobs_per_gpu=half"])
def test_a_number_of_jobs_that_is_none_gets_one_line(lab_here: Callable[..., Said], option: str) -> None:
    said = lab_here("-m", "hydra/launcher=parallel", f"hydra.launcher.{option}", "seed=0,1")
    assert said.code == cli.MISTAKE and f"hydra.launcher.{option}: give a whole number from 1" in said.err


@pytest.mark.slow
def test_of_two_processes_that_start_the_same_run_the_second_leaves(tmp_path: Path, data: Path) -> None:
    lab = Lab(tmp_path, environment(data) | {"OMP_NUM_THREADS": "1"}).with_probe(at_once=2)
    words = ["model=probe", "trainer.progress=false"]
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(lab, *words)
        try:
            until(lab.probes, 120)  # in its run, and waiting there
            second = lab(*words)
        finally:
            (tmp_path / "probes" / "go on.json").write_text("{}")
    assert "left to the process that is busy with it: runs/probe/digits/pooled/n0/s0" in second.err
    assert first.result().code == cli.DONE
    assert len(lab.probes()) == 2, "the second began the run as well"
