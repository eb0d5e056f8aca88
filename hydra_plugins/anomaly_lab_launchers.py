"""Launchers of many runs: several in one process, on the GPUs of one machine, on Ray, and on a Slurm cluster.

They lie in the namespace package ``hydra_plugins`` because Hydra takes launchers from nowhere else; it imports this
file at every start, so nothing heavy stands at the top. Options and defaults are in ``conf/hydra/launcher/``.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict


class _Planned(NamedTuple):
    number: int
    overrides: list[str]
    composed: DictConfig  # with Hydra's own part
    out: Path | None  # the run's folder; None where the task itself is to say what it is: done, or impossible


class _Launcher(Launcher):
    hydra_context: HydraContext
    task_function: TaskFunction
    config: DictConfig

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def _plan(self, number: int, overrides: list[str]) -> _Planned:
        from anomaly_lab import config

        composed = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
        with open_dict(composed.hydra.job):
            composed.hydra.job.id, composed.hydra.job.num = f"{composed.hydra.job.name}_{number}", number
        try:
            cfg = config.without_hydra(composed)
            out = config.run_dir(cfg) if config.finished(cfg) is None else None
        except Exception:  # the task meets the same and says it in its own words
            out = None
        return _Planned(number, overrides, composed, out)

    def _run(self, one: _Planned) -> JobReturn:
        return run_job(
            hydra_context=self.hydra_context,
            task_function=self.task_function,
            config=one.composed,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )


# One process ----------------------------------------------------------------------------------------------------------


class AbreastLauncher(_Launcher):
    """Several runs in this process, which take turns step by step (`anomaly_lab.turns`), on one GPU or on the CPU."""

    def __init__(self, models: int) -> None:
        self._models = models

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        if type(self._models) is not int or self._models < 1:
            raise ValueError(f"hydra.launcher.models={self._models}: give a whole number from 1")
        setup_globals()
        planned = [self._plan(number, list(job)) for number, job in enumerate(job_overrides, initial_job_idx)]
        trackers = {OmegaConf.select(one.composed, "logger._target_") for one in planned}
        if self._models > 1 and "anomaly_lab.tracking.Wandb" in trackers:
            raise ValueError(
                "logger=wandb records one run at a time in a process: with hydra/launcher=abreast choose logger=csv or "
                "tensorboard, or keep wandb and take hydra/launcher=parallel"
            )
        hydra = HydraConfig.instance()
        own_config = (lambda: hydra.cfg, lambda cfg: setattr(hydra, "cfg", cfg))
        with _sigterm_raises():
            if any(one.out is not None for one in planned):
                import anomaly_lab.run  # noqa: F401  # torch, whose first state is where every run starts from
            from anomaly_lab import turns

            return turns.take([partial(self._run, one) for one in planned], self._models, own=[own_config])


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """SIGTERM as an exception in the main thread, which waits: Lightning's, as it comes out of a single run."""

    def end(number: int, frame: object) -> None:
        from lightning.pytorch.utilities.exceptions import SIGTERMException

        raise SIGTERMException

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# One machine, and Ray -------------------------------------------------------------------------------------------------


class ParallelLauncher(_Launcher):
    """joblib's worker processes; where there are GPUs, each worker sees one of them only, for as long as it lives."""

    def __init__(self, n_jobs: int | None, jobs_per_gpu: int, **joblib: Any) -> None:
        self._n_jobs, self._jobs_per_gpu, self._joblib = n_jobs, jobs_per_gpu, joblib

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        try:
            from hydra_plugins.hydra_joblib_launcher.joblib_launcher import JoblibLauncher
        except ModuleNotFoundError as error:
            raise ValueError("hydra/launcher=parallel needs an extra: pip install anomaly-lab[parallel]") from error
        for name, value in (("n_jobs", self._n_jobs), ("jobs_per_gpu", self._jobs_per_gpu)):
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"hydra.launcher.{name}={value}: give a whole number from 1")
        gpus = _gpus()
        n_jobs = self._n_jobs or self._jobs_per_gpu * len(gpus) or 2
        joblib = JoblibLauncher(n_jobs=n_jobs, **self._joblib)
        with tempfile.TemporaryDirectory() as places:
            task = _OnOneGpu(self.task_function, gpus, n_jobs, Path(places)) if gpus else self.task_function
            joblib.setup(hydra_context=self.hydra_context, task_function=task, config=self.config)
            returned: Sequence[JobReturn] = joblib.launch(job_overrides, initial_job_idx)
            return returned


