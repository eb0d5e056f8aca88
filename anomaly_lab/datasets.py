"""Readers: every source of images becomes the same `Images`, decoded once into an `.npz` and read from there.

The file format, the two folder layouts and the sources' terms are described in docs/datasets.md.
"""

from __future__ import annotations

import errno
import hashlib
import http.client
import io
import json
import pickle
import re
import shlex
import socket
import sys
import urllib.error
import urllib.request
import warnings
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO, Any, ClassVar

import numpy as np

from anomaly_lab.errors import shortened
from anomaly_lab.files import take_lock, write_atomically
from anomaly_lab.images import REQUIRED, Images, keys_of_npz, read_npz, reading, write_npz
from anomaly_lab.pictures import IMAGE_SUFFIXES, Unreadable, open_image, unreadable

NETWORK_TIMEOUT = 30.0  # seconds; many compute nodes drop packets instead of refusing connections


@dataclass(frozen=True, kw_only=True)
class Dataset(ABC):
    """Where images come from. `load()` reads their cache in `data_dir`, and makes it where there is none.

    Every fault of a source, a download or a cache is a ValueError of one line that says what to do.
    """

    data_dir: str | Path
    name: str

    config: ClassVar[str]  # the reader's file in conf/dataset, as users name it on the command line

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise ValueError(
                f"dataset.name={self.name!r} becomes a file name: give a text of letters, digits, '.', '_' and '-' (a "
                "number in quotes is one)"
            )

    @property
    def root(self) -> Path:
        return Path(self.data_dir).expanduser()

    @property
    def cache(self) -> Path:
        """The file `load()` reads; it need not exist yet."""
        return self.root / f"{self.name}.npz"

    @property
    def download_command(self) -> str:
        """The command line that makes this cache, with every field that differs from its default."""
        given = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "data_dir"}
        defaults = {field.name: field.default for field in fields(self)}
        overrides = [f"dataset.{key}={value}" for key, value in given.items() if value != defaults[key]]
        return shlex.join(["anomaly-lab-data", "download", self.config, *overrides])

    @property
    def how_to_get(self) -> str:
        """What to do where the cache is not there."""
        return f"run `{self.download_command}`"

    def load(self) -> Images:
        images = self._cached()
        return self._make() if images is None else images

    def download(self) -> Path:
        """Make the cache, fetching the source where that is possible; a fresh cache is left alone."""
        if self._cached() is None:
            self._make()
        return self.cache

    def check(self) -> str:
        """Recompute the cache's checksum; one line about its contents, ValueError where absent or damaged."""
        images = self._cached()
        if images is None:
            raise ValueError(f"{self.cache} is not there or is stale: {self.how_to_get}")
        self._hold_to_checksum(images)
        shape = "x".join(str(n) for n in images.pixels.shape[1:])
        tested = int(images.is_test.sum())
        halves = f"{len(images) - tested} training and {tested} test images" if tested else "no test half"
        held = np.unique(images.labels[~images.is_test])
        partial = len(images.class_names) - len(held)
        missing = f", {partial} classes without training images" if partial else ""
        return (
            f"{self.name}: {len(images)} images of {shape}, {len(images.class_names)} classes, "
            f"{halves}{missing}, sha256 {images.sha256} ({self.cache})"
        )

    def _hold_to_checksum(self, images: Images) -> None:
        found = images.recomputed()
        if found != images.sha256:
            raise ValueError(f"{self.cache} is damaged (sha256 {found}, recorded {images.sha256}): {self._remedy()}")

    @abstractmethod
    def decode(self) -> Images:
        """Read the original files, downloading them first where the source can."""

    def _source(self) -> str:
        """What a cache was made from: the reader and, for sources that can change, a digest of them."""
        return type(self).__name__

    def _remedy(self) -> str:
        return f"delete it and run `{self.download_command}`"

    def _failed(self, error: Exception, place: Path) -> ValueError:
        """Why the source could not be fetched or read, and what to do; its original files belong at ``place``."""
        if _is_network(error):
            advice = (
                f"run `{self.download_command}` on a machine with network access, or put the original files at {place}"
            )
        elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            advice = f"make room in {self.root}, or set data_dir (or ANOMALY_LAB_DATA) to another folder"
        else:
            advice = f"delete {place} and run `{self.download_command}` again"
        return ValueError(f"{self.name} could not be fetched or read ({shortened(error)}): {advice}")

    def _cached(self) -> Images | None:
        """What the cache holds; None where there is none, or one made from files that have changed since."""
        if not self.cache.exists():
            return None
        images, source = read_npz(self.cache, self.name, self._remedy())
        expected = self._source()
        if source is not None and source.split()[0] != expected.split()[0]:
            raise ValueError(
                f"{self.cache} was written by the reader {source.split()[0]}, not by {expected.split()[0]}: "
                "give the data set another dataset.name or data_dir"
            )
        return images if source in (None, expected) else None

    def _make(self) -> Images:
        with _locked(self.root, self.name):
            images = self._cached()  # another process may have made it while this one waited
            if images is None:
                for part in self.root.glob(f".{self.cache.name}.*.part"):  # of a process that was killed
                    part.unlink(missing_ok=True)
                source = self._source()  # first, so that a change during the decoding makes the cache stale
                images = self.decode()
                write_npz(self.cache, images, source)
        return images


