"""A whole training step as one CUDA graph: captured once, replayed with other images.

On a large GPU a step of these small networks is bound by launching some hundred kernels; a replay does so at once.
The graph holds the preparation of the images and all players' passes, gradients and moves; its only input is the
positions of the step's images.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from lightning import Callback
from torch import Tensor
from torch.optim import Optimizer

if TYPE_CHECKING:
    from lightning import LightningModule, Trainer

    from anomaly_lab.detector import Detector

log = logging.getLogger(__name__)

WARM_UP = 3
"""Eager steps before the capture: lazy initialisation (workspaces, optimiser state) must happen here, not during it."""


class Graph(Protocol):
    """A captured step: `CUDAGraph`, or in tests one that replays without a GPU."""

    def warm_up(self, step: Callable[[], None]) -> None:
        """Compute ``step`` where it will be captured."""
        ...

    def capture(self, step: Callable[[], None]) -> None:
        """Record what ``step`` does, without doing it."""
        ...

    def replay(self) -> None:
        """Do what was recorded, on what now lies in the memory it reads."""
        ...


class CUDAGraph:
    """A graph on the current device, and the stream it is captured on.

    Args:
        noise: a generator that the step draws from, on that device; each replay draws the next numbers.
    """

    def __init__(self, noise: torch.Generator) -> None:
        # A run that takes turns with others has a stream of its own already; the default one cannot be captured.
        current = torch.cuda.current_stream()
        own = current != torch.cuda.default_stream()
        self._graph, self._stream = torch.cuda.CUDAGraph(), current if own else torch.cuda.Stream()
        self._graph.register_generator_state(noise)

    def warm_up(self, step: Callable[[], None]) -> None:
        # On the stream of the capture, since autograd remembers on which one it has seen a parameter first.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            step()
        torch.cuda.current_stream().wait_stream(self._stream)

    def capture(self, step: Callable[[], None]) -> None:
        # cuBLAS keeps one workspace per stream, and Lightning frees all of the process's where a run begins or ends. So
        # the step's workspace must be allocated, and stay, in the graph's own memory.
        torch._C._cuda_clearCublasWorkspaces()
        try:
            with torch.cuda.graph(self._graph, stream=self._stream):
                step()
        finally:
            torch._C._cuda_clearCublasWorkspaces()

    def replay(self) -> None:
        self._graph.replay()


class GraphedSteps(Callback):
    """Takes a detector's steady steps: the first few eagerly, then captures one and replays it.

    A captured step reads and writes memory by address. At the start of an epoch the graph is dropped if the stage, an
    optimiser's setting or the address of one of the detector's tensors has changed.

    Args:
        graph: makes a graph for a noise generator.
    """

    def __init__(self, graph: Callable[[torch.Generator], Graph] = CUDAGraph) -> None:
        self._make, self._warned = graph, False
        self._relies_on: tuple[Any, ...] | None = None
        self._forget()

    def _forget(self) -> None:
        self._graph: Graph | None = None
        self._computed, self._captured = 0, False
        self._static: list[Tensor] = []  # positions of the step's batch, then of its further batches

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        cast(Any, pl_module).replay = self

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.on_fit_end(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._forget()  # and its memory with it
        cast(Any, pl_module).replay = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if pl_module.device.type == "cuda":
            count_on_device(trainer.optimizers)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """A checkpoint does not depend on the capture, so a run may resume without one."""
        if "optimizer_states" in checkpoint:
            checkpoint["optimizer_states"] = [counted_on_host(state) for state in checkpoint["optimizer_states"]]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx > 0:
            return
        # Not in on_train_epoch_start: the detector's hook follows a callback's and may change all this.
        detector = cast("Detector", pl_module)
        settings = [
            tuple((key, value) for key, value in group.items() if key != "params")
            for optimizer in trainer.optimizers
            for group in optimizer.param_groups
        ]
        tensors = [*detector.parameters(), *detector.buffers()]
        places = [(tensor.data_ptr(), tensor.shape, tensor.stride()) for tensor in tensors]
        relies_on = (detector.stage, repr(settings), places)
        if relies_on != self._relies_on:
            self._forget()
        self._relies_on = relies_on

    def __call__(self, detector: Detector, positions: Tensor, further: Iterator[Tensor]) -> None:
        """`Detector.play` on the images at ``positions`` (B,), with more of them from ``further``."""
        if positions.device.type != detector.device.type:
            if not self._warned:
                log.warning("trainer.cuda_graphs: the images do not fit the device, so steps are computed one by one")
            self._warned = True
            detector.play(positions, further)
            return
        if self._graph is None or self._static[0].shape != positions.shape:
            self._forget()
            self._graph = self._make(detector.noise)
        if self._computed < WARM_UP:
            drawn: list[Tensor] = []
            self._graph.warm_up(lambda: detector.play(positions, _remembered(further, drawn)))
            self._static = [place.clone() for place in (positions, *drawn)]
            self._computed += 1
            return
        new = (positions, *itertools.islice(further, len(self._static) - 1))
        for place, value in zip(self._static, new, strict=True):
            place.copy_(value)
        if not self._captured:
            self._graph.capture(lambda: detector.play(self._static[0], iter(self._static[1:])))
            self._captured = True
        self._graph.replay()


def _remembered(source: Iterator[Tensor], drawn: list[Tensor]) -> Iterator[Tensor]:
    for item in source:
        drawn.append(item)
        yield item


def count_on_device(optimizers: Iterable[Optimizer]) -> None:
    """Move the step counts of ``optimizers`` to the device, so that a graph can count.

    Raises:
        ValueError: an optimiser keeps its count on the host.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if "capturable" not in group:
                if not isinstance(optimizer, torch.optim.SGD):  # SGD has no count
                    name = type(optimizer).__name__
                    raise ValueError(
                        f"trainer.cuda_graphs=true cannot capture {name}: take Adam, RMSprop or SGD, or false"
                    )
                continue
            group["capturable"] = True
            for parameter in group["params"]:
                state = optimizer.state.get(parameter, {})
                if "step" in state:
                    state["step"] = state["step"].to(parameter.device)


def counted_on_host(state: Mapping[str, Any]) -> dict[str, Any]:
    """An optimiser's ``state_dict`` as without a capture, step counts on the host."""
    groups = [group | ({"capturable": False} if "capturable" in group else {}) for group in state["param_groups"]]
    counts = {
        number: kept | ({"step": kept["step"].cpu()} if isinstance(kept.get("step"), Tensor) else {})
        for number, kept in state["state"].items()
    }
    return {**state, "param_groups": groups, "state": counts}
