"""A finished run as a detector for new images: arrays and image files.

Legend of the shape comments: N images, B of them in a batch, C channels, H×W as stored, S×S as the network sees them.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from anomaly_lab import record
from anomaly_lab.errors import shortened
from anomaly_lab.files import cell, write_atomically
from anomaly_lab.pictures import IMAGE_SUFFIXES, Unreadable, open_image, unreadable

# torch and Lightning take seconds to import: they come with the first run that is loaded, not with --help.
if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from anomaly_lab.data import Prepare
    from anomaly_lab.detector import Detector

NO_THRESHOLD = (
    "this run held out too few normal images for a threshold (20 are needed): make it again with a larger "
    "split.val_share"
)

FILES_AT_ONCE = 256


@dataclass(frozen=True)
class FittedDetector:
    """A fitted detector, ready to score new images. Made by `load_run`.

    Arrays of images are uint8 in the layout (N,H,W), (N,H,W,C) or (N,C,H,W), of the channels and the size that the
    run's data set is stored in; `read` brings image files there. Anything else is a ValueError.

    Attributes:
        detector: the networks, in eval mode on ``device``. prepare: the run's preprocessing.
        result: the run's ``result.json``.
    """

    detector: Detector
    prepare: Prepare
    result: dict[str, Any]
    device: torch.device

    @property
    def threshold(self) -> float | None:
        """Scores above it are called anomalous; from held-out normals, None where those were too few."""
        threshold: float | None = self.result["metrics"]["threshold"]
        return threshold

    @property
    def stored_shape(self) -> tuple[int, int, int]:
        """(C,H,W) of the run's data set."""
        channels, height, width = self.result["stored_shape"]
        return channels, height, width

    def score(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Anomaly scores float32 (N,), raw as in the run's ``scores.npz``; higher is more anomalous.

        Raises:
            ValueError: a score is not finite: the weights are not, or an image is like none that it was trained on.
        """
        found = self._each(self.detector.score, images)
        if found is not None and not np.isfinite(found).all():
            first = int(np.argmin(np.isfinite(found)))
            raise ValueError(f"the score of image {first} is {found[first]}: the weights in last.ckpt may be damaged")
        return np.zeros(0, np.float32) if found is None else found.astype(np.float32, copy=False)

    def decide(self, images: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """Which images are called anomalous, bool (N,): by the method's own rule, or by the threshold from normals.

        Raises:
            ValueError: the method has no rule of its own and the run had too few held-out normals for a threshold.
        """
        decided = self.decisions(images, self.score(images))
        if decided is None:
            raise ValueError(f"use score(): {NO_THRESHOLD}")
        return decided

    def anomaly_map(self, images: NDArray[np.uint8]) -> NDArray[np.float32] | None:
        """Anomaly map of each image, float32 (N,S,S), at the network's size; None if the method has none."""
        found = self._each(self.detector.anomaly_map, images)
        return None if found is None else found.astype(np.float32, copy=False)

    def read(self, paths: Sequence[str | Path], broken: list[Unreadable] | None = None) -> NDArray[np.uint8]:
        """Image files as uint8 (N,C,H,W): in the colours of the run's data set, stretched to its size if that is
        square.

        Done as by `anomaly_lab.datasets.ImageFolder`; orientation tags are obeyed, transparency is ignored.

        Args:
            broken: takes what is wrong with files that are no readable 8-bit images, or of another size than a data set
                that is not square; they are then left out.

        Raises:
            ValueError: there are such files and no ``broken``; all of them are named.
        """
        channels, height, width = self.stored_shape
        images, faults = [np.empty((0, channels, height, width), np.uint8)], list[Unreadable]()
        for path in paths:
            try:
                image = open_image(path, str(path), channels, height if height == width else None)
                if image.shape[1:] != (height, width):  # only where the data set itself is not square
                    has = f"it has {image.shape[2]}x{image.shape[1]} pixels, the run's images {width}x{height}"
                    raise Unreadable(str(path), has)
                images.append(image[None])
            except Unreadable as fault:
                faults.append(fault)
        if broken is not None:
            broken += faults
        elif faults:
            raise unreadable(faults, len(paths), "--skip-broken, or a list for broken")
        return np.concatenate(images)

    def displayable(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """The images as the network sees them, in [0, 1], float32 (N,C,S,S): what `anomaly_map` lies over."""
        return self._prepared(images, self.prepare.displayable)

    def prepared(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """The images in the range that the run trained on, float32 (N,C,S,S): what an exported file takes."""
        return self._prepared(images, lambda x: x)

    def _prepared(self, images: NDArray[np.uint8], then: Callable[[Tensor], Tensor]) -> NDArray[np.float32]:
        found = self._each(then, images, self.prepare.image)
        size = self.prepare.size
        empty = np.zeros((0, self.prepare.channels or self.stored_shape[0], size, size), np.float32)
        return empty if found is None else found

    def decisions(self, images: NDArray[np.uint8], scores: NDArray[np.float32]) -> NDArray[np.bool_] | None:
        """As `decide`, of images with these ``scores``; None where there is neither a rule nor a threshold."""
        own = self._each(self.detector.decide, images)
        if own is not None:
            return own.astype(np.bool_, copy=False)
        # In float64, as `anomaly_lab.metrics` compares them: a score at the threshold is normal there and here.
        return None if self.threshold is None else scores.astype(np.float64) > self.threshold

    def _each(
        self,
        function: Callable[[Tensor], Tensor | None],
        images: NDArray[np.uint8],
        prepare: Callable[[Tensor], Tensor] | None = None,
    ) -> NDArray[Any] | None:
        """``function`` of the prepared images, batch by batch; None if it gives None, or if there are no images."""
        import torch

        from anomaly_lab.switches import numerics

        found = []
        with torch.no_grad(), numerics(self.result["config"]["trainer"]["precision"]):
            for pixels in self._batches(images):
                values = function((prepare or self.prepare)(pixels))
                if values is None:
                    return None
                values = values.detach().cpu()
                found.append((values.float() if values.is_floating_point() else values).numpy())
        return np.concatenate(found) if found else None

    def _batches(self, images: NDArray[np.uint8]) -> Iterator[Tensor]:
        """uint8 (B,C,H,W) on the device."""
        import torch

        from anomaly_lab.data import scored_at_once

        images = np.asarray(images)
        shape, given = self.stored_shape, images.shape
        if images.ndim == 3 and shape[0] == 1:
            images = images[:, None]
        elif images.ndim == 4 and images.shape[1:] != shape:
            images = images.transpose(0, 3, 1, 2)
        if images.dtype != np.uint8 or images.shape[1:] != shape:
            channels, height, width = shape
            grey = f"(N,{height},{width}), " if channels == 1 else ""
            raise ValueError(
                f"this run wants uint8 images of {grey}(N,{height},{width},{channels}) or {('N', *shape)}, "
                f"not {images.dtype} {given}; read() brings image files there".replace("'", "")
            )
        at_once = scored_at_once(self.device)
        for start in range(0, len(images), at_once):
            pixels = torch.from_numpy(np.ascontiguousarray(images[start : start + at_once]))
            yield pixels.to(self.device)


def load_run(
    path: str | Path, device: str = "cpu", data_dir: str | Path | None = None, trust: Sequence[str] = ()
) -> FittedDetector:
    """The detector that the finished run in the folder ``path`` fitted.

    The folder is data, whoever it came from: of all that its configuration names, only the detector is made, and only
    by classes of this package and of modules in ``trust`` (docs/security.md).

    Args:
        data_dir: where pretrained weights from the run's ``data_dir`` lie now, if no longer there; their checksums
            are compared all the same.
        trust: modules or packages of your own, such as ``my_methods``, whose classes may be called too.

    Raises:
        ValueError: the folder holds no finished run, or a damaged one, or names something that is not trusted; there is
            no such device, or pretrained weights are not where they were.
    """
    folder = Path(path)
    if not (folder / "result.json").is_file():
        raise ValueError(f"{folder} holds no finished run: give the folder with its result.json and last.ckpt")
    result = record.read(folder, scored=False)

    from omegaconf.errors import OmegaConfBaseException

    try:
        return _loaded(folder, result, device, data_dir, trust)
    # A ValueError says what to do itself; these say that something is not there, or is of another kind.
    except (KeyError, TypeError, AttributeError, OmegaConfBaseException) as error:
        raise ValueError(
            f"{folder / 'result.json'} is damaged, or of other code ({type(error).__name__}: {shortened(error)})"
        ) from error


def _loaded(
    folder: Path, result: dict[str, Any], device: str, data_dir: str | Path | None, trust: Sequence[str]
) -> FittedDetector:
    if members := result["config"]["model"].get("members"):
        raise ValueError(
            f"{folder} adds up what the runs of model.members={str(members)[:200]} scored and has no detector of its "
            "own: give the folder of one of them"
        )
    if not (folder / "last.ckpt").is_file():
        raise ValueError(f"{folder} has lost its last.ckpt: delete its result.json and start the run again")

    from hydra.errors import InstantiationException
    from omegaconf import DictConfig

    from anomaly_lab.build import load_checkpoint, make_networks, make_prepare
    from anomaly_lab.trust import refuse_untrusted

    where = _device(device)
    config = result["config"]
    if data_dir is not None:
        config = config | {"model": _moved(config["model"], Path(config["data_dir"]), Path(data_dir))}
    refuse_untrusted(config["model"], trust, str(folder / "result.json"))
    cfg = DictConfig(config)
    try:
        detector = make_networks(cfg, result["image_shape"])
    except InstantiationException as error:
        if not isinstance(error.__cause__, ValueError):
            raise ValueError(f"{folder / 'result.json'}: its detector cannot be made ({shortened(error)})") from error
        hint = " (where that was in the run's data_dir: name today's with data_dir or --data-dir)"
        raise ValueError(f"{error.__cause__}{hint * ('.path=' in str(error.__cause__))}") from error
    try:
        checkpoint = load_checkpoint(folder / "last.ckpt")
        if other := record.other(checkpoint.get("identity", result["identity"]), result["identity"]):
            raise RuntimeError(f"it is of another run, {other}")
        detector.on_load_checkpoint(checkpoint)
        detector.load_state_dict(checkpoint["state_dict"])
        if int(detector.epochs_done) != result["epochs"]:
            raise RuntimeError(f"it is of epoch {int(detector.epochs_done)}, the result of epoch {result['epochs']}")
    # torch raises RuntimeError, UnpicklingError, EOFError or KeyError, as the damage (or a changed method) wants it.
    except Exception as error:
        raise ValueError(f"{folder / 'last.ckpt'} does not fit this version of {result['identity']['model']}, or is "
                         f"damaged ({type(error).__name__}: {shortened(error)})") from error  # fmt: skip
    made = FittedDetector(detector.to(where).eval(), make_prepare(cfg), result, where)
    _ = made.stored_shape, made.threshold, config["trainer"]["precision"]  # what scoring asks for: here, not there
    return made


def _moved(section: Any, old: Path, new: Path) -> Any:
    """The configuration ``section`` with every ``path`` inside the folder ``old`` brought to ``new``."""
    if not isinstance(section, dict):
        return section
    found = {key: _moved(value, old, new) for key, value in section.items()}
    if isinstance(found.get("path"), str) and Path(found["path"]).is_relative_to(old):
        found["path"] = str(new / Path(found["path"]).relative_to(old))
    return found


def _device(name: str) -> torch.device:
    import torch

    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise ValueError(f"device {name} cannot be used here ({shortened(error)}): try cpu") from error
    return device


def image_files(given: Sequence[Path]) -> list[Path]:
    """The image files among ``given`` and, sorted, in all folders below; hidden ones are left out.

    Raises:
        ValueError: nothing of that name, or no images.
    """
    files: list[Path] = []
    for path in given:
        if path.is_dir():
            inside = (p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))
            files += sorted(p for p in inside if p.is_file())
        elif path.is_file():
            files.append(path)
        else:
            raise ValueError(f"{path} is neither a file nor a folder")
    if not files:
        raise ValueError(f"no images ({' '.join(sorted(IMAGE_SUFFIXES))}) in {', '.join(map(str, given))}")
    return files


def score_files(
    fitted: FittedDetector,
    files: Sequence[Path],
    out: Path,
    heat_maps: Path | None = None,
    *,
    skip_broken: bool = False,
) -> list[Unreadable]:
    """Write the CSV ``out``: image, score and decision of each of ``files``; heat maps as PNGs into ``heat_maps``.

    Returns what was left out: with ``skip_broken`` the files that are no readable images.

    Raises:
        ValueError: files that are no readable images, all of them named; or heat maps of a method that has none.
    """
    broken = list[Unreadable]()

    def write(file: IO[bytes]) -> None:  # opened first: what cannot be written is said before all images are scored
        rows = [("image", "score", "decision")]
        for start in range(0, len(files), FILES_AT_ONCE):
            images = fitted.read(files[start : start + FILES_AT_ONCE], broken)
            if broken and not skip_broken:
                continue  # to name the others
            left_out = {fault.where for fault in broken}
            some = [path for path in files[start : start + FILES_AT_ONCE] if str(path) not in left_out]
            scores = fitted.score(images)
            decided = fitted.decisions(images, scores)
            words = [""] * len(some) if decided is None else np.where(decided, "anomalous", "normal").tolist()
            lines = zip(some, scores, words, strict=True)
            rows += [(cell(str(path)), f"{score:.9g}", word) for path, score, word in lines]
            if heat_maps is not None:
                _draw_heat_maps(fitted, some, images, scores, heat_maps, start)
        if broken and (not skip_broken or len(rows) == 1):
            raise unreadable(broken, len(files), "" if skip_broken else "--skip-broken")
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        file.write(text.getvalue().encode())

    write_atomically(out, write)
    return broken


def _draw_heat_maps(
    fitted: FittedDetector,
    files: Sequence[Path],
    images: NDArray[np.uint8],
    scores: NDArray[np.float32],
    folder: Path,
    start: int,
) -> None:
    """One PNG an image, numbered from ``start`` in the order of the CSV: names may repeat in different folders."""
    from anomaly_lab import figures

    maps = fitted.anomaly_map(images)
    if maps is None:
        raise ValueError(f"{fitted.result['identity']['model']} has no anomaly map: leave --heat-maps out")
    shown = fitted.displayable(images)
    for i, (file, score) in enumerate(zip(files, scores, strict=True)):
        figure = figures.heat_map_overlay(shown[i], maps[i], f"{file.name}: {score:.4g}")
        figures.save(figure, folder / f"{start + i:05d}_{file.stem}.png")