def _gpus() -> list[str]:
    """The GPUs this process may use, by the names CUDA_VISIBLE_DEVICES has for them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


_BOUND = "ANOMALY_LAB_BOUND"
"""Environment variable of a worker: its own process id, once it has a GPU. Not a global variable of this module, which
Hydra executes again whenever it looks for plugins."""


class _OnOneGpu(NamedTuple):
    """A task for workers that deal out places among themselves.

    A worker keeps its place, a locked file, until it ends, for CUDA binds a process to a device; then another has it.
    """

    task: TaskFunction
    gpus: Sequence[str]
    workers: int
    places: Path

    def __call__(self, cfg: DictConfig) -> Any:
        for number in itertools.cycle(range(self.workers)):
            if os.environ.get(_BOUND) == str(os.getpid()):
                break
            place = os.open(self.places / str(number), os.O_WRONLY | os.O_CREAT)
            try:
                fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(place)
                time.sleep(0.01)
            else:  # never closed
                os.environ |= {"CUDA_VISIBLE_DEVICES": self.gpus[number % len(self.gpus)], _BOUND: str(os.getpid())}
        return self.task(cfg)


class RayLauncher(_Launcher):
    """Ray's tasks, which may book fractions of a GPU; Ray tells each which one it has."""

    def __init__(self, ray: DictConfig) -> None:
        self._ray = OmegaConf.create(OmegaConf.to_container(ray, resolve=True))  # the plugin adds a key of its own

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        try:
            from hydra_plugins.hydra_ray_launcher.ray_launcher import RayLauncher as Plugin
        except ModuleNotFoundError as error:
            raise ValueError("hydra/launcher=ray_shared needs an extra: pip install anomaly-lab[ray]") from error
        plugin = Plugin(ray=self._ray)
        plugin.setup(hydra_context=self.hydra_context, task_function=self.task_function, config=self.config)
        returned: Sequence[JobReturn] = plugin.launch(job_overrides, initial_job_idx)
        return returned


# Slurm -------------------------------------------------------------------------------------------------------------

_LOOK_SECONDS = 10  # with wait=true: how often the queue is asked

# Until the job's own handlers stand, the signals that end it are ignored: a process that dies of one within the time
# Slurm grants before a preemption counts as failed and is not put back.
_DEAF = """sh -c 'trap "" USR2 TERM; exec "$0" "$@"'"""

_PORTABLE = ("name", "timeout_min", "mem_gb", "nodes", "cpus_per_task", "gpus_per_node", "tasks_per_node")
"""Parameters that submitit has for every cluster; all others get a ``slurm_`` before their name."""


class SlurmLauncher(_Launcher):
    """Submits what is neither done nor in the queue as one job array, through submitit, and leaves.

    How far the jobs are is in the runs' folders and in Slurm's queue (`anomaly_lab.results.status`), so nobody has to
    wait for them, no pickled result is read and no accounting is needed.
    """

    def __init__(self, wait: bool, submitit_folder: str, **sbatch: Any) -> None:
        self._wait, self._folder = wait, submitit_folder
        self._sbatch = {
            name: OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
            for name, value in sbatch.items()
            if value is not None
        }

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        if shutil.which("sbatch") is None:
            raise ValueError("hydra/launcher=slurm: there is no sbatch here, start it on a login node of the cluster")
        if not self._wait and not self.config.hydra.sweeper._target_.endswith("BasicSweeper"):
            raise ValueError("a search needs the results of its jobs: add hydra.launcher.wait=true")
        setup_globals()
        planned = [self._plan(number, list(job)) for number, job in enumerate(job_overrides, initial_job_idx)]
        states = self._states(planned)
        todo = [one for one in planned if one.out is not None and states[one.out] not in ("running", "queued")]
        busy = sum(state in ("running", "queued") for state in states.values())
        if busy:
            print(f"with Slurm already: {busy} run{'s' * (busy != 1)}", flush=True)
        if todo:
            self._submit(todo)
        if self._wait:
            while {"running", "queued"} & set(self._states(planned).values()):
                time.sleep(_LOOK_SECONDS)
        return [self._answer(one) for one in planned]

    def _states(self, planned: Sequence[_Planned]) -> dict[Path, str]:
        from anomaly_lab import results

        runs = Path(self.config.runs)
        folders = [one.out for one in planned if one.out is not None]
        return {runs / status.path: status.state for status in results.status(runs, [({}, out) for out in folders])}

    def _submit(self, planned: Sequence[_Planned]) -> None:
        try:
            import submitit
            from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher as Submitit
        except ModuleNotFoundError as error:
            raise ValueError("hydra/launcher=slurm needs an extra: pip install anomaly-lab[slurm]") from error
        from anomaly_lab import config, results

        job = Submitit()
        job.setup(hydra_context=self.hydra_context, task_function=self.task_function, config=self.config)
        code = config.code()
        executor: Any = submitit.AutoExecutor(self._folder, cluster="slurm", slurm_python=f"{_DEAF} {sys.executable}")
        executor.update_parameters(
            **{name if name in _PORTABLE else f"slurm_{name}": value for name, value in self._sbatch.items()}
        )
        arguments = [(one.overrides, one.number, one.out, Singleton.get_state()) for one in planned]
        try:
            jobs: list[Any] = executor.map_array(_Job(job, code), *zip(*arguments, strict=True))
        except submitit.core.utils.FailedJobError as error:
            raise ValueError(f"Slurm does not take the jobs: {error}") from error
        record = {"submitted": datetime.now(UTC).isoformat(timespec="seconds"), "git": code}
        for one, submitted in zip(planned, jobs, strict=True):
            assert one.out is not None
            results.record_job(one.out, {"job": submitted.job_id} | record)
        number = jobs[0].job_id.partition("_")[0]
        print(f"submitted as Slurm job {number}: {len(jobs)} run{'s' * (len(jobs) != 1)}", flush=True)

    def _answer(self, one: _Planned) -> JobReturn:
        from anomaly_lab import config

        if one.out is not None and (not self._wait or config.finished(config.without_hydra(one.composed)) is None):
            return JobReturn(overrides=one.overrides, status=JobStatus.COMPLETED)
        return self._run(one)


