"""Readers, their caches, and what they say about bad input."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import os
import pickle
import re
import resource
import shutil
import struct
import subprocess
import sys
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from anomaly_lab import datasets
from anomaly_lab.datasets import (
    CIFAR10,
    CIFAR100,
    COIL100,
    MNIST,
    NPZ,
    Dataset,
    Digits,
    FashionMNIST,
    ImageFolder,
)
from anomaly_lab.images import Images

CONF = Path(__file__).parents[1] / "conf" / "dataset"
DOWNLOADED = [MNIST, FashionMNIST, CIFAR10, CIFAR100, COIL100]

# Identities of the complete sets in canonical order; those of the torchvision sets stand in the readers too.
PINNED = {
    MNIST: "7f45569a68eceedf24740501383f2b724a6191b17b3fc487cb5460aadd782ad5",
    FashionMNIST: "54daaf62c301b353f3a3ef52b3246b4c0a30fdc2ad2c6c877fb4a8c95e489e92",
    CIFAR10: "2cb386b361aaa69b94b133b96481da589d21854ca031e61bb025559e2eb655bb",
    Digits: "b7bcc2d1d6ba50c1898242b29b4c1673322fa43b4ef70c702ace22dfea5bbc79",
}


def random_arrays(n: int = 40, channels: int = 3, size: int = 32, classes: int = 10) -> dict[str, Any]:
    """Arrays of the documented format in an arbitrary order, with every class in both halves."""
    rng = np.random.default_rng(0)
    return {
        "images": rng.integers(0, 256, (n, channels, size, size), dtype=np.uint8),
        "labels": rng.permutation(np.arange(n) % classes),
        "is_test": rng.random(n) < 0.5,
        "class_names": np.array([f"class{k}" for k in range(classes)]),
    }


def images_of(arrays: dict[str, Any], name: str = "x") -> Images:
    names = tuple(arrays["class_names"].tolist())
    superclass = tuple(arrays["superclass"].tolist()) if "superclass" in arrays else None
    return Images.canonical(arrays["images"], arrays["labels"], arrays["is_test"], names, superclass, name=name)


@contextmanager
def one_line(*parts: str) -> Iterator[None]:
    """The block raises a ValueError of one line that contains all the parts."""
    with pytest.raises(ValueError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def leftovers(folder: Path) -> list[str]:
    """Caches and unfinished files below a folder."""
    return sorted(path.name for path in folder.rglob("*") if path.suffix in {".npz", ".part"})


# ---- canonical order and identity


@pytest.mark.parametrize("seed", range(3))
def test_order_and_identity_do_not_depend_on_the_order_of_the_source(seed: int) -> None:
    arrays = random_arrays()
    arrays["images"][1] = arrays["images"][0]  # identical pixels, as CIFAR-100 has them
    order = np.random.default_rng(seed).permutation(len(arrays["images"]))
    shuffled = {key: value[order] if key != "class_names" else value for key, value in arrays.items()}
    a, b = images_of(arrays), images_of(shuffled)
    assert a.sha256 == b.sha256
    for field in ("pixels", "labels", "is_test"):
        np.testing.assert_array_equal(getattr(a, field), getattr(b, field))


def test_canonical_order_is_by_test_flag_then_label_then_digest_of_the_pixels() -> None:
    images = images_of(random_arrays())
    digests = [hashlib.sha256(image.tobytes()).hexdigest() for image in images.pixels]
    keys = list(zip(images.is_test.tolist(), images.labels.tolist(), digests, strict=True))
    assert keys == sorted(keys)


def test_canonical_order_keeps_every_image_with_its_label_and_half() -> None:
    def rows(pixels: np.ndarray, labels: np.ndarray, is_test: np.ndarray) -> list[tuple[bytes, int, bool]]:
        return sorted((p.tobytes(), int(y), bool(t)) for p, y, t in zip(pixels, labels, is_test, strict=True))

    arrays = random_arrays()
    images = images_of(arrays)
    assert rows(images.pixels, images.labels, images.is_test) == rows(
        arrays["images"], arrays["labels"], arrays["is_test"]
    )


def change_pixel(a: dict[str, Any]) -> None:
    a["images"][3, 0, 0, 0] ^= 1


def change_label(a: dict[str, Any]) -> None:
    a["labels"][3] = (a["labels"][3] + 1) % 10


def change_half(a: dict[str, Any]) -> None:
    a["is_test"][3] ^= True


def change_name(a: dict[str, Any]) -> None:
    a["class_names"][3] = "other"


def add_superclass(a: dict[str, Any]) -> None:
    a["superclass"] = a["class_names"]


def change_shape(a: dict[str, Any]) -> None:
    a["images"] = a["images"].reshape(len(a["images"]), 3, 16, 64)


@pytest.mark.parametrize("change", [change_pixel, change_label, change_half, change_name, add_superclass, change_shape])
def test_identity_changes_with_the_content(change: Callable[[dict[str, Any]], None]) -> None:
    arrays = random_arrays()
    before = images_of(arrays).sha256
    change(arrays)
    assert images_of(arrays).sha256 != before


def test_identity_does_not_contain_the_name() -> None:
    assert images_of(random_arrays(), "a").sha256 == images_of(random_arrays(), "b").sha256


# ---- readers and caches


def test_digits_are_scaled_exactly_and_pinned(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    images = Digits(data_dir=tmp_path).load()
    assert images.pixels.shape == (1797, 1, 8, 8) and not images.is_test.any()
    raw = load_digits()
    scaled = {tuple(round(v * 255 / 16) for v in row) for row in raw.data.tolist()}
    assert {tuple(row) for row in images.pixels.reshape(1797, 64).tolist()} == scaled
    assert np.array_equal(np.bincount(images.labels), np.bincount(raw.target))
    assert images.sha256 == PINNED[Digits]


def test_a_cache_is_decoded_once_and_gives_the_same_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = Digits(data_dir=tmp_path / "new" / "folder")
    first = dataset.load()
    monkeypatch.setattr(Digits, "decode", lambda self: pytest.fail("decoded twice"))
    second = dataset.load()
    assert dataset.download() == dataset.cache == tmp_path / "new" / "folder" / "digits.npz"
    for field in dataclasses.fields(Images):
        assert np.array_equal(getattr(first, field.name), getattr(second, field.name)), field.name
    assert leftovers(tmp_path) == ["digits.npz"]


def test_check_describes_a_sound_cache(tmp_path: Path) -> None:
    dataset = Digits(data_dir=tmp_path)
    with one_line("is not there", "anomaly-lab-data download digits"):
        dataset.check()
    dataset.download()
    line = dataset.check()
    assert "1797 images of 1x8x8, 10 classes, no test half" in line and PINNED[Digits] in line


def write_idx(folder: Path, arrays: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    for half, prefix in ((False, "train"), (True, "t10k")):
        chosen = arrays["is_test"] == half
        pixels, labels = arrays["images"][chosen, 0], arrays["labels"][chosen].astype(np.uint8)
        for array, kind in ((pixels, "images-idx3"), (labels, "labels-idx1")):
            header = struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape)
            (folder / f"{prefix}-{kind}-ubyte").write_bytes(header + array.tobytes())


def write_cifar(folder: Path, arrays: dict[str, Any], order: np.ndarray) -> None:
    """CIFAR's pickles of 10 or 100 classes (by the folder's name), with the images in the given order."""
    folder.mkdir(parents=True)
    fine, names = folder.name == "cifar-100-python", arrays["class_names"].tolist()
    train, test = order[~arrays["is_test"][order]], order[arrays["is_test"][order]]
    files = (
        {"train": train, "test": test}
        if fine
        else {f"data_batch_{i + 1}": part for i, part in enumerate(np.array_split(train, 5))} | {"test_batch": test}
    )
    supers = sorted(set(arrays["superclass"].tolist())) if fine else []
    for name, part in files.items():
        labels = arrays["labels"][part].tolist()
        entry: dict[str, Any] = {"data": arrays["images"][part].reshape(len(part), -1)}
        if fine:
            entry["fine_labels"] = labels
            entry["coarse_labels"] = [supers.index(arrays["superclass"][y]) for y in labels]
        else:
            entry["labels"] = labels
        (folder / name).write_bytes(pickle.dumps(entry))
    meta = {"fine_label_names": names, "coarse_label_names": supers} if fine else {"label_names": names}
    (folder / ("meta" if fine else "batches.meta")).write_bytes(pickle.dumps(meta))


@pytest.fixture
def any_checksum(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision accepts made-up CIFAR files, and the reader made-up sets."""
    from torchvision.datasets import cifar

    monkeypatch.setattr(cifar, "check_integrity", lambda path, md5=None: Path(path).is_file())
    for reader in DOWNLOADED[:4]:
        monkeypatch.setattr(reader, "published", None)


