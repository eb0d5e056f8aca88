"""Many runs by one command: each made under Hydra, killed workers survived, what is done and left counted.

Imports neither torch nor Lightning: a sweep over finished runs, and a dry run, stay quick.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import os
import subprocess
import sys
import time
import traceback
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from statistics import median
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode

from anomaly_lab import config, grids, record, slurm, status
from anomaly_lab.config import Job
from anomaly_lab.errors import DONE, FAILED, MISTAKE, Terminated, exit_code, explained, flat, ignore_pipe
from anomaly_lab.files import UNWRITABLE, take_lock
from anomaly_lab.status import Status

if TYPE_CHECKING:
    from omegaconf import DictConfig

JOURNAL = "ANOMALY_LAB_JOURNAL"
"""Environment variable, for a launcher's workers: the journal of the sweep they work for."""


def make(hydra_main: Callable[[Sequence[str]], None], overrides: Sequence[str]) -> int:
    """The multirun that ``overrides`` describe, as far as it is not made yet; the command's exit code.

    Args:
        hydra_main: lets Hydra call `job` for every run of the grid that overrides describe.
    """
    asked = grids.sweep(overrides)
    jobs = [] if asked.chooses_points else grids.jobs(overrides)
    grids.refuse_unknown_keys(jobs)
    try:
        with open_journal(asked.runs) as journal:
            for grid in [grids.in_each_job(overrides, asked.grid)] if asked.chooses_points else grids.grids(overrides):
                survive_killed_workers(functools.partial(hydra_main, grid), journal)
            jobs = jobs or journal.jobs()
    except OSError as error:
        if error.errno not in UNWRITABLE or asked.chooses_points or not _all_done(jobs):
            raise
    return _summary(jobs, searched=asked.chooses_points)


def _all_done(jobs: Sequence[Sequence[str]]) -> bool:
    """Whether there is nothing to make, so that nothing need be written; then every run's line is shown."""
    found = [member.job.finished() if member.job else None for member in _grid(jobs)]
    if None in found:
        return False
    for result in found:
        assert result is not None
        _show(_result_line(result) + "  (done before)", sys.stdout)
    return True


# The journal ------------------------------------------------------------------------------------------------------


class Journal(NamedTuple):
    """The jobs of a sweep: each process that makes one appends a line when it starts and when it ends.

    It is the only list of the points that a search has chosen, and of the runs that a killed process was making.
    """

    path: Path

    def note(self, event: str, job: Sequence[str]) -> None:
        with suppress(FileNotFoundError):  # the sweep is over and left this job in a queue
            file = os.open(self.path, os.O_WRONLY | os.O_APPEND)
            try:
                # One write a line, so lines of several processes do not mix; the break first, so that a line cut off
                # by a full disk spoils no other.
                os.write(file, b"\n" + json.dumps([event, list(job)]).encode())
            finally:
                os.close(file)

    def jobs(self) -> list[list[str]]:
        """Every job that was begun, in that order, each once."""
        return [list(job) for job in self._last()]

    def in_state(self, event: str) -> list[list[str]]:
        return [list(job) for job, last in self._last().items() if last == event]

    def _last(self) -> dict[tuple[str, ...], str]:
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        whole = [line for line in lines if line.endswith("]]")]
        return {tuple(job): event for event, job in map(json.loads, whole)}


@contextmanager
def open_journal(runs: Path) -> Iterator[Journal]:
    """The journal of one sweep, in the folder of runs, for as long as the sweep lasts."""
    runs.mkdir(parents=True, exist_ok=True)
    for path in runs.glob(".sweep-*.jsonl"):  # of killed sweeps: no process has their lock
        with suppress(OSError), open(path, "rb") as left:  # its sweep may have ended by now
            if take_lock(left):
                path.unlink()
    new = (runs / f".sweep-{uuid.uuid4().hex[:8]}.new").resolve()
    path = new.with_suffix(".jsonl")
    with open(new, "xb") as file:
        try:
            with suppress(OSError):  # a file system without locks
                take_lock(file)
            new.rename(path)  # locked before another sweep can find it
            os.environ[JOURNAL] = str(path)
            yield Journal(path)
        finally:
            os.environ.pop(JOURNAL, None)
            path.unlink(missing_ok=True)