# ----------------------------------------------------------------------------------------------------
# Sets that torchvision downloads and verifies


@dataclass(frozen=True, kw_only=True)
class _Torchvision(Dataset):
    """Subclasses have the names of torchvision's readers."""

    folder: ClassVar[str]  # where torchvision lays the original files below data_dir
    # Checksum of the complete set: torchvision verifies its downloads, not idx files that lie there unpacked.
    published: ClassVar[str | None] = None

    def decode(self) -> Images:
        from torchvision import datasets  # seconds to import, and needed once per machine

        folder = self.root / self.folder
        try:
            with _network_timeout():
                reader = getattr(datasets, type(self).__name__)
                halves = [reader(root=str(self.root), train=train, download=True) for train in (True, False)]
            pixels = np.concatenate([np.asarray(half.data) for half in halves])  # (N,H,W) or (N,H,W,3)
            labels = np.concatenate([np.asarray(half.targets, np.int64) for half in halves])
            class_names, superclass = self._classes(halves)
        # torchvision does not catch what urllib, tarfile, gzip, pickle or its own assertions raise.
        except Exception as error:
            raise self._failed(error, folder) from error
        is_test = np.repeat([False, True], [len(half.data) for half in halves])
        pixels = pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2)
        images = Images.canonical(pixels, labels, is_test, class_names, superclass, name=self.name)
        if self.published is not None and images.sha256 != self.published:
            raise ValueError(
                f"the files in {folder} are not the published {self.name} (decoded sha256 {images.sha256}, "
                f"expected {self.published}): delete {folder} and run `{self.download_command}`"
            )
        return images

    def _classes(self, halves: list[Any]) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
        return tuple(halves[0].classes), None


@dataclass(frozen=True, kw_only=True)
class MNIST(_Torchvision):
    """60,000 + 10,000 grey 28x28 handwritten digits (LeCun et al. 1998)."""

    name: str = "mnist"
    config: ClassVar[str] = "mnist"
    folder: ClassVar[str] = "MNIST/raw"
    published: ClassVar[str | None] = "7f45569a68eceedf24740501383f2b724a6191b17b3fc487cb5460aadd782ad5"

    def _classes(self, halves: list[Any]) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
        # torchvision's "8 - eight" is a nuisance to type.
        return tuple(str(digit) for digit in range(10)), None


@dataclass(frozen=True, kw_only=True)
class FashionMNIST(_Torchvision):
    """60,000 + 10,000 grey 28x28 photographs of clothes (Xiao et al. 2017)."""

    name: str = "fashion_mnist"
    config: ClassVar[str] = "fashion_mnist"
    folder: ClassVar[str] = "FashionMNIST/raw"
    published: ClassVar[str | None] = "54daaf62c301b353f3a3ef52b3246b4c0a30fdc2ad2c6c877fb4a8c95e489e92"


@dataclass(frozen=True, kw_only=True)
class CIFAR10(_Torchvision):
    """50,000 + 10,000 colour 32x32 photographs (Krizhevsky 2009)."""

    name: str = "cifar10"
    config: ClassVar[str] = "cifar10"
    folder: ClassVar[str] = "cifar-10-batches-py"
    published: ClassVar[str | None] = "2cb386b361aaa69b94b133b96481da589d21854ca031e61bb025559e2eb655bb"


