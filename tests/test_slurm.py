"""A real Slurm that preempts, ends and loses jobs, code that changes while they wait; and the parts without a cluster.

The tests marked ``slurm`` start a throw-away cluster from the Slurm that is installed; without one they are skipped.
They choose the moment of everything: a run waits at its gate until the test has done what it does to its job.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import throwaway_slurm
from conftest import Said
from hydra.core.utils import JobReturn, JobStatus
from laboratory import BARE, GATED_MODEL, ROOT, SMALL, Lab, environment, until
from throwaway_slurm import Cluster

from anomaly_lab import cli, record
from anomaly_lab.slurm import JOB_FILE, Notice, QueuedRun

EPOCHS = 8
GATED = [*GATED_MODEL, f"model.budget.epochs={EPOCHS}"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


slurm = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.timeout(2400),  # a busy machine is no failure
    pytest.mark.skipif(bool(throwaway_slurm.missing()), reason=f"no Slurm: {', '.join(throwaway_slurm.missing())}"),
]
"""Marks of the tests that need a cluster."""


def on_slurm(test: Callable[..., None]) -> Callable[..., None]:
    for mark in slurm:
        test = mark(test)
    return test


SLURM = ["-m", "hydra/launcher=slurm", "hydra.launcher.mem_gb=1", "hydra.launcher.cpus_per_task=1"]
HELD = "+hydra.launcher.additional_parameters.hold=true"


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


def log(lab: Lab, job: str, kind: str = "err") -> str:
    """What the job has printed."""
    path = lab.folder / "runs" / ".submitit" / job / f"{job}_0_log.{kind}"
    return path.read_text() if path.exists() else ""


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
    assert left["history"] == right["history"] and len(left["history"]) == EPOCHS
    rows = [(folder / "metrics.csv").read_text().splitlines() for folder in (first, second)]
    clock = rows[0][0].split(",").index("seconds")
    a_rows, b_rows = ([[*r.split(",")[:clock], *r.split(",")[clock + 1 :]] for r in some] for some in rows)
    assert a_rows == b_rows


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A folder with the run of `GATED` that nobody disturbed, made without Slurm."""
    lab = Lab(tmp_path_factory.mktemp("undisturbed"), environment(data) | {"OMP_NUM_THREADS": "1"}).with_gate(0)
    lab.open_gate()
    said = lab(*GATED)
    assert said.code == 0, said
    return lab.folder


def epochs(lab: Lab) -> int:
    """How many epochs the one run of ``lab`` has behind it."""
    [rows] = lab.folder.glob("runs/*/*/*/n0/*/metrics.csv")
    return len(rows.read_text().splitlines()) - 1


def empty(cluster: Cluster) -> Callable[[], bool]:
    return lambda: not cluster("squeue", "--noheader")


