"""Launchers of many runs: several in one process, on the GPUs of one machine, on Ray, and on a Slurm cluster.

Hydra finds launchers only in the namespace package ``hydra_plugins`` and imports this file at every start, so it
imports nothing heavy. Options and defaults are in ``conf/hydra/launcher/``.
"""

from __future__ import annotations

import functools
import io
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from anomaly_lab import config, record, slurm, status, sweep, turns
from anomaly_lab.config import Job
from anomaly_lab.errors import flat, refuse_fewer, sigterm_raises


class _Planned(NamedTuple):
    number: int
    overrides: list[str]
    composed: DictConfig  # with Hydra's own part
    job: Job | None  # None for runs that are done or impossible: the task says which


class _Launcher(Launcher):
    hydra_context: HydraContext
    task_function: TaskFunction
    config: DictConfig

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def _plan(self, number: int, overrides: list[str]) -> _Planned:
        composed = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
        with open_dict(composed.hydra.job):
            composed.hydra.job.id, composed.hydra.job.num = f"{composed.hydra.job.name}_{number}", number
        try:
            job = config.job(config.without_hydra(composed))
            unfinished = job.finished() is None
        except Exception:  # the task meets the same and says it in its own words
            unfinished = False
        return _Planned(number, overrides, composed, job if unfinished else None)

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
    """Several runs in this process take turns step by step (`anomaly_lab.turns`), on one GPU or on the CPU."""

    def __init__(self, n_jobs: int) -> None:
        self._n_jobs = n_jobs

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        refuse_fewer(1, "hydra.launcher", n_jobs=self._n_jobs)
        setup_globals()
        planned = [self._plan(number, list(job)) for number, job in enumerate(job_overrides, initial_job_idx)]
        trackers = {OmegaConf.select(one.composed, "logger._target_") for one in planned}
        if self._n_jobs > 1 and "anomaly_lab.tracking.Wandb" in trackers:
            raise ValueError(
                "logger=wandb records one run at a time in a process: with hydra/launcher=abreast choose logger=csv or "
                "tensorboard, or keep wandb and take hydra/launcher=parallel"
            )
        hydra = HydraConfig.instance()
        own_config = (lambda: hydra.cfg, lambda cfg: setattr(hydra, "cfg", cfg))
        with sigterm_raises():
            if any(one.job is not None for one in planned):
                import anomaly_lab.run  # noqa: F401  # torch: its initial state is every run's
            return turns.take([functools.partial(self._run, one) for one in planned], self._n_jobs, own=[own_config])


# One machine, and Ray -------------------------------------------------------------------------------------------------


class ParallelLauncher(_Launcher):
    """joblib's worker processes; where there are GPUs, each worker sees a single one."""

    def __init__(self, n_jobs: int | None, jobs_per_gpu: int, **joblib: Any) -> None:
        self._n_jobs, self._jobs_per_gpu, self._joblib = n_jobs, jobs_per_gpu, joblib

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        try:
            from hydra_plugins.hydra_joblib_launcher.joblib_launcher import JoblibLauncher
        except ModuleNotFoundError as error:
            raise ValueError("hydra/launcher=parallel needs an extra: pip install anomaly-lab[parallel]") from error
        refuse_fewer(1, "hydra.launcher", jobs_per_gpu=self._jobs_per_gpu)
        if self._n_jobs is not None:
            refuse_fewer(1, "hydra.launcher", n_jobs=self._n_jobs)
        gpus = sweep.gpus()
        n_jobs = self._n_jobs or self._jobs_per_gpu * len(gpus) or 2
        joblib = JoblibLauncher(n_jobs=n_jobs, **self._joblib)
        with tempfile.TemporaryDirectory() as places:
            task = sweep.OnOneGpu(self.task_function, gpus, n_jobs, Path(places)) if gpus else self.task_function
            joblib.setup(hydra_context=self.hydra_context, task_function=task, config=self.config)
            returned: Sequence[JobReturn] = joblib.launch(job_overrides, initial_job_idx)
            return returned


