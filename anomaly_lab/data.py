"""One data set × one split as a LightningDataModule: uint8 on the device, prepared batch by batch.

Legend of the shape comments: N images of a set, B in a batch, C channels, S = size the networks see.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from lightning import LightningDataModule
from torch import Tensor, nn

from anomaly_lab import values
from anomaly_lab.batches import Batch
from anomaly_lab.features import FeatureStore
from anomaly_lab.images import Images
from anomaly_lab.splits import Partition, Split, Target

STEPS_SECONDS = 0.2
"""Training time between two calls by Lightning, about."""

Part = Literal["train", "val", "test"]

CPU = torch.device("cpu")

MOST_REPEATS = 16
"""Times that an image may stand in one batch: the default of 64 images must fit the smallest training set, of 5."""

AT_ONCE = 1000
"""Images of a whole set that are prepared at once, as a float32 copy."""


def scored_at_once(device: torch.device) -> int:
    """Default number of images scored at once: what a CPU's caches hold, or what fills a GPU."""
    return 100 if device.type == "cpu" else 1000


@dataclass(frozen=True)
class Prepare:
    """From stored pixels to what a method sees: uint8 (B,C,H,W) -> float32 (B,C',S,S), on the images' device.

    Args:
        size: S.
        fit: ``pad``: enlarge by the largest whole factor that fits, then pad with black to S (28 -> 32 by a border of
            2, 8 -> 32 by a factor of 4); ``resize``: interpolate to S. Larger images are always reduced to S.
            Interpolation is bilinear, antialiased when reducing.
        value_range: what 0 and 255 become.
        channels: 1 makes grey of colour (ITU-R 601), 3 repeats grey; None keeps what is stored.
        features: a fixed function of each image alone, (B,C',S,S) -> (B,F,h,w): the method then sees its values,
            rounded to float16 as a `FeatureStore` keeps them, in the place of the images.
    """

    size: int = 32
    fit: Literal["pad", "resize"] = "pad"
    value_range: tuple[float, float] = (-1.0, 1.0)
    channels: int | None = None
    features: nn.Module | None = None

    def __post_init__(self) -> None:
        if self.fit not in ("pad", "resize"):
            raise ValueError(f"model.input.fit={self.fit}: choose pad or resize")
        if self.channels not in (None, 1, 3):
            raise ValueError(f"model.input.channels={self.channels}: choose 1, 3 or null")
        if type(self.size) is not int or self.size < 1 or not self.value_range[0] < self.value_range[1]:
            raise ValueError("model.input needs a whole size of at least 1 and a range of two growing numbers")

    def __call__(self, pixels: Tensor) -> Tensor:
        return self.seen(self.image(pixels))

    def seen(self, image: Tensor) -> Tensor:
        """What a method sees of prepared images (B,C',S,S): themselves, or their features."""
        if self.features is None:
            return image
        with torch.no_grad():
            return self.features.to(image.device).eval()(image).half().float()

    def image(self, pixels: Tensor) -> Tensor:
        """The images themselves, float32 (B,C',S,S), whatever features there are."""
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
        """(C',S,S), or (F,h,w) with features, of what becomes of uint8 ``pixels`` (N,C,H,W)."""
        channels, height, width = self(torch.zeros((1, *pixels.shape[1:]), dtype=torch.uint8)).shape[1:]
        return channels, height, width

    def displayable(self, x: Tensor) -> Tensor:
        """Images back from the network's range to [0, 1] for figures, same shape."""
        low, high = self.value_range
        return ((x - low) / (high - low)).clamp(0, 1)