@pytest.mark.parametrize("reader", [MNIST, FashionMNIST])
def test_idx_files_are_read_without_network(tmp_path: Path, reader: Any, any_checksum: None) -> None:
    arrays = random_arrays(channels=1, size=28)
    write_idx(tmp_path / reader.folder, arrays)
    images = reader(data_dir=tmp_path).load()
    arrays["class_names"] = np.array(images.class_names)
    assert images.sha256 == images_of(arrays).sha256
    assert images.class_names[9] == {"mnist": "9", "fashion_mnist": "Ankle boot"}[images.name]


@pytest.mark.parametrize("reader", [CIFAR10, CIFAR100])
def test_cifar_files_and_an_npz_of_them_are_the_same_images(tmp_path: Path, reader: Any, any_checksum: None) -> None:
    arrays = random_arrays(n=60)
    if reader is CIFAR100:
        arrays["superclass"] = np.array([f"group{k % 3}" for k in range(10)])
        arrays["is_test"][:10], arrays["labels"][:10] = True, np.arange(10)
    write_cifar(tmp_path / "a" / reader.folder, arrays, np.random.default_rng(1).permutation(60))
    (tmp_path / "b").mkdir()
    np.savez(tmp_path / "b" / f"{reader.config}.npz", **arrays)
    a, b = reader(data_dir=tmp_path / "a").load(), reader(data_dir=tmp_path / "b").load()
    assert a.sha256 == b.sha256 and a.superclass == b.superclass
    np.testing.assert_array_equal(a.pixels, b.pixels)


