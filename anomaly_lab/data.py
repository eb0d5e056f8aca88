"""One data set × one split as a LightningDataModule: uint8 on the device, prepared batch by batch.

Legend of the shape comments: N images of a set, B in a batch, C channels, S = size the networks see.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from lightning import LightningDataModule
from torch import Tensor

from anomaly_lab.datasets import Images
from anomaly_lab.detector import Batch, Detector, Stretch
from anomaly_lab.splits import Partition, Split

STRETCH_SECONDS = 0.2
"""About how long Lightning is not asked between training steps."""

AT_ONCE = 1000
"""Images of a whole set that are prepared in one go; each step of it holds a copy of them in float32."""


def scored_at_once(device: torch.device) -> int:
    """Images in a batch of scoring unless the user says otherwise: what a CPU's caches hold, or what fills a GPU."""
    return 100 if device.type == "cpu" else 1000


@dataclass(frozen=True)
class Prepare:
    """From stored pixels to what a network sees: uint8 (B,C,H,W) -> float32 (B,C',S,S), on the images' device.

    Args:
        size: S.
        fit: ``pad``: enlarge by the largest whole factor that fits, then pad with black to S (28 -> 32 by a border of
            2, 8 -> 32 by a factor of 4); ``resize``: interpolate to S. Larger images are always reduced to S.
            Interpolation is bilinear, antialiased when reducing.
        value_range: what 0 and 255 become.
        channels: 1 makes grey of colour (ITU-R 601), 3 repeats grey; None keeps what is stored.
    """

    size: int = 32
    fit: Literal["pad", "resize"] = "pad"
    value_range: tuple[float, float] = (-1.0, 1.0)
    channels: int | None = None

    def __post_init__(self) -> None:
        if self.fit not in ("pad", "resize"):
            raise ValueError(f"model.input.fit={self.fit}: choose pad or resize")
        if self.channels not in (None, 1, 3):
            raise ValueError(f"model.input.channels={self.channels}: choose 1, 3 or null")
        if self.size < 1 or not self.value_range[0] < self.value_range[1]:
            raise ValueError("model.input needs a size of at least 1 and a range of two growing numbers")

    def __call__(self, pixels: Tensor) -> Tensor:
        x = pixels.float()
        if self.channels == 1 and x.shape[1] == 3:
            x = 0.299 * x[:, 0:1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:3]
        elif self.channels == 3 and x.shape[1] == 1:
            x = x.expand(-1, 3, -1, -1)
        height, width = x.shape[-2:]
        factor = self.size // max(height, width)
        if self.fit == "resize" or factor == 0:
            x = self._resize(x, self.size, self.size)
        else:
            x = self._resize(x, height * factor, width * factor)
            down, right = self.size - x.shape[-2], self.size - x.shape[-1]
            x = F.pad(x, (right // 2, right - right // 2, down // 2, down - down // 2))
        low, high = self.value_range
        return x * ((high - low) / 255) + low

    @staticmethod
    def _resize(x: Tensor, height: int, width: int) -> Tensor:
        if x.shape[-2:] == (height, width):
            return x
        return F.interpolate(x, (height, width), mode="bilinear", antialias=height < x.shape[-2] or width < x.shape[-1])

    def shape(self, pixels: np.ndarray) -> tuple[int, int, int]:
        """(C',S,S) of what becomes of uint8 ``pixels`` (N,C,H,W)."""
        return (self.channels or pixels.shape[1], self.size, self.size)

    def displayable(self, x: Tensor) -> Tensor:
        """Back from the network's range to [0, 1] for figures, same shape."""
        low, high = self.value_range
        return ((x - low) / (high - low)).clamp(0, 1)


class Loader:
    """Batches of one part of a data set. It slices an index tensor: no workers, no decoding, no copies but the batch.

    Args:
        pixels: uint8 (N,C,H,W), on the device where it fits, else in host memory.
        truth: uint8 (N,). index: int64 (N,), positions in the whole data set.
        order: positions (n,) in the order they come; None goes straight through.
        drop_last: leave out the last incomplete batch, unless it is the only one (batch norm needs company).
    """

    def __init__(
        self,
        pixels: Tensor,
        truth: Tensor,
        index: Tensor,
        prepare: Prepare,
        batch_size: int,
        device: torch.device,
        order: Tensor | None = None,
        drop_last: bool = False,
    ) -> None:
        self.pixels, self.truth, self.index = pixels, truth, index
        self._prepare, self._batch_size, self._device = prepare, batch_size, device
        self._order = (torch.arange(len(pixels)) if order is None else order).to(pixels.device)
        self._drop_last = drop_last

    def _lengths(self, images: int) -> list[int]:
        full, rest = divmod(images, self._batch_size)
        return [self._batch_size] * full + ([rest] if rest and not (self._drop_last and full) else [])

    def __len__(self) -> int:
        return len(self._lengths(len(self._order)))

    @property
    def positions(self) -> list[Tensor]:
        """Of each batch, the places (B,) of its images, on the device of the pixels."""
        lengths = self._lengths(len(self._order))
        return list(self._order[: sum(lengths)].split(lengths)) if lengths else []

    def batch(self, positions: Tensor) -> Batch:
        """The images at ``positions`` (B,), prepared, on the device."""
        return Batch(
            self._prepare(self.pixels[positions].to(self._device)),
            self.truth[positions].to(self._device),
            self.index[positions].to(self._device),
        )

    def __iter__(self) -> Iterator[Batch]:
        return map(self.batch, self.positions)


class Stretches:
    """An epoch in stretches of ``steps`` steps, the last one shorter."""

    def __init__(self, loader: Loader, steps: int) -> None:
        self._loader, self._steps = loader, steps

    def __len__(self) -> int:
        return -(-len(self._loader) // self._steps)

    def __iter__(self) -> Iterator[Stretch]:
        positions = self._loader.positions
        for start in range(0, len(positions), self._steps):
            yield Stretch(positions[start : start + self._steps], self._loader.batch)


class OneClassData(LightningDataModule):
    """One data set under one protocol, with one class named.

    Args:
        images: a data set, from one of the readers of `anomaly_lab.datasets`.
        split: a protocol of `anomaly_lab.splits`.
        named: the class the protocol names, by name or zero-based index.
        batch_size: images in a training batch. score_batch_size: images scored at once; None: `scored_at_once`.
        epoch_steps: an epoch has at least so many steps: smaller training sets are passed several times, each time in
            a new order, so that an epoch means about the same on 50 images as on 5000.
        seed: of the partition (unless ``split.seed`` is set) and of the order of training images, which in epoch e
            depends on (seed, e) alone: a resumed run sees what it would have seen.
        watch_test: validate on the test images too, after the held-out normals.
    """

    def __init__(
        self,
        images: Images,
        split: Split,
        named: str | int,
        prepare: Prepare,
        *,
        batch_size: int,
        epoch_steps: int = 1,
        score_batch_size: int | None = None,
        seed: int = 0,
        watch_test: bool = False,
    ) -> None:
        super().__init__()
        if epoch_steps < 1:
            raise ValueError(f"model.budget.epoch_steps={epoch_steps}: an epoch has at least one step")
        if batch_size < 2:
            raise ValueError(f"model.batch_size={batch_size}: batch norm needs at least 2 images in a batch")
        self.images, self.prepare = images, prepare
        self.target = split.resolve(images, named)
        self.partition: Partition = split(images, self.target, seed)
        self.batch_size, self._epoch_steps, self._score_batch_size = (
            batch_size,
            epoch_steps,
            score_batch_size,
        )
        self._seed, self._watch_test = seed, watch_test
        self._loaders: dict[tuple[str, torch.device], tuple[Tensor, Tensor, Tensor]] = {}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C,S,S) of the prepared images."""
        return self.prepare.shape(self.images.pixels)

    def part(self, name: Literal["train", "val", "test"], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels uint8 (N,C,H,W), truth uint8 (N,) and index int64 (N,) of one part, on the device if they fit it."""
        if (name, device) not in self._loaders:
            index = getattr(self.partition, name)
            truth = {
                "train": self.partition.train_truth,
                "val": np.zeros(len(index), np.uint8),
                "test": self.partition.test_truth,
            }[name]
            pixels = torch.from_numpy(self.images.pixels[index])
            if device.type == "cuda":
                roomy = pixels.nbytes < torch.cuda.mem_get_info(device)[0] / 2
                pixels = pixels.to(device) if roomy else pixels
            where = pixels.device
            self._loaders[name, device] = (
                pixels,
                torch.from_numpy(truth).to(where),
                torch.from_numpy(index).to(where),
            )
        return self._loaders[name, device]

    def prepared(self, name: Literal["train", "val", "test"], positions: Sequence[int] | None = None) -> Tensor:
        """The prepared images of one part (or those at ``positions`` of it), float32 (N,C,S,S), on the CPU."""
        pixels, _, _ = self.part(name, torch.device("cpu"))
        return self._prepared(pixels if positions is None else pixels[list(positions)], torch.device("cpu"))

    def _prepared(self, pixels: Tensor, device: torch.device) -> Tensor:
        x = torch.empty(len(pixels), *self.image_shape, device=device)  # (N,C,S,S)
        for start in range(0, len(pixels), AT_ONCE):
            x[start : start + AT_ONCE] = self.prepare(pixels[start : start + AT_ONCE].to(device))
        return x

    def training_set(self, device: torch.device) -> Batch:
        """All training images prepared, in their order, on ``device``."""
        pixels, truth, index = self.part("train", device)
        return Batch(self._prepared(pixels, device), truth.to(device), index.to(device))

    def _device(self) -> torch.device:
        return self.trainer.strategy.root_device if self.trainer else torch.device("cpu")

    def _order(self, stream: int = 0) -> Tensor:
        epoch, positions = 0, torch.arange(len(self.partition.train))
        if self.trainer is not None:
            detector = self.trainer.lightning_module
            assert isinstance(detector, Detector)
            epoch = int(detector.epochs_done)
            allowed = detector.train_indices(epoch)
            positions = positions if allowed is None else allowed.cpu()
        # A stream of its own for every epoch: what a validation pass or a resume does in between changes nothing.
        entropy = [self._seed, epoch, stream] if stream else [self._seed, epoch]
        state = np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(state >> 1))
        steps = max(len(positions) // self.batch_size, 1)
        passes = 1 if steps >= self._epoch_steps else -(-self._epoch_steps * self.batch_size // len(positions))
        order = torch.cat([positions[torch.randperm(len(positions), generator=generator)] for _ in range(passes)])
        return order if passes == 1 else order[: self._epoch_steps * self.batch_size]

    def train_dataloader(self) -> Stretches:
        """The coming epoch: a trainer has to ask anew for every one (``reload_dataloaders_every_n_epochs=1``).

        In stretches of about `STRETCH_SECONDS`: Lightning's work between two of them then costs little, and a signal
        or a progress bar need not wait long. Nothing depends on where a stretch ends.
        """
        seconds = None
        if self.trainer is not None:
            assert isinstance(self.trainer.lightning_module, Detector)
            seconds = self.trainer.lightning_module.seconds_per_step
        return Stretches(self.training(), max(int(STRETCH_SECONDS / seconds), 1) if seconds else 1)

    @property
    def steps(self) -> int:
        """Training steps of the coming epoch."""
        return len(self.training())

    def training(self, stream: int = 0) -> Loader:
        """The coming epoch's batches, in the training order or, from 1, another of the epoch's own orders."""
        part = self.part("train", self._device())
        order = self._order(stream)
        return Loader(*part, self.prepare, self.batch_size, self._device(), order=order, drop_last=True)

    def further_positions(self) -> Iterator[Tensor]:
        """Positions for `Detector.next_batch`, without end: orders of the epoch's own besides the training order."""
        for stream in itertools.count(1):
            yield from self.training(stream).positions

    def val_dataloader(self) -> list[Loader]:
        """The held-out normals; behind them, with ``watch_test``, the test images."""
        return [self._in_order("val"), self._in_order("test")] if self._watch_test else [self._in_order("val")]

    def test_dataloader(self) -> list[Loader]:
        """The held-out normals, from which the threshold comes, and the test images."""
        return [self._in_order("val"), self._in_order("test")]

    def _in_order(self, name: Literal["val", "test"]) -> Loader:
        device = self._device()
        return Loader(*self.part(name, device), self.prepare, self._score_batch_size or scored_at_once(device), device)
