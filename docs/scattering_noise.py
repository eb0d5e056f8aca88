"""Print what noise in the test images costs `scatter_subspace` on USPS, by the eps of its logarithm.

ANOMALY_LAB_DATA=data python docs/scattering_noise.py
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from anomaly_lab import config, metrics
from anomaly_lab.build import make_data, make_detector
from anomaly_lab.detector import looking

SIGMAS = (0.0, 0.02, 0.05, 0.1)
"""Of noise in the stored images, from 0 to 1, which are clipped and rounded to bytes again."""

EPS = (1e-4, 1e-3, 1e-2)
CLASSES, MOST, EACH = (1, 3, 5, 8), 400, 3
"""Reduced: four classes, so many training images of each, one test image in so many."""


def noisy(pixels: np.ndarray, sigma: float) -> Tensor:
    noise = np.random.RandomState(0).randn(*pixels.shape) * sigma * 255
    return torch.from_numpy(np.clip(np.rint(pixels + noise), 0, 255).astype(np.uint8))


def main() -> None:
    given = ["model=scatter_subspace", "dataset=usps", "split=official", "trainer.accelerator=cpu"]
    first = make_data(config.job(config.compose([*given, "normal_class=0"])))
    images, eps = first.images, first.prepare.features.eps

    def coefficients(pixels: Tensor) -> Tensor:
        """S x, which the features hold as log(eps + S x)."""
        with torch.no_grad():
            parts = [first.prepare.features(first.prepare.image(some)) for some in pixels.split(10)]
        return torch.cat(parts).exp() - eps

    jobs = {digit: config.job(config.compose([*given, f"normal_class={digit}"])) for digit in CLASSES}
    parts = {digit: make_data(job).partition.train[:MOST] for digit, job in jobs.items()}
    normal = {digit: coefficients(torch.from_numpy(images.pixels[part])) for digit, part in parts.items()}
    shown = np.flatnonzero(images.is_test)[::EACH]
    test = [coefficients(noisy(images.pixels[shown], sigma)) for sigma in SIGMAS]
    labels = images.labels[shown]
    print("| `eps` | " + " | ".join(f"sigma {sigma:g}" for sigma in SIGMAS) + " |")
    print("|---:" * (1 + len(SIGMAS)) + "|")
    for eps in EPS:
        found = []
        for digit, job in jobs.items():
            detector = make_detector(job.cfg, first.image_shape)
            detector.randomness.settle(torch.device("cpu"))
            train, *seen = ((some + eps).log().half().float() for some in (normal[digit], *test))  # as a run keeps them
            with looking(detector):
                detector.after_fit(train)
                scores = [torch.cat([detector.score(x) for x in some.split(100)]).numpy() for some in seen]
            found.append([metrics.auroc(score, labels != digit) for score in scores])
        print(f"| {eps:g} | " + " | ".join(f"{mean:.3f}" for mean in np.mean(found, 0)) + " |", flush=True)


if __name__ == "__main__":
    main()
