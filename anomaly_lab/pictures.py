"""Image files: decoded and brought to one size; those that cannot be read are named all at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from anomaly_lab.errors import shortened

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".pgm", ".ppm"})

MOST_PIXELS = 2**26
"""Of one image: 8192x8192. A file of 172 KB may decode to 1 GB, for one image of 32x32 pixels."""


class Unreadable(ValueError):
    """An image file that cannot be read: which one, and why."""

    def __init__(self, where: str, why: str) -> None:
        super().__init__(f"{where} cannot be read ({why}): repair, convert or remove it")
        self.where, self.why = where, why


def unreadable(broken: Sequence[Unreadable], of: int, skip: str = "") -> ValueError:
    """One line that names every file of ``broken``, and ``skip`` as what leaves them out, unless nothing does."""
    if len(broken) == 1:
        return ValueError(f"{broken[0]}" + (f", or skip it with {skip}" if skip else ""))
    names = ", ".join(f"{fault.where} ({fault.why})" for fault in broken)
    many = f"{len(broken)} of {of} images cannot be read"
    skipped = f", or skip them with {skip}" if skip else ""
    return ValueError(f"{many}: {names}: repair, convert or remove them{skipped}")


def open_image(file: Any, where: str, channels: int, size: int | None = None) -> np.ndarray:
    """Decode one image file into uint8 (C,H,W), resized to size x size where that is given.

    Raises:
        Unreadable: it is no file, no image, not 8-bit, or too large; ``where`` names it.
    """
    from PIL import Image, ImageOps

    try:
        if isinstance(file, str | Path) and not Path(file).is_file():  # a pipe would wait for somebody who writes
            raise ValueError("it is no file")
        with Image.open(file) as opened:
            if opened.width * opened.height > MOST_PIXELS:
                raise ValueError(f"it has {opened.width}x{opened.height} pixels, more than {MOST_PIXELS:,}")
            if opened.mode[0] in "IF":  # Pillow would silently clip these to 255
                raise ValueError(f"its pixels are not 8-bit (mode {opened.mode})")
            image = ImageOps.exif_transpose(opened).convert("L" if channels == 1 else "RGB")
            if size is not None and image.size != (size, size):
                image = image.resize((size, size), Image.Resampling.BILINEAR)
            array = np.asarray(image)
    # On damaged files Pillow raises OSError, SyntaxError, struct.error, DecompressionBombError and more.
    except Exception as error:
        raise Unreadable(where, shortened(error)) from error
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