def test_a_file_of_the_users_own_is_put_in_order_but_never_rewritten(tmp_path: Path) -> None:
    arrays = random_arrays()
    np.savez(tmp_path / "cifar10.npz", **arrays)
    before = (tmp_path / "cifar10.npz").read_bytes()
    dataset = CIFAR10(data_dir=tmp_path)
    assert dataset.load().sha256 == images_of(arrays).sha256
    assert dataset.download() == tmp_path / "cifar10.npz" and "cifar10: 40 images" in dataset.check()
    assert (tmp_path / "cifar10.npz").read_bytes() == before


def test_a_partial_set_is_accepted_and_check_says_what_it_lacks(tmp_path: Path) -> None:
    arrays = random_arrays()
    arrays["is_test"] = arrays["labels"] >= 4
    np.savez(tmp_path / "cifar100.npz", **arrays)
    assert "6 classes without training images" in CIFAR100(data_dir=tmp_path).check()


# ---- COIL-100


@pytest.fixture
def coil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A COIL-100 of two objects in its unpacked folder; returns the data directory."""
    monkeypatch.setattr(COIL100, "objects", 2)
    folder = tmp_path / "coil-100"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (128, 256, 3), dtype=np.uint8)
    for n in (1, 2):
        for d in range(0, 360, 5):
            shifted = np.ascontiguousarray(noise[:, n + d // 5 : n + d // 5 + 128])
            Image.fromarray(shifted).save(folder / f"obj{n}__{d}.png", compress_level=0)
    return tmp_path


def pack_coil(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Turn the folder into the archive, with the checksum that the reader then expects."""
    archive = data_dir / "coil-100.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("coil-100/convertGroupppm2png.pl", "the real archive holds this too")
        for path in (data_dir / "coil-100").iterdir():
            file.write(path, f"coil-100/{path.name}")
            path.unlink()
    (data_dir / "coil-100").rmdir()
    monkeypatch.setattr(COIL100, "archive_sha256", hashlib.sha256(archive.read_bytes()).hexdigest())
    return archive


def test_coil_is_stored_as_the_exact_mean_of_4x4_blocks(coil: Path) -> None:
    images = COIL100(data_dir=coil).load()
    assert images.pixels.shape == (144, 3, 32, 32) and images.class_names == ("obj1", "obj2")
    assert np.bincount(images.labels).tolist() == [72, 72] and not images.is_test.any()
    stored = {image.tobytes() for image in images.pixels}
    for n, d in ((1, 0), (2, 355)):
        original = Image.open(coil / "coil-100" / f"obj{n}__{d}.png")
        raw = np.asarray(original).astype(np.float64).transpose(2, 0, 1)
        mean = raw.reshape(3, 32, 4, 32, 4).mean(axis=(2, 4))
        assert np.floor(mean + 0.5).astype(np.uint8).tobytes() in stored
        assert np.asarray(original.reduce(4)).transpose(2, 0, 1).tobytes() in stored


def test_coil_at_another_size_has_a_cache_of_its_own(coil: Path) -> None:
    assert COIL100(data_dir=coil, size=64).load().pixels.shape == (144, 3, 64, 64)
    assert leftovers(coil) == ["coil100-64.npz"]
    with one_line("dataset.size=48", "must divide 128"):
        COIL100(data_dir=coil, size=48)