@on_slurm
def test_a_grid_is_submitted_and_left_and_the_same_command_fills_what_is_missing(lab: Lab, cluster: Cluster) -> None:
    lab = lab.with_probe(at_once=99)
    grid = [*SLURM, "model=probe", *BARE]
    first = lab(*grid, "normal_class=0,1,2,99", "hydra.launcher.array_parallelism=2")
    assert first.code == cli.FAILED and "no class 99" in first.err, "what cannot be made is said at once"
    job = submitted(first)
    assert first.out.startswith(f"submitted as Slurm job {job}: 3 runs\n")

    until(lambda: len(lab.probes()) == 2, cluster.logs)  # side by side, and there they wait
    again = lab(*grid, "normal_class=0,1,2,3")
    assert again.code == cli.DONE, again
    assert again.out.startswith("with Slurm already: 3 runs\nsubmitted as Slurm job ") and ": 1 run\n" in again.out
    assert again.out.endswith("the jobs go on by themselves: anomaly-lab-report runs --status\n")
    seen = lab.status()
    assert {name: state for name, (state, _) in seen.items()} == {
        **dict.fromkeys(("n0", "n1"), "running"),
        **dict.fromkeys(("n2", "n3"), "queued"),
    }
    assert seen["n3"][1].startswith(f"Slurm job {submitted(again)}, pending (")

    cluster("scancel", submitted(again))
    lab.let_probes_go()
    until(empty(cluster), cluster.logs)
    assert {name: state for name, (state, _) in lab.status().items()} == {
        **dict.fromkeys(("n0", "n1", "n2"), "done"),
        "n3": "interrupted",
    }
    probes = lab.probes()
    assert {probe["gpu"] for probe in probes} == {"0", "1"}, "each of the two had a GPU of its own"
    assert [probe["threads"] for probe in probes] == [1, 1, 1], "as many as the job has cores"
    assert "submitted" not in lab.result()["git"]

    before = {path: path.stat().st_mtime_ns for path in lab.folder.rglob("result.json")}
    last = lab(*grid, "normal_class=0,1,2,3", "hydra.launcher.wait=true")
    assert last.code == cli.DONE and last.out.endswith("4 runs: 4 done\n"), last
    assert last.out.startswith(f"submitted as Slurm job {submitted(last)}: 1 run\n")
    assert {path: path.stat().st_mtime_ns for path in before} == before, "a finished run was touched"
    assert len(before) == 3 and lab.result("n3")


def preempt(lab: Lab, cluster: Cluster, job: str, told_by: str) -> None:
    """Let a job of the other partition take the node away from a run that waits at its gate, and give it back."""
    until(lab.waits, cluster.logs)
    rival = cluster.submit("high", "sleep", "1")
    until(lambda: cluster.job(rival)["JobState"] == "COMPLETED", cluster.logs)
    assert f"{told_by} for Slurm job {job}, preempted: put back into the queue" in log(lab, job)
    assert cluster.job(job)["Restarts"] == "1"
    until(lambda: cluster.job(job)["Reason"] == "BeginTime", cluster.logs)
    assert lab.status()["n0"] == ("queued", f"Slurm job {job}, pending (BeginTime)")
    assert not list(lab.folder.rglob("failure.json"))


@on_slurm
def test_a_run_that_is_preempted_and_then_loses_its_node_ends_at_the_same_bits(
    lab: Lab, cluster: Cluster, undisturbed: Path
) -> None:
    lab = lab.with_gate(2)
    job = submitted(lab(*SLURM, *GATED))
    preempt(lab, cluster, job, "SIGUSR2")
    assert epochs(lab) == 2
    lab.close_gate(3)
    cluster.start_until(job, lab.waits)
    assert "resuming" in log(lab, job, "out") and epochs(lab) == 5
    cluster.lose_node(job)
    until(lambda: cluster.job(job)["JobState"] == "PENDING", cluster.logs)
    assert lab.status()["n0"][0] == "queued"
    lab.open_gate()
    cluster.start_node()
    cluster.start_until(job, empty(cluster))
    assert cluster.job(job)["Restarts"] == "2" and log(lab, job, "out").count("resuming") == 2
    same_run(lab.folder, undisturbed)


@on_slurm
def test_a_cluster_that_preempts_with_sigterm_alone_loses_nothing_either(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, data: Path, undisturbed: Path
) -> None:
    with throwaway_slurm.started(tmp_path_factory.mktemp("slurm"), user_signal=False) as cluster:
        lab = Lab(tmp_path, environment(data, cluster.environment)).with_gate(2)
        job = submitted(lab(*SLURM, *GATED))
        preempt(lab, cluster, job, "SIGTERM")
        lab.open_gate()
        cluster.start_until(job, empty(cluster))
    same_run(lab.folder, undisturbed)