@dataclass(frozen=True)
class Augment:
    """Each training image shifted, mirrored, cropped and turned anew in every batch, by one affine map.

    Bilinear; what comes from outside of the image is its nearest border pixel.

    Args:
        shift: most pixels along each axis, either way.
        flip: mirror half of the images, left to right.
        crop: least side of the part that is stretched to the whole image, as a share of its side; 1 crops nothing.
        rotation: most degrees, either way.
    """

    shift: float = 0
    flip: bool = False
    crop: float = 1
    rotation: float = 0

    def __post_init__(self) -> None:
        values.refuse_ranges(shift=self.shift, flip=self.flip, crop=self.crop, rotation=self.rotation)

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """x (B,C,S,S), on any device; ``generator`` of the CPU, so that every device sees the same maps."""
        drawn = torch.rand((7, len(x)), generator=generator) * 2 - 1  # from -1 to 1
        side = 1 - (1 - self.crop) * (drawn[0] + 1) / 2
        angle = drawn[1] * math.radians(self.rotation)
        mirror = torch.where(drawn[2] > 0, -1.0, 1.0) if self.flip else torch.ones(len(x))
        # Of the output's coordinates, from -1 to 1 over the image, to the input's.
        offset = drawn[3:5] * (1 - side) + drawn[5:7] * (2 * self.shift / x.shape[-1])
        across = torch.stack([mirror * side * angle.cos(), -side * angle.sin(), offset[0]], 1)
        down = torch.stack([mirror * side * angle.sin(), side * angle.cos(), offset[1]], 1)
        theta = torch.stack([across, down], 1).to(x)  # (B,2,3)
        grid = F.affine_grid(theta, list(x.shape), align_corners=False)
        return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def as_stored(features: Tensor) -> Tensor:
    """What a method sees of features that are stored: float16 (B,F,h,w) -> float32."""
    return features.float()


def whole(prepare: Callable[[Tensor], Tensor], stored: Tensor, device: torch.device) -> Tensor:
    """A whole set prepared, in parts of `AT_ONCE`: (N,...) anywhere -> float32 (N,C',S,S) on ``device``."""
    x: Tensor | None = None
    for start in range(0, len(stored), AT_ONCE):
        part = prepare(stored[start : start + AT_ONCE].to(device))
        if x is None:
            x = part.new_empty((len(stored), *part.shape[1:]))
        x[start : start + AT_ONCE] = part
    assert x is not None, "there are images"
    return x


