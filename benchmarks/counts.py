"""Floating-point operations and bytes of a training step and of scoring, counted while they run.

Operations: those of convolutions, transposed convolutions and matrix products, forward and backward (also the second
backward pass of a gradient penalty), as torch's counter defines them: a multiplication and an addition are *two*. Not
counted: everything else (normalisation, activations, losses, optimisers), which is a few per cent of the operations,
but not of the bytes. GANomaly's published loop has 0.72 GFLOP an image by this count, the shared autoencoder's printed
one 1.33; the lab's steps have 0.55 and 1.19, for what they do not compute twice.

Bytes: each operator that computes reads its inputs once and writes its outputs once; views and empty memory cost
nothing, what is changed in place is read and written, what is expanded counts once. That is the traffic of operators
one after another, the least they can do without a cache or a fused kernel that keeps a result for the next one.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from anomaly_lab import config
from anomaly_lab.build import make_detector, make_prepare
from anomaly_lab.detector import Batch, Detector
from anomaly_lab.players import Player, minimise, parameters_of
from benchmarks import machine


@dataclass(frozen=True)
class Cost:
    """Of one call."""

    flop: int
    bytes: int


class _Counter(TorchDispatchMode):
    """Sums operations and bytes of what runs while it is active, as this module's docstring defines them.

    torch's own `FlopCounterMode` has the same formulas, but fails where a loss takes a gradient (gradient penalties).
    """

    def __init__(self) -> None:
        super().__init__()
        self.flop = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.overloadpacket in flop_registry:
            self.flop += flop_registry[func.overloadpacket](*args, **kwargs, out_val=out)
        schema = func._schema
        if func.overloadpacket in _FREE or _is_view(schema):
            return out
        for position, argument in enumerate(schema.arguments):
            given = args[position] if position < len(args) else kwargs.get(argument.name)
            size = sum(map(_size, tree_leaves(given)))
            written = argument.alias_info is not None and argument.alias_info.is_write
            self.bytes += 2 * size if written and not argument.is_out else size
        returned = out if isinstance(out, tuple) and len(schema.returns) > 1 else (out,)
        for declared, value in zip(schema.returns, returned, strict=False):
            if declared.alias_info is None:  # else it is an argument again
                self.bytes += sum(map(_size, tree_leaves(value)))
        return out


_FREE = {
    torch.ops.aten.empty,
    torch.ops.aten.empty_like,
    torch.ops.aten.empty_strided,
    torch.ops.aten.new_empty,
    torch.ops.aten.new_empty_strided,
    torch.ops.aten._unsafe_view,
    torch.ops.aten._reshape_alias,
}
"""Operators that touch no element."""


def _is_view(schema: Any) -> bool:
    aliases = [declared.alias_info for declared in schema.returns if declared.alias_info is not None]
    return bool(aliases) and not any(alias.is_write for alias in aliases)


def _size(value: Any) -> int:
    """Bytes of the elements that are there: a dimension of stride 0 is one element seen often."""
    if not isinstance(value, Tensor):
        return 0
    elements = 1
    for length, stride in zip(value.shape, value.stride(), strict=True):
        elements *= min(length, 1) if stride == 0 else length
    return elements * value.element_size()


def cost(work: Callable[[], object]) -> Cost:
    """Count one call of ``work``, which must not be in inference mode (its operators come undivided)."""
    with _Counter() as counter:
        work()
    return Cost(counter.flop, counter.bytes)


MEASURED = ("shared_autoencoder", "ganomaly", "piad", "adversarial_autoencoder")
"""The modules of the four papers' methods, which the page measures."""


def published() -> list[str]:
    """The models of ``conf/model`` that belong to the four papers; `compose` makes them at their published sizes."""
    names = sorted(path.stem for path in (config.CONFIG_DIR / "model").glob("*.yaml"))
    detectors = {name: config.compose([f"model={name}"]).model.detector for name in names}  # None: made of others
    return [name for name, made in detectors.items() if made and made._target_.rsplit(".", 2)[-2] in MEASURED]