def test_coil_archive_folder_and_download_are_the_same_images(coil: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = COIL100(data_dir=coil, name="folder").load()
    archive = pack_coil(coil, monkeypatch)
    packed = COIL100(data_dir=coil, name="packed").load()
    monkeypatch.setattr(COIL100, "url", archive.as_uri())
    fetched = COIL100(data_dir=coil / "elsewhere", name="fetched").load()
    assert folder.sha256 == packed.sha256 == fetched.sha256
    assert (coil / "elsewhere" / "coil-100.zip").read_bytes() == archive.read_bytes()


def test_coil_folder_must_be_complete_and_original(coil: Path) -> None:
    dataset, image = COIL100(data_dir=coil), coil / "coil-100" / "obj2__5.png"
    original = image.read_bytes()
    image.unlink()
    with one_line("lacks 1 of the 144 images", "obj2__5.png", "anomaly-lab-data download coil100"):
        dataset.load()
    Image.new("RGB", (64, 64)).save(image)
    with one_line("obj2__5.png has 64x64 pixels", "128x128"):
        dataset.load()
    image.write_bytes(original[:-2000])
    with one_line("obj2__5.png cannot be read"):
        dataset.load()
    image.write_bytes(original)
    (coil / "coil-100" / "obj3__5.png").write_bytes(original)
    with one_line("holds obj3__5.png", "move it away"):
        dataset.load()
    assert leftovers(coil) == []


@pytest.mark.parametrize("damage", [lambda b: b[:-100], lambda b: b"\0" + b[1:]], ids=["truncated", "tampered"])
def test_a_damaged_coil_archive_is_refused(
    coil: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[bytes], bytes]
) -> None:
    archive = pack_coil(coil, monkeypatch)
    archive.write_bytes(damage(archive.read_bytes()))
    with one_line("truncated or tampered with", "delete it", "anomaly-lab-data download coil100"):
        COIL100(data_dir=coil).load()
    monkeypatch.setattr(COIL100, "url", archive.as_uri())
    with one_line(archive.as_uri(), f"sent {archive.stat().st_size} bytes", "again"):
        COIL100(data_dir=coil / "elsewhere").load()
    assert leftovers(coil) == [] and not list((coil / "elsewhere").glob("*.zip"))


# ---- downloads that fail


@pytest.mark.parametrize("reader", DOWNLOADED)
def test_without_network_the_command_and_the_place_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: Any
) -> None:
    def no_network(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError(OSError(-2, "Name or service not known"))

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    dataset = reader(data_dir=tmp_path)
    for call in (dataset.load, dataset.download):
        with one_line(
            "Name or service not known",
            f"run `anomaly-lab-data download {reader.config}` on a machine with network",
            str(tmp_path),
        ):
            call()
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("reader", DOWNLOADED[:4])
def test_a_tampered_torchvision_download_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: Any
) -> None:
    from torchvision.datasets import utils

    monkeypatch.setattr(utils, "_get_redirect_url", lambda url, max_hops: url)
    monkeypatch.setattr(utils, "_urlretrieve", lambda url, path: Path(path).write_bytes(b"half a download"))
    with one_line("corrupted", f"delete {tmp_path}", f"anomaly-lab-data download {reader.config}"):
        reader(data_dir=tmp_path).load()
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda b: b[:-1], "could not be fetched or read"),
        (lambda b: b[:-1] + b"\7", "not the published mnist"),
    ],
    ids=["truncated", "tampered"],
)
def test_damaged_unpacked_idx_files_are_refused(tmp_path: Path, damage: Callable[[bytes], bytes], said: str) -> None:
    write_idx(tmp_path / MNIST.folder, random_arrays(channels=1, size=28))
    path = tmp_path / MNIST.folder / "train-images-idx3-ubyte"
    path.write_bytes(damage(path.read_bytes()))
    with one_line(said, f"delete {tmp_path / MNIST.folder}", "anomaly-lab-data download mnist"):
        MNIST(data_dir=tmp_path).load()
    assert leftovers(tmp_path) == []


# ---- folders of images


