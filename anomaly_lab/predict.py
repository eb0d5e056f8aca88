"""A finished run as a detector for new images: arrays, image files, and the console command ``anomaly-lab-score``.

Legend of the shape comments: N images, C channels, H×W pixels as given, S×S as the network sees them.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import OmegaConf
from torch import Tensor

from anomaly_lab.data import Prepare
from anomaly_lab.detector import Detector
from anomaly_lab.run import make_detector, make_prepare, write_whole

BATCH = 256


class FittedDetector:
    """What a run learned, ready for images it has never seen. Made by `load_run`.

    Attributes:
        detector: the network, in eval mode. prepare: its preprocessing. result: the run's ``result.json``.
        threshold: scores above it are called anomalous; from held-out normals, None where there were too few.
    """

    def __init__(self, detector: Detector, prepare: Prepare, result: dict[str, Any], device: torch.device) -> None:
        self.detector = detector.to(device).eval()
        self.prepare, self.result, self.device = prepare, result, device
        self.threshold: float | None = result["metrics"]["threshold"]

    def score(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Anomaly scores (N,), higher is more anomalous, of uint8 images (N,H,W), (N,H,W,3) or (N,C,H,W).

        Raises:
            ValueError: another dtype or shape, or colour where the run saw grey and the like.
        """
        scores = [self.detector.score(x).detach().float().cpu() for x in self._batches(images)]
        return torch.cat(scores).numpy() if scores else np.zeros(0, np.float32)

    def decide(self, images: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """Which images (N,) are called anomalous: by the method's own rule, or by the threshold from normals.

        Raises:
            ValueError: the method has no rule of its own and the run had too few held-out normals for a threshold.
        """
        own = [self.detector.decide(x) for x in self._batches(images)]
        if own and own[0] is not None:
            return torch.cat([decided for decided in own if decided is not None]).cpu().numpy()
        if self.threshold is None:
            raise ValueError("this run held out fewer than 20 normal images, too few for a threshold: use score()")
        return self.score(images) > self.threshold

    def anomaly_map(self, images: NDArray[np.uint8]) -> NDArray[np.float32] | None:
        """Where each image looks anomalous, (N,S,S) at the network's resolution; None if the method cannot say."""
        maps = [self.detector.anomaly_map(x) for x in self._batches(images)]
        found = [one.detach().float().cpu() for one in maps if one is not None]
        return torch.cat(found).numpy() if found else None

    def read(self, paths: Sequence[str | Path]) -> NDArray[np.uint8]:
        """Image files as uint8 (N,C,H,W), in the colour and the size of the run's data set.

        Raises:
            ValueError: a file that is no readable image, named.
        """
        from PIL import Image, UnidentifiedImageError

        channels, height, width = self.result["stored_shape"]
        images = []
        for path in paths:
            try:
                with Image.open(path) as image:
                    # Like the folder reader: the data set's size by box-filtered reduction or bilinear enlargement.
                    converted = image.convert("L" if channels == 1 else "RGB")
                    if converted.size != (width, height):
                        smaller = converted.width >= width and converted.height >= height
                        filter_ = Image.Resampling.BOX if smaller else Image.Resampling.BILINEAR
                        converted = converted.resize((width, height), filter_)
                    pixels = np.asarray(converted)
            except (OSError, UnidentifiedImageError) as error:
                raise ValueError(f"{path} is not a readable image: {error}") from error
            images.append(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))
        return np.stack(images) if images else np.zeros((0, channels, height, width), np.uint8)

    def _batches(self, images: NDArray[np.uint8]) -> Iterator[Tensor]:
        if images.dtype != np.uint8 or images.ndim not in (3, 4):
            raise ValueError(f"give uint8 images of (N,H,W), (N,H,W,3) or (N,C,H,W), not {images.dtype} {images.shape}")
        if images.ndim == 3:
            images = images[:, None]
        elif images.shape[1] not in (1, 3) and images.shape[-1] in (1, 3):
            images = images.transpose(0, 3, 1, 2)
        expected = self.detector.image_shape[0]
        for start in range(0, len(images), BATCH):
            x = self.prepare(torch.from_numpy(np.ascontiguousarray(images[start : start + BATCH])).to(self.device))
            if x.shape[1] != expected:
                raise ValueError(f"this run saw images of {expected} channel(s), these have {x.shape[1]}")
            with torch.no_grad():
                yield x