class RayLauncher(_Launcher):
    """Ray's tasks, which may book fractions of a GPU; one whose worker dies is made again by another.

    Not by way of hydra-ray-launcher: it wants a cloudpickle that joblib does not, and a worker that died too often
    ends its whole sweep.
    """

    def __init__(self, init: DictConfig, remote: DictConfig) -> None:
        self._init: Any = OmegaConf.to_container(init, resolve=True)
        self._remote: Any = OmegaConf.to_container(remote, resolve=True)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        try:
            import ray
        except ModuleNotFoundError as error:
            raise ValueError("hydra/launcher=ray_shared needs an extra: pip install anomaly-lab[ray]") from error
        setup_globals()
        planned = [self._plan(number, list(job)) for number, job in enumerate(job_overrides, initial_job_idx)]
        if not any(one.job is not None for one in planned):
            return [self._run(one) for one in planned]
        if not ray.is_initialized():  # a search launches many times
            self._start()
        variables = {name: value for name, value in os.environ.items() if name.startswith("ANOMALY_LAB_")}
        here = (os.getcwd(), variables, Singleton.get_state())
        make = ray.remote(**self._remote)(_in_a_ray_worker)
        with sigterm_raises():  # Ray has set a handler of its own
            tasks = {make.remote(self, one._replace(job=None), *here): one for one in planned if one.job is not None}
            answers, left = {}, list(tasks)
            while left:
                [task], left = ray.wait(left)
                answers[tasks[task].number] = self._answer(tasks[task], task)
            return [answers[one.number] if one.number in answers else self._run(one) for one in planned]

    def _start(self) -> None:
        import ray

        given, alone = self._init, self._init["address"] == "local"
        if alone:  # what Ray refuses where it only joins
            given = {"include_dashboard": False, "object_store_memory": _RAY_STORE_BYTES} | given
        ray.init(**given)
        there = ray.cluster_resources()
        for option, name in (("num_gpus", "GPU"), ("num_cpus", "CPU")):
            wanted, most = self._remote[option] or 0, there.get(name, 0)
            if alone and wanted > most:
                ray.shutdown()
                raise ValueError(
                    f"hydra.launcher.remote.{option}={wanted:g} is more than Ray finds here ({most:g}): it would "
                    f"wait for ever, give at most {most:g}"
                )

    def _answer(self, one: _Planned, task: Any) -> JobReturn:
        """What became of a task that has ended; its process' words are printed."""
        from ray import exceptions, get

        made: JobReturn
        try:
            made, out, err = get(task)
            print(err, end="", file=sys.stderr, flush=True)
            print(out, end="", flush=True)
            return made
        except exceptions.RayTaskError:
            raise  # a fault of ours, outside the run
        except exceptions.RayError as error:
            last = flat(str(error)).partition(". ")[0]
            assert one.job is not None
            line = f"its worker died, and so did those that tried it again (memory, as a rule): {last}"
            record.write_failure(one.job.out, line)
            print(f"failed: {one.job.out}: {line}", file=sys.stderr, flush=True)
            return JobReturn(overrides=one.overrides, status=JobStatus.COMPLETED)


_RAY_STORE_BYTES = 100_000_000  # for what tasks hand over, a configuration and a number; Ray would take 30 % of memory


def _in_a_ray_worker(
    launcher: RayLauncher, one: _Planned, folder: str, variables: Mapping[str, str], state: Any
) -> tuple[JobReturn, str, str]:
    """The run's return, and what was printed."""
    os.chdir(folder)  # where a cluster's own processes were started is anywhere
    os.environ.update(variables)
    setup_globals()
    Singleton.set_state(state)
    # By way of Ray's logs lines come marked, late, and after the summary.
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        made = launcher._run(one)
    return made, out.getvalue(), err.getvalue()


# Slurm -------------------------------------------------------------------------------------------------------------

_LOOK_SECONDS = 10  # with wait=true: how often the queue is asked


class SlurmLauncher(_Launcher):
    """Submits what is neither done nor in the queue as one job array, and leaves (`anomaly_lab.slurm`)."""

    def __init__(self, wait: bool, submitit_folder: str, **sbatch: Any) -> None:
        self._wait, self._folder = wait, submitit_folder
        self._sbatch = {
            name: OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
            for name, value in sbatch.items()
            if value is not None
        }

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        if not slurm.installed():
            raise ValueError("hydra/launcher=slurm: there is no sbatch here, start it on a login node of the cluster")
        if not self._wait and not self.config.hydra.sweeper._target_.endswith("BasicSweeper"):
            raise ValueError("a search needs the results of its jobs: add hydra.launcher.wait=true")
        setup_globals()
        planned = [self._plan(number, list(job)) for number, job in enumerate(job_overrides, initial_job_idx)]
        busy = self._with_slurm(planned)
        todo = [(one, one.job) for one in planned if one.job is not None and one.job.out not in busy]
        if busy:
            print(f"with Slurm already: {len(busy)} run{'s' * (len(busy) != 1)}", flush=True)
        if todo:
            number = self._submit(todo)
            print(f"submitted as Slurm job {number}: {len(todo)} run{'s' * (len(todo) != 1)}", flush=True)
        while self._wait and self._with_slurm(planned):
            time.sleep(_LOOK_SECONDS)
        return [self._answer(one) for one in planned]

    def _with_slurm(self, planned: Sequence[_Planned]) -> set[Path]:
        """Folders of the runs that are running or queued."""
        queue = functools.cache(slurm.queue)
        jobs = [one.job for one in planned if one.job is not None]
        return {job.out for job in jobs if status.of(job, queue).state in ("running", "queued")}

    def _submit(self, todo: Sequence[tuple[_Planned, Job]]) -> str:
        try:
            from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher as Submitit
        except ModuleNotFoundError as error:
            raise ValueError("hydra/launcher=slurm needs an extra: pip install anomaly-lab[slurm]") from error
        make = Submitit()  # called in a job, it makes one run
        make.setup(hydra_context=self.hydra_context, task_function=self.task_function, config=self.config)
        runs = [
            (job.out, (one.overrides, "hydra.sweep.dir", one.number, f"{one.number}", Singleton.get_state()))
            for one, job in todo
        ]
        return slurm.submit(make, runs, self._folder, self._sbatch)

    def _answer(self, one: _Planned) -> JobReturn:
        if one.job is not None and (not self._wait or one.job.finished() is None):
            return JobReturn(overrides=one.overrides, status=JobStatus.COMPLETED)
        return self._run(one)
