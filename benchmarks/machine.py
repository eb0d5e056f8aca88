"""What the device can do: the fastest convolution, matrix product and copy that this process reaches on it.

Counted: the operations of the convolution or product alone, a multiplication and an addition as two, and the bytes that
a copy reads and writes. Not counted: making the tensors. Float32 on a CPU; tf32 and bfloat16 besides on a CUDA device.

The convolutions are those of the methods at their published sizes (4×4, stride 2) and larger ones (3×3), which a
library is usually tuned for, in both memory layouts. The fastest of them is the peak that shares elsewhere refer to.

Legend of the shape comments: B images, C channels in and K out, S = image size.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from anomaly_lab import switches

Work = Callable[[], object]


@dataclass(frozen=True)
class Convolution:
    """B images (C,S,S) to (K,S/stride,S/stride)."""

    batch: int
    channels: int
    size: int
    out: int
    kernel: int
    stride: int

    def __str__(self) -> str:
        shape = f"{self.batch}×{self.channels}×{self.size}×{self.size}"
        return f"{shape} to {self.out} channels, {self.kernel}×{self.kernel}, stride {self.stride}"

    @property
    def flop(self) -> int:
        """Of one pass: two for each of the kernel's weights at each output position."""
        return 2 * self.batch * (self.size // self.stride) ** 2 * self.out * self.channels * self.kernel**2

    def work(self, device: torch.device, layout: torch.memory_format, dtype: torch.dtype) -> Work:
        shapes = (
            (self.batch, self.channels, self.size, self.size),
            (self.out, self.channels, self.kernel, self.kernel),
        )
        x, weight = (torch.randn(s, device=device, dtype=dtype).contiguous(memory_format=layout) for s in shapes)
        return lambda: F.conv2d(x, weight, None, self.stride, 1)


OURS = [Convolution(64, 64, 16, 128, 4, 2), Convolution(64, 128, 8, 256, 4, 2)]
"""The second and third convolution of a DCGAN encoder of width 64, in a batch of 64."""
LARGER = [
    Convolution(64, 64, 32, 64, 3, 1),
    Convolution(64, 256, 16, 256, 3, 1),
    Convolution(16, 128, 64, 128, 3, 1),
]
CUDA_BATCH = 16  # times the batch above: a GPU wants more at once
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
PRECISIONS = {
    "cpu": {"float32": torch.float32},
    "cuda": {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16},
}
MATRIX = {"cpu": 2048, "cuda": 8192}  # rows and columns
STREAM = {"cpu": 2**24, "cuda": 2**28}  # floats of one array: far more than any cache holds


def device_of(name: str) -> torch.device:
    """``cpu``, or the CUDA device where ``gpu`` or ``cuda`` is asked for."""
    return torch.device("cuda" if name == "gpu" else name)


def now(device: torch.device) -> float:
    """A clock in seconds, read when the device has nothing left to do.

    On a CPU with one thread the process' CPU time, which other processes do not disturb.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def seconds(work: Work, device: torch.device) -> float:
    """What one call of ``work`` takes."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        start.record()
        work()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1000
    started = now(device)
    work()
    return now(device) - started


def repeated(work: Work, device: torch.device, repeats: int) -> list[float]:
    """Seconds of ``repeats`` calls after one that does not count."""
    work()
    return [seconds(work, device) for _ in range(repeats)]


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether float32 products on a GPU may be rounded to tf32."""
    before = switches.current()
    assert before is not None
    switches.apply(before._replace(matmul_precision="high" if allowed else "highest", cudnn_tf32=allowed))
    try:
        yield
    finally:
        switches.apply(before)


@dataclass(frozen=True)
class Peak:
    """The fastest convolution of a device, ready to be measured again beside what is compared with it."""

    work: Work
    flop: int
    device: torch.device

    def gflops(self, repeats: int = 3) -> float:
        """The best of ``repeats`` calls now: the machine may be slower than when the peak was found."""
        return self.flop / min(repeated(self.work, self.device, repeats)) / 1e9


@functools.cache
def peak(device: str) -> Peak:
    """The fastest float32 convolution of `measure`, found once a process."""
    where = device_of(device)
    rows = _convolutions(where, "float32", torch.float32, repeats=5)
    _, best, layout = max(rows, key=lambda row: row[0])
    return Peak(best.work(where, LAYOUTS[layout], torch.float32), best.flop, where)


@torch.no_grad()
def _convolutions(
    device: torch.device, precision: str, dtype: torch.dtype, repeats: int
) -> list[tuple[float, Convolution, str]]:
    """FLOP/s of each shape in each layout: the best of ``repeats``."""
    times = CUDA_BATCH if device.type == "cuda" else 1
    found = []
    with tf32(precision == "tf32"):
        for some in [*OURS, *LARGER]:
            shape = Convolution(times * some.batch, some.channels, some.size, some.out, some.kernel, some.stride)
            for layout, memory_format in LAYOUTS.items():
                best = min(repeated(shape.work(device, memory_format, dtype), device, repeats))
                found.append((shape.flop / best, shape, layout))
    return found


@torch.no_grad()
def measure(device: str, quick: bool) -> dict[str, Any]:
    """A row for each convolution in each layout, the matrix product and two streams: best and median rates."""
    where, repeats = device_of(device), 3 if quick else 9
    threads = torch.get_num_threads()
    rows: list[dict[str, Any]] = []
    for precision, dtype in PRECISIONS[where.type].items():
        for best, shape, layout in _convolutions(where, precision, dtype, repeats):
            rows.append(
                {"what": "convolution", "precision": precision, "of": f"{shape}, {layout}", "gflops": best / 1e9}
            )
        n = MATRIX[where.type]
        a, b = (torch.randn(n, n, device=where, dtype=dtype) for _ in range(2))
        with tf32(precision == "tf32"):
            best = min(repeated(lambda a=a, b=b: a @ b, where, repeats))  # type: ignore[misc]
        rows.append(
            {"what": "matrix product", "precision": precision, "of": f"{n}×{n}", "gflops": 2 * n**3 / best / 1e9}
        )
        del a, b
    x, y, z = (torch.ones(STREAM[where.type], device=where) for _ in range(3))
    for what, arrays, work in (
        ("copy", 2, lambda: z.copy_(x)),
        ("triad", 3, lambda: torch.add(x, y, alpha=3.0, out=z)),
    ):
        taken = repeated(work, where, repeats)
        moved = arrays * x.nbytes / 1e9
        rows.append(
            {
                "what": what,
                "precision": "float32",
                "of": f"{arrays} arrays of {x.nbytes / 2**20:.0f} MB",
                "gb_per_s": moved / min(taken),
                "median_gb_per_s": moved / statistics.median(taken),
            }
        )
    note = (
        f"The best of {repeats} calls with {threads} thread{'s' * (threads > 1)}. A multiplication and an addition are "
        "two operations; a copy's bytes are those read and those written."
    )
    return {"rows": [row | {"threads": threads} for row in rows], "note": note}
