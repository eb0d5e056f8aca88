"""Every process-wide switch that a run changes, in one list: read, set for the run, put back.

Imports torch only where numbers are computed, so that `anomaly_lab.turns` stays quick to import.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Generic, NamedTuple, TypeVar

T = TypeVar("T")

VARIABLES = ("CUBLAS_WORKSPACE_CONFIG", "CUDA_DEVICE_ORDER")
"""Environment variables that a run sets: the first one itself, the second one through Lightning on a GPU."""

# The initial state cannot be read. By default glibc raises both thresholds as large blocks are freed, up to these
# values. The documented initial ones, 128 kB, would be fixed once set: a tensor of some MB would take new pages every
# time, 20 times the work of filling it.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MMAP_THRESHOLD, _TRIM_THRESHOLD = 2**25, 2**26


class Switches(NamedTuple):
    """Torch's switches that decide how numbers are computed."""

    matmul_precision: str
    cudnn_tf32: bool
    cudnn_benchmark: bool
    fill_memory: bool
    deterministic: bool
    warn_only: bool


def current() -> Switches | None:
    """The switches as they are; None while torch is not imported."""
    torch = sys.modules.get("torch")
    if torch is None:
        return None
    return Switches(
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.benchmark,
        torch.utils.deterministic.fill_uninitialized_memory,
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )


def apply(wanted: Switches | None) -> None:
    """Set all switches; nothing happens for what `current` gives without torch."""
    if wanted is None or wanted == current():  # setting costs far more than reading
        return
    torch: Any = sys.modules["torch"]
    torch.set_float32_matmul_precision(wanted.matmul_precision)
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = wanted.cudnn_tf32, wanted.cudnn_benchmark
    torch.utils.deterministic.fill_uninitialized_memory = wanted.fill_memory
    torch.use_deterministic_algorithms(wanted.deterministic, warn_only=wanted.warn_only)


class _Common(Generic[T]):
    """State shared by all runs of a process: the first run reads it, the last one to end restores it.

    If each run restored it, the first to end would change it for the others.
    """

    def __init__(self, read: Callable[[], T], put_back: Callable[[T], object]) -> None:
        self._read, self._put_back, self._holders = read, put_back, 0

    @contextmanager
    def kept(self) -> Iterator[None]:
        if not self._holders:
            self._found = self._read()
        self._holders += 1
        try:
            yield
        finally:
            self._holders -= 1
            if not self._holders:
                self._put_back(self._found)


def _set_variables(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _set_threads(number: int) -> None:
    import torch

    torch.set_num_threads(number)


_environment = _Common(lambda: {name: os.environ.get(name) for name in VARIABLES}, _set_variables)
_number_of_threads = _Common(_threads, _set_threads)
_heap = _Common(lambda: _TRIM_THRESHOLD, lambda threshold: keep_freed_memory(threshold))


@contextmanager
def of_a_run(precision: str, threads: int | None) -> Iterator[None]:
    """All that a run switches in its process, put back however the run ends: `numerics` and `resources`."""
    with numerics(precision), resources(threads):
        yield


@contextmanager
def numerics(precision: str) -> Iterator[None]:
    """What decides the numbers of a run: ``trainer.precision`` and deterministic algorithms.

    Where an operation has no deterministic algorithm, torch warns. `fill_uninitialized_memory` is off: it writes NaN
    into every new tensor, an extra pass over memory that the kernels overwrite anyway.
    """
    import torch  # noqa: F401  # else there are no switches yet

    before, tf32 = current(), precision == "tf32"
    assert before is not None
    with _environment.kept():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS may sum in another order each time
        try:
            apply(Switches("high" if tf32 else "highest", tf32, before.cudnn_benchmark, False, True, True))
            yield
        finally:
            apply(before)


@contextmanager
def resources(threads: int | None = None) -> Iterator[None]:
    """Threads and memory for training.

    Args:
        threads: ``trainer.threads``; None: all cores, or the launcher's share of them where several runs are at work.
    """
    if threads is None and "OMP_NUM_THREADS" not in os.environ:
        affinity = getattr(os, "sched_getaffinity", None)  # macOS has none
        threads = len(affinity(0)) if affinity else os.cpu_count()
    with ExitStack() as stack:
        if threads is not None:
            stack.enter_context(_number_of_threads.kept())
            _set_threads(threads)
        stack.enter_context(_heap.kept())
        keep_freed_memory()
        yield


def keep_freed_memory(most: int = 2**30) -> None:
    """Let this process keep up to ``most`` free bytes at its heap's end: every step needs the same again.

    glibc gives back what exceeds 64 MB there, and the next step pays for every page anew: up to a tenth of its time.
    Arrays of 32 MB and more are returned as before. Nothing happens with other C libraries.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD)  # setting the other one stops glibc from moving this one
        mallopt(_M_TRIM_THRESHOLD, most)