def paint(path: Path, colour: tuple[int, int, int] = (200, 30, 90), size: tuple[int, int] = (32, 32)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def folder_of(tmp_path: Path, **options: Any) -> ImageFolder:
    return ImageFolder(data_dir=tmp_path / "data", name="mine", path=tmp_path / "images", **options)


def test_a_folder_per_class_is_read_in_natural_order(tmp_path: Path) -> None:
    for k, name in enumerate(("obj10", "obj2", "apple")):
        for i in range(2):
            paint(tmp_path / "images" / name / f"{i}.png", (k, i, 0))
    (tmp_path / "images" / "apple" / "notes.txt").write_text("not an image")
    (tmp_path / "images" / "apple" / "._0.png").write_text("macOS leaves such files")
    (tmp_path / "images" / ".cache").mkdir()
    images = folder_of(tmp_path).load()
    assert images.class_names == ("apple", "obj2", "obj10") and not images.is_test.any()
    assert [np.unique(images.pixels[images.labels == k, 0]).tolist() for k in range(3)] == [[2], [1], [0]]


def test_train_and_test_folders_are_the_halves_and_good_comes_first(tmp_path: Path) -> None:
    root = tmp_path / "images"
    for i, place in enumerate(("train/good", "test/good", "test/broken", "ground_truth/broken")):
        paint(root / place / "0.png", (i, 0, 0))
    images = folder_of(tmp_path).load()
    assert images.class_names == ("good", "broken")
    found = zip(images.pixels[:, 0, 0, 0].tolist(), images.labels.tolist(), images.is_test.tolist(), strict=True)
    assert set(found) == {(0, 0, False), (1, 0, True), (2, 1, True)}


def test_images_of_mixed_sizes_and_modes_are_brought_to_one_shape(tmp_path: Path) -> None:
    root = tmp_path / "images" / "a"
    paint(root / "large.jpg", size=(90, 61))
    paint(root / "small.png", size=(5, 7))
    Image.new("L", (16, 16), 7).save(root / "grey.png")
    Image.new("P", (16, 16)).save(root / "palette.bmp")
    colour = folder_of(tmp_path, size=16).load()
    grey = folder_of(tmp_path, size=16, channels=1).load()  # the same cache, made anew
    assert colour.pixels.shape == (4, 3, 16, 16) and grey.pixels.shape == (4, 1, 16, 16)
    assert (colour.pixels == 7).all(axis=(1, 2, 3)).sum() == 1
    assert leftovers(tmp_path) == ["mine-16.npz"]


def test_reducing_an_image_averages_its_pixels(tmp_path: Path) -> None:
    (tmp_path / "images" / "a").mkdir(parents=True)
    board = np.indices((64, 64)).sum(axis=0) % 2 * 255
    Image.fromarray(board.astype(np.uint8)).save(tmp_path / "images" / "a" / "board.png")
    pixels = folder_of(tmp_path, size=8, channels=1).load().pixels
    assert abs(pixels.astype(int) - 127).max() <= 1


@pytest.mark.parametrize("change", ["add", "remove", "replace", "rename the class"])
def test_a_changed_folder_is_not_served_from_the_old_cache(tmp_path: Path, change: str) -> None:
    root, dataset = tmp_path / "images", folder_of(tmp_path)
    paint(root / "a" / "0.png", (1, 1, 1))
    paint(root / "a" / "1.png", (2, 2, 2))
    before = dataset.load()
    match change:
        case "add":
            paint(root / "b" / "0.png")
        case "remove":
            (root / "a" / "1.png").unlink()
        case "replace":
            paint(root / "a" / "1.png", (3, 3, 3))
            os.utime(root / "a" / "1.png", (1, 1))
        case _:
            (root / "a").rename(root / "z")
    with one_line("is stale", f"download image_folder dataset.name=mine dataset.path={root}"):
        dataset.check()
    after = dataset.load()
    assert after.sha256 != before.sha256
    assert dataset.load().sha256 == after.sha256 and after.sha256 in dataset.check()


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\nbroken", None], ids=["empty", "broken", "cut off"])
def test_an_unreadable_image_is_named(tmp_path: Path, content: bytes | None) -> None:
    bad = tmp_path / "images" / "a" / "bad.png"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    paint(tmp_path / "images" / "a" / "good.png")
    Image.fromarray(noise).save(bad)
    bad.write_bytes(bad.read_bytes()[:5000] if content is None else content)
    with one_line(f"{bad} cannot be read", "repair, convert or remove it"):
        folder_of(tmp_path).load()
    assert leftovers(tmp_path) == []


def test_all_unreadable_images_are_named_at_once_and_left_out_on_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "abcd":
        paint(tmp_path / "images" / "a" / f"{name}.png")
        paint(tmp_path / "images" / "b" / f"{name}.png")
    for name in ("a/b.png", "b/d.png"):
        (tmp_path / "images" / name).write_bytes(b"no image")
    with one_line(
        "2 of 8 images cannot be read: ", "a/b.png (", "b/d.png (", "or skip them with dataset.skip_broken=true"
    ):
        folder_of(tmp_path).load()
    images = folder_of(tmp_path, skip_broken=True).load()
    lines = capsys.readouterr().err.splitlines()
    assert [re.findall(r"^left out: .*/(\w/\w)\.png cannot be read \(.+\): repair", line) for line in lines] == [
        ["a/b"],
        ["b/d"],
    ]
    assert not any("skip" in line for line in lines), "it is on"
    assert np.bincount(images.labels).tolist() == [3, 3]
    assert folder_of(tmp_path, skip_broken=True).load().sha256 == images.sha256, "from the cache"
    assert capsys.readouterr().err == ""
    with one_line("2 of 8 images cannot be read"):
        folder_of(tmp_path).load()  # which the cache of the others does not hide
    for path in (tmp_path / "images").rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"8 of 8 images cannot be read: .*: repair, convert or remove them$"):
        folder_of(tmp_path, skip_broken=True).load()