# Workers ----------------------------------------------------------------------------------------------------------


def gpus() -> list[str]:
    """The GPUs this process may use, by the names CUDA_VISIBLE_DEVICES has for them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        names = visible.split(",")
        return [name for name in (names[: names.index("-1")] if "-1" in names else names) if name]  # as CUDA reads it
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


class OnOneGpu(NamedTuple):
    """A task for worker processes, each of which takes one of ``workers`` places, and with it a GPU.

    A worker keeps its place, a locked file, until it ends: CUDA binds a process to a device.
    """

    task: Callable[[Any], Any]
    gpus: Sequence[str]
    workers: int
    places: Path

    def __call__(self, cfg: DictConfig) -> Any:
        global _place
        for number in itertools.cycle(range(self.workers)):
            if _place is not None:
                break
            place = os.open(self.places / str(number), os.O_WRONLY | os.O_CREAT)
            if take_lock(place):
                _place = place
                os.environ["CUDA_VISIBLE_DEVICES"] = self.gpus[number % len(self.gpus)]
            else:
                os.close(place)
                time.sleep(0.01)
        return self.task(cfg)


_place: int | None = None
"""Of this process, if it is a worker that has one: the locked file, never closed."""


def survive_killed_workers(sweep: Callable[[], None], journal: Journal) -> None:
    """Let Hydra make its sweep, and go on with the rest where a killed worker breaks the launcher's pool.

    Which of the runs in progress killed the worker is unknown (mostly the one that took all the memory). So each is
    made alone: what dies alone has failed, and the sweep goes on with the rest.
    """
    while True:
        try:
            sweep()
            return
        except BrokenProcessPool:  # joblib's are subclasses
            suspects = journal.in_state("begun")
            if not suspects:
                raise
        print(f"a worker process was killed; {len(suspects)} runs that were being made are made alone", file=sys.stderr)
        for job in suspects:
            program = "import sys; from anomaly_lab.cli import train; sys.argv[0] = 'anomaly-lab'; train()"
            code = subprocess.run([sys.executable, "-c", program, *job], stdout=subprocess.DEVNULL).returncode
            journal.note("done" if code == DONE else "failed", job)
            if code < 0:
                print(f"failed: {' '.join(job)}: its process was killed by signal {-code}", file=sys.stderr, flush=True)


# One run, under Hydra ---------------------------------------------------------------------------------------------


def job(cfg: DictConfig) -> float | None:
    """One run, under Hydra: in this process, a launcher's worker, or a Slurm job.

    Returns the ``val_score``, for searches to minimise; None without a result.
    """
    hydra = HydraConfig.get()
    words = list(hydra.overrides.task)
    queued = record.SUBMITTED in os.environ  # nothing else is made by this process, and its sweep is over
    sweep = hydra.mode == RunMode.MULTIRUN
    journal = Journal(Path(os.environ[JOURNAL])) if sweep and JOURNAL in os.environ and not queued else None
    if journal is not None:
        if words in journal.in_state("failed"):
            return None  # in this very sweep, before a worker died
        journal.note("begun", words)
    run: Job | None = None
    ended = "failed"
    try:
        cfg = config.with_choices(cfg, hydra)
        if not sweep:
            _refuse_grid(cfg.choices.experiment, hydra.sweeper.params, hydra.overrides.task)
        run = config.job(cfg)  # finds most mistakes, before anything heavy is imported
        result = before = run.finished()
        if before is None:
            result = _make_run(run)
        elif "WANDB_SWEEP_ID" in os.environ:  # its agent waits for a result, also of a point that is known
            from anomaly_lab.tracking import show_again

            show_again(run, before)
        ended = "done" if result is not None else "busy"
    except Exception as error:
        if sweep and isinstance(error, OSError) and error.errno in UNWRITABLE:
            raise  # the others could not write either
        line = explained(error)
        if line is None:
            traceback.print_exc()
            line = f"{type(error).__name__}: {flat(str(error))}"
            code = FAILED
        else:
            code = exit_code(error)
            if isinstance(error, HydraException) and run is not None:  # a method that could not be made
                line += f"; traceback in {run.out / record.FAILURE}"
        if not sweep:
            print(f"anomaly-lab: error: {line}", file=sys.stderr)
            sys.exit(code)
        # The sweep goes on; its summary reports the failure again.
        _show(f"failed: {run.out if run else ' '.join(words)}: {line}", sys.stderr)
        if queued:
            raise
        return None
    finally:
        if journal is not None:
            journal.note(ended, words)
    assert run is not None
    if result is None:
        _show(f"left to the process that is busy with it: {run.out}", sys.stderr)
        return None
    if sweep:
        _show(_result_line(result) + ("  (done before)" if before else ""), sys.stdout)
    else:
        _print_result(result, run.out)
    return float(result["metrics"]["val_score"])


def _make_run(run: Job) -> dict[str, Any] | None:
    """Make the run. Lightning's own exceptions become ours here, where Lightning is loaded anyway."""
    from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

    from anomaly_lab.run import run as make  # torch and Lightning: seconds

    _quiet()
    try:
        return make(run)
    except MisconfigurationException as error:  # a device that is not there
        raise ValueError(str(error)) from error
    except SIGTERMException as end:
        raise Terminated from end
    except SystemExit as end:
        if isinstance(end.__context__, KeyboardInterrupt):  # Lightning turns Ctrl-C during training into an exit
            raise KeyboardInterrupt from end
        raise


