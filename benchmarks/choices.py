"""What would be faster, by measurement: memory layout, threads, Adam's kernels, torch.compile, filled or kept memory.

Each row changes one setting of the bare loop (`benchmarks.bare`, whose steps have the lab's losses) and takes it by
turns with the loop as the lab configures it: networks and optimiser as the yaml says, all threads, nothing compiled and
no deterministic algorithms. Counted are the milliseconds of a step on the clock and of CPU, without the first
steps, in which torch.compile compiles (its seconds are said). Whether the setting changes a number: the largest
difference of a loss from the default's in the first steps, as a share of that loss, 0 where all are equal to the bit.
"""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from anomaly_lab import config, switches
from benchmarks.bare import Bare
from benchmarks.compare import Cost, now, quartiles
from benchmarks.training import compose, make_bare, steps_in

METHODS = ("ganomaly", "shared_ae", "aae", "piad_pixel_l1")

ADAM: Mapping[str, Mapping[str, bool]] = {
    "for-loop": {"foreach": False, "fused": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
FIRST = 3  # steps whose losses are compared

COMPILED = (("ganomaly", "small"),)
"""torch.compile takes minutes, so it is tried where it could help most. (A gradient penalty's second derivative it
refuses, so PIAD's critics stay as they are in any case.)"""


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def deterministic(fill: bool) -> Iterator[None]:
    """The deterministic algorithms that a run asks for, with new memory filled (torch's default) or not."""
    before = switches.current()
    assert before is not None
    switches.apply(before._replace(deterministic=True, warn_only=True, fill_memory=fill))
    try:
        yield
    finally:
        switches.apply(before)


@contextmanager
def trimmed() -> Iterator[None]:
    """The C library gives freed memory back as it would by itself."""
    switches.keep_freed_memory(2**26)
    try:
        yield
    finally:
        switches.keep_freed_memory()


class Contestant:
    """A bare loop under one setting.

    Args:
        under: makes what the loop runs in. change: what is done to its detector beforehand. adam: Adam's arguments.
    """

    def __init__(
        self,
        model: str,
        steps: int,
        overrides: tuple[str, ...],
        device: str,
        *,
        under: Callable[[], AbstractContextManager[None]] = nullcontext,
        change: Callable[[nn.Module], object] = lambda detector: None,
        adam: str | None = None,
    ) -> None:
        cfg = compose(model, max(steps, FIRST), 1, *overrides, device=device)
        self.steps = steps
        self.bare, self.batches, self.further = make_bare(cfg, model, **ADAM[adam or adam_of(cfg)])
        self.under = under
        change(self.bare.detector)
        started = time.perf_counter()
        self.first = self._train(FIRST)
        self.first_seconds = time.perf_counter() - started

    def _train(self, steps: int) -> list[float]:
        rounds = len(self.further) // len(self.batches)
        with self.under():
            losses = self.bare.train(self.batches[:steps], self.further[: rounds * steps])
        return [loss.item() for step in losses for loss in step]

    def turn(self) -> Cost:
        started = now()
        self._train(self.steps)
        return now().since(started).per(self.steps)


def adam_of(cfg: Any) -> str:
    """Which of Adam's kernels a model's yaml asks for; torch's own choice on a CPU is the loop."""
    given = next(iter(cfg.model.optimizer.values()))
    given = given if hasattr(given, "get") else cfg.model.optimizer
    return next((name for name in ("fused", "foreach") if given.get(name)), "for-loop")


def is_channels_last(detector: nn.Module) -> bool:
    weights = [p for p in detector.parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1]
    return bool(weights) and all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)


def convolutional(detector: nn.Module) -> bool:
    return any(p.ndim == 4 for p in detector.parameters())


def turn_layout(detector: nn.Module) -> None:
    """The other memory layout for all networks."""
    last = is_channels_last(detector)
    detector.to(memory_format=torch.contiguous_format if last else torch.channels_last)


@functools.cache
def empty_cache() -> tempfile.TemporaryDirectory[str]:
    """What earlier processes have compiled, or were killed at, does not count."""
    folder = tempfile.TemporaryDirectory(prefix="anomaly-lab-compiled-")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder.name
    return folder


def compile_each(detector: nn.Module) -> None:
    """torch.compile for each network by itself, as `detector.players` lists them."""
    empty_cache()
    networks = {id(network): network for owned in detector.players().values() for network in owned}  # type: ignore[operator]
    for network in networks.values():
        network.compile(dynamic=False)


def settings(default: Bare, adam: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """What is varied, one thing at a time, with the arguments of `Contestant`."""
    if convolutional(default.detector):
        yield ("contiguous" if is_channels_last(default.detector) else "channels_last"), {"change": turn_layout}
    for name in ADAM:
        if name != adam:
            yield f"Adam {name}", {"adam": name}
    every = len(os.sched_getaffinity(0))
    other = 1 if torch.get_num_threads() > 1 else every
    if other != torch.get_num_threads():
        yield _threads(other), {"under": lambda: threads(other)}
    yield "deterministic algorithms, memory filled", {"under": lambda: deterministic(fill=True)}
    yield "deterministic algorithms, memory not filled", {"under": lambda: deterministic(fill=False)}
    yield "freed memory given back", {"under": trimmed}
    yield "torch.compile of each network", {"change": compile_each}


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count > 1)}"