def stored_shape(model: str) -> tuple[int, int, int]:
    """(C,H,W) of the images a model is meant for: colour where its name says CIFAR-10 or COIL-100, else MNIST's."""
    return (3, 32, 32) if model.endswith(("cifar10", "coil100")) else (1, 28, 28)


def compose(model: str, *overrides: str) -> DictConfig:
    """A model at full size; pretrained features get random weights: as many operations, no file to fetch."""
    given = [f"model={model}", "size=full", *overrides]
    if config.compose(given).model.detector.get("features") is not None:
        given += ["model.detector.features.weights=random", "model.pretrained=null"]
        given += [f"model.detector.features.{key}=null" for key in ("path", "sha256")]
    return config.compose(given)


def make(model: str, device: str = "cpu", *overrides: str) -> tuple[Detector, Batch]:
    """A model as its configuration says, ready to train without a trainer, and a batch of random images."""
    cfg = compose(model, *overrides)
    prepare = make_prepare(cfg)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (cfg.model.batch_size, *stored_shape(model)), dtype=torch.uint8, generator=generator)
    x = prepare(pixels)  # (B,C,S,S)
    detector = make_detector(cfg, x.shape[1:]).to(device)
    detector.randomness.restart(0, detector.device)
    if detector.scored_after_fit:
        with torch.no_grad():
            detector.eval().after_fit(x.to(device))
    batch = Batch(x.to(device), torch.arange(len(x)).to(device))
    further: Iterator[Batch] = itertools.repeat(batch)
    detector.next_batch = lambda: next(further)  # type: ignore[method-assign]
    return detector.train(), batch


def players(detector: Detector) -> dict[str, Player]:
    """Who moves in `step`, with the optimisers of the configuration."""
    made = detector.configure_optimizers()
    networks, optimizers = detector.players(), made[0] if isinstance(made, tuple) else made
    return {
        name: Player(parameters_of(owned), optimizer)
        for (name, owned), optimizer in zip(networks.items(), optimizers, strict=True)
    }


def step(detector: Detector, batch: Batch, moving: Mapping[str, Player]) -> None:
    """One training step: every play, and every player's move."""
    for losses in detector.plays(batch):
        minimise(losses, moving, detector.learning.clip)


def measure(device: str, quick: bool) -> dict[str, Any]:
    """A row for the training step of each method, and one for its scoring: counts an image, and the rate reached.

    The rate is that of the bare step on a prepared batch, with the peak convolution measured before each repetition.
    """
    models = ["autoencoder", "ganomaly", "shared_ae"] if quick else published()
    peak, repeats = machine.peak(device), 2 if quick else 5
    where = peak.device.type
    rows = []
    for model in models:
        detector, batch = make(model, where)
        images, moving = len(batch.x), players(detector)

        def train(detector: Detector = detector, batch: Batch = batch, moving: Mapping[str, Player] = moving) -> None:
            step(detector, batch, moving)

        @torch.no_grad()
        def score(detector: Detector = detector, batch: Batch = batch) -> None:
            detector.score(batch.x)

        for kind, work in (("training step", train), ("scoring", score)):
            detector.train(kind != "scoring")
            work()  # an optimiser makes its state in the first step
            counted = cost(work)
            pairs = [(peak.gflops(1), machine.seconds(work, peak.device)) for _ in range(repeats)]
            gflops = [counted.flop / taken / 1e9 for _, taken in pairs]
            rows.append(
                {
                    "method": model,
                    "of": kind,
                    "image": "×".join(map(str, batch.x.shape[1:])),
                    "batch": images,
                    "mflop_per_image": counted.flop / images / 1e6,
                    "mb_per_image": counted.bytes / images / 1e6,
                    "flop_per_byte": counted.flop / counted.bytes,
                    "gflops": statistics.median(gflops),
                    "share_of_peak": statistics.median(g / p for g, (p, _) in zip(gflops, pairs, strict=True)),
                }
            )
    note = (
        "An image of a training step counts all plays, forward and backward, and the optimisers' bytes; a "
        "multiplication and an addition are two operations. With several rounds a step (PIAD's critics) an image is "
        "one of each. Bytes are those of operators one after another, so a method whose tensors stay in the caches can "
        "pass the roof of the bandwidth."
    )
    return {"rows": rows, "note": note}