def _refuse_grid(experiment: str | None, grid: Mapping[str, Any] | None, given: Sequence[str]) -> None:
    """Without -m an experiment's grid would silently become one run of the defaults."""
    own = [word for word in given if not word.startswith("experiment=")]  # which a grid may be over
    missing = grid and [key for key in grid if not any(word.startswith(f"{key}=") for word in own)]
    if missing:
        one = " ".join(f"{key}=..." for key in missing)
        raise ValueError(f"experiment={experiment} is a grid of runs: add -m, or ask for one of them with {one}")


def _quiet() -> None:
    """Hide Lightning's greetings and harmless warnings; call after its import, which sets its own levels."""
    for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*weights_only. was not set.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*`srun` command is available.*")  # on a cluster's login node


# What is shown ----------------------------------------------------------------------------------------------------


def _show(line: str, file: IO[str]) -> None:
    """Print a line about one run, between progress bars."""
    bars = sys.modules.get("tqdm") if sys.stderr.isatty() else None
    with bars.tqdm.external_write_mode(file) if bars else nullcontext():
        if bars:
            print(end="\r", file=sys.stderr, flush=True)  # a bar that was not the first leaves the cursor at its end
        try:
            print(line, file=file, flush=True)
        except BrokenPipeError:
            ignore_pipe(file)


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"


def _result_line(result: Mapping[str, Any]) -> str:
    """One finished run of a sweep."""
    identity = result["identity"]
    seconds = result["seconds"]["fit"] + result["seconds"]["score"]
    changed = "".join(f"  {key.rpartition('.')[2]}={value}" for key, value in identity["changed"].items())
    return (
        f"{identity['model']}  {identity['dataset']}  {identity['split']}  {result['role']} {result['class_name']}  "
        f"seed {identity['seed']}  AUROC {_number(result['metrics']['auroc'])}  {seconds:.0f} s{changed}"
    )