def test_sixteen_bit_images_are_refused_rather_than_clipped(tmp_path: Path) -> None:
    (tmp_path / "images" / "a").mkdir(parents=True)
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(tmp_path / "images" / "a" / "deep.png")
    with one_line("deep.png cannot be read", "not 8-bit", "convert"):
        folder_of(tmp_path).load()


def make_nothing(root: Path) -> None:
    pass


def make_flat(root: Path) -> None:
    paint(root / "0.png")


def make_empty_class(root: Path) -> None:
    paint(root / "a" / "0.png")
    (root / "b").mkdir()


def make_train_only(root: Path) -> None:
    paint(root / "train" / "good" / "0.png")


def make_dangling(root: Path) -> None:
    paint(root / "a" / "0.png")
    (root / "a" / "1.png").symlink_to(root / "nowhere.png")


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (make_nothing, ("is not a folder",)),
        (make_flat, ("has no class folders", "<class>/*.png", "test/<defect>")),
        (make_empty_class, ("/images/b has no images", "add some or remove it")),
        (make_train_only, ("/images/train has no images", "both train and test")),
        (make_dangling, ("/images/a/1.png cannot be read", "repair or remove it")),
    ],
)
def test_a_folder_of_the_wrong_layout_is_explained(
    tmp_path: Path, make: Callable[[Path], None], parts: tuple[str, ...]
) -> None:
    make(tmp_path / "images")
    with one_line(*parts):
        folder_of(tmp_path).load()
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"name": 2024}, "dataset.name=2024 becomes a file name: give a text"),
        ({"name": "a/b"}, "dataset.name='a/b'"),
        ({"name": ""}, "dataset.name=''"),
        ({"name": "x", "size": 0}, "dataset.size=0"),
        ({"name": "x", "size": "big"}, "dataset.size=big: give the side"),
        ({"name": "x", "channels": 2}, "dataset.channels=2"),
        ({"name": "x", "skip_broken": "no"}, "dataset.skip_broken=no: give true or false"),
    ],
)
def test_impossible_options_are_refused(tmp_path: Path, options: dict[str, Any], part: str) -> None:
    with one_line(part):
        ImageFolder(data_dir=tmp_path, path=tmp_path, **options)


def test_a_folder_never_takes_over_a_file_that_is_not_its_cache(tmp_path: Path) -> None:
    paint(tmp_path / "images" / "a" / "0.png")
    dataset = folder_of(tmp_path)
    dataset.cache.parent.mkdir()
    np.savez(dataset.cache, **random_arrays())
    with one_line("a file of your own", "another dataset.name"):
        dataset.load()
    os.replace(Digits(data_dir=tmp_path / "data", name="other").download(), dataset.cache)
    with one_line("was written by the reader Digits, not by ImageFolder", "another dataset.name"):
        dataset.load()


# ---- npz files


def npz(tmp_path: Path) -> NPZ:
    return NPZ(data_dir=tmp_path / "data", name="mine", path=tmp_path / "mine.npz")


def test_an_npz_is_read_in_place(tmp_path: Path) -> None:
    arrays = random_arrays(channels=1, size=9)
    add_superclass(arrays)
    arrays["labels"] = arrays["labels"].astype(np.uint8)
    np.savez_compressed(tmp_path / "mine.npz", **arrays, notes=np.array("other keys are ignored"))
    images = npz(tmp_path).load()
    assert images.name == "mine" and images.sha256 == images_of(arrays).sha256
    assert images.labels.dtype == np.int64 and images.superclass == images.class_names
    change_pixel(arrays)
    np.savez(tmp_path / "mine.npz", **arrays)
    assert npz(tmp_path).load().sha256 == images_of(arrays).sha256
    assert leftovers(tmp_path) == ["mine.npz"]


def test_a_cache_can_be_read_as_an_npz(tmp_path: Path) -> None:
    digits = Digits(data_dir=tmp_path)
    assert NPZ(data_dir=tmp_path, name="d", path=digits.download()).load().sha256 == PINNED[Digits]