class _Job(NamedTuple):
    """What a Slurm job executes."""

    submitted: Any  # submitit's launcher, which is the job of one run when it is called
    code: Mapping[str, Any]

    def __call__(self, overrides: list[str], number: int, out: Path, singletons: Mapping[type, Any]) -> None:
        notice = _Notice(out)
        for wanted in (signal.SIGUSR2, signal.SIGTERM):
            signal.signal(wanted, notice)
        from anomaly_lab import config

        os.environ[config.SUBMITTED] = json.dumps(self.code)
        os.environ.pop("ANOMALY_LAB_JOURNAL", None)  # of the sweep that has submitted this, and is over
        made: JobReturn = self.submitted(overrides, "hydra.sweep.dir", number, f"{number}", singletons)
        _ = made.return_value  # raises what the task has raised
        if (out / "failure.json").exists():
            sys.exit(1)  # a failed run is a failed job, in Slurm's books too


class _Notice:
    """The one owner of the signals by which Slurm says that a job must go. Only the first is answered.

    Nothing is saved then: ``last.ckpt`` is at most an epoch old, and a state in the middle of an epoch would not go on
    to the same bits. The job puts itself back into the queue and ends, whatever of its grace is left; to end without
    that would count as failed. It does not come back if it was cancelled, nor from a time limit within which not even
    one epoch is done, for then it would come back for ever.
    """

    def __init__(self, out: Path) -> None:
        self._checkpoint, self._given = out / "last.ckpt", False
        self._before = self._version()

    def _version(self) -> int:
        return self._checkpoint.stat().st_mtime_ns if self._checkpoint.exists() else 0

    def __call__(self, number: int, frame: object) -> None:
        if self._given:
            return
        self._given = True
        array, task = (os.environ.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
        job = f"{array}_{task}" if array else os.environ["SLURM_JOB_ID"]
        shown = _scontrol("show", "job", "-o", job)
        known = dict(word.split("=", 1) for word in shown.stdout.split() if "=" in word)
        name = f"{signal.Signals(number).name} for Slurm job {job}"
        if known.get("JobState") not in ("RUNNING", None):
            _say(f"{name}: it ends here")
            sys.exit(143)
        preempted = known.get("PreemptTime", "None") != "None"
        if not preempted and self._version() == self._before:
            limit = known.get("TimeLimit")
            raise ValueError(
                f"no checkpoint was written within the job's time limit of {limit}: give hydra.launcher.timeout_min=..."
            )
        requeued = _scontrol("requeue", job)
        if requeued.returncode:
            _say(f"{name}: it cannot be put back ({requeued.stderr.strip()}), so it works on until Slurm ends it")
            return
        reason = "preempted" if preempted else "at its time limit"
        _say(f"{name}, {reason}: put back into the queue, goes on after the last whole epoch")
        sys.exit(143)


def _scontrol(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["scontrol", *words], capture_output=True, text=True, timeout=30)


def _say(line: str) -> None:
    os.write(sys.stderr.fileno(), f"{line}\n".encode())  # print() may be what the signal has interrupted