def load_run(path: str | Path, device: str = "cpu") -> FittedDetector:
    """The detector that the finished run in the folder ``path`` fitted.

    Raises:
        ValueError: the folder holds no finished run.
    """
    folder = Path(path)
    if not (folder / "result.json").is_file() or not (folder / "last.ckpt").is_file():
        raise ValueError(f"{folder} holds no finished run: give a folder with result.json and last.ckpt")
    result = json.loads((folder / "result.json").read_text())
    cfg = OmegaConf.create(result["config"])
    assert OmegaConf.is_dict(cfg)
    detector = make_detector(cfg, result["image_shape"])
    checkpoint = torch.load(folder / "last.ckpt", map_location="cpu", weights_only=True)
    detector.on_load_checkpoint(checkpoint)
    detector.load_state_dict(checkpoint["state_dict"])
    return FittedDetector(detector, make_prepare(cfg), result, torch.device(device))


def main(argv: Sequence[str] | None = None) -> int:
    """``anomaly-lab-score RUN IMAGES...``: a CSV of scores and decisions, and heat maps on request."""
    parser = argparse.ArgumentParser(prog="anomaly-lab-score", description="Score image files with a finished run.")
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("images", nargs="+", type=Path, help="image files, or folders of them")
    parser.add_argument("--out", type=Path, default=Path("scores.csv"), help="the CSV to write (default: scores.csv)")
    parser.add_argument("--heat-maps", type=Path, metavar="DIR", help="also write a heat map of every image there")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    arguments = parser.parse_args(argv)
    try:
        return _score_files(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm"}


def _files(given: Sequence[Path]) -> list[Path]:
    files: list[Path] = []
    for path in given:
        if path.is_dir():
            files += sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        elif path.is_file():
            files.append(path)
        else:
            raise ValueError(f"{path} is neither a file nor a folder")
    if not files:
        raise ValueError(f"no image files in {', '.join(map(str, given))}")
    return files


def _score_files(arguments: argparse.Namespace) -> int:
    from anomaly_lab import figures

    fitted = load_run(arguments.run, arguments.device)
    files = _files(arguments.images)
    rows = []
    for start in range(0, len(files), BATCH):
        some = files[start : start + BATCH]
        images = fitted.read(some)
        scores = fitted.score(images)
        decided: Sequence[Any] = [""] * len(some)
        if fitted.threshold is not None:
            decided = ["anomalous" if one else "normal" for one in fitted.decide(images)]
        rows += [[str(path), f"{score:.6g}", word] for path, score, word in zip(some, scores, decided, strict=True)]
        if arguments.heat_maps is not None:
            maps = fitted.anomaly_map(images)
            if maps is None:
                raise ValueError(f"{fitted.result['identity']['model']} has no anomaly map: leave --heat-maps out")
            shown = fitted.prepare.displayable(fitted.prepare(torch.from_numpy(images))).numpy()
            for position, path in enumerate(some):
                name = f"{start + position:05d}_{path.stem}.png"
                figure = figures.heat_map_overlay(
                    shown[position], maps[position], f"{path.name}: {scores[position]:.4g}"
                )
                figures.save(figure, arguments.heat_maps / name)

    def write(file: Any) -> None:
        import io

        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([["image", "score", "decision"], *rows])
        file.write(text.getvalue().encode())

    write_whole(arguments.out, write)
    print(f"{len(rows)} images scored: {arguments.out}")
    return 0
