"""Two ways of doing the same work, taken in turn in one process, and what of their costs can be compared.

Counted are the CPU-seconds of all threads of this process and of its children (workers of data loaders, finished or
not), and the seconds on the clock, on a GPU after waiting for it. Absolute figures belong to one machine; ratios of
neighbours, taken pair by pair, are what is reported first.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

SEED = 0


class Cost(NamedTuple):
    """Seconds of CPU and on the clock."""

    cpu: float
    wall: float

    def since(self, start: Cost) -> Cost:
        return Cost(self.cpu - start.cpu, self.wall - start.wall)

    def per(self, images: int) -> Cost:
        return Cost(self.cpu / images, self.wall / images)


def now() -> Cost:
    """The clocks, after all that was asked of a GPU is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    times = os.times()
    living = sum(_cpu_seconds(child.pid) for child in multiprocessing.active_children() if child.pid)
    return Cost(time.process_time() + times.children_user + times.children_system + living, time.perf_counter())


def _cpu_seconds(pid: int) -> float:
    """What a living child has used; 0 for one that has just ended, which `os.times` knows about then."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def quartiles(values: Sequence[float], digits: int = 4) -> dict[str, float]:
    """Median, lower and upper quartile, to so many significant digits."""
    low, median, high = np.quantile(np.asarray(values, dtype=float), (0.25, 0.5, 0.75))
    return {name: float(f"{x:.{digits}g}") for name, x in (("median", median), ("low", low), ("high", high))}


def contest(ours: Sequence[Cost], theirs: Sequence[Cost]) -> dict[str, Any]:
    """Costs per image, pair by pair, as throughputs (images a second) and their ratios: above 1, ours is faster."""
    assert len(ours) == len(theirs) > 0
    pairs = list(zip(ours, theirs, strict=True))
    return {
        "pairs": len(pairs),
        "ratio_cpu": quartiles([b.cpu / a.cpu for a, b in pairs]),
        "ratio_wall": quartiles([b.wall / a.wall for a, b in pairs]),
        "ours_per_cpu_second": quartiles([1 / a.cpu for a in ours]),
        "theirs_per_cpu_second": quartiles([1 / b.cpu for b in theirs]),
        "ours_per_second": quartiles([1 / a.wall for a in ours]),
        "theirs_per_second": quartiles([1 / b.wall for b in theirs]),
    }
