"""How far runs are, by what lies in their folders and what Slurm says of their jobs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from anomaly_lab import slurm, status
from anomaly_lab.files import take_lock

RESULT = {
    "identity": {"model": "ede", "dataset": "digits", "split": "pooled", "normal_class": 0, "seed": 0, "changed": {}},
    "metrics": {"auroc": 0.9},
    "class_name": "0",
    "epochs": 1,
    "partition": {"fingerprint": "0123"},
    "config": {},
}


@contextmanager
def running(folder: Path) -> Iterator[None]:
    """As while another process makes the run."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as held:
        assert take_lock(held)
        yield


def folder(runs: Path, number: int | str, **files: str) -> Path:
    """The folder of a run with these files in it."""
    made = runs / f"ede/digits/pooled/n{number}/s0"
    made.mkdir(parents=True)
    for name, content in files.items():
        (made / name.replace("_", ".")).write_text(content)
    return made


def states(runs: Path) -> dict[str, tuple[str, str]]:
    return {found.path.split("/")[3]: (found.state, found.detail) for found in status.under(runs)}


def test_status_tells_the_states_apart(tmp_path: Path) -> None:
    folder(tmp_path, 0, result_json=json.dumps(RESULT))
    folder(tmp_path, 2, failure_json=json.dumps({"error": "Diverged: loss is nan\nat step 3", "traceback": "..."}))
    folder(tmp_path, 3, last_ckpt="x")
    folder(tmp_path, 4, _lock="")  # its process died: the lock is free
    folder(tmp_path, 5)
    folder(tmp_path, 6, failure_json="{")
    folder(tmp_path, 7, result_json="{")
    folder(tmp_path, "0+1")
    folder(tmp_path, "all")
    with running(tmp_path / "ede/digits/pooled/n1/s0"):
        found = states(tmp_path)
    assert found.pop("n7")[0] == "damaged"
    assert found == {
        "n0": ("done", "AUROC 0.900"),
        "n1": ("running", ""),
        "n2": ("failed", "Diverged: loss is nan"),
        "n3": ("interrupted", "resumes from last.ckpt"),
        "n4": ("interrupted", "starts again"),
        "n5": ("interrupted", "starts again"),
        "n6": ("failed", "failure.json cannot be read"),
        "n0+1": ("interrupted", "starts again"),
        "nall": ("interrupted", "starts again"),
    }
    assert states(tmp_path)["n1"][0] == "interrupted"
    assert not any(found.with_slurm for found in status.under(tmp_path))
    lines = status.text(status.under(tmp_path)).splitlines()
    assert lines[-1] == "10 runs: 1 done, 2 failed, 6 interrupted, 1 damaged"


def test_runs_are_found_below_the_folder_that_one_stands_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(tmp_path, 0)
    monkeypatch.chdir(tmp_path)
    assert states(Path("."))["n0"][0] == "interrupted"


def test_failed_run_that_is_tried_again_is_running(tmp_path: Path) -> None:
    with running(folder(tmp_path, 0, failure_json=json.dumps({"error": "x"}))):
        assert states(tmp_path)["n0"][0] == "running"


@pytest.fixture
def squeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A ``squeue`` of a shell script."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")

    def put(script: str) -> None:
        (tmp_path / "bin" / "squeue").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "bin" / "squeue").chmod(0o755)

    return put


def test_a_job_that_began_and_is_gone_without_a_word_has_failed(tmp_path: Path, squeue: Callable[[str], None]) -> None:
    squeue("true")
    log = tmp_path / "7_0_log.err"
    for number in (0, 1, 2):
        slurm.record_job(folder(tmp_path / "runs", number), {"job": f"7_{number}", "log": str(log)})
    assert {state for state, _ in states(tmp_path / "runs").values()} == {"interrupted"}, "cancelled before they began"
    log.write_text("Killed")
    (tmp_path / "runs/ede/digits/pooled/n1/s0/last.ckpt").write_text("x")
    (tmp_path / "runs/ede/digits/pooled/n2/s0/failure.json").write_text('{"error": "Diverged: loss is nan"}')
    said = f"ended without a result or a reason: it was killed, or its code does not start; see {log}"
    assert states(tmp_path / "runs") == {
        "n0": ("failed", f"Slurm job 7_0 {said}"),
        "n1": ("failed", f"Slurm job 7_1 {said}"),
        "n2": ("failed", "Diverged: loss is nan"),
    }
    squeue("echo '7_0|RUNNING|node3'")
    assert states(tmp_path / "runs")["n0"][0] == "running"


@pytest.mark.parametrize("content", ["no JSON", "{}", "[]", '{"job'])
def test_a_job_file_that_cannot_be_read_hides_no_other_run(content: str, tmp_path: Path) -> None:
    folder(tmp_path, 0, job_json=content)
    folder(tmp_path, 1, result_json=json.dumps(RESULT | {"identity": RESULT["identity"] | {"normal_class": 1}}))
    assert {name: state for name, (state, _) in states(tmp_path).items()} == {"n0": "interrupted", "n1": "done"}


def test_status_asks_slurm_once_and_tells_where_a_job_is(tmp_path: Path, squeue: Callable[[str], None]) -> None:
    runs, asked = tmp_path / "runs", tmp_path / "asked"
    for number in range(5):
        slurm.record_job(folder(runs, number), {"job": f"7_{number}"})
    (runs / "ede/digits/pooled/n4/s0/failure.json").write_text('{"error": "Diverged: loss is nan"}')
    folder(runs, 5)  # nobody submitted this one
    squeue(f"echo asked >> {asked}; echo '7_0|RUNNING|node3'; echo '7_1|PENDING|(Resources, and more)'")
    found = {name: state for name, (state, _) in states(runs).items()}
    assert found == {
        "n0": "running",
        "n1": "queued",
        "n2": "interrupted",
        "n3": "interrupted",
        "n4": "failed",
        "n5": "interrupted",
    }
    assert asked.read_text() == "asked\n"
    with_slurm = {found.path.split("/")[3]: found.detail for found in status.under(runs) if found.with_slurm}
    assert with_slurm == {
        "n0": "Slurm job 7_0, running on node3",
        "n1": "Slurm job 7_1, pending (Resources, and more)",
    }
    with running(runs / "ede/digits/pooled/n0/s0"):
        assert status.under(runs)[0].with_slurm

    squeue("exit 1")  # the controller is down: nothing is called lost, nothing submitted twice
    assert {state for state, _ in states(runs).values()} == {"queued", "interrupted"}
    assert [name for name, (state, _) in states(runs).items() if state == "interrupted"] == ["n5"]