def difference(a: list[float], b: list[float]) -> float:
    """Largest difference of two loss curves, as a share of the first one's values; 0 where equal to the bit."""
    return max(abs(x - y) / max(abs(x), 1e-12) for x, y in zip(a, b, strict=True))


def vary(
    model: str, *overrides: str, pairs: int, seconds: float, device: str = "cpu", compiled: bool = True
) -> list[Mapping[str, Any]]:
    """A row for the default and for each other setting of ``model``."""
    steps = steps_in(seconds, model, *overrides, fewest=1, device=device)
    default = Contestant(model, steps, overrides, device)
    cfg = compose(model, steps, 1, *overrides, device=device)
    adam, size = adam_of(cfg), "small" if config.reduced(cfg) else "published"
    about = {"model": model, "size": size, "steps": steps, "pairs": pairs}
    layout = "channels_last" if is_channels_last(default.bare.detector) else "contiguous"
    if not convolutional(default.bare.detector):
        layout = "no convolutions"
    rows: list[Mapping[str, Any]] = []
    every: list[Cost] = []
    for name, given in settings(default.bare, adam):
        if name.startswith("torch.compile") and not compiled:
            continue
        row: dict[str, Any] = about | {"setting": name}
        if name.startswith("torch.compile") and device == "cpu" and shutil.which("g++") is None:
            rows.append(row | {"failed": "torch.compile needs a C++ compiler: install g++"})
            continue
        try:
            contestant = Contestant(model, steps, overrides, device, **given)
        except RuntimeError as error:  # torch.compile has no second derivatives, which gradient penalties take
            rows.append(row | {"failed": " ".join(str(error).split())[:200]})
            continue
        turns = [(default.turn(), contestant.turn()) for _ in range(pairs)]
        every += [a for a, _ in turns]
        row |= _milliseconds([b for _, b in turns])
        row["ratio_wall"] = quartiles([b.wall / a.wall for a, b in turns])
        row["ratio_cpu"] = quartiles([b.cpu / a.cpu for a, b in turns])
        row["difference"] = float(f"{difference(default.first, contestant.first):.2g}")
        if name.startswith("torch.compile"):
            row["compile_seconds"] = round(contestant.first_seconds, 1)
            torch.compiler.reset()
        rows.append(row)
    named = f"default: {layout}, Adam {adam}, {_threads(torch.get_num_threads())}"
    first = about | {"setting": named} | _milliseconds(every) | {"difference": 0.0}
    return [first | {"ratio_wall": quartiles([1.0]), "ratio_cpu": quartiles([1.0])}, *rows]


def _milliseconds(costs: list[Cost]) -> dict[str, Any]:
    return {
        "ms_wall": quartiles([1000 * cost.wall for cost in costs]),
        "ms_cpu": quartiles([1000 * cost.cpu for cost in costs]),
    }


def measure(device: str, quick: bool) -> list[Mapping[str, Any]]:
    """Rows of `vary` for the methods of four kinds of step, at both sizes."""
    if quick:
        return vary("aae", "size=small", pairs=2, seconds=0.1, device=device, compiled=False)
    return [
        row
        for size in ("full", "small")
        for model in METHODS
        for row in vary(model, f"size={size}", pairs=3, seconds=0.3, device=device, compiled=(model, size) in COMPILED)
    ]