def _print_result(result: Mapping[str, Any], out: Path) -> None:
    identity, measured = result["identity"], {k: _number(v) for k, v in result["metrics"].items()}
    rows = [
        ("model", identity["model"]),
        ("data", f"{identity['dataset']}, split {identity['split']}, {result['role']} class {result['class_name']}"),
        ("AUROC", f"{measured['auroc']}  (95 % interval {measured['auroc_low']} to {measured['auroc_high']})"),
        ("average precision", measured["average_precision"]),
        ("FPR at 95 % TPR", measured["fpr95"]),
        ("balanced accuracy", measured["balanced_accuracy"]),
    ]
    if result["metrics"]["balanced_accuracy"] is None:
        held_out = result["partition"]["val"]
        rows[-1] = (
            "balanced accuracy",
            f"n/a  ({held_out} held-out normals are too few for a threshold: 20 are needed, see split.val_share)",
        )
    if result["metrics"]["oracle_auroc"] is not None:
        rows.append(("oracle AUROC", f"{measured['oracle_auroc']}  (best epoch on the test labels: not a result)"))
    learned = result.get("learned", {})  # earlier code measured nothing of it
    explained_share, change = learned.get("explained_variance"), learned.get("parameter_change")
    if result["epochs"] and explained_share is not None and explained_share < record.LEARNED:
        rows.append(
            (
                "reconstruction",
                f"no better than the mean image: explains {explained_share:.0%} of the held-out normals' variance (†)",
            )
        )
    if result["epochs"] and change is not None and change < record.MOVED:
        rows.append(("parameters", f"where they were: changed by {change:.1g} of their norm (†)"))
    pictures = sorted(path.name for path in (out / "figures").glob("*.png"))
    rows += [
        ("training", f"{result['epochs']} epochs, {result['seconds']['fit']:.0f} s on {result['device']}"),
        ("result", str(out / "result.json")),
        *([("figures", f"{out / 'figures'}: {', '.join(pictures)}")] if pictures else []),
    ]
    width = max(len(name) for name, _ in rows)
    _show("\n".join(f"{name:<{width}}  {value}" for name, value in rows), sys.stdout)


# The grid ---------------------------------------------------------------------------------------------------------


class _Member(NamedTuple):
    """One run of a grid."""

    job: Job | None  # None where it is impossible
    status: Status  # its state then is "impossible", and its path what tells it from the others

    @property
    def name(self) -> str:
        return str(self.job.out) if self.job else self.status.path


def _grid(jobs: Sequence[Sequence[str]], trial: Callable[[Job], None] | None = None) -> list[_Member]:
    """The runs of a grid; with ``trial``, which raises what a run would fail with, of those that are to do."""
    common = set[str]().union(*jobs[:1]).intersection(*jobs) if len(jobs) > 1 else set()
    queue = functools.cache(slurm.queue)
    lacking: dict[str, Exception] = {}  # a data set that could not be fetched is not tried again for every run
    members = []
    for words, cfg in zip(jobs, map(config.compose, jobs), strict=True):
        data = f"{cfg.dataset} {cfg.split.get('anomalies')}"
        try:
            if data in lacking:
                raise lacking[data]
            try:
                config.load_images(cfg)
            except Exception as error:
                lacking[data] = error
                raise
            run = config.job(cfg)
            found = status.of(run, queue)
            if found.state == "done" and run.finished() is None:
                found = Status("missing", found.path, "a metric asked for now was not recorded")
            if trial is not None and found.state != "done":
                trial(run)
        except Exception as error:  # a class that is none of the data set's, missing data, an edited yaml, ...
            line = explained(error)
            if line is None:
                raise
            name = " ".join(word for word in words if word not in common)
            members.append(_Member(None, Status("impossible", name, line)))
        else:
            members.append(_Member(run, found))
    return members


