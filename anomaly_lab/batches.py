"""What a loop hands a detector: batches of images, and the training images of an epoch.

Legend of the shape comments: B images in a batch, N images of a set, C channels, H = W pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor


class Batch(NamedTuple):
    """Images ready for a network, their positions in the data set and, where it may be known, what they are."""

    x: Tensor  # float32 (B,C,H,W)
    index: Tensor  # type: ignore[assignment]  # int64 (B,), -1 where unknown; hides tuple.index
    truth: Tensor | None = None  # uint8 (B,): 0 normal, 1 anomalous; None in training, unless model.labels
    known: Tensor | None = None  # bool (B,): known anomalies (split.known); None unless the method is SEMI_SUPERVISED


@runtime_checkable
class TrainingImages(Protocol):
    """The training images as a detector sees them; `PlainLoader` makes the same of any loader.

    Iterating gives the begun epoch's items, of one or more steps each: Lightning's work between items is done once.
    """

    def begin(self, epoch: int, allowed: Tensor | None, seconds_per_step: float | None) -> None:
        """Begin the epoch of that number, counted from 1.

        Args:
            allowed: positions (n,) of the images that take part in it; None for all.
            seconds_per_step: of the last epoch, if known.
        """
        ...

    def steps(self, item: Any) -> Sequence[Tensor]:
        """The positions (B,) of the images of each step in ``item``."""
        ...

    def batch(self, positions: Tensor) -> Batch:
        """The images at ``positions`` (B,), prepared, on the device."""
        ...

    def further(self) -> Iterator[Tensor]:
        """Positions (B,) of further batches of this epoch, endless, in other orders than the training order."""
        ...

    def everything(self) -> Batch:
        """All training images (N,C,H,W) in their order, prepared, on the device."""
        ...


def images_of(item: Any) -> Tensor:
    """The images (B,C,H,W) in what a loader gives: a `Batch`, a tensor of images, or a pair (images, anything).

    Raises:
        ValueError: it is none of these.
    """
    images = item if isinstance(item, Tensor) else item[0] if isinstance(item, tuple | list) and item else None
    if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point():
        shown = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else type(item).__name__
        raise ValueError(
            f"a loader must give images float (B,C,H,W), alone or in front of anything else, not {shown}: "
            "scale bytes to the range the method wants, or use anomaly_lab.data.OneClassData"
        )
    return images


def plain_batch(images: Tensor) -> Batch:
    """A batch of images (B,C,H,W) without positions or truth."""
    return Batch(images, torch.full((len(images),), -1, device=images.device))


class PlainLoader:
    """`TrainingImages` from any loader of images (`images_of`), in the loader's order.

    The images themselves stand in for positions, so none can be left out, and ``index`` is -1.

    Raises:
        ValueError: the method leaves images out (``leaving_out``).
    """

    def __init__(self, loader: Iterable[Any], device: torch.device, *, leaving_out: bool) -> None:
        self._loader, self._device = loader, device
        if leaving_out:
            raise ValueError(
                "this method leaves training images out by their position among all of them, which a plain loader "
                "cannot tell: train it on anomaly_lab.data.OneClassData"
            )

    def begin(self, epoch: int, allowed: Tensor | None, seconds_per_step: float | None) -> None:
        assert allowed is None

    def steps(self, item: Any) -> Sequence[Tensor]:
        return [images_of(item)]

    def batch(self, positions: Tensor) -> Batch:
        return plain_batch(positions)

    def further(self) -> Iterator[Tensor]:
        while True:
            for item in self._loader:
                yield images_of(item).to(self._device)

    def everything(self) -> Batch:
        return self.batch(torch.cat([images_of(item).to(self._device) for item in self._loader]))