@dataclass(frozen=True, kw_only=True)
class CIFAR100(_Torchvision):
    """50,000 + 10,000 colour 32x32 photographs of 100 classes in 20 superclasses (Krizhevsky 2009)."""

    name: str = "cifar100"
    config: ClassVar[str] = "cifar100"
    folder: ClassVar[str] = "cifar-100-python"

    def _classes(self, halves: list[Any]) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
        # torchvision drops the coarse labels; its checksums have just vouched for the files they stand in.
        folder = self.root / self.folder
        with open(folder / "meta", "rb") as file:
            coarse_names = pickle.load(file, encoding="latin1")["coarse_label_names"]
        with open(folder / "test", "rb") as file:
            test = pickle.load(file, encoding="latin1")
        coarse = dict(zip(test["fine_labels"], test["coarse_labels"], strict=True))
        fine_names = tuple(halves[0].classes)
        return fine_names, tuple(coarse_names[coarse[fine]] for fine in range(len(fine_names)))


# ----------------------------------------------------------------------------------------------------
# Other sources


@dataclass(frozen=True, kw_only=True)
class COIL100(Dataset):
    """100 objects in 72 poses, colour 128x128 (Nene, Nayar & Murase 1996), stored as exact block means.

    Read from `<data_dir>/coil-100/objN__D.png` where that folder exists, else from `<data_dir>/coil-100.zip`,
    which is downloaded where it is missing. Halves are rounded up, as Pillow's `Image.reduce` does.
    """

    name: str = "coil100"
    size: int = 32

    config: ClassVar[str] = "coil100"
    url: ClassVar[str] = "http://www.cs.columbia.edu/CAVE/databases/SLAM_coil-20_coil-100/coil-100/coil-100.zip"
    # Columbia publishes no checksum; this is TensorFlow Datasets' own (datasets/coil100/checksums.tsv).
    archive_bytes: ClassVar[int] = 130_688_843
    archive_sha256: ClassVar[str] = "fcb4b8b01c0778f416d8d7a09f45082c4f7075cc74743dcddd5c44307bd4afe7"
    objects: ClassVar[int] = 100
    native: ClassVar[int] = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.size) is not int or self.size < 1 or self.native % self.size:
            raise ValueError(f"dataset.size={self.size} must divide {self.native}: use 128, 64, 32, 16 or 8")

    @property
    def cache(self) -> Path:
        return _sized(self.root, self.name, self.size)

    def _source(self) -> str:
        return f"COIL100 {self.size}"

    def decode(self) -> Images:
        folder, archive = self.root / "coil-100", self.root / "coil-100.zip"
        if folder.is_dir():
            return self._assemble({path.name: path for path in folder.iterdir()}, folder)
        if not archive.exists():
            self._fetch(archive)
        with reading(archive, self._remedy()), open(archive, "rb") as opened:
            found = hashlib.file_digest(opened, "sha256").hexdigest()
        if found != self.archive_sha256:
            raise ValueError(
                f"{archive} is truncated or tampered with (sha256 {found}, expected "
                f"{self.archive_sha256}): delete it and run `{self.download_command}`"
            )
        with zipfile.ZipFile(archive) as file:
            members = {Path(member).name: io.BytesIO(file.read(member)) for member in file.namelist()}
        return self._assemble(members, archive)

    def _assemble(self, files: dict[str, Any], where: Path) -> Images:
        expected = [f"obj{n}__{d}.png" for n in range(1, self.objects + 1) for d in range(0, 360, 5)]
        pngs = {name for name in files if name.endswith(".png")}
        if missing := [name for name in expected if name not in pngs]:
            raise ValueError(
                f"{where} lacks {len(missing)} of the {len(expected)} images, the first {missing[0]}: "
                f"delete it and run `{self.download_command}`"
            )
        if strange := sorted(pngs.difference(expected)):
            raise ValueError(f"{where} holds {strange[0]}, which is not an image of COIL-100: move it away")
        k = self.native // self.size
        pixels = np.empty((len(expected), 3, self.size, self.size), np.uint8)
        for i, name in enumerate(expected):
            image = open_image(files[name], f"{where}/{name}", channels=3)
            if image.shape != (3, self.native, self.native):
                raise ValueError(
                    f"{where}/{name} has {image.shape[2]}x{image.shape[1]} pixels, not the original "
                    f"{self.native}x{self.native}: delete {where} and run `{self.download_command}`"
                )
            blocks = image.reshape(3, self.size, k, self.size, k).sum(axis=(2, 4), dtype=np.uint32)
            pixels[i] = (blocks + k * k // 2) // (k * k)
        labels = np.repeat(np.arange(self.objects), 72)
        class_names = tuple(f"obj{n}" for n in range(1, self.objects + 1))
        return Images.canonical(pixels, labels, np.zeros(len(labels), np.bool_), class_names, name=self.name)

    def _fetch(self, target: Path) -> None:
        from tqdm import tqdm

        def copy(out: IO[bytes]) -> None:
            digest = hashlib.sha256()
            with (
                urllib.request.urlopen(self.url, timeout=NETWORK_TIMEOUT) as answer,
                tqdm.wrapattr(answer, "read", total=self.archive_bytes, desc=target.name) as source,
            ):
                while block := source.read(1 << 18):
                    digest.update(block)
                    out.write(block)
            if digest.hexdigest() != self.archive_sha256:
                raise ValueError(
                    f"{self.url} sent {out.tell()} bytes with sha256 {digest.hexdigest()}, expected "
                    f"{self.archive_bytes} with {self.archive_sha256}: run `{self.download_command}` again, "
                    f"or put the archive at {target}"
                )

        try:
            write_atomically(target, copy)
        except (OSError, http.client.HTTPException) as error:
            raise self._failed(error, target) from error


@dataclass(frozen=True, kw_only=True)
class Digits(Dataset):
    """scikit-learn's 1,797 handwritten digits, grey 8x8, no test half (UCI, Alpaydin & Kaynak 1998)."""

    name: str = "digits"
    config: ClassVar[str] = "digits"

    def decode(self) -> Images:
        from sklearn.datasets import load_digits

        digits = load_digits()
        pixels = np.rint(digits.images * 255 / 16).astype(np.uint8)[:, None]  # 0..16 -> 0..255
        class_names = tuple(str(digit) for digit in range(10))
        return Images.canonical(pixels, digits.target, np.zeros(len(pixels), np.bool_), class_names, name=self.name)


@dataclass(frozen=True, kw_only=True)
class ImageFolder(Dataset):
    """A folder of images in one of two layouts, resized to `size` x `size` at decoding.

    `path/<class>/*` has no test half. Where `path/train` and `path/test` both exist, `path/train/<class>/*`
    and `path/test/<class>/*` are the halves and anything else in `path` (MVTec's `ground_truth`) is left
    alone; a class `good` then comes first, so that `normal_class=0` means it. Classes are otherwise in
    natural order (2 before 10). Images of another size are stretched to the square by Pillow's bilinear
    filter, which averages when it reduces.
    """

    path: str | Path
    size: int = 32
    channels: int = 3  # 1: grey (ITU-R 601 luma), 3: RGB
    skip_broken: bool = False  # leave files out that are no readable images, and list them on stderr

    config: ClassVar[str] = "image_folder"

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.size) is not int or self.size < 1:
            raise ValueError(f"dataset.size={self.size}: give the side of the stored images in pixels, e.g. 32")
        if self.channels not in (1, 3):
            raise ValueError(f"dataset.channels={self.channels}: use 1 (grey) or 3 (colour)")
        if not isinstance(self.skip_broken, bool):  # "no" would be true
            raise ValueError(f"dataset.skip_broken={self.skip_broken}: give true or false")

    @property
    def cache(self) -> Path:
        return _sized(self.root, self.name, self.size)

    def decode(self) -> Images:
        listing = self._listing()
        class_names = tuple(dict.fromkeys(name for _, name, _, _ in listing))
        index = {name: k for k, name in enumerate(class_names)}
        pixels, read, broken = [], [], list[Unreadable]()
        for entry in listing:
            try:
                pixels.append(open_image(entry[0], str(entry[0]), self.channels, self.size))
                read.append(entry)
            except Unreadable as fault:
                broken.append(fault)
        if broken and not (self.skip_broken and pixels):
            raise unreadable(broken, len(listing), "" if self.skip_broken else "dataset.skip_broken=true")
        for left_out in broken:
            print(f"left out: {left_out}", file=sys.stderr)
        labels = np.array([index[name] for _, name, _, _ in read], np.int64)
        is_test = np.array([test for _, _, test, _ in read], np.bool_)
        return Images.canonical(np.stack(pixels), labels, is_test, class_names, name=self.name)

    def _cached(self) -> Images | None:
        if self.cache.exists() and "source" not in keys_of_npz(self.cache, self._remedy()):
            raise ValueError(
                f"{self.cache} is a file of your own, not made from {self.path}: choose another dataset.name"
            )
        return super()._cached()

    def _source(self) -> str:
        parameters = [self.size, self.channels, *(["skip_broken"] if self.skip_broken else [])]
        digest = hashlib.sha256(json.dumps(parameters).encode())
        for file, name, test, state in self._listing():
            digest.update(json.dumps([file.name, name, test, state]).encode())
        return f"ImageFolder {digest.hexdigest()}"

    def _listing(self) -> list[tuple[Path, str, bool, tuple[int, int]]]:
        """(file, class, is_test, (bytes, mtime)) of every image, classes in the order of their indices."""
        try:
            return [
                (file, name, test, (file.stat().st_size, file.stat().st_mtime_ns)) for file, name, test in self._walk()
            ]
        except OSError as error:
            raise ValueError(f"{error.filename} cannot be read ({shortened(error)}): repair or remove it") from error

    def _walk(self) -> list[tuple[Path, str, bool]]:
        root = Path(self.path).expanduser()
        if not root.is_dir():
            raise ValueError(f"dataset.path={self.path} is not a folder: give the one with the class folders")
        halves = root / "train", root / "test"
        split = all(half.is_dir() for half in halves)
        folders = [
            (folder, half.name == "test" and split)
            for half in (halves if split else (root,))
            for folder in half.iterdir()
            if folder.is_dir() and not folder.name.startswith(".")
        ]
        if not folders:
            raise ValueError(
                f"{root} has no class folders: lay the images out as {root}/<class>/*.png, or as "
                f"{root}/train/good and {root}/test/<defect>"
            )

        def rank(entry: tuple[Path, bool]) -> tuple[Any, ...]:
            folder, test = entry
            parts = re.split(r"(\d+)", folder.name)  # text and numbers alternate
            natural = [(part, 0) if i % 2 == 0 else ("", int(part)) for i, part in enumerate(parts)]
            return not (split and folder.name == "good"), natural, folder.name, test

        listing = []
        for folder, test in sorted(folders, key=rank):
            files = sorted(
                file
                for file in folder.iterdir()
                if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".")
            )
            if not files:
                raise ValueError(
                    f"the class folder {folder} has no images ({' '.join(sorted(IMAGE_SUFFIXES))}): add some "
                    "or remove it; two halves need both train and test"
                )
            listing += [(file, folder.name, test) for file in files]
        return listing