class Loader:
    """Batches of images in their order, by slicing: no workers, no decoding, no copies but the batch.

    Args:
        pixels: uint8 (N,C,H,W), or stored features, on the device where they fit, else in host memory.
        index: int64 (N,), positions in the whole data set. truth: uint8 (N,), of test images and labelled ones.
        known: bool (N,), of a semi-supervised method's training images.
    """

    def __init__(
        self,
        pixels: Tensor,
        index: Tensor,
        prepare: Callable[[Tensor], Tensor],
        batch_size: int,
        device: torch.device,
        truth: Tensor | None = None,
        known: Tensor | None = None,
    ) -> None:
        self.pixels, self.index, self.truth, self.known = pixels, index, truth, known
        self._prepare, self._batch_size, self._device = prepare, batch_size, device

    def __len__(self) -> int:
        return -(-len(self.pixels) // self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return map(self.batch, torch.arange(len(self.pixels), device=self.pixels.device).split(self._batch_size))

    def shuffled(self) -> Loader:
        """The same images in a random order, always the same one."""
        order = torch.randperm(len(self.index), generator=torch.Generator().manual_seed(0)).to(self.index.device)
        truth = None if self.truth is None else self.truth[order]
        at = (self._prepare, self._batch_size, self._device)
        return Loader(self.pixels[order.to(self.pixels.device)], self.index[order], *at, truth)

    def batch(self, positions: Tensor) -> Batch:
        """The images at ``positions`` (B,), prepared, on the device."""
        x = self._prepare(self.pixels[positions].to(self._device))
        said = (None if of is None else of[positions].to(self._device) for of in (self.truth, self.known))
        return Batch(x, self.index[positions].to(self._device), *said)

    def everything(self) -> Batch:
        """All images, prepared, on the device: x (N,C,S,S)."""
        x = whole(self._prepare, self.pixels, self._device)
        said = (None if of is None else of.to(self._device) for of in (self.truth, self.known))
        return Batch(x, self.index.to(self._device), *said)


class EpochImages:
    """The training images, in the order of one epoch after another: `anomaly_lab.batches.TrainingImages`.

    The order of an epoch depends on ``seed`` and its number alone: a resumed run sees what it would have seen.
    Incomplete batches are dropped unless the epoch has no other (batch norm needs at least two images).

    Args:
        epoch_steps: an epoch has at least so many steps, see `OneClassData`.
        augment: changes the images of batches, not those of ``everything``; an epoch's draws depend on ``seed`` and
            its number alone, too.
    """

    def __init__(
        self, images: Loader, batch_size: int, *, seed: int, epoch_steps: int, augment: Augment | None = None
    ) -> None:
        self._images, self._augment, self.everything = images, augment, images.everything
        self._pixels, self._batch_size, self._seed, self._epoch_steps = images.pixels, batch_size, seed, epoch_steps
        self.begin(1, None, None)

    def begin(self, epoch: int, allowed: Tensor | None, seconds_per_step: float | None) -> None:
        self._epoch = epoch
        self._allowed = torch.arange(len(self._pixels)) if allowed is None else allowed.cpu()
        self._drawn = self._stream(0, 1)
        self.order = self._order_of(0)
        self.at_once = max(int(STEPS_SECONDS / seconds_per_step), 1) if seconds_per_step else 1

    def __iter__(self) -> Iterator[_Steps]:
        """The epoch's steps, in items of about `STEPS_SECONDS`: Lightning's work between items costs little then, and
        signals and the progress bar are soon answered. No result depends on the number of steps in an item.

        No ``__len__``: Lightning reads it once, and epochs may differ. It takes the first item before the epoch begins.
        """
        start = 0
        while start == 0 or start < len(self.order):
            yield _Steps(self, start)
            start += self.at_once

    def batch(self, positions: Tensor) -> Batch:
        """The images at ``positions`` (B,), prepared and augmented, on the device."""
        batch = self._images.batch(positions)
        return batch if self._augment is None else batch._replace(x=self._augment(batch.x, self._drawn))

    def steps(self, item: _Steps) -> Sequence[Tensor]:
        return item.positions

    def further(self) -> Iterator[Tensor]:
        for stream in itertools.count(1):
            yield from self._order_of(stream)

    def _stream(self, *purpose: int) -> torch.Generator:
        """A stream of its own for every epoch, independent of validation passes and resumes."""
        state = np.random.SeedSequence([self._seed, self._epoch - 1, *purpose]).generate_state(1, np.uint64)[0]
        return torch.Generator().manual_seed(int(state >> 1))

    def _order_of(self, stream: int) -> list[Tensor]:
        """Positions (B,) of each batch of the epoch: stream 0 is the training order, the others are independent."""
        generator = self._stream(stream) if stream else self._stream()
        images, size = self._allowed, self._batch_size
        steps = max(len(images) // size, 1)
        passes = 1 if steps >= self._epoch_steps else -(-self._epoch_steps * size // len(images))
        order = torch.cat([images[torch.randperm(len(images), generator=generator)] for _ in range(passes)])
        whole = (self._epoch_steps if passes > 1 else len(order) // size) * size or len(order)
        return list(order[:whole].to(self._pixels.device).split(size))


class _Steps:
    """Some steps of the epoch from number ``start`` on, looked up on access."""

    def __init__(self, images: EpochImages, start: int) -> None:
        self._images, self._start = images, start  # not a tuple: Lightning would search it for tensors to move

    @property
    def positions(self) -> list[Tensor]:
        return self._images.order[self._start : self._start + self._images.at_once]


class OutOfReach(AttributeError):
    """A detector asked its trainer's data module for what it may not see during a run."""


class Closed(LightningDataModule):
    """The loaders of one stage and nothing else: all that a detector can reach through its trainer during a run.

    Raises:
        OutOfReach: it is asked for the test images while a detector is fitted, or at any time for anything else.
    """

    def __init__(self, train: EpochImages | None = None, val: Sequence[Loader] = (), test: Sequence[Loader] = ()):
        super().__init__()
        self._train, self._val, self._test = train, list(val), list(test)

    def train_dataloader(self) -> EpochImages | None:
        return self._train

    def val_dataloader(self) -> list[Loader]:
        return self._val

    def test_dataloader(self) -> list[Loader]:
        if not self._test:
            raise OutOfReach("a detector cannot reach the test half while it is fitted")
        return self._test

    def __getattr__(self, name: str) -> NoReturn:  # of what is not there: Lightning, too, asks by hasattr
        raise OutOfReach(f"a detector cannot reach the test half or its truth: {name!r} is not in its data module")


class OneClassData(LightningDataModule):
    """One data set under one protocol, for one target class.

    Args:
        images: a data set, from one of the readers of `anomaly_lab.datasets`.
        split: a protocol of `anomaly_lab.splits`.
        target: the class the protocol names, by name or zero-based index; a sequence of several.
        batch_size: images in a training batch. score_batch_size: images scored at once; None: `scored_at_once`.
        epoch_steps: fewest steps of an epoch: smaller training sets are passed several times, each time in a new order,
            so that an epoch means about the same on 50 images as on 5000.
        seed: of the partition (unless ``split.seed`` is set) and of the order of training images. The order in epoch e
            depends on (seed, e) alone, so a resumed run continues with the same one.
        features: where fixed features are kept, if ``prepare`` has any; None computes them for this object alone.
        labels: train on the labelled anomalies too (`Partition.with_labelled`), with the truth in every batch. For the
            supervised ceiling: a one-class method never sees either.
        known: train on the known anomalies too (`Partition.with_known`), marked in every batch: for methods that are
            `SEMI_SUPERVISED`, and for no other.
        augment: of training batches; None: they show the images as they are.

    Raises:
        ValueError: ``labels`` under a protocol that tests on all anomalies; ``augment`` of fixed features.
    """

    def __init__(
        self,
        images: Images,
        split: Split,
        target: str | int | Sequence[str | int],
        prepare: Prepare,
        *,
        batch_size: int,
        epoch_steps: int = 1,
        score_batch_size: int | None = None,
        seed: int = 0,
        features: FeatureStore | None = None,
        labels: bool = False,
        known: bool = False,
        augment: Augment | None = None,
    ) -> None:
        super().__init__()
        if epoch_steps < 1:
            raise ValueError(f"model.budget.epoch_steps={epoch_steps}: an epoch has at least one step")
        if batch_size < 2:
            raise ValueError(f"model.batch_size={batch_size}: batch norm needs at least 2 images in a batch")
        self.images, self.prepare = images, prepare
        self.target: Target = split.resolve(images, target)
        partition = split(images, self.target, seed)
        partition = partition.with_labelled() if labels else partition
        self.partition: Partition = partition.with_known() if known else partition
        if batch_size > MOST_REPEATS * len(self.partition.train):
            raise ValueError(
                f"model.batch_size={batch_size} has each of the {len(self.partition.train)} training images "
                f"{batch_size // len(self.partition.train)} times: lower it"
            )
        if augment is not None and prepare.features is not None:
            raise ValueError("model.input.augment: fixed features are computed once for each image: set one to null")
        self._labels, self._known, self._augment = labels, known, augment
        self.batch_size, self._epoch_steps, self._score_batch_size = (
            batch_size,
            epoch_steps,
            score_batch_size,
        )
        self._seed = seed
        self.device: torch.device | None = None
        """Device of the batches; None: the trainer's device, or the CPU without a trainer."""
        self._features = None if prepare.features is None else features or FeatureStore(images, prepare, None, 0)
        self._as_seen: Callable[[Tensor], Tensor] = prepare if self._features is None else as_stored
        self._parts: dict[tuple[Part, torch.device], tuple[Tensor, Tensor]] = {}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C,S,S) of the prepared images, or (F,h,w) of their features."""
        return self.prepare.shape(self.images.pixels)

    @property
    def steps(self) -> int:
        """Training steps of an epoch in which all training images take part."""
        images, least = len(self.partition.train), self._epoch_steps
        return max(images // self.batch_size, 1, least)

    def train_dataloader(self) -> EpochImages:
        """The training images, without a word on what they are unless made with ``labels`` or ``known``."""
        pixels, index = self._stored("train")
        parts = self.partition
        truth = torch.from_numpy(parts.train_truth).to(pixels.device) if self._labels else None
        known = torch.from_numpy(np.isin(parts.train, parts.known)).to(pixels.device) if self._known else None
        images = Loader(pixels, index, self._as_seen, self.batch_size, self._device(), truth, known)
        more: dict[str, Any] = {"seed": self._seed, "epoch_steps": self._epoch_steps, "augment": self._augment}
        return EpochImages(images, self.batch_size, **more)

    def val_dataloader(self) -> list[Loader]:
        """The held-out normals."""
        return [self.loader("val")]

    def test_dataloader(self) -> list[Loader]:
        """The held-out normals, from which the threshold comes, and the test images in a fixed random order.

        In a data set's own order neighbours share their label, which a score that looks at its batch could use.
        """
        return [self.loader("val"), self.loader("test").shuffled()]

    def predict_dataloader(self) -> Loader:
        """The test images, in the order of ``partition.test``."""
        return self.loader("test")

    def fitting(self, device: torch.device) -> Closed:
        """The training images and the held-out normals: no test image, and no label unless made with ``labels``."""
        self.device = device
        return Closed(train=self.train_dataloader(), val=self.val_dataloader())

    def testing(self, device: torch.device) -> Closed:
        """The held-out normals and the test images, and no way to a label."""
        self.device = device
        val, test = self.test_dataloader()
        test.truth = None
        return Closed(test=[val, test])

    def loader(self, part: Literal["val", "test"]) -> Loader:
        """The held-out normals or, with their truth, the test images, in their order."""
        pixels, index = self._stored(part)
        truth = torch.from_numpy(self.partition.test_truth).to(pixels.device) if part == "test" else None
        at_once = self._score_batch_size or scored_at_once(self._device())
        return Loader(pixels, index, self._as_seen, at_once, self._device(), truth)

    def test_copies(self) -> int:
        """Test images whose stored bytes are those of a training image or a held-out one."""
        pixels, parts = self.images.pixels, self.partition
        known = {pixels[i].tobytes() for i in np.concatenate([parts.train, parts.val])}
        return sum(pixels[i].tobytes() in known for i in parts.test)

    def prepared(self, part: Part, positions: Sequence[int] | None = None) -> Tensor:
        """What a method sees of one part (or of those at ``positions`` of it), float32 (N,C,S,S), on the CPU."""
        return whole(self._as_seen, self._kept(self._index(part, positions), CPU), CPU)

    def displayable(self, part: Part, positions: Sequence[int]) -> Tensor:
        """The images at ``positions`` of one part for figures, float32 (N,C,S,S) in [0, 1]."""
        pixels = torch.from_numpy(self.images.pixels[self._index(part, positions)])
        return self.prepare.displayable(self.prepare.image(pixels))

    def _index(self, part: Part, positions: Sequence[int] | None = None) -> np.ndarray:
        index: np.ndarray = getattr(self.partition, part)
        return index if positions is None else index[list(positions)]

    def _kept(self, index: np.ndarray, device: torch.device) -> Tensor:
        """What is kept of the images at ``index``: pixels uint8 (N,C,H,W), or features made on ``device``."""
        if self._features is not None:
            return self._features(index, device)
        return torch.from_numpy(self.images.pixels[index])

    def _device(self) -> torch.device:
        if self.device is not None:
            return self.device
        return self.trainer.strategy.root_device if self.trainer else torch.device("cpu")

    def _stored(self, part: Part) -> tuple[Tensor, Tensor]:
        """Pixels uint8 (N,C,H,W) or features, and index int64 (N,) of one part, on the device if they fit it."""
        device = self._device()
        if (part, device) not in self._parts:
            index = self._index(part)
            pixels = self._kept(index, device)
            if device.type == "cuda" and pixels.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
                pixels = pixels.to(device)
            self._parts[part, device] = pixels, torch.from_numpy(index).to(pixels.device)
        return self._parts[part, device]
