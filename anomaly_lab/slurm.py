"""Everything that knows Slurm: submitting jobs, finding them in the queue, executing and requeueing them.

A run's folder keeps the number of its job (``job.json``), and the queue knows the job's state. So nothing waits for
jobs, reads their pickled results or needs accounting. Imports neither Hydra nor anything heavy, for status reports.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from anomaly_lab import record
from anomaly_lab.errors import FAILED, TERMINATED
from anomaly_lab.files import write_json

if TYPE_CHECKING:
    from hydra.core.utils import JobReturn

JOB_FILE = "job.json"

# Ignore the signals that end a job until its handlers are set: a process killed by one during the grace time of a
# preemption counts as failed and is not requeued.
_DEAF = """sh -c 'trap "" USR2 TERM; exec "$0" "$@"'"""

_PORTABLE = ("name", "timeout_min", "mem_gb", "nodes", "cpus_per_task", "gpus_per_node", "tasks_per_node")
"""Parameters that submitit has for every cluster; all others get a ``slurm_`` before their name."""


def installed() -> bool:
    return shutil.which("sbatch") is not None


# Where jobs are ---------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """Where the job submitted for a run is."""

    running: bool  # False: it waits, for the first time or again
    detail: str


Queue = Mapping[str, tuple[str, str]]
"""This user's jobs in Slurm's queue: number to state and node or reason."""


def queue() -> Queue | None:
    """Ask Slurm once; None without an answer."""
    command = ["squeue", "--me", "--noheader", "--array", "--format=%i|%T|%R"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    lines = [line.split("|", 2) for line in answer.splitlines()]
    return {number: (state, place) for number, state, place in lines}


def place(folder: Path, queued: Callable[[], Queue | None]) -> Place | None:
    """Where the job of the run in ``folder`` is; None without one, or when it has left the queue.

    A ``job.json`` that cannot be read names no job: it is written whole, so somebody else wrote it.

    Args:
        queued: gives the `queue`; called only where a run was submitted.
    """
    try:
        job = str(json.loads((folder / JOB_FILE).read_text(encoding="utf-8"))["job"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    jobs = queued()
    if jobs is None:  # another machine, or the controller is down: what was submitted counts as queued
        return Place(False, f"Slurm job {job}, as far as is known without squeue")
    if job not in jobs:
        return None
    state, node = jobs[job]
    where = node if node.startswith("(") else f"on {node}"  # "(Priority)" while it waits
    running = state in ("RUNNING", "COMPLETING", "STOPPED", "SUSPENDED", "SIGNALING", "STAGE_OUT")
    return Place(running, f"Slurm job {job}, {state.lower()} {where}")


def lost(folder: Path) -> str:
    """Why a job that has left the queue wrote neither a result nor ``failure.json``; empty if none began.

    A process killed from outside (memory, a node that is not put back), or one that cannot even unpickle its work,
    writes no ``failure.json``.
    """
    try:
        job = json.loads((folder / JOB_FILE).read_text(encoding="utf-8"))
        began = Path(job["log"]).exists()
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    said = "ended without a result or a reason: it was killed, or its code does not start"
    return f"Slurm job {job['job']} {said}; see {job['log']}" if began else ""


# Submitting -------------------------------------------------------------------------------------------------------


def submit(
    make: Callable[..., JobReturn], runs: Sequence[tuple[Path, tuple[Any, ...]]], logs: str, sbatch: Mapping[str, Any]
) -> str:
    """Submit one job a run, as one job array, through submitit; the array's number.

    Args:
        make: makes a run in its job, under Hydra; pickled.
        runs: the folder of each run and the arguments that ``make`` gets for it.
        logs: where the jobs' output goes; submitit's ``%j`` is the job's number.
        sbatch: submitit's parameters.

    Raises:
        ValueError: Slurm refuses the jobs.
    """
    import submitit  # an extra

    code = record.code()
    executor: Any = submitit.AutoExecutor(logs, cluster="slurm", slurm_python=f"{_DEAF} {sys.executable}")
    executor.update_parameters(
        **{name if name in _PORTABLE else f"slurm_{name}": value for name, value in sbatch.items()}
    )
    arguments = [(folder, *rest) for folder, rest in runs]
    try:
        jobs: list[Any] = executor.map_array(QueuedRun(make, code), *zip(*arguments, strict=True))
    except submitit.core.utils.FailedJobError as error:
        raise ValueError(f"Slurm does not take the jobs: {error}") from error
    about = {"submitted": datetime.now(UTC).isoformat(timespec="seconds"), "git": code}
    for (folder, _), job in zip(runs, jobs, strict=True):
        record_job(folder, {"job": job.job_id, "log": str(Path(job.paths.stderr).resolve())} | about)
    return str(jobs[0].job_id).partition("_")[0]


def record_job(folder: Path, job: Mapping[str, Any]) -> None:
    """Keep in the run's folder that a job was submitted for it; under "job" its number."""
    write_json(folder / JOB_FILE, job)


