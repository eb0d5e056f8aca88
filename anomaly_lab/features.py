"""Fixed features of images: computed once for a data set, kept on disk for every class, method and process.

Legend of the shape comments: N images of a set, (F,h,w) features of an image.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from anomaly_lab.errors import shortened
from anomaly_lab.files import write_atomically
from anomaly_lab.images import Images

log = logging.getLogger(__name__)

BLOCK = 500
"""Images in a file. A class of an official half lies together (see `Images`), so a run reads little beside its own."""

AT_ONCE = 10
"""Images whose features are computed in one go on a CPU, whose caches hold no more; a GPU takes a whole block."""


class FeatureStore:
    """Features float16 (N,F,h,w) of the images of a data set, made block by block when they are first asked for.

    A folder holds the blocks of one data set and one way to prepare it. Its name is a digest of the images and of what
    ``prepare`` makes of some of them and of noise: another eps, another size, other pretrained weights, or code that
    computes something else, has a folder of its own. Files are written aside and renamed; whoever finds one missing or
    damaged makes it again, so processes need not wait for each other, and share the work when they start at different
    blocks. A folder that cannot be written to costs time, no result.

    Args:
        prepare: stored pixels uint8 (B,C,H,W) on the device -> features float32 (B,F,h,w), float16 numbers.
        root: the folder of the folders; None keeps nothing.
        limit: bytes that all folders below ``root`` may hold; the least recently used are removed first.
    """

    def __init__(self, images: Images, prepare: Callable[[Tensor], Tensor], root: Path | None, limit: float) -> None:
        self._images, self._prepare, self._root, self._limit = images, prepare, root, limit

    def __call__(self, index: np.ndarray, device: torch.device) -> Tensor:
        """Features float16 (n,F,h,w) of the images at ``index`` (n,), on the CPU; what is missing is made on
        ``device``."""
        folder = self._folder(device)
        wanted = np.unique(index // BLOCK)
        missing = [block for block in wanted if folder is None or not _file(folder, block).is_file()]
        made: dict[int, Tensor] = {}
        start = os.getpid() % max(len(missing), 1)
        for block in missing[start:] + missing[:start]:
            if folder is None or not _file(folder, block).is_file():  # another process may have made it by now
                made[block] = self._make(block, device)
                if folder is not None and not self._keep(folder, block, made[block]):
                    folder = None
        found: Tensor | None = None
        for block in wanted:
            features = made.pop(block, None)
            if features is None:
                features = self._read(folder, block, device)
            if found is None:
                found = torch.empty((len(index), *features.shape[1:]), dtype=torch.float16)
            places = np.flatnonzero(index // BLOCK == block)
            found[torch.from_numpy(places)] = features[torch.from_numpy(index[places] - block * BLOCK)]
        assert found is not None, "there are images"
        return found

    def _folder(self, device: torch.device) -> Path | None:
        if self._root is None or self._limit <= 0:
            return None
        pixels = self._images.pixels
        noise = np.random.RandomState(0).randint(0, 256, (2, *pixels.shape[1:])).astype(np.uint8)
        probe = np.concatenate([pixels[[0, -1]], noise])
        with torch.no_grad():
            features = self._prepare(torch.from_numpy(probe).to(device)).half().cpu().numpy()
        digest = hashlib.sha256(f"{self._images.sha256} {features.shape}".encode() + features.tobytes()).hexdigest()
        folder = self._root / f"{self._images.name}-{digest[:16]}"
        if folder.is_dir():
            try:
                os.utime(folder)  # mark as most recently used
            except OSError:
                log.debug("%s belongs to somebody else", folder)
        return folder

    def _make(self, block: int, device: torch.device) -> Tensor:
        pixels = torch.from_numpy(self._images.pixels[block * BLOCK : (block + 1) * BLOCK])
        with torch.no_grad():
            parts = pixels.split(AT_ONCE if device.type == "cpu" else BLOCK)
            features = torch.cat([self._prepare(part.to(device)).half().cpu() for part in parts])
        if not bool(features.isfinite().all()):
            raise ValueError("model.input.features: values beyond 65504 do not fit float16; scale them down")
        return features

    def _keep(self, folder: Path, block: int, features: Tensor) -> bool:
        """Whether there is room for the block and it could be written."""
        array = features.numpy()
        try:
            if not self._make_room(folder, array.nbytes):
                log.warning(
                    "features of %s beyond trainer.feature_cache_gb=%g are not kept: the next run computes them again",
                    self._images.name,
                    self._limit / 1e9,
                )
                return False
            write_atomically(_file(folder, block), lambda file: np.savez(file, features=array))
        except OSError as error:
            log.warning("features cannot be kept in %s (%s): the next run computes them again", folder, error)
            return False
        return True

    def _make_room(self, folder: Path, needed: int) -> bool:
        """Remove the least recently used folders until ``needed`` bytes more are within the limit."""
        assert self._root is not None
        folders = [path for path in self._root.iterdir() if path.is_dir()] if self._root.is_dir() else []
        used = {path: _use(path) for path in folders}
        total = sum(size for _, size in used.values()) + needed
        for old, (_, size) in sorted(used.items(), key=lambda item: item[1]):
            if total > self._limit and old != folder:
                shutil.rmtree(old, ignore_errors=True)  # whoever reads there makes again what is gone
                total -= size
        return total <= self._limit

    def _read(self, folder: Path | None, block: int, device: torch.device) -> Tensor:
        """The block from its file, made again where that is damaged or gone."""
        count = min(BLOCK, len(self._images) - block * BLOCK)
        if folder is not None:
            path = _file(folder, block)
            try:
                with np.load(path, allow_pickle=False) as file:  # zipfile verifies the CRC-32
                    features = torch.from_numpy(file["features"])
                if features.dtype == torch.float16 and len(features) == count:
                    return features
                log.warning("%s holds something else: made again", path)
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
                log.warning("%s cannot be read (%s): made again", path, shortened(error))
        features = self._make(block, device)
        if folder is not None:
            self._keep(folder, block, features)
        return features


def _use(folder: Path) -> tuple[float, int]:
    """When a folder was used last, and its bytes; what other processes rename or remove meanwhile has none."""
    try:
        last, files = folder.stat().st_mtime, [*folder.iterdir()]
    except FileNotFoundError:
        return 0.0, 0
    size = 0
    for file in files:
        with suppress(FileNotFoundError):
            size += file.stat().st_size
    return last, size


def _file(folder: Path, block: int) -> Path:
    return folder / f"{block:05d}.npz"