@on_slurm
def test_at_its_time_limit_a_run_is_put_back_and_a_cancelled_one_is_not(lab: Lab, cluster: Cluster) -> None:
    lab = lab.with_gate(2)
    job = submitted(lab(*SLURM, *GATED, "hydra.launcher.timeout_min=60", "hydra.launcher.signal_delay_s=900"))
    until(lab.waits, cluster.logs)
    cluster.bring_limit_near(job)
    until(lambda: cluster.job(job)["JobState"] == "PENDING", cluster.logs)
    assert f"SIGUSR2 for Slurm job {job}, at its time limit: put back into the queue" in log(lab, job)
    assert cluster.job(job)["Restarts"] == "1" and lab.status()["n0"][0] == "queued"

    cluster("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    lab.close_gate(1)
    cluster.start_until(job, lab.waits)
    assert "resuming" in log(lab, job, "out") and epochs(lab) == 3
    assert lab.status()["n0"] == ("running", f"Slurm job {job}, running on {cluster.host}")
    cluster("scancel", job)
    until(empty(cluster), cluster.logs)
    assert cluster.job(job)["JobState"] == "CANCELLED"
    assert lab.status()["n0"] == ("interrupted", "resumes from last.ckpt")


@on_slurm
def test_a_run_without_an_epoch_within_its_time_limit_fails_instead_of_coming_back_for_ever(
    lab: Lab, cluster: Cluster
) -> None:
    lab = lab.with_gate(0)
    job = submitted(lab(*SLURM, *GATED, "hydra.launcher.timeout_min=60", "hydra.launcher.signal_delay_s=900"))
    until(lab.waits, cluster.logs)
    cluster.bring_limit_near(job)
    until(empty(cluster), cluster.logs)
    assert cluster.job(job)["JobState"] == "FAILED"
    state, why = lab.status()["n0"]
    assert state == "failed" and "Give hydra.launcher.timeout_min=..." in why
    said = rf"^SIGUSR2 for Slurm job {job} came after 00:\d\d:\d\d \(time limit 00:\d\d:00\), before"
    assert re.search(said, why), why


@on_slurm
def test_a_job_that_fails_before_its_run_begins_is_a_failed_job_with_a_reason(lab: Lab, cluster: Cluster) -> None:
    own = [*SLURM, *SMALL, "model.budget.epochs=1", "data_dir=own"]
    job = submitted(lab(*own, HELD))
    cache = lab.folder / "own" / "digits.npz"
    whole = cache.read_bytes()
    cache.write_bytes(whole[: len(whole) // 2])
    cluster("scontrol", "release", job)
    until(empty(cluster), cluster.logs)
    assert cluster.job(job)["JobState"] == "FAILED"
    cache.write_bytes(whole)
    state, why = lab.status()["n0"]
    assert state == "failed" and "own/digits.npz is damaged or unreadable" in why


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
    job = submitted(lab(*SLURM, *SMALL, "model.budget.epochs=1", HELD, code=checkout))
    assert lab.status()["n0"] == ("queued", f"Slurm job {job}, pending (JobHeldUser)")
    with open(checkout / "anomaly_lab" / "networks.py", "a") as file:
        file.write("# edited while the job waited\n")
    cluster("scontrol", "release", job)
    until(empty(cluster), cluster.logs)
    git = lab.result()["git"]
    assert git["submitted"] == {"sha": git["sha"], "dirty": False, "diff": None}
    assert git["dirty"] and git["diff"]
    assert f"the code has changed since this job was submitted: then {git['sha']}, now {git['sha']} with changes" in (
        log(lab, job, "out")
    )


# Without a cluster -------------------------------------------------------------------------------------------------


def test_the_hash_of_the_changes_covers_code_and_configurations_alone(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "_ROOT", checkout)
    code = record.code.__wrapped__
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
    monkeypatch.setattr(record, "_ROOT", checkout / "conf")
    assert code() == {"sha": None, "dirty": None, "diff": None}


Program = Callable[[str, str], None]


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    """Put a shell script in front of everything on PATH."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "bin").mkdir()

    def put(name: str, script: str) -> None:
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)

    return put


RUNNING = "JobState=RUNNING RunTime=00:00:02 TimeLimit=00:10:00 PreemptTime"


@pytest.mark.parametrize(
    ("shown", "epoch_done", "requeue", "ends", "says"),
    [
        (f"{RUNNING}=2030-01-01T00:00:00", False, "true", True, "preempted: put back"),
        (f"{RUNNING}=None", True, "true", True, "at its time limit: put back"),
        (f"{RUNNING}=None".replace("RUNNING", "SIGNALING"), True, "true", True, "at its time limit: put back"),
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
    (tmp_path / JOB_FILE).write_text('{"job": "7_3"}')
    notice = Notice(tmp_path)
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
    assert before.startswith("show job -o 7_3\n") and before.count("requeue 7_3\n") == ("CANCELLED" not in shown)
    notice(signal.SIGTERM, None)
    assert asked.read_text() == before and capfd.readouterr().err == ""
    assert not (tmp_path / "failure.json").exists()
    assert (tmp_path / JOB_FILE).exists() == ("CANCELLED" not in shown), "a cancelled job has lost nothing"


def test_a_time_limit_without_an_epoch_is_a_failure_that_says_how_long_the_job_ran(
    tmp_path: Path, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    program("scontrol", f'[ "$1" = show ] && echo "{RUNNING}=None"')
    (tmp_path / "last.ckpt").touch()  # of an earlier attempt
    with pytest.raises(SystemExit) as end:
        Notice(tmp_path)(signal.SIGUSR2, None)
    assert end.value.code == cli.FAILED
    why = json.loads((tmp_path / "failure.json").read_text())["error"]
    assert why.startswith("SIGUSR2 for Slurm job 8 came after 00:00:02 (time limit 00:10:00), before a checkpoint")


def test_a_job_asks_a_slurm_that_does_not_answer_and_works_on(
    tmp_path: Path, program: Program, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    program("scontrol", "echo down >&2; exit 1")
    Notice(tmp_path)(signal.SIGUSR2, None)
    assert "for Slurm job 8: it cannot be put back (down), so it works on" in capfd.readouterr().err


def queued(make: Callable[[], JobReturn], folder: Path) -> None:
    QueuedRun(make, {"sha": None, "dirty": None, "diff": None})(folder)


def test_whatever_a_job_fails_of_is_recorded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(record.SUBMITTED, "")  # put back afterwards
    failure = tmp_path / "failure.json"
    failure.write_text("{}")  # of an earlier attempt

    def fails_to_begin() -> JobReturn:
        raise ValueError("no such class")

    with pytest.raises(ValueError, match="no such class"):
        queued(fails_to_begin, tmp_path)
    recorded = json.loads(failure.read_text())
    assert recorded["error"] == "ValueError: no such class" and "in fails_to_begin" in recorded["traceback"]

    def fails() -> JobReturn:  # the run has recorded it, and Hydra has caught it
        failure.write_text('{"error": "mine"}')
        returned = JobReturn(overrides=[], status=JobStatus.FAILED)
        returned.return_value = RuntimeError("a fault")
        return returned

    with pytest.raises(RuntimeError, match="a fault"):
        queued(fails, tmp_path)
    assert json.loads(failure.read_text()) == {"error": "mine"}


def test_a_job_whose_run_is_done_or_put_back_leaves_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(record.SUBMITTED, "")
    queued(lambda: JobReturn(overrides=[], status=JobStatus.COMPLETED), tmp_path)

    def put_back() -> JobReturn:
        raise SystemExit(cli.TERMINATED)

    with pytest.raises(SystemExit):
        queued(put_back, tmp_path)
    assert not (tmp_path / "failure.json").exists()


def test_without_slurm_its_launcher_gets_one_line(tmp_path: Path, data: Path) -> None:
    said = Lab(tmp_path, environment(data) | {"PATH": ""})("-m", "hydra/launcher=slurm", "seed=0,1")
    assert said.code == cli.MISTAKE and said.out == ""
    assert said.err == (
        "anomaly-lab: error: hydra/launcher=slurm: there is no sbatch here, start it on a login node of the cluster\n"
    )