# In the job -------------------------------------------------------------------------------------------------------


class QueuedRun(NamedTuple):
    """What a Slurm job executes: one run.

    The job ends as COMPLETED with a result, or if another process is busy with the run; after a `Notice` it is
    requeued; otherwise it ends as FAILED, with a reason in the run's ``failure.json``.
    """

    make: Callable[..., JobReturn]
    code: Mapping[str, Any]  # at submission

    def __call__(self, folder: Path, *arguments: Any) -> None:
        notice = Notice(folder)
        for wanted in (signal.SIGUSR2, signal.SIGTERM):
            signal.signal(wanted, notice)
        os.environ[record.SUBMITTED] = json.dumps(self.code)
        before = _version(folder / record.FAILURE)
        try:
            made = self.make(*arguments)
            _ = made.return_value  # raises what the run has raised
        except Exception as error:
            if _version(folder / record.FAILURE) == before:  # it failed before the run began to record
                _record_failure(folder, error)
            raise


def _version(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def _record_failure(folder: Path, why: BaseException | str) -> None:
    try:
        record.write_failure(folder, why)
    except OSError as error:
        _say(f"the failure itself cannot be recorded: {error}")


class Notice:
    """The handler of the signals by which Slurm ends a job. It answers the first one only.

    It saves nothing: ``last.ckpt`` is at most an epoch old, and a state in the middle of an epoch would not resume to
    the same bits. The job requeues itself and ends at once; ending without that would count as failed. A cancelled job
    is not requeued, nor one at its time limit without a new checkpoint: the next attempt would end at the same place.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._given = folder, False
        self._before = _version(folder / "last.ckpt")

    def __call__(self, number: int, frame: object) -> None:
        if self._given:
            return
        self._given = True
        array, task = (os.environ.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
        job = f"{array}_{task}" if array else os.environ["SLURM_JOB_ID"]
        shown = _scontrol("show", "job", "-o", job)
        known = dict(word.split("=", 1) for word in shown.stdout.split() if "=" in word)
        name = f"{signal.Signals(number).name} for Slurm job {job}"
        if known.get("JobState") not in ("RUNNING", "SIGNALING", None):  # the second while the signal is on its way
            _say(f"{name}: it ends here")
            (self._folder / JOB_FILE).unlink(missing_ok=True)  # cancelled: nothing was lost
            sys.exit(TERMINATED)
        preempted = known.get("PreemptTime", "None") != "None"
        if known and not preempted and _version(self._folder / "last.ckpt") == self._before:
            line = (
                f"{name} came after {known.get('RunTime')} (time limit {known.get('TimeLimit')}), before a checkpoint "
                "was written: unless somebody sent it by hand, the next attempt would end at the same place. Give "
                "hydra.launcher.timeout_min=... an epoch, hydra.launcher.signal_delay_s, and the minute by which Slurm "
                "may be early"
            )
            # Recorded here, and a SystemExit, for the interrupted code may catch every Exception.
            _record_failure(self._folder, line)
            _say(line)
            sys.exit(FAILED)
        requeued = _scontrol("requeue", job)
        if requeued.returncode:
            _say(f"{name}: it cannot be put back ({requeued.stderr.strip()}), so it works on until Slurm ends it")
            return
        reason = "preempted" if preempted else "at its time limit"
        _say(f"{name}, {reason}: put back into the queue, goes on after the last whole epoch")
        sys.exit(TERMINATED)


def _scontrol(*words: str) -> subprocess.CompletedProcess[str]:
    command = ["scontrol", *words]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))


def _say(line: str) -> None:
    os.write(sys.stderr.fileno(), f"{line}\n".encode())  # the signal may have interrupted print()