@pytest.mark.parametrize(
    ("key", "change", "said"),
    [
        ("images", None, "it has no images"),
        ("is_test", None, "it has no is_test"),
        ("images", lambda a: a / np.float32(255), "images must be uint8 from 0 to 255, not float32"),
        ("images", lambda a: a.transpose(0, 2, 3, 1), "images.transpose(0, 3, 1, 2)"),
        ("images", lambda a: a[:, 0], "images[:, None]"),
        ("images", lambda a: a[:0], "not be empty"),
        ("labels", lambda a: a[1:], "labels must be integers of the shape (40,)"),
        ("labels", lambda a: a.astype(float), "labels must be integers"),
        ("labels", lambda a: np.where(np.arange(40) == 7, 10, a), "labels[7] is 10"),
        ("labels", lambda a: np.where(np.arange(40) == 7, -1, a), "labels[7] is -1"),
        ("is_test", lambda a: a.astype(int), "is_test must be bool"),
        ("class_names", lambda a: np.arange(10), "class_names must be a list of different strings"),
        ("class_names", lambda a: np.array(["same"] * 10), "different strings"),
        ("class_names", lambda a: a.astype(object), "damaged or unreadable"),
        ("superclass", lambda a: np.array(["one"]), "one string for each of the 10 class_names"),
    ],
)
def test_an_npz_of_another_format_is_explained(
    tmp_path: Path, key: str, change: Callable[[np.ndarray], np.ndarray] | None, said: str
) -> None:
    arrays = random_arrays()
    if change is None:
        del arrays[key]
    else:
        arrays[key] = change(arrays.get(key, np.empty(0)))
    np.savez(tmp_path / "mine.npz", **arrays)
    with one_line(str(tmp_path / "mine.npz"), said, "docs/datasets.md"):
        npz(tmp_path).load()


def test_a_file_that_is_no_npz_is_explained(tmp_path: Path) -> None:
    for call in (npz(tmp_path).load, npz(tmp_path).download):
        with one_line("mine.npz is not there", "images, labels, is_test, class_names"):
            call()
    (tmp_path / "mine.npz").write_text("hello")
    with one_line("mine.npz is damaged or unreadable"):
        npz(tmp_path).load()
    with open(tmp_path / "mine.npz", "wb") as file:
        np.save(file, np.zeros(3))
    with one_line("mine.npz is damaged or unreadable"):
        npz(tmp_path).load()