def _summary(jobs: Sequence[Sequence[str]], *, searched: bool) -> int:
    """Print how a sweep ended: unfinished runs with reasons, counts by state, a search's best; the exit code.

    Runs that wait or run in Slurm have not failed.
    """
    members = _grid(jobs)
    if searched:
        members = list({member.name: member for member in members}.values())  # a search may come back to a point
        found = [(result, one.name) for one in members if one.job is not None and (result := one.job.finished())]
        if found:
            best, name = min(found, key=lambda pair: pair[0]["metrics"]["val_score"])
            changed = "  ".join(f"{key}={value}" for key, value in best["identity"]["changed"].items())
            print(f"lowest val_score: {best['metrics']['val_score']:.6g}  {name}  {changed}".rstrip())
    states = ["failed" if member.job is None else member.status.state for member in members]
    for member, state in zip(members, states, strict=True):
        if state != "done":
            print(f"{state:<12}{member.name}  {member.status.detail}")
    print(f"{_runs(members)}: " + ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)))
    left = [member for member, state in zip(members, states, strict=True) if state != "done"]
    if not left:
        return DONE
    if all(member.status.with_slurm for member in left):
        assert left[0].job is not None
        print(f"the jobs go on by themselves: anomaly-lab-report {left[0].job.cfg.runs} --status")
        return DONE
    if "damaged" in states:
        print("delete the files that are damaged")
    print("the same command tries again what is not done")
    return FAILED


def dry_run(overrides: Sequence[str]) -> int:
    """Print what is done, what is to do and about how long it will take; the command's exit code."""
    tried: dict[Any, str] = {}  # what a partition fails with; methods share it
    cautions: set[str] = set()

    def trial(run: Job) -> None:
        key = run.split, str(run.cfg.dataset), run.identity["normal_class"], run.cfg.seed
        if key not in tried:
            try:
                run.split(config.load_images(run.cfg), config.target(run.cfg), run.cfg.seed)
                tried[key] = ""
            except ValueError as error:
                tried[key] = str(error)
        if tried[key]:
            raise ValueError(tried[key])
        if (line := config.caution(run)) is not None:
            cautions.add(line)

    jobs = grids.jobs(overrides)
    grids.refuse_unknown_keys(jobs)
    members = _grid(jobs, trial)
    seconds: dict[Any, list[float]] = {}
    left = []
    alike = Counter(one.status.detail for one in members if one.job is None)
    shown: set[str] = set()
    for one in members:
        detail = one.status.detail
        if one.job is None and alike[detail] > 10:  # one line of what a whole grid lacks
            if detail not in shown:
                print(f"{one.status.state:<12}{one.name} and {alike[detail] - 1} others  {detail}")
                shown.add(detail)
        elif one.job is not None and one.status.state == "done":
            spent = json.loads((one.job.out / "result.json").read_text())["seconds"]
            seconds.setdefault(_kind(one.job), []).append(spent["fit"] + spent["score"])
        else:
            print(f"{one.status.state:<12}{one.name}  {detail}".rstrip())
            left += [one.job] if one.job is not None else []
    known = [median(seconds[_kind(job)]) for job in left if _kind(job) in seconds]
    impossible = sum(one.job is None for one in members)
    line = f"{_runs(members)}: {len(members) - len(left) - impossible} done, {len(left)} to do"
    if impossible:
        line += f", {impossible} impossible"
    if known:
        line += f"; about {_duration(sum(known))} one after another"
        line += "" if len(known) == len(left) else f" for {len(known)} of them"
    if len(known) < len(left):
        line += f"; no finished run tells how long {len(left) - len(known)} of them take"
    print(line)
    for caution in sorted(cautions):
        print(f"note: {caution}")
    return MISTAKE if impossible else DONE


def _runs(members: Sequence[_Member]) -> str:
    return f"{len(members)} run{'s' * (len(members) != 1)}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def _kind(job: Job) -> tuple[str, ...]:
    """Runs of one kind take about the same time: all but class and seed are equal."""
    return tuple(str(job.identity[key]) for key in ("model", "dataset", "split", "changed"))
