"""Where `scatter_subspace` fails: its score taken apart, for every kind of anomaly, and the images that it mistakes.

anomaly-lab -m model=scatter_subspace dataset=cifar10 split=official 'normal_class=range(0,10)'
anomaly-lab model=scatter_subspace dataset=fashion_mnist split=official normal_class=Shirt
python docs/where_scattering_fails.py runs/scatter_subspace/cifar10/official/n*/s0
python docs/where_scattering_fails.py runs/scatter_subspace/fashion_mnist/official/n6/s0 \\
    runs/scatter_subspace/cifar10/official/n4/s0 --out docs/where_scattering_fails.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from omegaconf import DictConfig
from scipy import stats

from anomaly_lab import figures, metrics
from anomaly_lab.config import load_images
from anomaly_lab.methods.scatter_subspace import Metric, ScatterSubspace
from anomaly_lab.predict import FittedDetector, load_run

PER_CLASS = 250
"""Test images of each class whose score is taken apart: the first ones in canonical order, whatever their score."""

SHOWN = 8
"""Images at each end."""


def parts(fitted: FittedDetector, pixels: np.ndarray) -> dict[str, np.ndarray]:
    """Both summands of the squared distance to the mean, each (N,): along the axes of the metric and beyond them."""
    detector = fitted.detector
    assert isinstance(detector, ScatterSubspace)
    metric = Metric(detector.mean, detector.directions, detector.deviations, detector.beyond)
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    with torch.no_grad():
        for some in torch.from_numpy(pixels).split(50):
            place, rest = metric.place(fitted.prepare(some).flatten(1))
            found.append((place.square().sum(1), rest))
    along, beyond = (torch.cat(part).numpy() for part in zip(*found, strict=True))
    return {"along the axes": along, "beyond them": beyond}


def variation(pixels: np.ndarray) -> np.ndarray:
    """Mean absolute difference of neighbours in the mean of the channels: (N,C,H,W) -> (N,); low where it is smooth."""
    grey = pixels.mean(1)
    return np.abs(np.diff(grey, axis=1)).mean((1, 2)) + np.abs(np.diff(grey, axis=2)).mean((1, 2))


def draw(runs: list[Path], out: Path | None) -> None:
    """Print the AUROC of the score and of its parts; into ``out`` a row a run: AUROC by kind, and mistaken images."""
    figure = Figure(figsize=(13, 3.9 * len(runs)), layout="constrained")
    rows = figure.subfigures(len(runs), 1, squeeze=False)[:, 0]
    for run, row in zip(runs, rows, strict=True):
        fitted = load_run(run)
        images = load_images(DictConfig(fitted.result["config"]))
        with np.load(run / "scores.npz") as file:
            kept = dict(file)
        chosen = np.concatenate([np.flatnonzero(kept["label"] == one)[:PER_CLASS] for one in np.unique(kept["label"])])
        label, truth = kept["label"][chosen], kept["truth"][chosen]
        pixels = images.pixels[kept["index"][chosen]]
        found = {"score": kept["score"][chosen], **parts(fitted, pixels)}
        dataset, name = fitted.result["identity"]["dataset"], fitted.result["class_name"]
        says = ", ".join(f"{part} {metrics.auroc(values, truth):.3f}" for part, values in found.items())
        ties = {"what lies beyond": found["beyond them"], "total variation": variation(pixels)}
        ranks = ", ".join(f"{what} {stats.spearmanr(found['score'], values)[0]:.2f}" for what, values in ties.items())
        share = found["beyond them"].mean() / (found["along the axes"] + found["beyond them"]).mean()
        print(f"{dataset} {name}: AUROC of {says}; rank correlation of the score with {ranks}; {share:.0%} lies beyond")
        if out is None:
            continue
        normal = label[truth == 0][0]
        left, right = row.subfigures(1, 2, width_ratios=[1, 1.6])
        row.suptitle(f"{dataset}, normal: {name}", fontsize=11)
        axes = left.subplots()
        kinds = [one for one in np.unique(label) if one != normal]
        kinds.sort(key=lambda one: metrics.auroc(*_pair(found["score"], label, normal, one)))
        for number, (part, values) in enumerate(found.items()):
            aurocs = [metrics.auroc(*_pair(values, label, normal, one)) for one in kinds]
            print("   ", part, {images.class_names[one]: round(a, 3) for one, a in zip(kinds, aurocs, strict=True)})
            axes.plot(aurocs, range(len(kinds)), "osD"[number], color=figures.PALETTE[number], label=part, alpha=0.8)
        axes.axvline(0.5, color=figures.NEUTRAL, linewidth=0.8, linestyle=":")
        axes.set(yticks=range(len(kinds)), yticklabels=[images.class_names[one] for one in kinds], xlabel="AUROC")
        axes.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=3)
        panels = right.subplots(2, SHOWN)
        order = np.argsort(kept["score"], kind="stable")
        anomalous, normals = (order[kept["truth"][order] == kind] for kind in (1, 0))
        for line, ends in enumerate((anomalous[:SHOWN], normals[-SHOWN:][::-1])):
            for panel, one in zip(panels[line], ends, strict=True):
                panel.imshow(images.pixels[kept["index"][one]].transpose(1, 2, 0).squeeze(), cmap="gray")
                panel.set_title(f"{images.class_names[kept['label'][one]]}\n{kept['score'][one]:.2f}", fontsize=8)
                panel.set_xticks([])
                panel.set_yticks([])
            panels[line][0].set_ylabel(
                ("anomalies with\nthe lowest scores", "normals with\nthe highest")[line], fontsize=9
            )
    if out is not None:
        figures.save(figure, out)


def _pair(values: np.ndarray, label: np.ndarray, normal: int, kind: int) -> tuple[np.ndarray, np.ndarray]:
    """Values and truth of the normal images and of one kind of anomaly."""
    both = (label == normal) | (label == kind)
    return values[both], (label[both] == kind).astype(int)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Where scatter_subspace fails, and by which part of its score.")
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, help="the figure, a row a run")
    given = parser.parse_args()
    draw(given.runs, given.out)