# ---- damaged caches, full disks, several processes


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # amid the pixels, which are most of the file
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize("damage", [flip, cut])
def test_a_damaged_cache_is_not_read(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    dataset = Digits(data_dir=tmp_path)
    damage(dataset.download())
    for call in (dataset.load, dataset.check, dataset.download):
        with one_line(f"{dataset.cache} is damaged", "delete it and run `anomaly-lab-data download digits`"):
            call()


def test_check_finds_content_that_does_not_match_the_recorded_checksum(tmp_path: Path) -> None:
    dataset = Digits(data_dir=tmp_path)
    with np.load(dataset.download()) as file:
        arrays = dict(file)
    arrays["labels"][0] = 9
    np.savez(dataset.cache, **arrays)
    with one_line(f"{dataset.cache} is damaged", PINNED[Digits], "delete it and run"):
        dataset.check()


@contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """No file may grow beyond size: a write then fails half-way, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def full_at_the_end() -> Iterator[None]:
    """The disk turns out to be full only when the file is flushed to it."""

    def fsync(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        yield


@pytest.mark.parametrize(
    ("full", "reason"),
    [(lambda: files_limited_to(50_000), "File too large"), (full_at_the_end, "No space left on device")],
    ids=["amid the write", "at the end"],
)
def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, full: Callable[[], Any], reason: str) -> None:
    dataset = Digits(data_dir=tmp_path)
    with (
        one_line("digits.npz could not be written", reason, "make room for 1 MB", "ANOMALY_LAB_DATA"),
        full(),
    ):
        dataset.load()
    assert leftovers(tmp_path) == []
    assert dataset.load().sha256 == PINNED[Digits]


def test_a_full_disk_during_a_torchvision_download_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import utils

    def full(url: str, path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(utils, "_get_redirect_url", lambda url, max_hops: url)
    monkeypatch.setattr(utils, "_urlretrieve", full)
    with one_line("No space left on device", f"make room in {tmp_path}"):
        CIFAR10(data_dir=tmp_path).load()


def test_a_data_dir_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with one_line("cannot be written to", "set data_dir (or ANOMALY_LAB_DATA)"):
        Digits(data_dir=tmp_path / "file" / "data").load()


def test_processes_that_make_the_same_cache_at_once_all_get_it(tmp_path: Path) -> None:
    for i in range(300):
        paint(tmp_path / "images" / f"c{i % 3}" / f"{i}.png", (i % 256, i // 256, 0), size=(40, 40))
    script = (
        "import sys; from anomaly_lab.datasets import ImageFolder; "
        "print(ImageFolder(data_dir=sys.argv[1], name='mine', path=sys.argv[2]).load().sha256)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "data"), str(tmp_path / "images")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=CONF.parents[1]) for _ in range(2)]
    found = {process.communicate(timeout=120)[0].strip() for process in running}
    assert [process.returncode for process in running] == [0, 0]
    assert found == {folder_of(tmp_path).load().sha256}
    assert leftovers(tmp_path / "data") == ["mine.npz"]


def test_the_rename_alone_keeps_a_cache_whole_where_there_are_no_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    dataset, decode = Digits(data_dir=tmp_path), Digits.decode

    def decode_while_another_finishes(self: Digits) -> Images:
        monkeypatch.setattr(Digits, "decode", decode)
        Digits(data_dir=tmp_path).load()
        return decode(self)

    monkeypatch.setattr(Digits, "decode", decode_while_another_finishes)
    with pytest.warns(UserWarning, match="cannot be locked"):
        dataset.load()
    assert leftovers(tmp_path) == ["digits.npz"] and PINNED[Digits] in dataset.check()


# ---- configs


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_builds_its_reader(path: Path, tmp_path: Path) -> None:
    config = yaml.safe_load(path.read_text())
    reader = getattr(datasets, config.pop("_target_").removeprefix("anomaly_lab.datasets."))
    assert config["data_dir"] == "${data_dir}" and (reader.config == path.stem or reader is NPZ)
    own = {key for key, value in config.items() if value == "???"}
    assert own == ({"name", "path"} if path.stem in ("image_folder", "npz") else set())
    given = {key: "mine" if key in own else value for key, value in config.items()}
    dataset: Dataset = reader(**given | {"data_dir": tmp_path})
    defaults = {field.name: field.default for field in dataclasses.fields(dataset)}
    for key in config.keys() - own - {"data_dir"} - ({"name", "path"} if reader is NPZ else set()):
        assert config[key] == defaults[key], f"{path.name} and the class differ in {key}"
    assert own or dataset.name == path.stem


def test_the_download_command_repeats_what_was_changed(tmp_path: Path) -> None:
    dataset = ImageFolder(data_dir=tmp_path, name="mine", path="my images", size=64)
    assert dataset.download_command == (
        "anomaly-lab-data download image_folder dataset.name=mine 'dataset.path=my images' dataset.size=64"
    )
    assert COIL100(data_dir=tmp_path).download_command == "anomaly-lab-data download coil100"


# ---- the real sets


@pytest.mark.data
@pytest.mark.parametrize("reader", [MNIST, FashionMNIST])
def test_the_original_idx_files_give_the_pinned_set(tmp_path: Path, data_dir: Path, reader: Any) -> None:
    folder = Path(reader.folder).parts[0]
    if not (data_dir / folder).is_dir():
        pytest.skip(f"{data_dir} has no {folder}")
    (tmp_path / folder).symlink_to(data_dir / folder)
    images = reader(data_dir=tmp_path).load()
    assert images.pixels.shape == (70000, 1, 28, 28) and images.is_test.sum() == 10000
    assert images.sha256 == PINNED[reader] == reader.published


@pytest.mark.data
def test_packed_cifar10_and_shuffled_torchvision_files_are_the_pinned_set(
    tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not (data_dir / "cifar10.npz").is_file():
        pytest.skip(f"{data_dir} has no cifar10.npz")
    from torchvision.datasets import cifar

    packed = CIFAR10(data_dir=data_dir).load()
    assert packed.sha256 == PINNED[CIFAR10] == CIFAR10.published
    with np.load(data_dir / "cifar10.npz") as file:
        arrays = dict(file)
    write_cifar(tmp_path / CIFAR10.folder, arrays, np.random.default_rng(0).permutation(60000))
    monkeypatch.setattr(cifar, "check_integrity", lambda path, md5=None: Path(path).is_file())
    decoded = CIFAR10(data_dir=tmp_path).load()
    assert decoded.sha256 == packed.sha256 and decoded.class_names == packed.class_names
    assert np.array_equal(decoded.pixels, packed.pixels)
    assert CIFAR10(data_dir=tmp_path).load().sha256 == packed.sha256
    shutil.rmtree(tmp_path)  # pytest would keep these 370 MB for three runs


@pytest.mark.data
@pytest.mark.parametrize(
    ("reader", "shape", "said"),
    [
        (CIFAR100, (3, 32, 32), "10000 test images"),
        (COIL100, (3, 32, 32), "7200 images of 3x32x32, 100 classes, no test half"),
    ],
)
def test_packed_sets_are_accepted(data_dir: Path, reader: Any, shape: tuple[int, ...], said: str) -> None:
    if not (data_dir / f"{reader.config}.npz").is_file():
        pytest.skip(f"{data_dir} has no {reader.config}.npz")
    dataset = reader(data_dir=data_dir)
    images = dataset.load()
    assert images.pixels.shape[1:] == shape and len(images.class_names) == 100
    assert said in dataset.check()
    if images.superclass is not None:
        assert len(set(images.superclass)) == 20
    else:
        assert images.class_names == tuple(f"obj{n}" for n in range(1, 101))
