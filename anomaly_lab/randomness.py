"""Where a run's random numbers come from: one seed, an independent stream for every purpose."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def stream(seed: int, purpose: str) -> int:
    """The seed of one independent stream (weights, noise, an epoch's dropout) of a run: 63 bits."""
    return int.from_bytes(hashlib.sha256(f"{purpose}/{seed}".encode()).digest()[:8]) >> 1


class Randomness:
    """A detector's random numbers. A resumed run continues their streams.

    Attributes:
        noise: the generator of a method's own noise, on the detector's device.
    """

    def __init__(self) -> None:
        self.noise = torch.Generator()
        self._seed: int | None = None
        self._state: Tensor | None = None  # a checkpoint's, until the device is known

    def follow(self, seed: int) -> None:
        """Derive everything from a run's seed: the method's own noise, and in each epoch torch's global stream."""
        self._seed = seed
        self.restart(stream(seed, "noise"), self.noise.device)

    def restart(self, seed: int, device: torch.device) -> None:
        """Start the method's noise from a seed of its own."""
        self.noise = torch.Generator(device).manual_seed(seed)

    def settle(self, device: torch.device) -> None:
        """Continue, on ``device``, where the loaded checkpoint ended."""
        if self.noise.device.type != device.type:
            self.restart(self.noise.initial_seed(), device)
        state, self._state = self._state, None
        # CPU and GPU generators have different states: on the other kind of device the stream starts anew.
        if state is not None and state.shape == self.noise.get_state().shape:
            self.noise.set_state(state)

    def normal(self, like: Tensor, size: int) -> Tensor:
        """Codes from N(0, I), one for each image in ``like`` (B,...), on its device and of its type: (B,size)."""
        return torch.randn(len(like), size, generator=self.noise, device=like.device, dtype=like.dtype)

    def uniform(self, like: Tensor, size: int) -> Tensor:
        """Codes from U(0, 1) likewise: (B,size)."""
        return torch.rand(len(like), size, generator=self.noise, device=like.device, dtype=like.dtype)

    def begin_epoch(self, epoch: int) -> None:
        """Layers that draw from torch's global stream (dropout) draw the same in an epoch, resumed or not."""
        if self._seed is not None:
            torch.manual_seed(stream(self._seed, f"epoch {epoch - 1}"))

    def state(self) -> Tensor:
        return self.noise.get_state()

    def load(self, state: Tensor) -> None:
        self._state = state.cpu()
