"""The state of runs, from the files in their folders: done, running, queued, failed, interrupted, damaged or missing.

Imports nothing heavy, and asks Slurm at most once.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from anomaly_lab import record, results, slurm
from anomaly_lab.files import is_locked

if TYPE_CHECKING:
    from anomaly_lab.config import Job

STATES = ("done", "running", "queued", "failed", "interrupted", "damaged", "missing")


class Status(NamedTuple):
    """The state of a run."""

    state: str  # one of STATES
    path: str  # of its folder, below the folder of runs
    detail: str = ""
    with_slurm: bool = False  # running or queued there, it needs no further command


def under(runs: str | Path, expected: Sequence[Job] | None = None) -> list[Status]:
    """The state of every run under ``runs``, or, given an experiment's grid, of every run of the grid.

    * done: a readable result;
    * damaged: a result that cannot be read;
    * running: a process holds `.lock`, or Slurm runs its job;
    * queued: its Slurm job waits, for the first time or again;
    * failed: a `failure.json` without a result, or a job that started, left the queue and wrote nothing;
    * interrupted: a folder with none of these; the next start resumes it;
    * missing: the grid has it, and there is no folder.

    Returns:
        what is done first, then by the order of `STATES`.

    Raises:
        ValueError: ``runs`` is not a folder.
    """
    runs = Path(runs)
    if expected is None:
        if not runs.is_dir():
            raise ValueError(f"{runs} is not a folder: name the one that holds the runs, such as runs/")
        paths = [folder.relative_to(runs).as_posix() for folder in run_folders(runs)]
    else:
        paths = list(dict.fromkeys(job.path for job in expected))
    queue = functools.cache(slurm.queue)
    states = [_status(runs, path, queue) for path in paths]
    return sorted(states, key=lambda s: (STATES.index(s.state), results.natural(s.path)))


def of(job: Job, queue: Callable[[], slurm.Queue | None] = slurm.queue) -> Status:
    """The state of one run. For many runs, give a cached ``queue``."""
    return _status(Path(job.cfg.runs), job.path, queue)


def _status(runs: Path, path: str, queue: Callable[[], slurm.Queue | None]) -> Status:
    folder = runs / path
    if not folder.is_dir():
        return Status("missing", path)
    if (folder / "result.json").exists():
        try:
            row, _ = results.read_run(folder, path)
        except ValueError as error:
            return Status("damaged", path, str(error))
        return Status("done", path, f"AUROC {row['auroc']:.3f}")
    place = slurm.place(folder, queue)
    if is_locked(folder / ".lock"):
        return Status("running", path, place.detail if place else "", place is not None)
    if place is not None:
        return Status("running" if place.running else "queued", path, place.detail, True)
    why = record.failure(folder)
    if why is not None or (why := slurm.lost(folder)):
        return Status("failed", path, why)
    resumes = (folder / "last.ckpt").exists()
    return Status("interrupted", path, "resumes from last.ckpt" if resumes else "starts again")


def text(states: Sequence[Status]) -> str:
    """A line a run, and the counts."""
    lines = [f"{s.state:<12}{s.path}{'  ' + s.detail if s.detail else ''}" for s in states]
    counts = [f"{sum(s.state == state for s in states)} {state}" for state in STATES]
    shown = [text for text in counts if not text.startswith("0 ")]
    return "\n".join([*lines, f"{len(states)} runs: {', '.join(shown)}" if states else "no runs"])


def run_folders(runs: Path) -> Iterator[Path]:
    """The folders of runs under ``runs``: by what lies in them, or while still empty by their name: n8/s0 (a8,
    n0+1, nall)."""
    marks = {"result.json", record.FAILURE, "last.ckpt", ".lock", slurm.JOB_FILE}
    kind = re.compile(rf"[na](\d+|{record.SEVERAL.pattern})")
    for folder, inner, files in os.walk(runs):
        inner.sort()
        path = Path(folder)
        if path == runs:
            continue
        named = kind.fullmatch(path.parent.name) and re.fullmatch(r"s\d+(-[0-9a-f]{8})?", path.name)
        if named or not marks.isdisjoint(files):
            inner.clear()
            yield path