@dataclass(frozen=True, kw_only=True)
class NPZ(Dataset):
    """Any file of the documented format, read where it lies and never copied, so that it cannot be stale."""

    path: str | Path
    config: ClassVar[str] = "npz"

    @property
    def cache(self) -> Path:
        return Path(self.path).expanduser()

    @property
    def how_to_get(self) -> str:
        return "put a file of the format in docs/datasets.md there"

    def decode(self) -> Images:
        raise ValueError(
            f"dataset.path={self.path} is not there: give an .npz file with the keys {', '.join(REQUIRED)}"
        )

    def _make(self) -> Images:
        return self.decode()

    def _remedy(self) -> str:
        return "write it again in the format of docs/datasets.md"

    def _cached(self) -> Images | None:
        if not self.cache.exists():
            return None
        images, _ = read_npz(self.cache, self.name, self._remedy())
        self._hold_to_checksum(images)  # anybody may have written it, and claim somebody else's
        return images


# ----------------------------------------------------------------------------------------------------
# Files


def _sized(root: Path, name: str, size: int) -> Path:
    return root / (f"{name}.npz" if size == 32 else f"{name}-{size}.npz")  # 32: the default in conf/dataset


@contextmanager
def _locked(root: Path, name: str) -> Iterator[None]:
    """Let one process at a time fetch and decode a set: torchvision writes downloads in place."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = open(root / f".{name}.lock", "ab")  # noqa: SIM115 (entered below)
    except OSError as error:
        raise ValueError(
            f"data_dir={root} cannot be written to ({shortened(error)}): set data_dir (or ANOMALY_LAB_DATA) to "
            "another folder"
        ) from error
    with lock:
        try:
            take_lock(lock, wait=True)
        except OSError as error:  # some network file systems have no locks; the rename keeps the cache whole
            warnings.warn(f"{root} cannot be locked ({shortened(error)}): start one process first", stacklevel=2)
        yield


@contextmanager
def _network_timeout() -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(NETWORK_TIMEOUT)  # torchvision sets none and would wait without end
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _is_network(error: BaseException) -> bool:
    kinds = (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException)
    return isinstance(error, kinds) or "urlopen" in str(error) or "HTTP Error" in str(error)
