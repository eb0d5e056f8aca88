"""`Images`, in memory and in the `.npz` that docs/datasets.md describes.

Legend of shapes: N images, C channels (1 grey, 3 RGB), H x W pixels, K classes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from anomaly_lab.errors import shortened
from anomaly_lab.files import refuse_bomb, write_atomically

REQUIRED = ("images", "labels", "is_test", "class_names")
"""Keys that the file must have."""


@dataclass(frozen=True, eq=False)
class Images:
    """A labelled set of images in canonical order: by test flag, label and SHA-256 of each image's pixels.

    The order and `sha256` depend on the content alone, never on the order in which a source stores its files.
    """

    pixels: np.ndarray  # uint8 (N,C,H,W)
    labels: np.ndarray  # int64 (N,), index into class_names
    is_test: np.ndarray  # bool (N,), the official test half; all False where there is none
    class_names: tuple[str, ...]  # (K,)
    superclass: tuple[str, ...] | None  # (K,), the coarse class of every class
    name: str
    sha256: str  # hex, of everything above but the name

    def __post_init__(self) -> None:
        assert self.pixels.dtype == np.uint8 and self.pixels.ndim == 4, "pixels must be uint8 (N,C,H,W)"
        assert self.labels.dtype == np.int64 and self.is_test.dtype == np.bool_
        assert len(self.pixels) == len(self.labels) == len(self.is_test)

    def __len__(self) -> int:
        return len(self.pixels)

    @classmethod
    def canonical(
        cls,
        pixels: np.ndarray,
        labels: np.ndarray,
        is_test: np.ndarray,
        class_names: tuple[str, ...],
        superclass: tuple[str, ...] | None = None,
        *,
        name: str,
    ) -> Images:
        """Put arrays of any order into canonical order and compute their checksum."""
        pixels = np.ascontiguousarray(pixels)
        labels, is_test = np.asarray(labels, np.int64), np.asarray(is_test, np.bool_)
        digests = _digests(pixels)
        key = digests.view(">u8")  # (N,4): numbers compare as the hex digests do
        order = np.lexsort((key[:, 3], key[:, 2], key[:, 1], key[:, 0], labels, is_test))
        ordered = cls(pixels[order], labels[order], is_test[order], class_names, superclass, name, sha256="")
        return replace(ordered, sha256=_checksum(ordered, digests[order]))

    def recomputed(self) -> str:
        """`sha256` as it follows from the content: another where a file claims that of other images."""
        return _checksum(self, _digests(self.pixels))


def beside(images: Images, others: Sequence[Images]) -> Images:
    """``images``, and each of ``others`` as one more class that is named after its data set.

    They are brought to the stored shape of ``images``: grey repeated or colour made grey (ITU-R 601), then stretched by
    Pillow's bilinear filter. One without a test half is test images alone.

    Raises:
        ValueError: a set stands beside itself, or has the name of a class.
    """
    names = (*images.class_names, *(other.name for other in others))
    if len(set(names)) < len(names) or images.name in names:
        raise ValueError(
            f"{images.name} cannot have {', '.join(one.name for one in others)} beside it: name other data sets"
        )
    labels = [np.full(len(other), len(images.class_names) + i) for i, other in enumerate(others)]
    is_test = [other.is_test | (not other.is_test.any()) for other in others]
    return Images.canonical(
        np.concatenate([images.pixels, *(_brought_to(other.pixels, images.pixels.shape[1:]) for other in others)]),
        np.concatenate([images.labels, *labels]),
        np.concatenate([images.is_test, *is_test]),
        names,
        images.superclass and (*images.superclass, *(other.name for other in others)),
        name="+".join(one.name for one in (images, *others)),
    )


def _brought_to(pixels: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """uint8 (N,c,h,w) -> (N,C,H,W)."""
    from PIL import Image

    if pixels.shape[1:] == shape:
        return pixels
    channels, height, width = shape
    found = np.empty((len(pixels), height, width, channels), np.uint8)
    for i, image in enumerate(pixels.transpose(0, 2, 3, 1)):
        opened = Image.fromarray(image if image.shape[2] == 3 else image[..., 0]).convert(
            "L" if channels == 1 else "RGB"
        )
        resized = np.asarray(opened.resize((width, height), Image.Resampling.BILINEAR))
        found[i] = resized.reshape(height, width, channels)
    return found.transpose(0, 3, 1, 2)


def _digests(pixels: np.ndarray) -> np.ndarray:
    """SHA-256 of the pixels of every image: uint8 (N,32)."""
    flat = pixels.reshape(len(pixels), -1)
    joined = b"".join(hashlib.sha256(row.data).digest() for row in flat)
    return np.frombuffer(joined, np.uint8).reshape(-1, 32)


def _checksum(images: Images, digests: np.ndarray) -> str:
    """`Images.sha256` from the `_digests` of its pixels: each image is hashed once, for the order and for this."""
    names = list(images.class_names), images.superclass and list(images.superclass)
    whole = hashlib.sha256(json.dumps([list(images.pixels.shape), *names], ensure_ascii=True).encode())
    for array in (digests, images.labels.astype("<i8"), images.is_test.astype(np.uint8)):
        whole.update(np.ascontiguousarray(array).data)
    return whole.hexdigest()


# The file -------------------------------------------------------------------------------------------------------------


def _checked(path: Path) -> Path:
    refuse_bomb(path)
    return path


def keys_of_npz(path: Path, remedy: str) -> list[str]:
    """The keys of a file; of a file that cannot be read a ValueError that ends in ``remedy``, as everywhere here."""
    with reading(path, remedy), np.load(_checked(path), allow_pickle=False) as file:
        return list(file.files)


def read_npz(path: Path, name: str, remedy: str) -> tuple[Images, str | None]:
    """What a file of the documented format holds, and what it was made from (None: a user's own file)."""
    with reading(path, remedy), np.load(_checked(path), allow_pickle=False) as file:
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ValueError("one array, not an archive of named ones")
        arrays = {key: file[key] for key in (*REQUIRED, "superclass", "sha256", "source") if key in file.files}
    if fault := _fault(arrays):
        raise ValueError(f"{path}: {fault}; the format is described in docs/datasets.md")
    pixels, labels, is_test = (arrays[key] for key in REQUIRED[:3])
    class_names = tuple(arrays["class_names"].tolist())
    superclass = tuple(arrays["superclass"].tolist()) if "superclass" in arrays else None
    if "sha256" not in arrays:
        return Images.canonical(pixels, labels, is_test, class_names, superclass, name=name), None
    # A cache of ours was ordered and hashed when it was written; reading checks the archive's CRCs.
    labels = labels.astype(np.int64, copy=False)
    images = Images(pixels, labels, is_test, class_names, superclass, name, str(arrays["sha256"]))
    return images, str(arrays["source"]) if "source" in arrays else None


def _fault(arrays: dict[str, np.ndarray]) -> str | None:
    """What is wrong with arrays that claim the documented format, and how to put it right."""
    if missing := [key for key in REQUIRED if key not in arrays]:
        return f"it has no {', '.join(missing)}: the keys {', '.join(REQUIRED)} are needed"
    images, labels, is_test, names = (arrays[key] for key in REQUIRED)
    if images.dtype != np.uint8:
        return f"images must be uint8 from 0 to 255, not {images.dtype}: scale and round them"
    if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
        hint = ""
        if images.ndim == 3:
            hint = ": add the channel with images[:, None]"
        elif images.ndim == 4 and images.shape[3] in (1, 3):
            hint = ": put the channel first with images.transpose(0, 3, 1, 2)"
        return f"images must have the shape (N, 1 or 3, H, W) and not be empty, not {images.shape}{hint}"
    n = len(images)
    for key, array, kinds in (("labels", labels, "iu"), ("is_test", is_test, "b")):
        if array.shape != (n,) or array.dtype.kind not in kinds:
            wanted = "integers" if key == "labels" else "bool"
            return f"{key} must be {wanted} of the shape ({n},), not {array.dtype} of {array.shape}"
    if names.ndim != 1 or names.dtype.kind != "U" or len(set(names.tolist())) != len(names):
        return "class_names must be a list of different strings"
    outside = (labels < 0) | (labels >= len(names))
    if outside.any():
        first = int(np.argmax(outside))
        return f"labels must lie in 0..{len(names) - 1} (class_names), but labels[{first}] is {labels[first]}"
    if "superclass" in arrays and (arrays["superclass"].shape != names.shape or arrays["superclass"].dtype.kind != "U"):
        return f"superclass must hold one string for each of the {len(names)} class_names"
    return None


def write_npz(path: Path, images: Images, source: str) -> None:
    """Write the file, with the checksum of ``images`` and what they were made from."""
    arrays: dict[str, Any] = {
        "images": images.pixels,
        "labels": images.labels,
        "is_test": images.is_test,
        "class_names": np.array(images.class_names),
        "sha256": np.array(images.sha256),
        "source": np.array(source),
    }
    if images.superclass is not None:
        arrays["superclass"] = np.array(images.superclass)
    try:
        write_atomically(path, lambda out: np.savez(out, **arrays))  # uncompressed: CIFAR-10 loads in half a second
    except OSError as error:
        raise ValueError(
            f"{path} could not be written ({shortened(error)}): make room for "
            f"{max(1, images.pixels.nbytes // 10**6)} MB there, or set data_dir (or ANOMALY_LAB_DATA) to another folder"
        ) from error


@contextmanager
def reading(path: Path, remedy: str) -> Iterator[None]:
    """Turn any error of reading a file (numpy, zipfile, zlib, the file system) into one line."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{path} is damaged or unreadable ({shortened(error)}): {remedy}") from error
