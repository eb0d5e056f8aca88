"""Draw docs/why_scattering.png: which deformations of a normal image move a run's score, and which do not.

anomaly-lab -m model=scatter_subspace,knn dataset=mnist split=official normal_class=8
python docs/why_scattering.py runs/scatter_subspace/mnist/official/n8/s0 runs/knn/mnist/official/n8/s0
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy import ndimage

from anomaly_lab import figures
from anomaly_lab.config import load_images
from anomaly_lab.predict import load_run

IMAGES = 100
"""Normal test images that are deformed: the first ones in canonical order, whatever their score."""


def shifted(image: np.ndarray, pixels: float) -> np.ndarray:
    return ndimage.shift(image, (0, pixels), order=1)


def turned(image: np.ndarray, degrees: float) -> np.ndarray:
    return ndimage.rotate(image, degrees, reshape=False, order=1)


def thickened(image: np.ndarray, amount: float) -> np.ndarray:
    """Between the image and its dilation by a pixel, or, below 0, its erosion."""
    other = (ndimage.grey_dilation if amount > 0 else ndimage.grey_erosion)(image, (3, 3))
    return (1 - abs(amount)) * image + abs(amount) * other


def dimmed(image: np.ndarray, factor: float) -> np.ndarray:
    return image * factor


def noisy(image: np.ndarray, sigma: float) -> np.ndarray:
    return image + np.random.RandomState(0).randn(*image.shape) * sigma


def cut(image: np.ndarray, rows: float) -> np.ndarray:
    """So many rows in the middle of the image black: another shape."""
    middle, half = len(image) // 2, int(rows) // 2
    other = image.copy()
    other[middle - half : middle - half + int(rows)] = 0
    return other


DEFORMATIONS: dict[str, tuple[Callable[[np.ndarray, float], np.ndarray], list[float]]] = {
    "shift, pixels": (shifted, [0, 1, 2, 3, 4]),
    "rotation, degrees": (turned, [0, 5, 10, 20, 30]),
    "stroke: eroded to dilated": (thickened, [-0.8, -0.4, 0, 0.4, 0.8]),
    "contrast": (dimmed, [1, 0.8, 0.6, 0.4, 0.2]),
    "noise, grey levels": (noisy, [0, 5, 10, 20, 40]),
    "rows cut out": (cut, [0, 1, 2, 4, 6]),
}


def draw(runs: list[Path], out: Path) -> None:
    """The share of deformed normal images above each run's threshold; beside it, how many anomalies are above it."""
    fitted = [load_run(run) for run in runs]
    found = [np.load(run / "scores.npz") for run in runs]
    from omegaconf import DictConfig

    images = load_images(DictConfig(fitted[0].result["config"]))
    normal = images.pixels[found[0]["index"][found[0]["truth"] == 0][:IMAGES], 0]
    figure = Figure(figsize=(13, 5.2), layout="constrained")
    axes = figure.subplots(2, len(DEFORMATIONS), height_ratios=[1, 2.2])
    for column, (name, (deform, amounts)) in enumerate(DEFORMATIONS.items()):
        stacks = [
            np.stack([deform(image.astype(float), amount) for image in normal]).clip(0, 255).round().astype(np.uint8)
            for amount in amounts
        ]
        axes[0, column].imshow(np.hstack([stack[0] for stack in stacks[:: len(stacks) - 1]]), cmap="gray")
        axes[0, column].set_axis_off()
        axes[0, column].set_title(f"{name}\n{amounts[0]:g} and {amounts[-1]:g}", fontsize=9)
        for number, detector in enumerate(fitted):
            assert detector.threshold is not None
            shares = [float((detector.score(stack) > detector.threshold).mean()) for stack in stacks]
            label = detector.result["identity"]["model"]
            axes[1, column].plot(amounts, shares, marker="os"[number % 2], color=figures.PALETTE[number], label=label)
            missed = found[number]["score"][found[number]["truth"] == 1] > detector.threshold
            axes[1, column].axhline(missed.mean(), color=figures.PALETTE[number], linewidth=0.8, linestyle=":")
            print(f"{label:18} {name:28} {amounts} -> {[round(share, 2) for share in shares]}")
        axes[1, column].set(ylim=(-0.02, 1.02), xlabel=name)
        axes[1, column].tick_params(labelleft=column == 0)
    axes[1, 0].set_ylabel("share called anomalous\n(dotted: of the real anomalies)")
    axes[1, 0].legend(frameon=False, fontsize=8)
    figures.save(figure, out)


if __name__ == "__main__":
    draw([Path(word) for word in sys.argv[1:]], Path(__file__).with_suffix(".png"))
